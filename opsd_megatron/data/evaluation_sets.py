"""What problems a model is evaluated on: known sets by name (``evaluation_sets.yaml``), and a user's own."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from opsd_megatron.config import DataConfig
from opsd_megatron.data.problems import directory_files, load_problems
from opsd_megatron.errors import ConfigError, DataError
from opsd_megatron.types import Problem

_NAMED = re.compile(r"(?P<name>[A-Za-z][\w.-]*)@(?P<source>.+)")
_UNSAFE = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class EvaluationSet:
    """Where the problems of a set are and how to read them.

    Attributes:
        name: What its results are called.
        source: As :func:`~opsd_megatron.data.problems.load_problems` takes it.
        columns: Its columns, in place of those of ``data``.
        without: Rows to leave out, by column and value.
    """

    name: str
    source: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    without: Mapping[str, Collection[str]] = field(default_factory=dict)

    def load(self, config: DataConfig, *, most: int | None = None) -> list[Problem]:
        """Read the set.

        Args:
            config: ``data`` of the run; its columns are used where the set has none of its own, and the column
                ``answer`` in a set that lacks ``answer_column``.
            most: Use only the first so many problems; ``None``: all.

        Raises:
            DataError: The source cannot be read, or a problem has no statement or no answer.
        """
        read = partial(
            load_problems,
            source=self.source,
            needs_solution=False,
            needs_response=False,
            needs_answer=True,
            without=self.without,
        )
        try:
            problems = read(replace(config, **self.columns))
        except DataError as error:
            if not self.columns:
                if config.answer_column is not None:  # the training data's own, perhaps
                    with suppress(DataError):
                        return read(replace(config, answer_column="answer"))[:most]
                raise
            raise DataError(
                f"{error}; {self.name} is a known set whose columns are fixed: for data with others pass {self.source} "
                "under another name, and data.problem_column and data.answer_column"
            ) from error
        return problems[:most]


def evaluation_set(text: str) -> EvaluationSet:
    """The set that a user means.

    Args:
        text: The name of a known set; ``NAME@SOURCE``, which is a copy of a known set or, under a name of its own, any
            source; or a source alone.

    Raises:
        DataError: A name is neither known nor a source.
    """
    if text in known_sets():
        known = known_sets()[text]
        return _known(text, f"{known['source']}:{known['split']}", known)
    named = None if Path(text).expanduser().exists() else _NAMED.fullmatch(text)
    if named is None:
        if re.fullmatch(r"[A-Za-z]\w*", text) and not Path(text).exists():
            raise DataError(
                f"{text} is no evaluation set; known by name are {', '.join(known_sets())}; otherwise pass a file, a "
                "directory or a Hub name"
            )
        return EvaluationSet(_short_name(text), text)
    name, source = named["name"], named["source"]
    if name not in known_sets():
        return EvaluationSet(name, source)
    # A copy may hold several splits as its original does, or just the one that is meant.
    split, directory = known_sets()[name]["split"], Path(source).expanduser()
    if directory.is_dir() and directory_files(directory, split):
        source = f"{source}:{split}"
    return _known(name, source, known_sets()[name])


def load_sets(
    texts: Sequence[str], config: DataConfig, *, most: int | None = None
) -> list[tuple[EvaluationSet, list[Problem]]]:
    """Every set that a user means, with its problems; see :func:`evaluation_set` and :meth:`EvaluationSet.load`.

    Raises:
        ConfigError: Two of them have one name.
        DataError: One is not known or cannot be read.
    """
    sets = [evaluation_set(text) for text in texts]
    names = [one.name for one in sets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"evaluation.sets has {twice[0]} twice; give one a name of its own, NAME@SOURCE")
    return [(one, one.load(config, most=most)) for one in sets]


@cache
def known_sets() -> Mapping[str, Mapping[str, Any]]:
    """``evaluation_sets.yaml``, by name."""
    text = resources.files(__package__).joinpath("evaluation_sets.yaml").read_text("utf-8")
    sets: dict[str, Mapping[str, Any]] = yaml.safe_load(text)
    return sets


def _known(name: str, source: str, known: Mapping[str, Any]) -> EvaluationSet:
    columns = {f"{role}_column": known.get(role, role) for role in ("problem", "solution", "answer")}
    return EvaluationSet(name, source, columns, known.get("without", {}))


def _short_name(source: str) -> str:
    """The last part of a path or a Hub name, without a file's suffix."""
    path = Path(source)
    last = path.stem if path.is_file() else path.name
    return _UNSAFE.sub("_", last) or "set"
