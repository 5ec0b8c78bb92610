"""From hidden states to losses of rows, a chunk of rows at a time: head product, loss and gradient.

One float32 logit row of a 152k vocabulary is 0.58 MiB; a chunk of them (two across ranks) is the most that ever exists,
on either side. Gradients are formed in the same pass, where the logits are at hand: of a loss with a teacher that makes
four products of the head's size in all, two for logits and two for gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsd_megatron.losses.head import Head, HeadGradients, keep_small_blocks_mapped, row_chunks
from opsd_megatron.losses.rows import RowResults, Steps, finished, overlapped
from opsd_megatron.losses.shard import VocabShard, check_rows


@dataclass(frozen=True)
class RowOptions:
    """How a loss of rows is computed.

    Attributes:
        chunk_rows: Rows whose logits exist at a time; ``None``: as many as keep the matrix products at full speed.
        row_weights: Constant factor of each row's loss, ``[R]``; ``None`` for 1.
        reduce_hidden_grad: Sum the student's hidden gradient over the ranks.
    """

    chunk_rows: int | None
    row_weights: Tensor | None
    reduce_hidden_grad: bool


class RowLoss(Protocol):
    """A loss of rows, given their logits."""

    @property
    def shard(self) -> VocabShard:
        """Which columns of the vocabulary this rank holds."""
        ...

    @property
    def diagnostic_rows(self) -> int:
        """How many diagnostics a row has."""
        ...

    @property
    def temporaries(self) -> int:
        """How many tensors of a whole chunk's size an evaluation may make beside the logits."""
        ...

    def evaluate(
        self, student: Tensor, teacher: Tensor | None, rows: slice, weights: Tensor | None, *, with_gradient: bool
    ) -> Steps[RowResults]:
        """Evaluate one chunk; both logit blocks may be overwritten.

        Args:
            student: The student's logits of ``rows``, ``[r, columns]``.
            teacher: The teacher's; ``None`` for a loss without one.
            rows: Which rows these are.
            weights: Factors of all rows, ``[R]``, or ``None``.
            with_gradient: Leave the gradient of the summed losses in ``student``.

        Ranks: all of the shard's group.
        """
        ...


def linear_rows(
    loss: RowLoss,
    options: RowOptions,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of each row, ``[R]`` with gradient, and diagnostics, ``[loss.diagnostic_rows, R]``.

    Ranks: all of the shard's group, with equal ``R``. Forward: what ``loss.evaluate`` takes for each chunk, and one
    all-reduce of the student's hidden gradient, which is waited for in backward. Backward has none of its own where the
    upstream gradient is the same in all rows; else it goes through the chunks again. No rows, no collectives.
    """
    results: tuple[Tensor, Tensor] = _LinearRows.apply(  # type: ignore[no-untyped-call]
        student_hidden, student_weight, teacher_hidden, teacher_weight, loss, options, torch.is_grad_enabled()
    )
    return results


class _LinearRows(torch.autograd.Function):
    """Forms the gradients in forward, for an upstream gradient of 1 in every row. Backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        loss: RowLoss,
        options: RowOptions,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        tensors = (student_hidden, student_weight, teacher_hidden, teacher_weight)
        # ctx.needs_input_grad says what requires a gradient, also where none is recorded.
        needed = tuple(with_gradient and one for one in ctx.needs_input_grad)
        gradients = _gradients(needed, loss, options, student_hidden, student_weight)
        result = _run(loss, options, tensors, gradients)
        check_rows(dict(zip(("student", "teacher"), result.bad, strict=False)))
        gradients.complete()
        ctx.save_for_backward(*tensors)
        ctx.loss, ctx.options, ctx.gradients = loss, options, gradients
        ctx.mark_non_differentiable(result.diagnostics)
        return result.loss, result.diagnostics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Taken once: a second backward through a retained graph must not find them scaled.
        gradients, ctx.gradients = ctx.gradients, None
        weight: Tensor = ctx.saved_tensors[1]
        scale: Tensor | None = None
        if gradients is not None and _is_uniform(grad_loss):
            scale = _common(grad_loss)
        else:
            if gradients is not None:
                gradients.discard()
            gradients = _gradients_again(ctx, grad_loss)
        return gradients.take_hidden(scale), gradients.take_weight(weight, scale), *[None] * 5


def _gradients_again(ctx: Any, grad_loss: Tensor) -> HeadGradients:
    """The gradients for an upstream gradient that differs between rows, from logits computed again."""
    options: RowOptions = ctx.options
    weights = grad_loss if options.row_weights is None else grad_loss * options.row_weights
    gradients = _gradients(ctx.needs_input_grad, ctx.loss, options, *ctx.saved_tensors[:2])
    _run(ctx.loss, replace(options, row_weights=weights), ctx.saved_tensors, gradients)
    gradients.complete()
    return gradients


def _gradients(
    needed: tuple[bool, ...], loss: RowLoss, options: RowOptions, hidden: Tensor, weight: Tensor
) -> HeadGradients:
    return HeadGradients(
        hidden,
        weight,
        loss.shard,
        for_hidden=needed[0],
        for_weight=needed[1],
        reduce_hidden=options.reduce_hidden_grad,
    )


def _run(
    loss: RowLoss, options: RowOptions, tensors: tuple[Tensor | None, ...], gradients: HeadGradients
) -> RowResults:
    """Evaluate all rows and collect their gradients, chunk by chunk."""
    student_hidden, student_weight, teacher_hidden, teacher_weight = tensors
    assert student_hidden is not None and student_weight is not None
    if student_hidden.device.type == "cpu":
        keep_small_blocks_mapped()
    num_rows, device = student_hidden.shape[0], student_hidden.device
    student_head = Head(student_weight, loss.shard)
    temporaries = loss.temporaries + student_head.temporaries
    chunks = row_chunks(num_rows, loss.shard, options.chunk_rows, device, temporaries=temporaries)
    if not chunks:
        return RowResults.of_no_rows(student_hidden, loss.diagnostic_rows)
    largest = chunks[0].stop
    teacher_head = None if teacher_weight is None else Head(teacher_weight, loss.shard)
    in_flight = 1 if loss.shard.group is None else min(2, len(chunks))
    student_buffers = [student_head.buffer(largest) for _ in range(in_flight)]
    teacher_buffers = [
        student_buffers[0] if teacher_head is None else teacher_head.buffer(largest) for _ in range(in_flight)
    ]

    def evaluate(number: int, rows: slice) -> Steps[RowResults]:
        student = student_head.logits(student_hidden[rows], student_buffers[number % in_flight])
        teacher = None
        if teacher_head is not None:
            assert teacher_hidden is not None
            teacher = teacher_head.logits(teacher_hidden[rows], teacher_buffers[number % in_flight])
        result = yield from loss.evaluate(student, teacher, rows, options.row_weights, with_gradient=gradients.wanted)
        gradients.add(student_head, rows, student)
        return result

    tasks = (evaluate(number, rows) for number, rows in enumerate(chunks))
    # On one rank there is no wait to fill, and a second set of logits would be for nothing.
    parts = [finished(task) for task in tasks] if loss.shard.group is None else overlapped(tasks)
    return RowResults.concatenate(parts)


def _is_uniform(grad_loss: Tensor) -> bool:
    """Whether all rows have one upstream gradient, as after ``loss.sum()``, whose gradient is an expanded scalar."""
    return grad_loss.numel() <= 1 or grad_loss.stride(0) == 0 or bool((grad_loss == grad_loss[0]).all())


def _common(grad_loss: Tensor) -> Tensor | None:
    """The one value of ``grad_loss``; ``None`` for 1, where finding out takes no synchronisation with a device."""
    if grad_loss.numel() == 0:
        return None
    value = grad_loss[0]
    # The usual case: saves a pass over a tensor as large as the head.
    return None if value.device.type == "cpu" and value == 1 else value
