"""What the losses are held against: dense float64 autograd, written from the definitions and nothing shared."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_megatron.losses import ClipMode, TopK

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
CLIPS = (0.05, 1e-3, 1e-6)
CLIP_MODES: tuple[ClipMode, ...] = ("entry", "bregman", "rescale", "token")
TEMPERATURES = (0.7, 1.0, 1.1)


@dataclass(frozen=True)
class Case:
    """One member of the family of losses."""

    beta: float
    temperature: float = 1.0
    clip: float | None = None
    clip_mode: ClipMode = "entry"


def all_cases() -> list[Case]:
    """Every beta x temperature, unclipped under each name for it and with every clip in every mode."""
    cases = []
    for beta, temperature in itertools.product(BETAS, TEMPERATURES):
        cases += [Case(beta, temperature), Case(beta, temperature, 1e-3, "none")]
        cases += [Case(beta, temperature, *clip) for clip in itertools.product(CLIPS, CLIP_MODES)]
    return cases


def some_cases(count: int, seed: int = 0) -> list[Case]:
    """A sample of ``count`` of them, the same on every rank, with every beta, every temperature and every clip mode."""
    for draw in itertools.count(seed):
        chosen = random.Random(draw).sample(all_cases(), count)
        kinds = {(case.beta, None, None) for case in chosen} | {(None, case.temperature, None) for case in chosen}
        kinds |= {(None, None, case.clip_mode) for case in chosen if case.clip is not None}
        if len(kinds) == len(BETAS) + len(TEMPERATURES) + len(get_args(ClipMode)):
            return chosen
    raise AssertionError


def entries(s: Tensor, t: Tensor, case: Case) -> Tensor:
    """The unclipped terms of the divergence, from log-probabilities."""
    bregman = case.clip_mode == "bregman"
    if case.beta == 0:
        return t.exp() * (t - s) + ((s.exp() - t.exp()) if bregman else 0)
    if case.beta == 1:
        return s.exp() * (s - t) + ((t.exp() - s.exp()) if bregman else 0)
    m = torch.logaddexp(s + math.log(1 - case.beta), t + math.log(case.beta))
    return case.beta * t.exp() * (t - m) + (1 - case.beta) * s.exp() * (s - m)


def dense_divergence(student_logits: Tensor, teacher_logits: Tensor, case: Case) -> Tensor:
    """Loss of each row, ``[R, V] x2 -> [R]`` float64, differentiable by autograd."""
    s = torch.log_softmax(student_logits.double() / case.temperature, dim=1)
    t = torch.log_softmax(teacher_logits.double() / case.temperature, dim=1)
    return clipped_sum(entries(s, t, case), case)


def dense_topk(student_logits: Tensor, teacher_logits: Tensor, case: Case, support: TopK) -> Tensor:
    """The same over the k most likely entries of one side."""
    return clipped_sum(entries(*on_support(student_logits, teacher_logits, case, support), case), case)


def on_support(student_logits: Tensor, teacher_logits: Tensor, case: Case, support: TopK) -> tuple[Tensor, Tensor]:
    """Both sides' log-probabilities of the entries that a top-k divergence is taken over."""
    logits = [student_logits.double() / case.temperature, teacher_logits.double() / case.temperature]
    ids = logits[support.side == "teacher"].topk(support.k, dim=1).indices
    outside = torch.ones_like(logits[0], dtype=torch.bool).scatter(1, ids, False)
    sides = []
    for side in logits:
        chosen = side.log_softmax(1).gather(1, ids)
        if support.tail == "renormalise":
            sides.append(side.gather(1, ids).log_softmax(1))
        else:
            rest = side.log_softmax(1).masked_fill(~outside, -math.inf).logsumexp(1, keepdim=True)
            sides.append(torch.cat([chosen, rest], 1))
    return sides[0], sides[1]


def clipped_sum(d: Tensor, case: Case) -> Tensor:
    """Loss of each row from its terms."""
    if case.clip is None or case.clip_mode == "none":
        return d.sum(1)
    if case.clip_mode in ("entry", "bregman"):
        return torch.clamp(d, max=case.clip).sum(1)
    total = d.sum(1)
    if case.clip_mode == "token":
        return torch.clamp(total, max=case.clip)
    return total * (case.clip / torch.clamp(total.detach(), min=case.clip))


def worst(actual: Tensor, expected: Tensor, unit: float | None = None) -> float:
    """Largest difference in units of ``unit``, by default the largest expected value; infinite if one is not finite."""
    if actual.shape != expected.shape or not actual.isfinite().all():
        return math.inf
    if actual.numel() == 0:
        return 0.0
    unit = max(float(expected.abs().max()), 1e-300) if unit is None else unit
    return float((actual.detach().double() - expected.double()).abs().max()) / unit


def shard_of(full: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's equal part of ``full`` along ``dim``, as a leaf of its own."""
    if group is None:
        return full.clone()
    return full.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)].clone()


def world() -> dist.ProcessGroup | None:
    """The group of all ranks, or ``None`` outside of a launch."""
    return dist.group.WORLD if dist.is_initialized() else None


@contextmanager
def count_collectives() -> Iterator[Callable[[], tuple[int, int]]]:
    """Count calls: yields a function that says how many all-reduces and all-gathers there were so far."""
    with (
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce,
        mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as all_gather,
    ):
        yield lambda: (all_reduce.call_count, all_gather.call_count)
