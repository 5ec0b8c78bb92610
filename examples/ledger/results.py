"""What a finished run leaves: one line of the ledger, enough for the report without the run's directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from opsd_megatron.config import Config
from opsd_megatron.telemetry.files import write_atomically
from opsd_megatron.telemetry.metrics import to_json_line

# Where things lie, not what was done; and the seed, which is in the key.
_NOT_IDENTIFYING = frozenset(
    {
        "train.seed",
        "output_dir",
        "model.path",
        "teacher.path",
        "data.train",
        "data.eval",
        "data.student_template",
        "data.teacher_template",
    }
)
# Stated always: the ledger is there to choose some of these defaults, and a new default must not rename old runs.
_STATED = frozenset(
    {
        "objective.name",
        "objective.beta",
        "objective.clip",
        "objective.clip_mode",
        "teacher.policy",
        "data.privileged",
        "optimizer.clip_grad",
    }
)


@dataclass(frozen=True)
class Record:
    """One run of one arm.

    Attributes:
        base: The base model.
        arm: The arm.
        seed: Of data order, sampling and evaluation.
        settings: Digest of what identifies the run, see :func:`identity`.
        steps: Steps after which it was evaluated, ascending.
        correct: For each of them, which held-out problems were answered correctly: bits of a hexadecimal number, the
            first problem's first.
        generated: For each of them, response tokens sampled for training until then, in thousands.
        divergence: For each of them but step 0, the unclipped divergence, a mean over the steps since the one before;
            ``None`` where there is no teacher.
        loss: Likewise what was minimised.
        alarms: Steps whose loss was not to be trusted.
        step_seconds: Median wall time of a step without evaluation.
        seconds: Wall time of the whole process, start and evaluations included.
        date: When it ended.
    """

    base: str
    arm: str
    seed: int
    settings: str
    steps: list[int]
    correct: list[str]
    generated: list[float]
    divergence: list[float | None]
    loss: list[float | None]
    alarms: int
    step_seconds: float
    seconds: float
    date: str

    @property
    def key(self) -> tuple[str, str, int]:
        """Of records with equal keys the ledger holds one."""
        return self.base, self.arm, self.seed

    def correct_at(self, step: int) -> npt.NDArray[np.bool_]:
        """Which problems were answered correctly after ``step`` steps, ``[N]``."""
        return unpack(self.correct[self.steps.index(step)])


def pack(correct: Iterable[bool]) -> str:
    """Bits as a hexadecimal number, a multiple of four of them."""
    bits = [int(flag) for flag in correct]
    if len(bits) % 4:
        raise ValueError(f"{len(bits)} problems; a multiple of 4 is needed")
    return f"{int(''.join(map(str, bits)), 2):0{len(bits) // 4}x}"


def unpack(text: str) -> npt.NDArray[np.bool_]:
    """The inverse of :func:`pack`."""
    return np.array([bit == "1" for bit in f"{int(text, 16):0{4 * len(text)}b}"])


def identifying_settings(config: Config) -> dict[str, Any]:
    """What tells one run from another, but for its seed: the resolved settings that differ from the defaults.

    Only these, so that a setting the program learns later, off by default, does not make every run a new one. A default
    that changes goes unnoticed unless it is among those stated always.
    """
    ours, defaults = _flat(asdict(config)), _flat(asdict(Config()))
    return {k: v for k, v in ours.items() if k not in _NOT_IDENTIFYING and (k in _STATED or v != defaults.get(k))}


def identity(*parts: Any) -> str:
    """A short digest of ``parts``, which JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def read_run(directory: Path) -> dict[str, Any]:
    """The fields of a :class:`Record` that the files of a finished run tell."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [line for line in lines if line["step"]]
    sampled = [line.get("sampled_tokens", 0) for line in trained]
    evaluated = [line for line in lines if line.get("eval")]
    durations = [
        sum(seconds for phase, seconds in line["seconds"].items() if phase not in ("evaluation", "checkpoint"))
        for line in trained
    ]
    ends = [line["step"] for line in evaluated if line["step"]]
    windows = [trained[first:last] for first, last in zip([0, *ends], ends, strict=False)]
    return {
        "steps": [line["step"] for line in evaluated],
        "correct": [pack(_verdicts(directory / "evaluations" / f"step_{line['step']}.jsonl")) for line in evaluated],
        "generated": [round(sum(sampled[: line["step"]]) / 1000, 1) for line in evaluated],
        "divergence": [_mean(line.get("divergence") for line in window) for window in windows],
        "loss": [_mean(line.get("loss") for line in window) for window in windows],
        "alarms": sum(line.get("alarm") is not None for line in trained),
        "step_seconds": round(float(np.median(durations)), 3),
    }


def _verdicts(path: Path) -> list[bool]:
    """Whether the first sample of each problem is correct."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["samples"][0]["correct"] for line in file]


def _mean(values: Iterable[float | str | None]) -> float | None:
    """Of figures of ``metrics.jsonl``, to five digits; ``None`` where there are none."""
    known = [float(value) for value in values if value is not None]
    return float(f"{np.mean(known):.5g}") if known else None


def read_ledger(path: Path) -> list[Record]:
    """All records of a ledger; none where there is no file."""
    if not path.exists():
        return []
    return [Record(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def add_record(path: Path, record: Record) -> None:
    """Add a record, in the place of one with the same key."""
    kept = [each for each in read_ledger(path) if each.key != record.key]
    ordered = sorted([*kept, record], key=lambda each: each.key)
    write_atomically(path, [to_json_line(asdict(each)) for each in ordered])
