"""A block of logit rows worked on with torch, operation by operation: small shards on CPU, and float64."""

from __future__ import annotations

import torch
from torch import Tensor

from opsd_megatron.losses.divergences import LOG_ZERO, DivergenceSpec, Entries, divergence_entries
from opsd_megatron.losses.shard import VocabShard


class TorchRows:
    """See :class:`~opsd_megatron.losses.rows.RowBlock`.

    The logits are overwritten on the way: by centred logits, by log-probabilities, by the gradient.

    Args:
        student: ``[r, columns]`` float32 or float64.
        teacher: The same for the teacher.
        spec: The divergence.
        shard: Which columns these are.
        target_ids: Targets of the diagnostics, ``[r]``, or ``None``.
        keep: Keep what one pass computes and the next needs again, a few tensors of the block's size. For blocks that
            stay in the cache; otherwise computing it again costs less than memory.
    """

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        spec: DivergenceSpec,
        shard: VocabShard,
        target_ids: Tensor | None,
        *,
        keep: bool,
    ) -> None:
        self._sides, self._spec, self._shard = (student, teacher), spec, shard
        self._targets, self._keep = target_ids, keep
        self._centres: list[Tensor] = []
        self._exps: list[Tensor] = []
        self._entries: Entries | None = None

    def statistics(self) -> Tensor:
        """This piece's :mod:`~opsd_megatron.losses.statistics`, ``[10, r]``; leaves centred logits."""
        temperature = self._spec.temperature
        maxima, sums, sums_at_1, targets = [], [], [], []
        held = torch.zeros_like(self._sides[0][:, :1].sum(1))
        for side in self._sides:
            maximum = row_max(side)
            self._centres.append(row_centre(maximum))
            side.sub_(self._centres[-1].unsqueeze(1))
            maxima.append(maximum)
            if self._targets is not None:
                picked, held = self._shard.pick(side, self._targets.unsqueeze(1))
                targets.append(picked.squeeze(1))
                held = held.squeeze(1)
            if temperature != 1:
                sums_at_1.append(side.exp().sum(1))
                side.div_(temperature)
            exps = side.exp()
            sums.append(exps.sum(1))
            if self._keep:
                self._exps.append(exps)
        student, teacher = self._sides
        # Both are at most 0 now, and their sum is 0 only where both are: at an entry most likely for both.
        agree = row_max(student + teacher).eq_(0)
        return torch.stack(
            [
                *(number for pair in zip(maxima, sums, strict=True) for number in pair),
                agree,
                *(sums_at_1 or sums),
                *(targets or [held, held]),
                held,
            ]
        )

    def sums(self, normaliser: Tensor) -> Tensor:
        """This piece's share of the row sums, ``[9, r]``; leaves log-probabilities."""
        (s, t), (p, q) = self._sides, self._normalised(normaliser)
        entries = divergence_entries(s, t, self._spec, probs=(p, q))
        divergence = entries.value.sum(1)
        sums = [
            divergence,
            entries.slope.sum(1),
            *_clip_sums(entries, divergence, self._spec),
            *_entropies_and_divergences(s, t, p, q, entries.log_ratio),
        ]
        if self._keep:
            self._entries = entries
        return torch.stack(sums)

    def diagnostic_sums(self, normaliser: Tensor) -> Tensor:
        """The last four of the row sums alone, ``[4, r]``; leaves log-probabilities. No gradient can follow."""
        (s, t), (p, q) = self._sides, self._normalised(normaliser)
        return torch.stack(_entropies_and_divergences(s, t, p, q, t - s))

    def _normalised(self, normaliser: Tensor) -> list[Tensor]:
        """Turn centred logits into log-probabilities; both sides' probabilities, ``[r, columns]``."""
        probs: list[Tensor] = []
        for number, side in enumerate(self._sides):
            maximum, log_sum = normaliser[2 * number], normaliser[2 * number + 1]
            # The difference of the maxima is small wherever the row has probability here: nothing is swallowed.
            shift = ((self._centres[number] - maximum) / self._spec.temperature - log_sum).unsqueeze(1)
            side.add_(shift).clamp_(min=LOG_ZERO)
            probs.append(self._exps[number].mul_(shift.exp()) if self._keep else side.exp())
        return probs

    def write_gradient(self, factor: Tensor, shift: Tensor, pull: Tensor | None) -> None:
        """Leave ``factor * slope - shift * e^s``, plus ``pull`` at the target, in the student's logits."""
        student, teacher = self._sides
        entries = self._entries or divergence_entries(student, teacher, self._spec)
        slope = entries.slope.mul_(factor.unsqueeze(1))
        torch.addcmul(slope, entries.student_prob, shift.unsqueeze(1), value=-1, out=student)
        if pull is not None:
            assert self._targets is not None, "a token's term needs targets"
            self._shard.add_at(student, self._targets, pull)


def row_max(values: Tensor) -> Tensor:
    """Largest column of every row, ``[r, columns] -> [r]``; NaN becomes +inf, no column gives -inf.

    Reductions to a maximum may lose a NaN on the way (gloo's and NCCL's do); +inf stays visible on every rank.
    """
    if values.shape[1] == 0:
        return values.new_full((values.shape[0],), -torch.inf)
    return values.amax(dim=1).nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


def row_centre(maximum: Tensor) -> Tensor:
    """What a row is centred on: its maximum. -inf less -inf would be NaN: without a finite logit the lowest number."""
    return maximum.clamp(min=torch.finfo(maximum.dtype).min)


def _entropies_and_divergences(s: Tensor, t: Tensor, p: Tensor, q: Tensor, log_ratio: Tensor) -> list[Tensor]:
    """Both sides' entropies, forward and reverse KL, each ``[r]``."""
    vecdot = torch.linalg.vecdot
    return [-vecdot(p, s), -vecdot(q, t), vecdot(q, log_ratio), -vecdot(p, log_ratio)]


def _clip_sums(entries: Entries, divergence: Tensor, spec: DivergenceSpec) -> list[Tensor]:
    """The clipped loss, the number of clipped entries and the teacher's probability on them."""
    clipped = entries.clipped
    if clipped is None:
        return [divergence, torch.zeros_like(divergence), torch.zeros_like(divergence)]
    loss = entries.value.clamp_(max=spec.entry_clip).sum(1)
    return [loss, clipped.sum(1), torch.linalg.vecdot(clipped, entries.teacher_prob)]
