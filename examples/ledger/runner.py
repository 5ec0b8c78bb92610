"""Runs what the ledger lacks: bases first, then arms, each a `torchrun -m opsd_megatron.train` of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from examples.ledger.arms import ARMS, Arm, common_overrides, divergence
from examples.ledger.bases import BASES, QUICKSTART, ROOT
from examples.ledger.results import Record, add_record, identifying_settings, identity, read_ledger, read_run
from opsd_megatron.config import Config
from opsd_megatron.config.compose import compose_config

from stages import StageRunner  # isort: skip  # the quickstart's, which bases.py made importable

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "opsd_megatron.train")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR"}
# Relative to ROOT, where the commands run: a finished stage is known by its command.
SCRIPTS = QUICKSTART.relative_to(ROOT)
TO_HUGGING_FACE = Path("tools", "checkpoint", "megatron_to_hf.py")
WARM_START_STEPS = 800
_TIME_LIMIT = 1800.0


@dataclass(frozen=True)
class Run:
    """One arm on one base with one seed."""

    base: str
    arm: Arm
    seed: int

    def overrides(self, work: Path) -> dict[str, str]:
        """Hydra overrides, but for the output directory."""
        base = base_directory(self.base, work)
        rounded = {"teacher.path": str(base / "rounded")} if self.arm.group == "control_rounded" else {}
        return {
            **common_overrides(self.arm, self.seed),
            **rounded,
            "model.path": str(base / "hf"),
            "data.train": str(base / "data" / "train.jsonl"),
            "data.eval": str(base / "data" / "eval.jsonl"),
        }

    @property
    def settings(self) -> str:
        """What a record of this run must hold to be of it; the seed is in the record's key."""
        return identity(base_settings(self.base), arm_settings(self.arm.name))


def arm_config(arm: Arm) -> Config:
    """The resolved configuration of an arm, on no base in particular."""
    return compose_config([*assignments(Run("C", arm, 0).overrides(Path("work"))), "output_dir=work/runs"])


@cache
def arm_settings(name: str) -> dict[str, Any]:
    """What identifies an arm."""
    return identifying_settings(arm_config(ARMS[name]))


def assignments(overrides: dict[str, str]) -> list[str]:
    """Overrides as the command line takes them."""
    return [f"{key}={value}" for key, value in overrides.items()]


@cache
def base_settings(name: str) -> dict[str, Any]:
    """What identifies a base: its mixture and the settings of its warm-start."""
    # What it does not use, but what is always among the identifying settings: no default shall change a base.
    unused = {**divergence("0.5", "entry"), "teacher.policy": "frozen", "data.privileged": "reference"}
    paths = {"model.path": "m", "data.train": "t", "output_dir": "o"}
    stated = {"experiment": "quickstart_sft", **paths, **unused, "objective.name": "sft"}
    warm_start = compose_config(assignments(stated))
    return {"base": asdict(BASES[name]), "warm_start": identifying_settings(warm_start)}


def base_directory(name: str, work: Path) -> Path:
    """Where a base is made: another place once it is made of something else."""
    return work / "bases" / f"{name}-{identity(base_settings(name))[:6]}"


def pending(runs: Iterable[Run], ledger: Path) -> list[Run]:
    """Those whose record the ledger lacks, or holds with other settings."""
    done = {record.key: record.settings for record in read_ledger(ledger)}
    return [run for run in runs if done.get((run.base, run.arm.name, run.seed)) != run.settings]


def make_base(name: str, work: Path) -> None:
    """Data, random model, warm-start and conversion of a base, as far as they are not there yet."""
    directory = base_directory(name, work)
    data, model, warm_start = directory / "data", directory / "model", directory / "warm_start"
    runner = StageRunner(directory / "stages", cwd=ROOT, environment=ENVIRONMENT, total=5)
    runner.run("data", f"Base {name}: data", ["-m", "examples.ledger.bases", "--base", name, "--output", data])
    runner.run("model", f"Base {name}: model", [SCRIPTS / "make_model.py", "--data", data, "--output", model])
    settings = {
        "experiment": "quickstart_sft",
        "model.path": str(model),
        "data.train": str(data / "warm_start.jsonl"),
        "output_dir": str(warm_start),
        "checkpoint.resume": "true",
    }
    runner.run("warm_start", f"Base {name}: warm-start", [*TORCHRUN, *assignments(settings)])
    checkpoint = warm_start / "checkpoints" / f"step_{WARM_START_STEPS}"
    export = [TO_HUGGING_FACE, "--checkpoint", checkpoint, "--output"]
    runner.run("hf", f"Base {name}: export", [*export, directory / "hf"])
    rounded = [*export, directory / "rounded", "--dtype", "bfloat16"]
    runner.run("rounded", f"Base {name}: export, rounded", rounded)


class LedgerRunner:
    """Runs arms side by side, adds each that finishes to the ledger and goes on past those that fail.

    Args:
        ledger: The file that records are added to.
        work: Directory for bases and runs.
        jobs: Runs at a time, one core each.
    """

    def __init__(self, ledger: Path, work: Path, *, jobs: int) -> None:
        self.failures: list[str] = []
        self._ledger = ledger
        self._work = work
        self._jobs = jobs
        self._lock = threading.Lock()
        self._started = 0

    def run(self, runs: Sequence[Run]) -> None:
        """Run all of ``runs``; what failed is in ``failures`` afterwards."""
        for run in runs:
            _ = run.settings, run.overrides(self._work)  # composed here and kept: Hydra cannot in several threads
        with ThreadPoolExecutor(self._jobs) as pool:
            for done in [pool.submit(self._one, run, len(runs)) for run in runs]:
                done.result()

    def _one(self, run: Run, total: int) -> None:
        directory = self._new_directory(run)
        with self._lock:
            self._started += 1
            number = self._started
        name = f"[{number}/{total}] {run.base} {run.arm.name} seed {run.seed}"
        began = time.monotonic()
        problem = _train(run, self._work, directory)
        found: dict[str, Any] = {}
        if problem is None:
            try:
                found = read_run(directory / "run")
            except (OSError, ValueError, KeyError) as error:
                problem = f"its files cannot be read: {error!r}"
        seconds = time.monotonic() - began
        with self._lock:
            if problem is not None:
                self.failures.append(f"{name}: {problem}")
                print(f"{name}: FAILED after {seconds:.0f} s, see {directory / 'log.txt'}\n{problem}", flush=True)
                return
            record = Record(
                base=run.base,
                arm=run.arm.name,
                seed=run.seed,
                settings=run.settings,
                seconds=round(seconds, 1),
                date=time.strftime("%Y-%m-%d", time.gmtime()),
                **found,
            )
            add_record(self._ledger, record)
        shares = ", ".join(f"{100 * record.correct_at(step).mean():.1f}" for step in record.steps)
        print(f"{name}: {shares} % after steps {record.steps}, {seconds:.0f} s", flush=True)

    def _new_directory(self, run: Run) -> Path:
        """A directory no attempt has used: what an interrupted one left stays for inspection and is never read."""
        parent = self._work / "runs" / run.base
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{run.arm.name}-seed{run.seed}-", dir=parent))


def _train(run: Run, work: Path, directory: Path) -> str | None:
    """Train; what went wrong, if anything did."""
    overrides = {**run.overrides(work), "output_dir": str(directory / "run")}
    command = [sys.executable, *TORCHRUN, *assignments(overrides)]
    environment = {**os.environ, **ENVIRONMENT}
    with (directory / "log.txt").open("w", encoding="utf-8") as log:
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            status = child.wait(_TIME_LIMIT)
        except subprocess.TimeoutExpired:
            return f"not finished within {_TIME_LIMIT:.0f} s"
        finally:
            if child.poll() is None:  # torchrun ends its ranks when it is asked to end
                child.terminate()
                child.wait()
    if status:
        lines = (directory / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if "rror" in line] or lines
        return f"exit code {status}: " + " | ".join(errors[:3])
    return None
