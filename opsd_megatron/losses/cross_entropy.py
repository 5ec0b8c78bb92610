"""Cross-entropy from hidden states, in row chunks and across vocabulary shards, for supervised targets."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsd_megatron.losses.head import Head, HeadGradients, check_head, row_chunks
from opsd_megatron.losses.shard import VocabShard, check_rows, check_targets


def linear_cross_entropy(
    student_hidden: Tensor,
    student_weight: Tensor,
    target_ids: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Minus the log-probability of each row's target at temperature 1, without the logits in memory.

    Args:
        student_hidden: ``[R, H]``, equal on all ranks. Its gradient comes back complete, summed over ``tp_group``.
        student_weight: This rank's shard of the head, ``[V/tp, H]``; may be frozen.
        target_ids: Vocabulary index of each row's target, ``[R]`` int64.
        tp_group: Ranks that hold the vocabulary's shards, in order; ``None`` where this rank holds all of it.
        vocab_size: Vocabulary entries without padding; later head rows are ignored and get a zero gradient.
        chunk_rows: Rows whose logits exist at a time, equal on all ranks; ``None``: 128 MiB worth of them.

    Returns:
        Loss of each row in nats, ``[R]`` float32 (float64 for float64 inputs), equal on all ranks.

    Raises:
        ValueError: Shapes do not fit, or a target lies outside the vocabulary.
        FloatingPointError: NaN or +inf among the logits. Raised on every rank.

    Ranks: all of ``tp_group``, with equal ``R``. Two all-reduces a chunk forward; backward one in all, of the hidden
    gradient. None of them if ``R == 0``.
    """
    check_head("student", student_hidden, student_weight, chunk_rows)
    shard = VocabShard.of(student_weight.shape[0], vocab_size, tp_group)
    check_targets(target_ids, student_hidden.shape[0], shard)
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        student_hidden, student_weight, target_ids, shard, chunk_rows
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps its inputs and two numbers a row."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target_ids: Tensor, shard: VocabShard, chunk_rows: int | None
    ) -> Tensor:
        head = Head(weight, shard)
        state = hidden.new_empty((2, hidden.shape[0]), dtype=torch.promote_types(hidden.dtype, torch.float32))
        loss = torch.empty_like(state[0])
        for rows in row_chunks(hidden.shape[0], shard, chunk_rows):
            logits = head.logits(hidden[rows])
            maximum = shard.max_(shard.row_max(logits))
            logits.sub_(maximum.unsqueeze(1))
            target = shard.pick(logits, target_ids[rows])
            total, target = shard.sum_(torch.stack([logits.exp_().sum(1), target])).unbind()
            state[0, rows], state[1, rows] = maximum, total.log()
            loss[rows] = state[1, rows] - target
        check_rows({"student": ~state[0].isfinite()})
        ctx.save_for_backward(hidden, weight, target_ids, state)
        ctx.shard, ctx.chunk_rows = shard, chunk_rows
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target_ids, state = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        gradients = HeadGradients(hidden, weight, shard, for_hidden=for_hidden, for_weight=for_weight)
        for rows in row_chunks(hidden.shape[0], shard, ctx.chunk_rows):
            maximum, log_sum = state[:, rows].unsqueeze(2).unbind()
            grad_logits = gradients.head.logits(hidden[rows]).sub_(maximum).sub_(log_sum).exp_()
            shard.add_at_(grad_logits, target_ids[rows], -1.0)
            gradients.add(rows, grad_logits.mul_(grad_loss[rows].unsqueeze(1)))
        return *gradients.finish(), None, None, None
