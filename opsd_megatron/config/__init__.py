"""The configuration schema and every rule on it that can be checked before anything is built.

``compose.py`` turns the composed OmegaConf tree into a :class:`Config`; nothing past it sees OmegaConf. Rules that need
the model's ``config.json`` live with it (``models.qwen3.check_mesh``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from opsd_megatron.config.groups import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TelemetryConfig,
    TrainConfig,
)
from opsd_megatron.config.lora import LoraConfig
from opsd_megatron.config.objectives import OBJECTIVES, Needs
from opsd_megatron.config.privileged import PRIVILEGED
from opsd_megatron.config.rules import check, check_stand_alone
from opsd_megatron.config.teacher import TEACHERS, TeacherConfig, TeacherHolds

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "LoraConfig",
    "ModelConfig",
    "Needs",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RolloutConfig",
    "TeacherConfig",
    "TelemetryConfig",
    "TrainConfig",
]


@dataclass
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    output_dir: str = ""

    def get(self, key: str) -> Any:
        """The value at a dotted key such as ``"parallel.tensor"``."""
        value: Any = self
        for part in key.split("."):
            value = getattr(value, part)
        return value

    @property
    def needs(self) -> Needs:
        """What the run's objective is computed from."""
        return OBJECTIVES[self.objective.name]

    @property
    def teacher_holds(self) -> TeacherHolds:
        """What the run's teacher takes beside the student: nothing where the objective has none."""
        return TEACHERS[self.teacher.policy] if self.needs.teacher else TeacherHolds()

    @property
    def needs_solutions(self) -> bool:
        """Whether every training problem must have a reference solution."""
        return self.needs.teacher and PRIVILEGED[self.data.privileged].solutions

    @property
    def needs_answers(self) -> bool:
        """Whether every training problem must have an answer."""
        return self.needs_verdicts or (self.needs.teacher and PRIVILEGED[self.data.privileged].answers)

    @property
    def needs_verdicts(self) -> bool:
        """Whether the answers of training rollouts are judged."""
        return self.needs.verdicts or (self.needs.teacher and PRIVILEGED[self.data.privileged].verdicts)

    @property
    def needs_sampling_log_probs(self) -> bool:
        """Whether the engine gives log-probs of the distribution it sampled from, rather than at temperature 1."""
        return self.objective.importance_cap is not None

    @property
    def compares_log_probs(self) -> bool:
        """Whether the engine's log-probs are of a distribution that the trainer has too."""
        return not (self.needs_sampling_log_probs and self.rollout.truncated)

    @property
    def needs_engine(self) -> bool:
        """Whether this run samples at all: for training or for evaluation."""
        return self.needs.rollouts or bool(self.evaluation_sets)

    @property
    def evaluation_sets(self) -> list[str]:
        """What to evaluate on, each as ``data.evaluation_sets`` takes it; empty for nothing."""
        if self.evaluation.sets:
            return list(self.evaluation.sets)
        return [] if self.data.eval is None else [self.data.eval]

    @property
    def engine_tensor(self) -> int:
        """Tensor-parallel size of the rollout engine."""
        return self.parallel.tensor if self.rollout.tensor is None else self.rollout.tensor

    def validate(self, world_size: int) -> None:
        """Check every rule that needs neither files nor a model.

        Raises:
            ConfigError: Names the key, its value and what would be valid.
        """
        check(self, world_size)

    def validate_stand_alone(self, world_size: int) -> None:
        """The same for ``opsd_megatron.evaluate``.

        Raises:
            ConfigError: Names the key, its value and what would be valid.
        """
        check_stand_alone(self, world_size)
