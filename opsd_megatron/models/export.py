"""The model's current weights as full Hugging Face tensors, streamed in buckets of a fixed size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_megatron.distributed.collectives import gather_shards
from opsd_megatron.distributed.parallel import ParallelDims
from opsd_megatron.models.lora import effective_weight
from opsd_megatron.models.qwen3 import Qwen3Spec
from opsd_megatron.models.rules import HEAD
from opsd_megatron.models.stages import stage_layers
from opsd_megatron.models.weight_map import (
    Placement,
    join_shards,
    placed_parameters,
    placements,
    shard_shape,
    spread_shard,
)

# What a collective gathers at a time over NCCL: enough to be worth its latency, little beside a model. Over gloo there
# is no latency to save, and to copy shards into a bucket costs more than it brings: parameters travel one by one.
BUCKET_BYTES = 256 * 2**20


@dataclass(frozen=True)
class _Item:
    """One parameter on its way, or one expert's of every expert-parallel rank.

    Attributes:
        place: The parameter; of experts, the first expert-parallel rank's.
        stage: The pipeline rank that holds it.
        shape: Of a shard.
        stays: Whether a rank's own shard is all that is wanted there.
        parameter: This rank's shard; ``None`` where another pipeline rank holds it.
    """

    place: Placement
    stage: int
    shape: tuple[int, ...]
    stays: bool
    parameter: Tensor | None

    def travels_with(self, other: _Item) -> bool:
        """Whether the two can go in one collective."""
        ours, theirs = ((item.stage, item.place.rule.of_expert, item.stays) for item in (self, other))
        return ours == theirs

    def own(self) -> Tensor:
        """This rank's shard, where it has one, with adapters merged."""
        assert self.parameter is not None
        return effective_weight(self.parameter)


@torch.no_grad()
def export_hf_weights(
    chunks: Sequence[torch.nn.Module],
    spec: Qwen3Spec,
    dims: ParallelDims,
    *,
    own_shards_of: frozenset[str] = frozenset(),
    mark_rest: bool = False,
    bucket_bytes: int | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor under its Hugging Face name, in the model's dtype; adapters are merged into what they adapt.

    The order is that in which transformers writes them, but for a layer's experts: those that have the same place on
    their expert-parallel ranks come one after the other, since they travel together. Vocabulary padding is stripped; a
    tied head is not repeated. Data-parallel replicas do the same work side by side.

    Shards of neighbouring parameters travel in one collective. What exists at a time, beside what the caller keeps: a
    bucket of shards, the bucket gathered from all ranks, and one parameter put together from it. Without tensor and
    pipeline parallelism nothing is copied but what has to be reordered or merged.

    Ranks: every rank iterates to the end, in step; every rank gets every tensor, other ranks' experts included. The
    tensors may share memory with the model's weights: copy what is kept past the next optimizer step.

    Args:
        chunks: This rank's chunks of the unwrapped model.
        spec: What they were built from.
        dims: The mesh they were built on.
        own_shards_of: Tensors that a consumer only reads this tensor-parallel rank's rows or columns of: these come
            with nothing but those filled in, and do not travel. Only without pipeline stages.
        mark_rest: Fill the rest of those with NaN, so that a consumer that reads it after all is found out.
        bucket_bytes: Gathered bytes of a bucket; a larger parameter travels alone. ``None`` for what suits the backend.
    """
    assert dims.pp == 1 or not own_shards_of
    if bucket_bytes is None:
        bucket_bytes = BUCKET_BYTES if dist.get_backend(dims.tp_group) == "nccl" else 0
    parameters = dict(placed_parameters(chunks, spec, dims))
    template = next(iter(parameters.values())).detach()
    scratch = _Scratch(template)
    for bucket in _buckets(parameters, spec, dims, own_shards_of, bucket_bytes // template.element_size()):
        if not bucket[0].stays:
            yield from _exchange(bucket, scratch, spec, dims)
            continue
        for item in bucket:
            tp, rank = (dims.tp, dims.tp_rank) if item.place.expert is None else (dims.etp, dims.etp_rank)
            full = spread_shard(item.place, spec, item.own(), tp=tp, tp_rank=rank, mark_rest=mark_rest)
            yield from zip(item.place.hf_names, full, strict=True)


def _buckets(
    parameters: dict[Placement, torch.nn.Parameter],
    spec: Qwen3Spec,
    dims: ParallelDims,
    own_shards_of: frozenset[str],
    most: int,
) -> Iterator[list[_Item]]:
    """Neighbouring parameters from one pipeline rank, gathered over the same ranks; ``most`` numbers at most."""
    stage_of_layer = _stages(spec, dims)
    experts = spec.num_experts // dims.ep
    bucket: list[_Item] = []
    size = 0
    for place in placements(spec):
        if place.expert is not None and place.expert >= experts:
            continue  # comes with the first rank's expert of the same place
        parts, ranks = (dims.tp, dims.tp) if place.expert is None else (dims.etp, dims.expert_group.size())
        shape = shard_shape(place, spec, parts)
        stage = _stage(place, stage_of_layer, dims.pp)
        item = _Item(place, stage, shape, place.hf_names[0] in own_shards_of, None)
        if stage == dims.pp_rank:
            own = place if place.expert is None else replace(place, expert=place.expert + dims.ep_rank * experts)
            item = replace(item, parameter=parameters[own])
        gathered = math.prod(shape) * ranks
        if bucket and (not item.travels_with(bucket[0]) or size + gathered > most):
            yield bucket
            bucket, size = [], 0
        bucket.append(item)
        size += gathered
    yield bucket


class _Scratch:
    """Memory for shards on their way, used by one bucket after the other."""

    def __init__(self, template: Tensor) -> None:
        self._template = template
        self._flat = template.new_empty(0)

    def rows(self, count: int, size: int) -> Tensor:
        """``count`` vectors of ``size`` numbers, ``[count, size]``, which last until the next call."""
        if self._flat.numel() < count * size:
            self._flat = self._template.new_empty(count * size)
        return self._flat[: count * size].view(count, size)


def _exchange(
    bucket: list[_Item], scratch: _Scratch, spec: Qwen3Spec, dims: ParallelDims
) -> Iterator[tuple[str, Tensor]]:
    """Bring all ranks' shards of a bucket together and put the parameters together from them."""
    stage, of_expert = bucket[0].stage, bucket[0].place.rule.of_expert
    group = dims.expert_group if of_expert else dims.tp_group
    travels = group.size() > 1 or dims.pp > 1
    if not travels:
        gathered = [[item.own()] for item in bucket]
    else:
        sizes = [math.prod(item.shape) for item in bucket]
        rows = scratch.rows(1 + group.size() if group.size() > 1 else 1, sum(sizes))
        flat = rows[0]
        if stage == dims.pp_rank and len(bucket) == 1:
            flat = bucket[0].own().reshape(-1)  # sent from where it lies
        elif stage == dims.pp_rank:
            torch.cat([item.own().reshape(-1) for item in bucket], out=flat)
        if dims.pp > 1:
            # Shards travel over the pipeline before they are joined: a tp-th of the traffic of full tensors.
            dist.broadcast(flat, src=dist.get_global_rank(dims.pp_group, stage), group=dims.pp_group)
        cut = [row.split(sizes) for row in gather_shards(flat, group, into=rows[1:])]
        gathered = [[row[number].view(item.shape) for row in cut] for number, item in enumerate(bucket)]

    def joined(place: Placement, shards: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        kind = place.rule.kind
        # Joining copies; what is not joined must not go with the scratch memory.
        if travels and (kind == "whole" or (len(shards) == 1 and kind != "qkv")):
            shards = [shards[0].clone()]
        return zip(place.hf_names, join_shards(place, spec, shards), strict=True)

    experts = spec.num_experts // dims.ep
    for item, shards in zip(bucket, gathered, strict=True):
        if item.place.expert is None:
            yield from joined(item.place, shards)
            continue
        for rank in range(dims.ep):
            there = replace(item.place, expert=item.place.expert + rank * experts)
            parts = shards[rank * dims.etp : (rank + 1) * dims.etp]
            yield from joined(there, parts)


def _stages(spec: Qwen3Spec, dims: ParallelDims) -> dict[int, int]:
    """The pipeline rank that holds each layer."""
    ranks = stage_layers(spec.num_layers, pp=dims.pp, vpp=dims.vpp)
    return {layer: rank for rank, chunks in enumerate(ranks) for layers in chunks for layer in layers}


def _stage(place: Placement, stage_of_layer: dict[int, int], pp: int) -> int:
    """The pipeline rank that holds a parameter."""
    if place.layer is not None:
        return stage_of_layer[place.layer]
    return 0 if place.rule.kind == "vocab" and place.rule is not HEAD else pp - 1
