"""What a teacher policy is. One is a class in a file of its own and a row in :mod:`opsd_megatron.teacher.policies`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opsd_megatron.config import Config
from opsd_megatron.distributed.parallel import ParallelDims
from opsd_megatron.models.build import HiddenStatesGPT
from opsd_megatron.models.qwen3 import Qwen3Spec
from opsd_megatron.types import PackedMicroBatch, TeacherTargets


@dataclass(frozen=True)
class StudentFiles:
    """What a policy can check before there is a process group or a model.

    Attributes:
        config: The run.
        source: The student's local Hugging Face directory.
        spec: The student's dimensions.
        tokenizer: Its tokenizer, which renders the teacher's prompts too.
        max_length: Longest sequence of either role, in tokens.
    """

    config: Config
    source: Path
    spec: Qwen3Spec
    tokenizer: PreTrainedTokenizerBase
    max_length: int


@dataclass(frozen=True)
class TeacherParts:
    """What a policy can be built from.

    Attributes:
        config: The run.
        spec: The student's dimensions.
        dims: The mesh.
        student: This rank's chunks of the student. Their weights are the run's initial ones: a checkpoint to resume
            from is loaded after the teacher is built.
        initial_model: Builds another model like the student, with the run's initial weights, whenever it is called.
            Ranks: every rank.
    """

    config: Config
    spec: Qwen3Spec
    dims: ParallelDims
    student: Sequence[HiddenStatesGPT]
    initial_model: Callable[[], list[HiddenStatesGPT]]


class TeacherPolicy(ABC):
    """Whose weights the teacher uses; gives the teacher's side of a step's micro-batches."""

    @classmethod
    def check(cls, student: StudentFiles) -> dict[str, Any]:
        """Check everything the policy needs, before anything is built.

        Ranks: each for itself.

        Returns:
            What tells this teacher from another of the same policy, JSON-able: a run resumes only with an equal one.

        Raises:
            OpsdError: Something is missing or does not fit; nothing has been started or written.
        """
        return {}

    @classmethod
    def own_spec(cls, config: Config) -> Qwen3Spec | None:
        """Dimensions of the teacher, where they are its own and not the student's."""
        return None

    @classmethod
    @abstractmethod
    def build(cls, parts: TeacherParts) -> Self:
        """Make the teacher, as it is before the first step.

        Ranks: every rank.
        """

    @abstractmethod
    def targets(self, micro_batches: Sequence[PackedMicroBatch]) -> list[TeacherTargets | None]:
        """Run the teacher over the step's micro-batches.

        Ranks: every rank. The result holds targets on the last pipeline stage and ``None`` elsewhere.
        """

    def after_step(self, step: int) -> None:
        """Follow the student after its optimizer step number ``step`` (from 1), where the policy does.

        Ranks: every rank.
        """
        return

    def sharded_state(self) -> dict[str, Any]:
        """What a checkpoint has to hold for the policy to continue exactly: this rank's part of it, by name.

        Values are Megatron-Core ``ShardedTensor`` s whose keys start with ``teacher.``. For a load, their tensors say
        what is wanted and may be overwritten. Empty where a resumed run can build the same teacher without.
        """
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the tensors of a checkpoint, by the names of :meth:`sharded_state`.

        Ranks: every rank.
        """
        assert not tensors, "this policy keeps nothing in checkpoints"
