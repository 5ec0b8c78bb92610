"""What can be said about a model from ``k`` judged samples on each of ``N`` problems."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_RESAMPLES = 10_000
_LEVEL = 0.95
_MAX_DRAWS = 4_000_000  # problem indices held at a time, 32 MB


@dataclass(frozen=True)
class Interval:
    """Bounds of a confidence interval."""

    low: float
    high: float


def pass_at_k(num_correct: npt.ArrayLike, *, num_samples: int, k: int) -> npt.NDArray[np.float64]:
    """Probability that at least one of ``k`` samples is correct, estimated without bias from ``num_samples``.

    ``1 - C(n - c, k) / C(n, k)`` (Chen et al., arXiv 2107.03374, equation 1), as the product
    ``1 - prod_{i = n - c + 1 .. n} (1 - k / i)``, which neither overflows nor cancels.

    Args:
        num_correct: Correct samples ``c`` of each problem, ``[N]``.
        num_samples: Samples ``n`` drawn for each problem.
        k: Samples the estimate speaks of.

    Returns:
        The estimate for each problem, ``[N]``.

    Raises:
        ValueError: ``k`` is not in ``1..n`` or a count is not in ``0..n``.
    """
    correct = np.asarray(num_correct, dtype=np.int64)
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= the {num_samples} samples of each problem")
    if correct.size and not (correct.min() >= 0 and correct.max() <= num_samples):
        raise ValueError(f"correct samples must lie in 0..{num_samples}, got {correct.min()}..{correct.max()}")
    sizes = np.arange(1, num_samples + 1)
    factors = np.clip(1.0 - k / sizes, 0.0, None)  # i < k means fewer than k wrong samples: a zero factor anyway
    included = sizes[None, :] > (num_samples - correct)[:, None]
    return np.asarray(1.0 - np.where(included, factors, 1.0).prod(axis=1), dtype=np.float64)


def bootstrap_interval(scores: npt.ArrayLike, *, seed: int) -> Interval:
    """95% percentile bootstrap interval of the mean score over problems.

    Problems are what is resampled: samples of one problem are not independent of each other, so resampling those would
    give intervals that are too narrow. With all scores equal the interval has no width, whatever ``N``.

    Args:
        scores: One score for each problem, ``[N]`` with ``N >= 1``.
        seed: Seeds the resampling; equal scores and seeds give equal intervals.

    Returns:
        The 2.5th and 97.5th percentile of the mean over 10,000 resamples.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"scores must be a non-empty vector, got shape {values.shape}")
    generator = np.random.default_rng(seed)
    at_once = max(1, _MAX_DRAWS // values.size)
    means = np.empty(_RESAMPLES)
    for first in range(0, _RESAMPLES, at_once):
        count = min(at_once, _RESAMPLES - first)
        means[first : first + count] = values[generator.integers(values.size, size=(count, values.size))].mean(axis=1)
    tail = (1.0 - _LEVEL) / 2
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Interval(low=float(low), high=float(high))
