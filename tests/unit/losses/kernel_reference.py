"""What the Triton kernels should compute: logits to try them on, and the same numbers in float64 or more."""

from __future__ import annotations

import os
from decimal import Decimal, localcontext

import torch
from torch import Tensor

from opsd_megatron.losses.divergences import DivergenceSpec
from tests.unit.losses.reference import Case, entries

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
EPS = torch.finfo(torch.float32).eps
# What single precision leaves of a sum over a few hundred entries whose log-probabilities are rounded at about 10.
TOLERANCE = 5e-6


def spec_of(case: Case) -> DivergenceSpec:
    return DivergenceSpec(case.beta, case.temperature, case.clip, case.clip_mode)


def logits(rows: int, columns: int, *, seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits of two sides that have something to do with each other, as fresh contiguous tensors."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, columns, generator=generator) * scale
    teacher = student + torch.randn(rows, columns, generator=generator) * scale / 2
    return student.to(DEVICE), teacher.to(DEVICE)


def extreme_logits() -> tuple[Tensor, Tensor]:
    """Four legitimate rows: disjoint one-hots; holes in both sides; a one-hot; pieces without a finite logit."""
    student, teacher = logits(4, 301)
    student[0], teacher[0] = -1e4, -1e4
    student[0, 5] = teacher[0, 290] = 1e4
    student[1, ::2] = -torch.inf
    teacher[1, 1::2] = -torch.inf
    student[2, 3] = 9.0
    teacher[2, 1:] = -torch.inf
    student[3, :290] = -torch.inf
    student[3, 300] = torch.finfo(torch.float32).min
    return student, teacher


def in_rows_of(tensor: Tensor, stride: int, fill: float = 7.0) -> Tensor:
    """The same numbers in rows ``stride`` apart, with ``fill`` between them."""
    buffer = tensor.new_full((tensor.shape[0], stride), fill)
    buffer[:, : tensor.shape[1]] = tensor
    return buffer[:, : tensor.shape[1]]


def normaliser_of(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``[4, r]`` float32, computed in float64."""
    rows = []
    for side in (student.double(), teacher.double()):
        top = side.amax(1, keepdim=True)
        rows += [top.squeeze(1), ((side - top) / temperature).exp().sum(1).log()]
    return torch.stack(rows).float()


def merge(statistics: Tensor) -> dict[str, Tensor]:
    """Statistics of all pieces (and ranks) of rows as one, in float64."""
    pieces = statistics.double()
    result = {}
    for side, top, unit, target in (("student", 0, 5, 7), ("teacher", 2, 6, 8)):
        maximum = pieces[:, top].amax(0)
        shift = pieces[:, top] - maximum
        result[f"{side}_max"] = maximum
        # The statistics know the temperature only through their sums, so the shift needs it from outside.
        result[f"{side}_shift"] = shift
        result[f"{side}_unit_log_sum"] = (pieces[:, unit] * shift.exp()).sum(0).log()
        held = pieces[:, 9] > 0
        result[f"{side}_target"] = torch.where(held, pieces[:, target] + shift, torch.zeros_like(shift)).sum(0)
    attained = (result["student_shift"] == 0) & (result["teacher_shift"] == 0)
    result["agreement"] = (pieces[:, 4] * attained).amax(0)
    result["held"] = pieces[:, 9].sum(0)
    return result


def merged_normaliser(statistics: Tensor, temperature: float) -> Tensor:
    """``[4, r]`` float64 from the statistics of all pieces (and ranks)."""
    merged = merge(statistics)
    log_sums = [
        (statistics[:, row].double() * (merged[f"{side}_shift"] / temperature).exp()).sum(0).log()
        for side, row in (("student", 1), ("teacher", 3))
    ]
    return torch.stack([merged["student_max"], log_sums[0], merged["teacher_max"], log_sums[1]])


def reference_slope(s: Tensor, t: Tensor, case: Case) -> Tensor:
    """``h`` from float64 log-probabilities: autograd of the clipped terms, and the centre that zeroes equal sides."""
    s = s.detach().requires_grad_()
    clip = spec_of(case).entry_clip
    terms = entries(s, t, case)
    (terms if clip is None else terms.clamp(max=clip)).sum().backward()
    assert s.grad is not None
    centre = 0 if case.clip_mode == "bregman" else {0.0: 1, 1.0: -1}.get(case.beta, 0)
    return s.grad + centre * s.detach().exp()


def reference_sums(s: Tensor, t: Tensor, case: Case) -> Tensor:
    """``[9, r]`` from float64 log-probabilities."""
    d = entries(s, t, case)
    p, q = s.exp(), t.exp()
    clip = spec_of(case).entry_clip
    clipped = torch.zeros_like(d) if clip is None else (d >= clip).double()
    kept = d if clip is None else d.clamp(max=clip)
    kept_sums = [kept, clipped, clipped * q]
    rows = [d, reference_slope(s, t, case), *kept_sums, -p * s, -q * t, q * (t - s), p * (s - t)]
    return torch.stack([row.sum(1) for row in rows])


def exact_terms(student: Tensor, teacher: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Values and slopes from log-probabilities by the definitions, in 40 digits: they cancel too much for float64."""
    beta = Decimal(case.beta)
    values, slopes = [], []
    with localcontext(prec=40):
        for number_s, number_t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
            s, t = Decimal(number_s), Decimal(number_t)
            p, q = s.exp(), t.exp()
            log_m = ((1 - beta) * p + beta * q).ln()
            if beta == 0:
                values.append(q * (t - s) + (p - q if case.clip_mode == "bregman" else 0))
                slopes.append(p - q)
            elif beta == 1:
                values.append(p * (s - t) + (q - p if case.clip_mode == "bregman" else 0))
                slopes.append(p * (s - t))
            else:
                values.append(beta * q * (t - log_m) + (1 - beta) * p * (s - log_m))
                slopes.append((1 - beta) * p * (s - log_m))
    shape = {"dtype": torch.float64, "device": DEVICE}
    return tuple(torch.tensor([float(x) for x in xs], **shape).view_as(student) for xs in (values, slopes))
