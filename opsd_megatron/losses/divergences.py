"""The divergence family, one vocabulary entry at a time: pure elementwise maths, no reduction and no process group.

With ``s = log p_S`` and ``t = log p_T`` at one row and entry, every member has a term ``d`` whose sum over the
vocabulary is the divergence, and a derivative ``g = dd/ds``:

====================  ==================================================  =====================
beta                  d                                                   g
====================  ==================================================  =====================
0 (forward KL)        e^t (t - s)                                         -e^t
between               beta e^t (t - log m) + (1-beta) e^s (s - log m)     (1-beta) e^s (s - log m)
1 (reverse KL)        e^s (s - t)                                         e^s (s - t + 1)
====================  ==================================================  =====================

with ``m = (1-beta) p_S + beta p_T``. The endpoints are special cases, not limits: the limit of the middle row is 0.

A clip ``tau`` acts in one of these ways (``clip_mode``):

- ``entry``: ``min(d, tau)`` per entry, before the sum, as in OPSD (arXiv 2601.18734). At beta 0 and 1 entries are
  signed, so the clipped sum can go below zero and is then no divergence; watch the unclipped one.
- ``bregman``: the same clamp on terms that are non-negative and have the same unclipped sum:
  ``e^t (t - s) - e^t + e^s`` at beta 0, ``e^s (s - t) - e^s + e^t`` at beta 1. Equal to ``entry`` in between.
- ``rescale``: the row's sum ``L`` times ``tau / max(tau, L)`` with the factor held constant: the gradient is scaled
  and its direction kept.
- ``token``: ``min(L, tau)`` per row; a clipped row has no gradient.
- ``none``: no clip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from opsd_megatron.losses.elementary import expm1_, log1p_, polynomial

ClipMode = Literal["entry", "bregman", "rescale", "token", "none"]

# Log-probability of an entry whose logit is -inf. Finite, so that 0 * log 0 is 0 and a difference of two is 0.
LOG_ZERO = -1e30

# Between the endpoints beta keeps this distance from them. The divergence is proportional to it there, and its slope is
# a difference of logarithms which float32 rounds by 1e-7.
LEAST_BETA = 1e-4


@dataclass(frozen=True)
class DivergenceSpec:
    """Which divergence, and how it is clipped.

    Attributes:
        beta: 0 is forward KL(teacher || student), 1 reverse KL, in between generalized Jensen-Shannon.
        temperature: Both sides' logits are divided by it; the one the student samples with.
        clip: Upper clip tau; ``None`` for no clip.
        clip_mode: Where the clip acts, see the module's docstring.

    Raises:
        ValueError: A value is out of range.
    """

    beta: float
    temperature: float = 1.0
    clip: float | None = None
    clip_mode: ClipMode = "entry"

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta} must be between 0 and 1")
        if 0 < min(self.beta, 1 - self.beta) < LEAST_BETA * (1 - 1e-9):
            raise ValueError(
                f"beta={self.beta} is neither 0 nor 1 but nearer than {LEAST_BETA:g}, where the divergence vanishes; "
                "use 0 for forward KL and 1 for reverse KL"
            )
        check_temperature(self.temperature)
        check_clip(self.clip)
        if self.clip_mode not in get_args(ClipMode):
            raise ValueError(f"clip_mode={self.clip_mode!r} is not one of {', '.join(get_args(ClipMode))}")

    @property
    def entry_clip(self) -> float | None:
        """The clip on single vocabulary entries, if this mode has one."""
        return self.clip if self.clip_mode in ("entry", "bregman") else None

    @property
    def row_clip(self) -> float | None:
        """The clip on a row's sum, if this mode has one."""
        return self.clip if self.clip_mode in ("rescale", "token") else None


@dataclass(frozen=True)
class Entries:
    """The terms of a block of vocabulary entries, all of the shape of the log-probabilities they came from.

    Attributes:
        student_prob: ``e^s``.
        teacher_prob: ``e^t``.
        value: ``d``, before any clip.
        slope: ``h = a g + c e^s`` with ``a`` the mask of entries not clipped. Adding a multiple ``c`` of ``e^s`` leaves
            the gradient of the loss with respect to the logits, ``h - e^s sum(h)``, as it is; ``c`` is such that ``h``
            is exactly zero wherever ``s == t`` and nothing is clipped, so equal sides get an exactly zero gradient.
        clipped: 1 where an entry is clipped, else 0, in the dtype of the rest; ``None`` where none is.
        log_ratio: ``t - s``.
    """

    student_prob: Tensor
    teacher_prob: Tensor
    value: Tensor
    slope: Tensor
    clipped: Tensor | None
    log_ratio: Tensor


def check_temperature(temperature: float) -> None:
    """Check that logits can be divided by it.

    Raises:
        ValueError: They cannot.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature} must be a finite number above 0")


def check_clip(clip: float | None) -> None:
    """Check that it is a clip, or ``None`` for no clip.

    Raises:
        ValueError: It is not.
    """
    if clip is not None and not (math.isfinite(clip) and clip > 0):
        raise ValueError(f"clip={clip} must be a finite number above 0, or None for no clip")


def divergence_entries(
    student_log_prob: Tensor,
    teacher_log_prob: Tensor,
    spec: DivergenceSpec,
    probs: tuple[Tensor, Tensor] | None = None,
) -> Entries:
    """The divergence's terms and slopes from log-probabilities of any equal shape, at or above ``LOG_ZERO``.

    Args:
        student_log_prob: ``s``.
        teacher_log_prob: ``t``.
        spec: The divergence.
        probs: ``e^s`` and ``e^t`` where they are at hand already.
    """
    s, t = student_log_prob, teacher_log_prob
    x = t - s
    p, q = _probs(s, t, x, spec.beta) if probs is None else probs
    bregman = spec.clip_mode == "bregman"
    centre: Literal[-1, 0, 1] = 0
    if spec.beta == 0:
        value = q * x
        if bregman:
            value, slope = _bregman(value.sub_(q).add_(p), q, -x), p - q
        else:
            slope, centre = q.neg(), 1
    elif spec.beta == 1:
        value = (p * x).neg_()
        if bregman:
            slope = value.clone()
            value = _bregman(value.sub_(p).add_(q), p, x)
        else:
            slope, centre = value + p, -1
    else:
        s_below, t_below = _below_mixture(x, spec.beta)
        slope = s_below.mul_(p).mul_(spec.beta - 1)
        value = torch.addcmul(slope, q, t_below, value=-spec.beta)
    clipped: Tensor | None = None
    if spec.entry_clip is not None and _may_reach(value, spec.entry_clip):
        # Arithmetic on 0 and 1 instead of boolean masks: on CPU those are not vectorised and cost more than exp().
        clipped = value.clone().ge_(spec.entry_clip)
        slope = torch.addcmul(slope, slope, clipped, value=-1)
    if centre:
        slope = slope.add_(p, alpha=centre)
    return Entries(p, q, value, slope, clipped, x)


def _probs(s: Tensor, t: Tensor, x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """``e^s`` and ``e^t``. Fused, the smaller is the larger times ``e^-|x|``, which the mixture needs in any case."""
    if beta in (0, 1) or not torch.compiler.is_compiling():
        return s.exp(), t.exp()
    larger = torch.maximum(s, t).exp()
    smaller = larger * _fall(x, x.clamp(min=0)).exp()
    return torch.where(x > 0, smaller, larger), torch.where(x > 0, larger, smaller)


def _bregman(value: Tensor, prob: Tensor, y: Tensor) -> Tensor:
    """``prob (e^y - 1 - y)``, never negative; near 0 by a Taylor polynomial, where ``value`` has no digits left of it.

    The first term left out is below 5e-8 of the result: enough for float32, and float64 needs none.
    """
    if value.dtype == torch.float64:
        return value
    tail = polynomial(y, [1 / math.factorial(n) for n in range(8, 1, -1)])
    return torch.where(y.abs() < 0.5, y * y * tail * prob, value)


def _may_reach(value: Tensor, clip: float) -> bool:
    """Whether an entry may be clipped. On CPU one look at the largest saves most blocks six passes, unless fused."""
    if torch.compiler.is_compiling():
        return True
    return value.device.type != "cpu" or (value.numel() > 0 and bool(value.amax() >= clip))


def _below_mixture(x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """``log m - s`` and ``log m - t`` for the mixture ``m = (1-beta) e^s + beta e^t``, from ``x = t - s``.

    Uses ``log m - s = log1p(beta expm1(x))`` where ``x <= 0``, and the mirror image elsewhere, so
    nothing overflows and both results are exactly zero where ``s == t``. A logaddexp of the two would leave a rounding
    error there, and the divergence of nearly equal sides is made of little else.
    """
    above = x.clamp(min=0)
    decay = expm1_(_fall(x, above))
    if beta == 0.5:
        decay.mul_(0.5)
    else:
        decay.mul_(x.clone().gt_(0).mul_(1 - 2 * beta).add_(beta))  # by 1 - beta where x > 0, else by beta
    common = log1p_(decay, least=min(beta, 1 - beta))
    s_below = common + above
    return s_below, common.add_(above.sub_(x))


def _fall(x: Tensor, above: Tensor) -> Tensor:
    """``-|x|``, given the larger of ``x`` and 0."""
    return torch.sub(x, above, alpha=2)
