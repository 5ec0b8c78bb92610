"""Exporting weights on every kind of mesh, in buckets of any size, and the shards that need not travel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opsd_megatron.config import Config, ParallelConfig
from opsd_megatron.rollout.engine import ShardLayout
from tests.distributed import run_distributed
from tests.tiny import make_tiny_qwen3, make_tiny_qwen3_moe

VOCAB = 263  # padded to 264 at tp 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {
        "tied": make_tiny_qwen3(base / "tied", vocab_size=VOCAB),
        "untied": make_tiny_qwen3(base / "untied", vocab_size=VOCAB, tied=False),
        "experts": make_tiny_qwen3_moe(base / "experts", vocab_size=VOCAB, experts=4, dense_layers=(2,)),
        "even": make_tiny_qwen3_moe(base / "even", vocab_size=320, experts=4, num_layers=2),
    }


def build(path: Path, parallel: ParallelConfig) -> tuple[Any, Any, Any, Any]:
    from opsd_megatron.checkpoint.hf_io import SafetensorsReader
    from opsd_megatron.distributed.parallel import ParallelDims
    from opsd_megatron.models.build import build_model
    from opsd_megatron.models.families import read_spec
    from opsd_megatron.models.weight_map import load_hf_weights

    config = Config(parallel=parallel)
    config.model.dtype = "float32"
    dims = ParallelDims.initialize(parallel)
    spec, reader = read_spec(path), SafetensorsReader(path)
    chunks = build_model(spec, config, dims)
    load_hf_weights(chunks, spec, reader, dims)
    return chunks, spec, dims, reader


def export_on_each(cases: list[tuple[Path, ParallelConfig]]) -> list[dict[str, bool]]:
    """Whether the export of each model on its mesh is the directory that it was loaded from, by size of the buckets."""
    import torch.distributed as dist

    from opsd_megatron.models.export import export_hf_weights
    from opsd_megatron.models.weight_map import placements

    collectives = 0
    original = dist.all_gather

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal collectives
        collectives += 1
        return original(*args, **kwargs)

    dist.all_gather = counted
    outcome = []
    for path, parallel in cases:
        chunks, spec, dims, reader = build(path, parallel)
        equal = {}
        for size in (1, 50_000, 2**28, None):
            collectives = 0
            exported = list(export_hf_weights(chunks, spec, dims, bucket_bytes=size))
            same = sorted(name for name, _ in exported) == reader.names()
            equal[str(size)] = same and all(torch.equal(tensor, reader.get(name)) for name, tensor in exported)
            if size is None and not spec.num_experts:
                of_its_own = len(list(placements(spec))) if dims.tp > 1 else 0
                equal["over gloo one by one"] = collectives == of_its_own
            if size == 2**28 and not spec.num_experts:
                equal["one collective a stage"] = collectives == (dims.pp * dims.vpp if dims.tp > 1 else 0)
        outcome.append(equal)
        dims.destroy()
    return outcome


def test_every_mesh_exports_what_was_loaded_in_buckets_of_any_size(models: dict[str, Path]) -> None:
    cases = [
        (models["tied"], ParallelConfig(tensor=2, pipeline=2)),
        (models["untied"], ParallelConfig(tensor=2)),
        (models["untied"], ParallelConfig(pipeline=4)),
        (models["experts"], ParallelConfig(tensor=2, expert=2, expert_tensor=2)),
        (models["experts"], ParallelConfig(tensor=2, pipeline=2, expert=2, expert_tensor=1)),
    ]
    outcome = run_distributed(export_on_each, 4, cases)
    experts = dict.fromkeys(("1", "50000", str(2**28), "None"), True)
    dense = experts | {"one collective a stage": True, "over gloo one by one": True}
    assert outcome == [[dense, dense, dense, experts, experts]] * 4


def own_shards_on(path: Path, parallel: ParallelConfig, layout: ShardLayout) -> dict[str, Any]:
    """What crosses ranks where an engine with ``layout`` takes the weights, and whether it reads the right numbers."""
    import torch.distributed as dist

    from opsd_megatron.models.export import export_hf_weights
    from opsd_megatron.models.weight_map import partition_dim, placements
    from opsd_megatron.rollout.weight_sync import own_shards

    chunks, spec, dims, reader = build(path, parallel)
    own = own_shards(spec, dims, layout)
    gathered: list[int] = []
    original = dist.all_gather

    def counted(shards: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        gathered.append(sum(shard.numel() for shard in shards))
        return original(shards, *args, **kwargs)

    dist.all_gather = counted
    kinds = {name: place.rule for place in placements(spec) for name in place.hf_names}
    right, rest_marked = True, True
    for name, tensor in export_hf_weights(chunks, spec, dims, own_shards_of=own, mark_rest=True):
        expected = reader.get(name)
        dim = partition_dim(kinds[name])
        if name in own and dim is not None:
            size = expected.shape[dim] // dims.tp
            mine = torch.arange(size * dims.tp_rank, size * (dims.tp_rank + 1))
            rest = torch.tensor([i for i in range(expected.shape[dim]) if i not in mine])
            rest_marked &= bool(tensor.index_select(dim, rest).isnan().all())
            tensor, expected = tensor.index_select(dim, mine), expected.index_select(dim, mine)
        right &= torch.equal(tensor, expected)
    dist.all_gather = original
    dims.destroy()
    return {"right": right, "rest marked": rest_marked, "gathered": sum(gathered), "own": len(own)}


def in_every_layout(models: dict[str, Path]) -> dict[str, dict[str, Any]]:
    two, layout = ParallelConfig(tensor=2), ShardLayout(tensor=2, vocab_multiple=64)
    return {
        "dense": own_shards_on(models["untied"], two, layout),
        "dense, vocabulary cut alike": own_shards_on(models["untied"], two, ShardLayout(2, 263)),
        "experts": own_shards_on(models["even"], two, layout),
        "experts apart": own_shards_on(models["even"], ParallelConfig(tensor=2, expert=2, expert_tensor=1), layout),
        "pipeline": own_shards_on(models["tied"], ParallelConfig(pipeline=2), ShardLayout(1, 64)),
        "other engine": own_shards_on(models["tied"], two, ShardLayout(1, 64)),
    }


def test_no_tensor_crosses_a_rank_where_the_engine_cuts_them_alike(models: dict[str, Path]) -> None:
    for outcome in run_distributed(in_every_layout, 2, models):
        assert all(case["right"] and case["rest marked"] for case in outcome.values()), outcome
        gathered = {name: case["gathered"] for name, case in outcome.items()}
        # Embedding and head, of 264 padded rows, are cut elsewhere by an engine that pads 263 to 320.
        assert gathered["dense"] == 2 * 264 * 64
        # An odd vocabulary cannot be cut alike at all.
        assert gathered["dense, vocabulary cut alike"] == gathered["dense"]
        assert gathered["experts"] == 0 and outcome["experts"]["own"] == 45
        assert gathered["experts apart"] == 2 * 4 * 3 * 48 * 64
        assert outcome["pipeline"]["own"] == outcome["other engine"]["own"] == 0


def lose_a_parameter(path: Path) -> str:
    from opsd_megatron.rollout.scripted import ScriptedEngine
    from opsd_megatron.rollout.weight_sync import sync_weights

    chunks, spec, dims, _ = build(path, ParallelConfig())
    script = path / "script.jsonl"
    script.write_text('{"prompt_ids": [1], "token_ids": [2]}\n')
    assert sync_weights(ScriptedEngine(script), chunks, spec, dims) == 4 * sum(
        p.numel() for p in chunks[0].parameters()
    )
    del chunks[0].decoder.layers[1].self_attention.q_layernorm.weight
    try:
        sync_weights(ScriptedEngine(script), chunks, spec, dims)
    except AssertionError as error:
        return str(error)
    return ""


def test_a_parameter_that_is_missing_is_named_before_anything_moves(models: dict[str, Path]) -> None:
    (message,) = run_distributed(lose_a_parameter, 1, models["tied"])
    assert message == "this rank has no parameter for model.layers.1.self_attn.q_norm.weight and 0 more"
