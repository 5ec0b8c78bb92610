"""The programs behind docs/benchmarks.md still run: each at a size of no interest, for its table and not its times."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.functional.runs import ROOT

COMMANDS = {
    "convert": "convert.py --hidden 64 --ffn 96 --layers 2 --heads 4 --kv-heads 2 --work WORK",
    "logits": "logits.py --hidden 8 --rows 4 --parts 151936 960 --repeats 1",
    "lora_merge": "lora_merge.py --size 32 --inputs 32 --rank 4 --steps 1 2",
    "loss": "loss.py --hidden 8 --rows 4 --repeats 1",
    "step": "step.py --case 0.64M:2:4 --steps 3 --work WORK",
    "sync": "-m torch.distributed.run --standalone --nproc-per-node 2 sync.py --repeats 1",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_prints_its_table(name: str, tmp_path: Path) -> None:
    paths = {"WORK": str(tmp_path), f"{name}.py": str(ROOT / "benchmarks" / f"{name}.py")}
    command = [sys.executable, *(paths.get(argument, argument) for argument in COMMANDS[name].split())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    head, rule, *rows = [line for line in ended.stdout.splitlines() if line.startswith("|")]
    columns = head.count("|")
    assert set(rule) <= set("| -") and rows and all(row.count("|") == columns for row in (rule, *rows)), ended.stdout
    assert all(re.search(r"\| *\d", row) for row in rows), ended.stdout


def test_every_benchmark_is_among_them() -> None:
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} == COMMANDS.keys()
