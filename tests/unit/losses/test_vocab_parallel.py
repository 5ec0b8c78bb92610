"""vocab_parallel_divergence: values and gradients against the dense reference on every mesh."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Literal
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opsd_megatron.losses import TopK, vocab_parallel_divergence
from opsd_megatron.losses.row_losses import DivergenceLoss
from tests.distributed import run_distributed
from tests.unit.losses.reference import (
    BETAS,
    CLIP_MODES,
    Case,
    all_cases,
    count_collectives,
    dense_divergence,
    dense_topk,
    shard_of,
    some_cases,
    world,
    worst,
)

ROWS, WIDTH = 5, 48


def _logits(seed: int, vocab: int, rows: int = ROWS, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * scale
    teacher = student + torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    upstream = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.5
    return student, teacher, upstream


def _expected(
    student: Tensor, teacher: Tensor, upstream: Tensor, case: Case, support: TopK | None = None
) -> tuple[Tensor, Tensor]:
    leaf = student.detach().double().clone().requires_grad_()
    loss = dense_divergence(leaf, teacher, case) if support is None else dense_topk(leaf, teacher, case, support)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream.double())
    return loss.detach(), gradient


def _pad(full: Tensor) -> Tensor:
    """To WIDTH columns, with padding that would spoil everything if it were read."""
    return torch.cat([full, full.new_full((full.shape[0], WIDTH - full.shape[1]), torch.nan)], dim=1)


def _differences(
    vocab: int, dtype: torch.dtype, cases: list[Case], support: TopK | None = None
) -> tuple[float, float, str]:
    """Largest differences from the reference of loss and gradient over the cases, and the case of the latter."""
    group = world()
    student, teacher, upstream = _logits(vocab, vocab)
    worst_loss, worst_gradient, where = 0.0, 0.0, ""
    for case in cases:
        student_shard = shard_of(_pad(student).to(dtype), 1, group).requires_grad_()
        teacher_shard = shard_of(_pad(teacher).to(dtype), 1, group).requires_grad_()
        loss = vocab_parallel_divergence(
            student_shard,
            teacher_shard,
            **asdict(case),
            tp_group=group,
            vocab_size=None if vocab == WIDTH else vocab,
            support=support,
        )
        loss.backward(upstream.to(loss.dtype))
        expected_loss, expected = _expected(student.to(dtype), teacher.to(dtype), upstream, case, support)
        padded = torch.cat([expected, expected.new_zeros(ROWS, WIDTH - vocab)], dim=1)
        assert student_shard.grad is not None
        assert teacher_shard.grad is None
        whole = _gather(student_shard.grad, group)
        # In float64 relative to the case's own scale. float32 rounds log-probabilities of about 10, which is what it
        # has to be held to: with a tight clip the loss itself may be 1e-6.
        unit = 1.0 if dtype == torch.float32 else None
        worst_loss = max(worst_loss, worst(loss, expected_loss, unit))
        if (difference := worst(whole, padded, unit)) > worst_gradient:
            worst_gradient, where = difference, str(case)
    return worst_loss, worst_gradient, where


def _gather(shard: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return shard
    parts = [torch.empty_like(shard) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, shard.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def _check_mesh(every: int = 1) -> None:
    """On this mesh: exactness, padding, collectives, empty batches, equal sides, reported NaN.

    On one in ``every`` members of the family: of each kind some.
    """
    # 48: no padding. 43: a partly padded last shard. 30: at tp 4 a shard of nothing but padding.
    for vocab, count in ((48, 32), (43, 104), (30, 32)):
        loss, gradient, where = _differences(vocab, torch.float64, some_cases(count // every, seed=vocab))
        assert loss < 1e-11, (vocab, loss)
        assert gradient < 1e-10, (vocab, gradient, where)
    for support in (TopK(1), TopK(9, "student"), TopK(20, tail="renormalise")):
        loss, gradient, where = _differences(43, torch.float64, some_cases(20 // every), support)
        assert loss < 1e-11, (support, loss)
        assert gradient < 1e-10, (support, gradient, where)
    loss, gradient, where = _differences(43, torch.float32, some_cases(72 // every))
    assert loss < 3e-6, loss
    assert gradient < 1e-6, (gradient, where)
    _check_collectives()
    _check_no_rows()
    _check_equal_sides(every)
    _check_bad_input()


def _check_collectives() -> None:
    group = world()
    student = shard_of(_logits(1, WIDTH)[0], 1, group).requires_grad_()
    for case in (Case(0.0, 0.7), Case(0.5, 1.0, 0.05, "entry"), Case(1.0, 1.0, 0.05, "rescale")):
        with count_collectives() as counts:
            loss = vocab_parallel_divergence(student, student.detach() + 1, **asdict(case), tp_group=group)
            assert counts() == ((1, 1) if group is not None else (0, 0))
            loss.sum().backward()
            assert counts() == ((1, 1) if group is not None else (0, 0))


def _check_no_rows() -> None:
    student = torch.empty(0, 12, requires_grad=True)
    loss = vocab_parallel_divergence(student, torch.empty(0, 12), beta=0.5, tp_group=world())
    loss.sum().backward()
    assert loss.shape == (0,)
    assert student.grad is not None
    assert student.grad.shape == (0, 12)


def _check_equal_sides(every: int) -> None:
    group = world()
    for dtype, count in ((torch.float32, 208), (torch.bfloat16, 32)):
        for case in some_cases(count // every):
            student = shard_of(_logits(7, WIDTH, scale=6.0)[0].to(dtype), 1, group).requires_grad_()
            loss = vocab_parallel_divergence(student, student.detach().clone(), **asdict(case), tp_group=group)
            loss.sum().backward()
            assert torch.equal(loss, torch.zeros_like(loss)), case
            assert student.grad is not None
            assert torch.equal(student.grad, torch.zeros_like(student)), case


def _check_bad_input() -> None:
    """A NaN on the last rank alone is reported on every rank, with its side."""
    group = world()
    for value in (torch.nan, torch.inf):
        for side, other in (("student", "teacher"), ("teacher", "student")):
            full = {side: torch.zeros(ROWS, WIDTH), other: torch.zeros(ROWS, WIDTH)}
            full[side][3, WIDTH - 1] = value
            shards = [shard_of(full[name], 1, group) for name in ("student", "teacher")]
            with pytest.raises(FloatingPointError, match=f"the {side}'s logits hold NaN") as failure:
                vocab_parallel_divergence(*shards, beta=0.5, tp_group=group)
            assert "1 of 5 rows, first in 3" in str(failure.value)
            assert other not in str(failure.value)


def test_on_one_rank() -> None:
    _check_mesh()


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_across_shards(tp: int) -> None:
    # More ranks than cores take turns, and the family is the same on all of them.
    run_distributed(_check_mesh, tp, tp // 2)


def _naive_forward_kl(student: Tensor, teacher: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The trap: reductions in plain sight of autograd, which does not see them."""

    def log_probs(logits: Tensor) -> Tensor:
        maximum = logits.detach().amax(1)
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
        total = (logits - maximum[:, None]).exp().sum(1)
        dist.all_reduce(total, group=group)
        return logits - maximum[:, None] - total.log()[:, None]

    s, t = log_probs(student), log_probs(teacher)
    loss = (t.exp() * (t - s)).sum(1)
    dist.all_reduce(loss, group=group)
    return loss


def _fall_into_the_trap() -> tuple[float, float]:
    warnings.simplefilter("ignore")
    group = world()
    assert group is not None
    student, teacher, upstream = _logits(3, WIDTH)
    shard = shard_of(student, 1, group).requires_grad_()
    loss = _naive_forward_kl(shard, shard_of(teacher, 1, group), group)
    loss.backward(upstream)
    expected_loss, expected = _expected(student, teacher, upstream, Case(0.0))
    assert shard.grad is not None
    return worst(loss.detach(), expected_loss), worst(_gather(shard.grad, group), expected)


def test_these_tests_would_notice_an_untracked_all_reduce() -> None:
    """It gives the right loss and a gradient that is far off: only a gradient test sees it."""
    for loss, gradient in run_distributed(_fall_into_the_trap, 2):
        assert loss < 1e-12
        assert gradient > 0.05


@pytest.mark.parametrize("beta", BETAS)
def test_gradcheck(beta: float) -> None:
    student, teacher, _ = _logits(11, 7, rows=3)
    for clip_mode in ("none", "entry", "bregman", "token"):  # rescale holds its factor constant: no true derivative
        assert torch.autograd.gradcheck(
            lambda z, mode=clip_mode: vocab_parallel_divergence(
                z, teacher, beta=beta, temperature=0.7, clip=0.01, clip_mode=mode, vocab_size=6
            ),
            student.clone().requires_grad_(),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposed_logits(dtype: torch.dtype) -> None:
    """Kernels take rows that are contiguous: what they get is a copy that is, whatever the caller's layout."""
    student, teacher, _ = (tensor.to(dtype) for tensor in _logits(5, WIDTH))
    transposed = student.t().contiguous().t().requires_grad_()
    with mock.patch.object(DivergenceLoss, "evaluate", autospec=True, side_effect=DivergenceLoss.evaluate) as evaluate:
        loss = vocab_parallel_divergence(transposed, teacher.t().contiguous().t(), beta=0.5)
    assert all(logits.is_contiguous() for logits in evaluate.call_args.args[1:3])
    plain = student.clone().requires_grad_()
    expected = vocab_parallel_divergence(plain, teacher, beta=0.5)
    assert torch.equal(loss, expected)
    loss.sum().backward()
    expected.sum().backward()
    assert transposed.grad is not None and plain.grad is not None
    assert torch.equal(transposed.grad, plain.grad)


@pytest.mark.parametrize("beta", BETAS)
def test_bfloat16_logits_are_reduced_in_float32(beta: float) -> None:
    student, teacher, upstream = (tensor.bfloat16() for tensor in _logits(5, 2000))
    leaf = student.clone().requires_grad_()
    loss = vocab_parallel_divergence(leaf, teacher, beta=beta)
    loss.backward(upstream.float())
    expected_loss, expected = _expected(student, teacher, upstream, Case(beta))
    assert loss.dtype == torch.float32
    assert worst(loss, expected_loss) < 1e-5
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16
    # The gradient is rounded once, to bfloat16's 8 bits, at the end.
    difference = (leaf.grad.double() - expected).abs()
    assert bool((difference <= expected.abs() * 2**-8 + 1e-8).all())


@pytest.mark.parametrize("clip_mode", [*CLIP_MODES, "none"])
@pytest.mark.parametrize("beta", BETAS)
def test_extreme_logits_stay_finite(beta: float, clip_mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    one_hot = torch.full((4, 6), -1e4)
    student, teacher = one_hot.clone(), one_hot.clone()
    student[:, 0] = teacher[:, 1] = 1e4  # disjoint
    student[1] = torch.randn(6, generator=generator) * 1e4
    teacher[2] = 1e4
    student[3, 2:] = teacher[3, 2:] = -torch.inf  # entries that neither side can take
    leaf = student.requires_grad_()
    loss = vocab_parallel_divergence(leaf, teacher, beta=beta, clip=0.05, clip_mode=clip_mode)  # type: ignore[arg-type]
    loss.sum().backward()
    assert loss.isfinite().all()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("beta", BETAS)
def test_tails_of_next_to_no_probability(
    beta: float, tail: Literal["bucket", "renormalise"], dtype: torch.dtype
) -> None:
    """A tail of e^-150 or e^-20000 is none in float32, and still has a logarithm and a gradient."""
    student = torch.tensor([[1.0, 0, 0, 0, 0, 0], [200, -200, -200, -200, -200, -200], [1e4, -1e4, -1e4, 0, 0, 0]])
    teacher = torch.tensor([[0.0, -150, -150, -150, -150, -150], [-200, 200, -200, -200, -200, -200], [0.0] * 6])
    for side in ("teacher", "student"):
        support = TopK(1, side, tail)  # type: ignore[arg-type]
        # Equally likely entries make the choice of the support arbitrary.
        rows = slice(0, 2) if side == "teacher" else slice(0, 3)
        leaf = student[rows].to(dtype).requires_grad_()
        loss = vocab_parallel_divergence(leaf, teacher[rows].to(dtype), beta=beta, support=support)
        loss.sum().backward()
        dense = student[rows].double().requires_grad_()
        expected = dense_topk(dense, teacher[rows], Case(beta), support)
        expected.sum().backward()
        assert leaf.grad is not None and dense.grad is not None
        # An entry's share of the tail is a difference of two logarithms of up to 1e4, each rounded.
        rtol = 1e4 * torch.finfo(dtype).eps
        torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=1e-6)
        torch.testing.assert_close(leaf.grad.double(), dense.grad, rtol=rtol, atol=1e-6)


def test_disjoint_one_hots_have_their_known_divergence() -> None:
    student = torch.tensor([[1e4, -1e4, -1e4]])
    teacher = torch.tensor([[-1e4, 1e4, -1e4]])
    for beta in (0.1, 0.5, 0.9):
        entropy = -(torch.tensor(beta).double().xlogy(torch.tensor(beta).double()))
        entropy -= torch.tensor(1 - beta).double().xlogy(torch.tensor(1 - beta).double())
        assert vocab_parallel_divergence(student, teacher, beta=beta).item() == pytest.approx(entropy.item(), rel=1e-6)
    for beta in (0.0, 1.0):
        assert vocab_parallel_divergence(student, teacher, beta=beta).item() == pytest.approx(2e4)


def test_large_logits_keep_the_digits_of_small_differences() -> None:
    student, teacher, upstream = _logits(5, 100)
    offset = 8192.0  # a multiple of the logits' own spacing is exact, so the reference does not move
    student, teacher = (((tensor * 64).round() / 64) for tensor in (student, teacher))
    expected_loss, _ = _expected(student, teacher, upstream, Case(0.5))
    loss = vocab_parallel_divergence(student.float() + offset, teacher.float() + offset, beta=0.5)
    assert worst(loss, expected_loss) < 1e-5


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 4),
    vocab=st.integers(1, 20),
    padding=st.integers(0, 5),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-3, 1.0, 10.0]),
    case=st.sampled_from(all_cases()),
)
def test_any_shape(rows: int, vocab: int, padding: int, seed: int, scale: float, case: Case) -> None:
    student, teacher, upstream = _logits(seed, vocab, rows, scale)
    leaf = torch.cat([student, torch.full((rows, padding), torch.nan)], dim=1).requires_grad_()
    other = torch.cat([teacher, torch.full((rows, padding), torch.nan)], dim=1)
    loss = vocab_parallel_divergence(leaf, other, **asdict(case), vocab_size=vocab)
    loss.backward(upstream)
    expected_loss, expected = _expected(student, teacher, upstream, case)
    assert leaf.grad is not None
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(leaf.grad[:, :vocab], expected, rtol=1e-9, atol=1e-13)
    assert torch.equal(leaf.grad[:, vocab:], torch.zeros(rows, padding, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 1.5}, "beta=1.5"),
        ({"beta": 0.5, "temperature": 0.0}, "temperature=0.0"),
        ({"beta": 0.5, "clip": 0.0}, "clip=0.0"),
        ({"beta": 0.5, "clip_mode": "entries"}, "entry, bregman, rescale, token, none"),
        ({"beta": 0.5, "vocab_size": 9}, "vocab_size=9"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vocab_parallel_divergence(torch.zeros(2, 8), torch.zeros(2, 8), **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of one shape"):
        vocab_parallel_divergence(torch.zeros(2, 8), torch.zeros(2, 7), beta=0.5)
