from __future__ import annotations

import json
import math
import os
import stat
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opsd_megatron.errors import OutputError
from opsd_megatron.telemetry.metrics import MetricsWriter, to_json_line


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def replaced(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.replaced-*"))


def write_steps(path: Path, numbers: range, resume_step: int = 0) -> None:
    with closing(MetricsWriter(path, resume_step=resume_step)) as writer:
        for number in numbers:
            writer.write({"step": number})


def test_values_that_json_lacks_are_written_as_strings_that_float_reads() -> None:
    line = to_json_line({"step": 1, "nan": math.nan, "inf": math.inf, "nested": {"list": [-math.inf, 1.5]}})
    # A strict reader must not meet Python's bare NaN and Infinity.
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"bare {name}"))
    assert record == {"step": 1, "nan": "NaN", "inf": "Infinity", "nested": {"list": ["-Infinity", 1.5]}}
    assert math.isnan(float(record["nan"])) and float(record["inf"]) == math.inf


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(0.5), 0.5),
        (torch.tensor(3), 3),
        (torch.tensor(math.nan), "NaN"),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.float64(math.inf), "Infinity"),
        ((1, 2), [1, 2]),
        (None, None),
        (True, True),
        ("line\nbreak", "line\nbreak"),
    ],
)
def test_scalars_of_other_libraries(value: Any, expected: Any) -> None:
    line = to_json_line({"value": value})
    assert json.loads(line) == {"value": expected}
    assert line.count("\n") == 1


def test_what_has_no_place_in_json_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with closing(MetricsWriter(path)) as writer:
        with pytest.raises(TypeError):
            writer.write({"step": 1, "value": object()})
        with pytest.raises(TypeError, match="step must be an int"):
            writer.write({"step": 1.5})
        with pytest.raises(KeyError):
            writer.write({"loss": 1.0})
        writer.write({"step": 1})
    assert steps(path) == [1]


def test_each_line_is_on_disk_when_write_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    on_disk: list[str] = []
    sync = os.fsync

    def spy(descriptor: int) -> None:
        sync(descriptor)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            on_disk.append(path.read_text())

    monkeypatch.setattr(os, "fsync", spy)
    with closing(MetricsWriter(path)) as writer:
        writer.write({"step": 1})
        writer.write({"step": 2})
    assert on_disk == ['{"step": 1}\n', '{"step": 1}\n{"step": 2}\n']


def test_resume_moves_later_steps_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(0, 6))
    write_steps(path, range(4, 7), resume_step=3)
    assert steps(path) == [0, 1, 2, 3, 4, 5, 6]
    (moved,) = replaced(path)
    assert steps(moved) == [4, 5]


def test_resume_where_nothing_is_superseded_rewrites_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4))
    inode = path.stat().st_ino
    write_steps(path, range(4, 5), resume_step=3)
    assert steps(path) == [1, 2, 3, 4]
    assert path.stat().st_ino == inode and not replaced(path)


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "\n", '{"loss": 1}\n', "\udcff\n", "[1]\n", '{"step": "x"}\n'])
def test_a_line_that_cannot_be_read_is_moved_aside(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 3))
    with path.open("a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(torn)
    write_steps(path, range(3, 4), resume_step=2)
    assert steps(path) == [1, 2, 3]
    (moved,) = replaced(path)
    assert moved.read_bytes() == torn.encode("utf-8", errors="surrogateescape")


def test_a_new_run_keeps_the_old_file_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(0, 3))
    write_steps(path, range(0, 1))
    assert steps(path) == [0]
    assert steps(replaced(path)[0]) == [0, 1, 2]


def test_a_crash_while_moving_lines_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 5))
    rename = Path.replace

    def crash_on_the_file_itself(self: Path, target: Path) -> Path:
        if target == path:
            raise OSError("power cut")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", crash_on_the_file_itself)
    with pytest.raises(OutputError, match="power cut"):
        MetricsWriter(path, resume_step=2)
    assert steps(path) == [1, 2, 3, 4]
    assert steps(replaced(path)[0]) == [3, 4]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    full = Path("/dev/full")  # every write fails with ENOSPC
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.close()
    writer._file = full.open("a", encoding="utf-8")
    with pytest.raises(OutputError, match=rf"^cannot write {writer.path}: No space left on device \(.*\); check"):
        writer.write({"step": 1})
    with pytest.raises(OutputError, match="No space left"):
        writer.close()


def test_a_metrics_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"metrics\.jsonl: Is a directory"):
        MetricsWriter(tmp_path / "metrics.jsonl")
