"""Checkpoints of models with experts: saved wherever the experts lie, they load wherever else, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from opsd_megatron.checkpoint.compatibility import check_checkpoint
from opsd_megatron.errors import CheckpointError
from opsd_megatron.models.families import read_spec
from tests.distributed import run_distributed
from tests.tiny import make_tiny_qwen3, make_tiny_qwen3_moe
from tests.unit.checkpoint.mesh import Mesh
from tests.unit.checkpoint.test_output_dir import make
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
    ]
    assert run_distributed(travel, 4, source, tmp_path, meshes, timeout=240.0) == [[True] * 4] * 4


def plain_and_bf16(source: Path, root: Path) -> list[list[bool]]:
    return [
        travel(source, root / str(n), [Mesh(ep=ep, **kind) for ep in (2, 1, 2)])  # type: ignore[arg-type]
        for n, kind in enumerate([{"sharded_optimizer": False, "dtype": "bfloat16"}, {"dtype": "bfloat16"}])
    ]


def test_layers_that_all_have_experts(tmp_path: Path) -> None:
    """Megatron-Core stores the layers of such a model together, others one by one."""
    source = make_tiny_qwen3_moe(tmp_path / "model", num_layers=2, experts=4)
    assert run_distributed(plain_and_bf16, 2, source, tmp_path) == [[[True] * 2] * 2] * 2


def test_a_checkpoint_of_other_experts_is_of_another_model(tmp_path: Path) -> None:
    checkpoint = make(tmp_path / "checkpoint")
    spec = read_spec(make_tiny_qwen3_moe(checkpoint / "hf", num_layers=2, with_tokenizer=False))
    check_checkpoint(checkpoint, spec)
    for changes, named in (
        ({"experts": 4}, "num_experts is 8 there, 4 here"),
        ({"expert_ffn": 32}, "moe_intermediate_size is 48 there, 32 here"),
        ({"dense_layers": (1,)}, r"mlp_only_layers is \(\) there, \(1,\) here"),
    ):
        other = make_tiny_qwen3_moe(tmp_path / named[:8], num_layers=2, with_tokenizer=False, **changes)  # type: ignore
        with pytest.raises(CheckpointError, match=rf"another model than model\.path \({named}\)"):
            check_checkpoint(checkpoint, read_spec(other))
    dense = read_spec(make_tiny_qwen3(tmp_path / "dense", num_layers=2, tied=False, with_tokenizer=False))
    with pytest.raises(CheckpointError, match="num_experts is 8 there, None here"):
        check_checkpoint(checkpoint, dense)
