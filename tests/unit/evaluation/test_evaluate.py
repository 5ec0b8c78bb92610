from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from torch import Tensor

from opsd_megatron.config import Config, EvaluationConfig
from opsd_megatron.errors import DataError, OutputError
from opsd_megatron.evaluation import evaluate as evaluate_module
from opsd_megatron.evaluation.answers import Verdict
from opsd_megatron.evaluation.evaluate import (
    EvaluationResult,
    Evaluator,
    ProblemRecord,
    check_answers,
    evaluate,
    sampling_of,
    summarize,
)
from opsd_megatron.rollout.engine import Sampling
from opsd_megatron.types import Generation, Problem
from tests.distributed import run_distributed

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
    assert result.avg_at_k == pytest.approx((2 + 1 + 0) / 6)
    assert result.pass_at_k == pytest.approx(2 / 3)
    assert result.box_rate == pytest.approx(4 / 6)
    assert result.truncated == pytest.approx(1 / 6)
    assert result.unparsable == pytest.approx(1 / 6)
    assert result.timeouts == 0
    assert result.mean_tokens == pytest.approx(sum(len(generation(text).token_ids) for text in TEXTS) / 6)
    assert result.avg_interval.low <= result.avg_at_k <= result.avg_interval.high
    assert [record.num_correct for record in result.records] == [2, 1, 0]


def test_metrics_hold_every_figure_and_are_json() -> None:
    result = run(TEXTS, PROBLEMS)
    figures = result.as_dict()
    assert set(figures) == set(EvaluationResult.__dataclass_fields__) - {"records"}
    assert json.loads(json.dumps(figures)) == figures
    assert figures["avg_interval"] == [result.avg_interval.low, result.avg_interval.high]


def test_each_prompt_is_repeated_with_seeds_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Verdict(correct=False, boxed=False, status="ok")
    monkeypatch.setattr(evaluate_module, "judge_answers", lambda responses, *_, **__: [wrong] * len(responses))
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
        "answer": "2",
        "samples": [
            {
                "response": r"\boxed{2}",
                "tokens": 10,
                "finish_reason": "stop",
                "correct": True,
                "boxed": True,
                "status": "ok",
            },
            {
                "response": "no box",
                "tokens": 7,
                "finish_reason": "stop",
                "correct": False,
                "boxed": False,
                "status": "ok",
            },
        ],
    }
    before = path.read_text()
    run([r"\boxed{9}"] * 6, PROBLEMS, path)
    assert path.read_text() != before
    (kept,) = path.parent.glob("step_3.jsonl.replaced-*")
    assert kept.read_text() == before
    assert len(list(path.parent.iterdir())) == 2  # no temporary file is left


def test_the_evaluator_names_records_by_step(tmp_path: Path) -> None:
    config = EvaluationConfig(samples_per_problem=2)
    evaluator = Evaluator(PROBLEMS, Prompts(), Characters(), config, SAMPLING, seed=5, records_dir=tmp_path)
    first = evaluator.evaluate(FixedEngine(TEXTS), 0)
    second = evaluator.evaluate(FixedEngine(TEXTS), 10)
    assert first == second  # the same seeds at every step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0.jsonl", "step_10.jsonl"]


@pytest.mark.parametrize("answer", [None, "", "  "])
def test_a_problem_without_answer_is_named_early(answer: str | None) -> None:
    bad = Problem(id="held_out.jsonl:7", problem="?", answer=answer)
    with pytest.raises(DataError, match=r"held_out\.jsonl:7 \(and 1 more\): no answer.*data\.answer_column"):
        check_answers([problem(1), bad, bad])
    with pytest.raises(DataError, match=r"held_out\.jsonl:7: no answer"):
        run([], [bad])  # before anything is sampled


def test_no_problem_is_an_error() -> None:
    with pytest.raises(DataError, match=r"no problem.*data\.eval"):
        check_answers([])


def test_sampling_takes_the_rollout_limit_unless_evaluation_has_its_own() -> None:
    config = Config()
    config.rollout.max_new_tokens = 77
    config.evaluation.temperature = 0.0
    assert sampling_of(config) == Sampling(temperature=0.0, top_p=1.0, top_k=-1, max_new_tokens=77)
    config.evaluation.max_new_tokens = 99
    assert sampling_of(config).max_new_tokens == 99


def test_timeouts_are_counted() -> None:
    verdicts = (Verdict(correct=False, boxed=True, status="timeout"), Verdict(correct=True, boxed=True, status="ok"))
    result = summarize([ProblemRecord(problem(1), (generation("a"), generation("b")), verdicts)], seed=0)
    assert result.timeouts == 0.5


def _evaluate_on_rank(records_path: Path) -> tuple[int, EvaluationResult, bool]:
    judged = False
    judge = evaluate_module.judge_answers

    def spy(*args: Sequence[str], seconds: float) -> list[Verdict]:
        nonlocal judged
        judged = True
        return judge(*args, seconds=seconds)

    evaluate_module.judge_answers = spy  # type: ignore[assignment]  # the process ends with the test
    return dist.get_rank(), run(TEXTS, PROBLEMS, records_path), judged


def test_rank_0_judges_and_all_ranks_have_the_result(tmp_path: Path) -> None:
    outcomes = run_distributed(_evaluate_on_rank, 2, tmp_path / "records.jsonl")
    assert [(rank, judged) for rank, _, judged in outcomes] == [(0, True), (1, False)]
    assert outcomes[0][1] == outcomes[1][1] == run(TEXTS, PROBLEMS)
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


def _fail_on_rank_0() -> str:
    def broken(*args: Sequence[str], seconds: float) -> list[Verdict]:
        raise DataError("rank 0 cannot judge")

    evaluate_module.judge_answers = broken  # type: ignore[assignment]
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
    first, second = run_distributed(_write_below_a_file, 2, tmp_path / "evaluations", timeout=60.0)
    assert first == second and first.startswith(f"cannot write {tmp_path}/evaluations/step_1.jsonl: ")


def test_an_error_of_rank_0_reaches_every_rank() -> None:
    assert run_distributed(_fail_on_rank_0, 2, timeout=60.0) == ["rank 0 cannot judge"] * 2
