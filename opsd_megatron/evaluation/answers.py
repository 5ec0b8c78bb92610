r"""Judging answers: the last ``\boxed{}`` of a response against the reference answer, by math-verify.

A response is text a model made up, and math-verify hands it to regular expressions, a parser and a computer algebra
system: an exponent tower or deep nesting can take forever, exhaust memory or overflow the C stack. So judging happens
in processes of its own, with a time and a memory limit per answer. An answer that breaks a limit takes its process
down, counts as wrong, and the rest continues in a new process.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from opsd_megatron.data.boxed import last_boxed
from opsd_megatron.errors import OpsdError

Status = Literal["ok", "unparsable", "timeout"]

_WORKER = Path(__file__).with_name("judge_worker.py")
_MAX_WORKERS = 4
_ANSWERS_PER_WORKER = 250  # about what one judges in the time another takes to start


class JudgeError(OpsdError):
    """The judging process cannot start."""


@dataclass(frozen=True)
class Verdict:
    r"""What judging one response gave.

    Attributes:
        correct: The boxed answer equals the reference answer.
        boxed: The response has a complete ``\boxed{}``.
        status: ``"unparsable"``: no expression could be read from the box (wrong unless its text equals the reference).
            ``"timeout"``: judging broke its limit of time or memory, or crashed (wrong). Otherwise ``"ok"``.
    """

    correct: bool
    boxed: bool
    status: Status


def judge_answers(responses: Sequence[str], answers: Sequence[str], *, seconds: float) -> list[Verdict]:
    r"""Judge each response against the reference answer at the same place.

    Args:
        responses: Whole responses; only the last ``\boxed{}`` of each is read.
        answers: Reference answers as LaTeX or plain text, not boxed (where one is, the content of its box counts).
        seconds: Limit on the processor time of judging one answer; elapsed time may reach ten times as much.

    Returns:
        One verdict for each response, in order. No response, however hostile, makes this hang or raise.

    Raises:
        JudgeError: The judging process cannot start, for instance because math-verify is not installed.
    """
    if len(responses) != len(answers):
        raise ValueError(f"{len(responses)} responses but {len(answers)} answers")
    boxes = [last_boxed(response) for response in responses]
    golds = [last_boxed(answer) or answer for answer in answers]
    # Samples of one problem mostly agree, so each distinct pair is judged once.
    pairs = list(dict.fromkeys((box, gold) for box, gold in zip(boxes, golds, strict=True) if box is not None))
    judged = dict(zip(pairs, _judge_pairs(pairs, seconds=seconds), strict=True))
    return [
        Verdict(correct=False, boxed=False, status="ok") if box is None else judged[box, gold]
        for box, gold in zip(boxes, golds, strict=True)
    ]


def _judge_pairs(pairs: Sequence[tuple[str, str]], *, seconds: float) -> list[Verdict]:
    if not pairs:
        return []
    cores = len(os.sched_getaffinity(0))
    workers = min(_MAX_WORKERS, cores, math.ceil(len(pairs) / _ANSWERS_PER_WORKER))
    verdicts: list[Verdict | None] = [None] * len(pairs)

    def judge_share(first: int) -> None:
        verdicts[first::workers] = _judge_in_processes(pairs[first::workers], seconds=seconds)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(judge_share, range(workers)))
    return [verdict for verdict in verdicts if verdict is not None]


def _judge_in_processes(pairs: Sequence[tuple[str, str]], *, seconds: float) -> list[Verdict]:
    """Judge in one process, and after each answer that kills it the rest in a new one."""
    verdicts: list[Verdict] = []
    while len(verdicts) < len(pairs):
        verdicts += _run_worker(pairs[len(verdicts) :], seconds=seconds)
        if len(verdicts) < len(pairs):
            verdicts.append(Verdict(correct=False, boxed=True, status="timeout"))
    return verdicts


def _run_worker(pairs: Sequence[tuple[str, str]], *, seconds: float) -> list[Verdict]:
    """Verdicts on the first pairs, up to (without) the one that killed the process."""
    # A script, not a module: importing the package would load torch. -P keeps the script's directory, which has a
    # statistics.py, off sys.path.
    command = [sys.executable, "-P", str(_WORKER), str(seconds)]
    request = "".join(json.dumps(pair) + "\n" for pair in pairs)
    process = subprocess.run(command, input=request.encode("ascii"), capture_output=True, check=False)
    # A verdict cut off by the process's death has no newline and is dropped.
    ready, *lines = process.stdout.decode("ascii").split("\n")[:-1] or [""]
    if ready != "ready":
        raise JudgeError(
            f"the answer judge does not start ({' '.join(command)}, exit code {process.returncode}); install "
            f"math-verify into this environment. Its last output:\n{process.stderr.decode(errors='replace')[-2000:]}"
        )
    return [Verdict(correct=correct, boxed=True, status=status) for correct, status in map(json.loads, lines)]
