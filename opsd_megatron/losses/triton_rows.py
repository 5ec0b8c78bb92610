"""A block of logit rows worked on with Triton kernels: the elementwise part of the divergence on CUDA.

Three launches, because two reductions over the tensor-parallel ranks lie between them:

===========================  ====================================  ==============================================
pass                         memory traffic, per vocabulary entry  what the caller does next
===========================  ====================================  ==============================================
:func:`row_statistics`       reads both logits (8 bytes)           merges maxima and sums of exponentials
:func:`row_sums`             reads both logits (8 bytes)           adds up the loss and the summed slope
:func:`write_gradient_`      reads both, writes one (12 bytes)     multiplies with the head's weight
===========================  ====================================  ==============================================

The second needs the normaliser of the whole vocabulary and the third the slope's sum over it, so neither can start
before the ranks have met. The arithmetic of a pass is about as long as its reads: there is nothing to gain from fusing
any further.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from opsd_megatron.losses.divergences import DivergenceSpec
from opsd_megatron.losses.rows import SUMS
from opsd_megatron.losses.shard import VocabShard
from opsd_megatron.losses.statistics import ROWS, merge
from opsd_megatron.losses.triton_kernels import (
    BETWEEN,
    FORWARD,
    REVERSE,
    gradient_kernel,
    statistics_kernel,
    sums_kernel,
)

# Columns a program takes at a time. With eight warps these are four columns to a thread, one 16-byte load of each side.
# More would keep more bytes in flight but, at nine accumulators a column, fewer threads on a multiprocessor.
BLOCK = 1024
# Programs to aim at where rows alone are fewer. With more of them the last wave's idle part is smaller: an H100 has 132
# multiprocessors, each with registers for three (row_sums) to six (row_statistics) programs. With fewer of them less
# goes into their ends: what a program does once takes as many instructions as one or two of its blocks. The largest
# chunk by default, 768 rows of 151,936 columns, becomes 3 pieces a row of 50 blocks, 128 rows 15 of 10, one row 149 of
# one. Not measured: chosen from the machine code and a model of the waves.
PROGRAMS = 2048
# Fusing a multiplication and an addition is said aloud because triton's default for it is about to change.
_LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}


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
        self._student, self._teacher, self._spec, self._shard = student, teacher, spec, shard
        self._targets = target_ids

    def statistics(self) -> Tensor:
        """This piece's :mod:`~opsd_megatron.losses.statistics`, ``[10, r]``."""
        temperature, local_targets = self._spec.temperature, None
        if self._targets is not None:
            local, held = self._shard.locate(self._targets)
            local_targets = local.masked_fill(~held, -1)
        pieces = row_statistics(self._student, self._teacher, temperature=temperature, local_targets=local_targets)
        return merge(pieces, temperature)

    def sums(self, normaliser: Tensor) -> Tensor:
        """This piece's share of the row sums, ``[9, r]``."""
        self._normaliser = normaliser.contiguous()
        return row_sums(self._student, self._teacher, self._normaliser, self._spec)

    def write_gradient(self, factor: Tensor, shift: Tensor, pull: Tensor | None) -> None:
        """Leave ``factor * slope - shift * e^s``, plus ``pull`` at the target, in the student's logits."""
        write_gradient_(self._student, self._teacher, self._normaliser, factor, shift, self._spec)
        if pull is not None:
            assert self._targets is not None, "a token's term needs targets"
            self._shard.add_at(self._student, self._targets, pull)


def row_statistics(student: Tensor, teacher: Tensor, *, temperature: float, local_targets: Tensor | None) -> Tensor:
    """What a row's normaliser, its top-1 agreement and its target's log-probability are merged from.

    Args:
        student: Logits of this rank's columns, ``[r, columns]`` float32, not divided by the temperature; the last
            dimension contiguous, rows at any distance. ``columns`` may be 0.
        teacher: The same for the teacher.
        temperature: Both sides' logits are divided by it.
        local_targets: Column of each row's target, ``[r]`` int64; outside of ``[0, columns)``, say -1, where this rank
            does not hold it. ``None`` for no targets.

    Returns:
        ``[pieces, 10, r]`` float32. The columns are cut into pieces; for each piece and row:

        - 0: the student's largest logit ``m``. ``+inf`` if some logit is NaN or ``+inf``, in which case the student's
          other numbers mean nothing; ``-inf`` if the piece is empty or all ``-inf``.
        - 1: the student's sum of ``exp((z - m) / temperature)``; 0 if the piece is empty or all ``-inf``.
        - 2, 3: the same for the teacher.
        - 4: 1 if some column has both sides' largest (finite) logit, else 0.
        - 5, 6: the sums of both sides at temperature 1.
        - 7, 8: both sides' target logit minus ``m`` if the piece holds it, else 0; ``-inf`` if that logit is ``-inf``.
        - 9: 1 if the piece holds the target, else 0.
    """
    _check(student, teacher)
    rows, columns = student.shape
    pieces, piece = _cut(rows, columns)
    statistics = student.new_empty(pieces, ROWS, rows)
    statistics_kernel[rows, pieces](
        student,
        teacher,
        None if local_targets is None else local_targets.contiguous(),
        statistics,
        rows,
        columns,
        piece,
        student.stride(0),
        teacher.stride(0),
        1 / temperature,
        UNIT_TEMPERATURE=temperature == 1,
        HAS_TARGETS=local_targets is not None,
        BLOCK=BLOCK,
        **_LAUNCH,
    )
    return statistics


def row_sums(student: Tensor, teacher: Tensor, normaliser: Tensor, spec: DivergenceSpec) -> Tensor:
    """Sums over this rank's columns of everything a row's loss and diagnostics are made of.

    Args:
        student: The logits that :func:`row_statistics` had.
        teacher: The same for the teacher.
        normaliser: ``[4, r]`` float32: the student's largest logit over the whole vocabulary and the logarithm of its
            sum of exponentials, the same two of the teacher.
        spec: The divergence.

    Returns:
        ``[9, r]`` float32, with ``s`` and ``t`` the log-probabilities, ``d`` and ``h`` value and slope as
        :class:`~opsd_megatron.losses.divergences.Entries` defines them, the sums of: 0 ``d`` before any clip; 1 ``h``;
        2 ``min(d, clip)``; 3 clipped entries (their number); 4 ``e^t`` on clipped entries; 5 ``-e^s s``;
        6 ``-e^t t``; 7 ``e^t (t - s)``; 8 ``e^s (s - t)``. Where ``spec.entry_clip`` is ``None``, row 2 is row 0, to
        within the rounding of a sum, and rows 3 and 4 are 0.
    """
    _check(student, teacher)
    rows, columns = student.shape
    pieces, piece = _cut(rows, columns)
    sums = student.new_empty(pieces, SUMS, rows)
    sums_kernel[rows, pieces](
        student,
        teacher,
        normaliser.contiguous(),
        sums,
        rows,
        columns,
        piece,
        student.stride(0),
        teacher.stride(0),
        *_parameters(spec),
        **_variant(spec),
        BLOCK=BLOCK,
        **_LAUNCH,
    )
    # torch may add up two of the nine in different orders, so that equal pieces get sums that differ in the last bit.
    # That is harmless here, other than in `statistics.merge`: what must be 0 for equal sides is 0 in every piece, so in
    # any order, and of the rest no two are ever compared. Calls of one shape add in one order: results reproduce.
    return sums[0] if pieces == 1 else sums.sum(0)


def write_gradient_(
    student: Tensor,
    teacher: Tensor,
    normaliser: Tensor,
    factor: Tensor,
    shift: Tensor,
    spec: DivergenceSpec,
) -> None:
    """Overwrite the student's logits with ``factor h - shift e^s``, their gradient.

    Exactly zero where both sides' logits and normalisers are equal, nothing is clipped and ``shift`` is 0.

    Args:
        student: The logits that :func:`row_sums` had; holds the gradient afterwards.
        teacher: The same for the teacher; left as it is.
        normaliser: As for :func:`row_sums`.
        factor: What each row's slope is multiplied with, ``[r]`` float32: row weights and, from the chain rule,
            1 / temperature.
        shift: The same of the probabilities: ``factor`` times the slope summed over the whole vocabulary, ``[r]``.
        spec: The divergence.
    """
    _check(student, teacher)
    rows, columns = student.shape
    pieces, piece = _cut(rows, columns)
    gradient_kernel[rows, pieces](
        student,
        teacher,
        normaliser.contiguous(),
        factor.contiguous(),
        shift.contiguous(),
        rows,
        columns,
        piece,
        student.stride(0),
        teacher.stride(0),
        *_parameters(spec),
        **_variant(spec),
        BLOCK=BLOCK,
        **_LAUNCH,
    )


def _check(student: Tensor, teacher: Tensor) -> None:
    """A kernel would read wrong addresses where torch would convert."""
    for name, logits in (("student", student), ("teacher", teacher)):
        if logits.dtype != torch.float32 or logits.shape != student.shape:
            raise ValueError(
                f"{name} is {logits.dtype} {tuple(logits.shape)}; both sides must be float32 of one shape "
                f"(student: {tuple(student.shape)})"
            )
        if logits.shape[1] > 1 and logits.stride(1) != 1:
            raise ValueError(f"{name} has strides {logits.stride()}: its last dimension must be contiguous")


def _cut(rows: int, columns: int) -> tuple[int, int]:
    """Number of pieces of a row, at least one, and columns of each, a multiple of the block (the last may be cut)."""
    blocks = max(1, triton.cdiv(columns, BLOCK))
    blocks_per_piece = triton.cdiv(blocks, min(blocks, triton.cdiv(PROGRAMS, rows)))
    return triton.cdiv(blocks, blocks_per_piece), blocks_per_piece * BLOCK


def _parameters(spec: DivergenceSpec) -> tuple[float, float, float, float]:
    """The numbers of a divergence that its kernels take at run time."""
    clip = spec.entry_clip
    return 1 / spec.temperature, spec.beta, 1 - spec.beta, 0.0 if clip is None else clip


def _variant(spec: DivergenceSpec) -> dict[str, int | bool]:
    """The choices of a divergence that its kernels are compiled for."""
    mode = FORWARD if spec.beta == 0 else REVERSE if spec.beta == 1 else BETWEEN
    return {
        "MODE": int(mode.value),
        "BREGMAN": spec.clip_mode == "bregman",
        "HAS_CLIP": spec.entry_clip is not None,
    }
