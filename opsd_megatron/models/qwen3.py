"""A dense Qwen3: what its ``config.json`` says, the rules it sets for a run, and Megatron-Core's configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from opsd_megatron.config import Config, LoraConfig
from opsd_megatron.distributed.parallel import ParallelDims
from opsd_megatron.errors import ConfigError
from opsd_megatron.models.backends import Backend, groups_experts, has_fused_weight_gradient
from opsd_megatron.models.config_file import ConfigFile
from opsd_megatron.models.rope import Yarn, read_rope
from opsd_megatron.models.rules import ATTENTION, MLP, NORMS, Rule
from opsd_megatron.models.stages import stage_layers

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Qwen3Spec:
    """A dense Qwen3 as its ``config.json`` describes it, and what other families of the kind build on.

    A field's ``key`` is what ``config.json`` calls it where that is another name, for messages.

    Attributes:
        num_layers: Transformer layers.
        hidden_size: H.
        ffn_size: Rows of each of the gate and up projections.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        head_dim: Size of one head; not ``hidden_size / num_heads``.
        vocab_size: V, the true vocabulary.
        rope_theta: Base of the rotary embedding.
        rms_norm_eps: Epsilon of every norm.
        tied: Whether the output head is the embedding.
        max_positions: Longest sequence the model was made for.
        yarn: How the rotary embedding is stretched, if it is.
    """

    num_layers: int = field(metadata={"key": "num_hidden_layers"})
    hidden_size: int
    ffn_size: int = field(metadata={"key": "intermediate_size"})
    num_heads: int = field(metadata={"key": "num_attention_heads"})
    num_kv_heads: int = field(metadata={"key": "num_key_value_heads"})
    head_dim: int
    vocab_size: int
    rope_theta: float
    rms_norm_eps: float
    tied: bool = field(metadata={"key": "tie_word_embeddings"})
    max_positions: int = field(metadata={"key": "max_position_embeddings"})
    yarn: Yarn | None = field(default=None, metadata={"key": "rope_scaling"})

    @classmethod
    def read(cls, config: ConfigFile) -> Self:
        """Read and check what ``config.json`` says.

        Raises:
            ModelError: Names the file and the key at fault.
        """
        _check_supported(config)
        spec = cls(**cls.values(config))
        if spec.num_heads % spec.num_kv_heads:
            config.fail(
                f"num_attention_heads={spec.num_heads} is not a multiple of num_key_value_heads={spec.num_kv_heads}"
            )
        if spec.head_dim % 2:
            config.fail(f"head_dim={spec.head_dim} is odd; the rotary embedding needs an even one")
        return spec

    @classmethod
    def values(cls, config: ConfigFile) -> dict[str, Any]:
        """The fields, read from ``config``."""
        rope_theta, yarn = read_rope(config)
        return {
            "num_layers": config.integer("num_hidden_layers"),
            "hidden_size": config.integer("hidden_size"),
            "ffn_size": config.integer("intermediate_size"),
            "num_heads": config.integer("num_attention_heads"),
            "num_kv_heads": config.integer("num_key_value_heads"),
            "head_dim": config.integer("head_dim"),
            "vocab_size": config.integer("vocab_size"),
            "rope_theta": rope_theta,
            "rms_norm_eps": float(config.number("rms_norm_eps")),
            "tied": config.flag("tie_word_embeddings"),
            "max_positions": config.integer("max_position_embeddings"),
            "yarn": yarn,
        }

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of the embedding over all of ``tp`` shards: V, rounded up so that shards are equal."""
        return -(-self.vocab_size // tp) * tp

    def experts_in(self, layer: int) -> int:
        """Experts of a layer (from 0); 0 where it has a plain MLP."""
        return 0

    def experts_used(self, layer: int) -> tuple[int, int]:
        """Experts of a layer (from 0) that a token goes through, and FFN rows of each; 0 and 0 for a plain MLP."""
        return 0, 0

    @property
    def num_experts(self) -> int:
        """Experts of the layers that have any; 0 for a dense model."""
        return max(self.experts_in(layer) for layer in range(self.num_layers))

    def layer_rules(self, layer: int) -> tuple[Rule, ...]:
        """The kinds of parameters a layer has, in the order in which transformers writes them."""
        return (*ATTENTION, *MLP, *NORMS)

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """Shape of the Hugging Face tensor ``name``."""
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "embed_tokens": (self.vocab_size, self.hidden_size),
            "lm_head": (self.vocab_size, self.hidden_size),
            "q_proj": (query, self.hidden_size),
            "k_proj": (key, self.hidden_size),
            "v_proj": (key, self.hidden_size),
            "o_proj": (self.hidden_size, query),
            "q_norm": (self.head_dim,),
            "k_norm": (self.head_dim,),
            "gate_proj": (self.ffn_size, self.hidden_size),
            "up_proj": (self.ffn_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.ffn_size),
            "input_layernorm": (self.hidden_size,),
            "post_attention_layernorm": (self.hidden_size,),
            "norm": (self.hidden_size,),
        }
        return shapes[name.split(".")[-2]]

    def sharded_sizes(self) -> dict[str, int]:
        """What tensor parallelism cuts, by name; see :func:`_fitting`."""
        return {"attention heads": self.num_heads, "key/value heads": self.num_kv_heads, "FFN rows": self.ffn_size}

    def expert_sizes(self) -> dict[str, int]:
        """What expert tensor parallelism cuts and must divide, by name."""
        return {}

    def mcore_options(self, dims: ParallelDims, backend: Backend) -> dict[str, Any]:
        """Fields of Megatron-Core's configuration beyond those of every model."""
        return {}


def _check_supported(config: ConfigFile) -> None:
    """What Qwen3's configuration classes allow and this package does not build."""
    if config.get("use_sliding_window"):
        config.fail("use_sliding_window=true is not supported")
    if other := sorted(set(config.list_of(str, "layer_types")) - {"full_attention"}):
        config.fail(f"layer_types {', '.join(other)} not supported, only full_attention")
    if config.get("attention_bias"):
        config.fail("attention_bias=true is not supported; published Qwen3 models have none")
    if config.get("hidden_act", "silu") != "silu":
        config.fail(f"hidden_act={config.get('hidden_act')!r} is not supported, only 'silu'")
    if config.get("quantization_config"):
        config.fail("quantization_config: the weights are quantized; training needs the unquantized model")
    if config.get("dual_chunk_attention_config"):
        config.fail("dual_chunk_attention_config is not supported; use the config.json for up to 262,144 tokens")


def check_mesh(spec: Qwen3Spec, config: Config) -> None:
    """Check every rule that ties the run's configuration to the model's dimensions.

    The vocabulary sets none: it is padded to a multiple of ``parallel.tensor``.

    Raises:
        ConfigError: Names the keys, their values and values that would work.
    """
    check_sizes(spec, config)
    length = config.model.max_length
    if length is not None and length > spec.max_positions:
        raise ConfigError(
            f"model.max_length={length} is above the model's max_position_embeddings; use at most {spec.max_positions}"
            + _yarn_reach(spec)
        )
    _check_experts(spec, config)
    check_adapters(spec, config.lora, config, "lora.targets", otherwise="leave these out of lora.targets")
    if config.needs_engine:
        _check_engine(spec, config)


def _yarn_reach(spec: Qwen3Spec) -> str:
    """Where YaRN reaches further than ``max_position_embeddings`` says, what to set that to."""
    reach = 0 if spec.yarn is None else int(spec.yarn.factor * spec.yarn.original_positions)
    if reach <= spec.max_positions:
        return ""
    return f", or raise max_position_embeddings in its config.json to {reach}, which its rope_scaling is made for"


def check_sizes(spec: Qwen3Spec, config: Config) -> None:
    """Check that a model, the one that trains or another, can be cut as the mesh asks for.

    Raises:
        ConfigError: Names the keys, their values and values that would work.
    """
    tp, pp, vpp = config.parallel.tensor, config.parallel.pipeline, config.parallel.virtual_stages
    _check_tensor("parallel.tensor", tp, spec, spec.sharded_sizes())
    rows = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    if rows % tp:
        raise ConfigError(
            f"parallel.tensor={tp} does not divide the model's {rows} query, key and value rows; lower it"
        )
    if spec.num_layers < pp * vpp:
        keys = f"parallel.pipeline={pp}" + (f" * parallel.virtual_stages={vpp}" if vpp > 1 else "")
        raise ConfigError(
            f"{keys} makes more stages than the model has layers, {spec.num_layers}; lower "
            f"{'one of them' if vpp > 1 else 'it'}"
        )
    if spec.num_experts:
        _check_expert_sizes(spec, config)


def check_adapters(spec: Qwen3Spec, lora: LoraConfig, config: Config, where: str, *, otherwise: str) -> None:
    """Check that a model cut as the mesh asks for can have adapters.

    Args:
        spec: The model.
        lora: The adapters, those of the run or of a checkpoint.
        config: The run.
        where: What says so, for the message.
        otherwise: What helps beside a smaller ``parallel.tensor``.

    Raises:
        ConfigError: Ranks share key/value heads, and so have query, key and value rows in unequal parts.
    """
    tensor, heads = config.parallel.tensor, spec.num_kv_heads
    fused = [name for name in lora.targets if name in ("q_proj", "k_proj", "v_proj")]
    if lora.rank and fused and tensor > heads:
        raise ConfigError(
            f"{where} has {', '.join(fused)}, which parallel.tensor={tensor} leaves no adapters: it is more than the "
            f"model's {heads} key/value heads; use at most {heads}, or {otherwise}"
        )


def _check_expert_sizes(spec: Qwen3Spec, config: Config) -> None:
    parallel = config.parallel
    if spec.num_experts % parallel.expert:
        raise ConfigError(
            f"parallel.expert={parallel.expert} does not divide the model's {spec.num_experts} experts; "
            f"{_one_of(_divisors(spec.num_experts))} would"
        )
    for name, size in spec.expert_sizes().items():
        if size % config.parallel.expert_parts:
            works = [n for n in _divisors(size) if n <= parallel.tensor]
            raise ConfigError(
                f"parallel.expert_tensor={config.parallel.expert_parts} does not divide the model's {size} {name}; "
                f"{_one_of(works)} would"
            )
    if parallel.tensor > 1 and not parallel.sequence:
        raise ConfigError(
            f"a model with experts and parallel.tensor={parallel.tensor} needs parallel.sequence=true: Megatron-Core "
            "routes each token from the one rank that holds its part of the sequence"
        )


def _check_experts(spec: Qwen3Spec, config: Config) -> None:
    """What holds for experts that train."""
    parallel = config.parallel
    if not spec.num_experts:
        for key in ("parallel.expert", "parallel.expert_tensor"):
            if (config.get(key) or 1) > 1:
                raise ConfigError(f"{key}={config.get(key)} needs a model with experts, this one has none; use {key}=1")
        return
    stages = stage_layers(spec.num_layers, pp=parallel.pipeline, vpp=parallel.virtual_stages)
    for stage, chunks in enumerate(stages):
        if parallel.distributed_optimizer and not any(spec.experts_in(layer) for layers in chunks for layer in layers):
            raise ConfigError(
                f"parallel.pipeline={parallel.pipeline} leaves rank {stage} of the pipeline no layer with experts, "
                "which Megatron-Core's distributed optimizer cannot save; use fewer stages or "
                "parallel.distributed_optimizer=false"
            )


def _check_engine(spec: Qwen3Spec, config: Config) -> None:
    _check_tensor("rollout.tensor", config.engine_tensor, spec, spec.sharded_sizes() | spec.expert_sizes())


def _check_tensor(key: str, tensor: int, spec: Qwen3Spec, sizes: dict[str, int]) -> None:
    works = _fitting(spec, sizes)
    if tensor not in works:
        found = ", ".join(f"{size} {name}" for name, size in sizes.items())
        raise ConfigError(f"{key}={tensor} does not fit the model's {found}; {_one_of(works)} would")


def _fitting(spec: Qwen3Spec, sizes: dict[str, int]) -> list[int]:
    """Tensor-parallel sizes that divide all of ``sizes``; of key/value heads there may also be fewer.

    Ranks then share them, equally many each.
    """
    heads = spec.num_kv_heads
    divided = math.gcd(*(size for name, size in sizes.items() if name != "key/value heads"))
    return [n for n in _divisors(divided) if heads % n == 0 or n % heads == 0]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _one_of(values: list[int]) -> str:
    return " or ".join(map(str, values))


def transformer_config(spec: Qwen3Spec, config: Config, dims: ParallelDims, backend: Backend) -> TransformerConfig:
    """Megatron-Core's configuration of this model on this mesh.

    Fusions: dropout and biases do not exist in Qwen3 and masked softmax belongs to an attention that is not used, so
    their fusions are off. What Megatron-Core calls that of bias and activation is SwiGLU as one compiled kernel each
    way, which keeps its input alone for the backward pass: two tensors as wide as the MLP fewer. Fused rotary embedding
    comes with Transformer Engine; adding weight gradients straight into the gradient buffer needs Apex's extension,
    which Transformer Engine's layers do not, but the output layer, built from Megatron-Core's own linear layer under
    either backend, asks for it.
    """
    dtype = _DTYPES[config.model.dtype]
    on_cuda = dims.device.type == "cuda"
    recompute = config.model.recompute
    made = TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_size,
        num_attention_heads=spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=spec.rms_norm_eps,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=dims.tp,
        pipeline_model_parallel_size=dims.pp,
        virtual_pipeline_model_parallel_size=dims.vpp if dims.vpp > 1 else None,
        pipeline_model_parallel_layout=_layout(spec, dims) if dims.pp > 1 else None,
        sequence_parallel=dims.sequence_parallel,
        context_parallel_size=dims.cp,
        # Weights are loaded, never drawn.
        perform_initialization=False,
        use_cpu_initialization=not on_cuda,
        # The loss is a sum; Megatron-Core divides by the step's tokens over the whole world.
        calculate_per_token_loss=True,
        # Micro-batches are packed to different lengths, so stages exchange shapes first.
        variable_seq_lengths=True,
        # Megatron-Core's rule for variable lengths looks at this also where there are no experts.
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=spec.num_experts > 0 and groups_experts(backend, config.lora),
        # Batched point-to-point is NCCL's grouping of sends with receives; gloo has none. The interleaved schedule over
        # two ranks would mix up what goes to the next and the previous rank, which are the same one: it communicates
        # forward and backward separately, overlapped with computation.
        batch_p2p_comm=on_cuda and dims.vpp == 1,
        overlap_p2p_comm=dims.vpp > 1,
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        # Not attention, of which the kernels in use keep little anyway.
        recompute_modules=["mlp", "moe"] if recompute == "selective" else None,
        # For packed sequences the fused kernel leaves out YaRN's attention factor (mcore 0.16.1, rope_utils.py).
        apply_rope_fusion=backend == "transformer_engine" and spec.yarn is None,
        gradient_accumulation_fusion=on_cuda and has_fused_weight_gradient(),
        bias_activation_fusion=on_cuda,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **spec.mcore_options(dims, backend),
    )
    for name, value in ({} if spec.yarn is None else spec.yarn.mcore_options()).items():
        setattr(made, name, value)
    return made


def _layout(spec: Qwen3Spec, dims: ParallelDims) -> list[list[str]]:
    """The layers of each stage as Megatron-Core lists them: in the order in which the model passes through them."""
    ranks = stage_layers(spec.num_layers, pp=dims.pp, vpp=dims.vpp)
    layout = [["decoder"] * len(ranks[rank][chunk]) for chunk in range(dims.vpp) for rank in range(dims.pp)]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout
