"""Checkpoints of models with experts: saved wherever the experts lie, they load wherever else, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from opsd_megatron.checkpoint.compatibility import check_checkpoint
from opsd_megatron.errors import CheckpointError
from opsd_megatron.models.families import read_spec
from tests.distributed import run_distributed
from tests.tiny import make_tiny_qwen3_moe
from tests.unit.checkpoint.mesh import Mesh
from tests.unit.checkpoint.test_output_dir import make
from tests.unit.checkpoint.test_state import travel
from tests.unit.models.published import MOE, write_config


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
    assert run_distributed(travel, 4, source, tmp_path, meshes) == [[True] * 4] * 4


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
    for folder in (checkpoint / "hf", tmp_path / "other", tmp_path / "dense"):
        folder.mkdir()
    own = write_config(checkpoint / "hf", MOE)
    check_checkpoint(checkpoint, read_spec(own), own)
    for changes, named in (
        ({"num_experts": 64}, "num_experts is 128 there, 64 here"),
        ({"moe_intermediate_size": 384}, "moe_intermediate_size is 768 there, 384 here"),
        ({"mlp_only_layers": [1]}, r"mlp_only_layers is \(\) there, \(1,\) here"),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok is 8 there, 4 here"),
        ({"norm_topk_prob": False}, "norm_topk_prob is True there, False here"),
    ):
        other = write_config(tmp_path / "other", MOE, **changes)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match=rf"is of another model than .* \({named}\)"):
            check_checkpoint(checkpoint, read_spec(other), other)
    dense = write_config(tmp_path / "dense", MOE, model_type="qwen3")
    with pytest.raises(CheckpointError, match=r"\(model_type is 'qwen3_moe' there, 'qwen3' here\)"):
        check_checkpoint(checkpoint, read_spec(dense), dense)
