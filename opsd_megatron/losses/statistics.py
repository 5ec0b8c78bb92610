"""What a row must know of the whole vocabulary, put together from pieces of it, in the manner of online softmax.

A piece is a range of columns: a rank's shard, or a part of one that a GPU program works on. Of each it is enough to
know the ``ROWS`` numbers below, ``[ROWS, r]`` for ``r`` rows; those of two pieces give those of both together. So one
all-gather does for the maxima and the sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Each side's largest logit (+inf where one is NaN or +inf; -inf without columns) and sum of exp((z - max) / T).
STUDENT_MAX, STUDENT_SUM, TEACHER_MAX, TEACHER_SUM = 0, 1, 2, 3
# 1 where some column attains both sides' maxima.
AGREE = 4
# Sums of exp(z - max): at temperature 1, whatever the loss's.
STUDENT_SUM_AT_1, TEACHER_SUM_AT_1 = 5, 6
# The target's logit less the maximum, where this piece holds it (HELD is 1), else 0.
STUDENT_TARGET, TEACHER_TARGET, HELD = 7, 8, 9
ROWS = 10

_TARGETS = slice(7, 9)


def merge(pieces: Tensor, temperature: float) -> Tensor:
    """The statistics of all pieces together, ``[n, ROWS, r] -> [ROWS, r]``."""
    if len(pieces) == 1:
        return pieces[0]
    student_max, student_shift = _maximum(pieces[:, STUDENT_MAX])
    teacher_max, teacher_shift = _maximum(pieces[:, TEACHER_MAX])
    attained = (student_shift == 0) & (teacher_shift == 0)
    # Where a target is not held the shift may be -inf, which no product with 0 takes away.
    shifts = torch.stack([student_shift, teacher_shift], dim=1)
    targets = torch.where(pieces[:, HELD].unsqueeze(1) > 0, pieces[:, _TARGETS] + shifts, 0).sum(0)
    return torch.stack(
        [
            student_max,
            _total(pieces[:, STUDENT_SUM], student_shift / temperature),
            teacher_max,
            _total(pieces[:, TEACHER_SUM], teacher_shift / temperature),
            (pieces[:, AGREE] * attained).amax(0),
            _total(pieces[:, STUDENT_SUM_AT_1], student_shift),
            _total(pieces[:, TEACHER_SUM_AT_1], teacher_shift),
            *targets,
            pieces[:, HELD].sum(0),
        ]
    )


def _maximum(maxima: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of all pieces, ``[n, r] -> [r]``, and how far each piece's is below it (all at -inf: infinitely)."""
    largest = maxima.amax(0)
    return largest, maxima - largest.clamp(min=torch.finfo(maxima.dtype).min)


def _total(sums: Tensor, shifts: Tensor) -> Tensor:
    """Sums of exponentials brought to one maximum and added up, ``[n, r] x2 -> [r]``.

    A tensor of its own for each side: within one, two places may be added up in different orders, and sides with equal
    logits must get equal sums.
    """
    return (sums * shifts.exp()).sum(0)


def normaliser(statistics: Tensor) -> Tensor:
    """``[4, r]``: the student's maximum and the logarithm of its sum, then the teacher's.

    Two numbers a side: folded into one, a large maximum would swallow the digits of the sum's logarithm.
    """
    parts = statistics[:4].clone()
    parts[1::2].log_()
    return parts


def log_probs(statistics: Tensor, temperature: float) -> Tensor:
    """The target's log-probabilities at ``temperature``, the statistics' own: student's and teacher's, ``[2, r]``."""
    return statistics[_TARGETS] / temperature - statistics[STUDENT_SUM : TEACHER_SUM + 1 : 2].log()


def log_probs_at_1(statistics: Tensor) -> Tensor:
    """The same at temperature 1."""
    return statistics[_TARGETS] - statistics[STUDENT_SUM_AT_1 : TEACHER_SUM_AT_1 + 1].log()


def all_log_probs(statistics: Tensor, temperature: float) -> Tensor:
    """The target's log-probabilities at temperature 1, student's and teacher's, then the student's at ``temperature``.

    Returns:
        ``[3, r]``.
    """
    return torch.cat([log_probs_at_1(statistics), log_probs(statistics, temperature)[:1]])
