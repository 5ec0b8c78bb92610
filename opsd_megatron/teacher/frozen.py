"""The frozen teacher, and what all policies share that have weights of their own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Self

from opsd_megatron.distributed.parallel import ParallelDims
from opsd_megatron.models.build import HiddenStatesGPT
from opsd_megatron.teacher.base import TeacherParts, TeacherPolicy
from opsd_megatron.teacher.forward import collect_targets
from opsd_megatron.teacher.resting import HostWeights
from opsd_megatron.types import PackedMicroBatch, TeacherTargets


class FrozenTeacher(TeacherPolicy):
    """The initial weights, never changed: the method's default.

    The policy has no state to checkpoint: a resumed run loads the same initial weights again, which the run identity
    guards (``checkpoint.output_dir.check_output_dir``).
    """

    def __init__(self, model: Sequence[HiddenStatesGPT], dims: ParallelDims, *, offload: bool = False) -> None:
        """Take over ``model``, this rank's chunks with the initial weights.

        Its parameters stay marked as needing a gradient, though the pass records none: torch.matmul takes another
        route, with other rounding, where the weight needs none, and a teacher that equals the student would then
        differ from it in the last digits, which Adam blows up to full-sized updates.

        Args:
            model: Not wrapped for data parallelism.
            dims: The mesh.
            offload: Keep the weights in pinned host memory between passes.
        """
        for chunk in model:
            chunk.eval()
        self._model = model
        self._dims = dims
        self._resting = HostWeights(model, dims.device) if offload else None

    @classmethod
    def build(cls, parts: TeacherParts) -> Self:
        """See :class:`~opsd_megatron.teacher.base.TeacherPolicy`."""
        return cls(parts.initial_model(), parts.dims, offload=parts.config.teacher.offload)

    def targets(self, micro_batches: Sequence[PackedMicroBatch]) -> list[TeacherTargets | None]:
        """See :class:`~opsd_megatron.teacher.base.TeacherPolicy`."""
        with self._resting.on_device() if self._resting else nullcontext():
            return collect_targets(self._model, micro_batches, self._dims)
