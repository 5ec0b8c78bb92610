"""Whether a checkpoint suits the model, the optimizer and the adapters it is to be loaded into.

Megatron-Core reads what it is asked for and says nothing of what it leaves out, and it takes a vocabulary of another
size for one with other padding. So these are asked first, and name what differs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import nn

from opsd_megatron.checkpoint import torch_dist
from opsd_megatron.checkpoint.record import HF_FOLDER, TRAINER_FILE, hf_folder
from opsd_megatron.checkpoint.tensor_store import TensorStore
from opsd_megatron.distributed.collectives import gather_objects
from opsd_megatron.errors import CheckpointError
from opsd_megatron.models.families import family_of, read_spec
from opsd_megatron.models.qwen3 import Qwen3Spec
from opsd_megatron.models.rules import ADAPTER_SUFFIX

# The longest sequence is a limit of the run, not of what the weights compute.
_MAY_DIFFER = {"max_positions"}


def check_checkpoint(directory: str | Path, spec: Qwen3Spec, source: str | Path) -> None:
    """Check that a checkpoint can give a model its initial weights, before there is a model or a process group.

    Trainer and engine both take from ``model.path`` what no tensor's shape tells, such as the base of the rotary
    embedding. So every field of the two specs is compared, of whatever family.

    Ranks: any; reads the small files and the sizes of the others.

    Args:
        directory: What ``model.checkpoint`` names.
        spec: The model that is to be built.
        source: The directory that ``spec`` was read from.

    Raises:
        CheckpointError: There is no complete checkpoint, or it is of another model; the differing keys are named.
        ModelError: The configuration in the checkpoint is damaged.
    """
    folder = hf_folder(directory)
    theirs = read_spec(folder)
    different = _differences(theirs, spec)
    if type(theirs) is not type(spec):
        different.insert(0, f"model_type is {family_of(theirs)!r} there, {family_of(spec)!r} here")
    if different:
        raise CheckpointError(
            f"{folder / 'config.json'} is of another model than {Path(source) / 'config.json'} "
            f"({'; '.join(different)}): pass as model.path the model that model.checkpoint={directory} was saved from"
        )


def _differences(theirs: Any, ours: Any, within: str = "") -> list[str]:
    """What two dataclasses say differently, of the fields that both have, by the name it has in ``config.json``."""
    different = []
    own = {field.name for field in fields(ours)}
    for field in fields(theirs):
        if field.name not in own or field.name in _MAY_DIFFER:
            continue
        key = within + field.metadata.get("key", field.name)
        there, here = getattr(theirs, field.name), getattr(ours, field.name)
        if is_dataclass(there) and type(there) is type(here):
            different += _differences(there, here, f"{key}.")
        elif there != here:
            different.append(f"{key} is {there} there, {here} here")
    return different


def check_optimizer(directory: Path, theirs: dict[str, Any] | None, ours: dict[str, Any]) -> None:
    """Check that this run's optimizer takes the state of a checkpoint's.

    Args:
        directory: The checkpoint.
        theirs: Its ``torch_dist.optimizer_kind``; ``None`` where it holds weights only.
        ours: This run's.

    Raises:
        CheckpointError: It does not; says what would.
    """
    if theirs is None:
        raise CheckpointError(f"{directory} holds weights only: pass it as model.checkpoint to start from them")
    if theirs["distributed"] != ours["distributed"]:
        was = str(theirs["distributed"]).lower()
        raise CheckpointError(
            f"{directory} was saved with parallel.distributed_optimizer={was}, and its optimizer state loads only so: "
            f"pass parallel.distributed_optimizer={was}"
        )
    if theirs["adam"] != ours["adam"]:
        raise CheckpointError(
            f"{directory} holds the state of {theirs['adam']}, this run's optimizer is {ours['adam']}; which it is "
            "depends on whether Transformer Engine or Apex is installed: resume with what the run started with, or "
            f"start a new run from the weights with model.checkpoint={directory}"
        )


def check_vocabulary(directory: Path, model: Sequence[nn.Module]) -> None:
    """Check that a checkpoint's vocabulary is the model's.

    Megatron-Core cuts or zero-fills one of another size, taking the difference for padding.

    Raises:
        CheckpointError: It is not, or the checkpoint's ``config.json`` cannot be read.
    """
    file = directory / HF_FOLDER / "config.json"
    try:
        theirs = int(json.loads(file.read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error!r}): the checkpoint is damaged, use another") from error
    module = torch_dist.unwrap(model[0])
    tp = module.pg_collection.tp.size()
    if module.vocab_size != -(-theirs // tp) * tp:
        raise CheckpointError(
            f"{directory} has a vocabulary of {theirs}, this model one of {module.vocab_size}: it was saved from a "
            "different model"
        )


def check_adapter_names(directory: Path, requested: dict[str, Any]) -> None:
    """Check that no stored adapter is left out: reading gives what is asked for, and no error for what is not.

    Ranks: every rank of the world, each with its own part of the request.

    Raises:
        CheckpointError: One is, or one that is asked for is not stored.
    """
    wanted = {name for names in gather_objects(torch_dist.tensor_names(requested)) for name in names if _adapts(name)}
    there = set(filter(_adapts, TensorStore(directory).names()))
    listed = directory / ".metadata"
    if left_out := sorted(there - wanted):
        raise CheckpointError(
            f"{listed} lists tensor {left_out[0]} of an adapter that this model cannot take over: its backend has no "
            f"such adapter (model.backend), or lora in {directory / TRAINER_FILE} is not what it was saved with"
        )
    if missing := sorted(wanted - there):
        raise CheckpointError(f"{listed} lists no tensor {missing[0]}, though {directory / TRAINER_FILE} has adapters")


def _adapts(name: str) -> bool:
    """Whether a stored tensor is an adapter's, and not the optimizer's state of one."""
    return f"{ADAPTER_SUFFIX}." in name and not name.startswith("optimizer.")
