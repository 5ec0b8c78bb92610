from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsd_megatron.evaluation.statistics import Interval, bootstrap_interval, pass_at_k


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_closed_form(case: tuple[int, int, int]) -> None:
    n, c, k = case
    expected = 1 - comb(n - c, k) / comb(n, k)
    assert pass_at_k([c], num_samples=n, k=k)[0] == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_ends() -> None:
    correct = [0, 1, 3, 4]
    np.testing.assert_array_equal(pass_at_k(correct, num_samples=4, k=4), [0, 1, 1, 1])
    np.testing.assert_allclose(pass_at_k(correct, num_samples=4, k=1), np.array(correct) / 4, atol=1e-15)
    assert pass_at_k([], num_samples=4, k=1).shape == (0,)


def test_pass_at_k_of_large_samples_neither_overflows_nor_cancels() -> None:
    value = pass_at_k([1], num_samples=10_000, k=5_000)[0]
    assert value == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize(("correct", "k"), [([1], 0), ([1], 5), ([5], 1), ([-1], 1)])
def test_pass_at_k_refuses_what_makes_no_sense(correct: list[int], k: int) -> None:
    with pytest.raises(ValueError, match=r"pass@|correct samples"):
        pass_at_k(correct, num_samples=4, k=k)


def test_interval_of_a_bernoulli_sample_is_near_the_normal_one() -> None:
    scores = np.arange(1000) < 300
    interval = bootstrap_interval(scores, seed=1)
    half_width = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    assert interval.low == pytest.approx(0.3 - half_width, abs=0.002)
    assert interval.high == pytest.approx(0.3 + half_width, abs=0.002)


def test_interval_is_seeded_and_contains_the_mean() -> None:
    scores = np.random.default_rng(0).random(50)
    first, again, other = (bootstrap_interval(scores, seed=seed) for seed in (3, 3, 4))
    assert first == again != other
    assert first.low < scores.mean() < first.high


def test_interval_does_not_depend_on_how_many_resamples_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(0).random(30)
    whole = bootstrap_interval(scores, seed=3)
    monkeypatch.setattr("opsd_megatron.evaluation.statistics._MAX_DRAWS", 100)
    assert bootstrap_interval(scores, seed=3) == whole


def test_interval_of_equal_scores_has_no_width() -> None:
    assert bootstrap_interval([1.0, 1.0, 1.0], seed=0) == Interval(1.0, 1.0)
    assert bootstrap_interval([0.25], seed=0) == Interval(0.25, 0.25)


def test_interval_resamples_problems_and_covers_the_truth() -> None:
    """Of 150 simulated evaluations (80 problems of different difficulty, 4 samples each) about 95% hold the truth."""
    generator = np.random.default_rng(7)
    covered = 0
    for trial in range(150):
        difficulty = generator.beta(0.5, 0.5, size=80)
        scores = generator.binomial(4, difficulty) / 4
        interval = bootstrap_interval(scores, seed=trial)
        covered += interval.low <= 0.5 <= interval.high
    assert 0.90 <= covered / 150 <= 0.985  # resampling the 320 samples instead covers about 80%


@pytest.mark.parametrize("scores", [[], [[1.0]]])
def test_interval_needs_a_vector(scores: list[object]) -> None:
    with pytest.raises(ValueError, match="non-empty vector"):
        bootstrap_interval(np.array(scores, dtype=float), seed=0)
