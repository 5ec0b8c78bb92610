"""Verdicts on training rollouts: rank 0 judges for all, and nothing an answer holds ends the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch.distributed as dist

from opsd_megatron.errors import DataError
from opsd_megatron.evaluation.answers import _Worker
from opsd_megatron.trainer import verdicts
from opsd_megatron.trainer.verdicts import Judge, check_training_answers
from opsd_megatron.types import Generation, Problem, Rollout
from tests.distributed import run_distributed

# By the only token of each response.
TEXTS = {1: "so \\boxed{\\frac{1}{2}}", 2: "\\boxed{2}", 3: "\\boxed{\\notacommand{}{", 4: "no box", 5: "\\boxed{)(}"}
HOSTILE = {6: "\\boxed{9^{9^{9^9}}}", 7: "\\boxed{" + "(" * 900 + "1" + ")" * 900 + "}"}


class Decoder:
    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return (TEXTS | HOSTILE)[ids[0]]


def rollout(token: int, answer: str = "0.5") -> Rollout:
    problem = Problem(f"p:{token}", "?", answer=answer)
    return Rollout(problem, (9,), Generation((token,), (-0.1,), "stop"), policy_version=0)


def _judge() -> tuple[list[bool | None], dict[str, float]]:
    refuse = mock.Mock(side_effect=AssertionError("rank 1 judges"))
    judging = verdicts.judge_answers if dist.get_rank() == 0 else refuse
    with mock.patch.object(verdicts, "judge_answers", judging):
        judged, report = Judge(cast(Any, Decoder()), 5.0).judge([rollout(token) for token in TEXTS])
    return [one.correct for one in judged], report


def test_rank_0_judges_and_every_rank_knows() -> None:
    first, second = run_distributed(_judge, 2)
    assert first == second
    correct, report = first
    assert correct == [True, False, False, False, False]
    assert report == {"reward_mean": 0.2, "unparsable": 0.2, "judge_timeouts": 0.0}


def _fail() -> str:
    broken = mock.Mock(side_effect=RuntimeError("no math-verify here"))
    with mock.patch.object(verdicts, "judge_answers", broken), pytest.raises(RuntimeError) as raised:
        Judge(cast(Any, Decoder()), 5.0).judge([rollout(1)])
    return str(raised.value)


def test_a_judge_that_does_not_start_is_an_error_on_every_rank() -> None:
    assert run_distributed(_fail, 2) == ["no math-verify here"] * 2


def _hostile() -> tuple[list[bool | None], dict[str, float], str, list[str]]:
    """Hostile answers between good ones, then an error while answers are judged; what is left of processes."""
    judge = Judge(cast(Any, Decoder()), 0.5)
    judged, report = judge.judge([rollout(token) for token in (1, *HOSTILE, 1)])
    left = _children()
    ask = mock.patch.object(_Worker, "ask", side_effect=RuntimeError("a pipe broke"))
    with ask as asked, pytest.raises(RuntimeError) as raised:
        judge.judge([rollout(1, "x")])
    assert asked.called == (dist.get_rank() == 0)
    return [one.correct for one in judged], report, str(raised.value), left + _children()


def _children() -> list[str]:
    return [child for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()]


def test_a_hostile_answer_is_wrong_and_no_process_outlives_its_verdict() -> None:
    for correct, report, error, left in run_distributed(_hostile, 2):
        assert correct == [True, False, False, True]
        assert report == {"reward_mean": 0.5, "unparsable": 0.0, "judge_timeouts": 0.5}
        assert error == "a pipe broke"
        assert left == []


def test_a_training_problem_without_an_answer_is_named() -> None:
    check_training_answers([Problem("a:1", "p", answer="1")], "objective.name=grpo")
    with pytest.raises(DataError, match=r"a:2 \(and 1 more\): no answer .* objective.name=grpo needs"):
        check_training_answers(
            [Problem("a:1", "p", answer="1"), Problem("a:2", "p"), Problem("a:3", "p", answer=" ")],
            "objective.name=grpo",
        )
