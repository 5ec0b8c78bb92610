"""Evaluation on held-out problems with the rollout engine: avg@k and pass@k with intervals over problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist

from opsd_megatron.config import Config, EvaluationConfig
from opsd_megatron.distributed.collectives import broadcast_object
from opsd_megatron.errors import DataError
from opsd_megatron.evaluation.answers import Verdict, judge_answers
from opsd_megatron.evaluation.statistics import Interval, bootstrap_interval, pass_at_k
from opsd_megatron.rollout.engine import RolloutEngine, Sampling
from opsd_megatron.telemetry.files import set_aside, write_atomically
from opsd_megatron.telemetry.metrics import to_json_line
from opsd_megatron.types import Generation, Problem

# Keeps the seeds of evaluation apart from those of rollouts, which have another number in this place.
_SEEDS = 1


class StudentPrompts(Protocol):
    """What evaluation needs of :class:`~opsd_megatron.data.prompts.PromptBuilder`."""

    def student(self, problem: Problem) -> Sequence[int]:
        """Token ids of the student's prompt."""
        ...


class Decoder(Protocol):
    """What evaluation needs of a Hugging Face tokenizer."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of ``token_ids``."""
        ...


@dataclass(frozen=True)
class ProblemRecord:
    """The ``k`` samples of one problem, each tuple of length ``k``.

    Attributes:
        problem: What was asked.
        generations: What the engine sampled.
        verdicts: How each was judged.
    """

    problem: Problem
    generations: tuple[Generation, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def num_correct(self) -> int:
        """Correct samples, ``0..k``."""
        return sum(verdict.correct for verdict in self.verdicts)


@dataclass(frozen=True)
class EvaluationResult:
    r"""What an evaluation found. Shares are of all ``num_problems * samples_per_problem`` samples, between 0 and 1.

    Attributes:
        num_problems: Problems asked, N.
        samples_per_problem: Samples of each, k.
        avg_at_k: Mean accuracy of a single sample.
        avg_interval: 95% bootstrap interval of ``avg_at_k`` over problems.
        pass_at_k: Share of problems with at least one correct sample among k.
        pass_interval: 95% bootstrap interval of ``pass_at_k`` over problems.
        box_rate: Share of samples with a complete ``\boxed{}``.
        mean_tokens: Mean response length.
        truncated: Share of samples cut off by the token limit.
        unparsable: Share of samples whose boxed answer is no expression that could be read.
        timeouts: Share of samples whose judging broke its limits; they count as wrong.
        records: Every problem with its samples and verdicts.
    """

    num_problems: int
    samples_per_problem: int
    avg_at_k: float
    avg_interval: Interval
    pass_at_k: float
    pass_interval: Interval
    box_rate: float
    mean_tokens: float
    truncated: float
    unparsable: float
    timeouts: float
    records: tuple[ProblemRecord, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything but the records, for the metrics; an interval is a list of its bounds."""
        return {
            "num_problems": self.num_problems,
            "samples_per_problem": self.samples_per_problem,
            "avg_at_k": self.avg_at_k,
            "avg_interval": [self.avg_interval.low, self.avg_interval.high],
            "pass_at_k": self.pass_at_k,
            "pass_interval": [self.pass_interval.low, self.pass_interval.high],
            "box_rate": self.box_rate,
            "mean_tokens": self.mean_tokens,
            "truncated": self.truncated,
            "unparsable": self.unparsable,
            "timeouts": self.timeouts,
        }


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the engine's current weights on fixed problems, always with the same seeds.

    Attributes:
        problems: Held-out problems, each with an answer.
        prompts: Renders the student's prompt.
        tokenizer: Decodes responses for judging.
        config: ``evaluation`` of the run; ``max_problems`` has been applied to ``problems``.
        sampling: How responses are drawn.
        seed: Seeds sampling and bootstrap.
        records_dir: Where each evaluation leaves ``step_N.jsonl``; ``None`` to keep no samples.
    """

    problems: Sequence[Problem]
    prompts: StudentPrompts
    tokenizer: Decoder
    config: EvaluationConfig
    sampling: Sampling
    seed: int
    records_dir: Path | None = None

    def evaluate(self, engine: RolloutEngine, step: int) -> EvaluationResult:
        """Evaluate after ``step`` optimizer steps; ``engine`` is awake and holds the weights of that step.

        Ranks: every rank of the world; the result is the same on all of them.
        """
        return evaluate(
            engine,
            self.problems,
            self.prompts,
            self.tokenizer,
            self.config,
            sampling=self.sampling,
            seed=self.seed,
            records_path=None if self.records_dir is None else self.records_dir / f"step_{step}.jsonl",
        )


def sampling_of(config: Config) -> Sampling:
    """How ``config`` draws responses for evaluation."""
    settings = config.evaluation
    limit = config.rollout.max_new_tokens if settings.max_new_tokens is None else settings.max_new_tokens
    return Sampling(settings.temperature, settings.top_p, settings.top_k, limit)


def check_answers(problems: Sequence[Problem]) -> None:
    """Check that every problem can be judged.

    Raises:
        DataError: There is no problem, or one has no answer; names the first.
    """
    if not problems:
        raise DataError("there is no problem to evaluate on; check data.eval and evaluation.max_problems")
    missing = [problem.id for problem in problems if not (problem.answer or "").strip()]
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(
            f"{missing[0]}{others}: no answer to judge responses against; evaluation needs the column that "
            "data.answer_column names, or a \\boxed{} in the solution"
        )


def evaluate(
    engine: RolloutEngine,
    problems: Sequence[Problem],
    prompts: StudentPrompts,
    tokenizer: Decoder,
    config: EvaluationConfig,
    *,
    sampling: Sampling,
    seed: int,
    records_path: Path | None = None,
) -> EvaluationResult:
    """Sample ``config.samples_per_problem`` responses to each problem and judge them.

    Ranks: every rank of the world calls it with equal arguments. Judging and writing happen on rank 0, whose verdicts
    are broadcast; the result is the same on every rank.

    Args:
        engine: Awake, with the weights to evaluate.
        problems: Problems with answers; all are used.
        prompts: Renders the student's prompt.
        tokenizer: Decodes responses, for judging only.
        config: Samples per problem and time limit of judging are used.
        sampling: How responses are drawn.
        seed: Seeds sampling and bootstrap. A sample's seed depends on it, on the problem's place and on the sample's
            number only, so two models evaluated with one seed are a paired comparison.
        records_path: Where to write one JSON object a problem, responses included. A file already there is set aside.

    Raises:
        DataError: There is no problem, or one has no answer.
        OutputError: ``records_path`` cannot be written. Like every error of rank 0 it is raised on all ranks.
    """
    check_answers(problems)
    k = config.samples_per_problem
    repeated = [prompt for problem in problems for prompt in [tuple(prompts.student(problem))] * k]
    seeds = [drawn for place in range(len(problems)) for drawn in _sample_seeds(seed, place, k)]
    generations = engine.generate(repeated, sampling, seeds=seeds)

    def judge() -> list[Verdict]:
        responses = [_text(tokenizer, generation) for generation in generations]
        answers = [problem.answer or "" for problem in problems for _ in range(k)]
        verdicts = judge_answers(responses, answers, seconds=config.judge_seconds)
        if records_path is not None:
            set_aside(records_path)
            write_atomically(records_path, _record_lines(_records(problems, generations, verdicts), tokenizer))
        return verdicts

    return summarize(_records(problems, generations, _on_rank_0(judge)), seed=seed)


def summarize(records: Sequence[ProblemRecord], *, seed: int) -> EvaluationResult:
    """The figures that follow from judged samples; ``seed`` seeds the bootstrap."""
    k = len(records[0].verdicts)
    correct = np.array([record.num_correct for record in records])
    passed = pass_at_k(correct, num_samples=k, k=k)
    verdicts = [verdict for record in records for verdict in record.verdicts]
    generations = [generation for record in records for generation in record.generations]
    return EvaluationResult(
        num_problems=len(records),
        samples_per_problem=k,
        avg_at_k=float((correct / k).mean()),
        avg_interval=bootstrap_interval(correct / k, seed=seed),
        pass_at_k=float(passed.mean()),
        pass_interval=bootstrap_interval(passed, seed=seed),
        box_rate=_share([verdict.boxed for verdict in verdicts]),
        mean_tokens=float(np.mean([len(generation.token_ids) for generation in generations])),
        truncated=_share([generation.finish_reason == "length" for generation in generations]),
        unparsable=_share([verdict.status == "unparsable" for verdict in verdicts]),
        timeouts=_share([verdict.status == "timeout" for verdict in verdicts]),
        records=tuple(records),
    )


def _share(flags: Sequence[bool]) -> float:
    return float(np.mean(flags))


def _sample_seeds(seed: int, place: int, k: int) -> list[int]:
    # Below 2^31, which every engine takes. Spawned per problem, so that fewer problems keep their samples.
    return [int(word) for word in np.random.SeedSequence([seed, _SEEDS, place]).generate_state(k) % 2**31]


def _on_rank_0(action: Callable[[], list[Verdict]]) -> list[Verdict]:
    """What ``action`` returns on rank 0, on every rank; its error is raised on all, so that none waits for others."""
    result: list[Verdict] = []
    failure: Exception | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = action()
        except Exception as error:
            failure = error
    if dist.is_initialized():
        result, failure = broadcast_object((result, failure))
    if failure is not None:
        raise failure
    return result


def _records(
    problems: Sequence[Problem], generations: Sequence[Generation], verdicts: Sequence[Verdict]
) -> tuple[ProblemRecord, ...]:
    """Samples and verdicts, ``[problems * k]`` in the order of ``problems``, put together by problem."""
    k = len(generations) // len(problems)
    return tuple(
        ProblemRecord(problem, tuple(generations[first : first + k]), tuple(verdicts[first : first + k]))
        for first, problem in zip(range(0, len(generations), k), problems, strict=True)
    )


def _record_lines(records: Sequence[ProblemRecord], tokenizer: Decoder) -> Iterator[str]:
    for record in records:
        samples = [
            {
                "response": _text(tokenizer, generation),
                "tokens": len(generation.token_ids),
                "finish_reason": generation.finish_reason,
                "correct": verdict.correct,
                "boxed": verdict.boxed,
                "status": verdict.status,
            }
            for generation, verdict in zip(record.generations, record.verdicts, strict=True)
        ]
        yield to_json_line({"problem_id": record.problem.id, "answer": record.problem.answer, "samples": samples})


def _text(tokenizer: Decoder, generation: Generation) -> str:
    return tokenizer.decode(list(generation.token_ids), skip_special_tokens=True)
