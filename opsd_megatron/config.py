"""The configuration schema and every rule on it that can be checked before anything is built.

One dataclass per Hydra group. Defaults here are the only defaults: the YAML files under ``configs/`` hold choices, not
copies of these values. ``train.py`` turns the composed OmegaConf tree into a :class:`Config`; nothing past it sees
OmegaConf. Rules that need the model's ``config.json`` live with it (``models.qwen3.check_mesh``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from opsd_megatron.errors import ConfigError

# Hydra's structured configs accept no typing.Literal, so choices are strings checked in validate().
CHOICES: dict[str, tuple[str, ...]] = {
    "model.backend": ("auto", "torch", "transformer_engine"),
    "model.dtype": ("float32", "bfloat16"),
    "model.recompute": ("none", "selective", "full"),
    "objective.name": ("opsd", "sft"),
    "objective.clip_mode": ("entry", "bregman", "rescale", "token", "none"),
    "objective.reduction": ("token", "sequence"),
    "objective.top_k_side": ("teacher", "student"),
    "objective.top_k_tail": ("bucket", "renormalise"),
    "teacher.policy": ("frozen", "live"),
    "data.privileged": ("reference", "none", "shuffled"),
    "rollout.engine": ("vllm", "scripted"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
}


@dataclass
class ModelConfig:
    """Which Qwen3, and how it is held in memory.

    Attributes:
        path: Hugging Face directory (``config.json``, tokenizer, safetensors) or Hub name. Its ``config.json`` decides
            every dimension.
        checkpoint: Megatron checkpoint directory to take the initial weights from instead of ``path``'s safetensors.
        backend: ``transformer_engine`` (CUDA), ``torch`` (CPU and CUDA), or ``auto``: the former where it can be used.
        dtype: Parameter dtype; the optimizer and all reductions of the loss are float32 either way.
        recompute: What backward computes again instead of keeping its activations: ``selective`` the MLPs (or experts),
            whose activations are the largest of a layer; ``full`` whole layers.
        max_length: Longest sequence (prompt and response, either role) in tokens; ``None``: the model's
            ``max_position_embeddings``.
    """

    path: str = ""
    checkpoint: str | None = None
    backend: str = "auto"
    dtype: str = "bfloat16"
    recompute: str = "none"
    max_length: int | None = None


@dataclass
class ParallelConfig:
    """The mesh. Data parallelism takes what is left: world size / (tensor * pipeline * context).

    Experts lie on the same ranks in another way: within a stage, ``expert`` ranks hold different experts and
    ``expert_tensor`` ranks parts of the same ones; what is left holds copies.

    Attributes:
        tensor: Tensor-parallel size; divides the model's key/value heads.
        pipeline: Pipeline stages. Where they do not divide the model's layers, the last ones hold one layer fewer.
        virtual_stages: Chunks of the model on each pipeline rank (Megatron's interleaved schedule). Above 1,
            micro-batches pass round the ranks so many times, and the pipeline idles less at both ends of a step.
        context: Ranks that each sequence is split over, for long ones. Every sequence is padded to a multiple of twice
            this.
        expert: Expert-parallel size; divides the model's experts. 1 for a model without experts.
        expert_tensor: Parts into which an expert is cut; ``None``: ``tensor``.
        sequence: Shard activations outside attention and MLP along the sequence (needs ``tensor > 1``, and goes with
            it for a model with experts).
        distributed_optimizer: Shard optimizer state over data-parallel ranks.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_stages: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    sequence: bool = False
    distributed_optimizer: bool = True


@dataclass
class ObjectiveConfig:
    """What is minimised.

    Attributes:
        name: ``opsd`` (divergence to the teacher on the student's own rollouts) or ``sft`` (cross-entropy on given
            responses).
        beta: 0 is forward KL(teacher || student), 1 reverse KL, in between generalized Jensen-Shannon.
        clip: Upper clip tau; ``None`` for no clip.
        clip_mode: Where the clip acts, see ``losses.divergences``; ``none`` ignores ``clip``.
        reduction: ``token``: mean over all response tokens of the step. ``sequence``: mean over sequences of their
            mean per token, as the paper writes it.
        top_k: Take the divergence over this many most likely entries of one side only; ``None``: over all of them.
        top_k_side: Whose most likely entries these are: ``teacher`` or ``student``.
        top_k_tail: ``bucket`` counts all other entries as one; ``renormalise`` leaves them out.
        chunk_rows: Rows whose logits exist at a time; ``None``: chosen by the loss.
    """

    name: str = "opsd"
    beta: float = 0.5
    clip: float | None = 0.05
    clip_mode: str = "entry"
    reduction: str = "token"
    top_k: int | None = None
    top_k_side: str = "teacher"
    top_k_tail: str = "bucket"
    chunk_rows: int | None = None


@dataclass
class TeacherConfig:
    """Where the teacher's weights come from.

    Attributes:
        policy: ``frozen`` keeps the initial weights; ``live`` uses the student's current ones, without gradient.
    """

    policy: str = "frozen"


@dataclass
class DataConfig:
    """Problems and how they are shown to the two roles.

    Attributes:
        train: JSONL or Parquet file, directory of Parquet files, or Hub name with an optional ``:split``.
        eval: The same for held-out problems; ``None`` disables evaluation.
        problem_column: Column with the statement.
        solution_column: Column with the reference solution.
        answer_column: Column with the final answer; where absent, the solution's last ``\\boxed{}`` is the answer.
        response_column: Column with the supervised target (objective ``sft``); ``None``: the solution column.
        role_column: Column saying whose prompt the target follows (objective ``sft``); ``None``: the student's.
        student_template: File with the student's user message; ``None``: the packaged ``prompts/student.txt``.
        teacher_template: File with the teacher's user message; ``None``: the packaged ``prompts/teacher.txt``.
        student_thinking: ``enable_thinking`` of the student's chat template.
        teacher_thinking: ``enable_thinking`` of the teacher's chat template.
        privileged: What the teacher sees beyond the problem: the ``reference``, ``none`` (control: the student's own
            prompt), or ``shuffled`` (control: the reference of another problem).
        max_prompt_tokens: Longest student prompt, in training and evaluation; ``None``: whatever leaves room for the
            response. A longer one is an error, named by its line. A teacher prompt that does not fit has its *solution*
            shortened.
        shuffle: Draw problems in a seeded random order, a new one each epoch.
    """

    train: str = ""
    eval: str | None = None
    problem_column: str = "problem"
    solution_column: str = "solution"
    answer_column: str = "answer"
    response_column: str | None = None
    role_column: str | None = None
    student_template: str | None = None
    teacher_template: str | None = None
    student_thinking: bool = False
    teacher_thinking: bool = True
    privileged: str = "reference"
    max_prompt_tokens: int | None = None
    shuffle: bool = True


@dataclass
class RolloutConfig:
    """How the student's responses are sampled.

    Attributes:
        engine: ``vllm``, or ``scripted`` (responses read from ``script``, for tests that need fixed ones).
        script: JSONL file of scripted responses, one object with ``prompt_ids`` and ``token_ids`` (and optionally
            ``log_probs``) a line.
        tensor: Tensor-parallel size of the engine; ``None``: ``parallel.tensor``. Engine groups tile the world.
        temperature: Sampling temperature; the loss uses the same one.
        top_p: Nucleus mass.
        top_k: Candidates kept; -1 for all.
        max_new_tokens: Longest response in tokens.
        samples_per_problem: Responses drawn for each problem.
        memory_fraction: Share of device memory the engine may take (CUDA only).
        kv_cache_gib: Size of the key/value cache on CPU, in GiB a rank.
        enforce_eager: Skip the engine's graph capture and compilation (CUDA only; on CPU it is always skipped).
        max_log_prob_gap: Stop the run where the engine's log-probs differ from the trainer's by more than this on
            average; ``None`` only logs it.
        save: Write each step's rollouts to ``output_dir/rollouts/``.
    """

    engine: str = "vllm"
    script: str | None = None
    tensor: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_new_tokens: int = 1024
    samples_per_problem: int = 1
    memory_fraction: float = 0.4
    kv_cache_gib: float = 1.0
    enforce_eager: bool = False
    max_log_prob_gap: float | None = None
    save: bool = True


@dataclass
class OptimizerConfig:
    """AdamW and its schedule.

    Attributes:
        lr: Peak learning rate.
        min_lr: Learning rate at the end of the decay.
        beta1: First-moment decay.
        beta2: Second-moment decay.
        eps: Denominator term.
        weight_decay: Decoupled weight decay, on matrices only.
        clip_grad: Global gradient norm above which gradients are scaled down; 0 disables.
        schedule: Shape of the decay from ``lr`` to ``min_lr`` after warm-up.
        warmup_steps: Steps of linear warm-up from 0.
        decay_steps: Step at which ``min_lr`` is reached; ``None``: ``train.steps``.
    """

    lr: float = 5e-6
    min_lr: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    schedule: str = "constant"
    warmup_steps: int = 0
    decay_steps: int | None = None


@dataclass
class TrainConfig:
    """The loop.

    Attributes:
        steps: Optimizer steps of the whole run, those before a resume included.
        problems_per_step: Problems drawn each step, over the whole world.
        tokens_per_micro_batch: Token budget of a micro-batch (the longer of its two sides), over all of the
            ``parallel.context`` ranks that share it; a sample longer than the budget gets a micro-batch of its own.
        seed: Seeds data order, sampling and initialisation.
    """

    steps: int = 100
    problems_per_step: int = 32
    tokens_per_micro_batch: int = 16384
    seed: int = 0


@dataclass
class EvaluationConfig:
    """Evaluation on ``data.eval`` with the rollout engine.

    Attributes:
        every: Steps between evaluations in training; 0 for none in between.
        at_start: Evaluate before the first step.
        at_end: Evaluate after the last step.
        max_problems: Use only the first so many problems; ``None`` for all.
        samples_per_problem: Responses drawn for each problem, the ``k`` of avg@k and pass@k.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Nucleus mass.
        top_k: Candidates kept; -1 for all.
        max_new_tokens: Longest response; ``None``: ``rollout.max_new_tokens``.
        judge_seconds: Time limit on judging one answer.
    """

    every: int = 0
    at_start: bool = True
    at_end: bool = True
    max_problems: int | None = None
    samples_per_problem: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_new_tokens: int | None = None
    judge_seconds: float = 5.0


@dataclass
class CheckpointConfig:
    """Saving and resuming.

    Attributes:
        every: Steps between checkpoints; 0 saves only at the end.
        keep: Newest checkpoints kept; older ones are deleted after a newer one is complete. ``None`` keeps all.
        at_end: Save after the last step.
        resume: Continue from the newest complete checkpoint in ``output_dir``.
    """

    every: int = 25
    keep: int | None = None
    at_end: bool = True
    resume: bool = False


@dataclass
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    output_dir: str = ""

    def get(self, key: str) -> Any:
        """The value at a dotted key such as ``"parallel.tensor"``."""
        value: Any = self
        for part in key.split("."):
            value = getattr(value, part)
        return value

    @property
    def needs_engine(self) -> bool:
        """Whether this run samples at all: for training or for evaluation."""
        return self.objective.name != "sft" or self.data.eval is not None

    @property
    def engine_tensor(self) -> int:
        """Tensor-parallel size of the rollout engine."""
        return self.parallel.tensor if self.rollout.tensor is None else self.rollout.tensor

    @property
    def expert_tensor(self) -> int:
        """Parts into which an expert is cut."""
        return self.parallel.tensor if self.parallel.expert_tensor is None else self.parallel.expert_tensor

    def validate(self, world_size: int) -> None:
        """Check every rule that needs neither files nor a model.

        Raises:
            ConfigError: Names the key, its value and what would be valid.
        """
        _check_required(self)
        _check_choices(self)
        _check_ranges(self)
        _check_mesh(self, world_size)
        _check_combinations(self)


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
    "parallel.tensor": (1, None),
    "parallel.pipeline": (1, None),
    "parallel.virtual_stages": (1, None),
    "parallel.context": (1, None),
    "parallel.expert": (1, None),
    "parallel.expert_tensor": (1, None),
    "objective.beta": (0, 1),
    "objective.top_k": (1, None),
    "objective.chunk_rows": (1, None),
    "data.max_prompt_tokens": (1, None),
    "rollout.tensor": (1, None),
    "rollout.max_new_tokens": (1, None),
    "rollout.samples_per_problem": (1, None),
    "optimizer.min_lr": (0, None),
    "optimizer.weight_decay": (0, None),
    "optimizer.clip_grad": (0, None),
    "optimizer.warmup_steps": (0, None),
    "optimizer.decay_steps": (1, None),
    "train.steps": (1, None),
    "train.problems_per_step": (1, None),
    "train.tokens_per_micro_batch": (2, None),
    "train.seed": (0, 2**31 - 1),
    "evaluation.every": (0, None),
    "evaluation.max_problems": (1, None),
    "evaluation.samples_per_problem": (1, None),
    "evaluation.temperature": (0, None),
    "evaluation.max_new_tokens": (1, None),
    "checkpoint.every": (0, None),
    "checkpoint.keep": (1, None),
}
# key -> (above, up to): the lower bound itself is excluded.
_OPEN_RANGES: dict[str, tuple[float, float | None]] = {
    "objective.clip": (0, None),
    "rollout.temperature": (0, None),
    "rollout.top_p": (0, 1),
    "rollout.memory_fraction": (0, 1),
    "rollout.kv_cache_gib": (0, None),
    "rollout.max_log_prob_gap": (0, None),
    "optimizer.lr": (0, None),
    "optimizer.eps": (0, None),
    "evaluation.top_p": (0, 1),
    "evaluation.judge_seconds": (0, None),
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
    if 0 < min(beta, 1 - beta) < 1e-6:
        raise ConfigError(
            f"objective.beta={beta} is neither 0 nor 1 but so near that the divergence vanishes; use 0 for forward KL "
            "and 1 for reverse KL"
        )
    for key in ("optimizer.beta1", "optimizer.beta2"):
        if not 0 <= config.get(key) < 1:
            raise ConfigError(f"{key}={config.get(key)} must be at least 0 and below 1")
    for key in ("rollout.top_k", "evaluation.top_k"):
        if config.get(key) != -1 and config.get(key) < 1:
            raise ConfigError(f"{key}={config.get(key)} must be -1 (all candidates) or at least 1")


def _check_mesh(config: Config, world_size: int) -> None:
    sizes = {key: config.get(key) for key in ("parallel.tensor", "parallel.pipeline", "parallel.context")}
    model_ranks = math.prod(sizes.values())
    if world_size % model_ranks:
        raise ConfigError(
            f"the world size {world_size} is not a multiple of {' * '.join(sizes)} = "
            f"{' * '.join(map(str, sizes.values()))}; start a multiple of {model_ranks} processes "
            "(torchrun --nnodes * --nproc-per-node) or change the mesh"
        )
    if config.parallel.virtual_stages > 1 and config.parallel.pipeline == 1:
        raise ConfigError(
            f"parallel.virtual_stages={config.parallel.virtual_stages} interleaves the stages of a pipeline: it needs "
            "parallel.pipeline > 1"
        )
    expert_ranks = config.parallel.expert * config.expert_tensor
    if (stage_ranks := world_size // config.parallel.pipeline) % expert_ranks:
        raise ConfigError(
            f"parallel.expert={config.parallel.expert} * parallel.expert_tensor={config.expert_tensor} does not divide "
            f"the {stage_ranks} ranks of a pipeline stage; choose sizes whose product does (parallel.expert_tensor is "
            "parallel.tensor unless set)"
        )
    if config.parallel.sequence and config.parallel.tensor == 1:
        raise ConfigError("parallel.sequence=true shards over tensor-parallel ranks: it needs parallel.tensor > 1")
    if config.needs_engine and world_size % config.engine_tensor:
        raise ConfigError(
            f"engine groups tile the world: rollout.tensor={config.engine_tensor} does not divide the world size "
            f"{world_size}"
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
        if config.data.eval is not None:
            raise ConfigError("rollout.engine=scripted cannot evaluate; pass data.eval=null or rollout.engine=vllm")
    if config.data.eval is None and config.evaluation.every:
        raise ConfigError(f"evaluation.every={config.evaluation.every} needs data.eval, a file of held-out problems")
    for key in ("data.student_template", "data.teacher_template", "rollout.script"):
        value = config.get(key)
        if value is not None and not Path(value).is_file():
            raise ConfigError(f"{key}={value} is not a file")
