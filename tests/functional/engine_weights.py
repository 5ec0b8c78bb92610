"""The weights that vLLM's model holds, and what they are by the Hugging Face tensors they came from."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor


@contextmanager
def weights_as_loaded(model: torch.nn.Module) -> Iterator[dict[str, Tensor]]:
    """All parameters of ``model`` by name, as the loading in this block leaves them, before the CPU build packs any."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    held: dict[str, Tensor] = {}
    names = {id(module): name for name, module in model.named_modules()}

    def noting(process: Callable[[Any, torch.nn.Module], None]) -> Callable[[Any, torch.nn.Module], None]:
        def noted(method: Any, layer: torch.nn.Module) -> None:
            for name, parameter in layer.named_parameters(recurse=False):
                held[f"{names[id(layer)]}.{name}"] = parameter.detach().clone()
            process(method, layer)

        return noted

    with ExitStack() as stack:
        for method in (UnquantizedLinearMethod, UnquantizedFusedMoEMethod):
            original = method.process_weights_after_loading
            stack.enter_context(mock.patch.object(method, "process_weights_after_loading", noting(original)))
        yield held
    for name, parameter in model.named_parameters():
        held.setdefault(name, parameter.detach())


def number_of_weights(names: Iterable[str]) -> int:
    """How many parameters vLLM makes of tensors of these published names."""
    fused = (
        re.sub(r"\b[qkv]_proj\b", "qkv_proj", re.sub(r"\b(gate|up)_proj\b", "gate_up_proj", name)) for name in names
    )
    return len({re.sub(r"\.experts\.\d+\.", ".experts.", name) for name in fused})


def part_of(tensors: Mapping[str, Tensor], name: str, size: int, rank: int) -> Tensor:
    """What rank ``rank`` of an engine of ``size`` has to hold under vLLM's ``name``, by the published ``tensors``."""

    def rows(key: str) -> Tensor:
        return tensors[key].chunk(size, dim=0)[rank]

    def columns(key: str) -> Tensor:
        return tensors[key].chunk(size, dim=1)[rank]

    def together(fused: str, *parts: str) -> Tensor:
        return torch.cat([rows(name.replace(fused, part)) for part in parts])

    block, _, expert_name = name.partition(".experts.")
    if expert_name:
        number = len([key for key in tensors if key.startswith(f"{block}.experts.") and key.endswith("up_proj.weight")])
        keys = [f"{block}.experts.{expert}." for expert in range(number)]
        if expert_name.endswith("w13_weight"):
            both = [torch.cat([rows(key + "gate_proj.weight"), rows(key + "up_proj.weight")]) for key in keys]
            return torch.stack(both)
        return torch.stack([columns(key + "down_proj.weight") for key in keys])
    if "qkv_proj" in name:
        query, key, value = (tensors[name.replace("qkv_proj", part)] for part in ("q_proj", "k_proj", "v_proj"))
        # Ranks share a head where there are fewer than ranks.
        heads = min(size, len(key) // len(tensors[name.replace("qkv_proj", "k_norm")]))
        shared = [part.chunk(heads)[rank * heads // size] for part in (key, value)]
        return torch.cat([query.chunk(size)[rank], *shared])
    if "gate_up_proj" in name:
        return together("gate_up_proj", "gate_proj", "up_proj")
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return columns(name)
    return rows(name) if name.startswith(("model.embed_tokens.", "lm_head.")) else tensors[name]


def differing(held: dict[str, Tensor], path: Path, tensor: int) -> list[str]:
    """Names of the engine's weights that are not, bit for bit, this rank's parts of the tensors of ``path``."""
    from safetensors.torch import load_file

    tensors = load_file(path / "model.safetensors")
    rank = int(os.environ["RANK"]) % tensor
    wrong = [name for name, weight in held.items() if not torch.equal(weight, part_of(tensors, name, tensor, rank))]
    expected = number_of_weights(tensors)
    return wrong if len(held) == expected else [*wrong, f"{len(held)} weights instead of {expected}"]
