"""The divergence from logits that exist already, sharded over the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsd_megatron.losses.divergences import ClipMode, DivergenceSpec
from opsd_megatron.losses.rows import evaluate_rows, logit_gradient
from opsd_megatron.losses.shard import VocabShard, check_rows


def vocab_parallel_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    clip: float | None = None,
    clip_mode: ClipMode = "entry",
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Divergence of the student's next-token distribution from the teacher's, per row, over the full vocabulary.

    Where the logits are only computed for this loss, :func:`~opsd_megatron.losses.linear_divergence` saves them.

    Args:
        student_logits: This rank's columns, ``[R, V/tp]``, not divided by temperature.
        teacher_logits: The same for the teacher; gets no gradient.
        beta: 0 is forward KL(teacher || student), 1 reverse KL, in between generalized Jensen-Shannon.
        temperature: Both sides' logits are divided by it.
        clip: Upper clip tau; ``None`` for no clip.
        clip_mode: Where the clip acts, see :mod:`opsd_megatron.losses.divergences`.
        tp_group: Ranks that hold the vocabulary's shards, in order; ``None`` where this rank holds all of it.
        vocab_size: Vocabulary entries without padding; later columns are ignored and get a zero gradient.

    Returns:
        Loss of each row in nats, ``[R]`` float32 (float64 for float64 logits), equal on all ranks.

    Raises:
        ValueError: An argument is out of range or shapes do not fit.
        FloatingPointError: NaN or +inf among the logits; names the side. Raised on every rank.

    Ranks: all of ``tp_group``, with equal ``R``. Three collectives of a few numbers a row forward (none if ``R == 0``),
    none backward.
    """
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student and teacher logits must be [R, V/tp] and of one shape, not "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    spec = DivergenceSpec(beta, temperature, clip, clip_mode)
    shard = VocabShard.of(student_logits.shape[1], vocab_size, tp_group)
    loss: Tensor = _Divergence.apply(student_logits, teacher_logits, spec, shard)  # type: ignore[no-untyped-call]
    return loss


class _Divergence(torch.autograd.Function):
    """Keeps the logits it was given and six numbers a row; the gradient is formed in backward."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, spec: DivergenceSpec, shard: VocabShard) -> Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        if student.shape[0] == 0:
            state, loss = student.new_empty((6, 0), dtype=dtype), student.new_empty(0, dtype=dtype)
        else:
            rows = evaluate_rows(_own(student, shard, dtype), _own(teacher, shard, dtype), spec, shard)
            check_rows({"student": rows.student_bad, "teacher": rows.teacher_bad})
            state, loss = rows.state, rows.loss
        ctx.save_for_backward(student, teacher, state)
        ctx.spec, ctx.shard = spec, shard
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        student, teacher, state = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        grad = logit_gradient(
            _own(student, shard, state.dtype), _own(teacher, shard, state.dtype), ctx.spec, state, grad_loss
        )
        if shard.columns == shard.width:
            return grad.to(student.dtype), None, None, None
        padded = torch.zeros_like(student, memory_format=torch.contiguous_format)
        padded[:, : shard.columns] = grad
        return padded, None, None, None


def _own(logits: Tensor, shard: VocabShard, dtype: torch.dtype) -> Tensor:
    """A copy of the true columns that may be overwritten."""
    return logits[:, : shard.columns].to(dtype, copy=True)
