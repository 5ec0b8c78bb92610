"""Chunks of logit rows worked on by kernels that ``torch.compile`` fuses: the elementwise part on CPU, large shards.

Step by step every elementwise operation reads and writes memory; fused, each of the three passes reads the logits once,
and only the last one writes. That needs a C++ compiler, and a while of compiling where no earlier process has left the
kernels in torch's cache. Without a compiler :class:`TorchRows` does the same.

A row goes through the kernels in pieces, as if each were a row: short enough that sums lose nothing in float32. Those
in float64 are slow when compiled for CPU, since every number that is converted goes through memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from opsd_megatron.losses.divergences import LOG_ZERO, DivergenceSpec, Entries, divergence_entries
from opsd_megatron.losses.shard import VocabShard
from opsd_megatron.losses.statistics import HELD, STUDENT_MAX, STUDENT_TARGET, TEACHER_MAX, TEACHER_TARGET, merge
from opsd_megatron.losses.torch_rows import row_centre, row_max

_LOG = logging.getLogger(__name__)
# Of fewer columns a chunk stays in the cache either way, and small models should not wait for a compiler.
_LEAST_COLUMNS = 1 << 14
# Columns of a piece of a row, where the number of columns has a divisor between these; else a piece is a whole row.
_PIECE = range(256, 2049)
# Logits of a side that go through all passes together on one rank: 10 MB, which later passes find in the cache.
BLOCK_ELEMENTS = 5 << 19
# A product and a sum may become one operation. However long an expression is, nothing of it is left in memory.
_OPTIONS = {
    "cpp.enable_floating_point_contract_flag": "fast",
    "realize_opcount_threshold": 1 << 20,
    "realize_reads_threshold": 1 << 20,
}

RowKernel = Callable[..., Any]


@dataclass(frozen=True)
class RowKernels:
    """The three passes over a chunk."""

    statistics: RowKernel
    sums: RowKernel
    gradient: RowKernel

    @classmethod
    def of(cls, spec: DivergenceSpec, prepare: Callable[[RowKernel], RowKernel]) -> RowKernels:
        """Those of ``spec``, each after it has gone through ``prepare``, which compiles it."""
        return cls(*(prepare(_bind(function, spec)) for function in (_statistics, _sums, _gradient)))


def kernels_for(student: Tensor, spec: DivergenceSpec) -> RowKernels | None:
    """Compiled kernels for a chunk of logits, ``[r, columns]``, where they are worth it and there is a compiler.

    One piece is not: torch would compile everything again for it.
    """
    rows, columns = student.shape
    if student.device.type != "cpu" or student.dtype != torch.float32 or columns < _LEAST_COLUMNS:
        return None
    if rows * pieces_of_row(columns) < 2:
        return None
    return compiled_kernels(spec) if _compiles() else None


@cache
def compiled_kernels(spec: DivergenceSpec) -> RowKernels:
    """The kernels of ``spec``, compiled at their first call for any number of pieces above one."""
    return RowKernels.of(spec, _compile)


@cache
def pieces_of_row(columns: int) -> int:
    """How many pieces a row of so many columns goes through the kernels in."""
    return next((columns // size for size in reversed(_PIECE) if columns and columns % size == 0), 1)


class CompiledRows:
    """See :class:`~opsd_megatron.losses.rows.RowBlock`. Every pass reads the logits again; only the last one writes.

    Args:
        student: ``[r, columns]`` float32, contiguous; more than one piece.
        teacher: The same for the teacher.
        kernels: Those of the divergence.
        spec: The divergence.
        shard: Which columns these are.
        target_ids: Targets of the diagnostics, ``[r]``, or ``None``.
    """

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        kernels: RowKernels,
        spec: DivergenceSpec,
        shard: VocabShard,
        target_ids: Tensor | None,
    ) -> None:
        self._rows, self._kernels, self._spec, self._shard = (student, teacher), kernels, spec, shard
        self._targets, self._pieces = target_ids, pieces_of_row(student.shape[1])
        shape = (student.shape[0] * self._pieces, student.shape[1] // self._pieces)
        self._sides = tuple(_any_rows(side.view(shape), 0) for side in self._rows)
        self._normaliser: Tensor | None = None

    def statistics(self) -> Tensor:
        """This piece's :mod:`~opsd_megatron.losses.statistics`, ``[10, r]``."""
        found = self._by_row(self._kernels.statistics(*self._sides))
        found = torch.cat([found, found.new_zeros((3, *found.shape[1:]))])
        merged = merge(found.permute(2, 0, 1), self._spec.temperature)
        if self._targets is not None:
            places = ((STUDENT_MAX, STUDENT_TARGET), (TEACHER_MAX, TEACHER_TARGET))
            for side, (maximum, target) in zip(self._rows, places, strict=True):
                picked, held = self._shard.pick(side, self._targets.unsqueeze(1))
                centre = row_centre(merged[maximum]).unsqueeze(1)
                merged[target] = torch.where(held > 0, picked - centre, 0).squeeze(1)
                merged[HELD] = held.squeeze(1)
        return merged

    def sums(self, normaliser: Tensor) -> Tensor:
        """This piece's share of the row sums, ``[9, r]``."""
        self._normaliser = self._for_pieces(normaliser)
        sums = self._by_row(self._kernels.sums(*self._sides, self._normaliser))
        return sums.sum(2, dtype=torch.float64).to(sums.dtype)

    def write_gradient(self, factor: Tensor, shift: Tensor, pull: Tensor | None) -> None:
        """Leave ``factor * slope - shift * e^s``, plus ``pull`` at the target, in the student's logits."""
        scales = self._for_pieces(torch.stack([factor, shift]))
        self._kernels.gradient(*self._sides, self._normaliser, scales)
        if pull is not None:
            assert self._targets is not None, "a token's term needs targets"
            self._shard.add_at(self._rows[0], self._targets, pull)

    def _by_row(self, found: Tensor) -> Tensor:
        """``[k, r * pieces] -> [k, r, pieces]``."""
        return found.view(found.shape[0], -1, self._pieces)

    def _for_pieces(self, numbers: Tensor) -> Tensor:
        """Numbers of rows for each of their pieces, ``[k, r] -> [k, r * pieces]``."""
        # No view, which repeat_interleave returns: a kernel would be compiled for the sizes of what it is a view of.
        return _any_rows(numbers.repeat_interleave(self._pieces, dim=1).clone(), 1)


def _statistics(spec: DivergenceSpec, student: Tensor, teacher: Tensor) -> Tensor:
    """The first seven statistics, ``[7, r]``."""
    sides = (student, teacher)
    maxima = [row_max(side) for side in sides]
    centred = [side - row_centre(maximum).unsqueeze(1) for side, maximum in zip(sides, maxima, strict=True)]
    sums = [_sum(_tempered(side, spec).exp()) for side in centred]
    sums_at_1 = sums if spec.temperature == 1 else [_sum(side.exp()) for side in centred]
    agree = row_max(centred[0] + centred[1]).eq(0).to(student.dtype)
    return torch.stack([maxima[0], sums[0], maxima[1], sums[1], agree, *sums_at_1])


def _sums(spec: DivergenceSpec, student: Tensor, teacher: Tensor, normaliser: Tensor) -> Tensor:
    """The nine row sums, ``[9, r]``."""
    s, t, entries = _entries(spec, student, teacher, normaliser)
    p, q, value, clipped = entries.student_prob, entries.teacher_prob, entries.value, entries.clipped
    divergence = _sum(value)
    clip_sums = [divergence, torch.zeros_like(divergence), torch.zeros_like(divergence)]
    if clipped is not None:
        clip_sums = [_sum(value.clamp(max=spec.entry_clip)), _sum(clipped), _sum(clipped * q)]
    divergences = [_sum(q * entries.log_ratio), -_sum(p * entries.log_ratio)]
    return torch.stack([divergence, _sum(entries.slope), *clip_sums, -_sum(p * s), -_sum(q * t), *divergences])


def _gradient(spec: DivergenceSpec, student: Tensor, teacher: Tensor, normaliser: Tensor, scales: Tensor) -> None:
    """Overwrite the student's logits with their gradient, given its factor and shift, ``[2, r]``."""
    _, _, entries = _entries(spec, student, teacher, normaliser)
    factor, shift = scales.unsqueeze(2).unbind()
    student.copy_(factor * entries.slope - shift * entries.student_prob)


def _entries(
    spec: DivergenceSpec, student: Tensor, teacher: Tensor, normaliser: Tensor
) -> tuple[Tensor, Tensor, Entries]:
    """Both sides' log-probabilities, and the terms and slopes of the divergence."""
    norms = normaliser.unsqueeze(2).unbind()
    s, t = (
        (_tempered(side - maximum, spec) - log_sum).clamp(min=LOG_ZERO)
        for side, maximum, log_sum in ((student, *norms[:2]), (teacher, *norms[2:]))
    )
    return s, t, divergence_entries(s, t, spec)


def _tempered(logits: Tensor, spec: DivergenceSpec) -> Tensor:
    """Logits over the temperature. Not left to the compiler, which would divide, by 1 too."""
    return logits if spec.temperature == 1 else logits * (1 / spec.temperature)


def _sum(values: Tensor) -> Tensor:
    """Row sums, ``[r]``. Of a whole row a compiled sum in float32 would add up thousands of numbers one by one."""
    dtype = values.dtype if values.shape[1] in _PIECE else torch.float64
    return values.sum(1, dtype=dtype).to(values.dtype)


def _compile(function: RowKernel) -> RowKernel:
    # Kept apart from others of the same code: torch gives up on a function that it has compiled too often.
    compiled: RowKernel = torch.compile(  # type: ignore[call-overload]
        function, isolate_recompiles=True, options=_OPTIONS
    )
    return compiled


def _bind(function: Callable[..., Any], spec: DivergenceSpec) -> RowKernel:
    return lambda *tensors: function(spec, *tensors)


def _any_rows(tensor: Tensor, dimension: int) -> Tensor:
    """``tensor``, of two dimensions, marked so that it is compiled for any size of ``dimension`` and no other's."""
    torch._dynamo.maybe_mark_dynamic(tensor, dimension)
    torch._dynamo.mark_static(tensor, 1 - dimension)
    return tensor


@cache
def _compiles() -> bool:
    """Whether a kernel can be compiled in this process, found out with a small one. The user may forbid it."""
    if "1" in (os.environ.get("TORCH_COMPILE_DISABLE"), os.environ.get("TORCHDYNAMO_DISABLE")):
        return False
    try:
        probe = _compile(_one_if_compiled)
        problem = "" if bool((probe(torch.zeros(2, 16)) == 1).all()) else "torch.compile does nothing in this process"
    except Exception as error:  # whatever a compiler, its headers or its cache directory may lack
        problem = (str(error).splitlines() or [type(error).__name__])[0]
    if problem:
        _LOG.warning("the loss runs uncompiled, which is slower: %s", problem)
    return not problem


def _one_if_compiled(zeros: Tensor) -> Tensor:
    """Each of ``zeros`` plus 1 in compiled code, plus 0 where torch runs this as it is written."""
    values: Tensor = torch.special.expm1(zeros) + int(torch.compiler.is_compiling())
    return values
