from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from opsd_megatron.config import Config
from opsd_megatron.errors import ConfigError, ModelError
from opsd_megatron.models.families import FAMILIES, read_spec
from opsd_megatron.models.qwen3 import Qwen3Spec, check_mesh
from opsd_megatron.models.qwen3_moe import Qwen3MoeSpec
from opsd_megatron.models.rope import Yarn
from opsd_megatron.models.weight_map import hf_shapes
from tests.unit.models.published import DENSE, MOE, PUBLISHED, write_config


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_parameters_they_are_known_for(name: str, tmp_path: Path) -> None:
    values, parameters = PUBLISHED[name]
    spec = read_spec(write_config(tmp_path, values))
    assert type(spec) is FAMILIES[values["model_type"]]
    assert sum(map(math.prod, hf_shapes(spec).values())) == parameters
    assert spec.max_positions == values["max_position_embeddings"]
    assert spec.rope_theta == values["rope_theta"]
    assert spec.tied == values["tie_word_embeddings"]
    assert spec.yarn is None


@pytest.mark.parametrize(("values", "family"), [(DENSE, "qwen3"), (MOE, "qwen3_moe")])
def test_config_written_by_the_installed_transformers(values: dict[str, Any], family: str, tmp_path: Path) -> None:
    """Transformers 5 calls some keys otherwise: ``rope_parameters``, ``dtype``, ``num_local_experts``."""
    from transformers import AutoConfig

    expected = read_spec(write_config(tmp_path, values))
    rewritten = tmp_path / "rewritten"
    AutoConfig.for_model(**{key: value for key, value in values.items() if value is not None}).save_pretrained(
        rewritten
    )
    assert read_spec(rewritten) == expected
    assert isinstance(expected, FAMILIES[family])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3_next", None])
def test_other_models_are_refused(kind: str | None, tmp_path: Path) -> None:
    write_config(tmp_path, DENSE, model_type=kind)
    with pytest.raises(
        ModelError, match=rf"config.json: model_type is {kind!r}; supported are 'qwen3' and 'qwen3_moe'"
    ):
        read_spec(tmp_path)


def test_names_and_shapes_of_experts_are_those_transformers_writes(tmp_path: Path) -> None:
    from safetensors import safe_open

    from tests.tiny import make_tiny_qwen3_moe

    make_tiny_qwen3_moe(tmp_path, sparse_step=2, dense_layers=(1,), experts=3, expert_ffn=96, hidden_size=96)
    spec = read_spec(tmp_path)
    assert [spec.experts_in(layer) for layer in range(4)] == [0, 0, 0, 3]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert hf_shapes(spec) == stored


def test_what_experts_are_like(tmp_path: Path) -> None:
    spec = read_spec(write_config(tmp_path, MOE, mlp_only_layers=[2, 40], decoder_sparse_step=2))
    assert isinstance(spec, Qwen3MoeSpec)
    assert (spec.experts, spec.experts_per_token, spec.expert_ffn_size, spec.normalized) == (128, 8, 768, True)
    assert [layer for layer in range(8) if spec.experts_in(layer)] == [1, 3, 5, 7]
    assert spec.dense_layers == (2, 40)
    assert spec.sharded_sizes()["FFN rows"] == 6144
    assert "FFN rows" not in read_spec(write_config(tmp_path, MOE)).sharded_sizes()  # no layer has such an MLP


def test_head_dim_of_a_model_with_experts_may_be_implied(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig

    assert read_spec(write_config(tmp_path, MOE, head_dim=...)).head_dim == 64
    config = Qwen3MoeConfig(**{key: value for key, value in MOE.items() if key not in ("head_dim", "rope_scaling")})
    assert getattr(config, "head_dim", config.hidden_size // config.num_attention_heads) == 64


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_experts": ...}, "num_experts is missing"),
        ({"mlp_only_layers": 5}, "mlp_only_layers=5 is not a list of integers"),
        ({"mlp_only_layers": ["1"]}, "mlp_only_layers=['1'] is not a list of integers"),
        ({"layer_types": "full_attention"}, "layer_types='full_attention' is not a list of strings"),
        ({"layer_types": [{}]}, "layer_types=[{}] is not a list of strings"),
        ({"num_experts": 4}, "num_experts_per_tok=8 is more than num_experts=4"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=1 with norm_topk_prob=true"),
        ({"norm_topk_prob": ...}, "norm_topk_prob is missing"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size=0 is not a positive number"),
        ({"mlp_only_layers": list(range(48))}, "mlp_only_layers and decoder_sparse_step leave no layer with experts"),
        ({"use_sliding_window": True}, "use_sliding_window"),
    ],
)
def test_what_is_wrong_with_experts_is_named(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as raised:
        read_spec(write_config(tmp_path, MOE, **changes))
    assert f"{tmp_path / 'config.json'}: {named}" in str(raised.value)


# As the models' pages say to write it for 131,072 tokens, and what transformers 5 makes of it.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": YARN},
        {"rope_scaling": {**YARN, "rope_type": ..., "type": "yarn"}},
        {"rope_parameters": {**YARN, "rope_theta": 1000000.0}, "rope_theta": ..., "rope_scaling": ...},
        {
            "rope_parameters": {**YARN, "rope_theta": 1000000.0},
            "rope_scaling": {**YARN, "rope_type": ..., "type": "yarn"},
        },
    ],
)
def test_yarn(changes: dict[str, Any], tmp_path: Path) -> None:
    changes = {
        key: {k: v for k, v in value.items() if v is not ...} if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    spec = read_spec(write_config(tmp_path, DENSE, max_position_embeddings=131072, **changes))
    assert spec.rope_theta == 1e6
    assert spec.yarn == Yarn(
        factor=4.0,
        original_positions=32768,
        attention_factor=pytest.approx(0.1 * math.log(4) + 1),
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=True,
    )
    assert isinstance(spec, Qwen3Spec)


def test_a_length_that_yarn_reaches_and_the_model_does_not_allow(tmp_path: Path) -> None:
    """As the models' pages say to add it: ``rope_scaling`` alone."""
    config = Config()
    config.model.max_length = 65536
    with pytest.raises(ConfigError) as failure:
        check_mesh(read_spec(write_config(tmp_path, DENSE, rope_scaling=YARN)), config)
    assert str(failure.value) == (
        "model.max_length=65536 is above the model's max_position_embeddings; use at most 40960, or raise "
        "max_position_embeddings in its config.json to 131072, which its rope_scaling is made for"
    )


def test_yarn_without_its_original_length_stretches_the_model_s(tmp_path: Path) -> None:
    spec = read_spec(write_config(tmp_path, DENSE, rope_scaling={"rope_type": "yarn", "factor": 2.0}))
    assert spec.yarn is not None
    assert spec.yarn.original_positions == 40960
