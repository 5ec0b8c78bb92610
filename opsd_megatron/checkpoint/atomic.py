"""Directories that appear complete or not at all.

A directory is built under a hidden temporary name beside its final one, made durable, and renamed. The temporary
directory holds a marker file until the last moment, so that what a killed process leaves behind is told apart from a
user's own files: only marked directories are ever removed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opsd_megatron.errors import CheckpointError

_MARKER = ".opsd_megatron_incomplete"


def temporary_for(output: Path) -> Path:
    """The name under which ``output`` is built: same parent, so the final rename stays on one file system."""
    return output.parent / f".{output.name}.tmp"


def is_leftover(path: Path) -> bool:
    """Whether ``path`` is a temporary directory that an interrupted write left behind."""
    return path.name.startswith(".") and path.name.endswith(".tmp") and (path / _MARKER).is_file()


def is_marker(path: Path) -> bool:
    """Whether ``path`` is the file that marks a directory as unfinished."""
    return path.name == _MARKER


def begin(output: Path) -> Path:
    """Make the empty temporary directory for ``output``, removing the leftover of an interrupted write.

    Returns:
        The temporary directory; fill it, then call :func:`publish` or :func:`discard`.

    Raises:
        CheckpointError: ``output`` exists and is not an empty directory, something unknown has the temporary name, or
            the directory cannot be made.
    """
    refuse_existing(output)
    temporary = temporary_for(output)
    try:
        if temporary.exists():
            if not is_leftover(temporary):
                raise CheckpointError(f"{temporary} is in the way of writing {output}: move it elsewhere")
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        (temporary / _MARKER).touch()
    except OSError as error:
        raise CheckpointError(f"cannot write {output}: {error}") from error
    return temporary


def refuse_existing(output: Path) -> None:
    """Check that writing ``output`` destroys nothing.

    Raises:
        CheckpointError: ``output`` exists and is not an empty directory.
    """
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise CheckpointError(f"{output} already exists and is left as it is: choose another output or remove it")


def publish(temporary: Path, output: Path) -> None:
    """Make everything under ``temporary`` durable and give it its final name.

    Raises:
        OSError: The disk failed; ``output`` does not exist.
    """
    for folder, _, files in os.walk(temporary):
        for name in files:
            _fsync(Path(folder) / name)
        _fsync(Path(folder))
    (temporary / _MARKER).unlink()
    os.rename(temporary, output)
    _fsync(output.parent)


def discard(temporary: Path) -> None:
    """Remove a temporary directory after a failure; what cannot be removed stays marked as incomplete."""
    if is_leftover(temporary):
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_directory(output: Path) -> Iterator[Path]:
    """Build ``output`` in a ``with`` block: published when it ends, discarded when it raises.

    Yields:
        The temporary directory to fill.

    Raises:
        CheckpointError: See :func:`begin`; also any ``OSError`` of the block, such as a full disk.
    """
    temporary = begin(output)
    try:
        yield temporary
        publish(temporary, output)
    except OSError as error:
        discard(temporary)
        raise CheckpointError(f"cannot write {output}: {error}; nothing was left there") from error
    except BaseException:
        discard(temporary)
        raise


def remove(directory: Path) -> None:
    """Delete a published directory so that an interruption leaves nothing that looks complete.

    Raises:
        OSError: It cannot be deleted.
    """
    temporary = temporary_for(directory)
    (directory / _MARKER).touch()
    os.rename(directory, temporary)
    shutil.rmtree(temporary)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
