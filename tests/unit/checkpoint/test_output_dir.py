"""Which checkpoints there are, which go, and which run may use a directory; on hand-made checkpoint directories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opsd_megatron.checkpoint import atomic
from opsd_megatron.checkpoint.state import check_output_dir, hf_folder, latest_checkpoint, prune_checkpoints
from opsd_megatron.errors import CheckpointError

IDENTITY = {"model": {"path": "m", "dtype": "float32"}, "objective": {"beta": 0.5, "clip": None}}


def make(directory: Path, identity: dict[str, object] | None = None) -> Path:
    directory.mkdir(parents=True)
    (directory / "tensors").write_bytes(b"1234")
    record = {"format": 1, "step": 1, "identity": identity or IDENTITY, "files": {"tensors": 4}}
    (directory / "trainer.json").write_text(json.dumps(record))
    return directory


def test_latest_is_by_number_and_complete(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None and latest_checkpoint(tmp_path) is None
    for step in (2, 10, 9):
        make(tmp_path / f"step_{step}")
    (tmp_path / "step_11").mkdir()
    make(tmp_path / "step_12x")
    make(tmp_path / ".step_13.tmp")
    (tmp_path / "step_14").write_text("a file")
    assert latest_checkpoint(tmp_path) == tmp_path / "step_10"


def test_prune_keeps_the_newest_and_everything_else(tmp_path: Path) -> None:
    for step in (1, 2, 10, 20):
        make(tmp_path / f"step_{step}")
    (tmp_path / "notes").mkdir()
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step_10", "step_20"]
    prune_checkpoints(tmp_path, keep=5)
    prune_checkpoints(tmp_path / "nowhere", keep=1)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_20"
    with pytest.raises(ValueError, match="keep=0"):
        prune_checkpoints(tmp_path, keep=0)


def test_an_interrupted_deletion_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "step_1")
    make(tmp_path / "step_2")

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoints(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step_1.tmp", "step_2"]
    assert atomic.is_leftover(tmp_path / ".step_1.tmp")


def test_fresh_directories(tmp_path: Path) -> None:
    assert check_output_dir(tmp_path / "new", IDENTITY, resume=False) is None
    assert check_output_dir(tmp_path / "new", IDENTITY, resume=True) is None
    assert not (tmp_path / "new").exists()
    (tmp_path / "metrics.jsonl").write_text("{}")
    assert check_output_dir(tmp_path, IDENTITY, resume=False) is None
    with pytest.raises(CheckpointError, match="is a file"):
        check_output_dir(tmp_path / "metrics.jsonl", IDENTITY, resume=False)


def test_own_checkpoints_need_resume(tmp_path: Path) -> None:
    newest = make(tmp_path / "checkpoints" / "step_5")
    assert check_output_dir(tmp_path, IDENTITY, resume=True) == newest
    with pytest.raises(CheckpointError, match=r"step_5 exists: pass checkpoint\.resume=true"):
        check_output_dir(tmp_path, IDENTITY, resume=False)


def test_another_run_is_refused_and_untouched(tmp_path: Path) -> None:
    newest = make(tmp_path / "checkpoints" / "step_5")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changed = {"model": {"path": "m", "dtype": "bfloat16"}, "objective": {"beta": 0.0, "clip": None}}
    message = r"step_5 belongs to a different run \(model\.dtype was 'float32', is 'bfloat16'; objective\.beta was 0\.5"
    with pytest.raises(CheckpointError, match=message):
        check_output_dir(tmp_path, changed, resume=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    # JSON knows no tuples: an identity with one still equals itself.
    (newest / "trainer.json").unlink()
    (newest / "tensors").unlink()
    newest.rmdir()
    make(newest, {"data": ("a", "b")})
    assert check_output_dir(tmp_path, {"data": ("a", "b")}, resume=True) == newest


def test_a_damaged_newest_checkpoint_is_an_error_not_a_silent_step_back(tmp_path: Path) -> None:
    make(tmp_path / "checkpoints" / "step_4")
    (make(tmp_path / "checkpoints" / "step_5") / "tensors").write_bytes(b"12")
    with pytest.raises(CheckpointError, match=r"tensors has 2 bytes instead of 4: .* remove it to use an earlier one"):
        check_output_dir(tmp_path, IDENTITY, resume=True)


def test_a_run_directory_is_not_a_checkpoint(tmp_path: Path) -> None:
    newest = make(tmp_path / "checkpoints" / "step_5")
    for directory in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(CheckpointError, match=f"did you mean {newest}"):
            hf_folder(directory)
    assert hf_folder(newest) == newest / "hf"
