from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from opsd_megatron.config import Config
from opsd_megatron.errors import ConfigError
from opsd_megatron.models.backends import choose_backend
from tests.distributed import run_distributed
from tests.tiny import make_tiny_qwen3, make_tiny_qwen3_moe
from tests.unit.models.kept import kept_by_autograd

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "dtype", "on_cuda", "installed", "chosen"),
    [
        ("auto", "bfloat16", False, True, "torch"),
        ("auto", "bfloat16", True, True, "transformer_engine"),
        ("auto", "float32", True, True, "torch"),
        ("auto", "bfloat16", True, False, "torch"),
        ("torch", "bfloat16", True, True, "torch"),
        ("transformer_engine", "bfloat16", True, True, "transformer_engine"),
    ],
)
def test_backend_choice(
    name: str, dtype: str, on_cuda: bool, installed: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object() if installed else None)
    assert choose_backend(name, dtype=dtype, on_cuda=on_cuda) == chosen


@pytest.mark.parametrize(
    ("dtype", "on_cuda", "installed", "reason"),
    [
        ("bfloat16", False, True, "needs a CUDA device"),
        ("bfloat16", True, False, "needs the transformer_engine package"),
        ("float32", True, True, "has no attention in model.dtype=float32"),
    ],
)
def test_transformer_engine_where_it_cannot_be(
    dtype: str, on_cuda: bool, installed: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object() if installed else None)
    with pytest.raises(ConfigError, match=f"^model.backend=transformer_engine {reason}"):
        choose_backend("transformer_engine", dtype=dtype, on_cuda=on_cuda)


def test_a_stage_in_bf16_at_tp_2_pp_2(tmp_path: Path) -> None:
    """bf16 with vocabulary padding: 263 rows make 132 a shard. Everything comes back rounded once."""
    path = make_tiny_qwen3(tmp_path, vocab_size=263, num_layers=2, max_shard_size="100KB")
    run_distributed(_stage, 4, path)


def _stage(path: Path) -> None:
    from opsd_megatron.checkpoint.hf_io import SafetensorsReader
    from opsd_megatron.distributed.parallel import ParallelDims
    from opsd_megatron.models.build import build_model
    from opsd_megatron.models.embedding import RowAccumulatingEmbedding
    from opsd_megatron.models.export import export_hf_weights
    from opsd_megatron.models.families import read_spec
    from opsd_megatron.models.weight_map import load_hf_weights

    config = Config()
    config.parallel.tensor = config.parallel.pipeline = 2
    dims = ParallelDims.initialize(config.parallel)
    spec, reader = read_spec(path), SafetensorsReader(path)
    chunks = build_model(spec, config, dims)
    load_hf_weights(chunks, spec, reader, dims)
    (model,) = chunks
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    _check_marks(dict(model.named_parameters()), dims)
    if dims.is_first_stage:
        assert isinstance(model.embedding.word_embeddings, RowAccumulatingEmbedding)
    if dims.is_last_stage:
        head = model.output_head()
        rows = reader.get("model.embed_tokens.weight").bfloat16()
        assert torch.equal(head[:131], rows[132 * dims.tp_rank :][:131])
        assert dims.tp_rank == 0 or not head[131].any()
    exported = list(export_hf_weights(chunks, spec, dims))
    assert sorted(name for name, _ in exported) == reader.names()
    assert all(torch.equal(tensor, reader.get(name).bfloat16()) for name, tensor in exported)


def test_a_rank_reads_no_other_rank_s_experts(tmp_path: Path) -> None:
    path = make_tiny_qwen3_moe(tmp_path, num_layers=2, experts=4)
    for rank, names in enumerate(run_distributed(_read_experts, 2, path)):
        own = {f"model.layers.{layer}.mlp.experts.{2 * rank + e}." for layer in range(2) for e in range(2)}
        assert {name[: name.index("experts.") + 10] for name in names if ".experts." in name} == own
        assert sum("self_attn" in name for name in names) == 12


def _read_experts(path: Path) -> list[str]:
    from opsd_megatron.checkpoint.hf_io import SafetensorsReader
    from opsd_megatron.distributed.parallel import ParallelDims
    from opsd_megatron.models.build import build_model
    from opsd_megatron.models.families import read_spec
    from opsd_megatron.models.weight_map import load_hf_weights

    names = []

    class Reader(SafetensorsReader):
        def get(self, name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
            names.append(name)
            return super().get(name, *args, **kwargs)

    config = Config()
    config.parallel.expert = 2
    dims = ParallelDims.initialize(config.parallel)
    spec = read_spec(path)
    load_hf_weights(build_model(spec, config, dims), spec, Reader(path), dims)
    return names


def _check_marks(parameters: dict[str, Any], dims: Any) -> None:
    """Gradient norms count a shard on every rank, a replica on one, and the copy of a tied embedding not at all."""
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer.module import param_is_not_shared

    for name, parameter in parameters.items():
        counted = param_is_not_tensor_parallel_duplicate(parameter, dims.tp_group)
        assert counted == ("norm" not in name or dims.tp_rank == 0), name
        assert param_is_not_shared(parameter) == (name != "output_layer.weight"), name
    assert ("output_layer.weight" in parameters) == dims.is_last_stage
    assert ("embedding.word_embeddings.weight" in parameters) == dims.is_first_stage


def test_recomputation_keeps_less_and_changes_nothing(tmp_path: Path) -> None:
    path = make_tiny_qwen3(tmp_path, ffn=256)
    (found,) = run_distributed(_kept_activations, 1, path)
    kept = {mode: size for mode, (size, _) in found.items()}
    assert kept["none"] > 1.5 * kept["selective"] > 3 * kept["full"]
    gradients = [gradient for _, gradient in found.values()]
    assert all(torch.equal(gradients[0], gradient) for gradient in gradients[1:])


def _kept_activations(path: Path) -> dict[str, tuple[int, torch.Tensor]]:
    """Bytes that autograd keeps between forward and backward, parameters aside, and one gradient."""
    from opsd_megatron.checkpoint.hf_io import SafetensorsReader
    from opsd_megatron.data.packing import pack
    from opsd_megatron.distributed.parallel import ParallelDims
    from opsd_megatron.distributed.seed import seed_everything
    from opsd_megatron.models.build import build_model, forward_packed
    from opsd_megatron.models.families import read_spec
    from opsd_megatron.models.weight_map import load_hf_weights
    from opsd_megatron.types import AlignedSample

    config = Config()
    config.model.dtype = "float32"
    dims = ParallelDims.initialize(config.parallel)
    seed_everything(0, dims)
    spec = read_spec(path)
    batch = pack([AlignedSample(tuple(range(40)), None, tuple(range(24)))], with_teacher=False)
    found = {}
    for config.model.recompute in ("none", "selective", "full"):
        chunks = build_model(spec, config, dims)
        load_hf_weights(chunks, spec, SafetensorsReader(path), dims)
        with kept_by_autograd(chunks[0]) as kept:
            output = forward_packed(chunks[0], batch.student)
        output.square().sum().backward()
        gradient = chunks[0].decoder.layers[0].self_attention.linear_qkv.weight.grad
        assert gradient is not None and gradient.abs().sum() > 0
        found[config.model.recompute] = (sum(kept.values()), gradient)
    return found
