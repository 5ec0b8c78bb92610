"""Elementary functions which ``torch.compile`` makes slow or inexact on CPU, written out for it as polynomials.

It calls a library for every exponential or logarithm, and knows ``expm1`` only as ``exp(y) - 1``. Uncompiled, torch's
own are used, in place; compiled, the argument stays as it is. Either way the result is what is returned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# P of log(1 + f) = f - f^2 / 2 + f^3 P(f) with 1 + f between the roots of 1/2 and 2, highest power first. Fitted for a
# small largest relative error of the whole, 8e-10, by least squares at Chebyshev nodes, weighted again and again.
_LOG1P = (
    0.0674659686612904,
    -0.11675639462588937,
    0.11888175669150755,
    -0.12405591814497335,
    0.1421955080920325,
    -0.16667995639494856,
    0.20002118736356633,
    -0.2500000960425459,
    0.33333312602741366,
)


def expm1_(y: Tensor) -> Tensor:
    """``e^y - 1`` for ``y <= 0``, to a few units in the last place, exactly 0 at 0.

    Compiled for CPU torch's own is ``exp(y) - 1``, which has hardly a digit left near 0. There a Taylor polynomial
    takes its place; the first term left out is below 2e-8 of the result.
    """
    if not torch.compiler.is_compiling():
        return y.expm1_()
    tail = polynomial(y, [1 / math.factorial(n) for n in range(8, 0, -1)])
    return torch.where(y > -0.5, y * tail, y.exp() - 1)


def log1p_(y: Tensor, least: float) -> Tensor:
    """``log(1 + y)`` for ``least - 1 <= y <= 0``, to a few units in the last place, exactly 0 at 0.

    Compiled for CPU torch's own is a call that does for every ``y`` and costs more than an exponential. There ``1 + y``
    is brought between the roots of 1/2 and 2 by a power of 2, and the rest is a polynomial.
    """
    if not torch.compiler.is_compiling():
        return y.log1p_()
    scale, offset, halvings = torch.ones_like(y), torch.zeros_like(y), 0
    while 2.0**-halvings * math.sqrt(0.5) > least:
        below = y < 2.0**-halvings * math.sqrt(0.5) - 1
        halvings += 1
        scale = torch.where(below, 2.0**halvings, scale)
        offset = torch.where(below, -halvings * math.log(2), offset)
    f = y * scale + (scale - 1)
    return offset + (f + f * f * (polynomial(f, _LOG1P) * f - 0.5))


def polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """The polynomial in ``x`` of at least two coefficients, the highest power's first, by Horner's rule."""
    total = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        total = total * x + coefficient
    return total
