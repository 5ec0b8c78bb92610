"""Every shipped experiment at its stated number of GPUs: configuration, mesh, memory, and the table in docs/recipes.md.

``python -m tests.unit.test_recipes`` prints that table.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from opsd_megatron.config import Config
from opsd_megatron.config.compose import compose_config
from opsd_megatron.models.families import read_spec
from opsd_megatron.models.memory import MemoryEstimate, estimate_memory
from opsd_megatron.models.qwen3 import Qwen3Spec, check_mesh
from tests.unit.models.published import PUBLISHED, write_config


def _billions(name: str) -> float:
    """The size in an experiment's name."""
    return float(re.split("[b_]", name)[1])


ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "opsd_megatron" / "configs" / "experiment"
NAMES = sorted(
    (path.stem for path in EXPERIMENTS.glob("qwen3_*.yaml")),
    key=lambda name: (_billions(name), name),
)
GPU = 80 * 10**9


@dataclass(frozen=True)
class Recipe:
    """An experiment as it would be launched."""

    config: Config
    gpus: int
    spec: Qwen3Spec
    memory: MemoryEstimate

    @property
    def engine(self) -> int:
        """Bytes reserved for the engine."""
        return int(self.config.rollout.memory_fraction * GPU) if self.config.needs_engine else 0


@cache
def recipe(name: str) -> Recipe:
    """Compose ``name`` and check it for the number of GPUs that its first comment states."""
    stated = re.search(r"^# .* for (\d+) GPUs of 80 GB", (EXPERIMENTS / f"{name}.yaml").read_text(), re.MULTILINE)
    assert stated is not None, f"{name}.yaml does not say for how many GPUs it is"
    config, gpus = compose_config([f"experiment={name}"]), int(stated[1])
    config.validate(gpus)
    size = config.model.path.removeprefix("Qwen/Qwen3-")
    with tempfile.TemporaryDirectory() as directory:
        spec = read_spec(write_config(Path(directory), PUBLISHED[size][0]))
    check_mesh(spec, config)
    return Recipe(config, gpus, spec, estimate_memory(spec, config, gpus))


def table() -> str:
    """The table of docs/recipes.md."""
    lines = [
        "| experiment | GPUs | mesh | engine | weights, gradients, optimizer, teacher "
        "| update | sampling | checkpoint |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in NAMES:
        made = recipe(name)
        config, memory = made.config, made.memory
        parallel = config.parallel
        sizes = {"tp": parallel.tensor, "pp": parallel.pipeline, "cp": parallel.context, "ep": parallel.expert}
        sizes["dp"] = made.gpus // (parallel.tensor * parallel.pipeline * parallel.context)
        mesh = " ".join(f"{axis}{number}" for axis, number in sizes.items() if number > 1)
        engine = f"tp{config.engine_tensor}, {made.engine / 1e9:.0f}" if config.needs_engine else "none"
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.teacher)
        resident = " + ".join(f"{part / 1e9:.1f}" for part in parts)
        sampling = f"{memory.sampling(made.engine) / 1e9:.0f}" if config.needs_engine else ""
        training = f"{memory.training / 1e9:.0f}"
        cells = [f"`{name}`", str(made.gpus), mesh, engine, resident, training, sampling]
        lines.append(f"| {' | '.join([*cells, f'{memory.checkpoint / 1e9:.0f}'])} |")
    return "\n".join(lines)


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_fits_its_gpus(name: str) -> None:
    made = recipe(name)
    assert made.memory.training < GPU
    assert made.memory.sampling(made.engine) < GPU
    if made.config.needs_engine:
        # vLLM refuses to start where its cache does not hold one sequence of the greatest length.
        assert made.memory.cache_tokens(made.engine) >= (made.config.model.max_length or made.spec.max_positions)
    # Without padding, no rank's head is smaller than another's.
    assert made.spec.padded_vocab_size(made.config.parallel.tensor) == made.spec.vocab_size == 151_936
    # Of a large model four checkpoints or more would fill many a file system.
    assert made.config.checkpoint.keep == (None if _billions(name) < 14 else 2)
    # Data-parallel ranks without a problem would idle.
    parallel = made.config.parallel
    copies = made.gpus // (parallel.tensor * parallel.pipeline * parallel.context)
    assert made.config.train.problems_per_step * made.config.rollout.samples_per_problem >= copies


# What all of the paper's arms have in common, and its main recipe; in full, since a default may change.
COMMON: dict[str, object] = {
    "model.dtype": "bfloat16",
    "lora.rank": 64,
    "lora.alpha": 128,
    "lora.targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "data.train": "siyanzhao/Openthoughts_math_30k_opsd",
    "data.problem_column": "problem",
    "data.solution_column": "solution",
    "data.answer_column": "Answer",
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.999,
    "optimizer.weight_decay": 0.0,
    "optimizer.warmup_steps": 0,
}
MAIN: dict[str, object] = COMMON | {
    "objective.name": "opsd",
    "objective.beta": 0.0,
    "objective.clip_mode": "entry",
    "objective.top_k": None,
    "teacher.policy": "adapter_off",
    "data.privileged": "reference",
    "data.student_thinking": False,
    "data.teacher_thinking": True,
    "rollout.temperature": 1.1,
    "rollout.top_p": 0.95,
    "rollout.top_k": 20,
    "rollout.max_new_tokens": 1024,
    "rollout.samples_per_problem": 1,
    "optimizer.lr": 5e-6,
    "optimizer.schedule": "constant",
    "optimizer.clip_grad": 0.1,
    "train.steps": 100,
    "train.problems_per_step": 32,
    "checkpoint.every": 25,
}
PAPER: dict[str, dict[str, object]] = {
    "qwen3_1.7b_opsd": MAIN | {"model.path": "Qwen/Qwen3-1.7B", "objective.clip": 0.05},
    "qwen3_4b_opsd": MAIN | {"model.path": "Qwen/Qwen3-4B", "objective.clip": 0.05},
    "qwen3_8b_opsd": MAIN | {"model.path": "Qwen/Qwen3-8B", "objective.clip": 0.06},
    "qwen3_4b_opsd_nonthinking": MAIN | {"objective.clip": 1e-6, "data.teacher_thinking": False},
    "qwen3_8b_opsd_nonthinking": MAIN | {"objective.clip": 1e-7, "data.teacher_thinking": False},
    "qwen3_8b_opsd_v1": COMMON
    | {
        "objective.beta": 0.5,
        "objective.clip_mode": "none",
        "optimizer.lr": 2e-5,
        "optimizer.schedule": "cosine",
        "rollout.max_new_tokens": 2048,
        "rollout.temperature": 1.2,
    },
    "qwen3_4b_sft": COMMON | {"objective.name": "sft", "optimizer.lr": 5e-6, "data.response_column": None},
    "qwen3_8b_grpo": COMMON
    | {
        "objective.name": "grpo",
        "rollout.samples_per_problem": 8,
        "rollout.max_new_tokens": 16000,
        "rollout.temperature": 1.2,
        "optimizer.lr": 5e-6,
        "model.recompute": "full",
    },
    "qwen3_8b_opsd_full": {"lora.rank": 0, "teacher.policy": "frozen", "objective.clip": 0.06},
}


@pytest.mark.parametrize("name", PAPER)
def test_settings_are_those_of_the_paper(name: str) -> None:
    config = compose_config([f"experiment={name}"])
    assert {key: config.get(key) for key in PAPER[name]} == PAPER[name]


def test_the_papers_number_of_gpus() -> None:
    assert [recipe(f"qwen3_{size}_opsd").gpus for size in ("1.7b", "4b", "8b")] == [4, 8, 8]


def test_four_epochs_of_the_supervised_baseline() -> None:
    train = compose_config(["experiment=qwen3_4b_sft"]).train
    assert 4 <= train.steps * train.problems_per_step / 29_434 < 4.01


def test_a_recipe_and_a_size_make_an_experiment() -> None:
    overrides = [f"output_dir={compose_config(['experiment=qwen3_4b_opsd']).output_dir}"]
    assert compose_config(["recipe=opsd", "size=qwen3_4b", *overrides]) == compose_config(["experiment=qwen3_4b_opsd"])
    assert compose_config(["experiment=qwen3_4b_opsd", "recipe=grpo"]).objective.name == "grpo"


def test_the_table_in_the_docs_is_this_one() -> None:
    assert table() in (ROOT / "docs" / "recipes.md").read_text(), "python -m tests.unit.test_recipes prints the table"


if __name__ == "__main__":
    print(table())
