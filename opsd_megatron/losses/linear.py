"""The divergence from hidden states: head product, divergence and gradient a few rows at a time.

One float32 logit row of a 152k vocabulary is 0.58 MiB; a chunk of them is the most that ever exists, on either side.
Backward computes a chunk's logits again, which makes it exact for any upstream gradient of the rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsd_megatron.losses.divergences import ClipMode, DivergenceSpec
from opsd_megatron.losses.head import Head, HeadGradients, check_head, row_chunks
from opsd_megatron.losses.rows import Diagnostics, RowResults, evaluate_rows, logit_gradient
from opsd_megatron.losses.shard import VocabShard, check_rows, check_targets


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    clip: float | None = None,
    clip_mode: ClipMode = "entry",
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Divergence of the student's next-token distribution from the teacher's, per row, without the logits in memory.

    Equals :func:`~opsd_megatron.losses.vocab_parallel_divergence` of ``hidden @ weight.T``.

    Args:
        student_hidden: ``[R, H]``, equal on all ranks. Its gradient comes back complete, summed over ``tp_group``.
        student_weight: This rank's shard of the student's head, ``[V/tp, H]``; may be frozen.
        teacher_hidden: ``[R, Ht]``; the teacher's sizes may differ from the student's. Gets no gradient.
        teacher_weight: ``[V/tp, Ht]``; gets no gradient.
        beta: 0 is forward KL(teacher || student), 1 reverse KL, in between generalized Jensen-Shannon.
        temperature: Both sides' logits are divided by it.
        clip: Upper clip tau; ``None`` for no clip.
        clip_mode: Where the clip acts, see :mod:`opsd_megatron.losses.divergences`.
        tp_group: Ranks that hold the vocabulary's shards, in order; ``None`` where this rank holds all of it.
        vocab_size: Vocabulary entries without padding; later head rows are ignored and get a zero gradient.
        chunk_rows: Rows whose logits exist at a time, equal on all ranks; ``None``: 128 MiB worth of them a side.

    Returns:
        Loss of each row in nats, ``[R]`` float32 (float64 for float64 inputs), equal on all ranks.

    Raises:
        ValueError: An argument is out of range or shapes do not fit.
        FloatingPointError: NaN or +inf among a side's logits; names the side. Raised on every rank.

    Ranks: all of ``tp_group``, with equal ``R``. Three collectives a chunk forward, of a few numbers a row; backward
    one all-reduce in all, of the hidden gradient. None of them if ``R == 0``.
    """
    return linear_divergence_with_diagnostics(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        beta=beta,
        temperature=temperature,
        clip=clip,
        clip_mode=clip_mode,
        tp_group=tp_group,
        vocab_size=vocab_size,
        chunk_rows=chunk_rows,
    )[0]


def linear_divergence_with_diagnostics(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    clip: float | None = None,
    clip_mode: ClipMode = "entry",
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    target_ids: Tensor | None = None,
) -> tuple[Tensor, Diagnostics]:
    """:func:`linear_divergence` together with what its forward pass sees on the way.

    Arguments as there, and ``target_ids``: the vocabulary index of each row's token, ``[R]`` int64, whose
    log-probabilities the diagnostics report; ``None`` for no such report.

    Raises:
        ValueError: Also for a target outside the vocabulary.
    """
    check_head("student", student_hidden, student_weight, chunk_rows)
    check_head("teacher", teacher_hidden, teacher_weight, chunk_rows)
    if student_hidden.shape[0] != teacher_hidden.shape[0] or student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            "student and teacher differ in rows or in vocabulary: hidden "
            f"{tuple(student_hidden.shape)} and {tuple(teacher_hidden.shape)}, head weight "
            f"{tuple(student_weight.shape)} and {tuple(teacher_weight.shape)}"
        )
    spec = DivergenceSpec(beta, temperature, clip, clip_mode)
    shard = VocabShard.of(student_weight.shape[0], vocab_size, tp_group)
    if target_ids is not None:
        check_targets(target_ids, student_hidden.shape[0], shard)
    loss, block = _LinearDivergence.apply(  # type: ignore[no-untyped-call]
        student_hidden, student_weight, teacher_hidden, teacher_weight, target_ids, spec, shard, chunk_rows
    )
    return loss, Diagnostics.from_block(block)


class _LinearDivergence(torch.autograd.Function):
    """Keeps its inputs and six numbers a row."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        target_ids: Tensor | None,
        spec: DivergenceSpec,
        shard: VocabShard,
        chunk_rows: int | None,
    ) -> tuple[Tensor, Tensor]:
        student_head, teacher_head = Head(student_weight, shard), Head(teacher_weight, shard)
        chunks: list[RowResults] = []
        for rows in row_chunks(student_hidden.shape[0], shard, chunk_rows):
            chunks.append(
                evaluate_rows(
                    student_head.logits(student_hidden[rows]),
                    teacher_head.logits(teacher_hidden[rows]),
                    spec,
                    shard,
                    None if target_ids is None else target_ids[rows],
                )
            )
        result = RowResults.concatenate(chunks, like=student_hidden, with_targets=target_ids is not None)
        check_rows({"student": result.student_bad, "teacher": result.teacher_bad})
        ctx.save_for_backward(student_hidden, student_weight, teacher_hidden, teacher_weight, result.state)
        ctx.spec, ctx.shard, ctx.chunk_rows = spec, shard, chunk_rows
        ctx.mark_non_differentiable(result.diagnostics)
        return result.loss, result.diagnostics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        student_hidden, student_weight, teacher_hidden, teacher_weight, state = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        gradients = HeadGradients(student_hidden, student_weight, shard, for_hidden=for_hidden, for_weight=for_weight)
        teacher_head = Head(teacher_weight, shard)
        for rows in row_chunks(student_hidden.shape[0], shard, ctx.chunk_rows):
            grad_logits = logit_gradient(
                gradients.head.logits(student_hidden[rows]),
                teacher_head.logits(teacher_hidden[rows]),
                ctx.spec,
                state[:, rows],
                grad_loss[rows],
            )
            gradients.add(rows, grad_logits)
        return *gradients.finish(), *([None] * 6)
