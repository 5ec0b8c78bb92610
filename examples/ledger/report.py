"""Writes docs/results.md from the ledger: what came out, with intervals, in words that follow from the figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from examples.ledger.arms import ARMS, CONTROLS, DIVERGENCES, MAIN_SEEDS, STEPS, TAU
from examples.ledger.bases import BASES
from examples.ledger.pictures import draw_accuracy, draw_controls
from examples.ledger.points import BASE_ARM, MARGIN, Choice, Ledger, best_tau, choices, level, seed_range, taus
from examples.ledger.results import Record
from opsd_megatron.evaluation.statistics import Interval
from opsd_megatron.telemetry.files import write_atomically

_MARGINS = range(1, 11)
_ACCURACY, _CONTROLS = "images/ledger_accuracy.png", "images/ledger_controls.png"

_HEAD = """\
# Results: every arm on one small task

Written by `python -m examples.ledger report` from [`results/ledger.jsonl`](results/ledger.jsonl); do not edit.
`make ledger` runs what is missing and writes this page. All arms run in this program: Megatron-Core trains, vLLM
samples, in one process on one CPU core, float32, a Qwen3 of 0.64M parameters.

The ledger is {state}. Runs that are in, by base model: {coverage}. {dates}

- **Task**: word problems that add two three-digit numbers, see [examples/quickstart](../examples/quickstart).
{bases}
- **Runs**: {steps} steps of 32 new problems, one response each (GRPO: 8 problems, 8 responses), AdamW 3e-4, gradient
  clip 1, temperature 1. The teacher is frozen and sees the reference unless a row says otherwise. In between the two
  KLs (beta 0.5) the clip mode bregman is entry.
- **Accuracy** in %, of one answer to each of 512 held-out problems, sampled at temperature 1 after the last step: never
  the best step, which would be chosen on the problems it is judged by. In brackets the 95% bootstrap interval over
  problems of the mean over seeds. It does not cover what another seed would do: beside it are the lowest and the
  highest seed. Main arms have {seeds} seeds where complete, and so has the control with other problems' references of
  the settings that lie level below; other controls and other taus have one.
- **Thirty steps** do not settle every arm: where the divergence still falls, longer runs may say something else.
- **Tokens** are those sampled for training; SFT samples none. **Alarms** are steps, of the {steps}, whose clipped loss
  was negative while the unclipped divergence had not fallen.
- **Seeds** change the order of the data and the sampling. Each base is warm-started once, so differences between bases
  are differences between three models.

![Accuracy by step and by generated tokens]({picture})"""

_CONTROLS_HEAD = f"""\
## Controls: what is owed to the reference

The same runs (tau {TAU}) with a teacher that sees no reference, or another problem's. Bold: the 95% interval of the
paired difference to the base model lies above 0, which without a reference is a gain from nothing. Italic: it lies
below 0. Of intervals like these one in forty lies above 0, and one in forty below, by chance.

Without a reference the teacher reads what the student reads. On one core in float32 the two are then equal to the last
bit, loss and gradient are exactly 0 whatever the divergence, and a row that moves would be a defect. A device that
rounds by batch shape gives two sides that differ a little, and a loss that can fall below zero need not stay where it
is then. For that the rounded teacher stands: the base model's weights, rounded to bfloat16 once.
"""

_CHOICE_HEAD = f"""\
## Choosing a divergence

Ranked by a rule that was written before the runs: last the settings whose control without a reference moves from the
base model on any base; else by the accuracy on the base where they do worst. The rounded teacher was added to the rule
later, before its runs, and with it what a move is: at least {MARGIN:.0f} points, at 95%. The last column is not part of
the rule: the accuracy, on the worst base, where the references belong to other problems, as some of a data set's may.
"""

_DEFAULTS_HEAD = f"""\
Several settings are within {MARGIN:.0f} points of the best one on every base, too near to choose between by accuracy:
the intervals above do not cover what another seed would do. Between those, the default is the one that does best where
references belong to other problems. This second rule was added when the first runs of all three bases were in, and it
takes one of two readings: what a setting gains there is robustness to wrong references, and it is also what it gains
without what the right one says. Who wants the gain to be the reference's own takes the other end of the list.
"""


def write_report(records: Sequence[Record], docs: Path) -> None:
    """Write ``results.md`` and ``images/ledger_*.png`` under ``docs``."""
    write_atomically(docs / "results.md", [page(records)])
    ledger = Ledger(records)
    draw_accuracy(ledger, docs / _ACCURACY)
    draw_controls(ledger, docs / _CONTROLS)


def page(records: Sequence[Record]) -> str:
    """The text of ``results.md``."""
    ledger = Ledger(records)
    sections = [_head(ledger), *(_base_section(ledger, base) for base in ledger.bases)]
    sections += [_controls_section(ledger), _choice_section(ledger), _costs_section(ledger)]
    return "\n\n".join(filter(None, sections)) + "\n"


def _head(ledger: Ledger) -> str:
    wanted = {(base, arm.name, seed) for base in BASES for arm in ARMS.values() for seed in arm.seeds}
    there = {record.key for record in ledger.records} & wanted
    dates = sorted({record.date for record in ledger.records})
    counts = [
        f"{base} {sum(key[0] == base for key in there)} of {sum(key[0] == base for key in wanted)}" for base in BASES
    ]
    return _HEAD.format(
        state="complete" if wanted == there else "**not complete**; `make ledger` goes on with what is missing",
        coverage=", ".join(counts),
        dates=f"Recorded {' to '.join(dict.fromkeys((dates[0], dates[-1])))}." if dates else "",
        bases="\n".join(f"- **Base {name}**: {base.title}." for name, base in BASES.items()),
        steps=STEPS,
        seeds=len(MAIN_SEEDS),
        picture=_ACCURACY,
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _base_section(ledger: Ledger, base: str) -> str:
    arms = [arm for arm in ARMS.values() if not arm.group.startswith("control")]
    rows = []
    for arm in (BASE_ARM, *arms):
        point, change = ledger.point(base, arm.name), ledger.change(base, arm.name)
        if point is None:
            continue
        runs = ledger.of(base, arm.name)
        gain = "" if change is None else f"{change.low:+.1f} to {change.high:+.1f}"
        tokens = f"{np.mean([r.generated[-1] for r in runs]):.1f}" if runs else ""
        seeds = f"{point.lowest:.1f}, {point.highest:.1f}"
        alarms = f"{np.mean([r.alarms for r in runs]):.0f}" if any(r.alarms for r in runs) else ""
        rows.append((arm.title, len(point.seeds), point, seeds, gain, _drift(runs), alarms, tokens))
    columns = (
        "arm",
        "seeds",
        "accuracy",
        "lowest, highest seed",
        "points over base",
        "divergence, first and last 10 steps",
        "alarms",
        "thousand tokens",
    )
    return f"## Base {base}: {BASES[base].title}\n\n" + _table(columns, rows)


def _drift(runs: Sequence[Record]) -> str:
    """The unclipped divergence, over the steps before the first and before the last evaluation."""
    known = [[value for value in run.divergence if value is not None] for run in runs]
    if not known or not all(known):
        return ""
    return ", ".join(f"{np.mean([each[place] for each in known]):.2g}" for place in (0, -1))


def _controls_section(ledger: Ledger) -> str:
    rows = []
    for base in ledger.bases:
        for beta, mode in DIVERGENCES:
            names = [f"opsd_{beta}_{mode}", *(f"control_{control}_{beta}_{mode}" for control in CONTROLS)]
            cells = [_marked(ledger, base, name) for name in names]
            if any(cells[1:]):
                rows.append((base, beta, mode, *cells))
    if not rows:
        return ""
    table = _table(("base", "beta", "clip", "reference", *CONTROLS.values()), rows)
    picture = f"![Accuracy with the reference and of the controls]({_CONTROLS})"
    return "\n".join((_CONTROLS_HEAD, table, "", *_findings(ledger), "", picture))


def _marked(ledger: Ledger, base: str, arm: str) -> str:
    """An arm's accuracy, in bold or italic where it differs from the base model's."""
    point, change = ledger.point(base, arm), ledger.change(base, arm)
    if point is None:
        return ""
    mark = "" if change is None else _direction(change)
    return f"{mark}{point}{mark}"


def _direction(change: Interval) -> str:
    return "**" if change.low > 0 else "*" if change.high < 0 else ""


def _findings(ledger: Ledger) -> list[str]:
    """Gains without a reference and losses with one, as the table has them."""
    gained, lost = [], []
    for base in ledger.bases:
        start = ledger.point(base, BASE_ARM.name)
        for arm in ARMS.values():
            point, change = ledger.point(base, arm.name), ledger.change(base, arm.name)
            if start is None or point is None or change is None:
                continue
            title = arm.title.removeprefix("OPSD, ")
            if arm.group in ("control_none", "control_rounded"):
                gained += [f"{title} on {base} ({way})" for way in _gain_on_the_way(ledger, base, arm.name)]
            if arm.group == "opsd" and _direction(change) == "*":
                lost.append(f"{title} on {base} ({start.value:.1f} to {point.value:.1f})")
    return [
        f"- Gains of at least {MARGIN:.0f} points without any reference, at 95%, at some evaluation, with the "
        "accuracies from the base model on: " + ("; ".join(gained) or "none found") + ".",
        "- With the reference, worse than the base model: " + ("; ".join(lost) or "none found") + ".",
    ]


def _gain_on_the_way(ledger: Ledger, base: str, arm: str) -> list[str]:
    """Where the arm was ahead of the base model by at least the margin at some step: its accuracies, one text."""
    steps = sorted({step for run in ledger.of(base, arm) for step in run.steps if step})
    changes = [ledger.change(base, arm, step) for step in steps]
    if not any(change is not None and change.low > MARGIN for change in changes):
        return []
    points = [ledger.point(base, arm, step) for step in (0, *steps)]
    return [", ".join(f"{point.value:.1f}" for point in points if point is not None)]


def _choice_section(ledger: Ledger) -> str:
    ranked = choices(ledger)
    if not ranked:
        return ""
    bases = list(ranked[0].points)
    counted = f"Bases counted: {', '.join(bases)}." + (
        "" if len(bases) == len(BASES) else " The others are not in yet."
    )
    rows = [
        (
            number,
            each.beta,
            each.mode,
            *(f"{each.points[base].value:.1f}" for base in bases),
            f"{each.worst_seed:.1f}",
            _unexplained(each),
            "not known yet" if each.shuffled is None else f"{each.shuffled:.1f}",
        )
        for number, each in enumerate(ranked, 1)
    ]
    columns = ("", "beta", "clip", *bases, "worst seed", "changes without a reference", "another problem's reference")
    return "\n".join((_CHOICE_HEAD, counted, "", _table(columns, rows), *_defaults(ledger, ranked)))


def _defaults(ledger: Ledger, ranked: Sequence[Choice]) -> list[str]:
    """What the shipped defaults are, and what tau is among them."""
    candidates = level(ranked)
    if not candidates:
        return []
    chosen = candidates[0]
    by_tau = taus(ledger, chosen)
    tau = best_tau(by_tau)
    names = "; ".join(f"beta {each.beta}, {each.mode} ({each.shuffled:.1f})" for each in candidates)
    apart = seed_range(candidates)
    same = [margin for margin in _MARGINS if level(ranked, margin)[:1] == [chosen]]
    rows = [(each, *points.values()) for each, points in by_tau.items()]
    return [
        "",
        _DEFAULTS_HEAD,
        f"- Level, with their accuracy under other problems' references on the worst base: {names}.",
        *([f"- Seeds of one of these settings lie up to {apart:.1f} points apart."] if apart else []),
        f"- The same setting comes first for margins of {', '.join(map(str, same))} points, of {_MARGINS[0]} to "
        f"{_MARGINS[-1]} tried.",
        f"- **Defaults: `objective.beta={chosen.beta}`, `objective.clip_mode={chosen.mode}`, `objective.clip={tau}`.**",
        "",
        f"Other taus. The paper's {TAU} stays unless another is as far ahead on some base and as far behind on none:",
        "",
        _table(("tau", *chosen.points), rows),
    ]


def _unexplained(choice: Choice) -> str:
    if choice.unexplained is None:
        return "not known yet"
    return f"by at least {choice.unexplained:.1f} points" if choice.gains_from_nothing else "no"


def _costs_section(ledger: Ledger) -> str:
    rows = []
    for arm in ARMS.values():
        runs = [r for r in ledger.records if r.arm == arm.name]
        if runs and not arm.group.startswith(("control", "tau")):
            step, whole = np.median([r.step_seconds for r in runs]), np.median([r.seconds for r in runs])
            rows.append((arm.title, f"{step:.2f}", f"{whole:.0f}"))
    if not rows:
        return ""
    hours = sum(r.seconds for r in ledger.records) / 3600
    total = f"All runs together took {hours:.1f} hours of wall time, one core each, beside other work: differences "
    total += "between divergences, or between clip modes, are that work's."
    table = _table(("arm", "seconds a step", "seconds of the whole run"), rows)
    return f"## Wall time\n\nMedians; the whole run has its start and three evaluations.\n\n{table}\n\n{total}"
