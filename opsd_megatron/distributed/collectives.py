"""Small collectives on Python objects and on tensor shards."""

from __future__ import annotations

from typing import TypeVar, cast

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


def gather_shards(shard: Tensor, group: dist.ProcessGroup, *, into: list[Tensor] | None = None) -> list[Tensor]:
    """Everybody's ``shard`` (equal shapes and dtypes), in rank order. Not differentiable.

    Args:
        shard: This rank's.
        group: Whose.
        into: Tensors to receive them; new ones if left out.

    Ranks: every rank of ``group``; valid on all of them.
    """
    if group.size() == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(group.size())] if into is None else into
    dist.all_gather(shards, shard.contiguous(), group=group)
    return shards
