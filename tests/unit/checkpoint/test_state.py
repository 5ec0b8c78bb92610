"""Checkpoints on real ranks: any mesh loads any other's bit for bit, resuming is exact, failures leave nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from opsd_megatron.checkpoint import output_dir, state, torch_dist
from opsd_megatron.checkpoint.atomic import is_leftover
from opsd_megatron.checkpoint.hf_io import SafetensorsReader
from opsd_megatron.checkpoint.output_dir import agreed_checkpoint
from opsd_megatron.checkpoint.record import latest_checkpoint
from opsd_megatron.checkpoint.state import load_checkpoint, load_model_weights
from opsd_megatron.errors import CheckpointError
from tests.distributed import run_distributed
from tests.small_disk import without_free_space
from tests.tiny import make_tiny_qwen3
from tests.unit.checkpoint.mesh import Mesh, Run, run_on, stored


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3(tmp_path_factory.mktemp("tied"), num_layers=2)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3(tmp_path_factory.mktemp("untied"), num_layers=2, tied=False)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def load(run: Run, directory: Path) -> state.TrainerState:
    return load_checkpoint(directory, model=run.trainable.chunks, optimizer=run.trainable.optimizer)


def travel(source: Path, root: Path, meshes: list[Mesh]) -> list[bool]:
    """Carry one state over meshes, saving it on each; whether each saved the same weights and optimizer state."""
    with run_on(meshes[0], source) as run:
        run.steps(1, 2)
        run.save(root / "step_0")
        weights, tensors = run.exported(), stored(root / "step_0")
    assert sum(name.startswith("optimizer.state.exp_avg_sq.") for name in tensors) >= 10
    outcome = []
    for number, mesh in enumerate(meshes[1:], start=1):
        with run_on(mesh, source, weights=False) as run:
            load(run, root / f"step_{number - 1}")
            run.save(root / f"step_{number}")
            outcome.append(equal(run.exported(), weights) and equal(stored(root / f"step_{number}"), tensors))
    return outcome


def numbers_to_save(source: Path) -> tuple[int, int]:
    """How many numbers of the weights and of Adam's state this rank has at hand for a save."""
    with run_on(Mesh(), source) as run:
        model = torch_dist.model_state(run.trainable.chunks)
        optimizer = torch_dist.optimizer_state(run.trainable.optimizer, model, is_loading=False)
        return tuple(  # type: ignore[return-value]
            sum(one.data.numel() for one in nested_values(tree) if isinstance(one, ShardedTensor))
            for tree in (model, optimizer)
        )


def test_one_rank_of_those_that_share_adam_s_state_gathers_it(tied: Path) -> None:
    (weights, first), (_, second) = run_distributed(numbers_to_save, 2, tied)
    assert first >= 3 * weights  # float32 weights and two moments
    assert second < weights / 10


def test_weights_and_optimizer_state_over_four_ranks(untied: Path, tmp_path: Path) -> None:
    meshes = [Mesh(tp=2, pp=2), Mesh(), Mesh(pp=2), Mesh(tp=2), Mesh(tp=2, pp=2)]
    assert run_distributed(travel, 4, untied, tmp_path, meshes) == [[True] * 4] * 4


def test_interleaved_and_uneven_stages_and_split_sequences(tmp_path: Path) -> None:
    """5 layers over chunks of 2, 1, 1 and 1, over stages of 2, 1, 1 and 1, of 3 and 2, and all on one.

    At tp 2 the one key/value head is cut.
    """
    source = make_tiny_qwen3(tmp_path / "five", num_layers=5, kv_heads=1)
    meshes = [Mesh(tp=2, pp=2, vpp=2), Mesh(pp=4), Mesh(pp=2, cp=2), Mesh(tp=2), Mesh(cp=4), Mesh(pp=2, vpp=2)]
    assert run_distributed(travel, 4, source, tmp_path, meshes) == [[True] * 5] * 4


def travel_of_each_kind(source: Path, root: Path) -> dict[str, list[bool]]:
    kinds = [(True, "bfloat16"), (False, "float32"), (False, "bfloat16")]
    return {
        f"{sharded} {dtype}": travel(
            source,
            root / f"{sharded} {dtype}",
            [Mesh(tp=tp, pp=pp, sharded_optimizer=sharded, dtype=dtype) for tp, pp in [(2, 1), (1, 2), (1, 1), (2, 1)]],
        )
        for sharded, dtype in kinds
    }


def test_every_kind_of_optimizer_over_two_ranks(tied: Path, tmp_path: Path) -> None:
    expected = {kind: [True] * 3 for kind in ("True bfloat16", "False float32", "False bfloat16")}
    assert run_distributed(travel_of_each_kind, 2, tied, tmp_path) == [expected] * 2


def change_padding(source: Path, root: Path) -> bool:
    with run_on(Mesh(tp=2), source) as run:
        run.steps(1, 1)
        run.save(root / "step_1")
        weights = run.exported()
    with run_on(Mesh(), source, weights=False) as run:
        load(run, root / "step_1")
        run.save(root / "step_2")
        assert run.model[-1].output_head().shape[0] == 271
        same = equal(run.exported(), weights)
    with run_on(Mesh(tp=2), source, weights=False) as run:
        load(run, root / "step_2")
        return same and equal(run.exported(), weights)


def test_a_vocabulary_padded_on_one_mesh_loads_on_another(tmp_path: Path) -> None:
    source = make_tiny_qwen3(tmp_path / "model", num_layers=2, vocab_size=271)
    assert run_distributed(change_padding, 2, source, tmp_path) == [True, True]


def resume(source: Path, root: Path, mesh: Mesh) -> dict[str, bool]:
    outcome = {}
    with run_on(mesh, source) as run:
        run.steps(1, 2)
        torch.rand(3)
        run.save(root / "step_2", 2)
        drawn = torch.rand(3)
        run.steps(3, 4)
        uninterrupted = run.exported()
    with run_on(mesh, source, weights=False) as run:
        loaded = load(run, root / "step_2")
        outcome["state"] = loaded == state.TrainerState(2, sampler={"position": 2}, identity={"run": "test"})
        outcome["random numbers"] = torch.equal(torch.rand(3), drawn)
        run.trainable.scheduler.step(2)
        run.steps(3, 4)
        outcome["weights"] = equal(run.exported(), uninterrupted)
    return outcome


def resume_on_each(source: Path, root: Path, meshes: list[Mesh]) -> list[dict[str, bool]]:
    return [resume(source, root / str(number), mesh) for number, mesh in enumerate(meshes)]


def test_resuming_is_exact(tied: Path, tmp_path: Path) -> None:
    meshes = [Mesh(), Mesh(tp=2, sharded_optimizer=False), Mesh(pp=2, dtype="bfloat16")]
    expected = {"state": True, "random numbers": True, "weights": True}
    assert run_distributed(resume_on_each, 2, tied, tmp_path, meshes) == [[expected] * 3] * 2


def other_uses(source: Path, root: Path) -> dict[str, bool]:
    """Saving before the first step, saving weights only, and random state on another mesh."""
    outcome = {}
    with run_on(Mesh(tp=2), source) as run:
        run.save(root / "step_0")
        run.save(root / "weights", weights_only=True)
        initial = run.exported()
        run.steps(1, 2)
        trained = run.exported()
    with run_on(Mesh(tp=2), source, weights=False) as run:
        load(run, root / "step_0")
        run.steps(1, 2)
        outcome["continues from an optimizer that has not stepped"] = equal(run.exported(), trained)
    with run_on(Mesh(), source, weights=False) as run:
        load_model_weights(root / "weights", run.model)
        outcome["weights only"] = equal(run.exported(), initial)
        generator = torch.get_rng_state()
        load(run, root / "step_0")
        outcome["another mesh leaves the random state alone"] = torch.equal(torch.get_rng_state(), generator)
        try:
            load(run, root / "weights")
        except CheckpointError as error:
            outcome["no optimizer state"] = "weights only" in str(error)
    return outcome


def test_other_uses(tied: Path, tmp_path: Path) -> None:
    for outcome in run_distributed(other_uses, 2, tied, tmp_path):
        assert len(outcome) == 4 and all(outcome.values()), outcome
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "weights" / "hf" / name).read_bytes() == (tied / name).read_bytes()
    assert not list((tmp_path / "weights").rglob("*.safetensors"))


def fail(source: Path, root: Path) -> dict[str, str]:
    """Save once, then again and again with a full disk in one place; the messages."""

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    messages = {}
    with run_on(Mesh(tp=2), source) as run:
        run.save(root / "step_1", 1)
        places: dict[str, tuple[object, str]] = {
            "rank 1": (torch_dist.FileSystemWriter, "write_data"),
            "common state": (torch_dist, "save_common"),
            "last files": (state, "copy_hf_files"),
        }
        for place, (owner, name) in places.items():
            with pytest.MonkeyPatch.context() as patch:
                if place != "rank 1" or run.dims.rank == 1:
                    patch.setattr(owner, name, full)
                try:
                    run.save(root / "step_2", 2)
                except CheckpointError as error:
                    messages[place] = without_free_space(str(error))
                torch.distributed.barrier()
    return messages


def test_a_full_disk_on_one_rank_stops_all_and_leaves_nothing(tied: Path, tmp_path: Path) -> None:
    first, second = run_distributed(fail, 2, tied, tmp_path)
    assert first == second and first.keys() == {"rank 1", "common state", "last files"}
    assert all("No space left on device" in message for message in first.values()), first
    assert "rank 1" in first["rank 1"]
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step_1"


def other_optimizers(source: Path, root: Path) -> dict[str, str]:
    """Messages of loading another kind of optimizer's state."""
    messages = {}
    for sharded in (True, False):
        with run_on(Mesh(sharded_optimizer=sharded), source) as run:
            run.steps(1, 1)
            run.save(root / str(sharded))
    record = json.loads((root / "True" / "trainer.json").read_text())
    assert record["optimizer"] == {"distributed": True, "adam": "torch.AdamW"}
    record["optimizer"]["adam"] = "transformer_engine.FusedAdam"
    for sharded, name in ((False, "True"), (True, "False"), (True, "fused")):
        with run_on(Mesh(sharded_optimizer=sharded), source, weights=False) as run:
            if name == "fused":
                (root / "True" / "trainer.json").write_text(json.dumps(record))
                (root / "True").rename(root / "fused")
            try:
                load(run, root / name)
            except CheckpointError as error:
                messages[name] = str(error)
            load_model_weights(root / name, run.model)
    return messages


def test_the_state_of_another_kind_of_optimizer_is_refused(tied: Path, tmp_path: Path) -> None:
    (messages,) = run_distributed(other_optimizers, 1, tied, tmp_path)
    assert messages.keys() == {"True", "False", "fused"}
    assert messages["True"].endswith("pass parallel.distributed_optimizer=true")
    assert messages["False"].endswith("pass parallel.distributed_optimizer=false")
    assert "holds the state of transformer_engine.FusedAdam, this run's optimizer is torch.AdamW" in messages["fused"]


def on_one_rank(root: Path) -> dict[str, str]:
    """How rank 0's work ends on this rank: a result, an error of the user, a defect."""

    def divide(by: int) -> float:
        return 1 / by

    outcome = {"result": str(torch_dist.on_rank_zero(divide, 2 if torch.distributed.get_rank() == 0 else 0))}
    for name, action, argument in (("user", os.rmdir, root / "nowhere"), ("defect", divide, 0)):
        try:
            torch_dist.on_rank_zero(action, argument)
        except Exception as error:
            outcome[name] = repr(error)
    return outcome


def test_any_failure_of_rank_zero_reaches_all(tmp_path: Path) -> None:
    first, second = run_distributed(on_one_rank, 2, tmp_path)
    assert first["result"] == second["result"] == "0.5"
    assert first["user"] == second["user"] and first["user"].startswith("FileNotFoundError(2, ")
    assert first["defect"] == "ZeroDivisionError('division by zero')"
    assert second["defect"].startswith("RuntimeError(") and "rank 0 failed: ZeroDivision" in second["defect"]


def agree(root: Path) -> dict[str, str]:
    """The choice of this rank, of a rank that finds another one, and of ranks that do not share a file system."""
    second = torch.distributed.get_rank() == 1
    outcome = {"none": str(agreed_checkpoint(root / "nowhere"))}
    with pytest.MonkeyPatch.context() as patch:
        if second:
            patch.setattr(output_dir, "latest_checkpoint", lambda _: root / "step_1")
        outcome["other"] = str(agreed_checkpoint(root))
    with pytest.MonkeyPatch.context() as patch:
        if second:
            patch.setattr(output_dir, "is_complete", lambda _: False)
        try:
            agreed_checkpoint(root)
        except CheckpointError as error:
            outcome["unshared"] = str(error)
    with pytest.MonkeyPatch.context() as patch:
        if not second:
            patch.setattr(
                output_dir, "latest_checkpoint", lambda root: list((root / "step_1" / "trainer.json").iterdir())
            )
        try:
            agreed_checkpoint(root)
        except CheckpointError as error:
            outcome["unreadable"] = str(error)
    return outcome


def test_all_ranks_resume_from_rank_zero_s_choice(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f"step_{step}").mkdir()
        (tmp_path / f"step_{step}" / "trainer.json").write_text("{}")
    first, second = run_distributed(agree, 2, tmp_path)
    assert first == second and first.keys() == {"none", "other", "unshared", "unreadable"}
    assert first["none"] == "None" and first["other"] == str(tmp_path / "step_2")
    assert first["unshared"].startswith(f"rank 1 does not see {tmp_path / 'step_2'}, which rank 0 resumes from: ")
    assert "output_dir must be on a file system that all ranks share" in first["unshared"]
    assert first["unreadable"].startswith(f"cannot read {tmp_path}: ")


def save_and_die(source: Path, root: Path) -> None:
    with run_on(Mesh(), source) as run:
        run.save(root / "step_1", 1)
        state._finish = lambda *args: os._exit(9)
        run.save(root / "step_2", 2)


def save_again(source: Path, root: Path) -> bool:
    with run_on(Mesh(), source) as run:
        load(run, root / "step_1")
        run.save(root / "step_3", 3)
        before = stored(root / "step_3")
        with pytest.raises(CheckpointError, match="already exists"):
            run.save(root / "step_3", 3)
        return equal(stored(root / "step_3"), before)


def test_a_killed_save_is_ignored_then_cleaned_up(tied: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exit code 9"):
        run_distributed(save_and_die, 1, tied, tmp_path)
    leftover = tmp_path / ".step_2.tmp"
    assert is_leftover(leftover) and list(leftover.glob("*.distcp"))
    assert not (tmp_path / "step_2").exists() and latest_checkpoint(tmp_path) == tmp_path / "step_1"
    assert run_distributed(save_again, 1, tied, tmp_path) == [True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_3"]


def load_broken(source: Path, others: dict[str, Path], root: Path) -> dict[str, str]:
    """Messages of loading checkpoints that are damaged or of another model."""
    with run_on(Mesh(), source) as run:
        run.save(root / "good")
    for name in ("cut shard", "no shard", "no record", "bad record", "noise metadata", "noise shard"):
        shutil.copytree(root / "good", root / name)
    shard = "__0_0.distcp"
    (root / "cut shard" / shard).write_bytes((root / "good" / shard).read_bytes()[:-100])
    (root / "no shard" / shard).unlink()
    (root / "no record" / "trainer.json").unlink()
    (root / "bad record" / "trainer.json").write_text("{")
    for name, file in (("noise metadata", ".metadata"), ("noise shard", shard)):
        (root / name / file).write_bytes(b"\x07" * (root / name / file).stat().st_size)
    messages = {}
    with run_on(Mesh(), source, weights=False) as run:
        for name in ("cut shard", "no shard", "no record", "bad record", "noise metadata", "noise shard", "nowhere"):
            try:
                load(run, root / name)
            except CheckpointError as error:
                messages[name] = str(error)
    for name, other in others.items():
        with run_on(Mesh(), other, weights=False) as run:
            try:
                load_model_weights(root / "good", run.model)
            except CheckpointError as error:
                messages[name] = str(error)
    return messages


def test_damaged_and_foreign_checkpoints_are_named(tied: Path, untied: Path, tmp_path: Path) -> None:
    others = {
        "untied": untied,
        "narrower": make_tiny_qwen3(tmp_path / "narrower", num_layers=2, ffn=64),
        "longer": make_tiny_qwen3(tmp_path / "longer", num_layers=3),
        "more words": make_tiny_qwen3(tmp_path / "words", num_layers=2, vocab_size=273),
    }
    (messages,) = run_distributed(load_broken, 1, tied, others, tmp_path)
    parts = {
        "cut shard": ("__0_0.distcp has", "instead of"),
        "no shard": ("__0_0.distcp is missing",),
        "no record": ("is not a complete checkpoint", "trainer.json"),
        "bad record": ("trainer.json cannot be read",),
        "noise metadata": (".metadata cannot be read",),
        "noise shard": ("noise shard cannot be loaded",),
        "nowhere": ("there is no checkpoint", "nowhere"),
        "untied": ("no tensor output_layer.weight", "different model"),
        "longer": ("different model",),
        "more words": ("a vocabulary of 272, this model one of 273",),
        "narrower": ("linear_fc2.weight with shape (2, 64, 96)", "different model"),
    }
    assert messages.keys() == parts.keys()
    for name, expected in parts.items():
        assert all(part in messages[name] for part in expected) and "\n" not in messages[name], messages[name]


def test_weights_equal_the_directory_they_came_from(tied: Path) -> None:
    """The comparisons above are of weights that differ between tensors and are not zero."""
    reader = SafetensorsReader(tied)
    assert all(reader.get(name).float().std() > 0.01 for name in reader.names())
