"""What a checkpoint's directory says of itself: whether it is complete, and its ``trainer.json``.

Needs neither a model nor a process group.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from opsd_megatron.checkpoint import atomic
from opsd_megatron.config import LoraConfig
from opsd_megatron.errors import CheckpointError

HF_FOLDER = "hf"
TRAINER_FILE = "trainer.json"
FORMAT = 2
STEP_NAME = re.compile(r"step_(\d+)")


def latest_checkpoint(root: str | Path) -> Path | None:
    """The complete checkpoint ``root/step_N`` with the largest N, or ``None``."""
    checkpoints = checkpoints_in(Path(root))
    return checkpoints[-1] if checkpoints else None


def hf_folder(directory: str | Path) -> Path:
    """Where a checkpoint keeps the Hugging Face configuration and tokenizer it came from.

    Raises:
        CheckpointError: There is no complete checkpoint.
    """
    directory = Path(directory).absolute()
    read_record(directory)
    return directory / HF_FOLDER


def adapters_of(directory: str | Path) -> LoraConfig | None:
    """What the adapters in a checkpoint were made with; ``None`` where it has none.

    Raises:
        CheckpointError: There is no complete checkpoint.
    """
    settings = read_record(Path(directory).absolute()).get("lora")
    return None if settings is None else LoraConfig(**settings)


def checkpoints_in(root: Path) -> list[Path]:
    """Complete checkpoints under ``root``, oldest step first."""
    if not root.is_dir():
        return []
    found = [
        (int(match.group(1)), path)
        for path in root.iterdir()
        if (match := STEP_NAME.fullmatch(path.name)) and is_complete(path)
    ]
    return [path for _, path in sorted(found)]


def is_complete(directory: Path) -> bool:
    """Whether ``directory`` is a checkpoint whose saving came to its end, and whose deletion has not begun."""
    return (directory / TRAINER_FILE).is_file() and not atomic.is_unfinished(directory)


def read_record(directory: Path) -> dict[str, Any]:
    """Read ``trainer.json`` and check that every file it lists is there and whole.

    Raises:
        CheckpointError: There is no complete checkpoint, or a file of it is damaged.
    """
    path = directory / TRAINER_FILE
    if not is_complete(directory):
        raise CheckpointError(_not_a_checkpoint(directory))
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        files, version = record["files"], record["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}): the checkpoint is damaged, use another") from error
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version}, this version reads {FORMAT}")
    for name, size in files.items():
        file = directory / name
        actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            found = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
            raise CheckpointError(f"{file} {found}: the checkpoint is damaged, remove it to use an earlier one")
    return record  # type: ignore[no-any-return]


def _not_a_checkpoint(directory: Path) -> str:
    if not directory.exists():
        return f"there is no checkpoint {directory}"
    if atomic.is_unfinished(directory):
        return f"{directory} is not complete: saving or deleting it was interrupted, use another"
    for root in (directory, directory / "checkpoints"):
        newest = latest_checkpoint(root)
        if newest is not None:
            return f"{directory} is not a checkpoint but holds some: did you mean {newest}?"
    return f"{directory} is not a complete checkpoint: it has no {TRAINER_FILE}"
