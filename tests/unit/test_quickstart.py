"""The quickstart's task, data, tokenizer and model, and its reading of results."""

from __future__ import annotations

import importlib
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
MODULES = ("task", "make_data", "make_model", "report", "stages")


@pytest.fixture(scope="module")
def quickstart() -> Iterator[dict[str, ModuleType]]:
    """The quickstart's modules, imported as its scripts import one another and gone afterwards."""
    sys.path.insert(0, str(QUICKSTART))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(QUICKSTART))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def task(quickstart: dict[str, ModuleType]) -> Any:
    return quickstart["task"]


@pytest.fixture(scope="module")
def rows(quickstart: dict[str, ModuleType]) -> dict[str, list[dict[str, str]]]:
    return quickstart["make_data"].make_data(seed=0)


@pytest.fixture(scope="module")
def tokenizer(quickstart: dict[str, ModuleType], rows: dict[str, list[dict[str, str]]]) -> Any:
    make_model = quickstart["make_model"]
    return make_model.make_tokenizer(make_model.training_texts(rows["warm_start.jsonl"][:4000]))


def boxed(text: str) -> str:
    found = re.search(r"\\boxed\{(\d+)\}", text)
    assert found is not None
    return found[1]


def steps_of(line: str) -> tuple[int, int]:
    """Both sides of a line such as ``8+6+1=15``."""
    left, right = line.split("=")
    return sum(map(int, left.split("+"))), int(right)


def test_clean_solutions_and_references_are_correct_and_show_correct_steps(task: Any) -> None:
    rng = random.Random(1)
    for _ in range(500):
        problem = task.draw_problem(rng)
        own, reference = task.solution(problem), task.reference(problem)
        assert boxed(own) == boxed(reference) == problem.answer == str(problem.a + problem.b)
        lines = re.fullmatch(r"<think>\n(.*)\n</think>\n\n\\boxed\{\d+\}", own, re.DOTALL)
        assert lines is not None
        assert lines[1].split("\n") == reference.split(". So ")[0].split("; ")
        for line in lines[1].split("\n"):
            left, right = steps_of(line)
            assert left == right


def test_every_problem_states_its_summands_and_needs_a_carry(task: Any) -> None:
    rng = random.Random(2)
    forgetful = task.Noise(slip=0.0, forget_carries=(1.0, 1.0, 1.0))
    for _ in range(500):
        problem = task.draw_problem(rng)
        assert [int(number) for number in re.findall(r"\d+", problem.text)] == [problem.a, problem.b]
        assert boxed(task.solution(problem, noise=forgetful, rng=rng)) != problem.answer


def test_forgetting_carries_has_the_rate_of_its_template(task: Any) -> None:
    rng = random.Random(3)
    noise = task.Noise(slip=0.0)
    wrong, seen = [0, 0, 0], [0, 0, 0]
    for _ in range(6000):
        problem = task.draw_problem(rng)
        seen[problem.template] += 1
        wrong[problem.template] += boxed(task.solution(problem, noise=noise, rng=rng)) != problem.answer
    for template, rate in enumerate(noise.forget_carries):
        deviation = (rate * (1 - rate) / seen[template]) ** 0.5
        assert abs(wrong[template] / seen[template] - rate) < 4 * deviation


def test_slips_have_their_rate_and_are_carried_on(task: Any) -> None:
    rng = random.Random(4)
    slip = 0.02
    noise = task.Noise(slip=slip, forget_carries=(0.0, 0.0, 0.0))
    slipped_reads, reads = 0, 0
    for _ in range(4000):
        problem = task.draw_problem(rng)
        first = task.solution(problem, noise=noise, rng=rng).split("\n")[1]
        x, y = (int(digit) for digit in first.split("=")[0].split("+"))
        slipped_reads += (x != problem.a % 10) + (y != problem.b % 10)
        reads += 2
    assert abs(slipped_reads / reads - slip) < 4 * (slip * (1 - slip) / reads) ** 0.5


def test_noise_needs_a_source_of_randomness(task: Any) -> None:
    with pytest.raises(ValueError, match="rng"):
        task.solution(task.draw_problem(random.Random(0)), noise=task.Noise())


def test_data_has_its_sizes_columns_and_mixture(rows: dict[str, list[dict[str, str]]]) -> None:
    assert {name: len(part) for name, part in rows.items()} == {
        "warm_start.jsonl": 25_600,
        "train.jsonl": 960,
        "eval.jsonl": 512,
    }
    for name in ("train.jsonl", "eval.jsonl"):
        assert all(set(row) == {"problem", "solution", "answer"} for row in rows[name])
        assert all(boxed(row["solution"]) == row["answer"] for row in rows[name])
    warm = rows["warm_start.jsonl"]
    student = [row for row in warm if row["role"] == "student"]
    teacher = [row for row in warm if row["role"] == "teacher"]
    assert len(student) + len(teacher) == len(warm)
    assert abs(len(student) / len(warm) - 0.65) < 0.01
    assert all(boxed(row["response"]) == row["answer"] for row in teacher)
    # (0.7 + 0.3 + 0.15) / 3 forget every carry; of the others, slips spoil about one in five.
    correct = sum(boxed(row["response"]) == row["answer"] for row in student) / len(student)
    assert 0.45 < correct < 0.55


def test_no_sum_occurs_in_two_files_or_twice(rows: dict[str, list[dict[str, str]]]) -> None:
    pairs = [
        tuple(sorted(int(number) for number in re.findall(r"\d+", row["problem"])))
        for part in rows.values()
        for row in part
    ]
    assert len(set(pairs)) == len(pairs)


def test_data_depends_on_the_seed_only(quickstart: dict[str, ModuleType], rows: dict[str, Any]) -> None:
    make_data = quickstart["make_data"].make_data
    assert make_data(seed=0) == rows
    assert make_data(seed=1)["eval.jsonl"] != rows["eval.jsonl"]


def test_tokenizer_keeps_digits_alone_and_round_trips(tokenizer: Any, rows: dict[str, Any]) -> None:
    assert len(tokenizer) == 384
    assert tokenizer.tokenize("1234+5") == ["1", "2", "3", "4", "+", "5"]
    digits = set("0123456789")
    for token in tokenizer.get_vocab():
        assert len(token) == 1 or not digits & set(token)
    for row in rows["warm_start.jsonl"][-200:]:
        for text in (row["problem"], row["solution"], row["response"] + "<|im_end|>"):
            assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.decode(tokenizer.encode("Grüße, 你好")) == "Grüße, 你好"
    assert tokenizer.decode(tokenizer.encode("<think>\n<|im_end|>"), skip_special_tokens=True) == "<think>\n"


def test_tokenizer_is_reproducible_and_loads_from_disk(
    quickstart: dict[str, ModuleType], tokenizer: Any, rows: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    make_model = quickstart["make_model"]
    again = make_model.make_tokenizer(make_model.training_texts(rows["warm_start.jsonl"][:4000]))
    assert again.get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = rows["warm_start.jsonl"][0]["response"] + "<|im_end|>"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert loaded.chat_template == tokenizer.chat_template


def test_chat_template_follows_qwen3(tokenizer: Any) -> None:
    def render(**options: bool) -> str:
        messages = [{"role": "user", "content": "How many?"}]
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    turn = "<|im_start|>user\nHow many?<|im_end|>\n"
    assert render() == turn
    assert render(add_generation_prompt=True) == turn + "<|im_start|>assistant\n"
    assert render(add_generation_prompt=True, enable_thinking=True) == turn + "<|im_start|>assistant\n"
    assert (
        render(add_generation_prompt=True, enable_thinking=False)
        == turn + "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_model_is_a_tied_qwen3_and_depends_on_the_seed_only(quickstart: dict[str, ModuleType], tokenizer: Any) -> None:
    import torch

    make_model = quickstart["make_model"].make_model
    first, same, other = (make_model(tokenizer, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert first["lm_head.weight"].data_ptr() == first["model.embed_tokens.weight"].data_ptr()
    assert all(weight.dtype is torch.float32 for weight in first.values())
    assert first["model.layers.0.self_attn.q_norm.weight"].shape == (32,)
    assert first["model.layers.0.self_attn.k_proj.weight"].shape == (64, 128)


def write_run(directory: Path, accuracies: dict[int, tuple[float, float, float]]) -> Path:
    directory.mkdir()
    lines = []
    for step in range(3):
        line: dict[str, Any] = {"step": step}
        if step:
            line |= {"loss": 0.1, "divergence": 0.2, "seconds": {"rollout": 1.0 * step, "student": 2.0}}
        if step in accuracies:
            value, low, high = accuracies[step]
            line["eval"] = {"avg_at_k": value, "avg_interval": [low, high]}
        lines.append(json.dumps(line))
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return directory


@pytest.mark.parametrize(
    ("opsd_low", "passed"),
    [(0.60, True), (0.54, False), (0.50, False)],  # above both, not above the base model, not above the control
)
def test_verdict_needs_disjoint_intervals(
    quickstart: dict[str, ModuleType], tmp_path: Path, opsd_low: float, passed: bool
) -> None:
    report = quickstart["report"]
    opsd = report.read_run(write_run(tmp_path / "opsd", {0: (0.50, 0.45, 0.55), 2: (0.9, opsd_low, 0.95)}))
    control = report.read_run(write_run(tmp_path / "control", {0: (0.50, 0.45, 0.55), 2: (0.47, 0.42, 0.52)}))
    assert report.verdict(opsd, control) is passed
    assert opsd.seconds_by_phase() == {"rollout": 2.0, "student": 2.0}
    assert "47.0   42.0 to 52.0" in report.result_table(opsd, control)
    report.save_picture(tmp_path / "curves.png", opsd, control)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def runner(quickstart: dict[str, ModuleType], directory: Path) -> Any:
    return quickstart["stages"].StageRunner(directory / "stages", cwd=directory, environment={}, total=1)


def test_a_finished_stage_is_not_run_again(quickstart: dict[str, ModuleType], tmp_path: Path) -> None:
    arguments = ["-c", "import pathlib; pathlib.Path('made').open('x')"]  # fails where the file exists
    first = runner(quickstart, tmp_path).run("make", "Make a file", arguments)
    again = runner(quickstart, tmp_path).run("make", "Make a file", arguments)
    assert again == first
    assert first.largest_process_gib >= 0
    with pytest.raises(quickstart["stages"].StageError, match="--fresh"):
        runner(quickstart, tmp_path).run("make", "Make a file", ["-c", "pass"])


def test_a_failed_stage_is_an_error_and_runs_again(quickstart: dict[str, ModuleType], tmp_path: Path) -> None:
    arguments = ["-c", "import pathlib, sys; sys.exit(0 if pathlib.Path('ready').exists() else 3)"]
    with pytest.raises(quickstart["stages"].StageError, match="exit code 3"):
        runner(quickstart, tmp_path).run("wait", "Wait", arguments)
    (tmp_path / "ready").touch()
    assert runner(quickstart, tmp_path).run("wait", "Wait", arguments).name == "wait"
