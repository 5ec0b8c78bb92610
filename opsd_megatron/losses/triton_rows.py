"""A block of logit rows worked on with Triton kernels: the elementwise part of the divergence on CUDA."""

from __future__ import annotations

from torch import Tensor

from opsd_megatron.losses.divergences import DivergenceSpec
from opsd_megatron.losses.shard import VocabShard
from opsd_megatron.losses.statistics import merge
from opsd_megatron.losses.triton_kernels import row_statistics, row_sums, write_gradient_


class TritonRows:
    """See :class:`~opsd_megatron.losses.rows.RowBlock`. Every pass reads the logits again; only the last one writes.

    Args:
        student: ``[r, columns]`` float32.
        teacher: The same for the teacher.
        spec: The divergence.
        shard: Which columns these are.
        target_ids: Targets of the diagnostics, ``[r]``, or ``None``.
    """

    def __init__(
        self, student: Tensor, teacher: Tensor, spec: DivergenceSpec, shard: VocabShard, target_ids: Tensor | None
    ) -> None:
        self._student, self._teacher, self._spec = student, teacher, spec
        self._targets: Tensor | None = None
        if target_ids is not None:
            local, held = shard.locate(target_ids)
            self._targets = local.masked_fill(~held, -1)

    def statistics(self) -> Tensor:
        """This piece's :mod:`~opsd_megatron.losses.statistics`, ``[10, r]``."""
        temperature = self._spec.temperature
        pieces = row_statistics(self._student, self._teacher, temperature=temperature, local_targets=self._targets)
        return merge(pieces, temperature)

    def sums(self, normaliser: Tensor) -> Tensor:
        """This piece's share of the row sums, ``[9, r]``."""
        self._normaliser = normaliser.contiguous()
        return row_sums(self._student, self._teacher, self._normaliser, self._spec)

    def write_gradient(self, slope_sum: Tensor, factor: Tensor) -> None:
        """Leave ``factor * (slope - e^s * slope_sum)`` in the student's logits; both arguments are ``[r]``."""
        write_gradient_(
            self._student, self._teacher, self._normaliser, slope_sum.contiguous(), factor.contiguous(), self._spec
        )
