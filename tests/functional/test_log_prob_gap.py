"""An engine that does not hold the trainer's weights ends the run before any harm, even in a step without updates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opsd_megatron.config.compose import compose_config
from opsd_megatron.errors import EngineError
from tests.distributed import run_distributed
from tests.functional.runs import make_small_run, read_metrics


def train_and_expect(runs: list[list[str]], gap: float | None) -> None:
    """Train; with a ``gap``, expect each run to stop before its first update for that gap."""
    from megatron.core import parallel_state

    for overrides in runs:
        _train_and_expect(overrides, gap)
        parallel_state.destroy_model_parallel()


def _train_and_expect(overrides: list[str], gap: float | None) -> None:
    from opsd_megatron.models.export import export_hf_weights
    from opsd_megatron.trainer.setup import build_trainer, check_inputs

    config = compose_config(overrides)
    trainer = build_trainer(config, check_inputs(config))

    def weights() -> dict[str, torch.Tensor]:
        exported = export_hf_weights(trainer.trainable.modules, trainer.spec, trainer.dims)
        return {name: tensor.clone() for name, tensor in exported}

    before = weights()
    if gap is None:
        trainer.run()
    else:
        with pytest.raises(EngineError, match=rf"step 1: .* by {gap:.2g}\d* on average.*weights are those of step 0"):
            trainer.run()
    after = weights()
    changed = any(not torch.equal(after[name], before[name]) for name in before)
    assert changed == (gap is None)


def test_run_stops_before_the_update(tmp_path: Path) -> None:
    small = make_small_run(tmp_path)
    claimed = tmp_path / "claimed.jsonl"  # an engine that is certain of every token
    with claimed.open("w") as file:
        for line in small.script.read_text().splitlines():
            row = json.loads(line)
            file.write(json.dumps({**row, "log_probs": [0.0] * len(row["token_ids"])}) + "\n")
    confident = replace(small, script=claimed)

    twice: dict[str, object] = {"rollout__samples_per_problem": 2}
    unbounded = confident.overrides(
        tmp_path / "logged", steps=1, rollout__max_log_prob_gap=None, parallel__tensor=2, **twice
    )
    run_distributed(train_and_expect, 2, [unbounded], None)
    (line,) = read_metrics(tmp_path / "logged")
    assert line["log_prob_gap_max"] >= line["log_prob_gap"] > 0.5
    # The engine is certain of every token: the estimator of KL(engine || trainer) is p - 1 - log p of the trainer's p.
    assert 0 < line["log_prob_kl"] < line["log_prob_gap"] == pytest.approx(-line["student_log_prob"], rel=1e-4)

    # No answer is right, so that grpo has nothing to learn from, and no update whose pass would show the gap.
    meshes: dict[str, dict[str, object]] = {
        "opsd": {"parallel__tensor": 2},
        "grpo": {"parallel__tensor": 2, "parallel__sequence": True},
        "grpo_stages": {"parallel__pipeline": 2},
        "grpo_shares": {},
    }
    bounded = [
        [f"objective={name.partition('_')[0]}", *confident.overrides(tmp_path / name, steps=1, **twice, **mesh)]
        for name, mesh in meshes.items()
    ]
    run_distributed(train_and_expect, 2, bounded, line["log_prob_gap"])
    assert all(read_metrics(tmp_path / name) == [] for name in meshes)
