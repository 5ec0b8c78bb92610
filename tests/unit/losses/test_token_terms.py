"""Policy gradients, importance weights and gates: against dense autograd on every mesh, and by hand."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from opsd_megatron.losses import (
    EntropyGate,
    Importance,
    PolicyGradient,
    RowExtras,
    TopK,
    linear_divergence_with_diagnostics,
    linear_log_probs,
    linear_policy_gradient,
    linear_sampled_token,
)
from tests.distributed import run_distributed
from tests.unit.losses.linear_checks import Problem
from tests.unit.losses.reference import Case, count_collectives, dense_divergence, dense_topk, shard_of, world, worst

ROWS = 12
CASES = [Case(0.5, 0.7, 0.05), Case(0.0, 1.1, 3.0, "token"), Case(1.0, 1.0, 0.2, "rescale"), Case(0.0, 1.0)]
SUPPORTS = [None, TopK(4), TopK(3, "student", "renormalise")]


def draw(vocab: int = 43, seed: int = 0) -> tuple[Problem, PolicyGradient, Importance]:
    """Ratios on both sides of both bounds with advantages of either sign, and weights on both sides of the cap."""
    problem = Problem.draw(vocab, torch.float64, rows=ROWS, seed=seed)
    s = problem.log_probs(problem.logits()[2]).detach()
    generator = torch.Generator().manual_seed(seed)

    def near(spread: float) -> Tensor:
        return s + spread * torch.randn(ROWS, generator=generator, dtype=torch.float64)

    advantages = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    advantages[3] = 0.0
    return problem, PolicyGradient(advantages, near(0.4), 0.2, 0.3), Importance(near(1.0), 1.5)


def dense_policy(s: Tensor, term: PolicyGradient) -> Tensor:
    """From the definition."""
    ratio = (s - (s.detach() if term.old_log_probs is None else term.old_log_probs)).exp()
    clipped = ratio.clamp(1 - term.clip_low, 1 + term.clip_high)
    return -torch.minimum(ratio * term.advantages, clipped * term.advantages)


def dense_importance(s: Tensor, importance: Importance) -> Tensor:
    return (s.detach() - importance.behaviour_log_probs).exp().clamp(max=importance.cap)


def differences(problem: Problem, loss: Tensor, leaves: tuple[Tensor, ...], expected: Tensor, *parts: Tensor) -> float:
    """Largest difference of loss and gradients; backward has run for an upstream gradient of 1 in every row."""
    grad_hidden, grad_weight = torch.autograd.grad(expected.sum(), parts)
    padding = len(problem.student_weight) - problem.vocab
    grad_weight = torch.cat([grad_weight, grad_weight.new_zeros(padding, grad_weight.shape[1])])
    assert leaves[0].grad is not None and leaves[1].grad is not None
    return max(
        worst(loss.detach(), expected.detach()),
        worst(leaves[0].grad, grad_hidden),
        worst(leaves[1].grad, shard_of(grad_weight, 0, world()), max(float(grad_weight.abs().max()), 1e-300)),
    )


def _check_policy(problem: Problem, term: PolicyGradient, importance: Importance | None, *, uniform: bool) -> None:
    leaves = problem.leaves(world())
    loss, log_probs = linear_policy_gradient(
        *leaves[:2],
        problem.targets,
        term,
        temperature=0.8,
        tp_group=world(),
        vocab_size=problem.vocab_size(),
        chunk_rows=5,
        row_weights=problem.upstream if uniform else None,
        importance=importance,
    )
    loss.backward(torch.ones_like(loss) if uniform else problem.upstream)
    hidden, weight, student, _ = problem.logits()
    s = problem.log_probs(student / 0.8)
    expected = dense_policy(s, term) * problem.upstream
    if importance is not None:
        expected = expected * dense_importance(s, importance)
    if not uniform:
        loss = loss * problem.upstream
    assert differences(problem, loss, leaves, expected, hidden, weight) < 1e-10
    assert worst(log_probs.student, s.detach()) < 1e-12
    again = linear_log_probs(
        leaves[0].detach(),
        leaves[1].detach(),
        problem.targets,
        temperature=0.8,
        tp_group=world(),
        vocab_size=problem.vocab_size(),
        chunk_rows=5,
    )
    # To the last bit: the ratio of a policy to itself is 1.
    assert torch.equal(again, log_probs.student)
    assert worst(log_probs.student_at_1, problem.log_probs(student).detach()) < 1e-12


def _check_extras(problem: Problem, case: Case, support: TopK | None, extras: RowExtras, *, uniform: bool) -> None:
    leaves = problem.leaves(world())
    loss, diagnostics = linear_divergence_with_diagnostics(
        *leaves,
        **asdict(case),
        tp_group=world(),
        vocab_size=problem.vocab_size(),
        chunk_rows=5,
        row_weights=problem.upstream if uniform else None,
        support=support,
        target_ids=problem.targets,
        extras=extras,
    )
    loss.backward(torch.ones_like(loss) if uniform else problem.upstream)
    hidden, weight, student, teacher = problem.logits()
    dense = dense_divergence(student, teacher, case) if support is None else dense_topk(student, teacher, case, support)
    s = problem.log_probs(student / case.temperature)
    t = (teacher / case.temperature).log_softmax(1)
    expected = dense
    if extras.gate is not None:
        entropy = -(t.exp() * t).sum(1)
        expected = expected * ((entropy > extras.gate.threshold) == extras.gate.above)
    if isinstance(extras.term, PolicyGradient):
        expected = expected + dense_policy(s, extras.term)
    if extras.importance is not None:
        expected = expected * dense_importance(s, extras.importance)
    expected = expected * problem.upstream
    if not uniform:
        loss = loss * problem.upstream
    assert differences(problem, loss, leaves, expected, hidden, weight) < 1e-10, (case, support, extras)
    assert diagnostics.policy_log_prob is not None
    assert worst(diagnostics.policy_log_prob, s.detach()) < 1e-6


def _check_sampled_token(problem: Problem, importance: Importance) -> None:
    leaves = problem.leaves(world())
    loss, _ = linear_sampled_token(
        *leaves,
        problem.targets,
        temperature=0.8,
        clip=0.7,
        tp_group=world(),
        vocab_size=problem.vocab_size(),
        chunk_rows=5,
        importance=importance,
    )
    loss.sum().backward()
    hidden, weight, student, teacher = problem.logits()
    s, t = problem.log_probs(student / 0.8), problem.log_probs(teacher / 0.8)
    expected = -(t - s).detach().clamp(-0.7, 0.7) * s * dense_importance(s, importance)
    assert differences(problem, loss, leaves, expected, hidden, weight) < 1e-10


def _check_mesh() -> None:
    # 30: at tp 4 a shard of nothing but padding.
    for vocab in (43, 30):
        problem, term, importance = draw(vocab)
        first = PolicyGradient(term.advantages, None, 0.2, 0.3)
        for number, one in enumerate((term, first)):
            _check_policy(problem, one, importance, uniform=number == 0)
            _check_policy(problem, one, None, uniform=number == 1)
        _check_sampled_token(problem, importance)
        t = (problem.logits()[3]).log_softmax(1)
        gate = EntropyGate(float(-(t.exp() * t).sum(1).median()))
        combinations = [
            RowExtras(importance=importance),
            RowExtras(gate=gate),
            RowExtras(term=term),
            RowExtras(importance, EntropyGate(gate.threshold, above=True), first),
        ]
        for number, case in enumerate(CASES):
            for extras in combinations:
                _check_extras(problem, case, SUPPORTS[number % 3], extras, uniform=number % 2 == 0)
    _check_collectives()


def _check_collectives() -> None:
    """What is added takes none of its own: two a chunk with a divergence, one without, and one for the gradient."""
    problem, term, importance = draw()
    several = int(world() is not None)
    hidden, weight, *teacher = problem.leaves(world())
    extras = RowExtras(importance, EntropyGate(1.0), term)
    for support in (None, TopK(3)):
        with count_collectives() as counts:
            linear_divergence_with_diagnostics(
                hidden, weight, *teacher, beta=0.5, temperature=0.7, tp_group=world(), vocab_size=43, chunk_rows=4,
                support=support, target_ids=problem.targets, extras=extras,
            )[0].sum().backward()  # fmt: skip
            assert counts() == (several * 4, several * 3)
    with count_collectives() as counts:
        linear_policy_gradient(
            hidden, weight, problem.targets, term, tp_group=world(), vocab_size=43, chunk_rows=4, importance=importance
        )[0].sum().backward()
        assert counts() == (several, several * 3)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_gradients_are_those_of_the_definitions(tp: int) -> None:
    if tp == 1:
        _check_mesh()
    else:
        run_distributed(_check_mesh, tp)


def test_the_clipped_surrogate_by_hand() -> None:
    """Ratios 1.5, 0.5 and 1.1 with advantages of both signs: value and derivative with respect to the log-prob."""
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 1.1], dtype=torch.float64)
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, -2.0], dtype=torch.float64)
    old = torch.full((6,), -3.0, dtype=torch.float64)
    loss, slope = PolicyGradient(advantages, old, clip_low=0.2, clip_high=0.28).evaluate(old + ratios.log(), None)
    # Clipped: 1.5 with a positive advantage (to 1.28) and 0.5 with a negative one (to 0.8).
    assert loss.tolist() == pytest.approx([-2.56, 3.0, -1.0, 1.6, -2.2, 2.2])
    assert slope.tolist() == pytest.approx([0.0, 3.0, -1.0, 0.0, -2.2, 2.2])


def test_the_first_updates_ratio_is_one_exactly() -> None:
    term = PolicyGradient(torch.tensor([0.5, -0.25]), None, 0.2, 0.2)
    student = torch.tensor([-0.123, -7.9])
    assert term.ratio(student).tolist() == [1.0, 1.0]
    loss, slope = term.evaluate(student, None)
    assert loss.tolist() == slope.tolist() == [-0.5, 0.25]


def test_importance_weights_by_hand() -> None:
    importance = Importance(torch.tensor([-1.0, -1.0, -1.0, -1000.0]), cap=2.0)
    student = torch.tensor([-1.0, -1.0 - math.log(2), 0.0, -1.0])
    assert importance.weights(student).tolist() == pytest.approx([1.0, 0.5, 2.0, 2.0])


def test_what_needs_a_target_says_so() -> None:
    problem, term, _ = draw()
    with pytest.raises(ValueError, match="need target_ids"):
        linear_divergence_with_diagnostics(*problem.leaves(None), beta=0.5, vocab_size=43, extras=RowExtras(term=term))
