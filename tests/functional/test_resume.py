"""A run that stops and resumes is the run that never stopped, bit for bit; and nothing of another run is touched."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from opsd_megatron.config.compose import compose_config
from opsd_megatron.errors import CheckpointError
from opsd_megatron.train import run
from opsd_megatron.trainer.setup import check_inputs
from tests.distributed import run_distributed
from tests.functional.runs import SmallRun, make_small_run, read_metrics

# What a line holds beyond the trajectory: wall time and memory differ from run to run.
VARYING = {
    *("time", "step_seconds", "seconds", "packed_tokens_per_second", "model_tflops_per_gpu", "sync_gb_per_second"),
    "host_peak_gib",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return make_small_run(tmp_path_factory.mktemp("small"))


def trajectory(output: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in VARYING} for line in read_metrics(output)]


@pytest.mark.parametrize(
    ("world_size", "keys"),
    [
        (2, {"parallel__tensor": 2}),
        (2, {"parallel__distributed_optimizer": True, "optimizer__schedule": "cosine", "optimizer__decay_steps": 6}),
        (1, {"parallel__distributed_optimizer": False}),
        (2, {"lora__rank": 3, "teacher__policy": "adapter_off", "optimizer__lr": 1e-2}),
    ],
    ids=["tp2", "dp2-distributed-optimizer", "plain-optimizer", "adapters"],
)
def test_resume_equals_uninterrupted(small: SmallRun, tmp_path: Path, world_size: int, keys: dict[str, object]) -> None:
    saved: dict[str, object] = {"checkpoint__every": 2, "checkpoint__at_end": True, **keys}
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run_distributed(run, world_size, small.overrides(whole, steps=5, **saved))
    run_distributed(run, world_size, small.overrides(parted, steps=3, **saved))
    # The newest checkpoint (step 3) is lost, as after a kill in mid-save: the run goes back to step 2 and redoes 3.
    shutil.rmtree(parted / "checkpoints/step_3")
    run_distributed(run, world_size, small.overrides(parted, steps=5, checkpoint__resume=True, **saved))
    assert trajectory(parted) == trajectory(whole)
    assert weights(parted / "checkpoints/step_5") == weights(whole / "checkpoints/step_5")


def weights(checkpoint: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint as bytes, through the conversion tool's own path."""
    return run_distributed(_export, 1, checkpoint)[0]


def _export(checkpoint: Path) -> dict[str, bytes]:
    from opsd_megatron.checkpoint.state import load_model_weights
    from opsd_megatron.config import Config
    from opsd_megatron.distributed.parallel import ParallelDims
    from opsd_megatron.distributed.seed import seed_everything
    from opsd_megatron.models.build import build_model
    from opsd_megatron.models.export import export_hf_weights
    from opsd_megatron.models.families import read_spec

    config = Config()
    config.model.dtype = "float32"
    dims = ParallelDims.initialize(config.parallel)
    seed_everything(0, dims)
    spec = read_spec(checkpoint / "hf")
    model = build_model(spec, config, dims)
    load_model_weights(checkpoint, model)
    return {name: tensor.numpy().tobytes() for name, tensor in export_hf_weights(model, spec, dims)}


def test_resume_on_another_mesh_continues_the_run(small: SmallRun, tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    saved: dict[str, object] = {"checkpoint__every": 2}
    run_distributed(run, 1, small.overrides(whole, steps=4, **saved))
    run_distributed(run, 1, small.overrides(parted, steps=2, **saved))
    moved = {"parallel__tensor": 2, "checkpoint__resume": True, **saved}
    run_distributed(run, 2, small.overrides(parted, steps=4, **moved))
    for line, expected in zip(read_metrics(parted), read_metrics(whole), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_another_runs_checkpoints_are_refused_and_untouched(small: SmallRun, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run_distributed(run, 1, small.overrides(output, steps=1, checkpoint__at_end=True))
    before = _contents(output)
    for overrides, message in (
        (small.overrides(output, steps=2), "checkpoint.resume"),
        (small.overrides(output, steps=2, checkpoint__resume=True, objective__beta=0.0), "objective.beta"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_inputs(compose_config(overrides))
    assert _contents(output) == before


def _contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_checkpoint_starts_another_run(small: SmallRun, tmp_path: Path) -> None:
    """``model.checkpoint`` replaces the safetensors; the first step then differs from one from the original weights."""
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    run_distributed(run, 1, small.overrides(first, steps=2, checkpoint__at_end=True))
    checkpoint = first / "checkpoints/step_2"
    run_distributed(run, 2, small.overrides(second, steps=1, parallel__tensor=2, model__checkpoint=checkpoint))
    run_distributed(run, 1, small.overrides(third, steps=1, model__checkpoint=checkpoint))
    original, from_tp2, from_tp1 = (read_metrics(path)[0] for path in (first, second, third))
    assert from_tp2["loss"] == pytest.approx(from_tp1["loss"], rel=1e-4)
    assert from_tp1["loss"] != pytest.approx(original["loss"], rel=1e-3)
