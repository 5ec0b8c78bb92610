"""Seconds spent in each phase of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Adds up wall-clock seconds by phase name: ``with timer("rollout"): ...``.

    On CUDA, kernels are queued, so the current device is synchronised where a phase begins and ends: otherwise the time
    would be charged to whichever later phase happens to wait. Phases may repeat (they add up) and nest (the inner one
    counts in both).

    Attributes:
        seconds: Seconds by phase, in the order in which phases first ended.
        bytes: Bytes moved by phase, of those phases that say so.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, int] = {}
        self._made = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds since this timer was made, in phases and between them."""
        return _now() - self._made

    def moved(self, phase: str, count: int) -> None:
        """Charge ``count`` bytes to ``phase``."""
        self.bytes[phase] = self.bytes.get(phase, 0) + count

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Charge the block to ``phase``, also where it raises."""
        started = _now()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + _now() - started


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
