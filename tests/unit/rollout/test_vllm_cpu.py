"""What a reload on CPU does with the vocabulary's tensors; against vLLM itself in tests/functional/test_engine.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from opsd_megatron.rollout.vllm_cpu import (
    _fused_norm,
    _fused_swiglu,
    drop_packed,
    pack_head,
    vocabulary_in_place,
)


class Packed(torch.nn.Module):
    """Multiplies by a copy of its weight, as vLLM's CPU build does."""

    cpu_linear: Callable[..., Tensor] | None = None
    packed_by_vllm = False

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.quant_method = self

    def weight_loader(self, weight: torch.nn.Parameter, tensor: Tensor) -> None:
        weight.data.copy_(tensor)

    def process_weights_after_loading(self, module: Packed) -> None:
        module.packed_by_vllm = True
        copy = module.weight.detach().clone()
        module.cpu_linear = lambda x, weight, bias: x @ copy.t()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("rows", "dtype", "bf16_is_fast"),
    [
        (4, torch.float32, True),
        (2**18, torch.float32, False),  # 3 MiB: more than a huge page
        (2**19, torch.bfloat16, True),
        (2**19, torch.bfloat16, False),
    ],
)
def test_the_vocabulary_is_loaded_where_it_is_used_and_packed_once(
    tied: bool, rows: int, dtype: torch.dtype, bf16_is_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_pytorch = rows > 4 and (dtype == torch.float32 or bf16_is_fast)
    if by_pytorch and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bf16_is_fast)
    names = ["model.embed_tokens.weight", "model.norm.weight", *([] if tied else ["lm_head.weight"])]
    weights = {name: torch.randn(rows, 3, dtype=dtype) for name in names}
    embedding = Packed(torch.nn.Parameter(torch.zeros(rows, 3, dtype=dtype)))
    head = Packed(embedding.weight if tied else torch.nn.Parameter(torch.zeros(rows, 3, dtype=dtype)))
    model = torch.nn.Module()
    model.lm_head, model.model = head, torch.nn.ModuleDict({"embed_tokens": embedding})
    embedding.process_weights_after_loading(embedding)

    used = [head.weight, embedding.weight]
    rest: Iterator[tuple[str, Tensor]] = vocabulary_in_place(model, iter(weights.items()))
    for module in (head, embedding):  # as a reload has it while it reads
        module.weight = torch.nn.Parameter(torch.empty(rows, 3, device="meta"))
    assert [name for name, _ in rest] == ["model.norm.weight"]
    head.weight, embedding.weight = used

    pack_head(model)
    assert torch.equal(embedding.weight, weights["model.embed_tokens.weight"]) and embedding.cpu_linear is None
    x, expected = torch.randn(2, 3, dtype=dtype), weights.get("lm_head.weight", embedding.weight)
    assert head.cpu_linear is not None and head.packed_by_vllm is not by_pytorch
    torch.testing.assert_close(head.cpu_linear(x, head.weight, None), x @ expected.t())
    drop_packed(model)
    assert head.cpu_linear is embedding.cpu_linear is None


def test_what_is_read_where_it_lies_is_never_written_to() -> None:
    """Tensors of the right shape and type are taken as they are; what has to be copied goes into other memory."""
    embedding = Packed(torch.nn.Parameter(torch.zeros(4, 3)))
    model = torch.nn.Module()
    model.lm_head, model.model = embedding, torch.nn.ModuleDict({"embed_tokens": embedding})

    def update(tensor: Tensor) -> None:
        assert not list(vocabulary_in_place(model, iter([("model.embed_tokens.weight", tensor)])))
        assert torch.equal(embedding.weight.float(), tensor.float())

    lent = torch.randn(4, 3)
    kept = lent.clone()
    update(lent)
    assert embedding.weight.data_ptr() == lent.data_ptr()
    for other in (torch.randn(3, 4).t(), torch.randn(4, 3).double()):
        update(lent)
        update(other)
        assert embedding.weight.data_ptr() not in (lent.data_ptr(), other.data_ptr())
        assert embedding.weight.dtype == torch.float32 and torch.equal(lent, kept)


def test_what_the_fused_kernels_do_not_take_goes_through_vllms_own_code() -> None:
    """Odd widths, weights of another dtype, and a residual with strides, which they would misread."""

    class Norm:
        weight, variance_epsilon = torch.ones(16), 1e-6

        def forward_native(self, *_: object) -> str:
            return "native"

    norm, x = Norm(), torch.randn(4, 16)
    assert _fused_norm(norm, torch.randn(4, 12)) == "native"
    assert _fused_norm(norm, x.bfloat16()) == "native"
    assert _fused_norm(norm, x, torch.randn(16, 4).t()) == "native"
    assert _fused_swiglu(norm, torch.randn(4, 24)) == "native"
