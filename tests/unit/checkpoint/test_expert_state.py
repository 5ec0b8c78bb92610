"""Checkpoints of models with experts: saved wherever the experts lie, they load wherever else, bit for bit."""

from __future__ import annotations

from pathlib import Path

from tests.distributed import run_distributed
from tests.tiny import make_tiny_qwen3_moe
from tests.unit.checkpoint.mesh import Mesh
from tests.unit.checkpoint.test_state import travel


def test_weights_and_optimizer_state_over_four_ranks(tmp_path: Path) -> None:
    """Experts on one, two and four ranks, whole and cut in two; a layer without any."""
    source = make_tiny_qwen3_moe(tmp_path / "model", num_layers=3, dense_layers=(0,), experts=4)
    meshes = [
        Mesh(ep=2),
        Mesh(),
        Mesh(tp=2, sequence=True, ep=2),
        Mesh(tp=2, sequence=True, ep=4, etp=1),
        Mesh(pp=2, ep=2),
        Mesh(tp=2, sequence=True, etp=1),
        Mesh(ep=2),
    ]
    assert run_distributed(travel, 4, source, tmp_path, meshes) == [[True] * 6] * 4


def plain_and_bf16(source: Path, root: Path) -> list[list[bool]]:
    return [
        travel(source, root / str(n), [Mesh(ep=ep, **kind) for ep in (2, 1, 2)])  # type: ignore[arg-type]
        for n, kind in enumerate([{"sharded_optimizer": False, "dtype": "bfloat16"}, {"dtype": "bfloat16"}])
    ]


def test_layers_that_all_have_experts(tmp_path: Path) -> None:
    """Megatron-Core stores the layers of such a model together, others one by one."""
    source = make_tiny_qwen3_moe(tmp_path / "model", num_layers=2, experts=4)
    assert run_distributed(plain_and_bf16, 2, source, tmp_path) == [[[True] * 2] * 2] * 2
