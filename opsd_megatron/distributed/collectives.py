"""Small collectives on Python objects and on tensor shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def broadcast_object(value: T | None, *, src: int = 0, group: dist.ProcessGroup | None = None) -> T:
    """Give every rank the picklable ``value`` of world rank ``src``.

    Ranks: every rank of ``group`` (default: the world); the argument counts on ``src`` only.
    """
    box: list[T | None] = [value]
    dist.broadcast_object_list(box, src=src, group=group)
    return cast(T, box[0])


def gather_objects(value: T, *, group: dist.ProcessGroup | None = None) -> list[T]:
    """Everybody's picklable ``value``, in rank order.

    Ranks: every rank of ``group`` (default: the world); valid on all of them.
    """
    values: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return cast("list[T]", values)


def largest(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of all ranks' values, each for itself.

    Ranks: every rank of the world, with equally many values; valid on all of them.

    Args:
        values: This rank's.
        device: Where the world's backend wants tensors.
    """
    found = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return cast("list[float]", found.tolist())


def gather_shards(shard: Tensor, group: dist.ProcessGroup, *, into: Tensor | None = None) -> list[Tensor]:
    """Everybody's ``shard`` (equal shapes and dtypes), in rank order. Not differentiable.

    Args:
        shard: This rank's.
        group: Whose.
        into: Contiguous memory to receive them, ``[ranks, *shape of the shard]``; new memory if left out.

    Ranks: every rank of ``group``; valid on all of them.
    """
    if group.size() == 1:
        return [shard]
    received = shard.new_empty(group.size(), *shard.shape) if into is None else into
    shards = list(received.unbind(0))
    if dist.get_backend(group) == "nccl":
        # From a list of tensors it would gather into memory of its own first.
        dist.all_gather_into_tensor(received, shard.contiguous(), group=group)
    else:
        dist.all_gather(shards, shard.contiguous(), group=group)
    return shards


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def sum_gradient(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``x`` itself; in backward its gradient is summed over the ranks of ``group``, each of which uses part of it.

    Megatron-Core's ``copy_to_tensor_model_parallel_region`` sums a gradient in place, and one that is not contiguous
    not at all: it sums a copy and returns the original (mcore 0.16.1, tensor_parallel/mappings.py:31).

    Ranks: every rank of ``group``, in forward and in backward.
    """
    return x if group.size() == 1 else _SumGradient.apply(x, group)  # type: ignore[no-any-return]


def summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``x`` summed over the ranks of ``group``. They go on alike, and so the sum's gradient is that of each ``x``.

    See :func:`sum_gradient` for why this is not Megatron-Core's.

    Ranks: every rank of ``group``.
    """
    return x if group.size() == 1 else _Summed.apply(x, group)  # type: ignore[no-any-return]
