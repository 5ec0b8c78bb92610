from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

from opsd_megatron.trainer.interruption import Interruption

NUMBERS = (signal.SIGTERM, signal.SIGUSR1)


def test_the_first_signal_is_noted_and_what_was_there_comes_back() -> None:
    seen: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: seen.append(number)) for number in NUMBERS}
    try:
        with Interruption() as interruption:
            assert interruption.number == 0
            for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
                os.kill(os.getpid(), number)
            assert interruption.number == signal.SIGUSR1 and not seen
        for number in NUMBERS:
            os.kill(os.getpid(), number)
        assert seen == list(NUMBERS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_second_sigterm_ends_the_process() -> None:
    program = (
        "import os, signal\n"
        "from opsd_megatron.trainer.interruption import Interruption\n"
        "with Interruption():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('and after the second', flush=True)\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.returncode == -signal.SIGTERM
    assert finished.stdout == "still here\n"


def test_on_another_thread_nothing_is_installed() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    found: list[object] = []

    def enter() -> None:
        with Interruption() as interruption:
            found.extend([interruption.number, *map(signal.getsignal, NUMBERS)])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [0, *before]
