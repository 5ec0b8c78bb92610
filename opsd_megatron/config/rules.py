"""Every rule on a configuration that needs neither files nor a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, cast

from opsd_megatron.config.lora import check_lora
from opsd_megatron.config.mesh import check_mesh, check_sizes
from opsd_megatron.config.objectives import OBJECTIVES, check_objective
from opsd_megatron.config.privileged import PRIVILEGED, check_privileged
from opsd_megatron.config.teacher import TEACHERS, check_teacher
from opsd_megatron.config.uses import check_uses
from opsd_megatron.errors import ConfigError

if TYPE_CHECKING:
    from opsd_megatron.config import Config

# Hydra's structured configs accept no typing.Literal, so choices are strings checked in validate().
CHOICES: dict[str, tuple[str, ...]] = {
    "model.backend": ("auto", "torch", "transformer_engine"),
    "model.dtype": ("float32", "bfloat16"),
    "model.recompute": ("none", "selective", "full"),
    "objective.name": tuple(OBJECTIVES),
    "objective.clip_mode": ("entry", "bregman", "rescale", "token", "none"),
    "objective.reduction": ("token", "sequence"),
    "objective.top_k_side": ("teacher", "student"),
    "objective.top_k_tail": ("bucket", "renormalise"),
    "objective.entropy_gate_keep": ("low", "high"),
    "teacher.policy": tuple(TEACHERS),
    "data.privileged": tuple(PRIVILEGED),
    "data.boundary": ("own", "student"),
    "rollout.engine": ("vllm", "scripted"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
}


def check(config: Config, world_size: int) -> None:
    """Check every rule.

    Raises:
        ConfigError: Names the key, its value and what would be valid.
    """
    _check_required(config)
    _check_choices(config)
    _check_ranges(config)
    check_mesh(config.parallel, world_size)
    if config.needs_engine:
        _check_engine(config, world_size)
    _check_combinations(config)
    check_lora(config.lora)
    check_teacher(config.teacher)


def check_stand_alone(config: Config, world_size: int) -> None:
    """Check every rule for ``opsd_megatron.evaluate``, which trains nothing and needs no training data.

    Raises:
        ConfigError: Names the key, its value and what would be valid.
    """
    if not (config.model.path or config.model.checkpoint):
        raise ConfigError("neither model.path nor model.checkpoint is set; pass what to evaluate as one of them")
    if not config.evaluation_sets:
        raise ConfigError("no evaluation set is named; pass evaluation.sets=[aime24,...] or data.eval=SOURCE")
    if not config.output_dir:
        raise ConfigError("output_dir is not set; pass output_dir=VALUE on the command line")
    _check_choices(config)
    _check_ranges(config)
    check_sizes(config.parallel)
    if config.rollout.engine != "vllm":
        raise ConfigError(f"rollout.engine={config.rollout.engine} cannot evaluate; pass rollout.engine=vllm")
    _check_engine(config, world_size)
    _check_files(config, "data.student_template")


def _check_required(config: Config) -> None:
    for key in ("model.path", "data.train", "output_dir"):
        if not config.get(key):
            raise ConfigError(f"{key} is not set; pass {key}=VALUE on the command line")


def _check_choices(config: Config) -> None:
    for key, allowed in CHOICES.items():
        if config.get(key) not in allowed:
            raise ConfigError(f"{key}={config.get(key)!r} is not one of {', '.join(allowed)}")


# key -> (least, greatest); None where a side is open. Keys whose value is None are unset and skipped.
_RANGES: dict[str, tuple[float | None, float | None]] = {
    "model.max_length": (2, None),
    "parallel.timeout_minutes": (1, None),
    "objective.beta": (0, 1),
    "objective.top_k": (1, None),
    "objective.importance_cap": (1, None),
    "objective.position_floor": (0, 1),
    "objective.position_midpoint": (0, 1),
    "objective.entropy_gate": (0, None),
    "objective.ratio_clip_low": (0, 1),
    "objective.ratio_clip_high": (0, None),
    "objective.chunk_rows": (1, None),
    "data.max_prompt_tokens": (1, None),
    "data.analysis_max_tokens": (1, None),
    "rollout.tensor": (1, None),
    "rollout.max_new_tokens": (1, None),
    "rollout.samples_per_problem": (1, None),
    "rollout.sleep_level": (1, 2),
    "optimizer.min_lr": (0, None),
    "optimizer.weight_decay": (0, None),
    "optimizer.clip_grad": (0, None),
    "optimizer.warmup_steps": (0, None),
    "optimizer.decay_steps": (1, None),
    "train.steps": (1, None),
    "train.problems_per_step": (1, None),
    "train.updates_per_step": (1, None),
    "train.tokens_per_micro_batch": (2, None),
    "train.seed": (0, 2**31 - 1),
    "evaluation.every": (0, None),
    "evaluation.max_problems": (1, None),
    "evaluation.samples_per_problem": (1, 1000),
    "evaluation.responses_per_call": (1, None),
    "evaluation.temperature": (0, None),
    "evaluation.max_new_tokens": (1, None),
    "evaluation.max_length": (2, None),
    "checkpoint.every": (0, None),
    "checkpoint.keep": (1, None),
}
# As losses.divergences.LEAST_BETA, which is not imported before torch is needed.
_LEAST_BETA = 1e-4
# key -> (above, up to): the lower bound itself is excluded.
_OPEN_RANGES: dict[str, tuple[float, float | None]] = {
    "objective.clip": (0, None),
    "objective.position_width": (0, None),
    "objective.log_ratio_clip": (0, None),
    "objective.grpo_weight": (0, None),
    "rollout.temperature": (0, None),
    "rollout.top_p": (0, 1),
    "rollout.memory_fraction": (0, 1),
    "rollout.kv_cache_gib": (0, None),
    "rollout.max_log_prob_gap": (0, None),
    "optimizer.lr": (0, None),
    "optimizer.eps": (0, None),
    "evaluation.top_p": (0, 1),
    "evaluation.judge_seconds": (0, None),
    "telemetry.peak_tflops": (0, None),
}


def _check_ranges(config: Config) -> None:
    def number(key: str) -> float | None:
        value = config.get(key)
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"{key}={value} is not a finite number")
        return cast("float | None", value)

    for key, (least, greatest) in _RANGES.items():
        value = number(key)
        if value is None:
            continue
        if (least is not None and value < least) or (greatest is not None and value > greatest):
            bounds = f"at least {least}" + ("" if greatest is None else f" and at most {greatest}")
            raise ConfigError(f"{key}={value} must be {bounds}")
    for key, (above, up_to) in _OPEN_RANGES.items():
        value = number(key)
        if value is not None and (value <= above or (up_to is not None and value > up_to)):
            bounds = f"above {above}" + ("" if up_to is None else f" and at most {up_to}")
            raise ConfigError(f"{key}={value} must be {bounds}")
    beta = config.objective.beta
    if 0 < min(beta, 1 - beta) < _LEAST_BETA * (1 - 1e-9):
        raise ConfigError(
            f"objective.beta={beta} is neither 0 nor 1 but nearer than {_LEAST_BETA:g}, where the divergence vanishes; "
            "use 0 for forward KL and 1 for reverse KL"
        )
    for key in ("optimizer.beta1", "optimizer.beta2"):
        if not 0 <= config.get(key) < 1:
            raise ConfigError(f"{key}={config.get(key)} must be at least 0 and below 1")
    for key in ("rollout.top_k", "evaluation.top_k"):
        if config.get(key) != -1 and config.get(key) < 1:
            raise ConfigError(f"{key}={config.get(key)} must be -1 (all candidates) or at least 1")


def _check_engine(config: Config, world_size: int) -> None:
    if world_size % config.engine_tensor:
        raise ConfigError(
            f"engine groups tile the world: rollout.tensor={config.engine_tensor} does not divide the world size "
            f"{world_size}; choose one that does, such as rollout.tensor={math.gcd(config.engine_tensor, world_size)}"
        )


def _check_combinations(config: Config) -> None:
    optimizer, rollout = config.optimizer, config.rollout
    if optimizer.min_lr > optimizer.lr:
        raise ConfigError(f"optimizer.min_lr={optimizer.min_lr} is above optimizer.lr={optimizer.lr}")
    decay_steps = config.train.steps if optimizer.decay_steps is None else optimizer.decay_steps
    if optimizer.schedule != "constant" and optimizer.warmup_steps >= decay_steps:
        raise ConfigError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} leaves no step for the decay, which ends at "
            f"optimizer.decay_steps={decay_steps}"
        )
    if rollout.engine == "scripted":
        if rollout.script is None:
            raise ConfigError("rollout.engine=scripted needs rollout.script, a JSONL file of responses")
        if config.evaluation_sets:
            raise ConfigError("rollout.engine=scripted cannot evaluate; pass data.eval=null or rollout.engine=vllm")
    if config.evaluation.every and not config.evaluation_sets:
        raise ConfigError(f"evaluation.every={config.evaluation.every} needs data.eval, a file of held-out problems")
    check_objective(config)
    check_privileged(config)
    check_uses(config)
    templates = ("student", "teacher", "analysis", "after_analysis")
    _check_files(config, *(f"data.{name}_template" for name in templates), "rollout.script")


def _check_files(config: Config, *keys: str) -> None:
    for key in keys:
        value = config.get(key)
        if value is not None and not Path(value).is_file():
            raise ConfigError(f"{key}={value} is not a file")
