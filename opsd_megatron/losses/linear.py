"""The divergence from hidden states: head product, divergence and gradient a few rows at a time.

One float32 logit row of a 152k vocabulary is 0.58 MiB; a chunk of them is the most that ever exists, on either side.
Gradients are formed in the same pass: four products of the head's size in all, two for logits and two for gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsd_megatron.losses.divergences import ClipMode, DivergenceSpec
from opsd_megatron.losses.head import Head, HeadGradients, check_head, keep_small_blocks_mapped, row_blocks, row_chunks
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
    row_weights: Tensor | None = None,
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
        chunk_rows: Rows whose logits exist at a time, equal on all ranks; ``None``: as many as keep the matrix products
            at full speed (``losses.head``).
        row_weights: Constant factor of each row's loss, ``[R]``; ``None`` for 1. Weighting here instead of weighting
            the result keeps the upstream gradient of a sum equal in all rows, which saves computing the logits again.

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
        row_weights=row_weights,
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
    row_weights: Tensor | None = None,
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
    if row_weights is not None and row_weights.shape != student_hidden.shape[:1]:
        raise ValueError(f"row_weights must be [{student_hidden.shape[0]}], not {tuple(row_weights.shape)}")
    task = _Task(spec, shard, chunk_rows, target_ids, row_weights)
    loss, block = _LinearDivergence.apply(  # type: ignore[no-untyped-call]
        student_hidden, student_weight, teacher_hidden, teacher_weight, task
    )
    return loss, Diagnostics.from_block(block)


@dataclass(frozen=True)
class _Task:
    """What a call asks for beside its four tensors."""

    spec: DivergenceSpec
    shard: VocabShard
    chunk_rows: int | None
    target_ids: Tensor | None
    row_weights: Tensor | None


class _LinearDivergence(torch.autograd.Function):
    """Forms the gradients in forward, where the logits are at hand, for an upstream gradient of 1 in every row.

    Backward scales them. Only an upstream gradient that differs between rows costs another pass over the chunks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        task: _Task,
    ) -> tuple[Tensor, Tensor]:
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        gradients = HeadGradients(
            student_hidden, student_weight, task.shard, for_hidden=for_hidden, for_weight=for_weight
        )
        teacher_head = Head(teacher_weight, task.shard)
        if student_hidden.device.type == "cpu":
            keep_small_blocks_mapped()
        chunks = list(row_chunks(student_hidden.shape[0], task.shard, task.chunk_rows))
        largest = chunks[0].stop if chunks else 0
        buffers = gradients.head.buffer(largest), teacher_head.buffer(largest)
        blocks: list[RowResults] = []
        for rows in chunks:
            student_logits = gradients.head.logits(student_hidden[rows], buffers[0])
            teacher_logits = teacher_head.logits(teacher_hidden[rows], buffers[1])
            for block in row_blocks(rows, task.shard):
                local = slice(block.start - rows.start, block.stop - rows.start)
                blocks.append(
                    evaluate_rows(
                        student_logits[local],
                        teacher_logits[local],
                        task.spec,
                        task.shard,
                        None if task.target_ids is None else task.target_ids[block],
                        row_weights=None if task.row_weights is None else task.row_weights[block],
                        with_gradient=gradients.wanted,
                    )
                )
            gradients.add(rows, student_logits)
        result = RowResults.concatenate(blocks, like=student_hidden, with_targets=task.target_ids is not None)
        check_rows({"student": result.student_bad, "teacher": result.teacher_bad})
        ctx.save_for_backward(student_hidden, student_weight, teacher_hidden, teacher_weight, result.state)
        ctx.task, ctx.gradients = task, gradients.finish()
        ctx.mark_non_differentiable(result.diagnostics)
        return result.loss, result.diagnostics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Handed out once: a second backward through a retained graph must not find them scaled.
        formed, ctx.gradients = ctx.gradients, None
        if formed is not None and _is_uniform(grad_loss):
            return *(None if one is None else _scaled_(one, grad_loss) for one in formed), None, None, None
        del formed
        return *_gradients_again(ctx.saved_tensors, ctx.task, grad_loss, ctx.needs_input_grad), None, None, None


def _gradients_again(
    saved: tuple[Tensor, ...], task: _Task, grad_loss: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients for any upstream gradient, from logits computed again."""
    student_hidden, student_weight, teacher_hidden, teacher_weight, state = saved
    gradients = HeadGradients(student_hidden, student_weight, task.shard, for_hidden=needed[0], for_weight=needed[1])
    teacher_head = Head(teacher_weight, task.shard)
    for rows in row_chunks(student_hidden.shape[0], task.shard, task.chunk_rows):
        student_logits = gradients.head.logits(student_hidden[rows])
        teacher_logits = teacher_head.logits(teacher_hidden[rows])
        gradients.add(rows, logit_gradient(student_logits, teacher_logits, task.spec, state[:, rows], grad_loss[rows]))
    return gradients.finish()


def _is_uniform(grad_loss: Tensor) -> bool:
    """Whether all rows have one upstream gradient, as after ``loss.sum()``, whose gradient is an expanded scalar."""
    return grad_loss.numel() <= 1 or grad_loss.stride(0) == 0 or bool((grad_loss == grad_loss[0]).all())


def _scaled_(gradient: Tensor, grad_loss: Tensor) -> Tensor:
    """``gradient`` times the one value of ``grad_loss``, in place."""
    if grad_loss.numel() == 0:
        return gradient
    if gradient.device.type == "cpu" and grad_loss[0] == 1:
        return gradient  # the usual case: saves a pass over a tensor as large as the head
    return gradient.mul_(grad_loss[0].to(gradient.dtype))
