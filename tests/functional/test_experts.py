"""Training a model with experts: the same trajectory wherever the experts lie.

Gradients of experts are summed over other ranks than those of other weights, and their norms too; a sum forgotten or
done twice shows in the gradient norm at once and in the losses a step later.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from opsd_megatron.train import run
from tests.distributed import run_distributed
from tests.functional.runs import SmallRun, make_small_run, read_metrics
from tests.tiny import make_tiny_qwen3_moe

STEPS = 4


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return make_small_run(tmp_path_factory.mktemp("small"), make_model=_mixed)


def _mixed(path: Path) -> Path:
    """The first two layers have no experts: at pp 2 a whole stage, which the plain optimizer takes."""
    return make_tiny_qwen3_moe(path, dense_layers=(0, 1))


def _train(small: SmallRun, output: Path, ranks: int, **keys: object) -> list[dict[str, float]]:
    overrides = small.overrides(output, steps=STEPS, checkpoint__at_end=True, **keys)
    run_distributed(run, ranks, overrides, timeout=240.0)
    return read_metrics(output)


def _final_state(output: Path) -> dict[str, torch.Tensor]:
    """Weights and, of the same kinds of optimizer, moments."""
    folder = output / "checkpoints" / f"step_{STEPS}"
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    checkpoint.load(state, checkpoint_id=folder, no_dist=True)
    return state


@pytest.fixture(scope="module")
def reference(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reference") / "run"
    _train(small, output, 1)
    return output


MESHES: dict[str, tuple[int, dict[str, object]]] = {
    "ep2": (2, {"parallel__expert": 2, "train__tokens_per_micro_batch": 200}),
    "tp2-etp1": (2, {"parallel__tensor": 2, "parallel__sequence": True, "parallel__expert_tensor": 1}),
    "tp2-ep2": (4, {"parallel__tensor": 2, "parallel__sequence": True, "parallel__expert": 2}),
    "pp2-ep2-plain-optimizer": (
        4,
        {
            "parallel__pipeline": 2,
            "parallel__expert": 2,
            "parallel__distributed_optimizer": False,
            "model__recompute": "full",
        },
    ),
}


@pytest.mark.parametrize("name", MESHES)
def test_mesh_invariance(name: str, small: SmallRun, reference: Path, tmp_path: Path) -> None:
    ranks, keys = MESHES[name]
    lines = _train(small, tmp_path / "run", ranks, **keys)
    for line, expected in zip(lines, read_metrics(reference), strict=True):
        assert line["tokens"] == expected["tokens"]
        assert expected["grad_norm"] > 0
        for key in ("loss", "divergence", "grad_norm"):
            assert line[key] == pytest.approx(expected[key], rel=1e-4), (line["step"], key)
    found, state = _final_state(tmp_path / "run"), _final_state(reference)
    compared = found.keys() & state.keys()
    assert {name for name in state if not name.startswith("optimizer.")} <= compared
    assert "plain" in name or state.keys() == found.keys()
    for key in compared:
        error = (found[key] - state[key]).norm()
        assert error <= 1e-4 * state[key].norm(), key


def test_experts_learn(small: SmallRun, reference: Path) -> None:
    from safetensors.torch import load_file

    before, after = load_file(small.model / "model.safetensors"), _final_state(reference)
    gate = "model.layers.2.mlp.gate.weight"
    assert not torch.equal(before[gate], after["decoder.layers.2.mlp.router.weight"])
    for expert, new in enumerate(after["decoder.layers.2.mlp.experts.experts.linear_fc2.weight"]):
        assert not torch.equal(before[f"model.layers.2.mlp.experts.{expert}.down_proj.weight"], new)
