"""Writing files so that neither a crash nor a second run loses what was there."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from opsd_megatron.errors import OutputError

# No room: on the device, or within the user's quota.
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around whatever writes ``path``: what the file system refuses becomes an error with a remedy.

    Raises:
        OutputError: The block raised an ``OSError``; names ``path`` and the reason.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {refusal(error, path)}; check the free space and the permissions there, or write "
            "to another directory"
        ) from error


def refusal(error: OSError, path: Path) -> str:
    """What the file system said against writing ``path``; where there was no room, also which file system that is."""
    reason = error.strerror or str(error)
    if error.errno not in _FULL:
        return reason
    mount = path.absolute().parent.resolve()
    while not os.path.ismount(mount):
        mount = mount.parent
    room = shutil.disk_usage(mount)
    return f"{reason} ({room.free / 1e9:.3g} of {room.total / 1e9:.3g} GB are free in the file system at {mount})"


def write_atomically(path: Path, lines: Iterable[str]) -> None:
    """Write ``lines`` (each with its newline) to ``path``: readers see the old content or all of the new one.

    Raises:
        OutputError: It cannot be written; the old content is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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
        sync_to_disk(path.parent)


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
    """Rename ``path``, where it exists, to its :func:`replaced_name`, and return that.

    Raises:
        OutputError: It cannot be renamed.
    """
    if not path.exists():
        return None
    with writing(path):
        return path.rename(replaced_name(path))


def sync_to_disk(path: Path) -> None:
    """Make a file's content, or the renames and new names in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
