"""One job at a time in an ``output_dir``, which all of its ranks share."""

from __future__ import annotations

import fcntl
import os
import socket
import uuid
from pathlib import Path
from typing import TextIO

from opsd_megatron.checkpoint.torch_dist import on_rank_zero
from opsd_megatron.distributed.collectives import broadcast_object, gather_objects
from opsd_megatron.errors import CheckpointError

_LOCK = ".lock"


class OutputClaim:
    """An ``output_dir`` that belongs to this job, until :meth:`release` or the end of the process that holds it."""

    def __init__(self, file: TextIO | None) -> None:
        self._file = file

    def release(self) -> None:
        """Let other jobs have it. Calling it again does nothing."""
        if self._file is not None:
            self._file.close()


def claim_output_dir(output_dir: Path) -> OutputClaim:
    """Make a run's directory and keep other jobs out of it, which would take this one's checkpoints for leftovers.

    By a lock on a file (flock), which ends with its process however that ends. On file systems without locks nobody is
    kept out.

    Ranks: every rank of the world. Rank 0 holds the lock.

    Raises:
        CheckpointError: Another job holds it, the directory cannot be made, or a rank does not see what rank 0 wrote
            there; raised on every rank.
    """
    held: list[TextIO] = []
    # A new name every time: no network file system has an answer in its cache.
    mark = output_dir / f"{_LOCK}-{broadcast_object(uuid.uuid4().hex)}"
    on_rank_zero(_lock, output_dir / _LOCK, mark, held)
    seen = gather_objects(mark.exists())
    if held:
        mark.unlink(missing_ok=True)
    if not all(seen):
        raise CheckpointError(
            f"rank {seen.index(False)} does not see what rank 0 writes to output_dir={output_dir}: it must be on a "
            "file system that all ranks share"
        )
    return OutputClaim(held[0] if held else None)


def _lock(path: Path, mark: Path, held: list[TextIO]) -> None:
    """Lock the file, say in it who has it, and make the ``mark`` that all ranks are to see."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
        held.append(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"output_dir={path.parent} is in use by {path.read_text(encoding='utf-8') or 'another process'}: wait "
                "for its end, or choose another"
            ) from error
        except OSError:  # there are no locks here
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        mark.touch()
    except OSError as error:
        raise CheckpointError(f"output_dir={path.parent} cannot be written: {error}; choose another") from error
