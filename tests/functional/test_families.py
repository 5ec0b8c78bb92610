"""Training what differs from a plain dense model: experts and stretched rotary embeddings.

``test_meshes.py`` trains experts on more meshes; here are those that Megatron-Core alone would get wrong or refuse, and
a run whose engine samples from experts that the trainer has spread over two ranks.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from opsd_megatron.train import run
from tests.distributed import run_distributed
from tests.functional.runs import SmallRun, make_small_run, read_metrics
from tests.tiny import make_tiny_qwen3, make_tiny_qwen3_moe

STEPS = 4


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """The first two layers have no experts: at pp 2 a whole stage, which the plain optimizer takes."""
    return make_small_run(
        tmp_path_factory.mktemp("experts"), make_model=partial(make_tiny_qwen3_moe, dense_layers=(0, 1))
    )


def _train(small: SmallRun, output: Path, ranks: int, **keys: object) -> list[dict[str, Any]]:
    run_distributed(run, ranks, small.overrides(output, steps=STEPS, **keys))
    return read_metrics(output)


def _check_equal(lines: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for line, other in zip(lines, expected, strict=True):
        assert line["tokens"] == other["tokens"]
        assert other["grad_norm"] > 0
        for key in ("loss", "divergence", "grad_norm"):
            assert line[key] == pytest.approx(other[key], rel=1e-4), (line["step"], key)


def _weights(output: Path) -> dict[str, torch.Tensor]:
    """Those of the last checkpoint."""
    folder = output / "checkpoints" / f"step_{STEPS}"
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
    }
    checkpoint.load(state, checkpoint_id=folder, no_dist=True)
    return state


@pytest.fixture(scope="module")
def reference(experts: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reference") / "run"
    _train(experts, output, 1, checkpoint__at_end=True)
    return output


# Ranks and keys. Experts cut into fewer parts than the rest, each on both ranks: Megatron-Core takes the two copies for
# parts and forgets to sum their gradients.
MESHES: dict[str, tuple[int, dict[str, object]]] = {
    "tp2-sp-etp1": (2, {"tensor": 2, "sequence": True, "expert_tensor": 1}),
    "pp2-ep2-stage-without-experts": (4, {"pipeline": 2, "expert": 2, "distributed_optimizer": False}),
}


@pytest.mark.parametrize("name", MESHES)
def test_experts_train_alike(name: str, experts: SmallRun, reference: Path, tmp_path: Path) -> None:
    ranks, sizes = MESHES[name]
    keys = {f"parallel__{key}": value for key, value in sizes.items()}
    lines = _train(experts, tmp_path / "run", ranks, checkpoint__at_end=True, model__recompute="full", **keys)
    _check_equal(lines, read_metrics(reference))
    found, expected = _weights(tmp_path / "run"), _weights(reference)
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        assert (found[key] - weight).norm() <= 1e-4 * weight.norm(), key


def test_the_engine_samples_from_the_trainer_s_experts(experts: SmallRun, tmp_path: Path) -> None:
    """Steps and syncs in turn; a stale or misplaced expert would show as a gap between the two's log-probs."""
    keys: dict[str, object] = {"parallel__expert": 2, "rollout__tensor": 1, "rollout__kv_cache_gib": 0.05}
    lines = _train(experts, tmp_path / "run", 2, scripted=False, **keys)
    assert len(lines) == STEPS
    assert all(line["log_prob_gap_max"] < 1e-4 and line["grad_norm"] > 0 for line in lines)


def test_yarn_under_context_parallelism(tmp_path: Path) -> None:
    """Of sequences longer than the original 32 tokens."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    small = make_small_run(tmp_path / "small", make_model=partial(make_tiny_qwen3, rope=rope))
    one = _train(small, tmp_path / "one", 1)
    _check_equal(_train(small, tmp_path / "cp2", 2, parallel__context=2), one)
