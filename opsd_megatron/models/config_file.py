"""A model's ``config.json``: keys read with their types checked, and errors that name the file and the key."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from opsd_megatron.errors import ModelError

_Item = TypeVar("_Item", int, str)


@dataclass(frozen=True)
class ConfigFile:
    """What a JSON file holds, or one of the objects in it.

    Attributes:
        path: The file, for messages.
        values: Its keys.
        within: The key this object stands under, for messages; empty for the whole file.
    """

    path: Path
    values: dict[str, Any]
    within: str = ""

    @staticmethod
    def read(directory: str | Path) -> ConfigFile:
        """Read ``directory/config.json``.

        Raises:
            ModelError: There is none, or it is no JSON object.
        """
        path = Path(directory) / "config.json"
        if not Path(directory).is_dir():
            raise ModelError(f"model directory {directory} does not exist")
        if not path.is_file():
            raise ModelError(f"{path} is missing: {directory} is not a Hugging Face model directory")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ModelError(f"{path} is not readable JSON: {error}") from error
        if not isinstance(values, dict):
            raise ModelError(f"{path} holds a JSON {type(values).__name__}, not an object")
        return ConfigFile(path, values)

    def fail(self, message: str) -> NoReturn:
        """Raise a ``ModelError`` that names the file."""
        raise ModelError(f"{self.path}: {self.within + '.' if self.within else ''}{message}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of ``key``; ``default`` where it is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def required(self, key: str) -> Any:
        """The value of ``key``, which must be there."""
        if self.values.get(key) is None:
            self.fail(f"{key} is missing")
        return self.values[key]

    def number(self, key: str, default: float | None = None) -> float:
        """A positive, finite number; it must be there if ``default`` is ``None``."""
        value = self.required(key) if default is None else self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            self.fail(f"{key}={value!r} is not a positive number")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer; it must be there if ``default`` is ``None``."""
        value = self.number(key, default)
        if not isinstance(value, int):
            self.fail(f"{key}={value!r} is not an integer")
        return value

    def list_of(self, kind: type[_Item], key: str) -> list[_Item]:
        """A list of integers or of strings; empty where it is absent."""
        values = self.get(key, [])
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            self.fail(f"{key}={values!r} is not a list of {'integers' if kind is int else 'strings'}")
        return values

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false; it must be there if ``default`` is ``None``."""
        value = self.required(key) if default is None else self.get(key, default)
        if not isinstance(value, bool):
            self.fail(f"{key}={value!r} is neither true nor false")
        return value
