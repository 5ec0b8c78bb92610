"""What a Qwen3's ``config.json`` says, the rules it sets for a run, and Megatron-Core's configuration from both."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from opsd_megatron.config import Config
from opsd_megatron.distributed.parallel import ParallelDims
from opsd_megatron.errors import ConfigError, ModelError
from opsd_megatron.models.backends import Backend, has_fused_weight_gradient
from opsd_megatron.models.stages import stage_layers

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt"]


@dataclass(frozen=True)
class Qwen3Spec:
    """A dense Qwen3 as its ``config.json`` describes it. ``head_dim`` is not ``hidden_size / num_heads``.

    Attributes:
        num_layers: Transformer layers.
        hidden_size: H.
        ffn_size: Rows of each of the gate and up projections.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        head_dim: Size of one head.
        vocab_size: V, the true vocabulary.
        rope_theta: Base of the rotary embedding.
        rms_norm_eps: Epsilon of every norm.
        tied: Whether the output head is the embedding.
        max_positions: Longest sequence the model was made for.
    """

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float
    rms_norm_eps: float
    tied: bool
    max_positions: int

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of the embedding over all of ``tp`` shards: V, rounded up so that shards are equal."""
        return -(-self.vocab_size // tp) * tp


def resolve_model_path(path_or_name: str | Path, *, option: str = "model.path") -> Path:
    """The local directory of a model: the directory itself, or the Hub's snapshot, downloaded where needed.

    The download is of the whole model, weights included, also where the caller only checks a configuration: the check
    compares tensor names and shapes too, and a run that follows finds everything in the Hub's cache.

    Ranks: may be called by any rank alone. Downloads are shared through the Hub's cache on each host.

    Args:
        path_or_name: Directory or Hub name.
        option: What the user set it with, for messages.

    Raises:
        ModelError: Neither a directory nor a model that can be had from the Hub.
    """
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_name)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(f"{option}={name} is not a directory; pass a Hugging Face directory or a Hub name (org/model)")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # The Hub client raises many unrelated types: network, HTTP, validation, cache.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{option}={name} is not a local directory and cannot be downloaded from the Hugging Face Hub: {reason}"
        ) from error


def read_spec(path: str | Path) -> Qwen3Spec:
    """Read and check ``config.json``.

    Args:
        path: Hugging Face directory.

    Raises:
        ModelError: Names the file and the key at fault, or the architecture found instead of Qwen3.
    """
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        raise ModelError(f"model directory {path} does not exist")
    if not file.is_file():
        raise ModelError(f"{file} is missing: {path} is not a Hugging Face model directory")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{file} holds a JSON {type(raw).__name__}, not an object")
    if raw.get("model_type") != "qwen3":
        raise ModelError(f"{file}: model_type is {raw.get('model_type')!r}; only dense Qwen3 ('qwen3') is supported")
    _check_supported(raw, file)
    spec = Qwen3Spec(
        num_layers=_positive(raw, "num_hidden_layers", file),
        hidden_size=_positive(raw, "hidden_size", file),
        ffn_size=_positive(raw, "intermediate_size", file),
        num_heads=_positive(raw, "num_attention_heads", file),
        num_kv_heads=_positive(raw, "num_key_value_heads", file),
        head_dim=_positive(raw, "head_dim", file),
        vocab_size=_positive(raw, "vocab_size", file),
        rope_theta=_rope_theta(raw, file),
        rms_norm_eps=float(_number(raw, "rms_norm_eps", file)),
        tied=bool(_required(raw, "tie_word_embeddings", file)),
        max_positions=_positive(raw, "max_position_embeddings", file),
    )
    if spec.num_heads % spec.num_kv_heads:
        raise ModelError(
            f"{file}: num_attention_heads={spec.num_heads} is not a multiple of num_key_value_heads={spec.num_kv_heads}"
        )
    if spec.head_dim % 2:
        raise ModelError(f"{file}: head_dim={spec.head_dim} is odd; the rotary embedding needs an even one")
    return spec


def _required(raw: dict[str, Any], key: str, file: Path) -> Any:
    if raw.get(key) is None:
        raise ModelError(f"{file}: {key} is missing")
    return raw[key]


def _number(raw: dict[str, Any], key: str, file: Path) -> int | float:
    value = _required(raw, key, file)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ModelError(f"{file}: {key}={value!r} is not a positive number")
    return value


def _positive(raw: dict[str, Any], key: str, file: Path) -> int:
    value = _number(raw, key, file)
    if not isinstance(value, int):
        raise ModelError(f"{file}: {key}={value!r} is not an integer")
    return value


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """Transformers 5 writes ``rope_parameters``; before, ``rope_theta`` beside an optional ``rope_scaling``."""
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    if raw.get("rope_theta") is not None:
        rope.setdefault("rope_theta", raw["rope_theta"])
    return rope


def _rope_theta(raw: dict[str, Any], file: Path) -> float:
    rope = _rope(raw)
    if rope.get("rope_theta") is None:
        raise ModelError(f"{file}: rope_theta is missing, also from rope_parameters")
    return float(_number(rope, "rope_theta", file))


def _check_supported(raw: dict[str, Any], file: Path) -> None:
    """What Qwen3's configuration class allows and this package does not build."""
    rope = _rope(raw)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ModelError(f"{file}: rotary scaling {kind!r} is not supported; remove it to use the model unscaled")
    if raw.get("use_sliding_window"):
        raise ModelError(f"{file}: use_sliding_window=true is not supported")
    if other := sorted(set(raw.get("layer_types") or ()) - {"full_attention"}):
        raise ModelError(f"{file}: layer_types {', '.join(map(str, other))} not supported, only full_attention")
    if raw.get("attention_bias"):
        raise ModelError(f"{file}: attention_bias=true is not supported; published Qwen3 models have none")
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{file}: hidden_act={raw['hidden_act']!r} is not supported, only 'silu'")
    if raw.get("quantization_config") is not None:
        raise ModelError(f"{file}: the weights are quantized; training needs the unquantized model")


def check_mesh(spec: Qwen3Spec, config: Config) -> None:
    """Check every rule that ties the run's configuration to the model's dimensions.

    The vocabulary sets none: it is padded to a multiple of ``parallel.tensor``.

    Raises:
        ConfigError: Names the keys, their values and values that would work.
    """
    dimensions = {"attention heads": spec.num_heads, "key/value heads": spec.num_kv_heads, "FFN rows": spec.ffn_size}
    tp, pp, vpp = config.parallel.tensor, config.parallel.pipeline, config.parallel.virtual_stages
    for name, size in dimensions.items():
        if size % tp:
            works = [n for n in _divisors(spec.num_kv_heads) if all(s % n == 0 for s in dimensions.values())]
            raise ConfigError(f"parallel.tensor={tp} does not divide the model's {size} {name}; {_one_of(works)} would")
    if spec.num_layers < pp * vpp:
        keys = f"parallel.pipeline={pp}" + (f" * parallel.virtual_stages={vpp}" if vpp > 1 else "")
        raise ConfigError(
            f"{keys} makes more stages than the model has layers, {spec.num_layers}; lower "
            f"{'one of them' if vpp > 1 else 'it'}"
        )
    length = config.model.max_length
    if length is not None and length > spec.max_positions:
        raise ConfigError(
            f"model.max_length={length} is above the model's max_position_embeddings; use at most {spec.max_positions}"
        )
    if config.needs_engine:
        _check_engine(spec, config)


def _check_engine(spec: Qwen3Spec, config: Config) -> None:
    tensor = config.engine_tensor
    # The engine replicates key/value heads where it has more ranks than heads.
    shared = spec.num_kv_heads % tensor == 0 or tensor % spec.num_kv_heads == 0
    if spec.num_heads % tensor or spec.ffn_size % tensor or not shared:
        raise ConfigError(
            f"rollout.tensor={tensor} does not fit the model's {spec.num_heads} attention heads, {spec.num_kv_heads} "
            f"key/value heads and {spec.ffn_size} FFN rows; {config.parallel.tensor}, as parallel.tensor, would"
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _one_of(values: list[int]) -> str:
    return " or ".join(map(str, values))


def transformer_config(spec: Qwen3Spec, config: Config, dims: ParallelDims, backend: Backend) -> TransformerConfig:
    """Megatron-Core's configuration of this model on this mesh.

    Fusions: bias and dropout do not exist in Qwen3 and masked softmax belongs to an attention that is not used, so
    their fusions are off. Fused rotary embedding comes with Transformer Engine; adding weight gradients straight into
    the gradient buffer needs Apex's extension, which Transformer Engine's layers do not, but the output layer, built
    from Megatron-Core's own linear layer under either backend, asks for it.
    """
    dtype = _DTYPES[config.model.dtype]
    on_cuda = dims.device.type == "cuda"
    recompute = config.model.recompute
    return TransformerConfig(
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
        # Weights are loaded, never drawn.
        perform_initialization=False,
        use_cpu_initialization=not on_cuda,
        # The loss is a sum; Megatron-Core divides by the step's tokens over the whole world.
        calculate_per_token_loss=True,
        # Micro-batches are packed to different lengths, so stages exchange shapes first.
        variable_seq_lengths=True,
        # No experts here, but Megatron-Core's rule for variable lengths looks at this all the same.
        moe_token_dispatcher_type="alltoall",
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
        apply_rope_fusion=backend == "transformer_engine",
        gradient_accumulation_fusion=on_cuda and has_fused_weight_gradient(),
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


def _layout(spec: Qwen3Spec, dims: ParallelDims) -> list[list[str]]:
    """The layers of each stage as Megatron-Core lists them: in the order in which the model passes through them."""
    ranks = stage_layers(spec.num_layers, pp=dims.pp, vpp=dims.vpp)
    layout = [["decoder"] * len(ranks[rank][chunk]) for chunk in range(dims.vpp) for rank in range(dims.pp)]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout
