"""What the model is built from: Transformer Engine's modules on CUDA where installed, plain PyTorch elsewhere."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Literal

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from opsd_megatron.errors import ConfigError

Backend = Literal["torch", "transformer_engine"]


def choose_backend(name: str, *, dtype: str, on_cuda: bool) -> Backend:
    """Resolve ``model.backend``.

    Args:
        name: ``auto``, ``torch`` or ``transformer_engine``.
        dtype: ``model.dtype``. Transformer Engine has no float32 attention for packed sequences.
        on_cuda: Whether the model will run on a CUDA device.

    Raises:
        ConfigError: Transformer Engine was asked for and cannot be used.
    """
    if name == "torch":
        return "torch"
    installed = importlib.util.find_spec("transformer_engine") is not None
    if name == "auto":
        return "transformer_engine" if installed and on_cuda and dtype != "float32" else "torch"
    if not on_cuda:
        raise ConfigError("model.backend=transformer_engine needs a CUDA device; use model.backend=auto or torch")
    if dtype == "float32":
        raise ConfigError(
            "model.backend=transformer_engine has no attention in model.dtype=float32; use model.dtype=bfloat16, or "
            "model.backend=auto or torch"
        )
    if not installed:
        raise ConfigError(
            "model.backend=transformer_engine needs the transformer_engine package (NVIDIA's containers hold it); "
            "install it or use model.backend=auto or torch"
        )
    return "transformer_engine"


def has_fused_weight_gradient() -> bool:
    """Whether Apex's extension that accumulates weight gradients in float32 is installed."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def block_spec(backend: Backend, experts: Sequence[int]) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage and the final norm.

    Args:
        backend: What they are built from.
        experts: For each layer of the stage how many experts it has; 0 for a plain MLP.
    """
    if backend == "torch":
        from opsd_megatron.models.torch_backend import block_spec as torch_block_spec

        return torch_block_spec(experts)
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    layers = {
        count: get_gpt_layer_with_transformer_engine_spec(
            num_experts=count or None, moe_grouped_gemm=count > 0, qk_layernorm=True
        )
        for count in set(experts)
    }
    return TransformerBlockSubmodules(layer_specs=[layers[count] for count in experts], layer_norm=TENorm)
