"""Checks of the whole loss through kernels of some kind against the dense reference; on one rank or on several.

``through`` gives a context in which every block of logits goes through the kernels, ``device`` is where they run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields

import torch

from opsd_megatron.losses import (
    Diagnostics,
    EntropyGate,
    Importance,
    PolicyGradient,
    RowExtras,
    linear_divergence_with_diagnostics,
    vocab_parallel_divergence,
)
from tests.unit.losses.linear_checks import Problem, check_equal_sides_are_zero, expected_diagnostics, grad
from tests.unit.losses.reference import Case, dense_divergence, shard_of, world, worst

Through = Callable[[], AbstractContextManager[None]]
ROWS, WIDTH = 5, 320

# Every formula, with and without a clip and a temperature, and every place where a clip acts.
CASES = [
    Case(0.0, 0.7, 0.05, "bregman"),
    Case(0.0, 1.1, 1e-3),
    Case(0.1, 1.0),
    Case(0.5, 1.1, 0.05),
    Case(0.5, 0.7, 0.5, "rescale"),
    Case(0.9, 1.0, 0.2, "token"),
    Case(1.0, 0.7, 0.05),
]


def draw(vocab: int, dtype: torch.dtype) -> Problem:
    """A problem in whose first two rows both sides find the same column most likely; at tp 2 on the first and last."""
    problem = Problem.draw(vocab, dtype, rows=ROWS, padding=WIDTH - vocab)
    for hidden, weight in (
        (problem.student_hidden, problem.student_weight),
        (problem.teacher_hidden, problem.teacher_weight),
    ):
        for row, column in ((0, 17), (1, vocab - 1)):
            weight[column] *= 3
            hidden[row] = weight[column] / 3
    return problem


def check_case(
    device: str, case: Case, vocab: int, dtype: torch.dtype, *, weighted: bool, chunk_rows: int | None
) -> None:
    """Loss, both gradients and all diagnostics of one case, on this rank, inside of ``through``.

    ``weighted``: rows are weighted inside and backward scales what forward has formed; else it goes through the kernels
    again.
    """
    group = world()
    problem = draw(vocab, dtype)
    leaves = [leaf.detach().to(device) for leaf in problem.leaves(group)]
    for leaf in leaves[:2]:
        leaf.requires_grad_()
    loss, diagnostics = linear_divergence_with_diagnostics(
        leaves[0],
        leaves[1],
        leaves[2],
        leaves[3],
        **asdict(case),
        tp_group=group,
        vocab_size=vocab,
        chunk_rows=chunk_rows,
        row_weights=problem.upstream.to(device) if weighted else None,
        target_ids=problem.targets.to(device),
    )
    loss.backward(torch.ones_like(loss) if weighted else problem.upstream.to(loss))

    hidden, weight, student, teacher = problem.logits()
    expected = dense_divergence(student, teacher, case)
    (grad_logits,) = torch.autograd.grad(expected, student, problem.upstream, retain_graph=True)
    grad_hidden, grad_weight = problem.gradients(expected, hidden, weight)
    factor = problem.upstream if weighted else 1
    assert loss.dtype == torch.float32
    assert worst(loss.detach().cpu(), expected.detach() * factor, 1.0) < 1e-5
    facts = expected_diagnostics(problem, case)
    assert set(facts) == {field.name for field in fields(Diagnostics)}
    for name, value in facts.items():
        assert worst(getattr(diagnostics, name).cpu(), value, 1.0) < 1e-5, name
    assert facts["top1_agreement"][:3].tolist() == [1, 1, 0]
    if case.clip_mode in ("rescale", "token"):
        assert set(facts["clip_fraction"].tolist()) == {0, 1}
    # Half precision rounds gradients at the end, the logits' gradient before it is multiplied with the head, and on CPU
    # every rank's part of that product.
    terms = grad_logits.abs() @ weight.detach().abs() * (1 if group is None else 2)
    for leaf, exact, rounded in (
        (leaves[0], grad_hidden, terms),
        (leaves[1], shard_of(grad_weight, 0, group), torch.zeros(1)),
    ):
        assert grad(leaf).dtype == dtype
        bound = 1e-5 + (0 if dtype == torch.float32 else exact.abs() * 2**-8 + rounded * 2**-9)
        assert ((grad(leaf).cpu() - exact).abs() <= bound).all()


def check_cases(through: Through, device: str, every: int = 1) -> None:
    """Every case on this rank's share of a vocabulary whose last shard is padded, partly or as a whole."""
    with through():
        for number, case in enumerate(CASES[::every]):
            check_case(device, case, 301, torch.float32, weighted=number % 2 == 0, chunk_rows=(3, None, 2)[number % 3])
        check_case(device, CASES[3], 301, torch.bfloat16, weighted=True, chunk_rows=3)
        check_case(device, CASES[4], 150, torch.float32, weighted=False, chunk_rows=4)


def check_equal_sides(through: Through, device: str, every: int = 1) -> None:
    """Equal hidden states and weights in different memory: loss and gradients are zero to the last bit."""
    group = world()
    generator = torch.Generator().manual_seed(1)
    whole_hidden = torch.randn(ROWS, 64, generator=generator)
    whole_weight = torch.randn(WIDTH, 64, generator=generator)
    with through():
        for number, case in enumerate(CASES[::every]):
            dtype = torch.bfloat16 if number == 1 else torch.float32
            hidden = whole_hidden.to(device, dtype, copy=True).requires_grad_()
            weight = shard_of(whole_weight.to(dtype), 0, group).to(device).requires_grad_()
            check_equal_sides_are_zero(hidden, weight, case, vocab=301, chunk_rows=3)


def check_extras(through: Through, device: str) -> None:
    """Weights, gates and a policy gradient beside the divergence: as without the kernels."""
    problem = draw(301, torch.float32)
    advantages = torch.linspace(-1, 1, ROWS)
    results = []
    for kernels, place in ((through(), device), (nullcontext(), "cpu")):
        extras = RowExtras(
            Importance(torch.full((ROWS,), -5.0, device=place), 2.0),
            EntropyGate(4.0),
            PolicyGradient(advantages.to(place), None, 0.2, 0.2),
        )
        leaves = [leaf.detach().to(place) for leaf in problem.leaves(world())]
        for leaf in leaves[:2]:
            leaf.requires_grad_()
        with kernels:
            loss, _ = linear_divergence_with_diagnostics(
                leaves[0],
                leaves[1],
                leaves[2],
                leaves[3],
                **asdict(CASES[3]),
                tp_group=world(),
                vocab_size=301,
                chunk_rows=3,
                target_ids=problem.targets.to(place),
                extras=extras,
            )
            loss.sum().backward()
        results.append([tensor.detach().cpu() for tensor in (loss, grad(leaves[0]), grad(leaves[1]))])
    for found, expected in zip(*results, strict=True):
        assert worst(found, expected, 1.0) < 1e-5


def check_shard_without_probability(through: Through, device: str) -> None:
    """All logits of one rank, or of some of its pieces, are -inf."""
    group = world()
    student, teacher = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(2)) * 3
    student[0, WIDTH // 2 :] = teacher[1, : WIDTH // 2] = -torch.inf
    student[2, 10:], teacher[2, :200] = -torch.inf, -torch.inf
    own, other = (shard_of(side, 1, group).to(device) for side in (student, teacher))
    own.requires_grad_()
    with through():
        loss = vocab_parallel_divergence(own, other, beta=0.5, tp_group=group)
        loss.sum().backward()
    leaf = student.double().requires_grad_()
    s, t = leaf.softmax(1), teacher.double().softmax(1)
    mixture = (s + t) / 2
    expected = (torch.special.xlogy(s, s / mixture) + torch.special.xlogy(t, t / mixture)).nansum(1) / 2
    assert worst(loss.detach().cpu(), expected.detach(), 1.0) < 1e-5
    assert own.grad is not None
    assert own.grad.isfinite().all()
    # The gradient of the divergence between s and t by s, taken through the softmax.
    slope = torch.special.xlogy(s, s / mixture).nan_to_num(nan=0.0).detach() / 2
    exact = slope - s.detach() * slope.sum(1, keepdim=True)
    assert worst(own.grad.cpu(), shard_of(exact, 1, group), 1.0) < 1e-5
