"""Losses from hidden states: against the dense reference on every mesh, and never a block of all logits."""

from __future__ import annotations

import random
from dataclasses import asdict, fields
from typing import Literal, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_megatron.losses import (
    Diagnostics,
    Side,
    Tail,
    TopK,
    linear_cross_entropy,
    linear_divergence,
    linear_divergence_with_diagnostics,
    linear_sampled_token,
)
from tests.distributed import run_distributed
from tests.unit.losses.linear_checks import (
    HIDDEN,
    ROWS,
    SUPPORTS,
    WIDTH,
    LargestTensor,
    Problem,
    check_equal_sides_are_zero,
    check_ties,
    cross_entropy_differences,
    divergence_differences,
    expected_diagnostics,
    grad,
    sampled_token_differences,
    topk_differences,
)
from tests.unit.losses.reference import (
    BETAS,
    Case,
    all_cases,
    count_collectives,
    dense_divergence,
    shard_of,
    some_cases,
    world,
    worst,
)


def _check_mesh(every: int = 1) -> None:
    """Everything there is to check on one mesh, on one in ``every`` members of the family: of each kind some."""
    chunks = (None, 1, 3, 7, 100)
    # 48: no padding. 43: a partly padded last shard. 30: at tp 4 a shard of nothing but padding.
    for vocab in (48, 43, 30):
        for dtype, unit, tolerance in ((torch.float64, None, 1e-10), (torch.float32, 1.0, 1e-5)):
            problem = Problem.draw(vocab, dtype)
            for number, case in enumerate(some_cases((70 if vocab == 43 else 20) // every, seed=vocab)):
                weighted = number % 2 == 0
                difference = divergence_differences(
                    problem, case, chunks[number % len(chunks)], unit, weighted=weighted
                )
                assert difference < tolerance, (vocab, dtype, case, weighted, difference)
            for chunk_rows in chunks:
                difference = cross_entropy_differences(problem, chunk_rows)
                assert difference < tolerance, (vocab, dtype, chunk_rows, difference)
            for number, case in enumerate(some_cases(20 // every, seed=vocab + 1)):
                support = SUPPORTS[number % len(SUPPORTS)]
                difference = topk_differences(problem, case, support, chunks[number % len(chunks)])
                assert difference < tolerance, (vocab, dtype, case, support, difference)
            for temperature, clip in ((1.0, None), (0.7, 0.5), (1.1, None)):
                difference = sampled_token_differences(problem, temperature, clip)
                assert difference < tolerance, (vocab, dtype, temperature, clip, difference)
    _check_shapes(16 // every)
    for support in SUPPORTS:
        if support.k == 4:
            check_ties(support, chunk_rows=3)
    _check_collectives()
    _check_diagnostics(every)
    _check_equal_sides(every)
    _check_no_rows()
    _check_frozen_parts()
    _check_bad_input()


def _check_shapes(count: int) -> None:
    """Any shapes, a single row and shards of nothing but padding among them; the same on every rank."""
    group = world()
    ranks = 1 if group is None else torch.distributed.get_world_size(group)
    draw = random.Random(0)
    for number, case in enumerate(some_cases(max(count, 8), seed=7)):
        rows = 1 if number % 4 == 0 else draw.randint(1, 6)
        width = ranks * draw.randint(1, 4)
        vocab = draw.randint(min(2, width), width)
        problem = Problem.draw(vocab, torch.float64, rows=rows, seed=number, padding=width - vocab)
        chunk_rows = draw.choice([None, 1, 2, 5])
        support = TopK(draw.randint(1, vocab), draw.choice(get_args(Side)), draw.choice(get_args(Tail)))
        shape = (rows, vocab, width, chunk_rows)
        assert divergence_differences(problem, case, chunk_rows, 1.0, weighted=number % 2 == 0) < 1e-12, (shape, case)
        assert cross_entropy_differences(problem, chunk_rows) < 1e-12, shape
        assert sampled_token_differences(problem, case.temperature, case.clip) < 1e-12, (shape, case)
        if support.k < vocab:
            assert topk_differences(problem, case, support, chunk_rows) < 1e-12, (shape, case, support)


def _check_collectives() -> None:
    """An all-gather and an all-reduce a chunk (for one token a row only the former), and one all-reduce in all.

    Without the sum of the hidden gradient the last falls away; an upstream gradient that differs doubles everything.
    """
    group = world()
    problem = Problem.draw(WIDTH, torch.float32)
    several = int(group is not None)
    ones, other = torch.ones(ROWS), problem.upstream.float()
    for support in (None, TopK(3)):
        for reduce_hidden_grad, upstream, expected in ((True, ones, 4), (False, ones, 3), (True, other, 8)):
            with count_collectives() as counts:
                linear_divergence_with_diagnostics(
                    *problem.leaves(group),
                    beta=0.5,
                    temperature=0.7,
                    tp_group=group,
                    chunk_rows=3,
                    support=support,
                    reduce_hidden_grad=reduce_hidden_grad,
                    target_ids=problem.targets,
                )[0].backward(upstream)
                assert counts() == (several * expected, several * 3 * (2 if expected == 8 else 1))
    hidden, weight, *teacher = problem.leaves(group)
    with count_collectives() as counts:
        linear_cross_entropy(hidden, weight, problem.targets, tp_group=group, chunk_rows=3).sum().backward()
        assert counts() == (several, several * 3)
        loss, _ = linear_sampled_token(hidden, weight, *teacher, problem.targets, tp_group=group, chunk_rows=3)
        loss.sum().backward()
        assert counts() == (2 * several, several * 6)


def _check_diagnostics(every: int) -> None:
    group = world()
    problem = Problem.draw(43, torch.float32, rows=64)
    some_agree = set()
    for case in some_cases(40 // every):
        leaves = problem.leaves(group)
        loss, diagnostics = linear_divergence_with_diagnostics(
            *leaves, **asdict(case), tp_group=group, vocab_size=43, chunk_rows=10, target_ids=problem.targets
        )
        plain = linear_divergence(*leaves, **asdict(case), tp_group=group, vocab_size=43, chunk_rows=10)
        assert torch.equal(loss, plain)
        assert loss.requires_grad
        expected = expected_diagnostics(problem, case)
        assert set(expected) == {field.name for field in fields(Diagnostics)}
        for name, value in expected.items():
            actual = getattr(diagnostics, name)
            assert not actual.requires_grad
            assert actual.dtype == torch.float32
            assert worst(actual, value, 1.0) < 1e-5, (case, name)
        some_agree |= set(diagnostics.top1_agreement.tolist())
    assert some_agree == {0.0, 1.0}
    without = linear_divergence_with_diagnostics(*problem.leaves(group), beta=0.5, tp_group=group, vocab_size=43)[1]
    assert without.student_log_prob is without.teacher_log_prob is without.policy_log_prob is None


def _check_equal_sides(every: int) -> None:
    """Equal hidden states and weights in different memory: loss and gradient are zero to the last bit."""
    group = world()
    generator = torch.Generator().manual_seed(1)
    whole_hidden, whole_weight = torch.randn(33, 128, generator=generator), torch.randn(384, 128, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        for number, case in enumerate(some_cases((80 if dtype == torch.float32 else 20) // every)):
            hidden = whole_hidden.to(dtype, copy=True).requires_grad_()
            weight = shard_of(whole_weight.to(dtype), 0, group).requires_grad_()
            support = (None, None, TopK(9), TopK(9, "student", "renormalise"))[number % 4]
            check_equal_sides_are_zero(hidden, weight, case, vocab=370, chunk_rows=16, support=support)


def _check_no_rows() -> None:
    group = world()
    problem = Problem.draw(WIDTH, torch.float32, rows=0)
    leaves = problem.leaves(group)
    loss, diagnostics = linear_divergence_with_diagnostics(
        *leaves, beta=0.5, clip=0.1, tp_group=group, target_ids=problem.targets
    )
    loss = loss + linear_cross_entropy(*leaves[:2], problem.targets, tp_group=group)
    with count_collectives() as counts:
        loss.sum().backward()
        assert counts() == (0, 0)
    assert loss.shape == (0,)
    assert all(getattr(diagnostics, field.name).shape == (0,) for field in fields(Diagnostics))
    for leaf in leaves[:2]:
        assert torch.equal(grad(leaf), torch.zeros_like(leaf))


def _check_frozen_parts() -> None:
    """What takes no gradient gets none and does not disturb the other's."""
    group = world()
    problem = Problem.draw(WIDTH, torch.float64)
    whole = problem.leaves(group)
    linear_divergence(*whole, beta=0.5, tp_group=group).sum().backward()
    for frozen, live in ((0, 1), (1, 0)):
        leaves = problem.leaves(group)
        leaves[frozen].requires_grad_(False)
        linear_divergence(*leaves, beta=0.5, tp_group=group).sum().backward()
        assert leaves[frozen].grad is None
        assert torch.equal(grad(leaves[live]), grad(whole[live]))
    several = int(group is not None)
    with torch.no_grad(), count_collectives() as counts:
        assert not linear_divergence(*whole, beta=0.5, tp_group=group).requires_grad
        assert counts() == (several, several)  # and no sum of a gradient that nobody asked for


def _check_bad_input() -> None:
    """A NaN in the last rank's head alone is reported on every rank, with its side."""
    group = world()
    for side in ("student", "teacher"):
        problem = Problem.draw(WIDTH, torch.float32)
        getattr(problem, f"{side}_weight")[WIDTH - 1, 0] = torch.nan
        with pytest.raises(FloatingPointError, match=rf"the {side}'s logits hold NaN .* in 7 of 7 rows"):
            linear_divergence(*problem.leaves(group), beta=0.5, tp_group=group, chunk_rows=2)
    # An entry that the student cannot take is none of the divergence's, but its head row spoils the hidden gradient.
    for side in ("student", "teacher"):
        problem = Problem.draw(WIDTH, torch.float32)
        getattr(problem, f"{side}_hidden").abs_()
        getattr(problem, f"{side}_weight")[WIDTH - 1] = -torch.inf
        leaves = problem.leaves(group)
        loss = linear_divergence(*leaves, beta=0.5, tp_group=group, chunk_rows=2)
        assert loss.isfinite().all()
        if side == "teacher":
            loss.sum().backward()
            assert grad(leaves[0]).isfinite().all()
            continue
        with pytest.raises(FloatingPointError, match="gradient of the student's hidden states holds NaN"):
            loss.sum().backward()
    problem = Problem.draw(WIDTH, torch.float32)
    problem.teacher_hidden.fill_(1.0)
    problem.teacher_weight[problem.targets[2]] = -torch.inf
    with pytest.raises(FloatingPointError, match=r"the teacher's logits hold NaN or infinities"):
        linear_sampled_token(*problem.leaves(group), problem.targets, tp_group=group)
    problem = Problem.draw(WIDTH, torch.float32)
    problem.student_hidden[4] = torch.inf
    with pytest.raises(FloatingPointError, match=r"the student's logits .* in 1 of 7 rows, first in 4"):
        linear_cross_entropy(*problem.leaves(group)[:2], problem.targets, tp_group=group, chunk_rows=2)


def test_on_one_rank() -> None:
    _check_mesh()


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_across_shards(tp: int) -> None:
    # More ranks than cores take turns, and the family is the same on all of them.
    run_distributed(_check_mesh, tp, tp // 2)


@pytest.mark.parametrize("beta", BETAS)
def test_gradcheck(beta: float) -> None:
    problem = Problem.draw(6, torch.float64, rows=3, padding=2)
    hidden, weight, *teacher = problem.leaves(None)
    assert torch.autograd.gradcheck(
        lambda hidden, weight: linear_divergence(
            hidden, weight, *teacher, beta=beta, temperature=1.1, clip=0.01, vocab_size=6, chunk_rows=2
        ),
        (hidden, weight),
    )
    assert torch.autograd.gradcheck(
        lambda hidden, weight: linear_cross_entropy(hidden, weight, problem.targets, vocab_size=6, chunk_rows=2),
        (hidden, weight),
    )


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 6),
    vocab=st.integers(1, 20),
    padding=st.integers(0, 5),
    chunk_rows=st.one_of(st.none(), st.integers(1, 8)),
    seed=st.integers(0, 1000),
    case=st.sampled_from(all_cases()),
    weighted=st.booleans(),
    k=st.integers(1, 20),
    side=st.sampled_from(["teacher", "student"]),
    tail=st.sampled_from(["bucket", "renormalise"]),
)
def test_any_shape(
    rows: int,
    vocab: int,
    padding: int,
    chunk_rows: int | None,
    seed: int,
    case: Case,
    weighted: bool,
    k: int,
    side: Literal["teacher", "student"],
    tail: Literal["bucket", "renormalise"],
) -> None:
    problem = Problem.draw(vocab, torch.float64, rows=rows, seed=seed, padding=padding)
    assert divergence_differences(problem, case, chunk_rows, 1.0, weighted=weighted) < 1e-12
    assert cross_entropy_differences(problem, chunk_rows) < 1e-12
    assert sampled_token_differences(problem, case.temperature, case.clip) < 1e-12
    if k < vocab and rows:
        assert topk_differences(problem, case, TopK(k, side, tail), chunk_rows) < 1e-12


@pytest.mark.parametrize("uniform", [True, False])
def test_backward_twice_through_one_graph(uniform: bool) -> None:
    """Scaling the formed gradients in place must not show in a second backward."""
    problem = Problem.draw(43, torch.float64)
    leaves = problem.leaves(None)
    loss = linear_divergence(*leaves, beta=0.5, vocab_size=43, chunk_rows=3)
    upstream = torch.full_like(loss, 3.0) if uniform else problem.upstream
    first = torch.autograd.grad(loss, leaves[:2], upstream, retain_graph=True)
    second = torch.autograd.grad(loss, leaves[:2], upstream, retain_graph=True)
    once = torch.autograd.grad(loss, leaves[:2], torch.ones_like(loss))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    if uniform:
        for one, other in zip(first, once, strict=True):
            torch.testing.assert_close(one, 3 * other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("uniform", [True, False])
def test_head_gradient_lands_in_main_grad(uniform: bool, tied: bool) -> None:
    """Megatron-Core's contract: summed there in float32 over micro-batches, and autograd's own left alone.

    A head tied to the embedding of its stage gets nothing from this loss through autograd, which is then free to bring
    the embedding's gradient.
    """
    weight = Problem.draw(1000, torch.bfloat16, padding=24).student_weight.requires_grad_()
    weight.main_grad = torch.ones(1024, HIDDEN)  # type: ignore[attr-defined]
    if tied:
        weight.zero_out_wgrad = True  # type: ignore[attr-defined]
    expected = torch.ones(1024, HIDDEN, dtype=torch.float64)
    for micro_batch in range(3):
        problem = Problem.draw(1000, torch.bfloat16, padding=24, seed=micro_batch)
        problem.student_weight = weight.detach()
        hidden, head, student, teacher = problem.logits()
        loss = linear_divergence(
            problem.student_hidden, weight, problem.teacher_hidden, problem.teacher_weight, beta=0.5, vocab_size=1000
        )
        problem.upstream = torch.full_like(problem.upstream, 0.3) if uniform else problem.upstream
        loss.backward(problem.upstream.float())
        expected += problem.gradients(dense_divergence(student, teacher, Case(0.5)), hidden, head)[1]
        if tied:
            assert weight.grad is None
            assert not hasattr(weight, "grad_added_to_main_grad")
        else:
            assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
            weight.grad = None
    assert worst(weight.main_grad, expected) < 1e-6  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", [Case(0.0, 0.7, 0.05, "bregman"), Case(0.5, 1.0, 0.05), Case(1.0, 1.1, 0.05, "token")])
def test_no_tensor_is_larger_than_a_chunk(case: Case) -> None:
    rows, vocab, hidden_size, chunk_rows = 64, 1000, 4, 5
    hidden = torch.randn(rows, hidden_size, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.int64)
    with LargestTensor() as largest:
        loss, _ = linear_divergence_with_diagnostics(
            hidden, weight, hidden + 1, weight + 1, **asdict(case), chunk_rows=chunk_rows, target_ids=targets
        )
        (loss + linear_cross_entropy(hidden, weight, targets, chunk_rows=chunk_rows)).sum().backward()
    assert largest.elements == chunk_rows * vocab


@pytest.mark.parametrize("beta", BETAS)
def test_bfloat16_inputs_lose_nothing_before_the_end(beta: float) -> None:
    """Logits and sums are float32: the loss is as good as for float32.

    Gradients are rounded at the end, and the logits' gradient once before it is multiplied with the head.
    """
    problem = Problem.draw(1000, torch.bfloat16, padding=24)
    hidden, weight, student, teacher = problem.logits()
    expected = dense_divergence(student, teacher, Case(beta))
    (grad_logits,) = torch.autograd.grad(expected, student, problem.upstream, retain_graph=True)
    terms = (grad_logits.abs() @ weight.detach().abs(), torch.zeros(1))
    expected_gradients = problem.gradients(expected, hidden, weight)
    leaves = problem.leaves(None)
    loss = linear_divergence(*leaves, beta=beta, vocab_size=1000, chunk_rows=2)
    loss.backward(problem.upstream.float())
    assert worst(loss.detach(), expected.detach()) < 1e-5
    for leaf, gradient, rounded in zip(leaves[:2], expected_gradients, terms, strict=True):
        assert grad(leaf).dtype == torch.bfloat16
        bound = gradient.abs() * 2**-8 + rounded * 2**-9 + 1e-5
        assert bool(((grad(leaf).double() - gradient).abs() <= bound).all())


def test_a_vocabulary_of_real_size() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.randn(3, 8, generator=generator) for _ in range(2))
    weight = torch.randn(151_936, 8, generator=generator)
    for beta in BETAS:
        loss = linear_divergence(hidden, weight, teacher_hidden, weight, beta=beta)
        expected = dense_divergence(
            hidden.double() @ weight.double().t(), teacher_hidden.double() @ weight.double().t(), Case(beta)
        )
        assert worst(loss, expected) < 1e-5


def test_wrong_shapes_and_targets_are_named() -> None:
    hidden, weight = torch.zeros(3, 4), torch.zeros(8, 4)
    with pytest.raises(ValueError, match="teacher: hidden states"):
        linear_divergence(hidden, weight, hidden, torch.zeros(8, 5), beta=0.5)
    with pytest.raises(ValueError, match="differ in rows or in vocabulary"):
        linear_divergence(hidden, weight, hidden, torch.zeros(9, 4), beta=0.5)
    with pytest.raises(ValueError, match="chunk_rows=0"):
        linear_divergence(hidden, weight, hidden, weight, beta=0.5, chunk_rows=0)
    with pytest.raises(ValueError, match="target 7 of row 2 is outside the vocabulary of 7"):
        linear_cross_entropy(hidden, weight, torch.tensor([0, 6, 7]), vocab_size=7)
    with pytest.raises(ValueError, match=r"target_ids must be \[3\] int64"):
        linear_cross_entropy(hidden, weight, torch.tensor([0, 6]))
