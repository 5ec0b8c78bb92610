"""The divergence from logits that exist already, sharded over the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsd_megatron.losses.divergences import ClipMode, DivergenceSpec
from opsd_megatron.losses.row_losses import DivergenceLoss
from opsd_megatron.losses.rows import finished
from opsd_megatron.losses.shard import VocabShard, check_rows
from opsd_megatron.losses.topk import TopK


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
    support: TopK | None = None,
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
        support: Take the divergence over the k most likely entries only; ``None``: over the whole vocabulary.

    Returns:
        Loss of each row in nats, ``[R]`` float32 (float64 for float64 logits), equal on all ranks.

    Raises:
        ValueError: An argument is out of range or shapes do not fit.
        FloatingPointError: NaN or +inf among the logits; names the side. Raised on every rank.

    Ranks: all of ``tp_group``, with equal ``R``. Two collectives of a few numbers a row forward (none if ``R == 0``),
    none backward.
    """
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student and teacher logits must be [R, V/tp] and of one shape, not "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    spec = DivergenceSpec(beta, temperature, clip, clip_mode)
    task = DivergenceLoss(spec, support, VocabShard.of(student_logits.shape[1], vocab_size, tp_group))
    loss: Tensor = _Divergence.apply(student_logits, teacher_logits, task, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return loss


class _Divergence(torch.autograd.Function):
    """Forms the gradient in forward, for an upstream gradient of 1, and keeps nothing else."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, task: DivergenceLoss, with_gradient: bool) -> Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        ctx.width, ctx.dtype = task.shard.width, student.dtype
        if student.shape[0] == 0:
            ctx.save_for_backward(student.to(dtype))
            return student.new_empty(0, dtype=dtype)
        # Copies of the true columns that may be overwritten; the student's by the gradient.
        own, teacher = (
            side[:, : task.shard.columns].to(dtype, copy=True, memory_format=torch.contiguous_format)
            for side in (student, teacher)
        )
        with_gradient = with_gradient and ctx.needs_input_grad[0]
        result = finished(task.evaluate(own, teacher, slice(None), None, with_gradient=with_gradient))
        check_rows(dict(zip(("student", "teacher"), result.bad, strict=True)))
        if with_gradient:
            ctx.save_for_backward(own)
        return result.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        scaled = (gradient * grad_loss.unsqueeze(1)).to(ctx.dtype)
        return torch.nn.functional.pad(scaled, (0, ctx.width - scaled.shape[1])), None, None, None
