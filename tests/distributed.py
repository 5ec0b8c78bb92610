"""A launcher for tests that need several ranks: real processes, gloo, no ports chosen ahead and no processes left over.

Processes are forked from a server that has already imported torch, so a launch costs a fraction of a second rather than
one torch import a rank.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")

# After a first failure the other ranks get this long, in seconds, to report a failure of their own.
_GRACE = 1.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed"])


def run_distributed(worker: Callable[..., T], world_size: int, *args: object, timeout: float = 600.0) -> list[T]:
    """Call ``worker(*args)`` on ``world_size`` ranks of a gloo process group.

    Every rank is a fresh process with ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE`` and ``MASTER_*``
    set, one thread, and the default process group initialised; the group is destroyed afterwards.

    Args:
        worker: A module-level function.
        world_size: Number of ranks.
        args: Picklable arguments, the same for every rank.
        timeout: Seconds until all ranks must have returned.

    Returns:
        What each rank returned, by rank.

    Raises:
        AssertionError: A rank raised, died or ran past ``timeout``; the message holds each failing rank's traceback.
    """
    # The store lives here, as torchrun's does in its agent: its port is bound before anybody hears of it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    environment = dict(os.environ)
    environment.update(
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(store.port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
        OMP_NUM_THREADS="1",
    )
    call = pickle.dumps((worker, args))
    ranks: list[_Rank] = []
    try:
        for rank in range(world_size):
            ranks.append(_start(rank, call, environment, timeout))
        return cast("list[T]", _collect(ranks, time.monotonic() + timeout, timeout))
    finally:
        for handle in ranks:
            handle.stop()


@dataclass(frozen=True)
class _Rank:
    """The launcher's end of one rank."""

    number: int
    process: ForkServerProcess
    connection: Connection

    def stop(self) -> None:
        """End the process, and whatever it started, if it has not ended by itself."""
        self.connection.close()
        pid = self.process.pid
        assert pid is not None
        if self.process.is_alive():
            try:
                os.killpg(pid, signal.SIGKILL)  # the rank leads its own group, see _main
            except ProcessLookupError:
                self.process.kill()
        self.process.join()


def _start(rank: int, call: bytes, environment: dict[str, str], timeout: float) -> _Rank:
    here, there = _context.Pipe()
    process = _context.Process(target=_main, args=(rank, call, environment, timeout, there), name=f"rank {rank}")
    process.start()
    there.close()
    return _Rank(rank, process, here)


def _collect(ranks: list[_Rank], deadline: float, timeout: float) -> list[object]:
    """Wait for every rank's answer, then let all of them go."""
    pending = {handle.connection: handle for handle in ranks}
    results: dict[int, object] = {}
    failures: dict[int, str] = {}
    while pending and (ready := wait(list(pending), max(0.0, deadline - time.monotonic()))):
        for connection in ready:
            handle = pending.pop(cast(Connection, connection))
            try:
                ok, answer = pickle.loads(handle.connection.recv_bytes())
            except (EOFError, ConnectionError):
                handle.process.join()
                ok, answer = False, f"died with exit code {handle.process.exitcode} (negative: a signal)\n"
            if ok:
                results[handle.number] = answer
            elif not failures:
                deadline = min(deadline, time.monotonic() + _GRACE)
            if not ok:
                failures[handle.number] = answer
    if failures:
        reports = [f"--- rank {number} of {len(ranks)} ---\n{failures[number]}" for number in sorted(failures)]
        raise AssertionError("ranks failed\n" + "".join(reports))
    if pending:
        late = sorted(handle.number for handle in pending.values())
        raise AssertionError(f"ranks {late} of {len(ranks)} did not return within {timeout:g} s")
    for handle in ranks:
        handle.connection.send_bytes(b"leave")
    for handle in ranks:
        handle.process.join(timeout=10)
    return [results[number] for number in range(len(ranks))]


def _main(rank: int, call: bytes, environment: dict[str, str], timeout: float, connection: Connection) -> None:
    os.setsid()
    os.environ.clear()  # the fork server's environment is that of the first launch
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    leave = threading.Event()
    threading.Thread(target=_listen, args=(connection, leave), daemon=True).start()
    try:
        worker, args = pickle.loads(call)
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        answer = pickle.dumps((True, worker(*args)))
    except BaseException:  # whatever it is, the launcher reports it
        answer = pickle.dumps((False, traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send_bytes(answer)
    # Stay until every rank has answered: a rank that leaves early closes its connections, and then the others report
    # a lost peer instead of their own outcome.
    leave.wait()
    if dist.is_initialized():
        dist.destroy_process_group()


def _listen(connection: Connection, leave: threading.Event) -> None:
    """Wait for permission to leave; if the launcher is gone there is nobody to answer to."""
    try:
        connection.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)
    leave.set()
