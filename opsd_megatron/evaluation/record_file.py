"""The records of an evaluation under way: on disk as soon as a problem is done, and where to go on after a kill."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from opsd_megatron.errors import DataError
from opsd_megatron.evaluation.records import ProblemRecord, read_records, record_lines
from opsd_megatron.telemetry.files import set_aside, sync_to_disk, writing
from opsd_megatron.types import Problem


class RecordFile:
    """Takes records problem by problem into ``NAME.part``, which becomes ``NAME`` once all are there.

    So ``NAME`` is complete wherever it exists, and a process that is killed leaves whatever it had added. In memory
    there are no responses, which are most of a record.

    Args:
        path: ``NAME``; ``None`` to keep nothing on disk.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._part = None if path is None else path.with_name(f"{path.name}.part")
        self._records: list[ProblemRecord] = []

    def begin(self, problems: Sequence[Problem], *, resume: bool) -> int:
        """Make ready for the records of ``problems``.

        Args:
            problems: In the order in which their records are going to be added.
            resume: What is there is of an earlier part of this very evaluation and counts. Else it is another's: an
                unfinished file is set aside now, a finished one once there is a new one.

        Returns:
            How many of the problems, the first ones, are done.

        Raises:
            DataError: What is there are no records of these problems; names the file.
            OutputError: It cannot be written.
        """
        if self._path is None or self._part is None:
            return 0
        if not resume:
            set_aside(self._part)
            return 0
        _cut_torn_line(self._part)
        source = self._part if self._part.exists() else self._path
        if not source.exists() or not source.stat().st_size:
            return 0
        found = read_records(source)
        asked = [(problem.id, problem.problem, problem.answer or "") for problem in problems[: len(found)]]
        if [(one.problem_id, one.problem, one.answer) for one in found] != asked:
            raise DataError(
                f"{source}: holds records of other problems than those evaluated; move it away to evaluate anew"
            )
        self._records = list(map(_without_responses, found))
        return len(self._records)

    def add(self, records: Sequence[ProblemRecord]) -> None:
        """Add the next records; they are on disk when this returns.

        Raises:
            OutputError: They cannot be written.
        """
        if self._part is not None:
            with writing(self._part):
                self._part.parent.mkdir(parents=True, exist_ok=True)
                with self._part.open("a", encoding="utf-8") as file:
                    file.writelines(record_lines(records))
                    file.flush()
                    os.fsync(file.fileno())
        self._records += map(_without_responses, records)

    def finish(self) -> list[ProblemRecord]:
        """Give the file its name, and return all records, their responses left out.

        Raises:
            OutputError: The file cannot be renamed.
        """
        if self._path is not None and self._part is not None and self._part.exists():
            set_aside(self._path)
            with writing(self._path):
                self._part.rename(self._path)
                sync_to_disk(self._path.parent)
        return self._records


def _without_responses(record: ProblemRecord) -> ProblemRecord:
    return replace(record, samples=tuple(replace(sample, response="") for sample in record.samples))


def _cut_torn_line(path: Path) -> None:
    """Cut off what follows the last newline: a line that was being written when the process was killed."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with writing(path):
            os.truncate(path, whole)
