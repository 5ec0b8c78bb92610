"""The model's current weights as full Hugging Face tensors, streamed one parameter at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_megatron.distributed.collectives import gather_shards
from opsd_megatron.distributed.parallel import ParallelDims
from opsd_megatron.models.qwen3 import Qwen3Spec
from opsd_megatron.models.rules import HEAD
from opsd_megatron.models.stages import stage_layers
from opsd_megatron.models.weight_map import Placement, join_shards, placed_parameters, placements, shard_shape


@torch.no_grad()
def export_hf_weights(
    chunks: Sequence[torch.nn.Module], spec: Qwen3Spec, dims: ParallelDims
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor under its Hugging Face name, in the model's dtype.

    The order is that in which transformers writes them, but for a layer's experts: those that have the same place on
    their expert-parallel ranks come one after the other, since they travel together. Vocabulary padding is stripped; a
    tied head is not repeated. Data-parallel replicas do the same work side by side. What exists in full at a time,
    beside what the caller keeps: one parameter, or one of as many experts as there are expert-parallel ranks.

    Ranks: every rank iterates to the end, in step; every rank gets every tensor, other ranks' experts included. The
    tensors may share memory with the model's weights: copy what is kept past the next optimizer step.

    Args:
        chunks: This rank's chunks of the unwrapped model.
        spec: What they were built from.
        dims: The mesh they were built on.
    """
    parameters = dict(placed_parameters(chunks, spec, dims))
    template = next(iter(parameters.values()))
    stage_of_layer = _stages(spec, dims)
    experts = spec.num_experts // dims.ep
    for place in placements(spec):
        if place.expert is not None and place.expert >= experts:
            continue  # comes with the first rank's expert of the same place
        stage = _stage(place, stage_of_layer, dims.pp)
        if stage == dims.pp_rank:
            own = place if place.expert is None else replace(place, expert=place.expert + dims.ep_rank * experts)
            shard = parameters[own].detach()
        else:
            tp = dims.tp if place.expert is None else dims.etp
            shard = torch.empty(shard_shape(place, spec, tp), dtype=template.dtype, device=template.device)
        if dims.pp > 1:
            # Shards travel over the pipeline before they are joined: a tp-th of the traffic of full tensors.
            dist.broadcast(shard, src=dist.get_global_rank(dims.pp_group, stage), group=dims.pp_group)
        if place.expert is None:
            shards = [shard] if place.rule.kind == "whole" else gather_shards(shard, dims.tp_group)
            yield from zip(place.hf_names, join_shards(place, spec, shards), strict=True)
            continue
        shards = gather_shards(shard, dims.expert_group)
        for rank in range(dims.ep):
            there = replace(place, expert=place.expert + rank * experts)
            parts = shards[rank * dims.etp : (rank + 1) * dims.etp]
            yield from zip(there.hf_names, join_shards(there, spec, parts), strict=True)


def _stages(spec: Qwen3Spec, dims: ParallelDims) -> dict[int, int]:
    """The pipeline rank that holds each layer."""
    ranks = stage_layers(spec.num_layers, pp=dims.pp, vpp=dims.vpp)
    return {layer: rank for rank, chunks in enumerate(ranks) for layers in chunks for layer in layers}


def _stage(place: Placement, stage_of_layer: dict[int, int], pp: int) -> int:
    """The pipeline rank that holds a parameter."""
    if place.layer is not None:
        return stage_of_layer[place.layer]
    return 0 if place.rule.kind == "vocab" and place.rule is not HEAD else pp - 1
