"""Reads the two runs' ``metrics.jsonl`` and turns them into the quickstart's table, verdict and picture."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True)
class Accuracy:
    """Held-out accuracy of sampled answers with its 95% interval, all in 0..1."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, evaluation: dict[str, Any]) -> Accuracy:
        """From the ``eval`` object of a line of ``metrics.jsonl``."""
        low, high = evaluation["avg_interval"]
        return cls(evaluation["avg_at_k"], low, high)


@dataclass(frozen=True)
class Run:
    """What one training run recorded.

    Attributes:
        steps: Lines of optimizer steps, in order.
        accuracies: Accuracy by step; step 0 is before training.
    """

    steps: list[dict[str, Any]]
    accuracies: dict[int, Accuracy]

    @property
    def first(self) -> Accuracy:
        """Before training."""
        return self.accuracies[0]

    @property
    def last(self) -> Accuracy:
        """After the last step; not the best one, which would be chosen on the problems it is judged by."""
        return self.accuracies[max(self.accuracies)]

    def seconds_by_phase(self) -> dict[str, float]:
        """Median seconds a step of each phase that most steps have (evaluations are rare)."""
        seconds = [step["seconds"] for step in self.steps]
        usual = {
            phase: [each[phase] for each in seconds if phase in each]
            for phase in ("rollout", "pack", "teacher", "student", "optimizer", "sync")
        }
        return {phase: _median(values) for phase, values in usual.items() if 2 * len(values) > len(seconds)}


def read_run(directory: Path) -> Run:
    """The run that was written to ``directory``."""
    with (directory / "metrics.jsonl").open(encoding="utf-8") as file:
        lines = {line["step"]: line for line in map(json.loads, file)}  # of a resumed run, the later line counts
    return Run(
        steps=[lines[step] for step in sorted(lines) if step],
        accuracies={step: Accuracy.of(lines[step]["eval"]) for step in sorted(lines) if lines[step].get("eval")},
    )


def verdict(opsd: Run, control: Run) -> bool:
    """Whether OPSD's interval lies above the base model's and above the control's."""
    return opsd.last.low > max(opsd.first.high, control.last.high)


def result_table(opsd: Run, control: Run) -> str:
    """Accuracies with intervals, as text."""
    rows = (
        ("base, after warm-start", opsd.first),
        ("control: teacher without reference", control.last),
        ("OPSD: teacher with reference", opsd.last),
    )
    lines = [f"{'held-out accuracy, sampled at T = 1':<38}{'%':>6}   95% interval"]
    lines += [f"{name:<38}{100 * a.value:6.1f}   {100 * a.low:.1f} to {100 * a.high:.1f}" for name, a in rows]
    return "\n".join(lines)


def save_picture(path: Path, opsd: Run, control: Run) -> None:
    """Loss, unclipped divergence and accuracy by step of both runs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for run, name, colour in ((opsd, "OPSD", "tab:blue"), (control, "control, no reference", "tab:orange")):
        steps = [line["step"] for line in run.steps]
        left.plot(steps, [line["divergence"] for line in run.steps], color=colour, label=f"{name}: divergence")
        left.plot(steps, [line["loss"] for line in run.steps], color=colour, ls=":", label=f"{name}: loss (clipped)")
        points = list(run.accuracies.items())
        values = [100 * a.value for _, a in points]
        errors = [[100 * (a.value - a.low) for _, a in points], [100 * (a.high - a.value) for _, a in points]]
        right.errorbar([s for s, _ in points], values, yerr=errors, color=colour, marker="o", capsize=3, label=name)
    left.set(xlabel="step", ylabel="nats per response token", title="Divergence of student and teacher")
    right.set(xlabel="step", ylabel="%", ylim=(0, 100), title="Held-out accuracy, sampled, with 95% intervals")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)
    plt.close(figure)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
