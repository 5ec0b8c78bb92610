from __future__ import annotations

import math
from typing import Any, Literal, cast

import pytest
import torch

from opsd_megatron.config import Config, ObjectiveConfig
from opsd_megatron.config.compose import compose_config
from opsd_megatron.config.objectives import OBJECTIVES
from opsd_megatron.data.packing import pack
from opsd_megatron.data.prompts import PromptBuilder
from opsd_megatron.data.teacher_prompts import TeacherPrompts
from opsd_megatron.losses import TopK
from opsd_megatron.objectives import HeadLayout, build_objective
from opsd_megatron.objectives.base import weighed
from opsd_megatron.objectives.opsd import Opsd
from opsd_megatron.objectives.sft import Sft
from opsd_megatron.types import AlignedSample, Generation, Problem, Rollout, TeacherTargets
from tests.unit.losses.reference import Case, dense_topk

V, H = 11, 4
PROBLEM = Problem(id="a:1", problem="p", solution="s")


class Prompts:
    """Fixed prompts."""

    def supervised(self, problem: Problem) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (5, 6), (7, 8)


class Taught:
    """The teacher's prompts of a step, whatever the rollouts."""

    def __init__(self, *prompts: tuple[int, ...] | None) -> None:
        self._prompts = prompts

    def prompts(self, rollouts: list[Rollout]) -> list[tuple[int, ...] | None]:
        return list(self._prompts or [(1, 2, 3)] * len(rollouts))


PROMPTS = cast(PromptBuilder, Prompts())


def rollout(*tokens: int) -> Rollout:
    return Rollout(PROBLEM, (4, 5), Generation(tokens, (-1.0,) * len(tokens), "stop"), policy_version=0)


def taught(*prompts: tuple[int, ...] | None) -> TeacherPrompts:
    return cast(TeacherPrompts, Taught(*prompts))


def opsd(*prompts: tuple[int, ...] | None, **settings: Any) -> Opsd:
    return Opsd(ObjectiveConfig(**settings), taught(*prompts), 1.0, HeadLayout(V))


def test_opsd_puts_the_response_under_both_prompts() -> None:
    first, second = opsd((1, 2, 3), (1, 6)).samples([PROBLEM], [rollout(7, 8), rollout(9)])
    assert first == AlignedSample((4, 5), (1, 2, 3), (7, 8), engine_log_probs=(-1.0, -1.0))
    assert second == AlignedSample((4, 5), (1, 6), (9,), engine_log_probs=(-1.0,))


def test_opsd_leaves_out_what_the_teacher_has_no_prompt_for() -> None:
    """Neither as a sample nor in the mean over sequences."""
    objective = opsd(None, (1, 2, 3))
    (sample,) = weighed(
        objective.samples([PROBLEM], [rollout(7, 8, 9), rollout(6)]), ObjectiveConfig(reduction="sequence")
    )
    assert sample.response_ids == (6,) and sample.row_weight == 1.0
    assert opsd(None).samples([PROBLEM], [rollout(7)]) == []


def test_sequence_reduction_is_the_mean_over_sequences_of_their_means() -> None:
    unweighted = opsd().samples([PROBLEM] * 2, [rollout(7), rollout(7, 8, 9)])
    samples = weighed(unweighted, ObjectiveConfig(reduction="sequence"))
    losses = [[6.0], [1.0, 2.0, 3.0]]
    weighted = sum(s.row_weight * loss for s, row in zip(samples, losses, strict=True) for loss in row)
    assert weighted / 4 == pytest.approx((6.0 + 2.0) / 2)
    assert weighed(unweighted, ObjectiveConfig()) == unweighted


def test_position_weights_grow_from_the_floor() -> None:
    """PW-OPSD's formula, for a response of two tokens at places 1/4 and 3/4, and for a width of nearly nothing."""
    samples = opsd().samples([PROBLEM], [rollout(7, 8)])
    (sample,) = weighed(samples, ObjectiveConfig(position_floor=0.25, reduction="sequence"))
    expected = [0.25 + 0.75 / (1 + math.exp(-(place - 0.3) / 0.1)) for place in (0.25, 0.75)]
    assert sample.token_weights == pytest.approx(expected)
    (sample,) = weighed(samples, ObjectiveConfig(position_floor=0.25, position_width=1e-9))
    assert sample.token_weights == pytest.approx([0.25, 1.0])
    assert pack([sample], with_teacher=True).row_weights.tolist() == pytest.approx([0.25, 1.0])


def test_sft_takes_the_problems_own_target() -> None:
    sft = Sft(ObjectiveConfig(name="sft"), PROMPTS, HeadLayout(V))
    assert sft.samples([PROBLEM], []) == [AlignedSample((5, 6), None, (7, 8))]


def test_opsd_loss_is_the_weighted_sum_and_reports_the_engine() -> None:
    torch.manual_seed(0)
    objective = opsd(beta=0.5, clip=None)
    samples = objective.samples([PROBLEM] * 2, [rollout(7, 8), rollout(9)])
    batch = pack(samples, with_teacher=True)
    hidden = torch.randn(3, H, requires_grad=True)
    head, other = torch.randn(V, H), torch.randn(3, H)
    output = objective.loss(hidden, head, batch, TeacherTargets(other, head))
    log_student = (hidden @ head.T).log_softmax(-1).double()
    log_teacher = (other @ head.T).log_softmax(-1).double()
    mixture = torch.logaddexp(log_student, log_teacher) - math.log(2)
    expected = 0.5 * (
        (log_teacher.exp() * (log_teacher - mixture)).sum() + (log_student.exp() * (log_student - mixture)).sum()
    )
    assert output.loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.sums["divergence"].item() == pytest.approx(output.loss_sum.item(), rel=1e-6)
    ratios = log_student.gather(1, batch.response_ids[:, None]).squeeze(1) + 1.0
    assert output.sums["log_prob_kl"].item() == pytest.approx((ratios.exp() - 1 - ratios).sum().item(), rel=1e-5)
    gaps = ratios.abs()
    assert output.sums["log_prob_gap"].item() == pytest.approx(gaps.sum().item(), rel=1e-5)
    assert output.maxima["log_prob_gap_max"].item() == pytest.approx(gaps.max().item(), rel=1e-5)
    output.loss_sum.backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


@pytest.mark.parametrize(("side", "tail"), [("teacher", "bucket"), ("student", "renormalise")])
def test_opsd_on_the_most_likely_entries(
    side: Literal["teacher", "student"], tail: Literal["bucket", "renormalise"]
) -> None:
    objective = opsd(beta=0.5, clip=None, top_k=3, top_k_side=side, top_k_tail=tail)
    batch = pack(objective.samples([PROBLEM], [rollout(7, 8, 9)]), with_teacher=True)
    hidden, other, head = torch.randn(3, H), torch.randn(3, H), torch.randn(V, H)
    output = objective.loss(hidden, head, batch, TeacherTargets(other, head))
    expected = dense_topk(hidden @ head.T, other @ head.T, Case(0.5), TopK(3, side, tail)).sum().item()
    assert output.loss_sum.item() == pytest.approx(expected, rel=1e-5)
    whole = opsd(beta=0.5, clip=None).loss(hidden, head, batch, TeacherTargets(other, head)).loss_sum.item()
    assert output.loss_sum.item() != pytest.approx(whole, rel=1e-2)


def test_an_empty_micro_batch_runs_backward_and_wins_no_maximum() -> None:
    objective = opsd()
    batch = pack([], with_teacher=True)
    hidden, head = torch.randn(0, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    output = objective.loss(hidden, head, batch, TeacherTargets(torch.randn(0, H), head.detach()))
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0.0
    assert output.maxima["log_prob_gap_max"].item() == -math.inf
    assert head.grad is not None and not head.grad.any()


def test_the_configuration_chooses_the_objective() -> None:
    config = Config()
    config.rollout.temperature = 0.7
    built = build_objective(config, PROMPTS, taught(), HeadLayout(V))
    assert isinstance(built, Opsd) and built.temperature == 0.7
    config.objective.name = "sft"
    assert isinstance(build_objective(config, PROMPTS, None, HeadLayout(V)), Sft)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_row_of_the_registry_has_a_file_and_a_choice(name: str) -> None:
    config = compose_config([f"objective={name}"])
    assert config.objective.name == name
    objective = build_objective(config, PROMPTS, taught(), HeadLayout(V))
    assert callable(objective.samples) and callable(objective.loss)
