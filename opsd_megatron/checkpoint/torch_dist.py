"""Megatron-Core's ``torch_dist`` format: what of a model and optimizer is saved, and the collective read and write.

The files are those of ``megatron.core.dist_checkpointing``: every tensor is stored under a global name with its global
shape, so that a checkpoint loads at any TP, PP and DP. Saving differs from mcore 0.16.1's own ``save`` in one respect:
tensors are written by torch's synchronous ``FileSystemWriter`` instead of mcore's asynchronous one. That needs neither
a manager process (started by spawn, some seconds for every rank) nor forks of a process full of engine threads, and a
failure on one rank is raised on all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import nn
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from opsd_megatron.checkpoint.tensor_store import disk_error, read_metadata, save_common
from opsd_megatron.distributed.collectives import broadcast_object
from opsd_megatron.errors import CheckpointError, OpsdError

# "fully_reshardable" stores the distributed optimizer's state by parameter, in the parameter's own shape and sharding,
# rather than by the buffers of one particular mesh. For that a save has to gather it: over gloo onto the one rank that
# writes it, and not, as Megatron-Core does by default, over NCCL onto every rank, through its device.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}

_READ_ERRORS = (CheckpointException, CheckpointingException, OSError, EOFError, KeyError, ValueError, RuntimeError)


T = TypeVar("T")


def unwrap(model: nn.Module) -> GPTModel:
    """The model inside data-parallel and precision wrappers."""
    while not isinstance(model, GPTModel):
        model = model.module  # type: ignore[assignment]
    return model


def on_rank_zero(action: Callable[..., T], *args: Any) -> T:
    """Run ``action(*args)`` on rank 0 and let every rank know how it went.

    Ranks: every rank of the world; the (picklable) result is valid on all of them.

    Raises:
        CheckpointError: ``action`` raised an ``OpsdError``; the same on every rank.
        OSError: ``action`` raised it; the same on every rank.
        Exception: Whatever else ``action`` raised, a defect: itself on rank 0, a ``RuntimeError`` that quotes it on
            the others, which would wait for rank 0 otherwise.
    """
    result: T | None = None
    failure: CheckpointError | OSError | None = None
    defect: Exception | None = None
    if dist.get_rank() == 0:
        try:
            result = action(*args)
        except OpsdError as error:
            failure = CheckpointError(str(error))
        except OSError as error:
            failure = OSError(error.errno, error.strerror or str(error), error.filename)
        except Exception as error:
            defect = error
    result, failure, quoted = broadcast_object((result, failure, repr(defect) if defect else None))
    if failure is not None:
        raise failure
    if defect is not None:
        raise defect
    if quoted is not None:
        raise RuntimeError(f"rank 0 failed: {quoted}")
    return cast(T, result)


def model_state(chunks: Sequence[nn.Module]) -> dict[str, Any]:
    """The model's tensors with their place in the global ones, by chunk. Building it moves no data.

    Module "extra states" (8-bit scaling factors) are left out: nothing here uses them, and which modules have one
    depends on the backend, while a checkpoint of one backend loads in the other.
    """
    states = {}
    for number, chunk in enumerate(chunks):
        module = unwrap(chunk)
        state = module.sharded_state_dict(metadata={**_METADATA, "dp_cp_group": module.pg_collection.dp_cp})
        states[str(number)] = {name: value for name, value in state.items() if not name.endswith("_extra_state")}
    return states


def tensor_names(state: dict[str, Any]) -> set[str]:
    """The global names of the tensors in a state."""
    return {entry.key for entry in nested_values(state) if isinstance(entry, ShardedTensor)}


def load_model_state(chunks: Sequence[nn.Module], states: dict[str, Any]) -> None:
    """Hand what :func:`read` returned for :func:`model_state` to the model."""
    for number, chunk in enumerate(chunks):
        left_out = unwrap(chunk).load_state_dict(states[str(number)], strict=False)
        names = (*left_out.missing_keys, *left_out.unexpected_keys)
        wrong = [name for name in names if not name.endswith("_extra_state")]
        assert not wrong, f"the model's state dict and its sharded one have different names: {wrong}"


def optimizer_state(optimizer: MegatronOptimizer, model: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """The optimizer's tensors with their place in the global ones.

    Ranks: every rank (gathers over data parallelism when saving).
    """
    for part in _parts(optimizer):
        _initialise(part)
    return optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=dict(_METADATA))  # type: ignore


def optimizer_kind(optimizer: MegatronOptimizer) -> dict[str, Any]:
    """What must be equal for one optimizer to take another's state; JSON-able.

    Returns:
        ``distributed``: whether it is Megatron-Core's distributed optimizer; the plain one keeps other things under
        other names. ``adam``: package and class that update the parameters, such as ``torch.AdamW``; fused Adams keep
        one step for all parameters, torch's one for each.
    """
    part = _parts(optimizer)[0]
    inner = type(part.optimizer)
    return {
        "distributed": isinstance(part, DistributedOptimizer),
        "adam": f"{inner.__module__.split('.')[0]}.{inner.__name__}",
    }


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> None:
    """Hand what :func:`read` returned for :func:`optimizer_state` to the optimizer.

    Ranks: every rank.
    """
    parts = _parts(optimizer)
    for index, part in enumerate(parts):
        own = state if len(parts) == 1 else state[index]
        tensors = own.pop("param_state", None)
        part.load_state_dict(own)
        # The distributed optimizer hands one and the same step tensor to every parameter (distrib_optimizer.py:826),
        # which torch's Adam would advance once for each of them; and it cannot fill a state that holds a step
        # (distrib_optimizer.py:938).
        values = part.optimizer.state.values()
        steps = [value.pop("step").clone() if "step" in value else None for value in values]
        if tensors is not None:
            part.load_parameter_state_from_fully_reshardable(tensors)
        for value, step in zip(values, steps, strict=True):
            if step is not None:
                value["step"] = step


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers behind Megatron-Core's wrapper; one for a dense model."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _initialise(part: Any) -> None:
    """Give an optimizer that has not stepped the state it would start from, so that there is something to save or fill.

    Megatron-Core's own initialisation omits the step that torch's Adam keeps for each parameter.
    """
    inner = part.optimizer
    if inner.state:
        return
    if isinstance(inner, torch.optim.Adam):  # AdamW is one
        for group in inner.param_groups:
            for parameter in group["params"]:
                zeros = torch.zeros_like(parameter.data)
                # Where torch's own has it: its fused update reads the step on the device.
                step = torch.zeros((), dtype=torch.float32, device=zeros.device if group["fused"] else "cpu")
                inner.state[parameter] = {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    else:
        part.init_state_fn(inner, part.config)


def rng_state() -> ShardedObject:
    """This rank's random state: torch's generators and Megatron-Core's model-parallel ones."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return ShardedObject("rng_state", states, (dist.get_world_size(),), (dist.get_rank(),))


def restore_rng_state(states: dict[str, Any]) -> None:
    """Continue from what :func:`rng_state` saved on this rank."""
    torch.set_rng_state(states["torch"])
    get_cuda_rng_tracker().set_states(states["tracker"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def write(state: dict[str, Any], folder: Path) -> None:
    """Write a sharded state dict into an existing folder.

    Ranks: every rank; ``folder`` is on a file system that all of them share.

    Raises:
        OSError: A rank could not write (disk full); raised on every rank.
        CheckpointError: The ranks do not share the folder; raised on every rank.
    """
    sharded, common = save_preprocess(state)
    on_rank_zero(save_common, common, folder)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # mcore's use of torch, not ours
            torch_checkpoint.save(
                mcore_to_pyt_state_dict(by_key, is_loading=False),
                storage_writer=_Writer(folder, thread_count=1),
                planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            )
    except CheckpointException as error:
        for rank, (cause, _) in error.failures.items():
            if isinstance(cause, OSError):
                raise OSError(cause.errno, f"rank {rank}: {cause.strerror or cause}", cause.filename) from error
        raise CheckpointError(f"cannot write {folder}: {_first_failure(error)}") from error
    on_rank_zero(_complete, folder)


class _Writer(FileSystemWriter):
    """Fails with what the disk said: errors travel to the other ranks without those that they were raised upon."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if (said := disk_error(error)) is None:
                raise
            raise OSError(said.errno, said.strerror, said.filename) from None


def _complete(folder: Path) -> None:
    metadata = read_metadata(folder)
    for info in (metadata.storage_data or {}).values():
        if not (folder / info.relative_path).is_file():
            raise CheckpointError(
                f"{info.relative_path}, written by another rank, is not in {folder}: output_dir must be on a file "
                "system that all nodes share"
            )
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def read(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fill a sharded state dict from a checkpoint; tensors are read into those it refers to.

    Ranks: every rank.

    Raises:
        CheckpointError: The checkpoint is damaged, or lacks or mis-shapes something that ``state`` asks for.
    """
    stored: dict[str, Any] = dict(read_metadata(folder).state_dict_metadata)
    for entry in nested_values(state):
        if isinstance(entry, (ShardedTensor, ShardedTensorFactory)):
            if entry.key not in stored:
                raise CheckpointError(f"{folder} has no tensor {entry.key}: it was saved from a different model")
            # A vocabulary's padding depends on the mesh; state.py compares the vocabularies themselves.
            exact = isinstance(entry, ShardedTensor) and not entry.allow_shape_mismatch
            if exact and tuple(stored[entry.key].size) != tuple(entry.global_shape):
                raise CheckpointError(
                    f"{folder} has {entry.key} with shape {tuple(stored[entry.key].size)}, this model needs "
                    f"{tuple(entry.global_shape)}: it was saved from a different model"
                )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # mcore's use of torch, not ours
            return dist_checkpointing.load(state, str(folder))  # type: ignore[no-any-return]
    except _READ_ERRORS as error:
        raise CheckpointError(f"{folder} cannot be loaded: {_first_failure(error)}") from error


def _first_failure(error: BaseException) -> str:
    """One line of what went wrong on the first rank that failed."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_first_line(cause)}"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [repr(error)])[0][:500]
