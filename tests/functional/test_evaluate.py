"""Stand-alone evaluation on real engines: what it finds of a model is what training found of it at the same step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from opsd_megatron.evaluate import run as evaluate
from opsd_megatron.train import run as train
from tests.distributed import run_distributed
from tests.functional.runs import SmallRun, make_small_run, read_metrics

STEPS = 2


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return make_small_run(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def held_out(small: SmallRun) -> Path:
    """Problems in columns of other names than the training data's."""
    rows = [json.loads(line) for line in small.data.read_text().splitlines()[:5]]
    directory = small.data.parent / "amc"
    directory.mkdir()
    lines = [json.dumps({"question": row["problem"], "answer": place}) for place, row in enumerate(rows)]
    (directory / "test.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def common(small: SmallRun, held_out: Path) -> dict[str, object]:
    return {
        "model.dtype": "float32",
        "model.max_length": 256,
        "data.student_template": small.student_template,
        "evaluation.sets": f"[amc23@{held_out},mine@{small.data}]",
        "evaluation.max_problems": 5,
        "rollout.kv_cache_gib": 0.1,
        "evaluation.samples_per_problem": 3,
        "evaluation.temperature": 0.9,
        "evaluation.top_p": 0.95,
        "evaluation.max_new_tokens": 20,
        "evaluation.thinking": True,
    }


def _several(commands: list[list[str]]) -> None:
    for command in commands:
        evaluate(command)


@pytest.fixture(scope="module")
def trained(small: SmallRun, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at tensor parallel 2 whose two engine replicas share the problems, evaluated before and after."""
    output = tmp_path_factory.mktemp("trained") / "run"
    settings = common(small, held_out) | {
        "parallel.tensor": 2,
        "rollout.tensor": 1,
        "checkpoint.at_end": True,
        "optimizer.lr": 1e-2,
    }
    keys = {key.replace(".", "__"): value for key, value in settings.items()}
    run_distributed(train, 2, small.overrides(output, steps=STEPS, scripted=False, **keys))
    return output


@pytest.fixture(scope="module")
def llama(small: SmallRun) -> Path:
    """A model of a family that is not trained here."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=272,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=258,
        pad_token_id=256,
    )
    directory = small.model.with_name("llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=258, pad_token_id=256)
    model.save_pretrained(directory)
    for file in small.model.glob("*token*"):
        shutil.copy(file, directory)
    shutil.copy(small.model / "chat_template.jinja", directory)
    return directory


@pytest.fixture(scope="module")
def evaluated(
    small: SmallRun, held_out: Path, trained: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The initial model, the last checkpoint and another model, on two ranks: two replicas, and one over both.

    The first two are sampled two problems at a time; training samples all at once.
    """
    output = tmp_path_factory.mktemp("evaluated")
    sources = {
        "initial": [f"model.path={small.model}", "rollout.tensor=1", "evaluation.responses_per_call=6"],
        "last": [
            f"model.checkpoint={trained}/checkpoints/step_{STEPS}",
            "rollout.tensor=1",
            "evaluation.responses_per_call=6",
        ],
        "wide": [f"model.path={small.model}", "rollout.tensor=2"],
        "llama": [
            f"model.path={llama}",
            "rollout.tensor=2",
            "evaluation.temperature=0",
            "evaluation.samples_per_problem=1",
        ],
    }
    settings = [f"{key}={value}" for key, value in common(small, held_out).items()]
    commands = [[*settings, *source, f"output_dir={output / name}"] for name, source in sources.items()]
    run_distributed(_several, 2, commands)
    return output


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("name", "step"), [("initial", 0), ("last", STEPS)])
def test_records_are_those_of_training(trained: Path, evaluated: Path, name: str, step: int) -> None:
    in_training = next(line["eval"] for line in read_metrics(trained) if line["step"] == step)
    for one in ("amc23", "mine"):
        records = trained / f"evaluations/{one}/step_{step}.jsonl"
        assert (evaluated / name / f"{one}.jsonl").read_text() == records.read_text()
        found = json.loads((evaluated / name / "results.json").read_text())["sets"][one]
        assert found.pop("source")
        assert found == in_training["sets"][one]
    assert in_training["avg_interval"] == in_training["sets"]["amc23"]["avg_interval"]


def test_training_has_changed_the_model(evaluated: Path) -> None:
    """Else the test above would compare the initial weights with themselves."""
    first, last = (_records(evaluated / name / "amc23.jsonl") for name in ("initial", "last"))
    assert [record["problem_id"] for record in first] == [record["problem_id"] for record in last]
    assert first != last


def test_an_engine_over_both_ranks_draws_the_same(evaluated: Path) -> None:
    """Up to rounding, 2e-6 in log-probs: of 300 tokens a different one is rare, and ends the likeness of a response."""
    narrow, wide = (_records(evaluated / name / "amc23.jsonl") for name in ("initial", "wide"))
    pairs = [
        (a["response"], b["response"])
        for first, second in zip(narrow, wide, strict=True)
        for a, b in zip(first["samples"], second["samples"], strict=True)
    ]
    assert len(pairs) == 15
    assert sum(a == b for a, b in pairs) >= 13


def test_another_family_answers_as_in_transformers(small: SmallRun, llama: Path, evaluated: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(llama), AutoModelForCausalLM.from_pretrained(llama)
    for record in _records(evaluated / "llama" / "amc23.jsonl"):
        message = small.student_template.read_text().replace("{problem}", record["problem"])
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}],
            add_generation_prompt=True,
            enable_thinking=True,
            return_tensors="pt",
            return_dict=False,
        )
        ids = model.generate(prompt, do_sample=False, max_new_tokens=20)[0, prompt.shape[1] :]
        assert record["samples"][0]["response"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_what_was_evaluated_is_written_down(small: SmallRun, trained: Path, evaluated: Path) -> None:
    initial, last = (json.loads((evaluated / name / "results.json").read_text()) for name in ("initial", "last"))
    assert (initial["model"], initial["dtype"]) == (str(small.model), "float32")
    assert last["model"] == f"{trained}/checkpoints/step_{STEPS}"
    assert last["weights"] != initial["weights"]
    assert last["sampling"] == {
        "temperature": 0.9, "top_p": 0.95, "top_k": -1, "max_new_tokens": 20, "thinking": True, "seed": 0
    }  # fmt: skip
    assert last["sets"]["amc23"]["num_problems"] == 5
    assert sorted(path.name for path in (evaluated / "last").iterdir()) == [
        ".lock",
        "amc23.jsonl",
        "mine.jsonl",
        "results.json",
    ]


def test_two_evaluations_compare(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(["compare", str(evaluated / "initial"), str(evaluated / "last")])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "amc23" and printed[2].startswith("avg@3")
    assert printed.count("mine") == 1 and "5 problems: second better on" in printed[-1]
