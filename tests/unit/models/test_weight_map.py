"""The weight map without a model: it is data, and reading and joining shards are functions of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from opsd_megatron.errors import ModelError
from opsd_megatron.models import weight_map
from opsd_megatron.models.qwen3 import Qwen3Spec
from opsd_megatron.models.weight_map import (
    Placement,
    check_tensors,
    find_placement,
    hf_shapes,
    join_shards,
    partition_dim,
    placements,
    read_shard,
    shard_shape,
)

SPEC = Qwen3Spec(
    num_layers=4,
    hidden_size=6,
    ffn_size=8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=2,
    vocab_size=21,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tied=False,
    max_positions=64,
)


class DictReader:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def get(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        tensor = self.tensors[name] if rows is None else self.tensors[name][rows]
        return tensor if columns is None else tensor[:, columns]


class WithFiles(DictReader):
    def file_of(self, name: str) -> str:
        return "model-00002-of-00002.safetensors"


def random_reader(spec: Qwen3Spec = SPEC) -> DictReader:
    generator = torch.Generator().manual_seed(0)
    return DictReader({name: torch.randn(shape, generator=generator) for name, shape in hf_shapes(spec).items()})


def rule_for(name: str) -> Placement:
    return find_placement(f"decoder.layers.0.{name}", SPEC, 0)


def test_names_and_shapes_are_those_of_transformers() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    for tied in (True, False):
        with torch.device("meta"):
            model = Qwen3ForCausalLM(
                Qwen3Config(
                    num_hidden_layers=SPEC.num_layers,
                    hidden_size=SPEC.hidden_size,
                    intermediate_size=SPEC.ffn_size,
                    num_attention_heads=SPEC.num_heads,
                    num_key_value_heads=SPEC.num_kv_heads,
                    head_dim=SPEC.head_dim,
                    vocab_size=SPEC.vocab_size,
                    tie_word_embeddings=tied,
                )
            )
        expected = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
        assert list(hf_shapes(replace(SPEC, tied=tied)).items()) == expected


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_joining_shards_undoes_reading_them(tp: int) -> None:
    """21 vocabulary rows make 3 rows of padding at tp 4, 8 and 1 at tp 2; none comes back. At tp 8 heads are cut."""
    reader = random_reader()
    seen = set()
    for place in placements(SPEC):
        shards = [read_shard(place, SPEC, reader, tp=tp, tp_rank=rank) for rank in range(tp)]
        assert {tuple(shard.shape) for shard in shards} == {shard_shape(place, SPEC, tp)}
        for name, joined in zip(place.hf_names, join_shards(place, SPEC, shards), strict=True):
            assert torch.equal(joined, reader.get(name))
            seen.add(name)
    assert seen == set(reader.names())


def test_query_key_and_value_rows_are_interleaved_by_key_value_head() -> None:
    """By hand: 2 query heads of 2 rows, then 2 rows of key and of value, for each of 4 key/value heads."""
    tensors = {
        f"model.layers.0.self_attn.{name}_proj.weight": torch.tensor([[base + row] * 6 for row in range(rows)])
        for name, base, rows in (("q", 100, 16), ("k", 200, 8), ("v", 300, 8))
    }
    place, reader = rule_for("self_attention.linear_qkv.weight"), DictReader(tensors)
    first = [100, 101, 102, 103, 200, 201, 300, 301, 104, 105, 106, 107, 202, 203, 302, 303]
    second = [108, 109, 110, 111, 204, 205, 304, 305, 112, 113, 114, 115, 206, 207, 306, 307]
    assert read_shard(place, SPEC, reader, tp=2, tp_rank=0)[:, 0].tolist() == first
    assert read_shard(place, SPEC, reader, tp=2, tp_rank=1)[:, 0].tolist() == second
    assert read_shard(place, SPEC, reader, tp=1, tp_rank=0)[:, 0].tolist() == first + second


@pytest.mark.parametrize(
    ("tp", "shards"),
    [
        (2, [[0, 1, 2, 3, 100, 101, 200, 201], [4, 5, 6, 7, 102, 103, 202, 203]]),
        (4, [[0, 1, 2, 3], [100, 101, 200, 201], [4, 5, 6, 7], [102, 103, 202, 203]]),
        (8, [[0, 1], [2, 3], [100, 101], [200, 201], [4, 5], [6, 7], [102, 103], [202, 203]]),
        (16, [[n] for n in (0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203)]),
    ],
)
def test_more_shards_than_key_value_heads_cut_them(tp: int, shards: list[list[int]]) -> None:
    """By hand: for each of 2 key/value heads 2 query heads of 2 rows, then 2 rows of key and of value."""
    spec = replace(SPEC, num_heads=4, num_kv_heads=2)
    tensors = {
        f"model.layers.0.self_attn.{name}_proj.weight": torch.tensor([[base + row] * 6 for row in range(rows)])
        for name, base, rows in (("q", 0, 8), ("k", 100, 4), ("v", 200, 4))
    }
    place, reader = rule_for("self_attention.linear_qkv.weight"), DictReader(tensors)
    found = [read_shard(place, spec, reader, tp=tp, tp_rank=rank) for rank in range(tp)]
    assert [shard[:, 0].tolist() for shard in found] == shards
    for name, joined in zip(place.hf_names, join_shards(place, spec, found), strict=True):
        assert torch.equal(joined, tensors[name])


def test_each_shard_stacks_its_gate_on_its_up() -> None:
    tensors = {
        f"model.layers.0.mlp.{name}_proj.weight": torch.tensor([[base + row] * 6 for row in range(8)])
        for name, base in (("gate", 100), ("up", 200))
    }
    place, reader = rule_for("mlp.linear_fc1.weight"), DictReader(tensors)
    assert read_shard(place, SPEC, reader, tp=2, tp_rank=1)[:, 0].tolist() == [104, 105, 106, 107, 204, 205, 206, 207]


def test_vocabulary_padding_is_zero() -> None:
    reader, place = random_reader(), next(placements(SPEC))
    shard = read_shard(place, SPEC, reader, tp=4, tp_rank=3)
    assert torch.equal(shard[:3], reader.get("model.embed_tokens.weight")[18:])
    assert torch.equal(shard[3:], torch.zeros(3, 6))
    # At 64 shards of one row there are ranks without a single true row.
    assert torch.equal(read_shard(place, SPEC, reader, tp=64, tp_rank=63), torch.zeros(1, 6))


# What named_parameters() lists for one layer of the torch backend; test_transformer_engine.py builds the other's.
NAMES = [
    "input_layernorm.weight",
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
]


def test_names_cover_a_layer_once() -> None:
    """On the second of two stages, whose layers 0 and 1 are the model's 2 and 3."""
    for local in (0, 1):
        found = [find_placement(f"decoder.layers.{local}.{name}", SPEC, layer_offset=2) for name in NAMES]
        assert {place.layer for place in found} == {local + 2}
        assert {place.rule for place in found} == set(SPEC.layer_rules(0))


def test_the_norms_go_where_they_belong() -> None:
    for name in ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"):
        assert rule_for(name).hf_names == ("model.layers.0.input_layernorm.weight",)
    for name in ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"):
        assert rule_for(name).hf_names == ("model.layers.0.post_attention_layernorm.weight",)


def test_the_head_of_a_tied_model_is_the_embedding() -> None:
    tied = replace(SPEC, tied=True)
    assert find_placement("output_layer.weight", tied, 2).hf_names == ("model.embed_tokens.weight",)
    assert find_placement("output_layer.weight", SPEC, 2).hf_names == ("lm_head.weight",)


def test_an_unknown_parameter_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"linear_qkv\.bias"):
        find_placement("decoder.layers.0.self_attention.linear_qkv.bias", SPEC, 0)


def test_what_is_sharded_and_how() -> None:
    dims = {place.rule.mcore[0]: partition_dim(place.rule) for place in placements(SPEC)}
    assert {name for name, dim in dims.items() if dim is None} == {
        "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight",
        "input_layernorm.weight",
        "pre_mlp_layernorm.weight",
        "decoder.final_layernorm.weight",
    }
    assert {name for name, dim in dims.items() if dim == 1} == {
        "self_attention.linear_proj.weight",
        "mlp.linear_fc2.weight",
    }


def test_complete_weights_pass_the_check() -> None:
    check_tensors(SPEC, random_reader())


def test_a_tied_model_may_store_its_head_if_it_is_the_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_map, "_COMPARED_ROWS", 3)
    tied, reader = replace(SPEC, tied=True), random_reader()
    with pytest.raises(ModelError, match=r"tensor lm_head\.weight is not equal to model\.embed_tokens\.weight, though"):
        check_tensors(tied, reader)
    head = reader.tensors["model.embed_tokens.weight"].clone()
    reader.tensors["lm_head.weight"] = head
    check_tensors(tied, reader)
    reader.tensors["lm_head.weight"] = head.double()
    check_tensors(tied, reader)
    reader.tensors["lm_head.weight"] = head
    head[-1, -1] += 1
    with pytest.raises(ModelError, match="is not equal to"):
        check_tensors(tied, reader)
    reader.tensors["lm_head.weight"] = head[:-1]
    with pytest.raises(ModelError, match="is not equal to"):
        check_tensors(tied, reader)
    del reader.tensors["lm_head.weight"]
    check_tensors(tied, reader)


def test_missing_tensors_are_named() -> None:
    reader = random_reader()
    del reader.tensors["lm_head.weight"]
    with pytest.raises(ModelError, match=r"tensor lm_head\.weight is missing"):
        check_tensors(SPEC, reader)
    for layer in (2, 3):
        del reader.tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"tensors model\.layers\.2\.mlp\.up_proj\.weight, .* are missing"):
        check_tensors(SPEC, reader)


def test_extra_tensors_are_named() -> None:
    reader = random_reader()
    reader.tensors["model.layers.4.mlp.up_proj.weight"] = torch.zeros(8, 6)
    with pytest.raises(
        ModelError, match=r"model\.layers\.4\.mlp\.up_proj\.weight is not expected.*num_hidden_layers=4"
    ):
        check_tensors(SPEC, reader)


class OverFiles(DictReader):
    def file_of(self, name: str) -> str:
        return f"{'ab'[name.endswith('up_proj.weight')]}.safetensors"


def test_extra_tensors_are_named_with_the_file_of_each() -> None:
    names = [f"model.layers.4.mlp.{kind}_proj.weight" for kind in ("down", "gate", "up")]
    reader = OverFiles(random_reader().tensors | {name: torch.zeros(1) for name in names})
    with pytest.raises(ModelError) as raised:
        check_tensors(SPEC, reader)
    assert str(raised.value).startswith(
        f"a.safetensors: tensors {names[0]}, {names[1]} are; b.safetensors: tensor {names[2]} is not expected by config"
    )


def test_a_wrong_shape_is_named_with_its_file() -> None:
    reader = WithFiles(random_reader().tensors | {"model.norm.weight": torch.zeros(7)})
    with pytest.raises(ModelError, match=r"00002\.safetensors: tensor model\.norm\.weight has shape \(7,\).*\(6,\)"):
        check_tensors(SPEC, reader)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64])
def test_quantized_weights_are_named_with_their_file(dtype: torch.dtype) -> None:
    name = "model.layers.1.input_layernorm.weight"
    reader = WithFiles(random_reader().tensors | {name: torch.ones(6, dtype=dtype)})
    with pytest.raises(ModelError, match=rf"00002\.safetensors: tensor {name} holds {str(dtype)[6:]}, not floating"):
        check_tensors(SPEC, reader)
