"""The model that Megatron-Core builds of Transformer Engine's modules, with stand-ins for the modules themselves.

What is inside which module, and what is missing for it to be complete, is Megatron-Core's own specification; the
stand-ins hold parameters of the names and shapes that Transformer Engine's documentation gives its modules.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from tests.distributed import run_distributed
from tests.tiny import make_tiny_qwen3, make_tiny_qwen3_moe

Found = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]]


class Norm(nn.Module):
    """``RMSNorm``."""

    def __init__(self, config: object, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))


class Column(nn.Module):
    """``Linear`` with ``parallel_mode="column"``."""

    def __init__(self, columns: int, rows: int, *, tp_group: Any, **_: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows // tp_group.size(), columns))


class NormColumn(Column):
    """``LayerNormLinear``."""

    def __init__(self, columns: int, rows: int, **options: Any) -> None:
        super().__init__(columns, rows, **options)
        self.layer_norm_weight = nn.Parameter(torch.empty(columns))


class Row(nn.Module):
    """``Linear`` with ``parallel_mode="row"``."""

    def __init__(self, columns: int, rows: int, *, tp_group: Any, **_: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns // tp_group.size()))


class GroupedColumn(nn.Module):
    """``GroupedLinear``: a matrix for each of a rank's experts."""

    def __init__(self, count: int, columns: int, rows: int, *, pg_collection: Any, **_: object) -> None:
        super().__init__()
        for number in range(count):
            weight = torch.empty(rows // pg_collection.expt_tp.size(), columns)
            self.register_parameter(f"weight{number}", nn.Parameter(weight))


class GroupedRow(nn.Module):
    """The same, cut the other way."""

    def __init__(self, count: int, columns: int, rows: int, *, pg_collection: Any, **_: object) -> None:
        super().__init__()
        for number in range(count):
            weight = torch.empty(rows, columns // pg_collection.expt_tp.size())
            self.register_parameter(f"weight{number}", nn.Parameter(weight))


class Attention(nn.Module):
    """``DotProductAttention``, which has no parameters."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()


STAND_INS = {
    "TENorm": Norm,
    "TEColumnParallelLinear": Column,
    "TELayerNormColumnParallelLinear": NormColumn,
    "TERowParallelLinear": Row,
    "TEColumnParallelGroupedLinear": GroupedColumn,
    "TERowParallelGroupedLinear": GroupedRow,
    "TEDotProductAttention": Attention,
}


def with_stand_ins() -> ExitStack:
    """Megatron-Core as where Transformer Engine is installed, as far as its specification of layers goes."""
    from megatron.core.extensions import transformer_engine as engine
    from megatron.core.extensions import transformer_engine_spec_provider as provider
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.models.gpt import gpt_layer_specs

    stack = ExitStack()
    for name, stand_in in STAND_INS.items():
        stack.enter_context(mock.patch.object(engine, name, stand_in))
        stack.enter_context(mock.patch.object(provider, name, stand_in))
    for name in ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd"):
        stack.enter_context(mock.patch.object(rope_utils, name, object()))
    stack.enter_context(mock.patch.object(provider, "is_te_min_version", lambda version: True))
    stack.enter_context(mock.patch.object(gpt_layer_specs, "TESpecProvider", provider.TESpecProvider, create=True))
    return stack


def build(
    models: list[Path], tp: int, ep: int, etp: int | None, lora_rank: int = 0
) -> list[tuple[Found, list[str], list[str]]]:
    """Of each model: this rank's parameters, their shapes there and as the weight map has them; missing; adapters."""
    from opsd_megatron.config import Config
    from opsd_megatron.distributed.parallel import ParallelDims
    from opsd_megatron.models import build
    from opsd_megatron.models.families import read_spec
    from opsd_megatron.models.lora import add_adapters
    from opsd_megatron.models.weight_map import missing_parameters, placed_parameters, shard_shape

    config = Config()
    config.lora.rank = lora_rank
    parallel = config.parallel
    parallel.tensor, parallel.sequence = tp, tp > 1
    parallel.expert, parallel.expert_tensor = ep, etp
    dims = ParallelDims.initialize(parallel)
    outcome = []
    with with_stand_ins() as stack:
        stack.enter_context(mock.patch.object(build, "choose_backend", lambda *_, **__: "transformer_engine"))
        for path in models:
            spec = read_spec(path)
            chunks = build.build_model(spec, config, dims)
            names = {id(parameter): name for name, parameter in chunks[0].named_parameters()}
            found = {
                names[id(parameter)]: (
                    tuple(parameter.shape),
                    shard_shape(place, spec, dims.tp if place.expert is None else dims.etp),
                    place.hf_names,
                )
                for place, parameter in placed_parameters(chunks, spec, dims)
            }
            assert len(found) == len(names)
            missing = [name for place in missing_parameters(chunks, spec, dims) for name in place.hf_names]
            if lora_rank:
                add_adapters(chunks, config.lora, seed=0)
            adapters = [name for name, added in chunks[0].named_parameters() if id(added) not in names]
            outcome.append((found, missing, adapters))
    return outcome


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [
        make_tiny_qwen3(root / "dense", num_layers=2, tied=False, with_tokenizer=False),
        make_tiny_qwen3_moe(root / "moe", num_layers=2, experts=4, dense_layers=(0,), with_tokenizer=False),
    ]


@pytest.mark.parametrize(("tp", "ep", "etp"), [(1, 1, None), (4, 1, None), (2, 2, 1)])
def test_every_parameter_has_its_place_and_shape(models: list[Path], tp: int, ep: int, etp: int | None) -> None:
    ranks = run_distributed(build, tp, models, tp, ep, etp)
    for rank in ranks:
        for found, missing, _ in rank:
            assert missing == []
            assert [name for name, (shape, expected, _) in found.items() if shape != expected] == []
    (dense, *_), (moe, *_) = ranks[-1]
    layer = "decoder.layers.1."
    assert {name.removeprefix(layer) for name in dense if name.startswith(layer)} == {
        "self_attention.linear_proj.weight",
        "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.linear_qkv.weight",
        "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    }
    qkv, norm = dense[f"{layer}self_attention.linear_qkv.weight"], dense[f"{layer}mlp.linear_fc1.layer_norm_weight"]
    # 4 heads of queries and 2 each of keys and values, of 32 rows; H 64 and an MLP of 96.
    assert qkv[0] == (256 // tp, 64) and [name.split(".")[-2] for name in qkv[2]] == ["q_proj", "k_proj", "v_proj"]
    assert norm[0] == (64,) and norm[2] == ("model.layers.1.post_attention_layernorm.weight",)
    assert dense[f"{layer}mlp.linear_fc1.weight"][0] == (192 // tp, 64)
    assert dense[f"{layer}mlp.linear_fc2.weight"][0] == (64, 96 // tp)
    # The last of 4 experts, of 48 rows; the norm before them is a module of its own.
    last = 4 // ep - 1
    assert moe[f"{layer}mlp.experts.linear_fc1.weight{last}"][0] == (96 // (etp or tp), 64)
    assert moe[f"{layer}mlp.experts.linear_fc2.weight{last}"][2] == ("model.layers.1.mlp.experts.3.down_proj.weight",)
    assert f"{layer}mlp.experts.linear_fc1.weight{last + 1}" not in moe
    assert moe[f"{layer}pre_mlp_layernorm.weight"][2] == ("model.layers.1.post_attention_layernorm.weight",)


def test_adapted_experts_have_linear_layers_of_their_own(models: list[Path]) -> None:
    """Two experts a rank, each with two linear layers, of two and of one projection, of A and B each."""
    for rank in run_distributed(build, 2, models[1:], 2, 2, 1, 4):
        ((found, missing, adapters),) = rank
        assert missing == []
        assert [name for name, (shape, expected, _) in found.items() if shape != expected] == []
        experts = "decoder.layers.1.mlp.experts.local_experts."
        assert {f"{experts}{number}.linear_fc{layer}.weight" for number in (0, 1) for layer in (1, 2)} < set(found)
        assert sum(name.startswith(experts) for name in adapters) == 2 * (2 + 1) * 2
