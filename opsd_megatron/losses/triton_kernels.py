"""The elementwise part of the divergence as Triton kernels; :mod:`opsd_megatron.losses.triton_rows` launches them.

The same maths as :mod:`opsd_megatron.losses.divergences`, from raw logits to sums and to gradients without one
intermediate in memory. There too is what goes in and comes out.

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

from opsd_megatron.losses.divergences import LOG_ZERO

# Which formula a kernel is compiled for.
FORWARD = tl.constexpr(0)
BETWEEN = tl.constexpr(1)
REVERSE = tl.constexpr(2)

_LOG_ZERO = tl.constexpr(LOG_ZERO)
# A running maximum starts here and not at -inf, so that differences from it are never -inf - -inf.
_LOWEST = tl.constexpr(float(torch.finfo(torch.float32).min))


def _jit(function: Callable[..., Any]) -> Any:
    """``triton.jit`` with a type, which triton does not give it.

    The number of rows only strides single numbers: not worth a compilation each for 1, multiples of 16 and others.
    """
    return triton.jit(function, do_not_specialize=["rows"])


# --- The maths of one block of entries, shared by the kernels. ---


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
    if MODE == FORWARD:
        value = q * x
        slope = p - q
        slope_if_clipped = p
        if BREGMAN:
            value = tl.where(near, q * _exp_remainder(-x), value - q + p)
            slope_if_clipped = p * 0.0
    elif MODE == REVERSE:
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


@_jit
def _largest_seen(maximum: tl.tensor, total: tl.tensor) -> tl.tensor:
    # A side without a finite logit never moved from where it started.
    return tl.where((maximum > _LOWEST) | (total > 0), maximum, float("-inf"))


@_jit
def _centred_target(side_row: tl.tensor, target: tl.tensor, held: tl.tensor, maximum: tl.tensor) -> tl.tensor:
    return tl.where(held, tl.load(side_row + target, mask=held, other=0.0) - maximum, 0.0)


# --- The kernels: one program for each row and piece. ---


@_jit
def statistics_kernel(
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
    """See ``triton_rows.row_statistics``."""
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

    out = out + tl.program_id(1) * (10 * rows) + row
    tl.store(out, _largest_seen(s_max, s_sum))
    tl.store(out + rows, s_sum)
    tl.store(out + 2 * rows, _largest_seen(t_max, t_sum))
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
        s_target = _centred_target(student_row, target, held, s_max)
        t_target = _centred_target(teacher_row, target, held, t_max)
        held_number = tl.where(held, 1.0, 0.0)
    tl.store(out + 7 * rows, s_target)
    tl.store(out + 8 * rows, t_target)
    tl.store(out + 9 * rows, held_number)


@_jit
def sums_kernel(
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
    """See ``triton_rows.row_sums``."""
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
def gradient_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    normaliser: tl.tensor,
    factors: tl.tensor,
    shifts: tl.tensor,
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
    """See ``triton_rows.write_gradient_``."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * piece
    end = tl.minimum(begin + piece, columns)
    student_row = student + row * student_stride
    teacher_row = teacher + row * teacher_stride
    s_max = tl.load(normaliser + row)
    s_log_sum = tl.load(normaliser + rows + row)
    t_max = tl.load(normaliser + 2 * rows + row)
    t_log_sum = tl.load(normaliser + 3 * rows + row)
    factor = tl.load(factors + row)
    shift = tl.load(shifts + row)
    for start in range(begin, end, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        s = _load_logits(student_row, offsets, columns)
        t = _load_logits(teacher_row, offsets, columns)
        s = _log_probability(s, s_max, s_log_sum, inverse_temperature)
        t = _log_probability(t, t_max, t_log_sum, inverse_temperature)
        p, _q, _value, slope, _clipped = _entries(s, t, beta, one_minus_beta, clip, MODE, BREGMAN, HAS_CLIP)
        gradient = slope * factor - p * shift
        tl.store(student_row + offsets, gradient, mask=offsets < columns)
