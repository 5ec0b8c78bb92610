"""From a block of logit rows to losses, to logit gradients and to diagnostics, across the vocabulary's shards.

Both public losses are built on :func:`evaluate_rows` and :func:`logit_gradient`. Neither knows where logits come from.

Collectives of a block, all in forward, each a stack of ``[r]`` vectors:

1. MAX of both sides' largest logit (all-reduce);
2. SUM of both sides' sums of exponentials, and of the targets' logits where targets are given (all-gather, then added
   in rank order: see :meth:`VocabShard.sum_in_order` for what an all-reduce would break);
3. SUM of the divergence, its slope and the diagnostics (all-reduce).

Backward needs none: what a row's gradient takes from other ranks is six numbers, kept in :attr:`RowResults.state`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_megatron.losses.divergences import LOG_ZERO, DivergenceSpec, Entries, divergence_entries
from opsd_megatron.losses.shard import VocabShard

STATE_ROWS = 6


@dataclass(frozen=True)
class Diagnostics:
    """What a row says beside its loss; every tensor is detached, float32 and ``[R]``, equal on all ranks of the shard.

    Attributes:
        divergence: The divergence at this beta and temperature before any clip, in nats.
        clip_fraction: Share of the vocabulary's entries that are clipped. The modes that clip whole rows (``rescale``,
            ``token``) count a clipped row as 1.
        clipped_teacher_mass: Teacher probability on the clipped entries; 1 for a row clipped as a whole.
        student_entropy: Entropy of the student at the loss's temperature, in nats.
        teacher_entropy: The same for the teacher.
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
    top1_agreement: Tensor
    student_log_prob: Tensor | None
    teacher_log_prob: Tensor | None

    # Rows of the [k, R] block in which an autograd function hands them out; the log-probabilities come last.
    WITHOUT_TARGETS = 6
    WITH_TARGETS = 8

    @classmethod
    def from_block(cls, block: Tensor) -> Diagnostics:
        """Name the rows of ``block``, ``[6, R]`` or ``[8, R]``."""
        rows = block.detach().float().unbind()
        log_probs = rows[6:8] if len(rows) == cls.WITH_TARGETS else (None, None)
        return cls(*rows[:6], *log_probs)


@dataclass(frozen=True)
class RowResults:
    """What :func:`evaluate_rows` finds out about ``r`` rows.

    Attributes:
        loss: Clipped loss, ``[r]``.
        state: What :func:`logit_gradient` needs, ``[6, r]``: student's maximum and log of the sum, the same of the
            teacher, the summed slope, and the factor of a clip on rows.
        diagnostics: ``[6, r]``, or ``[8, r]`` with targets, in the order of :class:`Diagnostics`.
        student_bad: Rows whose student logits are not numbers, ``[r]`` bool; their other results mean nothing.
        teacher_bad: The same for the teacher.
    """

    loss: Tensor
    state: Tensor
    diagnostics: Tensor
    student_bad: Tensor
    teacher_bad: Tensor

    @classmethod
    def concatenate(cls, chunks: list[RowResults], *, like: Tensor, with_targets: bool) -> RowResults:
        """The results of all chunks as one; of no rows, on the device of ``like``, where there are none."""
        if not chunks:
            empty = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
            kinds = Diagnostics.WITH_TARGETS if with_targets else Diagnostics.WITHOUT_TARGETS
            return cls(empty, empty.expand(STATE_ROWS, 0), empty.expand(kinds, 0), empty.bool(), empty.bool())
        return cls(
            loss=torch.cat([chunk.loss for chunk in chunks]),
            state=torch.cat([chunk.state for chunk in chunks], dim=1),
            diagnostics=torch.cat([chunk.diagnostics for chunk in chunks], dim=1),
            student_bad=torch.cat([chunk.student_bad for chunk in chunks]),
            teacher_bad=torch.cat([chunk.teacher_bad for chunk in chunks]),
        )


@dataclass(frozen=True)
class _Normalised:
    student: Tensor
    teacher: Tensor
    state: Tensor
    top1: Tensor
    target_log_probs: Tensor


def evaluate_rows(
    student: Tensor,
    teacher: Tensor,
    spec: DivergenceSpec,
    shard: VocabShard,
    target_ids: Tensor | None = None,
    *,
    row_weights: Tensor | None = None,
    with_gradient: bool = False,
) -> RowResults:
    """Losses of a block of rows. Both logit blocks are overwritten.

    Args:
        student: Logits of this rank's true columns, ``[r, columns]`` float32 (or float64), not divided by temperature.
        teacher: The same for the teacher.
        spec: The divergence.
        shard: Which columns these are.
        target_ids: Vocabulary index whose log-probability the diagnostics report, ``[r]`` int64, or ``None``.
        row_weights: Factor of each row's loss, ``[r]``; ``None`` for 1. The diagnostics are unweighted.
        with_gradient: Leave the gradient of the summed losses with respect to the logits in ``student``.

    Ranks: all of ``shard.group``, with equal ``r``; results are equal on every one. Three collectives.
    """
    sides = _normalise(student, teacher, spec, shard, target_ids)
    s, t = sides.student, sides.teacher
    entries = divergence_entries(s, t, spec)
    sums = [entries.value.sum(1), entries.slope.sum(1)]
    sums += [-entries.student_prob.mul(s).sum(1), -entries.teacher_prob.mul(t).sum(1), sides.top1]
    if entries.clipped is not None:
        sums += _clip_sums(entries, spec)
    divergence, slope_sum, *rest = shard.sum_(torch.stack(sums)).unbind()
    student_entropy, teacher_entropy, top1 = rest[:3]

    factor = torch.ones_like(divergence)
    fraction = mass = torch.zeros_like(divergence)
    loss = divergence
    if entries.clipped is not None:
        loss, fraction, mass = rest[3], rest[4] / shard.vocab_size, rest[5]
    elif spec.row_clip is not None:
        above = (divergence >= spec.row_clip).to(divergence.dtype)
        fraction = mass = above
        loss = divergence.clamp(max=spec.row_clip)
        factor = spec.row_clip / divergence.clamp(min=spec.row_clip) if spec.clip_mode == "rescale" else 1 - above
    if row_weights is not None:
        row_weights = row_weights.to(loss.dtype)
        loss, factor = loss * row_weights, factor * row_weights
    if with_gradient:
        slope = entries.slope.sub_(entries.student_prob.mul_(slope_sum.unsqueeze(1)))
        torch.mul(slope, (factor / spec.temperature).unsqueeze(1), out=student)
    diagnostics = torch.stack([divergence, fraction, mass, student_entropy, teacher_entropy, top1.clamp(max=1)])
    return RowResults(
        loss=loss,
        state=torch.cat([sides.state, torch.stack([slope_sum, factor])]),
        diagnostics=torch.cat([diagnostics, sides.target_log_probs]),
        student_bad=~sides.state[0].isfinite(),
        teacher_bad=~sides.state[2].isfinite(),
    )


def logit_gradient(student: Tensor, teacher: Tensor, spec: DivergenceSpec, state: Tensor, row_grad: Tensor) -> Tensor:
    """Gradient of ``sum(row_grad * loss)`` with respect to the student's logits, ``[r, columns]``.

    Both logit blocks are overwritten. Needs no collective.

    Args:
        student: The logits that :func:`evaluate_rows` had, before it overwrote them.
        teacher: The same for the teacher.
        spec: The divergence.
        state: :attr:`RowResults.state` of these rows.
        row_grad: Upstream gradient of every row's loss, ``[r]``.
    """
    student_max, student_log_sum, teacher_max, teacher_log_sum, slope_sum, factor = state.unsqueeze(2).unbind()
    s = _centre(student, student_max, spec.temperature).sub_(student_log_sum).clamp_(min=LOG_ZERO)
    t = _centre(teacher, teacher_max, spec.temperature).sub_(teacher_log_sum).clamp_(min=LOG_ZERO)
    entries = divergence_entries(s, t, spec)
    scale = factor * row_grad.to(factor.dtype).unsqueeze(1) / spec.temperature
    return entries.slope.sub_(entries.student_prob.mul_(slope_sum)).mul_(scale)


def _normalise(
    student: Tensor, teacher: Tensor, spec: DivergenceSpec, shard: VocabShard, target_ids: Tensor | None
) -> _Normalised:
    """Turn both logit blocks into log-probabilities over the whole vocabulary, in place; two collectives."""
    local_max = torch.stack([shard.row_max(student), shard.row_max(teacher)])
    maxima = shard.max_(local_max).unsqueeze(2)
    centred = [_centre(student, maxima[0], spec.temperature), _centre(teacher, maxima[1], spec.temperature)]
    # Both sides are at most 0 now, and their sum is 0 only where both are: at an entry most likely for both.
    top1 = shard.row_max(centred[0] + centred[1]).eq_(0)
    sums = [side.exp().sum(1) for side in centred]
    if target_ids is not None:
        # The diagnostics are at temperature 1: they need that temperature's normaliser too, unless it is the same one.
        sums += sums if spec.temperature == 1 else [(side * spec.temperature).exp_().sum(1) for side in centred]
        sums += [shard.pick(side, target_ids) * spec.temperature for side in centred]
    total = shard.sum_in_order(torch.stack(sums))
    log_sums = total[:2].log()
    # Two subtractions: folded into one number, a large maximum would swallow the digits of the sum's logarithm.
    log_probs = [
        side.sub_(log_sum.unsqueeze(1)).clamp_(min=LOG_ZERO) for side, log_sum in zip(centred, log_sums, strict=True)
    ]
    state = torch.stack([maxima[0, :, 0], log_sums[0], maxima[1, :, 0], log_sums[1]])
    return _Normalised(
        student=log_probs[0],
        teacher=log_probs[1],
        state=state,
        top1=top1,
        target_log_probs=total[4:6] - total[2:4].log(),
    )


def _centre(logits: Tensor, maximum: Tensor, temperature: float) -> Tensor:
    """``(logits - maximum) / temperature``, in place."""
    logits.sub_(maximum)
    return logits if temperature == 1 else logits.div_(temperature)


def _clip_sums(entries: Entries, spec: DivergenceSpec) -> list[Tensor]:
    """This rank's part of the clipped loss, the number of clipped entries and the teacher's probability on them."""
    clipped = entries.clipped
    assert clipped is not None
    loss = entries.value.clamp_(max=spec.entry_clip).sum(1)
    return [loss, clipped.sum(1), clipped.mul_(entries.teacher_prob).sum(1)]
