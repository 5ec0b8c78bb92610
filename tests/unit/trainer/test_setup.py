"""What is checked before anything is built, and what a user is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from opsd_megatron.errors import ConfigError, DataError, ModelError, OpsdError
from opsd_megatron.train import compose_config
from opsd_megatron.trainer.setup import check_inputs, run_identity
from tests.functional.runs import SmallRun, make_small_run


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return make_small_run(tmp_path_factory.mktemp("small"))


def check(small: SmallRun, output: Path, **keys: object) -> None:
    config = compose_config(small.overrides(output, steps=1, **keys))
    config.validate(world_size=config.parallel.tensor * config.parallel.pipeline)
    check_inputs(config)


def test_a_good_run_passes_and_writes_nothing(small: SmallRun, tmp_path: Path) -> None:
    check(small, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        (
            {"parallel__tensor": 4, "parallel__pipeline": 1},
            ConfigError,
            r"parallel\.tensor=4 does not divide .* key/value",
        ),
        ({"parallel__pipeline": 3}, ConfigError, "parallel.pipeline=3 does not divide the model's 4 layers"),
        ({"model__max_length": 4096}, ConfigError, "model.max_length=4096"),
        ({"rollout__max_new_tokens": 256}, ConfigError, "rollout.max_new_tokens=256 leaves no room"),
        ({"data__problem_column": "question"}, DataError, "data.problem_column"),
        ({"data__max_prompt_tokens": 5}, DataError, "train.jsonl:1: the student prompt has"),
    ],
)
def test_wrong_keys(
    small: SmallRun, tmp_path: Path, keys: dict[str, object], error: type[OpsdError], message: str
) -> None:
    with pytest.raises(error, match=message):
        check(small, tmp_path / "run", **keys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no rows"),
        ('{"problem": "p", "solution": "s"}\n{"problem": ', ":2: malformed JSON"),
        ('{"problem": "p"}\n', ":1: no column 'solution'"),
        ('{"problem": "  ", "solution": "s"}\n', ":1: column 'problem' .* is empty"),
        ('{"problem": "p", "solution": ""}\n', ":1: column 'solution' .* is empty"),
    ],
)
def test_wrong_data(small: SmallRun, tmp_path: Path, content: str, message: str) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text(content)
    with pytest.raises(DataError, match=message):
        check(small, tmp_path / "run", data__train=data)


def test_wrong_models(small: SmallRun, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        check(small, tmp_path / "run", model__path="/nowhere")
    other = shutil.copytree(small.model, tmp_path / "llama")
    raw = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**raw, "model_type": "llama"}))
    with pytest.raises(ModelError, match="model_type is 'llama'"):
        check(small, tmp_path / "run", model__path=other)
    (other / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 5}))
    with pytest.raises(ModelError, match=r"model\.layers\.4.*missing"):
        check(small, tmp_path / "run", model__path=other)
    (other / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"model\.layers\.3.*not expected"):
        check(small, tmp_path / "run", model__path=other)


def test_evaluation_needs_answers(small: SmallRun, tmp_path: Path) -> None:
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text('{"problem": "p", "solution": "no box here"}\n')
    config = compose_config([*small.overrides(tmp_path / "run", steps=1, scripted=False), f"data.eval={held_out}"])
    with pytest.raises(DataError, match=r"eval\.jsonl:1.*no answer"):
        check_inputs(config)


def test_identity_ignores_the_mesh_and_notices_the_objective(small: SmallRun, tmp_path: Path) -> None:
    config = compose_config(small.overrides(tmp_path, steps=1))
    identity = run_identity(config)
    config.parallel.tensor, config.train.steps, config.objective.chunk_rows = 2, 50, 3
    assert run_identity(config) == identity
    config.objective.beta = 0.0
    assert run_identity(config) != identity
