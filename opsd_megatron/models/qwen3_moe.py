"""A Qwen3 with experts (30B-A3B, 235B-A22B): what differs from a dense one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from opsd_megatron.distributed.parallel import ParallelDims
from opsd_megatron.models.backends import Backend
from opsd_megatron.models.config_file import ConfigFile
from opsd_megatron.models.qwen3 import Qwen3Spec
from opsd_megatron.models.rules import ATTENTION, NORMS, Rule

# After the rules of the attention and before those of the norms. First the torch backend's names, then Transformer
# Engine's, which keeps all of a rank's experts in one module.
EXPERTS = (
    Rule(("mlp.router.weight",), ("mlp.gate.weight",), "whole"),
    Rule(
        ("mlp.experts.local_experts.{expert}.linear_fc1.weight", "mlp.experts.linear_fc1.weight{expert}"),
        ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
        "gate_up",
    ),
    Rule(
        ("mlp.experts.local_experts.{expert}.linear_fc2.weight", "mlp.experts.linear_fc2.weight{expert}"),
        ("mlp.experts.{expert}.down_proj.weight",),
        "columns",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeSpec(Qwen3Spec):
    """A Qwen3 whose layers choose among experts for each token; there is no shared expert.

    Attributes:
        experts: Experts of a layer that has any.
        experts_per_token: How many of them a token goes through.
        expert_ffn_size: Rows of each of an expert's gate and up projections.
        normalized: Whether a token's weights on its experts are made to sum to 1.
        sparse_step: Every so many layers one has experts.
        dense_layers: Layers (from 0) that have a plain MLP all the same.
    """

    experts: int = field(metadata={"key": "num_experts"})
    experts_per_token: int = field(metadata={"key": "num_experts_per_tok"})
    expert_ffn_size: int = field(metadata={"key": "moe_intermediate_size"})
    normalized: bool = field(metadata={"key": "norm_topk_prob"})
    sparse_step: int = field(metadata={"key": "decoder_sparse_step"})
    dense_layers: tuple[int, ...] = field(metadata={"key": "mlp_only_layers"})

    @classmethod
    def values(cls, config: ConfigFile) -> dict[str, Any]:
        """See :meth:`Qwen3Spec.values`. ``head_dim`` has transformers' default here."""
        if config.get("head_dim") is None:
            heads = config.integer("num_attention_heads")
            config = ConfigFile(
                config.path, {**config.values, "head_dim": config.integer("hidden_size") // heads}, config.within
            )
        # Transformers 5 writes the second name.
        renamed = config.get("num_experts") is None and config.get("num_local_experts") is not None
        experts = config.integer("num_local_experts" if renamed else "num_experts")
        per_token, normalized = config.integer("num_experts_per_tok"), config.flag("norm_topk_prob")
        if per_token > experts:
            config.fail(f"num_experts_per_tok={per_token} is more than num_experts={experts}")
        if per_token == 1 and normalized:
            config.fail("num_experts_per_tok=1 with norm_topk_prob=true gives every expert the weight 1: not supported")
        own = {
            "experts": experts,
            "experts_per_token": per_token,
            "expert_ffn_size": config.integer("moe_intermediate_size"),
            "normalized": normalized,
            "sparse_step": config.integer("decoder_sparse_step", 1),
            "dense_layers": tuple(config.list_of(int, "mlp_only_layers")),
        }
        return super().values(config) | own

    @classmethod
    def read(cls, config: ConfigFile) -> Self:
        """See :meth:`Qwen3Spec.read`."""
        spec = super().read(config)
        if not spec.num_experts:
            config.fail("mlp_only_layers and decoder_sparse_step leave no layer with experts")
        return spec

    def experts_in(self, layer: int) -> int:
        """See :meth:`Qwen3Spec.experts_in`."""
        sparse = (layer + 1) % self.sparse_step == 0 and layer not in self.dense_layers
        return self.experts if sparse else 0

    def experts_used(self, layer: int) -> tuple[int, int]:
        """See :meth:`Qwen3Spec.experts_used`."""
        return (self.experts_per_token, self.expert_ffn_size) if self.experts_in(layer) else (0, 0)

    def layer_rules(self, layer: int) -> tuple[Rule, ...]:
        """See :meth:`Qwen3Spec.layer_rules`."""
        return (*ATTENTION, *EXPERTS, *NORMS) if self.experts_in(layer) else super().layer_rules(layer)

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """See :meth:`Qwen3Spec.tensor_shape`."""
        if name.endswith(".mlp.gate.weight"):
            return (self.experts, self.hidden_size)
        if ".experts." in name:
            shape = (self.expert_ffn_size, self.hidden_size)
            return shape[::-1] if name.endswith("down_proj.weight") else shape
        return super().tensor_shape(name)

    def sharded_sizes(self) -> dict[str, int]:
        """See :meth:`Qwen3Spec.sharded_sizes`."""
        sizes = super().sharded_sizes()
        if all(self.experts_in(layer) for layer in range(self.num_layers)):
            del sizes["FFN rows"]
        return sizes

    def expert_sizes(self) -> dict[str, int]:
        """See :meth:`Qwen3Spec.expert_sizes`."""
        return {"expert FFN rows": self.expert_ffn_size}

    def mcore_options(self, dims: ParallelDims, backend: Backend) -> dict[str, Any]:
        """See :meth:`Qwen3Spec.mcore_options`.

        The router's product and softmax are float32. It balances nothing: an auxiliary loss would pull the student
        away from the teacher, whose routing is the balanced one of pre-training.
        """
        sparse = [int(self.experts_in(layer) > 0) for layer in range(self.num_layers)]
        return {
            "num_moe_experts": self.experts,
            "moe_ffn_hidden_size": self.expert_ffn_size,
            # Checkpoints of uniform layers have another, more compact form.
            "moe_layer_freq": 1 if all(sparse) else sparse,
            "moe_router_topk": self.experts_per_token,
            # Softmax over the chosen experts' logits equals that over all of them, normalised to the chosen.
            "moe_router_pre_softmax": not self.normalized,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
            "expert_model_parallel_size": dims.ep,
            "expert_tensor_parallel_size": dims.etp,
        }
