"""The ledger's arms, its bookkeeping and its report; nothing is trained."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from examples.ledger import bases, runner
from examples.ledger.arms import ARMS, CONTROLS, DIVERGENCES, ONE_SEED, Arm, common_overrides
from examples.ledger.points import BASE_ARM, Ledger, best_tau, choices, interval, level, seed_range, taus
from examples.ledger.report import page, write_report
from examples.ledger.results import Record, add_record, identifying_settings, pack, read_ledger, read_run, unpack
from examples.ledger.runner import LedgerRunner, Run, arm_config, arm_settings, pending
from opsd_megatron.config import Config, ObjectiveConfig
from opsd_megatron.evaluation.statistics import Interval, bootstrap_interval


@cache
def composed(name: str) -> Config:
    """The resolved configuration of an arm; composing takes a while."""
    return arm_config(ARMS[name])


def record(base: str, arm: str, accuracy: float, *, seed: int = 0, start: float | None = None) -> Record:
    """A run after which the first problems, ``accuracy`` of 40, are answered correctly."""
    steps = ([] if start is None else [0]) + [10, 20, 30]
    shares = ([] if start is None else [start]) + [accuracy] * 3
    return Record(
        base=base,
        arm=arm,
        seed=seed,
        settings="",
        steps=steps,
        correct=[pack(place < 40 * share for place in range(40)) for share in shares],
        generated=[1.2 * step for step in steps],
        divergence=[0.3, 0.2, 0.1],
        loss=[0.1, 0.1, 0.1],
        alarms=0,
        step_seconds=0.5,
        seconds=30.0,
        date="2026-01-02",
    )


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_a_valid_run(name: str) -> None:
    config = composed(name)
    config.validate(world_size=1)
    assert config.train.steps == 30 and config.evaluation.every == 10 and config.checkpoint.every == 0
    responses = config.train.problems_per_step * config.rollout.samples_per_problem
    assert responses == 32 or config.needs.groups


def test_every_divergence_has_its_controls() -> None:
    for beta, mode in DIVERGENCES:
        for control in CONTROLS:
            ours, theirs = (composed(f"{prefix}_{beta}_{mode}") for prefix in ("opsd", f"control_{control}"))
            assert theirs.data.privileged == {"rounded": "none"}.get(control, control)
            if control == "rounded":
                assert (theirs.teacher.policy, theirs.teacher.path) == ("separate", f"{theirs.model.path[:-2]}rounded")
                theirs = replace(theirs, teacher=ours.teacher)
            assert replace(theirs, data=ours.data) == ours
            assert replace(theirs.data, privileged=ours.data.privileged) == ours.data


def test_one_arm_evaluates_the_base_with_every_seed_and_on_the_same_problems() -> None:
    (arm,) = [arm for arm in ARMS.values() if arm.evaluates_base]
    assert set(arm.seeds) == {seed for each in ARMS.values() for seed in each.seeds}
    assert composed(arm.name).evaluation == replace(composed("live").evaluation, at_start=True)


def test_settings_name_what_differs_and_not_where_things_lie() -> None:
    settings = arm_settings("control_none_0_none")
    stated = {"objective.beta": 0.0, "objective.clip": None, "objective.clip_mode": "none", "data.privileged": "none"}
    assert stated.items() <= settings.items()
    assert not {"output_dir", "model.path", "data.train", "train.seed", "optimizer.eps"} & set(settings)
    faster = replace(composed("live"), optimizer=replace(composed("live").optimizer, lr=1.0))
    assert identifying_settings(faster) != arm_settings("live")


def test_bases_share_their_problems_and_differ_in_their_habits() -> None:
    made = {name: bases.base_data(base) for name, base in bases.BASES.items()}
    quickstart = bases.make_data.make_data(0)
    assert made["C"]["warm_start.jsonl"] == quickstart["warm_start.jsonl"]
    assert made["C"]["eval.jsonl"] == quickstart["eval.jsonl"]
    for data in made.values():
        assert data["eval.jsonl"] == made["C"]["eval.jsonl"] and data["train.jsonl"] == made["C"]["train.jsonl"]
        assert all(_boxed(row["own"]) == _boxed(row["solution"]) == row["answer"] for row in data["train.jsonl"])
    rows = made["D2"]["warm_start.jsonl"]
    wrong = [row for row in rows if _boxed(row["solution"]) != row["answer"]]
    assert all(row["role"] == "teacher" for row in wrong)
    shares = [len(wrong) / len(rows), sum(row["role"] == "student" for row in rows) / len(rows)]
    assert np.allclose(shares, [0.1, 0.45], atol=0.01)
    right = [_boxed(row["response"]) == row["answer"] for row in wrong]
    assert 0.4 < np.mean(right) < 0.6  # mismatched references come with noisy solutions
    assert all(
        _boxed(row["response"]) == row["answer"]
        for row in rows
        if row["role"] == "teacher" and _boxed(row["solution"]) == row["answer"]
    )


def _boxed(text: str) -> str:
    found = re.search(r"\\boxed\{(\d+)\}", text)
    assert found is not None
    return found[1]


def test_verdicts_round_trip() -> None:
    flags = np.array([False, False, False, False, True, False, True, True])
    assert pack(flags) == "0b"
    assert np.array_equal(unpack("0b"), flags)
    with pytest.raises(ValueError, match="multiple of 4"):
        pack([True])


def write_run(directory: Path) -> None:
    """What a run of three steps, evaluated before the first and after the last, leaves behind."""
    (directory / "evaluations").mkdir(parents=True)
    lines: list[dict[str, object]] = [{"step": 0, "eval": {"avg_at_k": 0.5}, "seconds": {"evaluation": 3.0}}]
    for step in (1, 2, 3):
        seconds = {"rollout": 0.2, "student": 0.1 * step, "evaluation": 5.0}
        lines.append({"step": step, "loss": 0.1 / step, "divergence": 0.3, "tokens": 1000 * step, "seconds": seconds})
        lines[-1] |= {"sampled_tokens": 2000} if step < 3 else {}  # trained on what was written, in the last step
    lines[-1] |= {"eval": {"avg_at_k": 0.75}, "alarm": "the loss fell below zero"}
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step, verdicts in ((0, [1, 1, 0, 0]), (3, [1, 1, 1, 0])):
        samples = "".join(json.dumps({"samples": [{"correct": bool(verdict)}]}) + "\n" for verdict in verdicts)
        (directory / "evaluations" / f"step_{step}.jsonl").write_text(samples)


def test_a_runs_files_are_read(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert read_run(tmp_path) == {
        "steps": [0, 3],
        "correct": ["c", "e"],
        "generated": [0.0, 4.0],
        "divergence": [0.3],
        "loss": [0.061111],
        "alarms": 1,
        "step_seconds": 0.4,
    }


def test_a_step_without_anything_to_learn_from_has_no_loss(tmp_path: Path) -> None:
    write_run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for step in (2, 3):
        del lines[step]["loss"], lines[step]["divergence"]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_run(tmp_path)
    assert (found["loss"], found["divergence"]) == ([0.1], [0.3])


def test_a_record_replaces_that_of_the_same_run(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    for accuracy, seed in ((0.5, 1), (0.6, 0), (0.7, 1)):
        add_record(path, record("C", "live", accuracy, seed=seed))
    assert read_ledger(path) == [record("C", "live", 0.6, seed=0), record("C", "live", 0.7, seed=1)]


def test_a_run_is_pending_until_the_ledger_holds_it_as_it_is_now(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    run, other = Run("C", ARMS["live"], 0), Run("B", ARMS["live"], 0)
    assert pending([run, other], path) == [run, other]
    add_record(path, replace(record("C", "live", 0.5), settings=run.settings))
    assert pending([run, other], path) == [other]
    add_record(path, replace(record("C", "live", 0.5), settings="of other settings"))
    assert pending([run], path) == [run]


def test_a_failed_run_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a program in torchrun's place that leaves a run's files, or fails for one arm."""
    write_run(tmp_path / "made")
    program = tmp_path / "program.py"
    program.write_text(
        "import shutil, sys\n"
        "settings = dict(each.split('=', 1) for each in sys.argv[1:])\n"
        "if settings['objective.name'] == 'sft':\n"
        "    sys.exit('error: no room')\n"
        f"shutil.copytree({str(tmp_path / 'made')!r}, settings['output_dir'])\n"
    )
    monkeypatch.setattr(runner, "TORCHRUN", (str(program),))
    made = LedgerRunner(tmp_path / "ledger.jsonl", tmp_path / "work", jobs=2)
    made.run([Run("C", ARMS[name], 0) for name in ("sft_own", "live", "opsd_0_entry")])
    assert [each.arm for each in read_ledger(tmp_path / "ledger.jsonl")] == ["live", "opsd_0_entry"]
    assert len(made.failures) == 1 and "sft_own" in made.failures[0] and "error: no room" in made.failures[0]
    assert "C live seed 0: 50.0, 75.0 % after steps [0, 3]" in capsys.readouterr().out


def test_overrides_are_taken_as_they_are_written() -> None:
    arm = Arm("x", "opsd", "x", {"train.steps": "7"}, ONE_SEED)
    assert common_overrides(arm, 3)["train.steps"] == "7"
    assert re.fullmatch("w/bases/B-[0-9a-f]{6}/hf", Run("B", arm, 3).overrides(Path("w"))["model.path"])


def fixture_ledger() -> list[Record]:
    records = [record("C", "sft_own", 0.9, seed=seed, start=0.5) for seed in (0, 1)]
    records += [record("C", "opsd_0_entry", accuracy, seed=seed) for seed, accuracy in enumerate((0.6, 1.0))]
    records += [record("C", "control_none_0_entry", 0.5), record("C", "control_shuffled_0_entry", 0.3)]
    records += [record("C", "opsd_0.5_entry", 0.75), record("C", "control_none_0.5_entry", 0.5)]
    records += [record("C", "control_rounded_0_entry", 0.8), record("C", "control_rounded_0.5_entry", 0.5)]
    return [*records, record("C", "opsd_1_entry", 0.1), record("C", "unknown arm", 0.1)]


def test_points_average_seeds_and_pair_problems() -> None:
    ledger = Ledger(fixture_ledger())
    point = ledger.point("C", "opsd_0_entry")
    assert point is not None and (point.lowest, point.highest, point.value) == (60.0, 100.0, 80.0)
    assert point.interval.low < 80 < point.interval.high
    base = ledger.point("C", BASE_ARM.name)
    assert base is not None and base.value == 50 and base.seeds == (0, 1)
    change = ledger.change("C", "control_none_0.5_entry")
    assert change is not None and (change.low, change.high) == (0.0, 0.0)  # the same problems, paired
    change = ledger.change("C", "opsd_1_entry")
    assert change is not None and change.high < 0


def test_choices_put_what_gains_from_nothing_last() -> None:
    ranked = choices(Ledger(fixture_ledger()))
    assert [(each.beta, each.mode) for each in ranked] == [("0.5", "entry"), ("1", "entry"), ("0", "entry")]
    assert ranked[0].unexplained == 0 and ranked[1].unexplained is None
    assert ranked[2].unexplained is not None and ranked[2].unexplained > 0
    assert [each.shuffled for each in ranked] == [None, None, 30.0]
    assert seed_range(ranked) == pytest.approx(40)


def test_level_settings_are_told_apart_by_other_problems_references() -> None:
    """The better one wins only by more than the margin; what gains from nothing, or is not known, never.

    Within a small enough margin only the best is left.
    """
    records = [record("C", "sft_own", 0.9, start=0.5)]
    for name, own, none, shuffled in (
        ("0.5_entry", 0.85, 0.5, 0.8),
        ("0.5_rescale", 0.875, 0.5, 0.3),
        ("1_entry", 0.8, 0.5, 0.9),
        ("0_entry", 1.0, 0.9, 0.95),
        ("0_none", 0.9, None, 0.95),
    ):
        records += [record("C", f"opsd_{name}", own), record("C", f"control_shuffled_{name}", shuffled)]
        records += [record("C", f"control_none_{name}", 0.5)]
        records += [] if none is None else [record("C", f"control_rounded_{name}", none)]
    ranked = choices(Ledger(records))
    assert [(each.beta, each.mode) for each in level(ranked)] == [("0.5", "entry"), ("0.5", "rescale")]
    assert [(each.beta, each.mode) for each in level(ranked, 2)] == [("0.5", "rescale")]


@pytest.mark.parametrize(
    ("by_tau", "best"),
    [
        ({"C": {"0.25": 0.9, "0.01": 0.5}}, "0.05"),  # hardly better
        ({"C": {"0.25": 1.0, "0.01": 0.5}}, "0.25"),
        ({"C": {"0.25": 1.0, "0.01": 0.9}, "B": {"0.25": 0.3, "0.01": 0.85}}, "0.05"),  # better and worse
        ({"C": {"0.25": 1.0}, "B": {}}, "0.05"),  # not in on every base
    ],
)
def test_tau_stays_unless_another_is_better(by_tau: dict[str, dict[str, float]], best: str) -> None:
    records = []
    for base, accuracies in by_tau.items():
        records += [record(base, "opsd_0.5_entry", 0.85)]
        records += [record(base, f"tau_0.5_entry_{tau}", accuracy) for tau, accuracy in accuracies.items()]
    ledger = Ledger(records)
    assert seed_range(choices(ledger)) == 0
    assert best_tau(taus(ledger, choices(ledger)[0])) == best


def test_the_shipped_defaults_are_those_of_the_committed_ledger() -> None:
    ledger = Ledger(read_ledger(bases.ROOT / "docs" / "results" / "ledger.jsonl"))
    if ledger.bases != list(bases.BASES):
        pytest.skip("not all bases are in")
    chosen = level(choices(ledger))[0]
    shipped = ObjectiveConfig()
    assert (shipped.beta, shipped.clip_mode) == (float(chosen.beta), chosen.mode)
    assert shipped.clip == float(best_tau(taus(ledger, chosen)))


def test_the_report_says_what_came_out(tmp_path: Path) -> None:
    write_report(fixture_ledger(), tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "**not complete**" in text and "C 11 of " in text and "B 0 of " in text
    assert re.search(r"\| base model, after its warm-start \| 2 \| 50\.0 \(", text)
    assert re.search(r"\| OPSD, beta 0, entry, tau 0.05 \| 2 \| 80\.0 \(.*\) \| 60\.0, 100\.0 \| \+", text)
    assert re.search(r"\| C \| 0 \| entry \| \*\*80\.0 .*\*\* \| 50\.0 .* \| \*\*80\.0 .*\*\* \| \*30\.0 .*\* \|", text)
    gained = "no reference, rounded teacher, beta 0, entry, tau 0.05 on C (50.0, 80.0, 80.0, 80.0)."
    assert f"with the accuracies from the base model on: {gained}" in text
    assert "worse than the base model: beta 1, entry, tau 0.05 on C (50.0 to 10.0)." in text
    for name in re.findall(r"\]\((images/[^)]+)\)", text):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "unknown arm" not in text


def test_an_empty_ledger_has_a_report(tmp_path: Path) -> None:
    write_report([], tmp_path)
    assert "**not complete**" in (tmp_path / "results.md").read_text()


def test_the_committed_report_is_of_the_committed_ledger() -> None:
    docs = bases.ROOT / "docs"
    text = page(read_ledger(docs / "results" / "ledger.jsonl"))
    assert text == (docs / "results.md").read_text(), "python -m examples.ledger report writes it"


def test_intervals_are_those_of_the_bootstrap() -> None:
    scores = np.repeat([0.0, 1 / 3, 1.0], [100, 200, 212])
    ours, theirs = interval(scores), bootstrap_interval(scores, seed=0)
    assert abs(ours.low - theirs.low) < 2e-3 and abs(ours.high - theirs.high) < 2e-3
    assert interval(np.ones(40)) == Interval(1.0, 1.0)
