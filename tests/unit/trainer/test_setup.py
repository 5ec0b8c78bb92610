"""What is checked before anything is built, and what a user is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from opsd_megatron.config import LoraConfig
from opsd_megatron.config.compose import compose_config
from opsd_megatron.errors import CheckpointError, ConfigError, DataError, ModelError, OpsdError
from opsd_megatron.train import run
from opsd_megatron.trainer import setup
from opsd_megatron.trainer.setup import _set_aside_later, check_inputs
from tests.functional.runs import SmallRun, make_small_run
from tests.tiny import make_tiny_qwen3, make_tiny_qwen3_moe


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
            {"parallel__tensor": 8, "parallel__pipeline": 1},
            ConfigError,
            r"parallel\.tensor=8 does not fit .* 4 attention heads",
        ),
        ({"parallel__pipeline": 5}, ConfigError, r"parallel\.pipeline=5 makes more stages than .* layers, 4; lower it"),
        (
            {"parallel__pipeline": 2, "parallel__virtual_stages": 3},
            ConfigError,
            r"parallel\.pipeline=2 \* parallel\.virtual_stages=3 .* lower one of them",
        ),
        ({"teacher__policy": "adapter_off"}, ConfigError, r"teacher\.policy=adapter_off .* lora\.rank=0 makes none"),
        ({"model__max_length": 4096}, ConfigError, "model.max_length=4096"),
        ({"rollout__max_new_tokens": 256}, ConfigError, r"leaves? no room"),
        ({"data__problem_column": "question"}, DataError, "data.problem_column"),
        ({"data__max_prompt_tokens": 5}, DataError, "train.jsonl:1: the student prompt has"),
        ({"data__analyse_first": True}, DataError, "train.jsonl:1: the teacher prompt .* data.analysis_max_tokens"),
    ],
)
def test_wrong_keys(
    small: SmallRun, tmp_path: Path, keys: dict[str, object], error: type[OpsdError], message: str
) -> None:
    with pytest.raises(error, match=message):
        check(small, tmp_path / "run", **keys)


def test_adapters_of_a_checkpoint_that_the_backend_cannot_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = make_small_run(tmp_path, make_model=make_tiny_qwen3_moe)
    keys: dict[str, object] = {"model__backend": "transformer_engine", "model__checkpoint": tmp_path / "step_1"}
    monkeypatch.setattr(setup, "check_checkpoint", lambda *_: None)
    monkeypatch.setattr(setup, "run_identity", lambda *_, **__: {})
    monkeypatch.setattr(setup, "adapters_of", lambda _: LoraConfig(4, targets=["q_proj"]))
    check(experts, tmp_path / "run", **keys)
    monkeypatch.setattr(setup, "adapters_of", lambda _: LoraConfig(4))
    check(experts, tmp_path / "run", **keys, lora__rank=4)  # experts are apart, then
    for lora in ({}, {"lora__rank": 4, "lora__targets": "[q_proj]"}):
        with pytest.raises(ConfigError, match=r"model\.checkpoint=.*step_1 has adapters on experts.* cannot merge"):
            check(experts, tmp_path / "run", **keys, **lora)


def test_adapters_of_a_checkpoint_that_the_mesh_leaves_no_rows(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four tensor-parallel ranks cut the two key/value heads."""
    keys: dict[str, object] = {"parallel__tensor": 4, "parallel__pipeline": 1, "model__checkpoint": tmp_path / "step_1"}
    monkeypatch.setattr(setup, "check_checkpoint", lambda *_: None)
    monkeypatch.setattr(setup, "run_identity", lambda *_, **__: {})
    monkeypatch.setattr(setup, "adapters_of", lambda _: LoraConfig(4, targets=["o_proj"]))
    check(small, tmp_path / "run", **keys)
    monkeypatch.setattr(setup, "adapters_of", lambda _: LoraConfig(4))
    with pytest.raises(
        ConfigError, match=r"model\.checkpoint=.*step_1 has q_proj, .* use at most 2, or merge them with"
    ):
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


@pytest.mark.parametrize("source", ["answer", "siblings"])
def test_sources_say_what_the_data_lacks(small: SmallRun, tmp_path: Path, source: str) -> None:
    """An answer is enough for both: they need no reference solution."""
    keys = {"data__privileged": source, "rollout__samples_per_problem": 2}
    data = tmp_path / "t.jsonl"
    data.write_text('{"problem": "p", "answer": "1"}\n')
    check(small, tmp_path / "run", data__train=data, **keys)
    data.write_text('{"problem": "p", "solution": "no box"}\n')
    with pytest.raises(DataError, match=rf"t\.jsonl:1: no answer .*data\.privileged={source}"):
        check(small, tmp_path / "run", data__train=data, **keys)


def test_identity_notices_how_analyses_are_made(small: SmallRun, tmp_path: Path) -> None:
    """And not how they would be, where there are none."""
    on = {"data__analyse_first": True, "data__analysis_max_tokens": 8, "model__max_length": 1024}
    template = tmp_path / "after.txt"
    template.write_text("Go on.")
    assert identity(small, tmp_path, **on) != identity(small, tmp_path, model__max_length=1024)
    for more in ({"data__analysis_thinking": True}, {"data__after_analysis_template": template}):
        assert identity(small, tmp_path, **on, **more) != identity(small, tmp_path, **on)
        assert identity(small, tmp_path, **more) == identity(small, tmp_path)


def test_a_check_tells_which_rank_gets_how_many_layers(
    small: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["--check", "3", *small.overrides(tmp_path / "run", steps=1, parallel__pipeline=3)])
    valid, stages, memory, checkpoint = capsys.readouterr().out.splitlines()
    assert (valid, stages) == ("valid for 3 processes", "layers of each pipeline rank: 2, 1, 1")
    assert memory.startswith("estimated GB of each GPU: weights 0.0, ")
    assert checkpoint == "a checkpoint takes 0.0 GB on disk"


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
    with pytest.raises(DataError, match=r"eval\.jsonl:1: no column 'answer'.*data\.answer_column"):
        check_inputs(config)


def test_verified_rewards_need_answers(small: SmallRun, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text('{"problem": "p", "answer": "1"}\n{"problem": "q"}\n')
    keys = {"data__train": data, "rollout__samples_per_problem": 2}
    with pytest.raises(DataError, match=r"train\.jsonl:2: no answer .*objective.name=grpo needs"):
        check(small, tmp_path / "run", objective__name="grpo", **keys)
    data.write_text('{"problem": "p", "answer": "1"}\n')
    check(small, tmp_path / "run", objective__name="grpo", **keys)
    # A column that was named is not replaced by a box, where answers are used.
    data.write_text('{"problem": "p", "solution": "\\\\boxed{1}", "answer": "1"}\n')
    keys["data__answer_column"] = "Answer"
    check(small, tmp_path / "run", **keys)
    for key, value in {"objective__name": "grpo", "data__privileged": "answer"}.items():
        with pytest.raises(DataError, match=r"train\.jsonl:1: no column 'Answer', .* problem, solution, answer; name "):
            check(small, tmp_path / "run", **keys, **{key: value})


def test_unwritable_output(small: SmallRun, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file"):
        check(small, tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match="is a file"):
        check(small, tmp_path / "file")


def test_tokenizer_and_model_belong_together(small: SmallRun, tmp_path: Path) -> None:
    other = shutil.copytree(small.model, tmp_path / "other")
    tokenizer = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(tokenizer[: len(tokenizer) // 2])
    with pytest.raises(ModelError, match="tokenizer cannot be loaded") as raised:
        check(small, tmp_path / "run", model__path=other)
    assert "\n" not in str(raised.value)
    (other / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        check(small, tmp_path / "run", model__path=other)
    narrow = make_tiny_qwen3(tmp_path / "narrow", vocab_size=200, with_tokenizer=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(small.model / name, narrow / name)
    with pytest.raises(ModelError, match=r"261 tokens.*vocab_size=200"):
        check(small, tmp_path / "run", model__path=narrow)


def test_checkpoint_to_start_from_must_exist(small: SmallRun, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        check(small, tmp_path / "run", model__checkpoint=tmp_path / "nowhere")


def test_evaluation_does_not_take_room_from_training(small: SmallRun, tmp_path: Path) -> None:
    """Long evaluation responses leave the training prompts as they are, and the other way round."""
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text('{"problem": "1+1", "answer": "2"}\n')
    keys = {"data__eval": held_out, "evaluation__max_new_tokens": 200, "rollout__max_new_tokens": 24}
    inputs = check_inputs(compose_config(small.overrides(tmp_path / "run", steps=1, scripted=False, **keys)))
    assert inputs.prompts.max_new_tokens == 24
    assert inputs.eval_prompts.max_new_tokens == 200


def test_supervised_runs_sample_nothing(small: SmallRun, tmp_path: Path) -> None:
    check(small, tmp_path / "run", objective="sft", rollout__max_new_tokens=4096)


def test_what_is_not_sampled_may_be_sampled_otherwise(small: SmallRun, tmp_path: Path) -> None:
    first, second = (identity(small, tmp_path, objective="sft", rollout__temperature=t) for t in (0.5, 1.0))
    assert first == second


def identity(small: SmallRun, tmp_path: Path, **keys: object) -> dict[str, object]:
    config = compose_config(small.overrides(tmp_path / "run", steps=4, **keys))
    return check_inputs(config).identity


def test_identity_ignores_what_may_change(small: SmallRun, tmp_path: Path) -> None:
    same = identity(small, tmp_path)
    moved = shutil.copytree(small.model, tmp_path / "moved")
    assert identity(small, tmp_path, model__path=moved) == same
    assert identity(small, tmp_path, parallel__tensor=2, objective__chunk_rows=3, train__steps=50) == same


@pytest.mark.parametrize(
    "keys",
    [
        {"objective__beta": 0.0},
        {"rollout__temperature": 0.5},
        {"data__privileged": "none"},
        {"data__privileged": "answer"},
        {"data__boundary": "student"},
        {"model__max_length": 250},
        {"optimizer__schedule": "cosine"},
    ],
)
def test_identity_notices_settings(small: SmallRun, tmp_path: Path, keys: dict[str, object]) -> None:
    assert identity(small, tmp_path, **keys) != identity(small, tmp_path)


def test_a_longer_run_may_not_bend_its_schedule(small: SmallRun, tmp_path: Path) -> None:
    cosine = {"optimizer__schedule": "cosine"}
    assert identity(small, tmp_path, **cosine) != identity(small, tmp_path, train__steps=6, **cosine)
    fixed = {**cosine, "optimizer__decay_steps": 4}
    assert identity(small, tmp_path, **fixed) == identity(small, tmp_path, train__steps=6, **fixed)


def test_identity_notices_contents(small: SmallRun, tmp_path: Path) -> None:
    """Files that change under the same name: weights, data, template."""
    same = identity(small, tmp_path)
    other = make_tiny_qwen3(tmp_path / "other", seed=1)
    assert identity(small, tmp_path, model__path=other) != same
    stretched = shutil.copytree(small.model, tmp_path / "stretched")
    raw = json.loads((stretched / "config.json").read_text())
    (stretched / "config.json").write_text(json.dumps({**raw, "rms_norm_eps": 1e-3}))
    assert identity(small, tmp_path, model__path=stretched) != same
    template = tmp_path / "teacher.txt"
    template.write_text(small.teacher_template.read_text() + " Go on.")
    assert identity(small, tmp_path, data__teacher_template=template) != same
    data = tmp_path / "train.jsonl"
    data.write_text(small.data.read_text().replace("Add", "Sum", 1))
    assert identity(small, tmp_path, data__train=data) != same


def test_an_earlier_runs_files_are_set_aside(tmp_path: Path) -> None:
    folder = tmp_path / "rollouts"
    folder.mkdir()
    for step in (1, 2, 3):
        (folder / f"step_{step}.jsonl").write_text(str(step))
    _set_aside_later(folder, completed=2)
    assert {path.name for path in folder.glob("step_*.jsonl")} == {"step_1.jsonl", "step_2.jsonl"}
    _set_aside_later(folder, completed=0)
    assert not list(folder.glob("step_*.jsonl"))
    assert sorted(path.read_text() for path in folder.iterdir()) == ["1", "2", "3"]
