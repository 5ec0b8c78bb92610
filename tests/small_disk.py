"""A file system with little room, for tests of what happens when it is full."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_FILLER = "filler"


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """An empty file system of ``size`` bytes at ``folder``; the test is skipped where none may be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {getattr(error, 'stderr', '') or error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def leave_free(disk: Path, size: int) -> None:
    """Fill a disk but for ``size`` bytes, or as good as that goes in whole pages."""
    filler = disk / _FILLER
    filler.unlink(missing_ok=True)
    room = os.statvfs(disk)
    filler.write_bytes(bytes(max(0, room.f_bavail * room.f_frsize - size)))


def files_on(disk: Path) -> list[str]:
    """What else there is, hidden files too."""
    return sorted(path.name for path in disk.iterdir() if path.name != _FILLER)


def without_free_space(message: str) -> str:
    """``message`` without how much is free: each rank looks by itself, while others write and delete."""
    return re.sub(r"\([\d.e-]+ of", "(some of", message)
