"""Experts in the weight map and the rules of their meshes, without a model; test_logits.py has the models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opsd_megatron.config import Config
from opsd_megatron.errors import ConfigError
from opsd_megatron.models.families import read_spec
from opsd_megatron.models.qwen3 import Qwen3Spec, check_mesh
from opsd_megatron.models.qwen3_moe import EXPERTS
from opsd_megatron.models.weight_map import find_placement, hf_shapes, join_shards, placements, read_shard, shard_shape
from tests.unit.models.published import MOE, write_config
from tests.unit.models.test_weight_map import DictReader


@pytest.fixture
def spec(tmp_path: Path) -> Qwen3Spec:
    small = {"num_hidden_layers": 4, "hidden_size": 6, "intermediate_size": 8, "moe_intermediate_size": 4}
    return read_spec(
        write_config(
            tmp_path,
            MOE | small,
            num_experts=4,
            num_experts_per_tok=2,
            num_attention_heads=4,
            head_dim=2,
            vocab_size=21,
            mlp_only_layers=[1],
        )
    )


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_joining_shards_undoes_reading_them(tp: int, spec: Qwen3Spec) -> None:
    generator = torch.Generator().manual_seed(0)
    reader = DictReader({name: torch.randn(shape, generator=generator) for name, shape in hf_shapes(spec).items()})
    seen: dict[str, Tensor] = {}
    for place in placements(spec):
        shards = [read_shard(place, spec, reader, tp=tp, tp_rank=rank) for rank in range(tp)]
        assert {tuple(shard.shape) for shard in shards} == {shard_shape(place, spec, tp)}
        seen |= dict(zip(place.hf_names, join_shards(place, spec, shards), strict=True))
    assert list(seen) == reader.names()
    assert all(torch.equal(tensor, reader.get(name)) for name, tensor in seen.items())


def test_the_experts_of_a_layer_come_one_after_the_other(spec: Qwen3Spec) -> None:
    names = [name for name in hf_shapes(spec) if name.startswith("model.layers.2.mlp.")]
    experts = [f"experts.{e}.{kind}_proj.weight" for e in range(4) for kind in ("gate", "up", "down")]
    assert names == [f"model.layers.2.mlp.{name}" for name in ("gate.weight", *experts)]


# What named_parameters() lists for the MLP of a layer with two experts on this rank, from the torch backend;
# test_transformer_engine.py builds the other's.
NAMES = [
    "pre_mlp_layernorm.weight",
    "mlp.router.weight",
    "mlp.experts.local_experts.0.linear_fc1.weight",
    "mlp.experts.local_experts.0.linear_fc2.weight",
    "mlp.experts.local_experts.1.linear_fc1.weight",
    "mlp.experts.local_experts.1.linear_fc2.weight",
]


def test_names_cover_the_experts_of_a_rank_once(spec: Qwen3Spec) -> None:
    """On the second of two stages and of two expert-parallel ranks."""
    found = [
        find_placement(f"decoder.layers.1.{name}", spec, layer_offset=2, expert_offset=2).hf_names for name in NAMES
    ]
    norm, router = "model.layers.3.post_attention_layernorm.weight", "model.layers.3.mlp.gate.weight"
    expected = {(norm,), (router,)}
    for expert in (2, 3):
        prefix = f"model.layers.3.mlp.experts.{expert}."
        expected |= {(prefix + "gate_proj.weight", prefix + "up_proj.weight"), (prefix + "down_proj.weight",)}
    assert set(found) == expected
    assert len(found) == len(expected)


@pytest.mark.parametrize("name", ["mlp.experts.linear_fc1.weight", "mlp.experts.linear_fc1.bias0", "mlp.router.bias"])
def test_an_unknown_parameter_is_an_error(name: str, spec: Qwen3Spec) -> None:
    with pytest.raises(KeyError, match=name):
        find_placement(f"decoder.layers.0.{name}", spec, 0)


def test_only_experts_are_cut_over_the_expert_mesh() -> None:
    assert [rule.of_expert for rule in EXPERTS] == [False, True, True]


def config(**keys: object) -> Config:
    made = Config()
    for key, value in keys.items():
        group, name = key.split("__")
        setattr(getattr(made, group), name, value)
    return made


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"parallel__expert": 128},
        {"parallel__tensor": 4, "parallel__sequence": True, "parallel__expert": 8},
        {"parallel__tensor": 4, "parallel__sequence": True, "parallel__expert": 8, "parallel__expert_tensor": 1},
        {"rollout__tensor": 8},  # ranks share the 4 key/value heads
        {"parallel__tensor": 8, "parallel__sequence": True, "parallel__expert": 8, "parallel__expert_tensor": 1},
    ],
)
def test_meshes_that_fit(keys: dict[str, object], tmp_path: Path) -> None:
    check_mesh(read_spec(write_config(tmp_path, MOE)), config(**keys))


@pytest.mark.parametrize(
    ("changes", "keys", "message"),
    [
        ({}, {"parallel__expert": 3}, r"parallel.expert=3 does not divide the model's 128 experts; 1 or 2 or .* would"),
        (
            {"moe_intermediate_size": 770},
            {"parallel__tensor": 4, "parallel__sequence": True},
            r"parallel.expert_tensor=4 does not divide the model's 770 expert FFN rows; 1 or 2 would",
        ),
        (
            {},
            {"parallel__tensor": 2},
            r"a model with experts and parallel.tensor=2 needs parallel.sequence=true",
        ),
        (
            {"mlp_only_layers": list(range(24))},
            {"parallel__pipeline": 2},
            r"parallel.pipeline=2 leaves rank 0 of the pipeline no layer with experts.*distributed_optimizer=false",
        ),
        ({}, {"rollout__tensor": 5}, r"rollout.tensor=5 does not fit .* 768 expert FFN rows; 1 or 2 or .* or 32 would"),
        (
            {"mlp_only_layers": [0], "intermediate_size": 6145},
            {"parallel__tensor": 2, "parallel__sequence": True},
            r"parallel.tensor=2 does not fit .* 6145 FFN rows; 1 would",
        ),
    ],
)
def test_meshes_that_do_not_fit(changes: dict[str, Any], keys: dict[str, object], message: str, tmp_path: Path) -> None:
    spec = read_spec(write_config(tmp_path, MOE, **changes))
    with pytest.raises(ConfigError, match=message):
        check_mesh(spec, config(**keys))


def test_a_stage_without_experts_is_for_the_plain_optimizer(tmp_path: Path) -> None:
    spec = read_spec(write_config(tmp_path, MOE, mlp_only_layers=list(range(24))))
    check_mesh(spec, config(parallel__pipeline=2, parallel__distributed_optimizer=False))
