"""The token embedding, whose gradient goes to the rows that were looked up instead of through a tensor of all rows."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable


class RowAccumulatingEmbedding(VocabParallelEmbedding):  # type: ignore[misc]
    """Adds its gradient to the rows of ``weight.main_grad`` that it looked up.

    Autograd would make a tensor as large as the weight for every micro-batch, almost all of it zeros, in the weight's
    dtype, and Megatron-Core then add that to ``main_grad``. Without ``main_grad`` it is left to autograd.
    """

    @staticmethod
    def take_over(embedding: VocabParallelEmbedding) -> None:
        """Make one of an embedding that exists; its parameters, their names and its checkpoints stay."""
        embedding.__class__ = RowAccumulatingEmbedding

    def forward(self, input_: Tensor) -> Tensor:
        """``[b, s]`` int64 to ``[b, s, H]``, or to ``[s/tp, b, H]`` where each rank keeps its part of the sequence.

        Ranks: all of the tensor-parallel group.
        """
        rows, elsewhere = input_, None
        if self.tp_group.size() > 1:
            rows = input_ - self.vocab_start_index
            elsewhere = (rows < 0) | (rows >= self.num_embeddings_per_partition)
            rows = rows.masked_fill(elsewhere, 0)
        found = _lookup(rows, self.weight)
        if elsewhere is not None:
            found = found.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        if self.reduce_scatter_embeddings:
            parts = found.transpose(0, 1).contiguous()
            return cast(Tensor, reduce_scatter_to_sequence_parallel_region(parts, group=self.tp_group))
        return cast(Tensor, reduce_from_tensor_model_parallel_region(found, group=self.tp_group))


def _lookup(rows: Tensor, weight: Tensor) -> Tensor:
    """``F.embedding``."""
    if getattr(weight, "main_grad", None) is None:
        return F.embedding(rows, weight)
    return cast(Tensor, _AccumulatingLookup.apply(rows, weight))  # type: ignore[no-untyped-call]


class _AccumulatingLookup(torch.autograd.Function):
    """``F.embedding`` of a weight with ``main_grad``; autograd is given no gradient of it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.weight = weight
        return F.embedding(rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        (rows,) = ctx.saved_tensors
        add_rows(ctx.weight.main_grad, rows.flatten(), grad.flatten(0, -2))
        return None, None


def add_rows(total: Tensor, rows: Tensor, values: Tensor) -> None:
    """``total[rows] += values``, in place; the same to the last bit each time, which ``index_add_`` is not on CUDA.

    What goes to one row is summed first. Then every row is added to once, and what is left over adds zeros to one of
    them, so that the order in which a device does it makes no difference. Nothing waits for the device.

    Args:
        total: ``[V, H]``.
        rows: ``[T]`` int64, in any order and more than once.
        values: ``[T, H]``; summed in the dtype of ``total``.
    """
    if not rows.numel():
        return
    ordered, order = rows.sort(stable=True)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[1:], ordered[:-1], out=starts[1:])
    groups = starts.cumsum(0) - 1
    sums = torch.ops.aten.embedding_dense_backward(values[order].to(total.dtype), groups, rows.numel(), -1, False)
    targets = ordered[0].repeat(rows.numel()).scatter_(0, groups, ordered)
    total.index_add_(0, targets, sums)
