"""The ledger's pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np

from examples.ledger.arms import ARMS, CONTROLS, DIVERGENCES
from examples.ledger.bases import BASES
from examples.ledger.points import BASE_ARM, Ledger, Point

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_DRAWN = ("sft_own", "sft_reference", "grpo", "opsd_0_entry", "opsd_0_none", "opsd_0_bregman", "opsd_0.5_entry")


def draw_accuracy(ledger: Ledger, path: Path) -> None:
    """Accuracy by step above, by generated tokens below; a column for each base."""
    bases = ledger.bases or list(BASES)[:1]
    figure, axes = plt.subplots(2, len(bases), figsize=(5 * len(bases), 8), layout="constrained", squeeze=False)
    for column, base in enumerate(bases):
        for colour, arm in zip(plt.get_cmap("tab10").colors, _DRAWN, strict=False):  # type: ignore[attr-defined]
            runs = ledger.of(base, arm)
            if not runs:
                continue
            steps = sorted({0, *runs[0].steps})
            points = [(step, ledger.point(base, arm, step)) for step in steps]
            drawn = np.mean([each.generated[-len(steps[1:]) :] for each in runs], axis=0)
            tokens = {0: 0.0, **dict(zip(steps[1:], drawn, strict=True))}
            _curve(axes[0][column], points, lambda step: step, colour, ARMS[arm].title)
            if runs[0].generated[-1]:
                _curve(axes[1][column], points, tokens.__getitem__, colour, ARMS[arm].title)
        axes[0][column].set(title=f"base {base}", xlabel="step", ylabel="held-out accuracy, %", ylim=(0, 100))
        axes[1][column].set(xlabel="thousand response tokens generated for training", ylabel="%", ylim=(0, 100))
        for row in (0, 1):
            axes[row][column].grid(alpha=0.3)
    if axes[0][0].get_legend_handles_labels()[0]:
        axes[0][0].legend(fontsize=7)
    _save(figure, path)


def _curve(
    axes: plt.Axes,
    points: Sequence[tuple[int, Point | None]],
    place: Callable[[int], float],
    colour: object,
    label: str,
) -> None:
    known = [(place(step), point) for step, point in points if point is not None]
    values = [point.value for _, point in known]
    errors = [
        [point.value - point.interval.low for _, point in known],
        [point.interval.high - point.value for _, point in known],
    ]
    axes.errorbar([x for x, _ in known], values, yerr=errors, color=colour, marker="o", ms=3, capsize=2, label=label)


def draw_controls(ledger: Ledger, path: Path) -> None:
    """Bars: accuracy with the reference and of the controls, for each divergence; a row for each base."""
    bases = ledger.bases or list(BASES)[:1]
    labels = [f"{beta}\n{mode}" for beta, mode in DIVERGENCES]
    figure, axes = plt.subplots(len(bases), 1, figsize=(11, 3 * len(bases)), layout="constrained", squeeze=False)
    for row, base in enumerate(bases):
        series = [("opsd", "reference"), *((f"control_{name}", label) for name, label in CONTROLS.items())]
        for number, (prefix, label) in enumerate(series):
            points = [ledger.point(base, f"{prefix}_{beta}_{mode}") for beta, mode in DIVERGENCES]
            places = np.arange(len(points)) + 0.2 * (number - 1.5)
            axes[row][0].bar(places, [0.0 if p is None else p.value for p in points], 0.2, label=label)
        start = ledger.point(base, BASE_ARM.name)
        if start is not None:
            axes[row][0].axhline(start.value, color="black", ls=":", label="base model")
        axes[row][0].set(title=f"base {base}", ylabel="accuracy, %", ylim=(0, 115))
        axes[row][0].set_xticks(range(len(labels)), labels, fontsize=7)
    if axes[0][0].get_legend_handles_labels()[0]:
        axes[0][0].legend(fontsize=7, loc="upper left", ncols=5)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=100, format="png")
    temporary.replace(path)
    plt.close(figure)
