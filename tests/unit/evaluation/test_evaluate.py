from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from torch import Tensor
from transformers import AutoTokenizer

from opsd_megatron.config import Config, EvaluationConfig
from opsd_megatron.errors import ConfigError, DataError, OutputError
from opsd_megatron.evaluation.answers import Judge, Verdict
from opsd_megatron.evaluation.evaluate import (
    Evaluator,
    check_answers,
    evaluate,
    evaluation_length,
    evaluation_prompts,
    sampling_of,
)
from opsd_megatron.evaluation.figures import EvaluationResult
from opsd_megatron.evaluation.records import read_records
from opsd_megatron.rollout.engine import Sampling
from opsd_megatron.types import Generation, Problem
from tests.distributed import run_distributed
from tests.tiny import make_tiny_qwen3

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=8)
END = 0


class Characters:
    """A tokenizer whose tokens are characters; token 0 is special."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(token) for token in token_ids if token != END)


class Prompts:
    def student(self, problem: Problem) -> tuple[int, ...]:
        return tuple(map(ord, problem.problem))


@dataclass
class FixedEngine:
    """Answers each call with the next of ``texts``, in order; an answer ending in ``...`` was cut off."""

    texts: Sequence[str]
    calls: list[tuple[list[tuple[int, ...]], Sampling, list[int]]] = field(default_factory=list)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int]
    ) -> list[Generation]:
        assert len(prompts) == len(seeds)
        self.calls.append(([tuple(prompt) for prompt in prompts], sampling, list(seeds)))
        return [generation(text) for text in self.texts[: len(prompts)]]

    def update_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        raise NotImplementedError

    def wake_up(self) -> None:
        raise NotImplementedError

    def sleep(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def generation(text: str) -> Generation:
    cut = text.endswith("...")
    tokens = tuple(map(ord, text)) + (() if cut else (END,))
    return Generation(tokens, (0.0,) * len(tokens), "length" if cut else "stop")


def problem(number: int) -> Problem:
    return Problem(id=f"held_out.jsonl:{number}", problem=f"What is {number}?", answer=str(number))


def run(texts: Sequence[str], problems: Sequence[Problem], records_path: Path | None = None) -> EvaluationResult:
    config = EvaluationConfig(samples_per_problem=2)
    return evaluate(
        FixedEngine(texts),
        problems,
        Prompts(),
        Characters(),
        config,
        sampling=SAMPLING,
        seed=5,
        records_path=records_path,
    )


TEXTS = [r"\boxed{1}", r"\boxed{1}", r"\boxed{2}", "no box", r"\boxed{}", r"cut \boxed{3..."]
PROBLEMS = [problem(1), problem(2), problem(3)]


def test_figures() -> None:
    result = run(TEXTS, PROBLEMS)
    assert (result.num_problems, result.samples_per_problem) == (3, 2)
    assert result.average.value == pytest.approx((2 + 1 + 0) / 6)
    assert result.passes[2].value == pytest.approx(2 / 3)
    assert result.majorities[2].value == pytest.approx(2 / 3)  # a response without a box does not vote
    assert result.box_rate.value == pytest.approx(4 / 6)
    assert result.truncated.value == pytest.approx(1 / 6)
    assert result.unparsable == pytest.approx(1 / 6)
    assert result.timeouts == 0
    assert result.mean_tokens.value == pytest.approx(sum(len(generation(text).token_ids) for text in TEXTS) / 6)
    assert result.average.interval.low <= result.average.value <= result.average.interval.high


def test_each_prompt_is_repeated_with_seeds_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Verdict(correct=False, boxed=False, status="ok")
    monkeypatch.setattr(Judge, "verdicts", lambda judge, responses, answers: [wrong] * len(responses))
    engine = FixedEngine(TEXTS)
    config = EvaluationConfig(samples_per_problem=2)
    evaluate(engine, PROBLEMS, Prompts(), Characters(), config, sampling=SAMPLING, seed=5)
    prompts, sampling, seeds = engine.calls[0]
    assert prompts == [Prompts().student(problem(number)) for number in (1, 1, 2, 2, 3, 3)]
    assert sampling == SAMPLING
    assert len(set(seeds)) == 6 and all(0 <= seed < 2**31 for seed in seeds)

    evaluate(engine, PROBLEMS[:2], Prompts(), Characters(), config, sampling=SAMPLING, seed=5)
    evaluate(engine, PROBLEMS[:2], Prompts(), Characters(), config, sampling=SAMPLING, seed=6)
    assert engine.calls[1][2] == seeds[:4]  # fewer problems keep their samples
    assert not set(engine.calls[2][2]) & set(seeds)
    # Rollouts are drawn with [seed, 0, step].
    rollouts = [np.random.SeedSequence([5, 0, step]).generate_state(2) % 2**31 for step in range(4)]
    assert not {int(word) for drawn in rollouts for word in drawn} & set(seeds)


def test_records_are_written_and_earlier_ones_kept(tmp_path: Path) -> None:
    path = tmp_path / "evaluation" / "step_3.jsonl"
    run(TEXTS, PROBLEMS, path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["problem_id"] for line in lines] == [item.id for item in PROBLEMS]
    assert lines[1] == {
        "problem_id": "held_out.jsonl:2",
        "problem": "What is 2?",
        "answer": "2",
        "samples": [
            {
                "response": r"\boxed{2}",
                "tokens": 10,
                "finish_reason": "stop",
                "correct": True,
                "boxed": True,
                "status": "ok",
                "vote": 0,
            },
            {
                "response": "no box",
                "tokens": 7,
                "finish_reason": "stop",
                "correct": False,
                "boxed": False,
                "status": "ok",
                "vote": None,
            },
        ],
    }
    assert read_records(path)[0].num_correct == 2
    before = path.read_text()
    run([r"\boxed{9}"] * 6, PROBLEMS, path)
    assert path.read_text() != before
    (kept,) = path.parent.glob("step_3.jsonl.replaced-*")
    assert kept.read_text() == before
    assert len(list(path.parent.iterdir())) == 2  # no temporary file is left


def test_the_evaluator_names_records_by_step(tmp_path: Path) -> None:
    config = EvaluationConfig(samples_per_problem=2)
    evaluator = Evaluator({"mine": PROBLEMS}, Prompts(), Characters(), config, SAMPLING, seed=5, records_dir=tmp_path)
    first = evaluator.evaluate(FixedEngine(TEXTS), 0)
    second = evaluator.evaluate(FixedEngine(TEXTS), 10)
    assert first == second == run(TEXTS, PROBLEMS).as_dict()  # the same seeds at every step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0.jsonl", "step_10.jsonl"]


def test_the_evaluator_keeps_several_sets_apart(tmp_path: Path) -> None:
    config, sets = EvaluationConfig(samples_per_problem=2), {"one": PROBLEMS, "two": PROBLEMS[:1]}
    evaluator = Evaluator(sets, Prompts(), Characters(), config, SAMPLING, seed=5, records_dir=tmp_path)
    figures = evaluator.evaluate(FixedEngine(TEXTS), 7)
    assert figures.pop("sets") == {"one": figures, "two": run(TEXTS, PROBLEMS[:1]).as_dict()}
    assert figures == run(TEXTS, PROBLEMS).as_dict()
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.jsonl"))
    assert files == ["one/step_7.jsonl", "two/step_7.jsonl"]


@pytest.mark.parametrize("answer", [None, "", "  "])
def test_a_problem_without_answer_is_named_early(answer: str | None) -> None:
    bad = Problem(id="held_out.jsonl:7", problem="?", answer=answer)
    with pytest.raises(DataError, match=r"held_out\.jsonl:7 \(and 1 more\): no answer.*data\.answer_column"):
        check_answers([problem(1), bad, bad])
    with pytest.raises(DataError, match=r"held_out\.jsonl:7: no answer"):
        run([], [bad])  # before anything is sampled


def test_no_problem_is_an_error() -> None:
    with pytest.raises(DataError, match=r"no problem to evaluate on"):
        check_answers([])


def test_sampling_takes_the_rollout_limit_unless_evaluation_has_its_own() -> None:
    config = Config()
    config.rollout.max_new_tokens = 77
    config.evaluation.temperature = 0.0
    assert sampling_of(config) == Sampling(temperature=0.0, top_p=1.0, top_k=-1, max_new_tokens=77)
    config.evaluation.max_new_tokens = 99
    assert sampling_of(config).max_new_tokens == 99


def test_prompts_follow_evaluations_own_thinking_mode(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_qwen3(tmp_path / "model", num_layers=1))
    config = Config()
    config.rollout.max_new_tokens = 8
    headers = {}
    for config.evaluation.thinking in (None, False, True):
        for config.data.student_thinking in (False, True):
            prompts = evaluation_prompts(tokenizer, config, positions=1024)
            text = tokenizer.decode(prompts.student(problem(1)))
            headers[config.evaluation.thinking, config.data.student_thinking] = text.endswith("</think>\n\n")
    assert headers == {
        (None, False): True, (None, True): False, (False, False): True, (False, True): True,
        (True, False): False, (True, True): False,
    }  # fmt: skip
    config.evaluation.max_new_tokens = 1024
    with pytest.raises(
        ConfigError, match=r"leave no room for a prompt within the 1024 tokens of evaluation.max_length"
    ):
        evaluation_prompts(tokenizer, config, positions=1024)


def test_evaluation_has_a_length_of_its_own(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_qwen3(tmp_path / "model", num_layers=1))
    config = Config()
    config.model.max_length, config.evaluation.max_new_tokens = 40, 100  # the former is training's
    prompts = evaluation_prompts(tokenizer, config, positions=1024)
    sets = [[problem(1)], [problem(2), replace(problem(3), problem="longer " * 9)]]
    longest = len(prompts.student(sets[1][1]))
    assert longest > len(prompts.student(problem(1)))
    assert evaluation_length(sets, prompts, config) == longest + 100
    config.evaluation.max_length = longest + 100
    assert evaluation_length(sets, evaluation_prompts(tokenizer, config, positions=1024), config) == longest + 100
    config.evaluation.max_length -= 1
    with pytest.raises(
        DataError, match=rf"at most {longest - 1} fit: evaluation\.max_length={longest + 99} less the 100"
    ):
        evaluation_length(sets, evaluation_prompts(tokenizer, config, positions=1024), config)
    config.evaluation.max_length = 1025
    with pytest.raises(ConfigError, match=r"evaluation\.max_length=1025 is above .*; use at most 1024"):
        evaluation_prompts(tokenizer, config, positions=1024)


def test_equal_wrong_answers_vote_together_and_majorities_follow(tmp_path: Path) -> None:
    """Two of four samples agree on a wrong answer, written differently; one is right."""
    texts = [r"\boxed{\frac{1}{2}}", r"\boxed{7}", r"\boxed{0.5}", r"\boxed{1}"]
    config = EvaluationConfig(samples_per_problem=4)
    path = tmp_path / "records.jsonl"
    result = evaluate(
        FixedEngine(texts), [problem(1)], Prompts(), Characters(), config,
        sampling=SAMPLING, seed=5, records_path=path,
    )  # fmt: skip
    (record,) = read_records(path)
    assert [sample.vote for sample in record.samples] == [1, 2, 1, 0]
    assert record.wrong_votes == [2, 1]
    assert {k: figure.value for k, figure in result.majorities.items()} == {1: 0.25, 2: 0.25, 4: 0.0}
    assert {k: figure.value for k, figure in result.passes.items()} == {1: 0.25, 2: 0.5, 4: 1.0}


def test_hostile_answers_are_counted_and_vote_for_themselves(tmp_path: Path) -> None:
    texts = [r"\boxed{9^{9^{9^9}}}", r"\boxed{9^{9^{9^9}}}", r"\boxed{x^}", r"\boxed{x=1}"]
    config = EvaluationConfig(samples_per_problem=4, judge_seconds=0.5)
    path = tmp_path / "records.jsonl"
    result = evaluate(
        FixedEngine(texts), [problem(1)], Prompts(), Characters(), config,
        sampling=SAMPLING, seed=5, records_path=path,
    )  # fmt: skip
    assert result.timeouts == 0.5
    assert [sample.vote for sample in read_records(path)[0].samples][:2] == [1, 1]


def _evaluate_on_rank(records_path: Path) -> tuple[int, EvaluationResult, bool]:
    judged = False
    verdicts = Judge.verdicts

    def spy(judge: Judge, responses: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        nonlocal judged
        judged = True
        return verdicts(judge, responses, answers)

    Judge.verdicts = spy  # type: ignore[method-assign]  # the process ends with the test
    return dist.get_rank(), run(TEXTS, PROBLEMS, records_path), judged


def test_rank_0_judges_and_all_ranks_have_the_result(tmp_path: Path) -> None:
    outcomes = run_distributed(_evaluate_on_rank, 2, tmp_path / "records.jsonl")
    assert [(rank, judged) for rank, _, judged in outcomes] == [(0, True), (1, False)]
    assert outcomes[0][1] == outcomes[1][1] == run(TEXTS, PROBLEMS)
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


def _fail_on_rank_0() -> str:
    def broken(judge: Judge, responses: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        raise DataError("rank 0 cannot judge")

    Judge.verdicts = broken  # type: ignore[method-assign]
    try:
        run(TEXTS, PROBLEMS)
    except DataError as error:
        return str(error)
    return "no error"


def _write_below_a_file(path: Path) -> str:
    try:
        run(TEXTS, PROBLEMS, path / "step_1.jsonl")
    except OutputError as error:
        return str(error)
    return "no error"


def test_records_that_cannot_be_written_are_an_error_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "evaluations").touch()
    first, second = run_distributed(_write_below_a_file, 2, tmp_path / "evaluations")
    assert first == second and first.startswith(f"cannot write {tmp_path}/evaluations/step_1.jsonl.part: ")


def test_an_error_of_rank_0_reaches_every_rank() -> None:
    assert run_distributed(_fail_on_rank_0, 2) == ["rank 0 cannot judge"] * 2


@dataclass
class SeededEngine(FixedEngine):
    """Answers by prompt and seed alone, as engines do; stops the process, so to speak, in call number ``fails_in``."""

    texts: Sequence[str] = ()
    fails_in: int | None = None

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int]
    ) -> list[Generation]:
        self.calls.append(([tuple(prompt) for prompt in prompts], sampling, list(seeds)))
        if len(self.calls) == self.fails_in:
            raise KeyboardInterrupt
        return [
            generation(f"{sum(prompt)} \\boxed{{{seed % 3 + 1}}}") for prompt, seed in zip(prompts, seeds, strict=True)
        ]


FIVE = [problem(number) for number in range(1, 6)]


def in_parts(engine: FixedEngine, path: Path, *, at_most: int, resume: bool = False) -> EvaluationResult:
    config = EvaluationConfig(samples_per_problem=2, responses_per_call=at_most)
    return evaluate(
        engine, FIVE, Prompts(), Characters(), config, sampling=SAMPLING, seed=5, records_path=path, resume=resume
    )


@pytest.mark.parametrize(("at_most", "calls"), [(1, [2] * 5), (4, [4, 4, 2]), (7, [6, 4]), (10, [10])])
def test_how_many_responses_a_call_draws_changes_nothing(tmp_path: Path, at_most: int, calls: list[int]) -> None:
    whole = in_parts(SeededEngine(), tmp_path / "whole.jsonl", at_most=1000)
    engine = SeededEngine()
    assert in_parts(engine, tmp_path / "parts.jsonl", at_most=at_most) == whole
    assert [len(prompts) for prompts, _, _ in engine.calls] == calls
    assert (tmp_path / "parts.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_what_is_done_survives_a_kill(tmp_path: Path) -> None:
    whole = in_parts(SeededEngine(), tmp_path / "whole.jsonl", at_most=1000)
    path, part = tmp_path / "records.jsonl", tmp_path / "records.jsonl.part"
    with pytest.raises(KeyboardInterrupt):
        in_parts(SeededEngine(fails_in=4), path, at_most=2)
    assert not path.exists() and part.read_text() == "".join((tmp_path / "whole.jsonl").open().readlines()[:3])
    with part.open("a") as file:  # a line that was being written
        file.write((tmp_path / "whole.jsonl").read_text().splitlines()[3][:40])
    engine = SeededEngine()
    assert in_parts(engine, path, at_most=1000, resume=True) == whole
    assert [prompts for prompts, _, _ in engine.calls] == [[Prompts().student(one) for one in FIVE[3:] for _ in "ab"]]
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text() and not part.exists()
    done = SeededEngine()
    assert in_parts(done, path, at_most=2, resume=True) == whole and not done.calls
    assert sorted(one.name for one in tmp_path.iterdir()) == ["records.jsonl", "whole.jsonl"]


def test_an_evaluation_that_does_not_go_on_sets_aside_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with pytest.raises(KeyboardInterrupt):
        in_parts(SeededEngine(fails_in=2), path, at_most=2)
    left = (tmp_path / "records.jsonl.part").read_text()
    engine = SeededEngine()
    in_parts(engine, path, at_most=2)
    assert len(engine.calls) == 5
    (kept,) = tmp_path.glob("records.jsonl.part.replaced-*")
    assert kept.read_text() == left and len(left.splitlines()) == 1


def test_records_of_other_problems_are_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    in_parts(SeededEngine(), path, at_most=10)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(DataError, match=r"records\.jsonl: holds records of other problems"):
        in_parts(SeededEngine(), path, at_most=10, resume=True)
