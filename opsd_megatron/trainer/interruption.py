"""Being told to stop: by a scheduler that takes the machines away, or by a person."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interruption:
    """While entered, SIGTERM and SIGUSR1 no longer end this process: the first of them is noted.

    Once a SIGTERM is noted, a second one ends the process at once, by the kernel. Python notes signals between
    bytecodes: within a collective that never ends it notes none, and what ends the process is the collective's limit or
    SIGKILL, which torchrun sends 30 seconds after its SIGTERM. Handlers exist on the main thread only, as Python has
    it; entered on another thread, nothing is noted and signals act as before. Leaving restores what was there.

    Attributes:
        number: The first signal's number; 0 while there was none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Restore the handlers of before."""
        for number, handler in self._before.items():
            # None: one that C code had installed, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if number == signal.SIGTERM:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
