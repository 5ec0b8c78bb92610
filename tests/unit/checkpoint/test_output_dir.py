"""Which checkpoints there are, which go, and which run may use a directory; on hand-made checkpoint directories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opsd_megatron.checkpoint import atomic
from opsd_megatron.checkpoint.compatibility import check_checkpoint
from opsd_megatron.checkpoint.output_dir import check_output_dir, prune_checkpoints
from opsd_megatron.checkpoint.record import hf_folder, latest_checkpoint
from opsd_megatron.checkpoint.state import _begin
from opsd_megatron.errors import CheckpointError, ModelError
from opsd_megatron.models.families import read_spec
from tests.tiny import make_tiny_qwen3
from tests.unit.models.published import DENSE, write_config

IDENTITY = {"model": {"path": "m", "dtype": "float32"}, "objective": {"beta": 0.5, "clip": None}}


def make(directory: Path, identity: dict[str, object] | None = None) -> Path:
    directory.mkdir(parents=True)
    (directory / "tensors").write_bytes(b"1234")
    record = {"format": 2, "step": 1, "identity": identity or IDENTITY, "files": {"tensors": 4}}
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

    monkeypatch.setattr(atomic, "_delete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoints(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step_1.tmp", "step_2"]
    assert atomic.is_leftover(tmp_path / ".step_1.tmp")


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        make(tmp_path / f"step_{step}")

    def denied(source: Path, target: Path) -> None:
        if source.name == "step_1":
            raise PermissionError(13, "Permission denied", str(source))
        rename(source, target)

    rename = atomic.os.rename
    monkeypatch.setattr(atomic.os, "rename", denied)
    prune_checkpoints(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_3"]
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "cannot delete the old checkpoint" in record.message
    assert str(tmp_path / "step_1") in record.message
    monkeypatch.undo()
    _begin(tmp_path / "step_4")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step_4.tmp", "step_3"]


def test_a_checkpoint_killed_at_its_last_moment_is_incomplete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the rename and the marker's removal."""
    make(tmp_path / "checkpoints" / "step_4")
    newest = tmp_path / "checkpoints" / "step_5"
    killed_after_rename(newest, monkeypatch)
    assert latest_checkpoint(newest.parent) == newest.parent / "step_4"
    assert check_output_dir(tmp_path, IDENTITY, resume=True) == newest.parent / "step_4"
    with pytest.raises(CheckpointError, match=r"step_5 is not complete: .* interrupted"):
        hf_folder(newest)
    _begin(newest)
    assert sorted(path.name for path in newest.parent.iterdir()) == [".step_5.tmp", "step_4"]


def killed_after_rename(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = atomic.begin(directory)
    make(temporary / "made")
    for file in (temporary / "made").iterdir():
        file.rename(temporary / file.name)
    (temporary / "made").rmdir()

    def killed(path: Path) -> None:
        if path == directory.parent:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atomic, "sync_to_disk", killed)
        atomic.publish(temporary, directory)
    assert not temporary.exists() and (directory / "trainer.json").is_file()


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


def test_a_checkpoint_for_the_initial_weights_is_of_the_same_model(tmp_path: Path) -> None:
    """Without a process group. The record of another format version is refused too."""
    source = make_tiny_qwen3(tmp_path / "model", num_layers=1, with_tokenizer=False)
    spec = read_spec(source)
    checkpoint = make(tmp_path / "checkpoint")
    make_tiny_qwen3(checkpoint / "hf", num_layers=1, with_tokenizer=False)
    check_checkpoint(checkpoint, spec, source)
    for changes, named in (
        ({"vocab_size": 271}, "vocab_size is 272 there, 271 here"),
        ({"num_layers": 2, "ffn": 64}, "num_hidden_layers is 1 there, 2 here; intermediate_size is 96 there, 64 here"),
        ({"kv_heads": 4}, "num_key_value_heads is 2 there, 4 here"),
        ({"tied": False}, "tie_word_embeddings is True there, False here"),
    ):
        other = make_tiny_qwen3(tmp_path / named, **({"num_layers": 1, "with_tokenizer": False} | changes))
        with pytest.raises(CheckpointError, match=rf"is of another model than .*{named}/config\.json \({named}\)"):
            check_checkpoint(checkpoint, read_spec(other), other)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        check_checkpoint(tmp_path / "nowhere", spec, source)
    (checkpoint / "hf" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"hf/config\.json is missing"):
        check_checkpoint(checkpoint, spec, source)
    (checkpoint / "trainer.json").write_text('{"format": 1, "files": {}}')
    with pytest.raises(CheckpointError, match="has format 1, this version reads 2"):
        check_checkpoint(checkpoint, spec, source)
    (checkpoint / "trainer.json").write_text('{"files": {}}')
    with pytest.raises(CheckpointError, match=r"trainer\.json cannot be read .*'format'.*: the checkpoint is damaged"):
        check_checkpoint(checkpoint, spec, source)


def test_a_checkpoint_of_the_same_shapes_may_still_be_of_another_model(tmp_path: Path) -> None:
    """Qwen3-4B and Qwen3-4B-Instruct-2507 differ in nothing but the base of the rotary embedding and the context."""
    checkpoint = make(tmp_path / "checkpoint")
    for folder in (checkpoint / "hf", tmp_path / "model"):
        folder.mkdir()
    write_config(checkpoint / "hf", DENSE)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

    def check(**changes: object) -> None:
        source = write_config(tmp_path / "model", DENSE, **changes)
        check_checkpoint(checkpoint, read_spec(source), source)

    check()
    check(max_position_embeddings=262144)
    with pytest.raises(CheckpointError) as raised:
        check(rope_theta=5e6, rms_norm_eps=1e-5)
    assert str(raised.value) == (
        f"{checkpoint}/hf/config.json is of another model than {tmp_path}/model/config.json (rope_theta is 1000000.0 "
        "there, 5000000.0 here; rms_norm_eps is 1e-06 there, 1e-05 here): pass as model.path the model that "
        f"model.checkpoint={checkpoint} was saved from"
    )
    with pytest.raises(CheckpointError, match=r"\(rope_scaling is None there, Yarn\(factor=4\.0, .*\) here\)"):
        check(rope_scaling=yarn)
    write_config(checkpoint / "hf", DENSE, rope_scaling=yarn)
    check(rope_scaling=yarn)
    with pytest.raises(CheckpointError, match=r"\(rope_scaling\.beta_fast is 32\.0 there, 16\.0 here\)"):
        check(rope_scaling={**yarn, "beta_fast": 16.0})
