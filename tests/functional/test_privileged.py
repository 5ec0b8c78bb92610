"""Own rollouts as the reference, and analyses ahead of the teacher's turn: through the whole loop, on two ranks.

The real engine needs a model whose answers are now right and now wrong: a tiny one that was taught to guess.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opsd_megatron.config import DataConfig
from opsd_megatron.config.compose import compose_config
from opsd_megatron.data.prompts import PromptBuilder
from opsd_megatron.data.teacher_prompts import TeacherPrompts
from opsd_megatron.train import run
from opsd_megatron.types import Generation, Problem, Rollout
from tests.distributed import run_distributed
from tests.functional.runs import SmallRun, read_metrics
from tests.tiny import make_tiny_qwen3

GUESSES = ("\\boxed{1}", "\\boxed{2}")
TEMPLATES = {
    "student": "{problem}.",
    "teacher": "{problem}. Known: {reference}.",
    "analysis": "{problem}. Why {reference}?",
    "after_analysis": "Now {problem}.",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Short templates, by their keys."""
    directory = tmp_path_factory.mktemp("templates")
    for name, text in TEMPLATES.items():
        (directory / f"{name}.txt").write_text(text)
    return {f"data__{name}_template": directory / f"{name}.txt" for name in TEMPLATES}


def write_problems(path: Path, names: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"problem": name, "answer": "1"}) + "\n" for name in names))
    return path


def prompt_builder(model: Path, keys: dict[str, object]) -> PromptBuilder:
    from transformers import AutoTokenizer

    config = DataConfig()
    for key, value in keys.items():
        setattr(config, key.removeprefix("data__"), str(value) if isinstance(value, Path) else value)
    return PromptBuilder(AutoTokenizer.from_pretrained(model), config, max_length=256, max_new_tokens=24)


def student_prompts(model: Path, files: dict[str, object], names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    builder = prompt_builder(model, files)
    return {name: builder.student(Problem(name, name)) for name in names}


# --- scripted: who is taught, and a step without anybody --------------------------------------------------------------


def test_a_step_with_nothing_to_teach_changes_nothing(files: dict[str, object], tmp_path: Path) -> None:
    """Neither weights nor the optimizer's moments, which an update by gradients of zero would use and decay."""
    model, names = make_tiny_qwen3(tmp_path / "model"), ["first", "hopeless", "second"]
    script = tmp_path / "script.jsonl"
    with script.open("w") as file:
        for name, prompt in student_prompts(model, files, names).items():
            for guess in GUESSES[1:] if name == "hopeless" else GUESSES:
                file.write(json.dumps({"prompt_ids": prompt, "token_ids": _tokens(model, guess)}) + "\n")
    small = SmallRun(
        model, write_problems(tmp_path / "t.jsonl", names), script, tmp_path / "unused", tmp_path / "unused"
    )
    keys = {"data__privileged": "siblings", "data__shuffle": False, "rollout__samples_per_problem": 8, **files}
    settings = small.overrides(tmp_path / "run", steps=3, train__problems_per_step=1, **keys)
    for steps in run_distributed(states_by_step, 2, settings):
        first, second, third = steps
        assert len(first) > 50
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert sum(not torch.equal(second[name], third[name]) for name in second) > 0.9 * len(second)
    lines = read_metrics(tmp_path / "run")
    assert [line["taught"] > 0 for line in lines] == [True, False, True]
    assert [line["groups_without_correct"] for line in lines] == [0, 1, 0]
    assert "loss" not in lines[1] and lines[1]["tokens"] == lines[1]["grad_norm"] == 0
    kept = [json.loads(line) for line in (tmp_path / "run/rollouts/step_2.jsonl").read_text().splitlines()]
    assert [one["correct"] for one in kept] == [False] * 8


def states_by_step(settings: list[str]) -> list[dict[str, Tensor]]:
    """Train as the overrides say; this rank's weights and moments after every step."""
    from opsd_megatron.telemetry.timers import PhaseTimer
    from opsd_megatron.trainer.setup import build_trainer, check_inputs

    config = compose_config(settings)
    config.validate(2)
    trainer = build_trainer(config, check_inputs(config))
    states = []
    for _ in range(config.train.steps):
        trainer._step(PhaseTimer())
        state = {f"weight {i}": p for i, p in enumerate(trainer.trainable.modules[0].parameters())}
        for number, values in enumerate(trainer.trainable.optimizer.optimizer.state.values()):
            state |= {f"{key} {number}": value for key, value in values.items() if key.startswith("exp_avg")}
        states.append({name: tensor.detach().clone() for name, tensor in state.items()})
    trainer.reporter.close()
    return states


def _tokens(model: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


# --- real engines -----------------------------------------------------------------------------------------------------

NAMES = ("one", "two", "three", "four", "five", "six")


@pytest.fixture(scope="module")
def guessing(files: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """A tiny model that answers every problem with either of two guesses, one of them right."""
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("guessing")
    path = make_tiny_qwen3(directory / "model", num_layers=2)
    prompts = student_prompts(path, files, NAMES)
    rows = [[*prompts[name], *_tokens(path, guess)] for name in NAMES for guess in GUESSES]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [256] * (longest - len(row)) for row in rows])
    labels = torch.full_like(ids, -100)
    for number, row in enumerate(rows):
        first = len(prompts[NAMES[number // 2]])
        labels[number, first : len(row)] = ids[number, first : len(row)]
    model = AutoModelForCausalLM.from_pretrained(path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(path)
    data = write_problems(directory / "train.jsonl", NAMES)
    return SmallRun(path, data, directory / "unused", directory / "unused", directory / "unused")


@pytest.fixture(scope="module")
def finished(guessing: SmallRun, files: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Siblings that are analysed before they teach: three steps, saved after the second."""
    output = tmp_path_factory.mktemp("finished") / "run"
    run_distributed(run, 2, overrides(guessing, files, output))
    return output


def overrides(guessing: SmallRun, files: dict[str, object], output: Path, **more: object) -> list[str]:
    keys: dict[str, object] = {
        "parallel__tensor": 2,
        "data__privileged": "siblings",
        "data__analyse_first": True,
        "data__analysis_max_tokens": 16,
        "rollout__samples_per_problem": 4,
        "rollout__kv_cache_gib": 0.1,
        "checkpoint__every": 2,
        **files,
    }
    return guessing.overrides(output, steps=3, scripted=False, **{**keys, **more})


def rollouts_of(output: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / f"rollouts/step_{step}.jsonl").read_text().splitlines()]


def test_correct_siblings_teach_failed_ones_through_an_analysis(finished: Path) -> None:
    for line in read_metrics(finished):
        rollouts = rollouts_of(finished, line["step"])
        failed = [one for one in rollouts if not one["correct"]]
        assert 0 < len(failed) < len(rollouts) == 24
        mixed = {one["problem_id"] for one in failed} & {one["problem_id"] for one in rollouts if one["correct"]}
        taught = [one for one in failed if one["problem_id"] in mixed]
        # An analysis for every rollout that is taught, and for no other: one for each sibling that is shown.
        assert [one for one in rollouts if "analysis_ids" in one] == taught
        assert all(0 < len(one["analysis_ids"]) <= 16 for one in taught)
        for name in mixed:
            assert len({tuple(one["analysis_ids"]) for one in taught if one["problem_id"] == name}) == 1
        assert line["taught"] == len(taught) / 24 and line["grad_norm"] > 0
        assert line["tokens"] == sum(len(one["token_ids"]) for one in taught)
        assert line["groups_without_correct"] + line["groups_without_failed"] == pytest.approx(1 - len(mixed) / 6)
        assert line["log_prob_gap_max"] < 1e-4 and line["divergence"] > 0


def test_the_records_tell_what_the_teacher_read(finished: Path, guessing: SmallRun, files: dict[str, object]) -> None:
    """From a step's rollouts alone come the same prompts, siblings and analyses included: by their length in tokens."""
    builder = prompt_builder(guessing.model, {**files, "data__privileged": "siblings", "data__analyse_first": True})
    problems = {f"{guessing.data.name}:{line}": Problem(name, name) for line, name in enumerate(NAMES, start=1)}
    teacher = TeacherPrompts.build(builder, list(problems.values()), seed=0)
    for line in read_metrics(finished):
        rollouts = [
            Rollout(
                problems[one["problem_id"]],
                tuple(one["prompt_ids"]),
                Generation(tuple(one["token_ids"]), tuple(one["log_probs"]), one["finish_reason"]),
                one["policy_version"],
                correct=one["correct"],
                analysis=Generation(tuple(one["analysis_ids"]), (), "stop") if "analysis_ids" in one else None,
            )
            for one in rollouts_of(finished, line["step"])
        ]
        pairs = [(one, ids) for one, ids in zip(rollouts, teacher.prompts(rollouts), strict=True) if ids is not None]
        packed = sum(len(one.prompt_ids) + len(ids) + 2 * len(one.generation.token_ids) for one, ids in pairs)
        assert line["packed_tokens"] == packed > 0


def test_a_resumed_run_writes_the_same_analyses(
    finished: Path, guessing: SmallRun, files: dict[str, object], tmp_path: Path
) -> None:
    output = shutil.copytree(finished, tmp_path / "run")
    (output / "rollouts/step_3.jsonl").unlink()
    run_distributed(run, 2, overrides(guessing, files, output, checkpoint__resume=True))
    assert rollouts_of(output, 3) == rollouts_of(finished, 3)
    before, after = (read_metrics(path)[-1] for path in (finished, output))
    keys = ("step", "loss", "divergence", "grad_norm", "taught", "analysis_tokens_mean")
    assert {key: before[key] for key in keys} == {key: after[key] for key in keys}
