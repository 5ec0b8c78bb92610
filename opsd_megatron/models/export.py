"""The model's current weights as full Hugging Face tensors, streamed one parameter at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_megatron.distributed.collectives import gather_shards
from opsd_megatron.distributed.parallel import ParallelDims
from opsd_megatron.models.qwen3 import Qwen3Spec
from opsd_megatron.models.weight_map import HEAD, Placement, join_shards, layer_offset, placements, shard_shape


@torch.no_grad()
def export_hf_weights(model: torch.nn.Module, spec: Qwen3Spec, dims: ParallelDims) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor under its Hugging Face name, in the model's dtype, in the order transformers writes them.

    Vocabulary padding is stripped; a tied head is not repeated. Data-parallel replicas do the same work side by side.
    At most one parameter exists in full at a time, plus what the caller keeps.

    Ranks: every rank iterates to the end, in step; every rank gets every tensor. The tensors may share memory with the
    model's weights: copy what is kept past the next optimizer step.

    Args:
        model: The unwrapped model.
        spec: What it was built from.
        dims: The mesh it was built on.
    """
    parameters = dict(model.named_parameters())
    template = next(iter(parameters.values()))
    per_stage = spec.num_layers // dims.pp
    for place in placements(spec):
        stage = _stage(place, per_stage, dims.pp)
        if stage == dims.pp_rank:
            shard = _own_shard(parameters, place, layer_offset(spec, dims))
        else:
            shard = torch.empty(shard_shape(place, spec, dims.tp), dtype=template.dtype, device=template.device)
        if dims.pp > 1:
            # Shards travel over the pipeline before they are joined: a tp-th of the traffic of full tensors.
            dist.broadcast(shard, src=dist.get_global_rank(dims.pp_group, stage), group=dims.pp_group)
        shards = [shard] if place.rule.kind == "whole" else gather_shards(shard, dims.tp_group)
        yield from zip(place.hf_names, join_shards(place, spec, shards), strict=True)


def _stage(place: Placement, layers_per_stage: int, pp: int) -> int:
    """The pipeline stage that holds a parameter."""
    if place.layer is not None:
        return place.layer // layers_per_stage
    return 0 if place.rule.kind == "vocab" and place.rule is not HEAD else pp - 1


def _own_shard(parameters: dict[str, torch.nn.Parameter], place: Placement, offset: int) -> Tensor:
    for name in place.mcore_names(offset):
        if name in parameters:
            return parameters[name].detach()
    raise KeyError(f"the model has no parameter {' or '.join(place.mcore_names(offset))}")
