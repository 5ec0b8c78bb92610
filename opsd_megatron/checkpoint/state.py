"""Saving and resuming a run: atomic, sharded checkpoints that load at any mesh.

A checkpoint is a directory ``step_N``:

    .metadata, *.distcp, common.pt, metadata.json   Megatron-Core's torch_dist format
    hf/                                             config.json, tokenizer and the like, so that it can be exported
    trainer.json                                    step, data position, run identity, mesh, size of every file

It is built as ``.step_N.tmp`` and renamed when it is complete, so a directory called ``step_N`` is always whole. What
a killed run leaves behind is removed by the next save.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from opsd_megatron.checkpoint import atomic, torch_dist
from opsd_megatron.checkpoint.hf_io import copy_hf_files
from opsd_megatron.errors import CheckpointError

HF_FOLDER = "hf"
_TRAINER_FILE = "trainer.json"
_FORMAT = 1
_STEP_NAME = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class TrainerState:
    """What a run needs beside its tensors to continue; JSON-able throughout.

    Attributes:
        step: Optimizer steps done.
        sampler: ``ProblemSampler.state_dict()``.
        identity: What tells this run's checkpoints from another's, see :func:`check_output_dir`.
    """

    step: int
    sampler: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    directory: str | Path,
    *,
    state: TrainerState,
    model: nn.Module,
    optimizer: MegatronOptimizer | None = None,
    source: str | Path,
) -> None:
    """Save a checkpoint; it appears complete under its name or not at all.

    Ranks: every rank of the world; complete when it returns.

    Args:
        directory: ``.../checkpoints/step_N`` for a run, any name for a converted model. On a file system that all
            ranks share.
        state: The trainer's small state.
        model: The model, wrapped for data parallelism or not.
        optimizer: Its optimizer; ``None`` saves weights only.
        source: Hugging Face directory whose configuration and tokenizer go along.

    Raises:
        CheckpointError: ``directory`` exists, or a rank could not write (disk full). Raised on every rank; earlier
            checkpoints are untouched and nothing unfinished is left.
    """
    directory = Path(directory).absolute()
    temporary = atomic.temporary_for(directory)
    torch_dist.on_rank_zero(_begin, directory)
    try:
        tensors: dict[str, Any] = {"model": torch_dist.model_state(model), "rng": torch_dist.rng_state()}
        if optimizer is not None:
            tensors["optimizer"] = torch_dist.optimizer_state(optimizer, tensors["model"], is_loading=False)
        torch_dist.write(tensors, temporary)
        record = {
            "format": _FORMAT,
            "step": state.step,
            "sampler": state.sampler,
            "identity": state.identity,
            "optimizer": optimizer is not None,
            "mesh": _mesh(model),
        }
        torch_dist.on_rank_zero(_finish, directory, record, Path(source))
    except BaseException:
        if dist.get_rank() == 0:
            atomic.discard(temporary)
        raise


def _begin(directory: Path) -> None:
    if _STEP_NAME.fullmatch(directory.name):
        for leftover in directory.parent.glob(".step_*.tmp"):
            atomic.discard(leftover)
    atomic.begin(directory)


def _finish(directory: Path, record: dict[str, Any], source: Path) -> None:
    temporary = atomic.temporary_for(directory)
    copy_hf_files(source, temporary / HF_FOLDER)
    files = sorted(path for path in temporary.iterdir() if path.is_file() and not atomic.is_marker(path))
    record["files"] = {path.name: path.stat().st_size for path in files}
    (temporary / _TRAINER_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    atomic.publish(temporary, directory)


def load_checkpoint(
    directory: str | Path,
    *,
    model: nn.Module,
    optimizer: MegatronOptimizer | None = None,
) -> TrainerState:
    """Load a checkpoint of any mesh into a model and its optimizer.

    The random state is restored where the mesh equals the one it was saved on, and left alone otherwise.

    Ranks: every rank of the world.

    Raises:
        CheckpointError: There is no complete checkpoint, a file is damaged, it was saved from a different model, or it
            holds weights only and ``optimizer`` is given.
    """
    directory = Path(directory).absolute()
    record = _read_record(directory)
    if optimizer is not None and not record["optimizer"]:
        raise CheckpointError(f"{directory} holds weights only: pass it as model.checkpoint to start from them")
    _check_vocabulary(directory, model)
    same_mesh = record["mesh"] == _mesh(model)
    request: dict[str, Any] = {"model": torch_dist.model_state(model)}
    if same_mesh:
        request["rng"] = torch_dist.rng_state()
    if optimizer is not None:
        request["optimizer"] = torch_dist.optimizer_state(optimizer, request["model"], is_loading=True)
    loaded = torch_dist.read(request, directory)
    torch_dist.load_model_state(model, loaded["model"])
    if optimizer is not None:
        torch_dist.load_optimizer_state(optimizer, loaded["optimizer"])
    if same_mesh:
        torch_dist.restore_rng_state(loaded["rng"])
    return TrainerState(step=record["step"], sampler=record["sampler"], identity=record["identity"])


def load_model_weights(directory: str | Path, model: nn.Module) -> None:
    """Load only the weights of a checkpoint of any mesh. Build the optimizer afterwards.

    Ranks: every rank of the world.

    Raises:
        CheckpointError: See :func:`load_checkpoint`.
    """
    directory = Path(directory).absolute()
    _read_record(directory)
    _check_vocabulary(directory, model)
    loaded = torch_dist.read({"model": torch_dist.model_state(model)}, directory)
    torch_dist.load_model_state(model, loaded["model"])


def latest_checkpoint(root: str | Path) -> Path | None:
    """The complete checkpoint ``root/step_N`` with the largest N, or ``None``."""
    checkpoints = _checkpoints(Path(root))
    return checkpoints[-1] if checkpoints else None


def prune_checkpoints(root: str | Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints under ``root``.

    Ranks: any; rank 0 acts. A deletion that is interrupted leaves nothing that looks complete.

    Raises:
        CheckpointError: A checkpoint cannot be deleted.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} would delete the newest checkpoint")
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    for checkpoint in _checkpoints(Path(root))[:-keep]:
        try:
            atomic.remove(checkpoint)
        except OSError as error:
            raise CheckpointError(f"cannot delete the old checkpoint {checkpoint}: {error}") from error


def check_output_dir(output_dir: str | Path, identity: dict[str, Any], *, resume: bool) -> Path | None:
    """Check that a run may use ``output_dir``; touches nothing.

    Args:
        output_dir: The run's directory; need not exist.
        identity: What must be equal for two runs to share checkpoints, such as the model, the data and the objective.
            JSON-able.
        resume: Whether the run is to continue from there.

    Returns:
        The checkpoint to continue from; ``None`` for a fresh start.

    Raises:
        CheckpointError: There are checkpoints and ``resume`` is false, or they belong to another run; the differing
            keys are named.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise CheckpointError(f"output_dir={output_dir} is a file: choose another")
    newest = latest_checkpoint(output_dir / "checkpoints")
    if newest is None:
        return None
    if not resume:
        raise CheckpointError(
            f"{newest} exists: pass checkpoint.resume=true to continue that run, or choose another output_dir"
        )
    theirs, ours = _flat(_read_record(newest)["identity"]), _flat(json.loads(json.dumps(identity)))
    different = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
    if different:
        details = "; ".join(f"{key} was {theirs.get(key)!r}, is {ours.get(key)!r}" for key in different)
        raise CheckpointError(f"{newest} belongs to a different run ({details}): choose another output_dir")
    return newest


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dictionary as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def hf_folder(directory: str | Path) -> Path:
    """Where a checkpoint keeps the Hugging Face configuration and tokenizer it came from.

    Raises:
        CheckpointError: There is no complete checkpoint.
    """
    directory = Path(directory).absolute()
    _read_record(directory)
    return directory / HF_FOLDER


def _checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under ``root``, oldest step first."""
    if not root.is_dir():
        return []
    found = [
        (int(match.group(1)), path)
        for path in root.iterdir()
        if (match := _STEP_NAME.fullmatch(path.name)) and (path / _TRAINER_FILE).is_file()
    ]
    return [path for _, path in sorted(found)]


def _read_record(directory: Path) -> dict[str, Any]:
    """Read ``trainer.json`` and check that every file it lists is there and whole."""
    path = directory / _TRAINER_FILE
    if not path.is_file():
        raise CheckpointError(_not_a_checkpoint(directory))
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        files = record["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}): the checkpoint is damaged, use another") from error
    if record["format"] != _FORMAT:
        raise CheckpointError(f"{path} has format {record['format']}, this version reads {_FORMAT}")
    for name, size in files.items():
        file = directory / name
        actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            found = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
            raise CheckpointError(f"{file} {found}: the checkpoint is damaged, remove it to use an earlier one")
    return record  # type: ignore[no-any-return]


def _check_vocabulary(directory: Path, model: nn.Module) -> None:
    """Megatron-Core cuts or zero-fills a vocabulary of another size, taking the difference for padding."""
    file = directory / HF_FOLDER / "config.json"
    try:
        theirs = int(json.loads(file.read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error!r}): the checkpoint is damaged, use another") from error
    module, tp = torch_dist.unwrap(model), _mesh(model)["tensor"]
    if module.vocab_size != -(-theirs // tp) * tp:
        raise CheckpointError(
            f"{directory} has a vocabulary of {theirs}, this model one of {module.vocab_size}: it was saved from a "
            "different model"
        )


def _not_a_checkpoint(directory: Path) -> str:
    if not directory.exists():
        return f"there is no checkpoint {directory}"
    for root in (directory, directory / "checkpoints"):
        newest = latest_checkpoint(root)
        if newest is not None:
            return f"{directory} is not a checkpoint but holds some: did you mean {newest}?"
    return f"{directory} is not a complete checkpoint: it has no {_TRAINER_FILE}"


def _mesh(model: nn.Module) -> dict[str, int]:
    groups = torch_dist.unwrap(model).pg_collection
    return {"tensor": groups.tp.size(), "pipeline": groups.pp.size(), "data": groups.dp.size()}
