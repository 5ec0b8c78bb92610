"""Saving and resuming a run: atomic, sharded checkpoints that load at any mesh.

A checkpoint is a directory ``step_N``:

    .metadata, *.distcp, common.pt, metadata.json   Megatron-Core's torch_dist format
    hf/                                             config.json, tokenizer and the like, so that it can be exported
    trainer.json                                    step, data position, run identity, mesh, size of every file

It is built as ``.step_N.tmp`` and renamed when it is complete, see :mod:`opsd_megatron.checkpoint.atomic`. What a
killed run leaves behind is ignored, and removed by the next save.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

from opsd_megatron.checkpoint import atomic, torch_dist
from opsd_megatron.checkpoint.compatibility import check_adapter_names, check_optimizer, check_vocabulary
from opsd_megatron.checkpoint.hf_writer import copy_hf_files
from opsd_megatron.checkpoint.record import FORMAT, HF_FOLDER, STEP_NAME, TRAINER_FILE, adapters_of, read_record
from opsd_megatron.errors import CheckpointError
from opsd_megatron.models.lora import adapter_settings, adapters_to_merge


@dataclass(frozen=True)
class TrainerState:
    """What a run needs beside its tensors to continue; JSON-able throughout.

    Attributes:
        step: Optimizer steps done.
        sampler: ``ProblemSampler.state_dict()``.
        identity: What tells this run's checkpoints from another's, see ``output_dir.check_output_dir``.
    """

    step: int
    sampler: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)


class Stateful(Protocol):
    """Something beside the model and its optimizer that keeps tensors in checkpoints, such as a teacher."""

    def sharded_state(self) -> dict[str, Any]:
        """Its ``ShardedTensor`` s by name, this rank's part; empty where it keeps nothing."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the tensors of a checkpoint, by the names of :meth:`sharded_state`."""
        ...


def save_checkpoint(
    directory: str | Path,
    *,
    state: TrainerState,
    model: Sequence[nn.Module],
    optimizer: MegatronOptimizer | None = None,
    teacher: Stateful | None = None,
    source: str | Path,
) -> None:
    """Save a checkpoint; it appears complete under its name or not at all.

    Ranks: every rank of the world; complete when it returns.

    Args:
        directory: ``.../checkpoints/step_N`` for a run, any name for a converted model. On a file system that all
            ranks share.
        state: The trainer's small state.
        model: This rank's chunks of the model, wrapped for data parallelism or not.
        optimizer: Its optimizer; ``None`` saves weights only.
        teacher: The teacher, where there is one.
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
        if teacher is not None and (kept := teacher.sharded_state()):
            tensors["teacher"] = kept
        torch_dist.write(tensors, temporary)
        record = {
            "format": FORMAT,
            "step": state.step,
            "sampler": state.sampler,
            "identity": state.identity,
            "optimizer": None if optimizer is None else torch_dist.optimizer_kind(optimizer),
            "mesh": _mesh(model),
            "lora": _lora(model),
        }
        torch_dist.on_rank_zero(_finish, directory, record, Path(source))
    except BaseException as error:
        if dist.get_rank() == 0:
            atomic.discard(temporary)
        if isinstance(error, OSError):
            raise CheckpointError(
                f"{atomic.cannot_write(directory, error)}, and earlier checkpoints are as they were. Make room there; "
                "checkpoint.resume=true then goes on from the newest, and checkpoint.keep=N keeps the newest N only"
            ) from error
        raise


def save_converted(directory: str | Path, write: Callable[[Path], None], *, source: str | Path) -> None:
    """Make a checkpoint of weights that ``write`` fills; it appears complete under its name or not at all.

    Args:
        directory: Any name.
        write: Called with the folder that takes the tensors.
        source: Hugging Face directory whose configuration and tokenizer go along.

    Raises:
        CheckpointError: ``directory`` exists or cannot be written (disk full); nothing is left there.
        Exception: Whatever ``write`` raised; nothing is left there.
    """
    record = {"format": FORMAT, "step": 0, "sampler": {}, "identity": {}, "optimizer": None, "mesh": None}
    with atomic.atomic_directory(Path(directory).absolute()) as temporary:
        write(temporary)
        _complete(temporary, record, Path(source))


def _begin(directory: Path) -> None:
    if STEP_NAME.fullmatch(directory.name):
        for pattern in (".step_*.tmp", "step_*"):
            for path in directory.parent.glob(pattern):
                atomic.discard(path)
    atomic.begin(directory)


def _finish(directory: Path, record: dict[str, Any], source: Path) -> None:
    temporary = atomic.temporary_for(directory)
    _complete(temporary, record, source)
    atomic.publish(temporary, directory)


def _complete(temporary: Path, record: dict[str, Any], source: Path) -> None:
    """Put beside the tensors what else a checkpoint holds."""
    copy_hf_files(source, temporary / HF_FOLDER)
    files = sorted(path for path in temporary.iterdir() if path.is_file() and not atomic.is_marker(path))
    record["files"] = {path.name: path.stat().st_size for path in files}
    (temporary / TRAINER_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_checkpoint(
    directory: str | Path,
    *,
    model: Sequence[nn.Module],
    optimizer: MegatronOptimizer | None = None,
    teacher: Stateful | None = None,
) -> TrainerState:
    """Load a checkpoint of any mesh into a model, its optimizer and its teacher.

    The random state is restored where the mesh equals the one it was saved on, and left alone otherwise.

    Ranks: every rank of the world.

    Raises:
        CheckpointError: There is no complete checkpoint, a file is damaged, it was saved from a different model, or
            ``optimizer`` is given and it holds weights only or another kind of optimizer's state.
    """
    directory = Path(directory).absolute()
    record = read_record(directory)
    if optimizer is not None:
        check_optimizer(directory, record["optimizer"], torch_dist.optimizer_kind(optimizer))
    check_vocabulary(directory, model)
    if record.get("lora") != _lora(model):
        raise CheckpointError(
            f"{directory} was saved with the adapters {record.get('lora')}, this run has {_lora(model)} (lora.rank, "
            f"lora.alpha, lora.targets): resume with the same, or start a new run with model.checkpoint={directory}"
        )
    same_mesh = record["mesh"] == _mesh(model)
    request: dict[str, Any] = {"model": torch_dist.model_state(model)}
    if same_mesh:
        request["rng"] = torch_dist.rng_state()
    if optimizer is not None:
        request["optimizer"] = torch_dist.optimizer_state(optimizer, request["model"], is_loading=True)
    if teacher is not None and (kept := teacher.sharded_state()):
        request["teacher"] = kept
    loaded = torch_dist.read(request, directory)
    torch_dist.load_model_state(model, loaded["model"])
    if optimizer is not None:
        torch_dist.load_optimizer_state(optimizer, loaded["optimizer"])
    if teacher is not None and "teacher" in request:
        teacher.load_state(loaded["teacher"])
    if same_mesh:
        torch_dist.restore_rng_state(loaded["rng"])
    return TrainerState(step=record["step"], sampler=record["sampler"], identity=record["identity"])


def load_model_weights(directory: str | Path, model: Sequence[nn.Module]) -> None:
    """Load only the weights of a checkpoint of any mesh. Build the optimizer afterwards.

    A checkpoint's adapters are merged into the weights.

    Ranks: every rank of the world.

    Args:
        directory: The checkpoint.
        model: This rank's chunks of a model without adapters.

    Raises:
        CheckpointError: See :func:`load_checkpoint`; or the model cannot take over an adapter that is stored.
    """
    directory = Path(directory).absolute()
    settings = adapters_of(directory)
    check_vocabulary(directory, model)
    chunks = [torch_dist.unwrap(chunk) for chunk in model]
    with nullcontext() if settings is None else adapters_to_merge(chunks, settings):
        request = {"model": torch_dist.model_state(chunks)}
        check_adapter_names(directory, request["model"])
        loaded = torch_dist.read(request, directory)
        torch_dist.load_model_state(chunks, loaded["model"])


def _lora(model: Sequence[nn.Module]) -> dict[str, Any] | None:
    settings = adapter_settings(model)
    return None if settings is None else asdict(settings)


def _mesh(model: Sequence[nn.Module]) -> dict[str, int]:
    groups = torch_dist.unwrap(model[0]).pg_collection
    return {
        "tensor": groups.tp.size(),
        "pipeline": groups.pp.size(),
        "data": groups.dp.size(),
        "context": groups.cp.size(),
        "expert": groups.ep.size(),
        "expert_tensor": groups.expt_tp.size(),
    }
