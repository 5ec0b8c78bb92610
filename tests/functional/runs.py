"""Small runs for the functional tests: a tiny model, data, fixed rollouts and the overrides that put them together."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.tiny import make_tiny_qwen3

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class SmallRun:
    """Inputs shared by several runs.

    Attributes:
        model: Hugging Face directory.
        data: JSONL file of problems.
        script: JSONL file of scripted rollouts for them.
        student_template: Short prompts keep byte-level sequences short.
        teacher_template: The same with the reference.
    """

    model: Path
    data: Path
    script: Path
    student_template: Path
    teacher_template: Path

    def overrides(self, output: Path, *, steps: int, scripted: bool = True, **keys: object) -> list[str]:
        """Command-line overrides of a run into ``output``; ``keys`` are dotted keys with ``__`` for the dot."""
        settings: dict[str, object] = {
            "model.path": self.model,
            "model.dtype": "float32",
            "model.max_length": 256,
            "data.train": self.data,
            "data.student_template": self.student_template,
            "data.teacher_template": self.teacher_template,
            "rollout.max_new_tokens": 24,
            "optimizer.lr": 1e-3,
            "train.steps": steps,
            "train.problems_per_step": 6,
            "train.tokens_per_micro_batch": 400,
            "checkpoint.every": 0,
            "checkpoint.at_end": False,
            "output_dir": output,
        }
        if scripted:
            settings |= {"rollout.engine": "scripted", "rollout.script": self.script}
        settings |= {key.replace("__", "."): value for key, value in keys.items()}
        return [f"{key}={'null' if value is None else str(value)}" for key, value in settings.items()]


def make_small_run(
    directory: Path, *, problems: int = 9, make_model: Callable[[Path], Path] = make_tiny_qwen3
) -> SmallRun:
    """Write a tiny model, problems of different lengths, and two scripted responses for each of them."""
    from transformers import AutoTokenizer

    from opsd_megatron.config import DataConfig
    from opsd_megatron.data.problems import load_problems
    from opsd_megatron.data.prompts import PromptBuilder

    model = make_model(directory / "model")
    draw = random.Random(0)
    data = directory / "train.jsonl"
    with data.open("w") as file:
        for index in range(problems):
            a, b = draw.randint(10, 99), draw.randint(10, 99)
            row = {
                "problem": f"Add {a} and {b}" + " please" * (index % 4),
                "solution": f"{a} + {b} = \\boxed{{{a + b}}}" + " so" * (index % 3),
            }
            file.write(json.dumps(row) + "\n")
    student, teacher = directory / "student.txt", directory / "teacher.txt"
    student.write_text("{problem}.")
    teacher.write_text("{problem}. Known: {reference}.")
    config = DataConfig(student_template=str(student), teacher_template=str(teacher))
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = PromptBuilder(tokenizer, config, max_length=1024, max_new_tokens=24)
    script = directory / "script.jsonl"
    with script.open("w") as file:
        for problem in load_problems(config, str(data), needs_solution=True, needs_response=False):
            for _ in range(2):
                tokens = [draw.randrange(256) for _ in range(draw.randint(1, 23))] + [tokenizer.eos_token_id]
                file.write(json.dumps({"prompt_ids": prompts.student(problem), "token_ids": tokens}) + "\n")
    return SmallRun(model, data, script, student, teacher)


def torchrun(launch: list[str], module: str, arguments: list[str]) -> subprocess.Popen[str]:
    """Start ``python -m torch.distributed.run LAUNCH -m MODULE ARGUMENTS``; both of its streams are ``stdout``."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *launch, "-m", module, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
