"""Whole steps of the policy objectives where a problem's rollouts lie on several ranks, against dense float64 ones.

Responses are scripted. What the trainer does with them is all there: verdicts, groups, shares of several updates,
plans, packing, both passes, the optimizer. The expected weights come from transformers and torch.optim.Adam, one
response after the other, by formulas written out here.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from opsd_megatron.data.teacher_prompts import TeacherPrompts
from opsd_megatron.types import Generation, Problem, Rollout
from tests.distributed import run_distributed
from tests.functional.test_privileged import _tokens as token_ids
from tests.functional.test_privileged import prompt_builder
from tests.tiny import make_tiny_qwen3
from tests.unit.losses.reference import Case, dense_divergence

NAMES = ("one", "number two", "the third")
GROUP = 4
TEMPERATURE, CAP, LOW, HIGH, WEIGHT, CLIP = 0.9, 1.1, 0.02, 0.03, 0.5, 0.01
LR, EPS = 2e-3, 1e-4
MESHES: dict[str, dict[str, object]] = {
    "dp": {},
    "cp": {"parallel__context": 2},
    "tp": {"parallel__tensor": 2, "parallel__sequence": True},
}
# With three groups and two updates the second group is parted between the updates.
ARMS: dict[str, dict[str, object]] = {
    "grpo": {
        "train__updates_per_step": 2,
        "objective__reduction": "sequence",
        "objective__ratio_clip_low": LOW,
        "objective__ratio_clip_high": HIGH,
    },
    "opsd_grpo": {"objective__beta": 0.5, "objective__clip": CLIP, "objective__grpo_weight": WEIGHT},
}


@dataclass
class Update:
    """What one update came to."""

    grad_norm: float
    metrics: Mapping[str, float]
    weights: dict[str, Tensor] = field(default_factory=dict)
    responses: list[list[int]] = field(default_factory=list)  # of this rank: a list for each micro-batch


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("files")
    (directory / "student.txt").write_text("{problem}.")
    (directory / "teacher.txt").write_text("{problem}. Known: {reference}.")
    rows = [{"problem": name, "answer": "1", "solution": f"\\boxed{{1}}{name}"} for name in NAMES]
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {f"data__{role}_template": directory / f"{role}.txt" for role in ("student", "teacher")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3(tmp_path_factory.mktemp("model") / "model", num_layers=2)


@pytest.fixture(scope="module")
def script(model: Path, files: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Right and wrong responses of many lengths; the engine's log-probs are off by up to a fifth."""
    dense, builder = _dense(model), prompt_builder(model, files)
    generator = torch.Generator().manual_seed(3)
    path = tmp_path_factory.mktemp("script") / "script.jsonl"
    with path.open("w") as file:
        for name in NAMES:
            prompt = builder.student(Problem(name, name))
            for number in range(12):
                letters = bytes(torch.randint(97, 123, (1 + 5 * number % 23,), generator=generator).tolist()).decode()
                tokens = token_ids(model, f"{letters} \\boxed{{{1 + number % 2}}}")
                with torch.no_grad():
                    exact = _log_softmax(dense, prompt, tokens).gather(1, torch.tensor(tokens)[:, None])[:, 0]
                noise = torch.rand(len(tokens), generator=generator) * 0.4 - 0.2
                row = {"prompt_ids": prompt, "token_ids": tokens, "log_probs": (exact + noise).tolist()}
                file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def root(model: Path, files: dict[str, Any], script: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def found(model: Path, files: dict[str, Any], script: Path, root: Path) -> dict[tuple[str, str], list[list[Update]]]:
    """By arm and mesh, for each rank the updates of its step."""
    shared: dict[str, object] = {
        "model__path": model,
        "model__dtype": "float32",
        "model__max_length": 256,
        "data__train": files["data__student_template"].with_name("train.jsonl"),
        "rollout__engine": "scripted",
        "rollout__script": script,
        "rollout__samples_per_problem": GROUP,
        "rollout__temperature": TEMPERATURE,
        "rollout__max_new_tokens": 64,
        "rollout__max_log_prob_gap": None,
        "objective__importance_cap": CAP,
        "objective__chunk_rows": 16,
        "optimizer__lr": LR,
        "optimizer__eps": EPS,
        "train__steps": 1,
        "train__problems_per_step": len(NAMES),
        "train__tokens_per_micro_batch": 150,
        **files,
    }
    runs = {}
    for arm, settings in ARMS.items():
        for mesh, sizes in MESHES.items():
            keys = {**shared, **settings, **sizes, "output_dir": root / arm / mesh}
            values = {key.replace("__", "."): "null" if value is None else value for key, value in keys.items()}
            runs[arm, mesh] = [f"objective={arm}", *(f"{key}={value}" for key, value in values.items())]
    by_rank = run_distributed(_steps, 2, runs)
    return {key: [own[key] for own in by_rank] for key in runs}


def _steps(runs: Mapping[Any, list[str]]) -> dict[Any, list[Update]]:
    """The worker: one step of each run."""
    found = {}
    for key, overrides in runs.items():
        found[key] = _step(overrides)
        gc.collect()
    return found


def _step(overrides: list[str]) -> list[Update]:
    from opsd_megatron.config.compose import compose_config
    from opsd_megatron.models.export import export_hf_weights
    from opsd_megatron.telemetry.timers import PhaseTimer
    from opsd_megatron.trainer import trainer as module
    from opsd_megatron.trainer.setup import build_trainer, check_inputs

    config = compose_config(overrides)
    config.validate(2)
    trainer = build_trainer(config, check_inputs(config))
    updates: list[Update] = []
    step = module.optimizer_step

    def watched(trainable: Any, objective: Any, batches: Any, targets: Any, dims: Any, **more: Any) -> Any:
        result = step(trainable, objective, batches, targets, dims, **more)
        weights = {name: one.clone() for name, one in export_hf_weights(trainable.modules, trainer.spec, dims)}
        responses = [batch.response_ids.tolist() for batch in batches]
        updates.append(Update(result.grad_norm, result.metrics, weights, responses))
        return result

    with mock.patch.object(module, "optimizer_step", watched):
        trainer._step(PhaseTimer())
    trainer.reporter.close()
    trainer.dims.destroy()
    return updates


@pytest.fixture(scope="module")
def rollouts(found: object, root: Path) -> list[Rollout]:
    """What every run has drawn: responses and verdicts as its file has them."""
    files = sorted(root.glob("*/*/rollouts/step_1.jsonl"))
    assert len(files) == len(ARMS) * len(MESHES) and len({file.read_text() for file in files}) == 1
    drawn = []
    for line in map(json.loads, files[0].read_text().splitlines()):
        name = NAMES[int(line["problem_id"].rpartition(":")[2]) - 1]
        problem = Problem(name, name, solution=f"\\boxed{{1}}{name}", answer="1")
        generation = Generation(tuple(line["token_ids"]), tuple(line["log_probs"]), "stop")
        drawn.append(Rollout(problem, tuple(line["prompt_ids"]), generation, 0, correct=line["correct"]))
    groups = [drawn[first : first + GROUP] for first in range(0, len(drawn), GROUP)]
    assert [len({one.problem.id for one in group}) for group in groups] == [1, 1, 1]
    assert all(0 < sum(bool(one.correct) for one in group) < GROUP for group in groups)
    return drawn


@pytest.fixture(scope="module")
def expected(model: Path, files: dict[str, Any], rollouts: list[Rollout]) -> dict[str, list[Update]]:
    """Every arm's updates, densely."""
    advantages = []
    for first in range(0, len(rollouts), GROUP):
        rewards = torch.tensor([float(bool(one.correct)) for one in rollouts[first : first + GROUP]]).double()
        advantages += ((rewards - rewards.mean()) / rewards.std()).tolist()
    builder = prompt_builder(model, files)
    shown = TeacherPrompts.build(builder, [Problem(n, n, solution=f"\\boxed{{1}}{n}") for n in NAMES], seed=0)
    teacher = _dense(model)
    with torch.no_grad():
        taught = [
            _log_softmax(teacher, ids or (), one.generation.token_ids)
            for one, ids in zip(rollouts, shown.prompts(rollouts), strict=True)
        ]
        old = [_sampled(_log_softmax(teacher, one.prompt_ids, one.generation.token_ids), one) for one in rollouts]
    parts = {"grpo": (range(6), range(6, 12)), "opsd_grpo": (range(12),)}
    return {arm: list(_updates(_dense(model), arm, parts[arm], rollouts, advantages, taught, old)) for arm in ARMS}


def _updates(
    model: Any,
    arm: str,
    parts: Sequence[Sequence[int]],
    rollouts: Sequence[Rollout],
    advantages: Sequence[float],
    taught: Sequence[Tensor],
    old: Sequence[Tensor],
) -> Iterator[Update]:
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, eps=EPS)
    for part in parts:
        rows = [len(old[place]) for place in part]
        loss, figures = torch.zeros((), dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
        for place in part:
            one, advantage = rollouts[place], advantages[place]
            s = _log_softmax(model, one.prompt_ids, one.generation.token_ids)
            log_prob = _sampled(s, one)
            ratio = (log_prob - old[place]).exp()
            bounded = ratio.clamp(1 - LOW, 1 + HIGH) if arm == "grpo" else ratio.clamp(0.8, 1.2)
            weights = (old[place] - torch.tensor(one.generation.log_probs).double()).exp().clamp(max=CAP)
            policy = -torch.minimum(ratio * advantage, bounded * advantage)
            if arm == "grpo":
                # Each response's mean, and the mean over responses.
                loss = loss + (weights * policy).mean() / len(part)
            else:
                divergence = dense_divergence(s, taught[place], Case(0.5, 1.0, CLIP))
                loss = loss + (weights * (divergence + WEIGHT * policy)).sum() / sum(rows)
            outside = (policy != -ratio * advantage).double()
            figures += torch.stack(
                [
                    outside.sum(),
                    (ratio - 1 - ratio.log()).sum(),
                    weights.sum(),
                    (weights * WEIGHT * policy).sum(),
                ]
            ).detach()
            # Nothing may be so near a bound that float32 could see it on the other side.
            assert min((ratio.detach() - bound).abs().min() for bound in (1 - LOW, 1 + HIGH)) > 1e-6
        optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        names = ("ratio_clipped", "policy_kl", "importance_mean", "policy_loss")
        metrics = {"loss": loss.item(), **dict(zip(names, (figures / sum(rows)).tolist(), strict=True))}
        yield Update(norm, metrics, {name: one.detach().clone() for name, one in model.named_parameters()})


def _dense(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")


def _log_softmax(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Log-probabilities at the response's places, ``[R, V]``."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return (logits / TEMPERATURE).log_softmax(1)


def _sampled(log_probs: Tensor, rollout: Rollout) -> Tensor:
    return log_probs.gather(1, torch.tensor(rollout.generation.token_ids)[:, None])[:, 0]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("arm", ARMS)
def test_steps_are_the_dense_ones(
    arm: str,
    mesh: str,
    found: dict[tuple[str, str], list[list[Update]]],
    expected: dict[str, list[Update]],
    model: Path,
) -> None:
    before = dict(_dense(model).named_parameters())
    for rank, updates in enumerate(found[arm, mesh]):
        assert len(updates) == len(expected[arm])
        for number, (update, wanted) in enumerate(zip(updates, expected[arm], strict=True)):
            where = rank, number
            assert update.grad_norm == pytest.approx(wanted.grad_norm, rel=2e-5), where
            for name in set(wanted.metrics) & set(update.metrics):
                assert update.metrics[name] == pytest.approx(wanted.metrics[name], rel=2e-5, abs=1e-7), (where, name)
            assert update.weights.keys() == wanted.weights.keys()
            for name, weight in wanted.weights.items():
                moved = weight - before[name]
                error = float((update.weights[name].double() - weight).norm() / moved.norm())
                assert math.isfinite(error) and error < 1e-4, (where, name, error)


def test_the_clip_and_the_cap_act(expected: dict[str, list[Update]]) -> None:
    """Else the test above would say nothing of them."""
    first, second = expected["grpo"]
    assert first.metrics["ratio_clipped"] == 0.0
    assert 0.1 < second.metrics["ratio_clipped"] < 0.9
    assert 0.9 < first.metrics["importance_mean"] < 0.995


def test_groups_lie_on_both_ranks(found: dict[tuple[str, str], list[list[Update]]], rollouts: list[Rollout]) -> None:
    for arm, parts in (("grpo", ((0, 6), (6, 12))), ("opsd_grpo", ((0, 12),))):
        for number, (first, last) in enumerate(parts):
            held = [
                {
                    one.problem.id
                    for one in rollouts[first:last]
                    if any(_holds(batch, one.generation.token_ids) for batch in updates[number].responses)
                }
                for updates in found[arm, "dp"]
            ]
            assert held[0] & held[1]
        for updates in found[arm, "cp"]:
            assert all(any(map(len, update.responses)) for update in updates)


def _holds(ids: Sequence[int], part: Sequence[int]) -> bool:
    return any(tuple(ids[first : first + len(part)]) == tuple(part) for first in range(len(ids) - len(part) + 1))
