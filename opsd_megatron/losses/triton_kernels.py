"""The elementwise part of the divergence as Triton kernels, for logits on a CUDA device.

The same maths as :mod:`opsd_megatron.losses.divergences`, from raw logits to sums and to gradients without one
intermediate in memory. Three launches, because two reductions over the tensor-parallel ranks lie between them:

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

Every kernel runs on a grid of rows x pieces. A piece is a range of columns that one program walks in blocks; there are
several to a row so that few rows still fill a GPU. A program keeps one accumulator for each lane of a block and reduces
over the lanes at its end: no traffic between threads inside the loop, and sums whose rounding errors grow with the
number of blocks plus the depth of a tree, not with the number of columns. No atomics: results are reproducible.

Whoever sets ``TRITON_INTERPRET=1`` before the first import of triton runs all of this on CPU tensors, slowly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from opsd_megatron.losses.divergences import LOG_ZERO, DivergenceSpec

STATISTICS = 10
SUMS = 9

# Columns a program takes at a time. With eight warps these are four columns to a thread, one 16-byte load of each side.
# More would keep more bytes in flight but, at nine accumulators a column, fewer threads on a multiprocessor.
BLOCK = 1024
# Programs to aim at where rows alone are fewer: several waves on any present GPU (132 multiprocessors on an H100, each
# with room for three to six programs), so that the last wave's idle part is small.
PROGRAMS = 2048
# Fusing a multiplication and an addition is said aloud because triton's default for it is about to change.
_LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}

_LOG_ZERO = tl.constexpr(LOG_ZERO)
# A running maximum starts here and not at -inf, so that differences from it are never -inf - -inf.
_LOWEST = tl.constexpr(float(torch.finfo(torch.float32).min))

_FORWARD = tl.constexpr(0)
_BETWEEN = tl.constexpr(1)
_REVERSE = tl.constexpr(2)


def _jit(function: Callable[..., Any]) -> Any:
    """``triton.jit`` with a type, which triton does not give it."""
    return triton.jit(function)


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
    statistics = student.new_empty(pieces, STATISTICS, rows)
    _statistics_kernel[rows, pieces](
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
        6 ``-e^t t``; 7 ``e^t (t - s)``; 8 ``e^s (s - t)``. Where ``spec.entry_clip`` is ``None``, row 2 equals row 0
        and rows 3 and 4 are 0.
    """
    _check(student, teacher)
    rows, columns = student.shape
    pieces, piece = _cut(rows, columns)
    sums = student.new_empty(pieces, SUMS, rows)
    _sums_kernel[rows, pieces](
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
    return sums[0] if pieces == 1 else sums.sum(0)


def write_gradient_(
    student: Tensor,
    teacher: Tensor,
    normaliser: Tensor,
    slope_sum: Tensor,
    factor: Tensor,
    spec: DivergenceSpec,
) -> None:
    """Overwrite the student's logits with ``(h - e^s slope_sum) * factor``, their gradient.

    Exactly zero where both sides' logits and normalisers are equal, nothing is clipped and ``slope_sum`` is 0.

    Args:
        student: The logits that :func:`row_sums` had; holds the gradient afterwards.
        teacher: The same for the teacher; left as it is.
        normaliser: As for :func:`row_sums`.
        slope_sum: The slope summed over the whole vocabulary, ``[r]`` float32.
        factor: What each row's gradient is multiplied with, ``[r]`` float32: row weights and, from the chain rule,
            1 / temperature.
        spec: The divergence.
    """
    _check(student, teacher)
    rows, columns = student.shape
    pieces, piece = _cut(rows, columns)
    _gradient_kernel[rows, pieces](
        student,
        teacher,
        normaliser.contiguous(),
        slope_sum.contiguous(),
        factor.contiguous(),
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
    mode = _FORWARD if spec.beta == 0 else _REVERSE if spec.beta == 1 else _BETWEEN
    return {
        "MODE": int(mode.value),
        "BREGMAN": spec.clip_mode == "bregman",
        "HAS_CLIP": spec.entry_clip is not None,
    }


# --- The maths of one block of entries, shared by the kernels. In here only what triton compiles. ---


@_jit
def _load_logits(row_pointer: tl.tensor, offsets: tl.tensor, columns: tl.tensor) -> tl.tensor:
    """A block of a row; columns past the end read as probability 0, which adds nothing to any sum."""
    return tl.load(row_pointer + offsets, mask=offsets < columns, other=float("-inf"))


@_jit
def _log_probability(
    logits: tl.tensor, maximum: tl.tensor, log_sum: tl.tensor, inverse_temperature: tl.tensor
) -> tl.tensor:
    # Two subtractions: folded into one number, a large maximum would swallow the digits of the sum's logarithm. The fma
    # is spelled out so that no compiler may fuse one side and not the other: equal sides must stay equal to the bit.
    return tl.maximum(tl.fma(logits - maximum, inverse_temperature, -log_sum), _LOG_ZERO)


@_jit
def _exp_remainder(y: tl.tensor) -> tl.tensor:
    """``e^y - 1 - y`` for ``|y| < 0.5`` by its Taylor polynomial; the first term left out is below 5e-8 of it."""
    tail = 1.0 / 40320.0
    tail = tail * y + 1.0 / 5040.0
    tail = tail * y + 1.0 / 720.0
    tail = tail * y + 1.0 / 120.0
    tail = tail * y + 1.0 / 24.0
    tail = tail * y + 1.0 / 6.0
    tail = tail * y + 0.5
    return y * y * tail


@_jit
def _expm1(y: tl.tensor) -> tl.tensor:
    """``e^y - 1`` for ``y <= 0``, to a few units in the last place, exactly 0 at 0.

    Triton itself has none, and its interpreter cannot call CUDA's. Far from 0 the subtraction loses less than two bits.
    """
    return tl.where(y > -0.5, y + _exp_remainder(y), tl.exp(y) - 1.0)


@_jit
def _log1p(a: tl.tensor) -> tl.tensor:
    """``log(1 + a)`` for ``-1 < a <= 0``, to a few units in the last place, exactly 0 at 0.

    Near 0 by ``2 atanh(y)`` with ``y = a / (2 + a)``, whose first term left out is below 2e-8 of the result; further
    away the rounding of ``1 + a`` no longer matters.
    """
    y = a / (2.0 + a)
    square = y * y
    tail = 2.0 / 7.0
    tail = tail * square + 2.0 / 5.0
    tail = tail * square + 2.0 / 3.0
    return tl.where(a > -0.25, 2.0 * y + y * square * tail, tl.log(1.0 + a))


@_jit
def _entries(
    s: tl.tensor,
    t: tl.tensor,
    beta: tl.tensor,
    one_minus_beta: tl.tensor,
    clip: tl.tensor,
    MODE: tl.constexpr,
    BREGMAN: tl.constexpr,
    HAS_CLIP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Probabilities of both sides, value, slope and mask of clipped entries, as ``divergences.divergence_entries``.

    Between the endpoints, ``a = log m - s`` is ``log1p(beta expm1(x))`` with ``x = t - s`` where ``x <= 0``, and the
    mirror image elsewhere; ``b = log m - t`` is ``a - x``.

    Two things differ from there, in rounding only. The slope's centre is added by cases and not by ``+ p - p``. And
    terms that are never negative, of the order of ``x^2``, do not lose their digits where the sides are nearly equal:
    with ``r(y) = e^y - 1 - y`` they are ``q r(-x)``, ``p r(x)`` and, because ``(1-beta) p (e^a - 1)`` and
    ``beta q (e^b - 1)`` cancel, ``(1-beta) p r(a) + beta q r(b)``.
    """
    p = tl.exp(s)
    q = tl.exp(t)
    x = t - s
    near = tl.abs(x) < 0.5
    if MODE == _FORWARD:
        value = q * x
        slope = p - q
        slope_if_clipped = p
        if BREGMAN:
            value = tl.where(near, q * _exp_remainder(-x), value - q + p)
            slope_if_clipped = p * 0.0
    elif MODE == _REVERSE:
        value = p * -x
        slope = value
        slope_if_clipped = -p
        if BREGMAN:
            value = tl.where(near, p * _exp_remainder(x), value - p + q)
            slope_if_clipped = p * 0.0
    else:
        above = tl.maximum(x, 0.0)
        weight = tl.where(x > 0, one_minus_beta, beta)
        common = _log1p(weight * _expm1(-tl.abs(x)))
        a = common + above
        b = common + (above - x)
        p_share = one_minus_beta * p
        q_share = beta * q
        slope = -p_share * a
        value = tl.where(near, p_share * _exp_remainder(a) + q_share * _exp_remainder(b), slope - q_share * b)
        slope_if_clipped = p * 0.0
    clipped = value >= clip
    if HAS_CLIP:
        slope = tl.where(clipped, slope_if_clipped, slope)
    return p, q, value, slope, clipped


@_jit
def _add_exponential(total: tl.tensor, difference: tl.tensor) -> tl.tensor:
    """One step of an online softmax: the sum relative to the new maximum, from ``(logit - old maximum) / T``.

    One of the two factors of the textbook's step is always 1, so one exponential does.
    """
    decay = tl.exp(-tl.abs(difference))
    return tl.where(difference > 0, total * decay + 1.0, total + decay)


@_jit
def _merge_lanes(maxima: tl.tensor, totals: tl.tensor, maximum: tl.tensor, inverse_temperature: tl.tensor) -> tl.tensor:
    return tl.sum(totals * tl.exp((maxima - maximum) * inverse_temperature), axis=0)


# --- The kernels: one program for each row and piece. ---


@_jit
def _statistics_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    targets: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    piece: tl.tensor,
    student_stride: tl.tensor,
    teacher_stride: tl.tensor,
    inverse_temperature: tl.tensor,
    UNIT_TEMPERATURE: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)  # times a stride this may pass 2^31
    begin = tl.program_id(1) * piece
    end = tl.minimum(begin + piece, columns)
    student_row = student + row * student_stride
    teacher_row = teacher + row * teacher_stride

    # Of each lane: largest logit so far, sums of exponentials relative to it (at T and at 1), and whether some column
    # has both sides' largest.
    s_maxima = tl.full([BLOCK], _LOWEST, tl.float32)
    t_maxima = tl.full([BLOCK], _LOWEST, tl.float32)
    s_totals = tl.zeros([BLOCK], tl.float32)
    t_totals = tl.zeros([BLOCK], tl.float32)
    s_unit_totals = tl.zeros([BLOCK], tl.float32)
    t_unit_totals = tl.zeros([BLOCK], tl.float32)
    agree = tl.zeros([BLOCK], tl.int1)
    for start in range(begin, end, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        s = _load_logits(student_row, offsets, columns)
        t = _load_logits(teacher_row, offsets, columns)
        # The hardware's maximum ignores NaN; the mark must not depend on what a NaN is compared with.
        s = tl.where(s != s, float("inf"), s)
        t = tl.where(t != t, float("inf"), t)
        agree = ((s >= s_maxima) & (t >= t_maxima)) | (agree & (s <= s_maxima) & (t <= t_maxima))
        s_totals = _add_exponential(s_totals, (s - s_maxima) * inverse_temperature)
        t_totals = _add_exponential(t_totals, (t - t_maxima) * inverse_temperature)
        if not UNIT_TEMPERATURE:
            s_unit_totals = _add_exponential(s_unit_totals, s - s_maxima)
            t_unit_totals = _add_exponential(t_unit_totals, t - t_maxima)
        s_maxima = tl.maximum(s_maxima, s)
        t_maxima = tl.maximum(t_maxima, t)

    s_max = tl.max(s_maxima, axis=0)
    t_max = tl.max(t_maxima, axis=0)
    s_sum = _merge_lanes(s_maxima, s_totals, s_max, inverse_temperature)
    t_sum = _merge_lanes(t_maxima, t_totals, t_max, inverse_temperature)
    s_unit_sum = s_sum
    t_unit_sum = t_sum
    if not UNIT_TEMPERATURE:
        s_unit_sum = _merge_lanes(s_maxima, s_unit_totals, s_max, 1.0)
        t_unit_sum = _merge_lanes(t_maxima, t_unit_totals, t_max, 1.0)
    agrees = tl.max(tl.where(agree & (s_maxima == s_max) & (t_maxima == t_max), 1.0, 0.0), axis=0)
    # A side without a finite logit never moved from where it started.
    s_seen = (s_max > _LOWEST) | (s_sum > 0)
    t_seen = (t_max > _LOWEST) | (t_sum > 0)

    out = out + tl.program_id(1) * (10 * rows) + row
    tl.store(out, tl.where(s_seen, s_max, float("-inf")))
    tl.store(out + rows, s_sum)
    tl.store(out + 2 * rows, tl.where(t_seen, t_max, float("-inf")))
    tl.store(out + 3 * rows, t_sum)
    tl.store(out + 4 * rows, agrees)
    tl.store(out + 5 * rows, s_unit_sum)
    tl.store(out + 6 * rows, t_unit_sum)
    s_target = 0.0
    t_target = 0.0
    held_number = 0.0
    if HAS_TARGETS:
        target = tl.load(targets + row)
        held = (target >= begin) & (target < end)
        s_logit = tl.load(student_row + target, mask=held, other=0.0)
        t_logit = tl.load(teacher_row + target, mask=held, other=0.0)
        s_target = tl.where(held, s_logit - s_max, 0.0)
        t_target = tl.where(held, t_logit - t_max, 0.0)
        held_number = tl.where(held, 1.0, 0.0)
    tl.store(out + 7 * rows, s_target)
    tl.store(out + 8 * rows, t_target)
    tl.store(out + 9 * rows, held_number)


@_jit
def _sums_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    normaliser: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    piece: tl.tensor,
    student_stride: tl.tensor,
    teacher_stride: tl.tensor,
    inverse_temperature: tl.tensor,
    beta: tl.tensor,
    one_minus_beta: tl.tensor,
    clip: tl.tensor,
    MODE: tl.constexpr,
    BREGMAN: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * piece
    end = tl.minimum(begin + piece, columns)
    student_row = student + row * student_stride
    teacher_row = teacher + row * teacher_stride
    s_max = tl.load(normaliser + row)
    s_log_sum = tl.load(normaliser + rows + row)
    t_max = tl.load(normaliser + 2 * rows + row)
    t_log_sum = tl.load(normaliser + 3 * rows + row)

    values = tl.zeros([BLOCK], tl.float32)
    slopes = tl.zeros([BLOCK], tl.float32)
    clipped_values = tl.zeros([BLOCK], tl.float32)
    counts = tl.zeros([BLOCK], tl.float32)
    masses = tl.zeros([BLOCK], tl.float32)
    student_entropies = tl.zeros([BLOCK], tl.float32)
    teacher_entropies = tl.zeros([BLOCK], tl.float32)
    forward = tl.zeros([BLOCK], tl.float32)
    reverse = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        s = _load_logits(student_row, offsets, columns)
        t = _load_logits(teacher_row, offsets, columns)
        s = _log_probability(s, s_max, s_log_sum, inverse_temperature)
        t = _log_probability(t, t_max, t_log_sum, inverse_temperature)
        p, q, value, slope, clipped = _entries(s, t, beta, one_minus_beta, clip, MODE, BREGMAN, HAS_CLIP)
        values += value
        slopes += slope
        if HAS_CLIP:
            clipped_values += tl.minimum(value, clip)
            counts += tl.where(clipped, 1.0, 0.0)
            masses += tl.where(clipped, q, 0.0)
        student_entropies -= p * s
        teacher_entropies -= q * t
        forward += q * (t - s)
        reverse -= p * (t - s)

    value_sum = tl.sum(values, axis=0)
    out = out + tl.program_id(1) * (9 * rows) + row
    tl.store(out, value_sum)
    tl.store(out + rows, tl.sum(slopes, axis=0))
    if HAS_CLIP:
        tl.store(out + 2 * rows, tl.sum(clipped_values, axis=0))
    else:
        tl.store(out + 2 * rows, value_sum)
    tl.store(out + 3 * rows, tl.sum(counts, axis=0))
    tl.store(out + 4 * rows, tl.sum(masses, axis=0))
    tl.store(out + 5 * rows, tl.sum(student_entropies, axis=0))
    tl.store(out + 6 * rows, tl.sum(teacher_entropies, axis=0))
    tl.store(out + 7 * rows, tl.sum(forward, axis=0))
    tl.store(out + 8 * rows, tl.sum(reverse, axis=0))


@_jit
def _gradient_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    normaliser: tl.tensor,
    slope_sums: tl.tensor,
    factors: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    piece: tl.tensor,
    student_stride: tl.tensor,
    teacher_stride: tl.tensor,
    inverse_temperature: tl.tensor,
    beta: tl.tensor,
    one_minus_beta: tl.tensor,
    clip: tl.tensor,
    MODE: tl.constexpr,
    BREGMAN: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * piece
    end = tl.minimum(begin + piece, columns)
    student_row = student + row * student_stride
    teacher_row = teacher + row * teacher_stride
    s_max = tl.load(normaliser + row)
    s_log_sum = tl.load(normaliser + rows + row)
    t_max = tl.load(normaliser + 2 * rows + row)
    t_log_sum = tl.load(normaliser + 3 * rows + row)
    slope_sum = tl.load(slope_sums + row)
    factor = tl.load(factors + row)
    for start in range(begin, end, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        s = _load_logits(student_row, offsets, columns)
        t = _load_logits(teacher_row, offsets, columns)
        s = _log_probability(s, s_max, s_log_sum, inverse_temperature)
        t = _log_probability(t, t_max, t_log_sum, inverse_temperature)
        p, _q, _value, slope, _clipped = _entries(s, t, beta, one_minus_beta, clip, MODE, BREGMAN, HAS_CLIP)
        gradient = (slope - p * slope_sum) * factor
        tl.store(student_row + offsets, gradient, mask=offsets < columns)
