"""What a row must know of the whole vocabulary, put together from pieces of it, in the manner of online softmax.

A piece is a range of columns: a rank's shard, or a part of one that a GPU program works on. Of each it is enough to
know the ``ROWS`` numbers below, ``[ROWS, r]`` for ``r`` rows; those of two pieces give those of both together. So one
all-gather does for the maxima and the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

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

_MAXIMA, _SUMS, _SUMS_AT_1 = (slice(0, 4, 2), slice(1, 4, 2), slice(5, 7))
_TARGETS = slice(7, 9)


def merge(pieces: Sequence[Tensor], temperature: float) -> Tensor:
    """The statistics of all ``pieces`` together; each, and the result, is ``[ROWS, r]``."""
    if len(pieces) == 1:
        return pieces[0]
    maxima = reduce(torch.maximum, [piece[_MAXIMA] for piece in pieces])
    shifts = [piece[_MAXIMA] - maxima for piece in pieces]
    merged = torch.empty_like(pieces[0])
    merged[_MAXIMA] = maxima
    # Added one after another: torch.sum may add two places of one tensor in different orders, and sides with equal
    # logits must get equal sums.
    scaled = [piece[_SUMS] * (shift / temperature).exp() for piece, shift in zip(pieces, shifts, strict=True)]
    merged[_SUMS] = reduce(add, scaled)
    scaled = [piece[_SUMS_AT_1] * shift.exp() for piece, shift in zip(pieces, shifts, strict=True)]
    merged[_SUMS_AT_1] = reduce(add, scaled)
    agree = [piece[AGREE] * (shift == 0).all(0) for piece, shift in zip(pieces, shifts, strict=True)]
    merged[AGREE] = reduce(torch.maximum, agree)
    # Where a target is not held the shift may be -inf, which no product with 0 takes away.
    targets = [
        torch.where(piece[HELD] > 0, piece[_TARGETS] + shift, 0) for piece, shift in zip(pieces, shifts, strict=True)
    ]
    merged[_TARGETS] = reduce(add, targets)
    merged[HELD] = reduce(add, [piece[HELD] for piece in pieces])
    return merged


def normaliser(statistics: Tensor) -> Tensor:
    """``[4, r]``: the student's maximum and the logarithm of its sum, then the teacher's.

    Two numbers a side: folded into one, a large maximum would swallow the digits of the sum's logarithm.
    """
    parts = statistics[:4].clone()
    parts[1::2].log_()
    return parts


def target_log_probs(statistics: Tensor) -> Tensor:
    """Log-probability of the target at temperature 1, student's and teacher's, ``[2, r]``."""
    return statistics[_TARGETS] - statistics[_SUMS_AT_1].log()
