"""``metrics.jsonl``: one JSON object a step.

JSON has no NaN and no infinities. They are written as the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``: every
line is then valid JSON, the difference between them is kept (a null would lose it), and ``float()`` reads them back.
``"NaN"`` also stands for a figure whose inputs are unknown: ``log_prob_gap`` where scripted responses come without
log-probs. A figure that a run does not have at all has no key: no ``eval`` in a step without an evaluation, no
``device_used_gib`` without a GPU. A reader should therefore take values with ``record.get(key)``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opsd_megatron.telemetry.files import replaced_name, sync_to_disk, write_atomically, writing


def to_json_line(record: Mapping[str, Any]) -> str:
    """``record`` as one line of valid JSON, newline included.

    Args:
        record: Values may be mappings, sequences, and scalars of Python, numpy or torch.

    Raises:
        TypeError: A value has no place in JSON.
    """
    return json.dumps(_jsonable(record), allow_nan=False) + "\n"


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if hasattr(value, "item"):  # a scalar of numpy or torch
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


class MetricsWriter:
    """Appends records to a metrics file; each is on disk when :meth:`write` returns.

    Ranks: rank 0 only.
    """

    def __init__(self, path: str | Path, *, resume_step: int = 0) -> None:
        """Open ``path`` for a run that continues after ``resume_step`` optimizer steps.

        Lines of later steps, which a resumed run writes anew, and lines that cannot be read, such as one cut off by a
        crash, are moved to ``<name>.replaced-<UTC time>`` beside the file. With 0 no line is kept: such a run starts
        over, step 0 (the evaluation before the first step) included.

        Raises:
            OutputError: The file cannot be opened or rewritten.
        """
        self.path = Path(path)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                _keep_until(self.path, resume_step if resume_step > 0 else -1)
            self._file = self.path.open("a", encoding="utf-8")
            sync_to_disk(self.path.parent)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append ``record``, which must hold an integer ``step``, as one line.

        Raises:
            OutputError: It cannot be written; a part of the line may have been, which a resumed run moves aside.
        """
        if not isinstance(record["step"], int):
            raise TypeError(f"step must be an int, got {record['step']!r}")
        line = to_json_line(record)
        with writing(self.path):
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file.

        Raises:
            OutputError: A line that could not be written still cannot.
        """
        with writing(self.path):
            self._file.close()


def _keep_until(path: Path, step: int) -> None:
    kept: list[str] = []
    dropped: list[str] = []
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            (kept if _is_kept(line, step) else dropped).append(line)
    if dropped:
        # First the copy, then the removal: a crash in between leaves a line twice, never none.
        write_atomically(replaced_name(path), dropped)
        write_atomically(path, kept)


def _is_kept(line: str, step: int) -> bool:
    if not line.endswith("\n"):
        return False
    try:
        found = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return False
    return isinstance(found, int) and found <= step
