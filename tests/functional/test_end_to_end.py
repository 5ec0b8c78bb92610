"""The whole loop on real engines: co-located vLLM samples, Megatron-Core trains at TP 2, weights go back every step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from opsd_megatron.errors import EngineError
from opsd_megatron.train import run
from tests.distributed import run_distributed
from tests.functional.runs import SmallRun, make_small_run, read_metrics

STEPS = 3
# Engine and trainer compute the same log-probs in float32 with different kernels.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return make_small_run(tmp_path_factory.mktemp("small"))


def overrides(small: SmallRun, output: Path, **keys: object) -> list[str]:
    held_out = small.data.with_name("eval.jsonl")
    held_out.write_text("".join(small.data.read_text().splitlines(keepends=True)[:4]))
    settings: dict[str, object] = {
        "parallel__tensor": 2,
        "parallel__sequence": True,
        "rollout__kv_cache_gib": 0.1,
        "rollout__max_log_prob_gap": ROUNDING,
        "rollout__temperature": 0.9,
        "data__eval": held_out,
        "evaluation__samples_per_problem": 2,
        "checkpoint__every": 2,
        **keys,
    }
    return small.overrides(output, steps=STEPS, scripted=False, **settings)


@pytest.fixture(scope="module")
def finished(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    run_distributed(run, 2, overrides(small, output))
    return output


def test_steps_sample_train_and_synchronise(finished: Path) -> None:
    before, *lines = read_metrics(finished)
    assert before["step"] == 0 and before["eval"]["num_problems"] == 4
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["grad_norm"] > 0
        # Steps 2 and 3 sampled with weights that only a synchronisation can have brought.
        assert line["policy_version"] == line["step"] - 1
        assert 0 < line["log_prob_gap_max"] < ROUNDING
        assert {"rollout", "teacher", "student", "optimizer"} <= line["seconds"].keys()
        assert ("sync_gb_per_second" in line) == ("sync" in line["seconds"])
    # The last step synchronises twice: before its rollouts and before the evaluation after it.
    assert 2 * lines[1]["sync_gb"] == lines[2]["sync_gb"] == 2 * before["sync_gb"] > 0
    # The first step too, though the evaluation before it has brought the same weights: on CPU the engine then slept.
    assert all("sync" in line["seconds"] for line in (before, *lines))
    assert lines[-1]["eval"]["samples_per_problem"] == 2


def test_what_a_run_leaves(finished: Path) -> None:
    rollouts = [json.loads(line) for line in (finished / "rollouts/step_1.jsonl").read_text().splitlines()]
    assert len(rollouts) == 6
    assert all(len(rollout["token_ids"]) == len(rollout["log_probs"]) <= 24 for rollout in rollouts)
    assert len((finished / "evaluations/step_0.jsonl").read_text().splitlines()) == 4
    assert (finished / "config.yaml").is_file()
    assert (finished / "checkpoints/step_2").is_dir()


def test_resumed_run_samples_from_the_resumed_weights(small: SmallRun, finished: Path, tmp_path: Path) -> None:
    """The third step, redone from the second's checkpoint, is the third step: rollouts, loss and gradient norm."""
    output = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(output / "checkpoints/step_3", ignore_errors=True)
    (output / "rollouts/step_3.jsonl").unlink()
    run_distributed(run, 2, overrides(small, output, checkpoint__resume=True))
    assert (output / "rollouts/step_3.jsonl").read_text() == (finished / "rollouts/step_3.jsonl").read_text()
    assert _trajectory(read_metrics(output)[-1]) == _trajectory(read_metrics(finished)[-1])


def _trajectory(line: dict[str, Any]) -> dict[str, Any]:
    return {key: line[key] for key in ("step", "loss", "divergence", "grad_norm", "log_prob_gap", "eval")}


def test_engine_that_cannot_start_is_one_clear_error(small: SmallRun, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=EngineError.__name__) as raised:
        run_distributed(
            run,
            1,
            overrides(
                small, tmp_path / "run", parallel__tensor=1, parallel__sequence=False, rollout__kv_cache_gib=1e-6
            ),
        )
    assert "rollout.kv_cache_gib" in str(raised.value)
    assert not (tmp_path / "run").exists()
