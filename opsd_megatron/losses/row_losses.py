"""What can be computed of a chunk of logit rows: the divergence, and losses of the sampled or supervised token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_megatron.losses import compiled_rows, head
from opsd_megatron.losses.compiled_rows import CompiledRows, kernels_for
from opsd_megatron.losses.divergences import DivergenceSpec
from opsd_megatron.losses.rows import (
    NO_EXTRAS,
    Diagnostics,
    RowBlock,
    RowExtras,
    RowResults,
    Steps,
    divergence_rows,
    weighted,
)
from opsd_megatron.losses.shard import VocabShard
from opsd_megatron.losses.statistics import (
    STUDENT_MAX,
    TEACHER_MAX,
    log_probs,
    log_probs_at_1,
    merge,
    normaliser,
)
from opsd_megatron.losses.token_terms import Importance, TokenTerm
from opsd_megatron.losses.topk import TopK, topk_rows
from opsd_megatron.losses.torch_rows import TorchRows, row_centre, row_max


@dataclass(frozen=True)
class DivergenceLoss:
    """The divergence as a :class:`~opsd_megatron.losses.chunked.RowLoss`.

    Attributes:
        spec: The divergence.
        support: Entries that it is taken over; ``None``: all.
        shard: Which columns of the vocabulary this rank holds.
        target_ids: Targets whose log-probabilities the diagnostics report, ``[R]``, or ``None``.
        extras: What is done to rows beside; may need targets.
    """

    spec: DivergenceSpec
    support: TopK | None
    shard: VocabShard
    target_ids: Tensor | None = None
    extras: RowExtras = NO_EXTRAS

    @property
    def diagnostic_rows(self) -> int:
        """See :class:`Diagnostics`."""
        return Diagnostics.WITHOUT_TARGETS if self.target_ids is None else Diagnostics.WITH_TARGETS

    @property
    def temporaries(self) -> int:
        """See :class:`~opsd_megatron.losses.chunked.RowLoss`."""
        # On a support: both probabilities, the log-ratio and a product, as the diagnostics are taken.
        return 4 if self._on_support else 0

    @property
    def _on_support(self) -> bool:
        return self.support is not None and self.support.k < self.shard.vocab_size

    def evaluate(
        self, student: Tensor, teacher: Tensor | None, rows: slice, weights: Tensor | None, *, with_gradient: bool
    ) -> Steps[RowResults]:
        """See :class:`~opsd_megatron.losses.chunked.RowLoss`; the diagnostics are those of :class:`Diagnostics`."""
        assert teacher is not None, "a divergence has two sides"
        targets = None if self.target_ids is None else self.target_ids[rows]
        weights = None if weights is None else weights[rows]
        extras = self.extras.of(rows)
        compiled = not self._on_support and kernels_for(student, self.spec) is not None
        elements = compiled_rows.BLOCK_ELEMENTS if compiled else head.BLOCK_ELEMENTS
        blocks = head.row_blocks(student.shape[0], self.shard, student.device, elements)
        # On one rank a block is done with while it is in the cache. Across ranks every group has its own collectives.
        groups = [[block] for block in blocks] if self.shard.group is None else [blocks]
        parts = []
        for group in groups:
            rows = slice(group[0].start, group[-1].stop)
            own_targets = None if targets is None else targets[rows]
            own_weights = None if weights is None else weights[rows]
            if self._on_support:
                assert self.support is not None
                steps = topk_rows(
                    student[rows],
                    teacher[rows],
                    self.spec,
                    self.support,
                    self.shard,
                    own_targets,
                    own_weights,
                    with_gradient=with_gradient,
                    extras=extras.of(rows),
                )
            else:
                steps = divergence_rows(
                    [self._block(student, teacher, targets, block) for block in group],
                    self.spec,
                    self.shard,
                    own_weights,
                    with_targets=targets is not None,
                    with_gradient=with_gradient,
                    extras=extras.of(rows),
                )
            parts.append((yield from steps))
        return RowResults.concatenate(parts)

    def _block(self, student: Tensor, teacher: Tensor, targets: Tensor | None, rows: slice) -> RowBlock:
        targets = None if targets is None else targets[rows]
        if student.is_cuda and student.dtype == torch.float32:
            # Triton is there wherever torch was built for CUDA, and need not be elsewhere.
            from opsd_megatron.losses.triton_rows import TritonRows

            return TritonRows(student[rows], teacher[rows], self.spec, self.shard, targets)
        kernels = kernels_for(student[rows], self.spec)
        if kernels is not None:
            return CompiledRows(student[rows], teacher[rows], kernels, self.spec, self.shard, targets)
        keep = self.shard.group is None
        return TorchRows(student[rows], teacher[rows], self.spec, self.shard, targets, keep=keep)


@dataclass(frozen=True)
class TargetLoss:
    """Losses of one token a row, as a :class:`~opsd_megatron.losses.chunked.RowLoss`.

    Attributes:
        target_ids: The tokens, ``[R]``.
        temperature: Both sides' logits are divided by it.
        term: The loss, given the token's log-probability.
        shard: Which columns of the vocabulary this rank holds.
        importance: Weights of the rows; ``None`` for none.
    """

    target_ids: Tensor
    temperature: float
    term: TokenTerm
    shard: VocabShard
    importance: Importance | None = None

    @property
    def diagnostic_rows(self) -> int:
        """See :class:`~opsd_megatron.losses.chunked.RowLoss`."""
        return 4

    @property
    def temporaries(self) -> int:
        """See :class:`~opsd_megatron.losses.chunked.RowLoss`: the exponentials."""
        return 1

    def evaluate(
        self, student: Tensor, teacher: Tensor | None, rows: slice, weights: Tensor | None, *, with_gradient: bool
    ) -> Steps[RowResults]:
        """See :class:`~opsd_megatron.losses.chunked.RowLoss`.

        One collective, an all-gather. The diagnostics are the target's log-probabilities at the loss's temperature,
        student's and teacher's, then the same at temperature 1 (the student's in place of an absent teacher's).
        """
        targets = self.target_ids[rows]
        local = self._statistics(student, teacher, targets)
        gathering = self.shard.start_gather(local)
        yield
        statistics = merge(gathering.wait(), self.temperature)
        yield
        of_target = log_probs(statistics, self.temperature)
        loss, slope = self.term.of(rows).evaluate(of_target[0], None if teacher is None else of_target[1])
        weights = None if weights is None else weights[rows]
        if self.importance is not None:
            weights = weighted(self.importance.of(rows).weights(of_target[0]), weights)
        if with_gradient:
            maximum, log_sum = normaliser(statistics)[:2]
            self._write_gradient(student, targets, local[STUDENT_MAX], maximum, log_sum, weighted(slope, weights))
        # A token without probability on a side has no finite loss, and is as bad as a NaN.
        bad = ~(statistics[STUDENT_MAX : TEACHER_MAX + 1 : 2].isfinite() & of_target.isfinite())
        diagnostics = torch.cat([of_target, log_probs_at_1(statistics)])
        return RowResults(weighted(loss, weights), diagnostics, bad[:1] if teacher is None else bad)

    def _statistics(self, student: Tensor, teacher: Tensor | None, targets: Tensor) -> Tensor:
        """The :mod:`~opsd_megatron.losses.statistics`, ``[10, r]``, with the student's for an absent teacher's.

        Agreement is not looked at. Leaves the logits centred on their maximum, for the student's gradient.
        """
        sides = [self._side(side, targets) for side in (student, teacher) if side is not None]
        maxima, sums, sums_at_1, logits, held = zip(*sides, strict=True)
        of_softmax = [maxima[0], sums[0], maxima[-1], sums[-1]]
        agree = torch.zeros_like(held[0])
        return torch.stack([*of_softmax, agree, sums_at_1[0], sums_at_1[-1], logits[0], logits[-1], held[0]])

    def _side(self, side: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Of one side: maximum, sum of exponentials, that at temperature 1, target's logit and whether it is held."""
        maximum = row_max(side)
        side.sub_(row_centre(maximum).unsqueeze(1))
        target, held = self.shard.pick(side, targets.unsqueeze(1))
        blocks = head.row_blocks(side.shape[0], self.shard, side.device)
        sums = torch.cat([(side[rows] / self.temperature).exp_().sum(1) for rows in blocks])
        sums_at_1 = sums if self.temperature == 1 else torch.cat([side[rows].exp().sum(1) for rows in blocks])
        return maximum, sums, sums_at_1, target.squeeze(1), held.squeeze(1)

    def _write_gradient(
        self, student: Tensor, targets: Tensor, local_max: Tensor, maximum: Tensor, log_sum: Tensor, slope: Tensor
    ) -> None:
        """Leave ``slope / T * (onehot - p_S)`` in the student's centred logits."""
        shift = (row_centre(local_max) - maximum) / self.temperature - log_sum
        pull = slope / self.temperature
        student.div_(self.temperature).add_(shift.unsqueeze(1)).exp_().mul_(-pull.unsqueeze(1))
        self.shard.add_at(student, targets, pull)
