"""Every arm of the comparison, three steps on real engines at TP 2: what it samples, is judged by, and reports.

One torchrun job trains one after the other; ``opsd`` itself is in test_launch.py. That an arm's gradients are right is
shown in test_objectives_on_meshes.py; here the parts meet.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.functional.runs import SmallRun, make_small_run, read_metrics, torchrun

STEPS = 3
SHARED: dict[str, object] = {
    "parallel__tensor": 2,
    "parallel__sequence": True,
    "rollout__kv_cache_gib": 0.1,
    "rollout__temperature": 0.9,
    "train__problems_per_step": 3,
}
POLICY: dict[str, object] = {"rollout__samples_per_problem": 4, "optimizer__lr": 3e-3}
ARMS: dict[str, dict[str, object]] = {
    "sampled_token": {"objective__importance_cap": 2.0, "rollout__top_k": 20},
    "grpo": {**POLICY, "train__updates_per_step": 2},
    "opsd_grpo": {**POLICY, "objective__entropy_gate": 5.38, "objective__position_floor": 0.25},
    "sft": {},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return make_small_run(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def outputs(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("arms")
    runs = [
        [f"objective={arm}", *small.overrides(root / arm, steps=STEPS, scripted=False, **SHARED, **keys)]
        for arm, keys in ARMS.items()
    ]
    job = torchrun(["--standalone", "--nproc-per-node", "2"], __name__, [json.dumps(runs)])
    printed = job.communicate(timeout=600)[0]
    assert job.returncode == 0, printed
    return root


def _run_all(runs: Sequence[list[str]]) -> None:
    """A process of the job: a job for each arm would import vLLM as often; here the arms follow each other in one."""
    from megatron.core import parallel_state

    from opsd_megatron.evaluation.answers import Verdict, judge_answers
    from opsd_megatron.train import run

    def judge(responses: Sequence[str], answers: Sequence[str], *, seconds: float) -> list[Verdict]:
        # A random model answers nothing: every second response counts as right after all have been judged.
        verdicts = judge_answers(responses, answers, seconds=seconds)
        return [replace(one, correct=number % 2 == 0) for number, one in enumerate(verdicts)]

    with mock.patch("opsd_megatron.trainer.verdicts.judge_answers", judge):
        for arguments in runs:
            run(arguments)
            parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("arm", ARMS)
def test_three_steps(arm: str, outputs: Path) -> None:
    lines = read_metrics(outputs / arm)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["grad_norm"] > 0
        assert line["alarm"] is None
        if arm != "sft":
            assert line["policy_version"] == line["step"] - 1
            assert 0 < line["student_log_prob"] * -1 < 20


def test_policy_arms_are_judged_and_clip(outputs: Path) -> None:
    for arm in ("grpo", "opsd_grpo"):
        for line in read_metrics(outputs / arm):
            assert line["reward_mean"] == 0.5 and line["groups_alike"] == line["unparsable"] == 0.0
            # The distribution sampled from, at temperature 0.9 without truncation, is the trainer's but for rounding.
            assert 0 < line["log_prob_gap"] < 1e-4
            assert line["importance_mean"] == pytest.approx(1.0, abs=1e-4)
            # The second update of a step finds other weights than those that sampled.
            assert line["policy_kl"] > 0 if arm == "grpo" else "policy_kl" not in line
        correct = [row["correct"] for row in _rollouts(outputs / arm)]
        assert correct == [True, False] * 6


def test_truncated_sampling_shows_in_the_importance_weights(outputs: Path) -> None:
    """The engine renormalises over 20 candidates: its log-probs are higher than the trainer's over all entries.

    How much higher is the probability of all others, so there is nothing to hold against the bound on the gap.
    """
    for line in read_metrics(outputs / "sampled_token"):
        assert "log_prob_gap" not in line
        assert 0.05 < line["importance_mean"] < 0.99
        assert line["importance_capped"] == 0.0
        assert line["sampled_reverse_kl"] is not None


def test_both_losses_are_reported_beside_their_sum(outputs: Path) -> None:
    for line in read_metrics(outputs / "opsd_grpo"):
        assert {"divergence", "policy_loss", "teacher_log_prob"} <= line.keys()
        assert 0 < line["gate_kept"] < 1  # else the sum would be one of its parts


def _rollouts(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "rollouts/step_1.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    _run_all(json.loads(sys.argv[1]))
