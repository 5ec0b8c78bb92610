"""Accuracies of arms, put together from the ledger's records: over seeds, with intervals, against the base model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from examples.ledger.arms import ARMS, DIVERGENCES, OTHER_TAUS, STEPS, TAU, Arm
from examples.ledger.bases import BASES
from examples.ledger.results import Record
from opsd_megatron.evaluation.statistics import Interval

# Settings that are no further apart than this, in points of accuracy, are not chosen between by accuracy.
MARGIN = 5.0
BASE_ARM = Arm("base", "baseline", "base model, after its warm-start")


def interval(scores: npt.NDArray[np.float64]) -> Interval:
    """95% bootstrap interval of the mean of ``scores``, ``[N]`` with a few distinct values.

    How often each value occurs in a resample is a draw from a multinomial distribution: the bootstrap of
    ``evaluation.statistics.bootstrap_interval``, a hundred times as fast. Its correction for few problems, 0.1% of the
    width for 512 of them, is left out.
    """
    values, counts = np.unique(scores, return_counts=True)
    draws = np.random.default_rng(0).multinomial(scores.size, counts / scores.size, size=10_000)
    low, high = np.quantile(draws @ values / scores.size, [0.025, 0.975])
    return Interval(low=float(low), high=float(high))


@dataclass(frozen=True)
class Point:
    """Accuracy over all seeds after some step, in percent.

    Attributes:
        value: Mean over problems and seeds.
        interval: 95% bootstrap interval over problems; a problem's score is its mean over seeds.
        lowest: Of the seeds.
        highest: Of the seeds.
        scores: Each problem's mean over seeds, ``[N]`` in 0..1.
        seeds: Which seeds there are.
    """

    value: float
    interval: Interval
    lowest: float
    highest: float
    scores: npt.NDArray[np.float64]
    seeds: tuple[int, ...]

    @staticmethod
    def of(correct: Sequence[npt.NDArray[np.bool_]], seeds: Iterable[int]) -> Point:
        """From each seed's verdicts, ``[N]`` each."""
        runs = np.stack(correct).astype(np.float64)
        scores = runs.mean(axis=0)
        means = 100 * runs.mean(axis=1)
        return Point(100 * scores.mean(), interval(100 * scores), means.min(), means.max(), scores, tuple(seeds))

    def gain_over(self, other: Point) -> Interval:
        """95% interval of the difference to ``other`` on the same problems, paired, in points."""
        return interval(100 * (self.scores - other.scores))

    def __str__(self) -> str:
        return f"{self.value:.1f} ({self.interval.low:.1f} to {self.interval.high:.1f})"


class Ledger:
    """The records of known arms and bases, looked up."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = [each for each in records if each.base in BASES and each.arm in ARMS]
        self._points: dict[tuple[str, str, int], Point | None] = {}

    def of(self, base: str, arm: str) -> list[Record]:
        """An arm's records on a base, by seed."""
        return sorted((r for r in self.records if (r.base, r.arm) == (base, arm)), key=lambda r: r.seed)

    def point(self, base: str, arm: str, step: int = STEPS) -> Point | None:
        """Accuracy after ``step`` steps; ``None`` where no seed was evaluated then."""
        key = base, arm, step
        if key not in self._points:
            self._points[key] = self._point(base, arm, step)
        return self._points[key]

    def _point(self, base: str, arm: str, step: int) -> Point | None:
        if arm == BASE_ARM.name or step == 0:
            by_seed = {r.seed: r for r in self.records if r.base == base and 0 in r.steps}
            runs, step = [by_seed[seed] for seed in sorted(by_seed)], 0
        else:
            runs = [r for r in self.of(base, arm) if step in r.steps]
        return Point.of([r.correct_at(step) for r in runs], [r.seed for r in runs]) if runs else None

    @property
    def bases(self) -> list[str]:
        """Bases with records, in the order they are declared."""
        return [base for base in BASES if any(r.base == base for r in self.records)]

    def change(self, base: str, arm: str, step: int = STEPS) -> Interval | None:
        """95% interval of an arm's gain over the base model, in points, on the seeds that both were evaluated with."""
        point, start = self.point(base, arm, step), self.point(base, BASE_ARM.name)
        if point is None or start is None or arm == BASE_ARM.name:
            return None
        shared = [seed for seed in point.seeds if seed in start.seeds]
        if not shared:
            return point.gain_over(start)
        before = {r.seed: r for r in self.records if r.base == base and 0 in r.steps}
        after = {r.seed: r for r in self.of(base, arm)}
        return Point.of([after[seed].correct_at(step) for seed in shared], shared).gain_over(
            Point.of([before[seed].correct_at(0) for seed in shared], shared)
        )


@dataclass(frozen=True)
class Choice:
    """A divergence as a candidate for the defaults.

    Attributes:
        beta: Which divergence.
        mode: How it is clipped.
        points: Accuracy on each base.
        unexplained: How far the controls without a reference have moved from the base model at least, in points, on the
            base where that is most; 0 where their intervals hold 0, ``None`` where one is not in on every base.
        shuffled: Accuracy with another problem's reference, on the base where it is lowest; ``None`` where that control
            is not in on every base.
    """

    beta: str
    mode: str
    points: dict[str, Point]
    unexplained: float | None
    shuffled: float | None

    @property
    def gains_from_nothing(self) -> bool:
        """Whether a control without a reference is known to move by more than the margin."""
        return self.unexplained is not None and self.unexplained > MARGIN

    @property
    def worst(self) -> float:
        """Accuracy on the base where it is lowest."""
        return min(point.value for point in self.points.values())

    @property
    def worst_seed(self) -> float:
        """Accuracy of the worst seed on the worst base."""
        return min(point.lowest for point in self.points.values())


def choices(ledger: Ledger) -> list[Choice]:
    """Divergences that were run on all the ledger's bases, best first.

    Last those that change something where the teacher has no reference; else by the accuracy on the base where it is
    lowest.
    """
    found = []
    for beta, mode in DIVERGENCES:
        points = {base: ledger.point(base, f"opsd_{beta}_{mode}") for base in ledger.bases}
        known = {base: point for base, point in points.items() if point is not None}
        if not known or len(known) < len(points):
            continue
        controls = [f"control_{control}_{beta}_{mode}" for control in ("none", "rounded")]
        changes = [ledger.change(base, control) for base in ledger.bases for control in controls]
        moved = [max(change.low, -change.high, 0.0) for change in changes if change is not None]
        unexplained = max(moved) if len(moved) == len(changes) else None
        others = [ledger.point(base, f"control_shuffled_{beta}_{mode}") for base in ledger.bases]
        shuffled = [point.value for point in others if point is not None]
        worst = min(shuffled) if len(shuffled) == len(others) else None
        found.append(Choice(beta, mode, known, unexplained, worst))
    return sorted(found, key=lambda each: (each.gains_from_nothing, -each.worst))


def level(ranked: Sequence[Choice], margin: float = MARGIN) -> list[Choice]:
    """Of :func:`choices` those that could be the defaults, the one that should be first.

    They change nothing without a reference, are within ``margin`` points of the best such setting on every base, and
    all their controls are in. First comes the one that does best where references belong to other problems.
    """
    known = [each for each in ranked if each.unexplained is not None and each.shuffled is not None]
    sound = [each for each in known if not each.gains_from_nothing]
    if not sound:
        return []
    best = {base: max(each.points[base].value for each in sound) for base in sound[0].points}
    found = [each for each in sound if all(point.value >= best[base] - margin for base, point in each.points.items())]
    return sorted(found, key=lambda each: -(each.shuffled or 0.0))


def seed_range(ranked: Sequence[Choice]) -> float:
    """How far the seeds of one setting lie apart, in points, where that is most; of those without several seeds 0."""
    return max((point.highest - point.lowest for each in ranked for point in each.points.values()), default=0.0)


def taus(ledger: Ledger, choice: Choice) -> dict[str, dict[str, Point]]:
    """A setting's accuracy on each base by tau, those taus that were run on every base; ``arms.TAU`` first."""
    found = {TAU: choice.points}
    for tau in OTHER_TAUS:
        points = {base: ledger.point(base, f"tau_{choice.beta}_{choice.mode}_{tau}") for base in choice.points}
        known = {base: point for base, point in points.items() if point is not None}
        if len(known) == len(points):
            found[tau] = known
    return found


def best_tau(by_tau: dict[str, dict[str, Point]]) -> str:
    """``arms.TAU``, the paper's, unless another is better on some base by more than the margin and worse on none."""
    usual = by_tau[TAU]
    for tau, points in by_tau.items():
        gains = [point.value - usual[base].value for base, point in points.items()]
        if max(gains) > MARGIN and min(gains) >= -MARGIN:
            return tau
    return TAU
