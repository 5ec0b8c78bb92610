"""What the model is built from: Transformer Engine's modules on CUDA where installed, plain PyTorch elsewhere."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Literal

import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from opsd_megatron.config import LoraConfig
from opsd_megatron.errors import ConfigError
from opsd_megatron.types import PackedSequences

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


def groups_experts(backend: Backend, lora: LoraConfig) -> bool:
    """Whether one layer takes all of a rank's experts at once, rather than one linear layer each.

    That is faster, but leaves adapters no linear layer of a single expert to lie beside.
    """
    return backend == "transformer_engine" and not lora.adapts_mlps


def block_spec(backend: Backend, experts: Sequence[int], lora: LoraConfig) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage and the final norm.

    Args:
        backend: What they are built from.
        experts: For each layer of the stage how many experts it has; 0 for a plain MLP.
        lora: What will have adapters (``models.lora``). These see the same input as their linear layers, whose norms
            are then modules of their own.
    """
    if backend == "torch":
        from opsd_megatron.models.torch_backend import block_spec as torch_block_spec

        return torch_block_spec(experts)
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    layers = {
        count: get_gpt_layer_with_transformer_engine_spec(
            num_experts=count or None,
            moe_grouped_gemm=count > 0 and groups_experts(backend, lora),
            qk_layernorm=True,
        )
        for count in set(experts)
    }
    if lora.rank:
        for count, layer in layers.items():
            take_norms_out(layer, linear=TEColumnParallelLinear, norm=TENorm, with_experts=count > 0)
    return TransformerBlockSubmodules(layer_specs=[layers[count] for count in experts], layer_norm=TENorm)


def pack_sequences(backend: Backend, sequences: PackedSequences, context: dist.ProcessGroup) -> PackedSeqParams:
    """What attention is told of packed sequences.

    Args:
        backend: What the model is built from.
        sequences: On the model's device.
        context: The context-parallel group.
    """
    if backend == "torch":
        from opsd_megatron.models.torch_backend import TorchPacking

        return TorchPacking.of(sequences, context)
    bounds = sequences.cu_seqlens.to(sequences.ids.device, non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=sequences.max_seqlen,
        max_seqlen_kv=sequences.max_seqlen,
    )


def take_norms_out(layer: ModuleSpec, *, linear: type, norm: type, with_experts: bool) -> None:
    """Replace a layer's linear layers that begin with a norm by a norm and a linear layer.

    Checkpoints keep the names they have with the norm inside, so that either form loads the other's.

    Args:
        layer: A layer of Transformer Engine's modules; changed.
        linear: A linear layer cut by rows, without a norm.
        norm: The norm.
        with_experts: Experts and their router have their norm outside anyway.
    """
    parts = layer.submodules
    parts.input_layernorm = norm
    parts.self_attention.submodules.linear_qkv = linear
    if not with_experts:
        parts.pre_mlp_layernorm = norm
        parts.mlp.submodules.linear_fc1 = linear
    parts.sharded_state_dict_keys_map = {**parts.sharded_state_dict_keys_map, **norm_names(with_experts=with_experts)}


def norm_names(*, with_experts: bool) -> dict[str, str]:
    """Beginnings of the norms' names, and of those that checkpoints use: Transformer Engine's, whichever the backend.

    Its linear layers hold the norm before them, its experts and their router do not.
    """
    names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if not with_experts:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return names
