"""Whose weights the teacher uses. A policy is one class; the trainer sees only :class:`TeacherPolicy`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from opsd_megatron.distributed.parallel import ParallelDims
from opsd_megatron.models.build import HiddenStatesGPT
from opsd_megatron.teacher.forward import collect_targets
from opsd_megatron.types import PackedMicroBatch, TeacherTargets


class TeacherPolicy(Protocol):
    """Gives the teacher's side of a step's micro-batches."""

    def targets(self, micro_batches: Sequence[PackedMicroBatch]) -> list[TeacherTargets | None]:
        """Run the teacher over the step's micro-batches.

        Ranks: every rank. The result holds targets on the last pipeline stage and ``None`` elsewhere.
        """
        ...

    def after_step(self) -> None:
        """Follow the student after an optimizer step, where the policy does. Ranks: every rank."""
        ...


class FrozenTeacher:
    """The initial weights, never changed: the method's default.

    The policy has no state to checkpoint: a resumed run loads the same initial weights again, which the run identity
    guards (``checkpoint.state.check_output_dir``).
    """

    def __init__(self, model: Sequence[HiddenStatesGPT], dims: ParallelDims) -> None:
        """Take over ``model``, this rank's chunks with the initial weights.

        Its parameters stay marked as needing a gradient, though the pass records none: torch.matmul takes another
        route, with other rounding, where the weight needs none, and a teacher that equals the student would then
        differ from it in the last digits, which Adam blows up to full-sized updates.
        """
        for chunk in model:
            chunk.eval()
        self._model = model
        self._dims = dims

    def targets(self, micro_batches: Sequence[PackedMicroBatch]) -> list[TeacherTargets | None]:
        """See :class:`TeacherPolicy`."""
        return collect_targets(self._model, micro_batches, self._dims)

    def after_step(self) -> None:
        """The frozen teacher does not follow."""


class LiveTeacher:
    """The student's own current weights, without gradient."""

    def __init__(self, student: Sequence[HiddenStatesGPT], dims: ParallelDims) -> None:
        """Share ``student``'s chunks; nothing is copied."""
        self._model = student
        self._dims = dims

    def targets(self, micro_batches: Sequence[PackedMicroBatch]) -> list[TeacherTargets | None]:
        """See :class:`TeacherPolicy`."""
        return collect_targets(self._model, micro_batches, self._dims)

    def after_step(self) -> None:
        """The live teacher is the student: there is nothing to copy."""
