"""From blocks of logit rows to losses, to logit gradients and to diagnostics, across the vocabulary's shards.

Collectives of a chunk of rows, all in forward, each of a few numbers a row:

1. all-gather of the statistics of both sides (:mod:`opsd_megatron.losses.statistics`);
2. SUM of the divergence, its slope and the diagnostics (all-reduce).

The gradient takes none: what a row's gradient needs from other ranks is in those. An evaluation is a generator that
yields when a collective is under way, so that the caller may fill the wait (:func:`overlapped`).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from opsd_megatron.losses.divergences import DivergenceSpec
from opsd_megatron.losses.shard import VocabShard
from opsd_megatron.losses.statistics import AGREE, merge, normaliser, target_log_probs

T = TypeVar("T")
# Something computed in three steps: it yields twice, each time with a collective under way.
Steps = Generator[None, None, T]

# Row sums: unclipped divergence, slope, clipped divergence, clipped entries, teacher probability on them, entropy of
# the student and of the teacher, forward KL(teacher || student), reverse KL.
SUMS = 9


@dataclass(frozen=True)
class Diagnostics:
    """What a row says beside its loss; every tensor is detached, float32 and ``[R]``, equal on all ranks of the shard.

    All are at the loss's temperature but the last two.

    Attributes:
        divergence: The divergence before any clip, in nats; with a top-k support, on that support.
        clip_fraction: Share of the vocabulary's (or the support's) entries that are clipped. The modes that clip whole
            rows (``rescale``, ``token``) count a clipped row as 1.
        clipped_teacher_mass: Teacher probability on the clipped entries; 1 for a row clipped as a whole.
        student_entropy: Entropy of the student, in nats; like the next four over the full vocabulary in any case.
        teacher_entropy: The same for the teacher.
        forward_kl: KL(teacher || student), in nats.
        reverse_kl: KL(student || teacher), in nats.
        top1_agreement: 1 where student and teacher have a most likely entry in common, else 0.
        student_log_prob: Student's log-probability of the row's target at temperature 1, whatever the loss's
            temperature, so that it compares with the engine's; ``None`` where no targets are given.
        teacher_log_prob: The same for the teacher.
    """

    divergence: Tensor
    clip_fraction: Tensor
    clipped_teacher_mass: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    top1_agreement: Tensor
    student_log_prob: Tensor | None
    teacher_log_prob: Tensor | None

    # Rows of the [k, R] block in which an autograd function hands them out; the log-probabilities come last.
    WITHOUT_TARGETS = 8
    WITH_TARGETS = 10

    @classmethod
    def from_block(cls, block: Tensor) -> Diagnostics:
        """Name the rows of ``block``, ``[8, R]`` or ``[10, R]``."""
        rows = block.detach().float().unbind()
        log_probs = rows[8:10] if len(rows) == cls.WITH_TARGETS else (None, None)
        return cls(*rows[:8], *log_probs)


@dataclass(frozen=True)
class RowResults:
    """What an evaluation finds out about ``r`` rows.

    Attributes:
        loss: Clipped and weighted loss, ``[r]``.
        diagnostics: ``[k, r]``; of the divergence ``[8, r]``, or ``[10, r]`` with targets, in the order of
            :class:`Diagnostics`.
        bad: Rows whose logits are not numbers, student's and teacher's, ``[2, r]`` bool; their other results mean
            nothing.
    """

    loss: Tensor
    diagnostics: Tensor
    bad: Tensor

    @classmethod
    def of_no_rows(cls, like: Tensor, diagnostic_rows: int) -> RowResults:
        """The results of no rows at all, on the device of ``like``."""
        empty = like.new_empty((diagnostic_rows, 0), dtype=torch.promote_types(like.dtype, torch.float32))
        return cls(empty.new_empty(0), empty, empty.new_empty((2, 0), dtype=torch.bool))

    @classmethod
    def concatenate(cls, parts: Sequence[RowResults]) -> RowResults:
        """The results of all parts as one."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            loss=torch.cat([part.loss for part in parts]),
            diagnostics=torch.cat([part.diagnostics for part in parts], dim=1),
            bad=torch.cat([part.bad for part in parts], dim=1),
        )


class RowBlock(Protocol):
    """Logits of a block of rows, student's and teacher's, and the elementwise passes over them, in this order."""

    def statistics(self) -> Tensor:
        """``[10, r]``, see :mod:`opsd_megatron.losses.statistics`."""
        ...

    def sums(self, normaliser: Tensor) -> Tensor:
        """This rank's share of the :data:`SUMS`, ``[9, r]``, given :func:`statistics.normaliser`, ``[4, r]``."""
        ...

    def write_gradient(self, slope_sum: Tensor, factor: Tensor) -> None:
        """Leave ``factor * (slope - e^s * slope_sum)`` in the student's logits; both arguments are ``[r]``."""
        ...


def divergence_rows(
    blocks: Sequence[RowBlock],
    spec: DivergenceSpec,
    shard: VocabShard,
    row_weights: Tensor | None,
    *,
    with_targets: bool,
    with_gradient: bool,
) -> Steps[RowResults]:
    """Evaluate blocks of rows together: two collectives for all of them.

    Args:
        blocks: The rows.
        spec: The divergence.
        shard: Which columns the blocks hold.
        row_weights: Factor of each row's loss, ``[r]``; ``None`` for 1. The diagnostics are unweighted.
        with_targets: Whether the blocks have targets.
        with_gradient: Leave the gradient of the summed losses with respect to the logits in the student's.

    Ranks: all of ``shard.group``, with equal rows; results are equal on every one.
    """
    sizes, local = [], []
    for block in blocks:
        local.append(block.statistics())
        sizes.append(local[-1].shape[1])
    gathering = shard.start_gather(_side_by_side(local))
    yield
    statistics = merge(gathering.wait(), spec.temperature)
    norms = torch.split(normaliser(statistics), sizes, dim=1)
    summing = shard.start_sum(_side_by_side([block.sums(norm) for block, norm in zip(blocks, norms, strict=True)]))
    yield
    divergence, slope_sum, clipped_loss, *clip_sums, entropy, teacher_entropy, forward, reverse = (
        summing.wait().unbind()
    )
    clip = clip_rows(divergence, clipped_loss, clip_sums, spec, entries=shard.vocab_size)
    loss, factor = weighted(clip.loss, row_weights), weighted(clip.factor, row_weights) / spec.temperature
    if with_gradient:
        for block, slopes, factors in zip(
            blocks, torch.split(slope_sum, sizes), torch.split(factor, sizes), strict=True
        ):
            block.write_gradient(slopes, factors)
    diagnostics = [divergence, clip.fraction, clip.teacher_mass, entropy, teacher_entropy, forward, reverse]
    diagnostics += [statistics[AGREE], *(target_log_probs(statistics) if with_targets else ())]
    return RowResults(loss, torch.stack(diagnostics), ~statistics[0:4:2].isfinite())


@dataclass(frozen=True)
class Clip:
    """What the clip does to rows, each ``[r]``: their loss, its factor, and how much of them is clipped."""

    loss: Tensor
    factor: Tensor
    fraction: Tensor
    teacher_mass: Tensor


def clip_rows(
    divergence: Tensor, clipped_loss: Tensor, clip_sums: Sequence[Tensor], spec: DivergenceSpec, *, entries: int
) -> Clip:
    """Apply the clip of ``spec`` to rows.

    Args:
        divergence: Unclipped, ``[r]``.
        clipped_loss: With every entry clipped, ``[r]``.
        clip_sums: Number of clipped entries, and the teacher's probability on them.
        spec: The divergence.
        entries: Entries that a row has.
    """
    if spec.row_clip is None:
        return Clip(clipped_loss, torch.ones_like(divergence), clip_sums[0] / entries, clip_sums[1])
    above = (divergence >= spec.row_clip).to(divergence.dtype)
    factor = spec.row_clip / divergence.clamp(min=spec.row_clip) if spec.clip_mode == "rescale" else 1 - above
    return Clip(divergence.clamp(max=spec.row_clip), factor, above, above)


def weighted(values: Tensor, row_weights: Tensor | None) -> Tensor:
    """``values`` times the rows' weights, both ``[r]``."""
    return values if row_weights is None else values * row_weights.to(values.dtype)


def overlapped(tasks: Iterable[Steps[T]]) -> list[T]:
    """Run tasks so that while one's collective is under way another computes; the results in order.

    Two are in flight: a task's last part fills the next one's first wait, and its first part the previous one's second.
    """
    results: list[T] = []
    previous: Steps[T] | None = None
    for task in tasks:
        next(task)
        if previous is not None:
            results.append(finished(previous))
        next(task)
        previous = task
    if previous is not None:
        results.append(finished(previous))
    return results


def finished(task: Steps[T]) -> T:
    """Run a task to its end, waiting for its collectives one by one."""
    while True:
        try:
            next(task)
        except StopIteration as end:
            result: T = end.value
            return result


def _side_by_side(blocks: Sequence[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks), dim=1)
