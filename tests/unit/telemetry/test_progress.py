from __future__ import annotations

import io

import pytest

from opsd_megatron.telemetry import progress as progress_module
from opsd_megatron.telemetry.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_with_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = Progress(10, initial=4, stream=stream)
    now[0] = 30.0
    progress.update(6, "loss 0.5")
    progress.message("evaluated")
    now[0] = 60.0
    progress.update(10)
    progress.close()
    # Two of six steps took 30 seconds: the four others take 60. Steps of an earlier run do not count.
    assert stream.getvalue() == "step 6/10 loss 0.5 (01:00 left)\nevaluated\nstep 10/10 (00:00 left)\n"


def test_no_step_done_yet_has_no_estimate() -> None:
    stream = io.StringIO()
    Progress(10, initial=4, stream=stream).update(4)
    assert stream.getvalue() == "step 4/10 (unknown time left)\n"


def test_a_bar_on_a_terminal() -> None:
    stream = Terminal()
    progress = Progress(10, initial=4, stream=stream)
    progress.update(10, "loss 0.5")
    progress.message("evaluated")
    progress.close()
    shown = stream.getvalue()
    assert "4/10" in shown and "10/10" in shown and "loss 0.5" in shown
    assert "evaluated\n" in shown and "left" not in shown


def test_standard_error_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(2).update(1)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("step 1/2")


def test_short_steps_do_not_fill_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = Progress(100, stream=stream)
    for step in range(1, 101):
        now[0] += 0.1
        progress.update(step)
    shown = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    assert shown[0] == 1 and shown[-1] == 100
    assert 5 <= len(shown) <= 8
