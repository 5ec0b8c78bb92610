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
from opsd_megatron.losses.statistics import AGREE, all_log_probs, log_probs, merge, normaliser
from opsd_megatron.losses.token_terms import EntropyGate, Importance, TokenTerm

T = TypeVar("T")
# Something computed in three steps: it yields twice, each time with a collective under way.
Steps = Generator[None, None, T]

# Row sums: unclipped divergence, slope, clipped divergence, clipped entries, teacher probability on them, entropy of
# the student and of the teacher, forward KL(teacher || student), reverse KL.
SUMS = 9


@dataclass(frozen=True)
class Diagnostics:
    """What a row says beside its loss; every tensor is detached, float32 and ``[R]``, equal on all ranks of the shard.

    All are at the loss's temperature but the two that say otherwise.

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
        policy_log_prob: Student's log-probability of the target at the loss's temperature.
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
    policy_log_prob: Tensor | None

    # Rows of the [k, R] block in which an autograd function hands them out; the log-probabilities come last.
    WITHOUT_TARGETS = 8
    WITH_TARGETS = 11

    @classmethod
    def from_block(cls, block: Tensor) -> Diagnostics:
        """Name the rows of ``block``, ``[8, R]`` or ``[11, R]``."""
        rows = block.detach().float().unbind()
        log_probs = rows[8:11] if len(rows) == cls.WITH_TARGETS else (None, None, None)
        return cls(*rows[:8], *log_probs)


@dataclass(frozen=True)
class RowResults:
    """What an evaluation finds out about ``r`` rows.

    Attributes:
        loss: Clipped and weighted loss, ``[r]``.
        diagnostics: ``[k, r]``; of the divergence ``[8, r]``, or ``[11, r]`` with targets, in the order of
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

    def write_gradient(self, factor: Tensor, shift: Tensor, pull: Tensor | None) -> None:
        """Leave the gradient in the student's logits: ``factor * slope - shift * e^s``, plus ``pull`` at the target.

        Args:
            factor: ``[r]``.
            shift: ``[r]``.
            pull: ``[r]``; ``None`` for 0.
        """
        ...


@dataclass(frozen=True)
class RowExtras:
    """What is done to the divergence of rows beside a constant weight; nothing by default.

    All of it follows from what the pass finds out in any case, and takes no further collective.

    Attributes:
        importance: Weights the rows, their token's term included.
        gate: Leaves out the divergence of rows.
        term: A loss of the rows' targets that is added to the divergence.
    """

    importance: Importance | None = None
    gate: EntropyGate | None = None
    term: TokenTerm | None = None

    @property
    def needs_targets(self) -> bool:
        """Whether rows need a target."""
        return self.importance is not None or self.term is not None

    def of(self, rows: slice) -> RowExtras:
        """The same for some of the rows only."""
        return RowExtras(
            None if self.importance is None else self.importance.of(rows),
            self.gate,
            None if self.term is None else self.term.of(rows),
        )


NO_EXTRAS = RowExtras()


@dataclass(frozen=True)
class RowOutcome:
    """What becomes of rows, each ``[r]``.

    Attributes:
        loss: Clipped, weighted, with what is added.
        factor: Of the slope in the logit gradient.
        shift: Of the student's probabilities there.
        pull: What the target's logit gets beside; ``None`` for nothing.
    """

    loss: Tensor
    factor: Tensor
    shift: Tensor
    pull: Tensor | None


def row_outcome(
    clip: Clip,
    slope_sum: Tensor,
    statistics: Tensor,
    teacher_entropy: Tensor,
    spec: DivergenceSpec,
    extras: RowExtras,
    row_weights: Tensor | None,
) -> RowOutcome:
    """Weigh the clipped divergence of rows and add what is to be added.

    Args:
        clip: The clipped divergence.
        slope_sum: The slope summed over the vocabulary, ``[r]``.
        statistics: Of whole rows, ``[10, r]``.
        teacher_entropy: ``[r]``.
        spec: The divergence.
        extras: Of these rows.
        row_weights: Constant weights, ``[r]``, or ``None``.
    """
    loss, factor, pull = clip.loss, clip.factor, None
    log_prob = log_probs(statistics, spec.temperature)[0]
    if extras.gate is not None:
        keep = extras.gate.keep(teacher_entropy)
        loss, factor = loss * keep, factor * keep
    shift = factor * slope_sum
    if extras.term is not None:
        added, pull = extras.term.evaluate(log_prob, None)
        loss, shift = loss + added, shift + pull
    if extras.importance is not None:
        row_weights = weighted(extras.importance.weights(log_prob), row_weights)

    def scaled(values: Tensor) -> Tensor:
        return weighted(values, row_weights) / spec.temperature

    return RowOutcome(
        weighted(loss, row_weights), scaled(factor), scaled(shift), None if pull is None else scaled(pull)
    )


def divergence_rows(
    blocks: Sequence[RowBlock],
    spec: DivergenceSpec,
    shard: VocabShard,
    row_weights: Tensor | None,
    *,
    with_targets: bool,
    with_gradient: bool,
    extras: RowExtras = NO_EXTRAS,
) -> Steps[RowResults]:
    """Evaluate blocks of rows together: two collectives for all of them.

    Args:
        blocks: The rows.
        spec: The divergence.
        shard: Which columns the blocks hold.
        row_weights: Factor of each row's loss, ``[r]``; ``None`` for 1. The diagnostics are unweighted.
        with_targets: Whether the blocks have targets.
        with_gradient: Leave the gradient of the summed losses with respect to the logits in the student's.
        extras: What is done beside.

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
    outcome = row_outcome(clip, slope_sum, statistics, teacher_entropy, spec, extras, row_weights)
    if with_gradient:
        first = 0
        for block, size in zip(blocks, sizes, strict=True):
            rows = slice(first, first + size)
            pull = None if outcome.pull is None else outcome.pull[rows]
            block.write_gradient(outcome.factor[rows], outcome.shift[rows], pull)
            first += size
    diagnostics = [divergence, clip.fraction, clip.teacher_mass, entropy, teacher_entropy, forward, reverse]
    diagnostics += [statistics[AGREE], *(all_log_probs(statistics, spec.temperature) if with_targets else ())]
    return RowResults(outcome.loss, torch.stack(diagnostics), ~statistics[0:4:2].isfinite())


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
