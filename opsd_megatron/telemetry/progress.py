"""Progress for people: a bar with the time left on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tqdm import tqdm

# Short steps would bury everything else in a log; every step is in metrics.jsonl.
_SECONDS_BETWEEN_LINES = 2.0


class Progress:
    """Shows how far a run is.

    Ranks: rank 0 only.
    """

    def __init__(self, total: int, *, initial: int = 0, stream: TextIO | None = None) -> None:
        """Start at ``initial`` of ``total`` steps.

        Args:
            total: Steps of the whole run.
            initial: Steps done before, by the run this one resumes.
            stream: Where to show it; standard error by default, so that standard output stays clean.
        """
        self._total, self._initial = total, initial
        self._stream = sys.stderr if stream is None else stream
        self._started = time.monotonic()
        self._printed = -_SECONDS_BETWEEN_LINES
        self._bar: tqdm[None] | None = None
        if self._stream.isatty():
            self._bar = tqdm(total=total, initial=initial, desc="step", file=self._stream, dynamic_ncols=True)

    def update(self, step: int, summary: str = "") -> None:
        """Show that ``step`` steps are done; ``summary`` is a few words on the last one."""
        if self._bar is not None:
            self._bar.set_postfix_str(summary, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if step == self._total or now - self._printed >= _SECONDS_BETWEEN_LINES:
            self._printed = now
            self._print(f"step {step}/{self._total} {summary}".rstrip() + f" ({self._time_left(step)} left)")

    def message(self, text: str) -> None:
        """Show a line of its own, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._print(text)

    def close(self) -> None:
        """Leave the bar as it is and free the line."""
        if self._bar is not None:
            self._bar.close()

    def _time_left(self, step: int) -> str:
        done = step - self._initial
        if done <= 0:
            return "unknown time"
        seconds = (time.monotonic() - self._started) / done * (self._total - step)
        return str(tqdm.format_interval(seconds))

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)
