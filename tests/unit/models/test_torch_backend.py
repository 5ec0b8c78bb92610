"""Attention split over context-parallel ranks against attention over whole sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import pytest
import torch
from torch import Tensor

from opsd_megatron.config import ParallelConfig
from tests.distributed import run_distributed
from tests.tiny import make_tiny_qwen3, make_tiny_qwen3_moe
from tests.unit.models.kept import kept_by_autograd

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


@pytest.mark.parametrize("cp", [2, 3])
def test_split_attention_equals_whole(cp: int) -> None:
    """Values, and gradients of queries, keys and values, in float64."""
    lengths = [2 * cp * chunk for chunk in (1, 5, 2)]
    whole = run_distributed(attend, 1, 1, lengths)[0]
    for rank, part in enumerate(run_distributed(attend, cp, cp, lengths)):
        held = positions(lengths, cp, rank)
        for found, expected in zip(part, whole, strict=True):
            torch.testing.assert_close(found, expected[held], rtol=1e-12, atol=1e-12)
            assert expected[held].abs().max() > 0.1


def positions(lengths: list[int], cp: int, rank: int) -> Tensor:
    from opsd_megatron.data.context import context_indices

    return context_indices(torch.tensor([0, *lengths]).cumsum(0), cp=cp, rank=rank)


@pytest.mark.parametrize("cp", [1, 2])
def test_what_the_fused_kernel_is_called_with(cp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA all pieces go through one call. Here a stand-in for it does what PyTorch documents."""
    from opsd_megatron.models import torch_backend
    from opsd_megatron.models.torch_backend import TorchPacking, _attend_one_by_one, _attend_together, _Piece

    def documented(
        query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: object
    ) -> Tensor:
        assert options == {"window_size": (-1, 0), "enable_gqa": True}
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
        assert len(query) == cu_q[-1] and len(key) == len(value) == cu_k[-1]
        starts, sizes = cu_k[:-1].tolist(), zip(cu_k.diff().tolist(), cu_q.diff().tolist(), strict=True)
        pieces = [_Piece(start, visible, queries) for start, (visible, queries) in zip(starts, sizes, strict=True)]
        return _attend_one_by_one(query, key, value, pieces)

    monkeypatch.setattr(torch_backend, "varlen_attn", documented)
    lengths = torch.tensor([0, 8, 12], dtype=torch.int32)
    packing = TorchPacking(cu_seqlens_q=lengths, context=cast(Any, Group(cp)), device=torch.device("cpu"))
    assert packing.pieces == (
        [_Piece(0, 8, 8), _Piece(8, 4, 4)]
        if cp == 1
        else [_Piece(0, 2, 2), _Piece(0, 8, 2), _Piece(8, 1, 1), _Piece(8, 4, 1)]
    )
    sizes = ((12 // cp, HEADS), (12, KV_HEADS), (12, KV_HEADS))
    tensors = [torch.randn(tokens, heads, HEAD_DIM, dtype=torch.float64) for tokens, heads in sizes]
    together, one_by_one = _attend_together(*tensors, packing.bounds), _attend_one_by_one(*tensors, packing.pieces)
    assert torch.equal(together, one_by_one)
    assert (packing.bounds.seen is None) == (cp == 1)


class Group:
    """A process group as its first rank sees it."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


def test_who_attends_to_what_is_worked_out_once_for_a_micro_batch(tmp_path: Path) -> None:
    """By none of the layers, nor again where they are recomputed."""
    model = make_tiny_qwen3(tmp_path, num_layers=3, with_tokenizer=False)
    assert run_distributed(count_workings, 2, model) == [(1, 2)] * 2


def count_workings(path: Path) -> tuple[int, int]:
    """How often the packing was made, and a rank's positions listed, in one pass forward and backward."""
    from opsd_megatron.config import Config
    from opsd_megatron.distributed.parallel import ParallelDims
    from opsd_megatron.models import torch_backend
    from opsd_megatron.models.build import build_model, forward_packed
    from opsd_megatron.models.families import read_spec
    from tests.functional.layouts import Layout

    config = Config()
    config.model.dtype, config.model.recompute, config.parallel.context = "float32", "full", 2
    dims, spec = ParallelDims.initialize(config.parallel), read_spec(path)
    (model,) = build_model(spec, config, dims)
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    made = mock.patch.object(torch_backend.TorchPacking, "of", wraps=torch_backend.TorchPacking.of)
    listed = mock.patch.object(torch_backend, "context_indices", wraps=torch_backend.context_indices)
    with made as packings, listed as lists:
        forward_packed(
            model, Layout.of((8, 4), 2).sequences(torch.zeros(12, dtype=torch.int64), dims.cp_rank)
        ).sum().backward()
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())
    return packings.call_count, lists.call_count


@pytest.mark.parametrize("make", [make_tiny_qwen3, make_tiny_qwen3_moe])
def test_swiglu_as_on_cuda_gives_the_same_and_keeps_less(make: Callable[..., Path], tmp_path: Path) -> None:
    """Compiled for the CPU here; micro-batches of several lengths, as a run has them."""
    path = make(tmp_path, num_layers=2, with_tokenizer=False)
    (outcomes,) = run_distributed(with_and_without_fusion, 1, path)
    for plain, fused in outcomes:
        torch.testing.assert_close(fused.output, plain.output, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fused.gradient, plain.gradient, rtol=1e-4, atol=1e-5 * plain.gradient.abs().max())
        assert fused.kept < 0.92 * plain.kept


class Passed(NamedTuple):
    """Hidden states, all gradients in one vector, and the bytes that autograd kept in between."""

    output: Tensor
    gradient: Tensor
    kept: int


def with_and_without_fusion(path: Path) -> list[tuple[Passed, Passed]]:
    from opsd_megatron.checkpoint.hf_io import SafetensorsReader
    from opsd_megatron.config import Config
    from opsd_megatron.distributed.parallel import ParallelDims
    from opsd_megatron.distributed.seed import seed_everything
    from opsd_megatron.models.build import build_model
    from opsd_megatron.models.families import read_spec
    from opsd_megatron.models.qwen3 import transformer_config
    from opsd_megatron.models.weight_map import load_hf_weights

    config = Config()
    config.model.dtype = "float32"
    dims, spec = ParallelDims.initialize(config.parallel), read_spec(path)
    seed_everything(0, dims)
    there = replace(dims, device=torch.device("cuda"))
    fused = [transformer_config(spec, config, where, "torch").bias_activation_fusion for where in (dims, there)]
    assert fused == [False, True]
    (model,) = build_model(spec, config, dims)
    load_hf_weights([model], spec, SafetensorsReader(path), dims)
    return [tuple(pass_through(model, length, fused=fused) for fused in (False, True)) for length in (9, 24, 17)]  # type: ignore[misc]


def pass_through(model: torch.nn.Module, length: int, *, fused: bool) -> Passed:
    from opsd_megatron.data.packing import pack
    from opsd_megatron.models.build import forward_packed
    from opsd_megatron.types import AlignedSample

    for module in model.modules():
        if hasattr(module, "config"):
            module.config.bias_activation_fusion = fused  # type: ignore[union-attr]
    model.zero_grad()
    batch = pack([AlignedSample(tuple(range(length)), None, tuple(range(5)))], with_teacher=False)
    with kept_by_autograd(model) as kept:
        output = forward_packed(model, batch.student)
    output.square().sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return Passed(output.detach(), gradient, sum(kept.values()))


def attend(cp: int, lengths: list[int]) -> list[Tensor]:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from opsd_megatron.distributed.parallel import ParallelDims
    from opsd_megatron.models.torch_backend import PackedAttention, TorchPacking

    dims = ParallelDims.initialize(ParallelConfig(context=cp))
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS)
    attention = PackedAttention(config, dims.pg_collection)
    draw = torch.Generator().manual_seed(0)
    held = positions(lengths, cp, dims.cp_rank)
    sizes = (HEADS, KV_HEADS, KV_HEADS)
    whole = [torch.randn(sum(lengths), heads, HEAD_DIM, generator=draw, dtype=torch.float64) for heads in sizes]
    inputs = [tensor[held].requires_grad_() for tensor in whole]
    weights = torch.randn(sum(lengths), HEADS * HEAD_DIM, generator=draw, dtype=torch.float64)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    packing = TorchPacking(cu_seqlens_q=bounds, context=dims.pg_collection.cp, device=torch.device("cpu"))
    output = attention(*inputs, None, packed_seq_params=packing)
    output.backward(weights[held])
    return [output.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]
