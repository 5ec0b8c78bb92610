"""The checkpoints in a run's ``output_dir``: which one to continue from, and which to delete."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from opsd_megatron.checkpoint import atomic
from opsd_megatron.checkpoint.record import checkpoints_in, is_complete, latest_checkpoint, read_record
from opsd_megatron.checkpoint.torch_dist import on_rank_zero
from opsd_megatron.distributed.collectives import gather_objects
from opsd_megatron.errors import CheckpointError

_logger = logging.getLogger(__name__)


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
    theirs, ours = _flat(read_record(newest)["identity"]), _flat(json.loads(json.dumps(identity)))
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


def agreed_checkpoint(root: str | Path) -> Path | None:
    """What :func:`latest_checkpoint` finds on rank 0; looking for itself, a rank might find another.

    Ranks: every rank of the world; the same on all of them.

    Raises:
        CheckpointError: A rank does not see rank 0's choice, or the disk failed; raised on every rank.
    """
    newest = on_rank_zero(_latest, Path(root).absolute())
    seen = gather_objects(newest is None or is_complete(newest))
    if not all(seen):
        raise CheckpointError(
            f"rank {seen.index(False)} does not see {newest}, which rank 0 resumes from: output_dir must be on a file "
            "system that all ranks share"
        )
    return newest


def _latest(root: Path) -> Path | None:
    try:
        return latest_checkpoint(root)
    except OSError as error:
        raise CheckpointError(f"cannot read {root}: {error}") from error


def prune_checkpoints(root: str | Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints under ``root``.

    One that cannot be deleted is a warning, since the newest ones are safe; the next save tries again. A deletion that
    is interrupted leaves nothing that looks complete.

    Ranks: any; rank 0 acts.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} would delete the newest checkpoint")
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    for checkpoint in checkpoints_in(Path(root))[:-keep]:
        try:
            atomic.remove(checkpoint)
        except OSError as error:
            _logger.warning("cannot delete the old checkpoint %s, will try at the next save: %s", checkpoint, error)
