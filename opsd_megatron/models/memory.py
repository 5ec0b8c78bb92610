"""What a run needs of a GPU's memory, by a formula, before there is a GPU.

Weights, gradients and optimizer state are counted parameter by parameter on the mesh and are exact. Activations are
what Transformer Engine's layers keep for backward, by the shapes of a layer; allocators add to that. ``OTHER`` stands
for what no formula here covers. 1 GB is 10^9 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from opsd_megatron.config import Config, LoraConfig
from opsd_megatron.models.qwen3 import Qwen3Spec
from opsd_megatron.models.rules import EMBEDDING, FINAL_NORM, HEAD
from opsd_megatron.models.stages import stage_layers
from opsd_megatron.models.weight_map import Placement, placements, shard_shape

# Two chunks of float32 logits of each side (losses/head.py), and as much again for gradients in the model's dtype.
LOSS_WORKSPACE = 5 * 2**29
# CUDA's context, NCCL's buffers, workspaces of matrix products, fragmentation.
OTHER = 4 * 10**9
# Prompts are not known here; where data.max_prompt_tokens is not set, so many tokens are reckoned with.
_PROMPT_TOKENS = 2048
_FLOAT32 = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device of the rank that holds most.

    Attributes:
        weights: The student, adapters included.
        gradients: Float32 gradients of what trains.
        optimizer: Adam's moments and, of a bfloat16 model, the float32 weights of what trains; this rank's share.
        teacher: Weights that only the teacher uses; of ``trust_region`` also the copies of two heads that a step makes.
        offloaded: What of these is not on the device while the engine samples (``train.offload``, ``teacher.offload``).
        activations: What backward needs of the micro-batches in flight, and one layer's temporaries.
        engine_weights: The engine's weights, part of what ``rollout.memory_fraction`` reserves while it samples.
        cache_token: The engine's cache for one token, part of that as well.
        checkpoint: A checkpoint on disk, all ranks' parts together.
    """

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    offloaded: int
    activations: int
    engine_weights: int
    cache_token: int
    checkpoint: int

    @property
    def resident(self) -> int:
        """What stays from the first step to the last."""
        return self.weights + self.gradients + self.optimizer + self.teacher + OTHER

    @property
    def training(self) -> int:
        """The peak of an update; the engine sleeps."""
        return self.resident + self.activations + LOSS_WORKSPACE

    def sampling(self, reserved: int) -> int:
        """The peak while the engine samples, with ``reserved`` bytes of its own."""
        return self.resident - self.offloaded + reserved

    def cache_tokens(self, reserved: int) -> int:
        """Tokens of all sequences together that fit the engine's cache; 0 or less: it does not start."""
        return (reserved - self.engine_weights - LOSS_WORKSPACE) // self.cache_token

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "teacher": self.teacher,
            "other": OTHER,
            "activations and loss": self.activations + LOSS_WORKSPACE,
        }
        listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
        engine = f"engine {self.engine_weights / 1e9:.1f} and its cache" if self.engine_weights else "no engine"
        return (
            f"estimated GB of each GPU: {listed}: {self.training / 1e9:.1f} in an update; "
            f"{self.sampling(0) / 1e9:.1f} while sampling, beside the {engine}\n"
            f"a checkpoint takes {self.checkpoint / 1e9:.1f} GB on disk"
        )


def estimate_memory(
    spec: Qwen3Spec, config: Config, world_size: int, *, separate: Qwen3Spec | None = None
) -> MemoryEstimate:
    """The memory of the busiest rank.

    Args:
        spec: The model.
        config: A valid run.
        world_size: Its processes, one for each GPU.
        separate: The teacher of ``teacher.policy=separate``.
    """
    parallel = config.parallel
    size = 2 if config.model.dtype == "bfloat16" else _FLOAT32
    model, adapters = stage_parameters(spec, config), adapter_parameters(spec, config)
    teachers, heads = _teacher_parameters(separate or spec, config)
    stage = max(range(parallel.pipeline), key=lambda stage: sum(model[stage]) + teachers[stage] + heads[stage])
    held, added = sum(model[stage]), sum(adapters[stage])
    dense, expert = adapters[stage] if config.lora.rank else model[stage]
    # Ranks that share out the optimizer's state of a parameter: those with equal weights.
    copies = world_size // (parallel.tensor * parallel.pipeline)
    expert_copies = world_size // (parallel.pipeline * parallel.expert * config.parallel.expert_parts)
    if not parallel.distributed_optimizer:
        copies = expert_copies = 1
    state = 3 * _FLOAT32 if size == 2 else 2 * _FLOAT32
    total = sum(_size(place, 1, spec=spec) for place in placements(spec))
    gradients, optimizer = (dense + expert) * _FLOAT32, state * (dense // copies + expert // expert_copies)
    teacher = teachers[stage] * size
    if config.teacher_holds.average:
        whole, experts = model[stage]
        teacher += _FLOAT32 * (whole // copies + experts // expert_copies)
    leaves = gradients + (optimizer if size == 2 else 0) if config.train.offload else 0
    return MemoryEstimate(
        weights=(held + added) * size,
        gradients=gradients,
        optimizer=optimizer,
        teacher=teacher + heads[stage] * size,
        offloaded=leaves + (teacher if config.teacher.offload else 0) + heads[stage] * size,
        activations=_activations(spec, config),
        engine_weights=(total + _repeated(spec, config)) * size // config.engine_tensor if config.needs_engine else 0,
        checkpoint=_checkpoint(spec, config, total),
        cache_token=cache_token_bytes(spec, config),
    )


def cache_token_bytes(spec: Qwen3Spec, config: Config) -> int:
    """Bytes of one token's keys and values in a rank's part of the rollout engine."""
    size = 2 if config.model.dtype == "bfloat16" else _FLOAT32
    return 2 * size * spec.num_layers * max(spec.num_kv_heads // config.engine_tensor, 1) * spec.head_dim


def _repeated(spec: Qwen3Spec, config: Config) -> int:
    """Parameters of the key/value heads that an engine of more ranks than heads holds again."""
    copies = max(config.engine_tensor // spec.num_kv_heads, 1) - 1
    return copies * 2 * spec.num_kv_heads * spec.head_dim * spec.hidden_size * spec.num_layers


def _checkpoint(spec: Qwen3Spec, config: Config, total: int) -> int:
    """Bytes of a checkpoint: all weights, those beneath adapters too, and what training and teacher go on with.

    Args:
        spec: The model.
        config: The run.
        total: The model's parameters.
    """
    size = 2 if config.model.dtype == "bfloat16" else _FLOAT32
    added = sum(_adapter_size(place, 1, spec=spec, lora=config.lora) for place in placements(spec))
    # Moments, and the float32 weights beside them; the distributed optimizer stores these of a float32 model too.
    state = (3 if size == 2 or config.parallel.distributed_optimizer else 2) * _FLOAT32 * (added or total)
    teacher = {"nothing": 0, "copy": size, "average": _FLOAT32}[config.teacher_holds.saved]
    return (total + added) * size + state + teacher * total


def _teacher_parameters(spec: Qwen3Spec, config: Config) -> tuple[list[int], list[int]]:
    """For each pipeline rank, the teacher's own parameters on one of its ranks, and those of heads copied in a step."""
    stages = config.parallel.pipeline
    if not config.teacher_holds.copy:
        return [0] * stages, [0] * stages
    heads = [0] * stages
    if config.teacher_holds.heads:
        heads[-1] = 2 * _size(Placement(EMBEDDING), config.parallel.tensor, spec=spec)  # laid side by side
    return [sum(stage) for stage in stage_parameters(spec, config)], heads


def stage_parameters(spec: Qwen3Spec, config: Config) -> list[tuple[int, int]]:
    """For each pipeline rank, the model's parameters on one of its ranks, outside and inside experts."""
    stages = _by_stage(spec, config, partial(_size, spec=spec))
    if spec.tied and config.parallel.pipeline > 1:  # the last stage holds a copy of the embedding as its head
        dense, expert = stages[-1]
        stages[-1] = dense + _size(Placement(EMBEDDING), config.parallel.tensor, spec=spec), expert
    return stages


def adapter_parameters(spec: Qwen3Spec, config: Config) -> list[tuple[int, int]]:
    """The same of its adapters (``lora``)."""
    return _by_stage(spec, config, partial(_adapter_size, spec=spec, lora=config.lora))


def _by_stage(spec: Qwen3Spec, config: Config, size: Callable[[Placement, int], int]) -> list[tuple[int, int]]:
    """Sums of ``size(place, tp)`` over what one rank of each stage holds, outside and inside experts."""
    parallel = config.parallel
    ranks = stage_layers(spec.num_layers, pp=parallel.pipeline, vpp=parallel.virtual_stages)
    stage_of = {layer: rank for rank, chunks in enumerate(ranks) for layers in chunks for layer in layers}
    outside = {EMBEDDING: 0, FINAL_NORM: parallel.pipeline - 1, HEAD: parallel.pipeline - 1}
    dense, expert = [0] * parallel.pipeline, [0] * parallel.pipeline
    for place in placements(spec):
        stage = outside[place.rule] if place.layer is None else stage_of[place.layer]
        if place.expert is None:
            dense[stage] += size(place, parallel.tensor)
        elif place.expert < spec.num_experts // parallel.expert:  # those of the first expert-parallel rank
            expert[stage] += size(place, config.parallel.expert_parts)
    return list(zip(dense, expert, strict=True))


def _size(place: Placement, tp: int, *, spec: Qwen3Spec) -> int:
    return math.prod(shard_shape(place, spec, tp))


def _adapter_size(place: Placement, tp: int, *, spec: Qwen3Spec, lora: LoraConfig) -> int:
    """Elements of A ``[rank, in]`` and B ``[out, rank]``, of which one is cut where the weight is (``models.lora``)."""
    size = 0
    for name in place.hf_names:
        if name.split(".")[-2] in lora.targets:
            rows, columns = spec.tensor_shape(name)
            cut, whole = (columns, rows) if place.rule.kind == "columns" else (rows, columns)
            size += lora.rank * (cut // tp + whole)
    return size


def _activations(spec: Qwen3Spec, config: Config) -> int:
    """Bytes of activations at the peak of an update, on the first pipeline rank: most micro-batches in flight.

    Counted in elements of a token and layer, for a sequence-parallel region of 1/sp and a tensor-parallel one of 1/tp:
    the residual stream before attention and before the MLP and both norms' outputs, 4 h / sp; query, key and value
    before and after their norms and turned by the rotary embedding, and attention's output, (4 q + 4 k) / tp; the MLP's
    gate and up projections, activation and product, 4 f / tp. Ranks that share a key/value head have it whole, and
    keep what they gather for that, q + 2 k. With experts, each token's MLP part is that of the experts it goes through,
    and what they are sent and return, if the router shares tokens out evenly.
    """
    parallel, recompute = config.parallel, config.model.recompute
    tp = parallel.tensor
    sp = tp if parallel.sequence else 1
    sample = (config.data.max_prompt_tokens or _PROMPT_TOKENS) + config.rollout.max_new_tokens
    tokens = max(config.train.tokens_per_micro_batch, sample) // parallel.context
    size = 2 if config.model.dtype == "bfloat16" else _FLOAT32
    heads = 4 * (spec.num_heads / tp + max(spec.num_kv_heads / tp, 1))
    if tp > spec.num_kv_heads:
        heads += spec.num_heads + 2 * spec.num_kv_heads
    attention = 4 * spec.hidden_size / sp + heads * spec.head_dim
    mlp = max(_mlp_elements(spec, config, layer, sp) for layer in range(spec.num_layers))
    kept = {"none": attention + mlp, "selective": attention, "full": spec.hidden_size / sp}[recompute]
    chunks = parallel.pipeline * parallel.virtual_stages
    layers = -(-spec.num_layers // chunks)
    # One forward, one backward: the first rank starts as many micro-batches as there are stages. Interleaved, chunks:
    # 2 (pp - 1) + (vpp - 1) pp to warm up, and the one at work.
    in_flight = parallel.pipeline if parallel.virtual_stages == 1 else chunks + parallel.pipeline - 1
    return int(tokens * size * (kept * layers * in_flight + attention + mlp))


def _mlp_elements(spec: Qwen3Spec, config: Config, layer: int, sp: int) -> float:
    used, rows = spec.experts_used(layer)
    if not used:
        return 4 * spec.ffn_size / config.parallel.tensor
    # Each token goes to as many experts as it chooses, and to all the ranks that an expert is cut over.
    parts = config.parallel.expert_parts
    return used * parts / sp * (2 * spec.hidden_size + 4 * rows / parts)
