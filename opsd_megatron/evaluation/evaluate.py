"""Evaluation on held-out problems with the rollout engine: sample, judge, write down, summarise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from opsd_megatron.config import Config, EvaluationConfig
from opsd_megatron.data.boxed import last_boxed
from opsd_megatron.data.prompts import PromptBuilder
from opsd_megatron.distributed.collectives import broadcast_object
from opsd_megatron.errors import ConfigError, DataError
from opsd_megatron.evaluation.answers import Judge, Verdict
from opsd_megatron.evaluation.figures import EvaluationResult, summarize
from opsd_megatron.evaluation.record_file import RecordFile
from opsd_megatron.evaluation.records import ProblemRecord, SampleRecord
from opsd_megatron.evaluation.votes import vote_groups
from opsd_megatron.rollout.engine import RolloutEngine, Sampling
from opsd_megatron.types import Generation, Problem

# Keeps the seeds of evaluation apart from those of rollouts, which have another number in this place.
_SEEDS = 1

_Found = TypeVar("_Found")


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
class Evaluator:
    """Evaluates the engine's current weights on fixed problems, always with the same seeds.

    Attributes:
        sets: Held-out problems, each with an answer, by the name of their set; at least one set.
        prompts: Renders the student's prompt.
        tokenizer: Decodes responses for judging.
        config: ``evaluation`` of the run; ``max_problems`` has been applied to ``sets``.
        sampling: How responses are drawn.
        seed: Seeds sampling and bootstrap.
        records_dir: Where each evaluation leaves ``step_N.jsonl``, for several sets each in a folder of its own;
            ``None`` to keep no samples.
    """

    sets: Mapping[str, Sequence[Problem]]
    prompts: StudentPrompts
    tokenizer: Decoder
    config: EvaluationConfig
    sampling: Sampling
    seed: int
    records_dir: Path | None = None

    def evaluate(self, engine: RolloutEngine, step: int) -> dict[str, Any]:
        """Evaluate after ``step`` optimizer steps; ``engine`` is awake and holds the weights of that step.

        Ranks: every rank of the world; the result is the same on all of them.

        Returns:
            The figures of the first set as :meth:`EvaluationResult.as_dict` has them, and, where there are several,
            ``sets`` with those of each.
        """
        figures = {
            name: evaluate(
                engine,
                problems,
                self.prompts,
                self.tokenizer,
                self.config,
                sampling=self.sampling,
                seed=self.seed,
                records_path=self._records_path(name, step),
            ).as_dict()
            for name, problems in self.sets.items()
        }
        first = next(iter(figures.values()))
        return first if len(figures) == 1 else first | {"sets": figures}

    def _records_path(self, name: str, step: int) -> Path | None:
        if self.records_dir is None:
            return None
        return (self.records_dir if len(self.sets) == 1 else self.records_dir / name) / f"step_{step}.jsonl"


def sampling_of(config: Config) -> Sampling:
    """How ``config`` draws responses for evaluation."""
    settings = config.evaluation
    limit = config.rollout.max_new_tokens if settings.max_new_tokens is None else settings.max_new_tokens
    return Sampling(settings.temperature, settings.top_p, settings.top_k, limit)


def evaluation_prompts(tokenizer: PreTrainedTokenizerBase, config: Config, *, positions: int) -> PromptBuilder:
    """Prompts for evaluation: the student's, with evaluation's thinking mode and room for its responses.

    Args:
        tokenizer: The model's.
        config: ``data``, ``evaluation`` and ``rollout.max_new_tokens`` are used.
        positions: The model's longest sequence, in tokens.

    Raises:
        ConfigError: ``evaluation.max_length`` is longer than the model allows, responses leave no room for a prompt, or
            a template file is wrong.
        ModelError: The tokenizer has no chat template.
    """
    thinking = config.data.student_thinking if config.evaluation.thinking is None else config.evaluation.thinking
    data, length = replace(config.data, student_thinking=thinking), config.evaluation.max_length
    if length is not None and length > positions:
        raise ConfigError(
            f"evaluation.max_length={length} is above the model's max_position_embeddings; use at most {positions}"
        )
    limit, room = length or positions, sampling_of(config).max_new_tokens
    return PromptBuilder(tokenizer, data, max_length=limit, max_new_tokens=room, length_key="evaluation.max_length")


def evaluation_length(sets: Iterable[Sequence[Problem]], prompts: PromptBuilder, config: Config) -> int:
    """The longest sequence that evaluation asks of the engine, in tokens; every prompt is checked to fit.

    Args:
        sets: What is evaluated on.
        prompts: Renders its prompts (:func:`evaluation_prompts`).
        config: ``evaluation.max_length`` is used, where it is set.

    Raises:
        DataError: A prompt is too long; names the problem, the length and the limit.
    """
    longest = max((len(prompts.student(problem)) for problems in sets for problem in problems), default=0)
    return config.evaluation.max_length or longest + prompts.max_new_tokens


def check_answers(problems: Sequence[Problem]) -> None:
    """Check that every problem can be judged.

    Raises:
        DataError: There is no problem, or one has no answer; names the first.
    """
    if not problems:
        raise DataError("there is no problem to evaluate on; check the evaluation set")
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
    resume: bool = False,
) -> EvaluationResult:
    """Sample ``config.samples_per_problem`` responses to each problem and judge them.

    Problems are taken in turn, ``config.responses_per_call`` responses at a time. What one call of the engine has given
    is judged and on disk before the next one: memory does not grow with the set, and a kill costs one call.

    Ranks: every rank of the world calls it with equal arguments; replicas of the engine share the samples. Judging and
    writing happen on rank 0, whose result is broadcast; it is the same on every rank.

    Args:
        engine: Awake, with the weights to evaluate.
        problems: Problems with answers; all are used.
        prompts: Renders the student's prompt.
        tokenizer: Decodes responses, for judging only.
        config: Samples per problem, responses per call and time limit of judging are used.
        sampling: How responses are drawn.
        seed: Seeds sampling and bootstrap. A sample's seed depends on it, on the problem's place and on the sample's
            number only, so two models evaluated with one seed are a paired comparison, and it does not matter how many
            problems are sampled at a time.
        records_path: Where to write one JSON object a problem, responses included. A file already there is set aside.
        resume: What is there, finished or not, is an earlier part of this evaluation: go on after it.

    Raises:
        DataError: There is no problem, or one has no answer; or what is to be resumed is of other problems.
        OutputError: ``records_path`` cannot be written. Like every error of rank 0 it is raised on all ranks.
    """
    check_answers(problems)
    k, file = config.samples_per_problem, RecordFile(records_path)
    at_once = max(1, config.responses_per_call // k)
    done = on_rank_0(lambda: file.begin(problems, resume=resume))
    with Judge(seconds=config.judge_seconds) as judge:
        for first in range(done, len(problems), at_once):
            places = range(first, min(first + at_once, len(problems)))
            own = [problems[place] for place in places]
            repeated = [prompt for problem in own for prompt in [tuple(prompts.student(problem))] * k]
            seeds = [drawn for place in places for drawn in _sample_seeds(seed, place, k)]
            generations = engine.generate(repeated, sampling, seeds=seeds)
            on_rank_0(partial(_keep, file, own, generations, tokenizer, judge))
    return on_rank_0(lambda: summarize(file.finish(), seed=seed))


def _keep(
    file: RecordFile,
    problems: Sequence[Problem],
    generations: Sequence[Generation],
    tokenizer: Decoder,
    judge: Judge,
) -> None:
    texts = [tokenizer.decode(list(drawn.token_ids), skip_special_tokens=True) for drawn in generations]
    file.add(judged_records(problems, generations, texts, judge))


def judged_records(
    problems: Sequence[Problem], generations: Sequence[Generation], texts: Sequence[str], judge: Judge
) -> list[ProblemRecord]:
    """Judge responses and count which wrong answers agree.

    Args:
        problems: With answers.
        generations: ``[problems * k]``, in the order of ``problems``.
        texts: What they say, likewise.
        judge: Judges them.

    Raises:
        JudgeError: The judging process cannot start.
    """
    k = len(generations) // len(problems)
    verdicts = judge.verdicts(texts, [problem.answer or "" for problem in problems for _ in range(k)])
    votes = _votes(judge, texts, verdicts, k)
    samples = [
        SampleRecord(
            text,
            len(generation.token_ids),
            generation.finish_reason,
            verdict.correct,
            verdict.boxed,
            verdict.status,
            vote,
        )
        for text, generation, verdict, vote in zip(texts, generations, verdicts, votes, strict=True)
    ]
    return [
        ProblemRecord(problem.id, problem.problem, problem.answer or "", tuple(samples[first : first + k]))
        for first, problem in zip(range(0, len(samples), k), problems, strict=True)
    ]


def _votes(judge: Judge, texts: Sequence[str], verdicts: Sequence[Verdict], k: int) -> list[int | None]:
    """Which answer each response votes for, see :class:`SampleRecord`; ``[problems * k]``."""
    votes: list[int | None] = [0 if verdict.correct else None for verdict in verdicts]
    wrong = [
        [place for place in range(first, first + k) if verdicts[place].boxed and not verdicts[place].correct]
        for first in range(0, len(texts), k)
    ]
    answers = [[(last_boxed(texts[place]) or "", verdicts[place].status == "ok") for place in own] for own in wrong]
    groups = vote_groups(answers, lambda pairs: [equal for equal, _ in judge.compare(pairs)])
    for own, numbers in zip(wrong, groups, strict=True):
        for place, number in zip(own, numbers, strict=True):
            votes[place] = number + 1
    return votes


def _sample_seeds(seed: int, place: int, k: int) -> list[int]:
    # Below 2^31, which every engine takes. Spawned per problem, so that fewer problems keep their samples.
    return [int(word) for word in np.random.SeedSequence([seed, _SEEDS, place]).generate_state(k) % 2**31]


def on_rank_0(action: Callable[[], _Found]) -> _Found:
    """What ``action`` returns on rank 0, on every rank; its error is raised on all, so that none waits for others.

    Ranks: every rank of the world, or a process without a group.
    """
    found: list[_Found] = []
    failure: Exception | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            found = [action()]
        except Exception as error:
            failure = error
    if dist.is_initialized():
        found, failure = broadcast_object((found, failure))
    if failure is not None:
        raise failure
    return found[0]
