"""Reading problems from JSONL, Parquet and the Hugging Face Hub, with errors that say where the data is wrong.

JSONL is read line by line here rather than by a library, so that every error carries ``file:line``. Rows are counted
from 1 everywhere.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from opsd_megatron.config import DataConfig
from opsd_megatron.data.boxed import last_boxed
from opsd_megatron.errors import DataError
from opsd_megatron.types import Problem, Role

_JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
_ACCEPTED = (
    "a .jsonl or .parquet file, a directory of .parquet or .jsonl files, or a Hub name such as org/name or "
    "org/name:split"
)
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>[\w.-]+))?")
# A suffix of a file begins with a letter; the ".1" of a Hub name such as org/maths-v1.1 does not.
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w*$")


@dataclass(frozen=True)
class _Row:
    """One record of a source.

    Attributes:
        id: What the problem made of it is called.
        where: The place named in errors, ``path:line``.
        columns: Its values by column name.
    """

    id: str
    where: str
    columns: Mapping[str, object]


def load_problems(
    config: DataConfig,
    source: str,
    *,
    needs_solution: bool,
    needs_response: bool,
    needs_answer: bool = False,
    uses_answer: bool = True,
    without: Mapping[str, Collection[str]] | None = None,
) -> list[Problem]:
    """Read every problem of a source, checked.

    Only the columns that are needed must exist; ``solution`` and ``answer`` are read wherever they are there. A column
    within another is named with dots (``reward_model.ground_truth``, ``prompt.0.content``).

    Args:
        config: Names of the columns.
        source: JSONL or Parquet file; directory of Parquet or JSONL files, or one that holds them in ``data``, as a
            downloaded Hub repository does; or Hub name. A directory and a Hub name may have a ``:split``; a Hub name's
            is ``train`` by default. What exists on disk is never looked up on the Hub.
        needs_solution: Every row must have a reference solution (the teacher sees it).
        needs_response: Every row must have a supervised target (objective ``sft``), from ``data.response_column`` or,
            without one, the solution column; rows for the teacher's prompt must also have a solution.
        needs_answer: Every row must have an answer, in its column or in the solution's last box.
        uses_answer: Answers are read for a purpose: a column named for them must be there.
        without: Leaves out rows whose column has one of these values.

    Raises:
        DataError: The source cannot be read or holds no rows, or a row lacks a column, has an empty or wrongly typed
            value, or an unknown role; or no row has the answer column that was named. Names the source and the line
            or row.
    """
    problems: list[Problem] = []
    first, answer_found = None, config.answer_column is None or not uses_answer
    for row in _rows(source):
        if any(row.columns.get(column) in values for column, values in (without or {}).items()):
            continue
        one = _problem(
            row, config, needs_solution=needs_solution, needs_response=needs_response, needs_answer=needs_answer
        )
        problems.append(one)
        first = first or row
        answer_found = answer_found or _value(row, _answer_column(config)) is not None
    if first is None:
        raise DataError(f"{source}: holds no rows; a data source needs at least one problem")
    if not answer_found:
        # No row has what the user named: a solution's box must not stand in for it unnoticed.
        raise DataError(
            f"{first.where}: no column {config.answer_column!r}, here or in any other row; it has: "
            f"{', '.join(first.columns)}; name the one to use with data.answer_column=NAME, or take each "
            "solution's last \\boxed{} with data.answer_column=null"
        )
    return problems


# --- rows of a source -------------------------------------------------------------------------------------------------


def _rows(source: str) -> Iterator[_Row]:
    path = Path(source).expanduser()
    if path.is_dir():
        return _directory_rows(path, None)
    if path.exists():
        if path.suffix in _JSONL_SUFFIXES:
            return _jsonl_rows(path)
        if path.suffix == ".parquet":
            return _parquet_rows(path)
        raise DataError(f"{source}: unknown kind of file {path.suffix!r}; data must be {_ACCEPTED}")
    directory, _, split = source.rpartition(":")
    if directory and (path := Path(directory).expanduser()).is_dir():
        return _directory_rows(path, split)
    hub = _HUB_NAME.fullmatch(source)
    if hub is None or source.startswith((".", "~")) or _FILE_SUFFIX.search(hub["name"]):
        raise DataError(f"{source}: no such file or directory (looked in {Path.cwd()}); data must be {_ACCEPTED}")
    return _hub_rows(hub["name"], hub["split"] or "train")


def directory_files(directory: Path, split: str | None) -> list[Path]:
    """The data files of a directory, or of its ``data``: Parquet where there is any, else JSONL.

    Args:
        directory: One's own, or a downloaded Hub repository.
        split: Only files of this split, ``test.jsonl`` or ``test-00000-of-00001.parquet``; ``None``: all.
    """
    for folder in (directory, directory / "data"):
        for pattern in ("*.parquet", "*.jsonl"):
            files = sorted(folder.glob(pattern))
            if split is not None:
                files = [file for file in files if file.stem == split or file.name.startswith(f"{split}-")]
            if files:
                return files
    return []


def _directory_rows(directory: Path, split: str | None) -> Iterator[_Row]:
    files = directory_files(directory, split)
    if not files and split is None:
        raise DataError(f"{directory}: this directory holds no .parquet or .jsonl files; data must be {_ACCEPTED}")
    if not files:
        there = ", ".join(file.name for file in directory_files(directory, None)) or "no data files"
        raise DataError(f"{directory}: has no files of the split {split!r}; it holds {there}")
    return (row for file in files for row in (_parquet_rows if file.suffix == ".parquet" else _jsonl_rows)(file))


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    where = f"{path}:{number}"
                    yield _Row(id=f"{path.name}:{number}", where=where, columns=_json_object(raw, where))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _json_object(raw: bytes, where: str) -> dict[str, object]:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 text (byte {error.start + 1} of the line); convert the file to UTF-8"
        ) from error
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: malformed JSON at column {error.colno}: {error.msg}; every line must be one JSON object"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
        raise DataError(f"{where}: JSON that cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: holds {_kind(value)}; every line must be one JSON object such as "
            '{"problem": "...", "solution": "..."}'
        )
    return value


def _parquet_rows(path: Path) -> Iterator[_Row]:
    # The library beneath `datasets`, which itself would first copy the file into a cache. Imported late, as below.
    parquet = import_module("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield _Row(id=f"{path.name}:{number}", where=f"{path}: row {number}", columns=row)
    except Exception as error:  # a different type for each way a file can be broken
        raise DataError(f"{path}: cannot be read as Parquet: {_brief(error)}") from error


def _hub_rows(name: str, split: str) -> Iterator[_Row]:
    source = f"{name}:{split}"
    try:
        rows = _load_dataset(name, split=split)
    except Exception as error:  # network, authentication, unknown name, unknown split: each has a type of its own
        raise DataError(
            f"{source}: cannot be loaded from the Hugging Face Hub: {_brief(error)}; check the name, the split and the "
            "connection, or pass a local file (there is none of this name)"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield _Row(id=f"{source}:{number}", where=f"{source}: row {number}", columns=row)


def _load_dataset(*args: object, **kwargs: object) -> Iterable[dict[str, Any]]:
    # Imported late: it takes seconds, and JSONL needs none of it.
    return cast(Iterable[dict[str, Any]], import_module("datasets").load_dataset(*args, **kwargs))


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# --- from a row to a problem ------------------------------------------------------------------------------------------


def _problem(
    row: _Row, config: DataConfig, *, needs_solution: bool, needs_response: bool, needs_answer: bool
) -> Problem:
    problem = _text(row, config.problem_column, key="data.problem_column")
    role = _role(row, config) if needs_response else "student"
    response = None
    if needs_response and config.response_column is not None:
        response = _text(row, config.response_column, key="data.response_column")
    elif needs_response:
        response = _text(row, config.solution_column, key="data.solution_column")
    if needs_solution or role == "teacher":
        solution = _text(row, config.solution_column, key="data.solution_column")
    else:
        value = _value(row, config.solution_column)
        solution = value if isinstance(value, str) else ""
    answer = _answer(row, config, solution)
    if needs_answer and answer is None:
        _value(row, _answer_column(config), key="data.answer_column")
        raise DataError(
            f"{row.where}: column {_answer_column(config)!r} (data.answer_column) is empty, and the solution in "
            f"{config.solution_column!r} (data.solution_column) has no \\boxed{{}} to take it from; fill it in or "
            "remove the row"
        )
    return Problem(id=row.id, problem=problem, solution=solution, answer=answer, response=response, role=role)


def _value(row: _Row, column: str, *, key: str | None = None) -> object:
    """The value of a column, or of a part of one.

    Args:
        row: The row.
        column: Its name; dots lead into objects and, with numbers, into lists.
        key: The configuration key that names the column, for one that must be there; ``None``: an absent one is
            ``None``.
    """
    if column in row.columns:
        return row.columns[column]
    value: object = row.columns
    for part in column.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif key is None:
            return None
        else:
            raise DataError(
                f"{row.where}: no column {column!r}; it has: {', '.join(row.columns) or 'none'}; name the one to use "
                f"with {key}=NAME"
            )
    return value


def _text(row: _Row, column: str, *, key: str) -> str:
    """The text of a column that must be there; ``key`` is the configuration key that names the column."""
    value = _value(row, column, key=key)
    if not isinstance(value, str):
        raise DataError(f"{row.where}: column {column!r} ({key}) holds {_kind(value)} where text is needed")
    if not value.strip():
        raise DataError(f"{row.where}: column {column!r} ({key}) is empty; fill it in or remove the row")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(
            f"{row.where}: column {column!r} ({key}) holds half of a surrogate pair (\\ud800 to \\udfff), which is no "
            "text; repair or remove the row"
        )
    return value


def _role(row: _Row, config: DataConfig) -> Role:
    if config.role_column is None:
        return "student"
    role = _text(row, config.role_column, key="data.role_column")
    if role not in ("student", "teacher"):
        raise DataError(f"{row.where}: {config.role_column}={role!r} is neither student nor teacher (data.role_column)")
    return cast(Role, role)


def _answer_column(config: DataConfig) -> str:
    return "answer" if config.answer_column is None else config.answer_column


def _answer(row: _Row, config: DataConfig, solution: str) -> str | None:
    value = _value(row, _answer_column(config))
    # Some sets hold lists: of one answer, or of all solutions of an equation.
    parts = [_answer_text(row, config, part) for part in (value if isinstance(value, list) else [value])]
    return ", ".join(part for part in parts if part is not None) or last_boxed(solution)


def _answer_text(row: _Row, config: DataConfig, value: object) -> str | None:
    if isinstance(value, float) and math.isnan(value):
        value = None  # how tables of numbers say "absent"
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(int(value) if isinstance(value, float) and value.is_integer() else value)
    raise DataError(
        f"{row.where}: column {_answer_column(config)!r} (data.answer_column) holds {_kind(value)} where text or a "
        "number is needed"
    )


def _kind(value: object) -> str:
    """What a value is, in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
