"""The kernels for CPU: as plain functions in every case, and compiled where that could change something."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor

from opsd_megatron.losses import compiled_rows, linear_divergence, vocab_parallel_divergence
from opsd_megatron.losses.compiled_rows import RowKernels, compiled_kernels, kernels_for
from opsd_megatron.losses.divergences import LEAST_BETA, LOG_ZERO, DivergenceSpec, divergence_entries
from opsd_megatron.losses.row_losses import DivergenceLoss
from opsd_megatron.losses.torch_rows import TorchRows
from tests.distributed import run_distributed
from tests.unit.losses.kernel_checks import (
    CASES,
    check_case,
    check_cases,
    check_equal_sides,
    check_extras,
    check_shard_without_probability,
)
from tests.unit.losses.linear_checks import Problem, grad
from tests.unit.losses.reference import Case, dense_divergence, worst

needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
CHECKS = [check_cases, check_equal_sides, check_extras, check_shard_without_probability]


def plain_kernels(spec: DivergenceSpec) -> RowKernels:
    """The kernels as they are written."""
    return RowKernels.of(spec, lambda kernel: kernel)


@contextmanager
def through(kernels: Callable[[DivergenceSpec], RowKernels]) -> Iterator[None]:
    """Every block of logits, however small, goes through these kernels."""

    def block(task: DivergenceLoss, student: Tensor, teacher: Tensor, targets: Tensor | None, rows: slice) -> object:
        targets = None if targets is None else targets[rows]
        return compiled_rows.CompiledRows(
            student[rows], teacher[rows], kernels(task.spec), task.spec, task.shard, targets
        )

    with mock.patch.object(DivergenceLoss, "_block", block):
        yield


plain = partial(through, plain_kernels)


@pytest.mark.parametrize("check", CHECKS)
def test_the_functions_on_one_rank(check: Callable[..., None]) -> None:
    check(plain, "cpu")


@pytest.mark.parametrize("check", CHECKS)
def test_the_functions_on_two_ranks(check: Callable[..., None]) -> None:
    run_distributed(check, 2, plain, "cpu")


@needs_compiler
@pytest.mark.parametrize("number", [1, 3, 6])
def test_compiled(number: int) -> None:
    """Both endpoints, clipped and at a temperature, and the middle: with a C++ compiler, for any number of rows."""
    with through(compiled_kernels):
        # Chunks of 3 and 2 rows, and one of all 5: one compilation does for all.
        for chunk_rows in (3, None):
            check_case("cpu", CASES[number], 301, torch.float32, weighted=True, chunk_rows=chunk_rows)
        check_case("cpu", CASES[number], 301, torch.bfloat16, weighted=True, chunk_rows=None)


@needs_compiler
def test_equal_sides_stay_exactly_equal_where_operations_are_fused() -> None:
    with through(compiled_kernels):
        check_equal_sides(lambda: through(compiled_kernels), "cpu", every=7)


@needs_compiler
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_what_is_no_number_is_reported_through_compiled_kernels(side: str, value: float) -> None:
    """In whatever column: a vectorised maximum must not lose a NaN."""
    for column in (0, 5, 300):
        logits = {"student": torch.zeros(5, 301), "teacher": torch.zeros(5, 301)}
        logits[side][3, column] = value
        with through(compiled_kernels), pytest.raises(FloatingPointError) as failure:
            vocab_parallel_divergence(logits["student"], logits["teacher"], **asdict(CASES[3]))
        assert str(failure.value) == f"the {side}'s logits hold NaN or infinities in 1 of 5 rows, first in 3"


@needs_compiler
@pytest.mark.parametrize("columns", [100_003, 151_936])
def test_sums_over_many_columns_are_as_exact_as_uncompiled_ones(columns: int) -> None:
    """In whole rows, since 100,003 is a prime number, and in pieces."""
    assert compiled_rows.pieces_of_row(columns) == {100_003: 1, 151_936: 128}[columns]
    spec = DivergenceSpec(0.5, clip=0.05)
    student, teacher = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(0)).unbind()
    exact = statistics_and_sums(spec, plain_kernels(spec), student.double(), teacher.double())
    found = statistics_and_sums(spec, compiled_kernels(spec), student, teacher)
    for one, other in zip(found, exact, strict=True):
        assert ((one - other).abs() <= 1e-6 * other.abs() + 1e-9).all()


@needs_compiler
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_divergence_of_nearly_equal_sides_is_as_exact_as_uncompiled(beta: float) -> None:
    """It is of the order of the difference squared: what rounds at the order of the difference leaves nothing of it."""
    spec = DivergenceSpec(beta)
    student, noise = torch.randn(2, 5, 20_001, generator=torch.Generator().manual_seed(0)).unbind()
    for difference, tolerance in ((1e-2, 1e-4), (1e-3, 1e-3), (1e-4, 1e-2)):
        teacher = student + difference * noise
        exact, found, plain_found = (
            statistics_and_sums(spec, kernels(spec), student.to(dtype), teacher.to(dtype))[1][0].double()
            for kernels, dtype in (
                (plain_kernels, torch.float64),
                (compiled_kernels, torch.float32),
                (plain_kernels, torch.float32),
            )
        )
        assert ((plain_found - exact).abs() <= tolerance * exact).all()
        assert ((found - exact).abs() <= tolerance * exact).all()


@needs_compiler
@pytest.mark.parametrize("beta", [LEAST_BETA, 0.1, 0.5, 1 - LEAST_BETA])
def test_compiled_entries_are_as_exact_as_uncompiled(beta: float) -> None:
    """Their exponentials and logarithms are not torch's own; 1.5e-7 is a rounding or two more."""
    spec, generator = DivergenceSpec(beta), torch.Generator().manual_seed(0)
    s, t = -80 * torch.rand(2, 40, 1 << 12, generator=generator)
    for row, difference in enumerate(torch.logspace(-7, 1, 20)):
        t[row] = (s[row] + difference * torch.randn(1 << 12, generator=generator)).clamp(max=0)
    t[20:22], s[21:23] = LOG_ZERO, LOG_ZERO
    exact = divergence_entries(s.double(), t.double(), spec)
    fused = compiled_rows._compile(divergence_entries)
    compiled, plain = (divergence(s, t, spec) for divergence in (fused, divergence_entries))
    # A value is the sum of two terms, of which near equality hardly anything is left.
    terms = exact.slope.abs() + (exact.value - exact.slope).abs()
    scales = {"slope": exact.slope, "value": terms} | {
        name: getattr(exact, name) for name in ("student_prob", "teacher_prob")
    }
    for name, scale in scales.items():
        normal = scale.abs() > 1e-30
        errors = [
            ((getattr(found, name) - getattr(exact, name)) / scale)[normal].abs() - 6e-8 * (t - s)[normal].abs()
            for found in (compiled, plain)
        ]  # beside the rounding of t - s
        assert errors[0].max() <= 1.5 * errors[1].max() + 1.5e-7, name
        assert (getattr(compiled, name)[~normal].abs() <= 1e-29).all(), name


def statistics_and_sums(
    spec: DivergenceSpec, kernels: RowKernels, student: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor]:
    """The first seven statistics and the nine sums of rows that one rank has whole."""
    rows = compiled_rows.CompiledRows(student, teacher, kernels, spec, mock.Mock(pick=None), None)
    statistics = rows.statistics()
    normaliser = statistics[:4].clone()
    normaliser[1::2].log_()
    return statistics[:7], rows.sums(normaliser)


class TestChoice:
    """Which blocks of logits get kernels at all."""

    SPEC = DivergenceSpec(0.5)

    @needs_compiler
    def test_large_float32_blocks_on_cpu(self) -> None:
        assert kernels_for(torch.empty(2, 1 << 14), self.SPEC) is compiled_kernels(self.SPEC)

    @pytest.mark.parametrize(
        "student",
        [
            torch.empty(1, 20_011),
            torch.empty(2, (1 << 14) - 1),
            torch.empty(2, 1 << 14, dtype=torch.float64),
            torch.empty(2, 1 << 14, device="meta"),
        ],
    )
    def test_no_others(self, student: Tensor) -> None:
        assert kernels_for(student, self.SPEC) is None

    @pytest.mark.parametrize("how", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE", "stance", "no compiler"])
    def test_without_a_compiler_the_loss_is_the_same(
        self, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """And no chunk is worked on as a whole: step by step that would take a dozen temporaries of its size."""
        if how == "no compiler":
            monkeypatch.setattr(torch, "compile", mock.Mock(side_effect=RuntimeError("g++ not found\nand more")))
        elif how != "stance":
            monkeypatch.setenv(how, "1")
        stance = torch.compiler.set_stance("force_eager") if how == "stance" else nullcontext()
        compiled_rows._compiles.cache_clear()
        problem = Problem.draw(1 << 14, torch.float32, rows=40, padding=0)
        leaves = problem.leaves(None)
        try:
            with stance, mock.patch.object(TorchRows, "sums", autospec=True, side_effect=TorchRows.sums) as called:
                loss = linear_divergence(*leaves, **asdict(self.SPEC))
                loss.backward(problem.upstream.float())
        finally:
            compiled_rows._compiles.cache_clear()
        assert called.call_count == 4  # two blocks of at most 32 rows, forward and again for the upstream gradient
        hidden, weight, student, teacher = problem.logits()
        expected = dense_divergence(student, teacher, Case(0.5))
        assert worst(loss.detach(), expected.detach(), 1.0) < 1e-5
        for leaf, exact in zip(leaves, problem.gradients(expected, hidden, weight), strict=False):
            assert worst(grad(leaf), exact, 1.0) < 1e-5
        logged = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        reasons = {"no compiler": "g++ not found", "stance": "torch.compile does nothing in this process"}
        assert len(logged) == (1 if how in reasons else 0)
        assert all(line.endswith(reasons[how]) for line in logged)
