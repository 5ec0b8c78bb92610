from __future__ import annotations

import pytest
import torch

from opsd_megatron.telemetry import timers
from opsd_megatron.telemetry.timers import PhaseTimer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(timers.time, "perf_counter", lambda: now[0])
    return now


def test_phases_add_up_and_nest(clock: list[float]) -> None:
    timer = PhaseTimer()
    with timer("outer"):
        clock[0] += 1
        with timer("inner"):
            clock[0] += 2
    with timer("inner"):
        clock[0] += 4
    assert timer.seconds == {"inner": 6.0, "outer": 3.0}


def test_a_phase_that_raises_counts(clock: list[float]) -> None:
    timer = PhaseTimer()
    with pytest.raises(RuntimeError, match="broken"), timer("phase"):
        clock[0] += 1
        raise RuntimeError("broken")
    assert timer.seconds == {"phase": 1.0}


def test_on_cuda_queued_work_is_charged_to_its_phase(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    queued = [0.0]

    def synchronize() -> None:
        clock[0] += queued[0]
        queued[0] = 0.0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    timer = PhaseTimer()
    queued[0] = 5.0  # before the phase: not its work
    with timer("phase"):
        queued[0] = 3.0
    assert timer.seconds == {"phase": 3.0}
