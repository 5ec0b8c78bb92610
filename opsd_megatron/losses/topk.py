"""The divergence on the k most likely entries of one side, exact across vocabulary shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from opsd_megatron.losses.divergences import LOG_ZERO, DivergenceSpec, divergence_entries
from opsd_megatron.losses.rows import NO_EXTRAS, RowExtras, RowResults, Steps, clip_rows, row_outcome
from opsd_megatron.losses.shard import VocabShard
from opsd_megatron.losses.statistics import AGREE, ROWS, all_log_probs, merge, normaliser
from opsd_megatron.losses.torch_rows import TorchRows

Side = Literal["teacher", "student"]
Tail = Literal["bucket", "renormalise"]

# Entry numbers travel as float32 numbers beside log-probabilities; up to here each is one.
_LARGEST_VOCAB = 1 << 24


@dataclass(frozen=True)
class TopK:
    """Which entries of the vocabulary a divergence is taken over.

    Attributes:
        k: How many; the whole vocabulary where it has no more. Which of several equally likely entries at the last
            place belong to them is left open.
        side: Whose k most likely entries. The choice is a constant: no gradient flows through it.
        tail: ``bucket``: the other entries count as one entry with all of their probability (SDPO, arXiv 2601.20802).
            ``renormalise``: they are left out, and both sides are normalised over the k.

    Raises:
        ValueError: A value is out of range.
    """

    k: int
    side: Side = "teacher"
    tail: Tail = "bucket"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k} must be at least 1")
        if self.side not in get_args(Side):
            raise ValueError(f"side={self.side!r} is not one of {', '.join(get_args(Side))}")
        if self.tail not in get_args(Tail):
            raise ValueError(f"tail={self.tail!r} is not one of {', '.join(get_args(Tail))}")


def topk_rows(
    student: Tensor,
    teacher: Tensor,
    spec: DivergenceSpec,
    support: TopK,
    shard: VocabShard,
    target_ids: Tensor | None,
    row_weights: Tensor | None,
    *,
    with_gradient: bool,
    extras: RowExtras = NO_EXTRAS,
) -> Steps[RowResults]:
    """Evaluate a block of rows; arguments and results as in :func:`~opsd_megatron.losses.rows.divergence_rows`.

    Two collectives: an all-gather of the statistics and of every rank's own k candidates, and a sum of the diagnostics,
    of the log-probabilities at the support, to each of which one rank contributes, and of every rank's share of the
    tails. The divergence itself is then a matter of ``[r, k]`` numbers, the same on every rank.

    Ranks: all of ``shard.group``, with equal rows; results are equal on every one.
    """
    if shard.vocab_size > _LARGEST_VOCAB:
        raise ValueError(f"a top-k support needs a vocabulary of at most {_LARGEST_VOCAB}, not {shard.vocab_size}")
    k = min(support.k, shard.vocab_size)
    candidates = _candidates(teacher if support.side == "teacher" else student, k, shard)
    rows = TorchRows(student, teacher, spec, shard, target_ids, keep=False)
    gathering = shard.start_gather(torch.cat([rows.statistics(), *candidates]))
    yield
    gathered = gathering.wait()
    statistics = merge(gathered[:, :ROWS], spec.temperature)
    ids = _best(gathered[:, ROWS : ROWS + k], gathered[:, ROWS + k :])
    parts = [rows.diagnostic_sums(normaliser(statistics))]  # leaves log-probabilities
    parts += [shard.pick(side, ids)[0].t() for side in (student, teacher)]
    if support.tail == "bucket":
        # Logarithms rather than what is left of 1: a tail may have less probability than a float can hold.
        tails = torch.stack([_log_mass(_outside(side, ids, shard)) for side in (student, teacher)])
        parts.append(shard.own_slot(tails))
    summing = shard.start_sum(torch.cat(parts))
    yield
    diagnostics, *picked, tails = summing.wait().tensor_split((4, 4 + k, 4 + 2 * k))
    log_tails = [side.logsumexp(0) for side in (tails[::2], tails[1::2])]  # -inf where there are none
    s, t = (_on_support(side.t(), log_tail, support) for side, log_tail in zip(picked, log_tails, strict=True))
    entries = divergence_entries(s, t, spec)
    divergence, slope_sum = entries.value.sum(1), entries.slope.sum(1)
    clipped = torch.zeros_like(s) if entries.clipped is None else entries.clipped
    clipped_loss = divergence if entries.clipped is None else entries.value.clamp(max=spec.entry_clip).sum(1)
    clip_sums = [clipped.sum(1), (clipped * entries.teacher_prob).sum(1)]
    clip = clip_rows(divergence, clipped_loss, clip_sums, spec, entries=s.shape[1])
    outcome = row_outcome(clip, slope_sum, statistics, diagnostics[1], spec, extras, row_weights)
    if with_gradient:
        # What is added to the divergence is a loss over the whole vocabulary, not over the support.
        pull = torch.zeros_like(outcome.shift) if outcome.pull is None else outcome.pull
        own_shift = (outcome.shift - pull).unsqueeze(1)
        slope = entries.slope * outcome.factor.unsqueeze(1) - entries.student_prob * own_shift
        added = None if outcome.pull is None else student.exp().mul_(-pull.unsqueeze(1))
        _spread(student, slope, ids, log_tails[0], support, shard)
        if added is not None:
            assert target_ids is not None, "a token's term needs targets"
            shard.add_at(student.add_(added), target_ids, pull)
    return RowResults(
        outcome.loss,
        torch.cat(
            [
                torch.stack([divergence, clip.fraction, clip.teacher_mass]),
                diagnostics,
                statistics[AGREE].unsqueeze(0),
                *([all_log_probs(statistics, spec.temperature)] if target_ids is not None else []),
            ]
        ),
        ~statistics[0:4:2].isfinite(),
    )


def _candidates(logits: Tensor, k: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """This rank's k largest logits and their entries, ``[k, r]`` each; -inf and entry 0 where it has fewer columns."""
    own = min(k, shard.columns)
    values, columns = logits.topk(own, dim=1)
    # A true entry without probability still comes before one that is not there.
    values = values.clamp(min=torch.finfo(values.dtype).min)
    missing = (0, k - own)
    values = torch.nn.functional.pad(values, missing, value=-torch.inf)
    ids = torch.nn.functional.pad((columns + shard.offset).to(values.dtype), missing)
    return values.t(), ids.t()


def _best(values: Tensor, ids: Tensor) -> Tensor:
    """Entries of the k largest of all ranks' candidates, ``[ranks, k, r] x2 -> [r, k]`` int64."""
    k = values.shape[1]
    order = values.flatten(0, 1).topk(k, dim=0).indices
    return ids.flatten(0, 1).gather(0, order).t().long()


def _outside(log_probs: Tensor, ids: Tensor, shard: VocabShard) -> Tensor:
    """A copy of this rank's log-probabilities without those of the support, ``[r, columns]``."""
    outside = log_probs.clone()
    if shard.columns:
        local, held = shard.locate(ids)
        # Below any true entry's, so that nothing is left of it beside a tail without probability.
        outside.scatter_add_(1, local, held.to(outside.dtype) * (2 * LOG_ZERO))
    return outside


def _log_mass(log_probs: Tensor) -> Tensor:
    """Logarithm of the probability of all columns, ``[r]``; finite also where there are none."""
    return log_probs.logsumexp(1).clamp(min=2 * LOG_ZERO)


def _on_support(log_probs: Tensor, log_tail: Tensor, support: TopK) -> Tensor:
    """Log-probabilities of the entries that the divergence is taken over, ``[r, k + 1]`` or ``[r, k]``."""
    if support.tail == "bucket":
        log_probs = torch.cat([log_probs, log_tail.unsqueeze(1)], dim=1)
    else:
        log_probs = log_probs.log_softmax(1)
    return log_probs.clamp(min=LOG_ZERO)


def _spread(
    log_probs: Tensor, gradient: Tensor, ids: Tensor, log_tail: Tensor, support: TopK, shard: VocabShard
) -> None:
    """Overwrite the student's ``log_probs`` with the logit gradient, given that of the support's entries.

    An entry of the tail takes the share of the tail's gradient that it has of the tail's probability.
    """
    if support.tail == "bucket":
        shares = _outside(log_probs, ids, shard).sub_(log_tail.unsqueeze(1)).exp_()
        torch.mul(shares, gradient[:, -1:], out=log_probs)
    else:
        log_probs.zero_()
    if shard.columns:
        local, held = shard.locate(ids)
        log_probs.scatter_add_(1, local, gradient[:, : ids.shape[1]] * held)
