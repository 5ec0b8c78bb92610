"""Directories that appear complete or not at all.

A directory is built under a hidden temporary name beside its final one, made durable, and renamed. It holds a marker
file from first to last, also through the rename, and is complete when the marker is gone. So whatever moment a process
is killed at, what it leaves behind is told apart from a user's own files: only marked directories, and empty ones with
a temporary name, are ever removed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from opsd_megatron.errors import CheckpointError
from opsd_megatron.telemetry.files import refusal, sync_to_disk

_MARKER = ".opsd_megatron_incomplete"


def temporary_for(output: Path) -> Path:
    """The name under which ``output`` is built: same parent, so the final rename stays on one file system."""
    return output.parent / f".{output.name}.tmp"


def is_leftover(path: Path) -> bool:
    """Whether ``path`` is a temporary directory that an interrupted write or deletion left behind.

    An empty one is: the marker is made after the directory, and removed before it.
    """
    if not (path.name.startswith(".") and path.name.endswith(".tmp")):
        return False
    return is_unfinished(path) or _is_empty(path)


def is_unfinished(path: Path) -> bool:
    """Whether ``path`` is a directory, under its temporary or its final name, that was not completed or is going."""
    return not path.is_symlink() and (path / _MARKER).is_file()


def is_marker(path: Path) -> bool:
    """Whether ``path`` is the file that marks a directory as unfinished."""
    return path.name == _MARKER


def begin(output: Path) -> Path:
    """Make the empty temporary directory for ``output``, removing what an interrupted write left under either name.

    Returns:
        The temporary directory; fill it, then call :func:`publish` or :func:`discard`.

    Raises:
        CheckpointError: ``output`` exists and is not an empty directory, something unknown has the temporary name,
            another process is at work in it (:func:`atomic_directory`), or the directory cannot be made.
    """
    refuse_existing(output)
    temporary = temporary_for(output)
    try:
        # A lock goes along with its directory when that gets its final name.
        if _is_held(temporary) or _is_held(output):
            raise _in_use(output)
        if is_unfinished(output):
            _delete(output)
        if temporary.exists():
            if not is_leftover(temporary):
                raise CheckpointError(f"{temporary} is in the way of writing {output}: move it elsewhere")
            _delete(temporary)
        temporary.mkdir(parents=True)
        (temporary / _MARKER).touch()
    except OSError as error:
        discard(temporary)
        raise cannot_write(output, error) from error
    return temporary


def refuse_existing(output: Path) -> None:
    """Check that writing ``output`` destroys nothing.

    Raises:
        CheckpointError: ``output`` exists and is neither an empty directory nor one that an interrupted write left.
    """
    if is_unfinished(output) or _is_empty(output):
        return
    if output.exists() or output.is_symlink():
        raise CheckpointError(f"{output} already exists and is left as it is: choose another output or remove it")


def publish(temporary: Path, output: Path) -> None:
    """Make everything under ``temporary`` durable and give it its final name.

    Raises:
        OSError: The disk failed; ``output`` does not exist, or is marked as incomplete if even that fails.
    """
    for folder, _, files in os.walk(temporary):
        for name in files:
            sync_to_disk(Path(folder) / name)
        sync_to_disk(Path(folder))
    os.rename(temporary, output)
    try:
        sync_to_disk(output.parent)
        (output / _MARKER).unlink()
        sync_to_disk(output)
    except OSError:
        with suppress(OSError):
            (output / _MARKER).touch()
        discard(output)
        raise


def discard(directory: Path) -> None:
    """Remove what was not completed; what cannot be removed stays marked. Anything else is left alone."""
    if is_unfinished(directory) or is_leftover(directory):
        with suppress(OSError):
            _delete(directory)


@contextmanager
def atomic_directory(output: Path) -> Iterator[Path]:
    """Build ``output`` in a ``with`` block: published when it ends, discarded when it raises.

    Meanwhile other processes are kept out by a lock on the marker (flock), which ends with its process however that
    ends; on file systems without locks nobody is.

    Yields:
        The temporary directory to fill.

    Raises:
        CheckpointError: See :func:`begin`; also any ``OSError`` of the block, such as a full disk.
    """
    temporary = begin(output)
    with _held(temporary, output):
        try:
            yield temporary
            publish(temporary, output)
        except OSError as error:
            discard(temporary)
            raise cannot_write(output, error) from error
        except BaseException:
            discard(temporary)
            raise


def cannot_write(output: Path, error: OSError) -> CheckpointError:
    """The error for a directory that could not be completed and was discarded."""
    return CheckpointError(f"cannot write {output}: {refusal(error, output)}; nothing was left there")


def remove(directory: Path) -> None:
    """Delete a published directory so that an interruption leaves nothing that looks complete.

    Raises:
        OSError: It cannot be deleted; unless nothing was touched, the rest is marked as incomplete.
    """
    temporary = temporary_for(directory)
    (directory / _MARKER).touch()
    os.rename(directory, temporary)
    _delete(temporary)


@contextmanager
def _held(temporary: Path, output: Path) -> Iterator[None]:
    """Lock the marker of ``output``'s directory, if there are locks here.

    Raises:
        CheckpointError: Another process was faster, and what is there now is its.
    """
    try:
        marker = (temporary / _MARKER).open("r+")  # for writing: NFS locks no other
    except FileNotFoundError as error:
        raise _in_use(output) from error
    with marker:
        if not _lock(marker):
            raise _in_use(output)
        yield


def _is_held(directory: Path) -> bool:
    """Whether another process has locked a directory's marker."""
    if not is_unfinished(directory):
        return False
    with (directory / _MARKER).open("r+") as marker:
        return not _lock(marker)


def _lock(marker: TextIO) -> bool:
    """Lock the file; whether nobody else has. Where there are no locks, nobody has."""
    try:
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _in_use(output: Path) -> CheckpointError:
    return CheckpointError(f"{output} is being written by another process: wait for its end, or choose another output")


def _delete(directory: Path) -> None:
    """Delete a marked or empty directory. The marker goes last: an interruption must not leave unmarked files."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif not is_marker(path):
            path.unlink()
    (directory / _MARKER).unlink(missing_ok=True)
    directory.rmdir()


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())
