from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opsd_megatron.errors import OutputError
from opsd_megatron.telemetry import files
from opsd_megatron.telemetry.files import set_aside, write_atomically


def test_write_atomically_replaces_the_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_atomically(path, ["a\n", "b\n"])
    write_atomically(path, iter(["c\n"]))
    assert path.read_text() == "c\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, ["old\n"])

    def failing() -> Iterator[str]:
        yield "half\n"
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        write_atomically(path, failing())
    assert path.read_text() == "old\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, ["old\n"])
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(
        OutputError, match=rf"^cannot write {path}: No space left on device \(.* at /.*\); check the free"
    ):
        write_atomically(path, ["new\n"])
    assert path.read_text() == "old\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_a_parent_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write .*/file/new\.txt: File exists"):
        write_atomically(tmp_path / "file" / "new.txt", ["a\n"])


def test_a_file_that_cannot_be_set_aside_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file.txt").touch()
    monkeypatch.setattr(Path, "rename", full_disk)
    with pytest.raises(OutputError, match=r"file\.txt: No space left"):
        set_aside(tmp_path / "file.txt")


def test_set_aside_never_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.time, "strftime", lambda *_: "20260101T000000Z")
    path = tmp_path / "file.txt"
    assert set_aside(path) is None
    for content in ("first", "second", "third"):
        path.write_text(content)
        set_aside(path)
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {
        "file.txt.replaced-20260101T000000Z": "first",
        "file.txt.replaced-20260101T000000Z-2": "second",
        "file.txt.replaced-20260101T000000Z-3": "third",
    }
