"""What a reload on CPU does with the vocabulary's tensors; against vLLM itself in tests/functional/test_engine.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from opsd_megatron.rollout.vllm_cpu import pack_head, vocabulary_in_place


class Packed(torch.nn.Module):
    """Multiplies by a copy of its weight, as vLLM's CPU build does."""

    cpu_linear: Callable[[Tensor], Tensor] | None = None

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.quant_method = self

    def weight_loader(self, weight: torch.nn.Parameter, tensor: Tensor) -> None:
        weight.data.copy_(tensor)

    def process_weights_after_loading(self, module: Packed) -> None:
        copy = module.weight.detach().clone()
        module.cpu_linear = lambda x: x @ copy.t()


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_is_loaded_where_it_is_used_and_packed_once(tied: bool) -> None:
    weights = {name: torch.randn(4, 3) for name in ("model.embed_tokens.weight", "model.norm.weight")}
    if not tied:
        weights["lm_head.weight"] = torch.randn(4, 3)
    embedding = Packed(torch.nn.Parameter(torch.zeros(4, 3)))
    head = Packed(embedding.weight if tied else torch.nn.Parameter(torch.zeros(4, 3)))
    model = torch.nn.Module()
    model.lm_head, model.model = head, torch.nn.ModuleDict({"embed_tokens": embedding})
    embedding.process_weights_after_loading(embedding)

    used = [head.weight, embedding.weight]
    rest: Iterator[tuple[str, Tensor]] = vocabulary_in_place(model, iter(weights.items()))
    for module in (head, embedding):  # as a reload has it while it reads
        module.weight = torch.nn.Parameter(torch.empty(4, 3, device="meta"))
    assert [name for name, _ in rest] == ["model.norm.weight"]
    head.weight, embedding.weight = used

    pack_head(model)
    assert torch.equal(embedding.weight, weights["model.embed_tokens.weight"]) and embedding.cpu_linear is None
    x, expected = torch.randn(2, 3), weights.get("lm_head.weight", embedding.weight)
    assert head.cpu_linear is not None and torch.equal(head.cpu_linear(x), x @ expected.t())
