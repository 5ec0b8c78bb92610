"""How a program ends: what it prints, its status, and that nothing can keep it from ending."""

from __future__ import annotations

import subprocess
import sys

import pytest

# A thread that never ends stands for the engine's and the process groups' own endings, which the interpreter waits for.
PROGRAM = """
import sys, threading
from opsd_megatron import train
from opsd_megatron.errors import ConfigError, Interrupted
threading.Thread(target=threading.Event().wait).start()
def program(arguments):
    print("unflushed", end="")
    {statement}
train.leave(train.exit_status(program))
"""


@pytest.mark.parametrize(
    ("statement", "status", "printed"),
    [
        ("raise ConfigError('bad key')", 2, ["error: bad key"]),
        ("raise Interrupted('SIGTERM')", 75, []),
        ("import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried 2 GiB.\\nGPU 0')", 1, None),
        ("[].pop()", 1, None),
    ],
    ids=["bad-input", "interrupted", "memory", "defect"],
)
def test_an_error_ends_the_process_at_once(statement: str, status: int, printed: list[str] | None) -> None:
    command = [sys.executable, "-c", PROGRAM.format(statement=statement)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert finished.returncode == status
    assert finished.stdout == "unflushed"
    lines = finished.stderr.splitlines()
    if printed is not None:
        assert lines == printed
    elif "OutOfMemory" in statement:
        (line,) = lines
        assert line.startswith("error on rank 0: CUDA out of memory. Tried 2 GiB. GPU 0 Lower ")
        assert "train.tokens_per_micro_batch" in line and "rollout.memory_fraction" in line
    else:
        assert (lines[0], lines[1]) == ("rank 0:", "Traceback (most recent call last):")
        assert lines[-1] == "IndexError: pop from empty list"
        assert finished.stderr.count("Traceback") == 1
