"""Writing files so that neither a crash nor a second run loses what was there."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path


def write_atomically(path: Path, lines: Iterable[str]) -> None:
    """Write ``lines`` (each with its newline) to ``path``: readers see the old content or all of the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Bytes that are no text, read with the same error handler, come out as they were.
        with temporary.open("w", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def replaced_name(path: Path) -> Path:
    """A free name ``<name>.replaced-<UTC time>`` beside ``path`` for content a resumed run supersedes."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    candidate = path.with_name(f"{path.name}.replaced-{stamp}")
    suffix = 1
    while candidate.exists():
        suffix += 1
        candidate = path.with_name(f"{path.name}.replaced-{stamp}-{suffix}")
    return candidate


def set_aside(path: Path) -> Path | None:
    """Rename ``path``, where it exists, to its :func:`replaced_name`, and return that."""
    if not path.exists():
        return None
    return path.rename(replaced_name(path))


def sync_directory(path: Path) -> None:
    """Make renames and new names in the directory ``path`` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
