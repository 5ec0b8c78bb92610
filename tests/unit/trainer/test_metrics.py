from __future__ import annotations

import io
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from opsd_megatron.models.qwen3 import Qwen3Spec
from opsd_megatron.telemetry.metrics import MetricsWriter
from opsd_megatron.telemetry.progress import Progress
from opsd_megatron.telemetry.timers import PhaseTimer
from opsd_megatron.trainer.flops import StepFlops
from opsd_megatron.trainer.metrics import StepReporter
from opsd_megatron.trainer.step import StepResult
from opsd_megatron.types import AlignedSample, Generation, Problem, Rollout

SAMPLE = AlignedSample((1, 2), (1, 2, 3), (4, 5), engine_log_probs=(-0.5, -0.25))
ROLLOUT = Rollout(Problem("a:1", "p"), (1, 2), Generation((4, 5), (-0.5, -0.25), "length"), policy_version=3)

SPEC = Qwen3Spec(
    num_layers=2,
    hidden_size=8,
    ffn_size=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    vocab_size=32,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    tied=True,
    max_positions=64,
)
FLOPS = StepFlops(SPEC, SPEC, adapters=False, world_size=2, peak_tflops=4.0)


@pytest.fixture
def shown() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def reporter(tmp_path: Path, shown: io.StringIO) -> StepReporter:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    return StepReporter(tmp_path, writer, Progress(9, stream=shown), save_rollouts=True, flops=FLOPS)


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def report(reporter: StepReporter, step: int, loss: float, divergence: float) -> None:
    timer = PhaseTimer()
    with timer("student"):
        pass
    if step == 4:
        with timer("sync"):
            pass
        timer.moved("sync", 3_000_000)
        timer.moved("sync", 1_000_000)
    result = StepResult({"loss": loss, "divergence": divergence}, grad_norm=1.5, lr=0.1, rows=2)
    reporter.step(step, result, [SAMPLE], [ROLLOUT], None, timer, 0.75, {"host_peak_gib": 0.5})


def test_a_step_is_one_line(reporter: StepReporter, tmp_path: Path, shown: io.StringIO) -> None:
    report(reporter, 4, loss=0.25, divergence=0.5)
    (line,) = lines(tmp_path)
    expected = {"step": 4, "loss": 0.25, "divergence": 0.5, "grad_norm": 1.5, "lr": 0.1, "tokens": 2}
    assert expected.items() <= line.items()
    # Two prompt and two response tokens of the student, three and two of the teacher.
    assert line["packed_tokens"] == 9
    assert line["packing_efficiency"] == 0.75
    assert line["response_tokens_mean"] == 2.0
    assert line["truncated"] == 1.0 and line["policy_version"] == 3
    assert line["sampled_tokens"] == len(ROLLOUT.generation.token_ids)
    assert line["alarm"] is None
    assert line["host_peak_gib"] == 0.5
    assert line["step_seconds"] >= sum(line["seconds"].values())
    assert abs(datetime.now(UTC) - datetime.fromisoformat(line["time"])) < timedelta(minutes=1)
    assert line["model_tflops_per_gpu"] == FLOPS.of([SAMPLE]) / line["seconds"]["student"] / 2 / 1e12
    assert line["mfu"] == line["model_tflops_per_gpu"] / 4.0
    assert line["sync_gb"] == 0.004
    assert line["sync_gb_per_second"] == 0.004 / line["seconds"]["sync"]
    assert "loss 0.25 div 0.5 |g| 1.5" in shown.getvalue()


def test_a_step_without_samples_has_no_loss(reporter: StepReporter, tmp_path: Path) -> None:
    timer = PhaseTimer()
    with timer("rollout"):
        pass
    reporter.step(4, StepResult({"taught": 0.0}, 0.0, 0.1, rows=0), [], [ROLLOUT], None, timer, 0.0, {})
    (line,) = lines(tmp_path)
    assert line["taught"] == line["grad_norm"] == line["tokens"] == 0 and line["alarm"] is None
    assert line["sampled_tokens"] == len(ROLLOUT.generation.token_ids) > 0
    assert not {"loss", "divergence", "packing_efficiency", "response_tokens_mean", "mfu"} & line.keys()


def test_a_negative_loss_alarms_only_while_the_divergence_does_not_fall(
    reporter: StepReporter, tmp_path: Path, shown: io.StringIO
) -> None:
    report(reporter, 1, loss=0.2, divergence=0.5)
    report(reporter, 2, loss=-0.2, divergence=0.4)
    report(reporter, 3, loss=-0.2, divergence=0.6)
    assert [line["alarm"] is None for line in lines(tmp_path)] == [True, True, False]
    assert not any("sync_gb" in line for line in lines(tmp_path))
    assert "step 3: the loss is negative" in shown.getvalue()


def test_rollouts_are_kept(reporter: StepReporter, tmp_path: Path) -> None:
    reporter.rollouts(7, [ROLLOUT])
    (line,) = (tmp_path / "rollouts/step_7.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "problem_id": "a:1",
        "policy_version": 3,
        "prompt_ids": [1, 2],
        "token_ids": [4, 5],
        "log_probs": [-0.5, -0.25],
        "finish_reason": "length",
    }


def test_an_analysis_is_kept_with_its_rollout(reporter: StepReporter, tmp_path: Path) -> None:
    reporter.rollouts(7, [ROLLOUT, replace(ROLLOUT, analysis=Generation((6, 7), (0.0, 0.0), "stop"))])
    plain, analysed = map(json.loads, (tmp_path / "rollouts/step_7.jsonl").read_text().splitlines())
    assert analysed == {**plain, "analysis_ids": [6, 7]} != plain


def test_other_ranks_report_nothing(tmp_path: Path) -> None:
    silent = StepReporter(tmp_path, writer=None, progress=None, save_rollouts=True)
    report(silent, 1, loss=1.0, divergence=1.0)
    silent.rollouts(1, [ROLLOUT])
    silent.evaluation(0, {}, PhaseTimer())
    silent.close()
    assert not list(tmp_path.iterdir())
