"""Directories that appear whole or not at all, killed or failing at any of the steps that make or delete them."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

from opsd_megatron.checkpoint import atomic
from opsd_megatron.checkpoint.atomic import atomic_directory, begin, discard, is_leftover, is_unfinished, remove
from opsd_megatron.checkpoint.hf_io import SafetensorsReader
from opsd_megatron.checkpoint.state import save_converted
from opsd_megatron.errors import CheckpointError, ModelError


class Killed(BaseException):
    """Ends a test's process at once, as far as the directory is concerned: nothing is cleaned up."""


def write(output: Path, text: str) -> None:
    with atomic_directory(output) as directory:
        (directory / "folder").mkdir()
        for name in ("a", "b", "folder/c"):
            (directory / name).write_text(text)


def content(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def kill_at(patch: pytest.MonkeyPatch, call: int) -> Callable[[], int]:
    """Die at the ``call``-th change to the disk; the result tells how many there were."""
    calls = 0

    def counted(original: Callable[..., object]) -> Callable[..., object]:
        def change(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == call:
                raise Killed
            return original(*args, **kwargs)

        return change

    for name in ("mkdir", "touch", "unlink", "rmdir"):
        patch.setattr(Path, name, counted(getattr(Path, name)))
    patch.setattr(atomic.os, "rename", counted(atomic.os.rename))
    patch.setattr(atomic.shutil, "rmtree", counted(atomic.shutil.rmtree))
    patch.setattr(atomic, "sync_to_disk", counted(atomic.sync_to_disk))
    patch.setattr(atomic, "discard", lambda directory: None)  # the dead clean nothing up
    return lambda: calls


def test_killed_at_any_moment_a_write_can_be_repeated(tmp_path: Path) -> None:
    whole = dict.fromkeys(("a", "b", "folder/c"), "second")
    call, published_late = 1, 0
    while True:
        root = tmp_path / str(call)
        root.mkdir()
        output = root / "output"
        with pytest.MonkeyPatch.context() as patch:
            count = kill_at(patch, call)
            try:
                write(output, "first")
            except Killed:
                pass
            else:
                assert count() < call
                break
        if output.exists() and not is_unfinished(output):
            # All that was left is to make the marker's removal durable.
            assert content(output) == dict.fromkeys(whole, "first")
            published_late += 1
        else:
            write(output, "second")
            assert content(output) == whole
            assert [path.name for path in root.iterdir()] == ["output"]
        call += 1
    assert published_late == 1 and call > 10


def test_killed_at_any_moment_a_deletion_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    call = 1
    while True:
        root = tmp_path / str(call)
        output = root / "output"
        write(output, "first")
        with pytest.MonkeyPatch.context() as patch:
            count = kill_at(patch, call)
            try:
                remove(output)
            except Killed:
                pass
            else:
                assert count() < call and not list(root.iterdir())
                break
        if not is_unfinished(output):
            assert not output.exists() or call == 1
        for path in root.iterdir():
            assert call == 1 or is_unfinished(path) or is_leftover(path)
            discard(path)
        assert bool(list(root.iterdir())) == (call == 1)
        call += 1
    assert call > 6


@pytest.mark.parametrize("failing", [1, 2])
def test_a_disk_that_fails_after_the_rename_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    output = tmp_path / "output"
    calls = 0

    def sync(path: Path) -> None:
        nonlocal calls
        if output.exists():
            calls += 1
            if calls == failing:
                raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(atomic, "sync_to_disk", sync)
    with pytest.raises(CheckpointError, match=r"Input/output error; nothing was left there"):
        write(output, "first")
    assert calls == failing and not list(tmp_path.iterdir())


def test_an_incomplete_model_directory_is_not_read(tmp_path: Path) -> None:
    output = tmp_path / "output"
    begin(output).rename(output)
    (output / "model.safetensors").write_bytes(bytes(8))
    with pytest.raises(ModelError, match="output is not complete: writing it was interrupted"):
        SafetensorsReader(output)


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    """Files without a marker, and a link to a marked directory, which is somebody's name for it."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes").write_text("mine")
    marked = begin(tmp_path / "other")
    (tmp_path / "link").symlink_to(marked)
    for name in ("mine", "link"):
        discard(tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{name} already exists"):
            begin(tmp_path / name)
    assert (mine / "notes").read_text() == "mine" and (tmp_path / "link").is_symlink() and marked.is_dir()


def in_use(output: Path) -> str:
    return f"{output} is being written by another process: wait for its end, or choose another output"


def test_two_writers_of_one_output_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is written, and while it has its final name but is not durable yet."""
    output = tmp_path / "output"

    def refused(*_: object) -> None:
        with pytest.raises(CheckpointError) as failure:
            write(output, "second")
        assert str(failure.value) == in_use(output)

    with atomic_directory(output) as directory:
        (directory / "a").write_text("first")
        refused()
        with pytest.raises(CheckpointError, match="being written by another process"):
            save_converted(output, refused, source=tmp_path)
        sync, renamed = atomic.sync_to_disk, list[Path]()

        def sync_to_disk(path: Path) -> None:
            if path == output.parent:
                renamed.append(path)
                refused()
            sync(path)

        monkeypatch.setattr(atomic, "sync_to_disk", sync_to_disk)
    assert renamed and content(output) == {"a": "first"}


@pytest.mark.parametrize("lost", ["marker", "lock"])
def test_who_comes_second_to_the_lock_leaves_the_other_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Between making the directory and locking it, another process took it for a leftover."""
    output, begin = tmp_path / "output", atomic.begin
    marker = atomic.temporary_for(output) / atomic._MARKER
    theirs: list[TextIO] = []

    def begin_and_lose(wanted: Path) -> Path:
        temporary = begin(wanted)
        if lost == "marker":
            marker.unlink()
        else:
            theirs.append(marker.open("r+"))
            fcntl.flock(theirs[0], fcntl.LOCK_EX)
        (temporary / "theirs").touch()
        return temporary

    monkeypatch.setattr(atomic, "begin", begin_and_lose)
    with pytest.raises(CheckpointError) as failure:
        write(output, "second")
    assert str(failure.value) == in_use(output) and (marker.parent / "theirs").exists()
    for file in theirs:
        file.close()
