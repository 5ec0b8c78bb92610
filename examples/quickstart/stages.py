"""Runs the quickstart's stages as child processes, measures them, and skips those that finished in an earlier run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from opsd_megatron.telemetry.files import write_atomically

GIB = 2**30


class StageError(Exception):
    """A stage failed, or was finished earlier by another command."""


@dataclass(frozen=True)
class StageRecord:
    """What a finished stage cost.

    Attributes:
        name: Name of the stage.
        command: The child's arguments after the interpreter.
        seconds: Wall time.
        cpu_seconds: Processor time of all its processes, which a busy machine does not change.
        peak_memory_gib: Most memory that the stage's processes held together, sampled every second (proportional set
            size, so shared pages count once), and at least ``largest_process_gib``.
        largest_process_gib: Largest resident set that any one of its processes reached, as the kernel recorded it.
    """

    name: str
    command: list[str]
    seconds: float
    cpu_seconds: float
    peak_memory_gib: float
    largest_process_gib: float


class StageRunner:
    """Runs stages in order; a stage's record in ``directory`` says that it is finished.

    Args:
        directory: Where records are kept.
        cwd: Working directory of the children.
        environment: Variables added to this process's own for the children.
        total: Number of stages to come, for the headings.
    """

    def __init__(self, directory: Path, *, cwd: Path, environment: dict[str, str], total: int) -> None:
        self.records: list[StageRecord] = []
        self._directory = directory
        self._cwd = cwd
        self._environment = {**os.environ, **environment}
        self._total = total
        self._started = time.monotonic()
        directory.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, title: str, arguments: Sequence[object]) -> StageRecord:
        """Run ``python ARGUMENTS`` unless the stage is finished; its output goes to this process's.

        Raises:
            StageError: The child failed, or the stage is finished but was started with other arguments.
        """
        command = [str(argument) for argument in arguments]
        path = self._directory / f"{name}.json"
        elapsed = time.strftime("%M:%S", time.gmtime(time.monotonic() - self._started))
        _say(f"\n[{len(self.records) + 1}/{self._total}] {title}   ({elapsed} elapsed)")
        if path.exists():
            record = StageRecord(**json.loads(path.read_text(encoding="utf-8")))
            if record.command != command:
                raise StageError(f"stage {name} was run with other arguments, see {path}; start over with --fresh")
            _say(f"finished earlier, in {record.seconds:.0f} s")
        else:
            _say("$ python " + " ".join(command))
            record = self._measure(name, command)
            write_atomically(path, [json.dumps(asdict(record), indent=2) + "\n"])
        self.records.append(record)
        return record

    def _measure(self, name: str, command: list[str]) -> StageRecord:
        start = time.monotonic()
        child = subprocess.Popen([sys.executable, *command], cwd=self._cwd, env=self._environment)
        sampler = _MemorySampler(child.pid)
        sampler.start()
        try:
            # Unlike Popen.wait, wait4 also tells what the child and its own children used.
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.terminate()
            child.wait()
            raise
        finally:
            sampler.stop()
        child.returncode = os.waitstatus_to_exitcode(status)
        largest = usage.ru_maxrss * 1024
        if child.returncode:
            raise StageError(f"stage {name} failed with exit code {child.returncode}; its output is above")
        return StageRecord(
            name=name,
            command=command,
            seconds=round(time.monotonic() - start, 1),
            cpu_seconds=round(usage.ru_utime + usage.ru_stime, 1),
            peak_memory_gib=round(max(sampler.peak, largest) / GIB, 2),
            largest_process_gib=round(largest / GIB, 2),
        )


class _MemorySampler(threading.Thread):
    """Samples the memory of a process and all its descendants."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._root = psutil.Process(pid)
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(1.0):
            try:
                tree = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            self.peak = max(self.peak, sum(_proportional_set_size(process) for process in tree))

    def stop(self) -> None:
        self._done.set()
        self.join()


def _proportional_set_size(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return 0  # ended between listing and reading


def _say(line: str) -> None:
    """Print at once, so that headings stay in front of the children's output."""
    print(line, flush=True)


def cost_table(records: Sequence[StageRecord]) -> str:
    """Wall time and memory of each stage, as text."""

    def line(name: str, seconds: float, cpu_seconds: float, peak: float) -> str:
        return f"{name:<12}{seconds:>9.0f}{cpu_seconds:>15.0f}{peak:>19.2f}"

    lines = [f"{'stage':<12}{'seconds':>9}{'CPU seconds':>15}{'peak memory, GiB':>19}"]
    lines += [line(each.name, each.seconds, each.cpu_seconds, each.peak_memory_gib) for each in records]
    total, total_cpu = sum(each.seconds for each in records), sum(each.cpu_seconds for each in records)
    lines.append(line("total", total, total_cpu, max(each.peak_memory_gib for each in records)))
    return "\n".join(lines)
