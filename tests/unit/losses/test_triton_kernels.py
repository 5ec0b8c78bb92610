"""The Triton kernels against float64, on a GPU or in Triton's interpreter.

The interpreter has to be asked for before triton is first imported and leaves triton's library patched, so without a
GPU ``TestKernels`` runs in a process of its own, which ``test_kernels_in_the_interpreter`` starts, and with it the
whole loss through the kernels, ``test_triton_rows.py``.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from opsd_megatron.losses.divergences import ClipMode, DivergenceSpec
from tests.unit.losses.kernel_reference import (
    DEVICE,
    EPS,
    INTERPRETED,
    TOLERANCE,
    exact_terms,
    extreme_logits,
    in_rows_of,
    logits,
    merge,
    merged_normaliser,
    normaliser_of,
    reference_sums,
    spec_of,
)
from tests.unit.losses.reference import BETAS, TEMPERATURES, Case, dense_divergence, worst

pytest.importorskip("triton", reason="the kernels need triton, which CUDA builds of torch bring along")

# The modes that clip whole rows are unclipped for the kernels; `bregman` without a clip still has its own terms.
CASES = [
    *(Case(beta, 1.0) for beta in BETAS),
    *(Case(0.5, temperature) for temperature in (0.7, 1.1)),
    *(Case(beta, 1.1, 0.05) for beta in BETAS),
    *(Case(beta, 0.7, 1e-3, "bregman") for beta in (0.0, 0.5, 1.0)),
    Case(0.0, 1.1, 1e-6),
    Case(0.0, 1.0, None, "bregman"),
    Case(1.0, 0.7, None, "bregman"),
    Case(0.0, 1.0, 1e-3, "rescale"),
    Case(0.5, 0.7, 1e-3, "token"),
]
MODES_OF_TERMS: tuple[ClipMode, ...] = ("entry", "bregman")
NEAR = [*(Case(beta) for beta in BETAS), *(Case(beta, clip_mode="bregman") for beta in (0.0, 1.0))]
HALVES = ((0, 150), (150, 300))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Their launchers, with blocks so small that a few hundred columns are several blocks in several pieces."""
    from opsd_megatron.losses import triton_rows

    monkeypatch.setattr(triton_rows, "BLOCK", 128)
    monkeypatch.setattr(triton_rows, "PROGRAMS", 4)
    return triton_rows


def test_kernels_in_the_interpreter() -> None:
    files = [__file__, str(Path(__file__).with_name("test_triton_rows.py"))]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[3]
    child = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stdout + child.stderr


test_kernels_in_the_interpreter.__test__ = DEVICE == "cpu" and not INTERPRETED  # type: ignore[attr-defined]


class TestKernels:
    __test__ = DEVICE == "cuda" or INTERPRETED

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_sums_and_gradient_are_those_of_float64(self, kernels: ModuleType, case: Case) -> None:
        rows, columns = 2, 301
        student, teacher = logits(rows, columns, seed=CASES.index(case))
        weights = torch.tensor([1.0, 0.3], device=DEVICE)
        normaliser = normaliser_of(student, teacher, case.temperature)
        s, t = (torch.log_softmax(side.double() / case.temperature, 1) for side in (student, teacher))

        sums = kernels.row_sums(student, teacher, normaliser, spec_of(case))
        expected = reference_sums(s, t, case)
        assert sums.dtype == torch.float32
        for row in (0, 1, 2, 4, 5, 6, 7, 8):
            assert worst(sums[row], expected[row], unit=1.0) < TOLERANCE * max(1, float(expected[row].abs().max()))
        assert torch.equal(sums[3].double(), expected[3])
        if spec_of(case).entry_clip is None:
            assert torch.equal(sums[2], sums[0])
            assert not sums[3:5].any()

        # Autograd knows the gradient of a weighted loss without any slope.
        unclipped_rows = Case(case.beta, case.temperature, spec_of(case).entry_clip, case.clip_mode)
        leaf = student.double().requires_grad_()
        (dense_divergence(leaf, teacher, unclipped_rows) * weights).sum().backward()
        assert leaf.grad is not None
        teacher_before = teacher.clone()
        factor = weights / case.temperature
        kernels.write_gradient_(student, teacher, normaliser, factor, factor * sums[1], spec_of(case))
        scale = weights.unsqueeze(1) * (s.exp() + t.exp()) * (1 + (s - t).abs()) / case.temperature
        assert ((student - leaf.grad).abs() <= TOLERANCE * scale).all()
        assert torch.equal(teacher, teacher_before)

    @pytest.mark.parametrize("distance", [1e-3, 1e-5])
    @pytest.mark.parametrize("case", NEAR, ids=str)
    def test_nearly_equal_sides(self, kernels: ModuleType, case: Case, distance: float) -> None:
        # Log-probabilities in place of logits, and a normaliser of zeros: what is measured is the maths of an entry,
        # free of the rounding of log-probabilities that comes before it.
        student = torch.log_softmax(logits(2, 101)[0], 1)
        teacher = student + distance * torch.randn(2, 101, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        nothing, one = torch.zeros(4, 2, device=DEVICE), torch.ones(2, device=DEVICE)
        value, slope = exact_terms(student, teacher, case)

        sums = kernels.row_sums(student, teacher, nothing, spec_of(case))
        s, t = student.double(), teacher.double()
        p = s.exp()
        if case.beta in (0, 1) and case.clip_mode != "bregman":
            # Signed terms of the first order in the distance, each rounded, sum to one of the second.
            first_order = (p * (s - t).abs()).sum(1)
            assert ((sums[0] - value.sum(1)).abs() < 4 * EPS * first_order).all()
        else:
            assert worst(sums[0], value.sum(1)) < 1e-6
        kernels.write_gradient_(student, teacher, nothing, one, 0 * one, spec_of(case))
        # A difference of two probabilities keeps their absolute accuracy, everything else the relative one. CUDA's
        # exponential rounds its argument, times log2(e), and then has two bits less than the full precision.
        allowed = EPS * (4 + s.abs()) * p if case.beta == 0 else 4e-6 * slope.abs()
        assert ((student - slope).abs() <= allowed).all()

    @pytest.mark.parametrize(
        "case", [Case(0.5), Case(0.0, clip_mode="bregman"), Case(1.0, clip_mode="bregman")], ids=str
    )
    def test_single_entries_from_near_to_far(self, kernels: ModuleType, case: Case) -> None:
        # A row for each entry, through every branch of the formulas and close to where they meet.
        x = torch.tensor([1e-4, 0.01, 0.1, 0.2, 0.28, 0.29, 0.4, 0.499, 0.501, 0.69, 0.7, 1.0, 3.0], device=DEVICE)
        teacher = torch.cat([x, -x]).unsqueeze(1)
        student = torch.zeros_like(teacher)
        nothing = torch.zeros(4, len(teacher), device=DEVICE)
        sums = kernels.row_sums(student, teacher, nothing, spec_of(case))
        value, slope = (exact.squeeze(1) for exact in exact_terms(student, teacher, case))
        t = teacher.double().squeeze(1)
        # Three roundings, and those of CUDA's exponential, see above.
        digits = EPS * (5 + t.abs())
        # Up to 0.5 apart every digit counts; from there on the value is a sum of numbers as large as the probabilities.
        unit = torch.where(t.abs() < 0.5, value, 1 + t.exp())
        assert ((sums[0] - value).abs() <= digits * unit).all()
        unit = 1 + t.exp() if case.beta == 0 else slope.abs()
        assert ((sums[1] - slope).abs() <= digits * unit).all()

    @pytest.mark.parametrize(("beta", "temperature"), [*((beta, 0.7) for beta in BETAS), (0.5, 1.0)])
    def test_equal_sides_give_exactly_nothing(self, kernels: ModuleType, beta: float, temperature: float) -> None:
        student, _ = logits(2, 301, scale=5.0)
        student[0, ::7] = -torch.inf
        student[1, 1:] = -1e4
        teacher = student.clone()
        statistics = kernels.row_statistics(student, teacher, temperature=temperature, local_targets=None)
        assert torch.equal(statistics[:, [0, 1, 5, 7]], statistics[:, [2, 3, 6, 8]])
        assert (merge(statistics)["agreement"] == 1).all()
        normaliser = normaliser_of(student, teacher, temperature)
        nothing, one = torch.zeros(2, device=DEVICE), torch.ones(2, device=DEVICE)
        for mode in MODES_OF_TERMS:
            spec = DivergenceSpec(beta, temperature, 0.05, mode)
            sums = kernels.row_sums(student, teacher, normaliser, spec)
            assert not sums[[0, 1, 2, 3, 4, 7, 8]].any()
            assert torch.equal(sums[5], sums[6])
            gradient = student.clone()
            kernels.write_gradient_(gradient, teacher, normaliser, one, nothing, spec)
            assert not gradient.any()

    @pytest.mark.parametrize(
        ("rows", "columns", "temperature"),
        [(1, 1, 1.1), (1, 512, 0.7), (2, 128, 1.0), *((3, 301, temperature) for temperature in TEMPERATURES)],
    )
    def test_statistics_merge_to_the_whole(
        self, kernels: ModuleType, rows: int, columns: int, temperature: float
    ) -> None:
        student, teacher = logits(rows, columns, seed=rows)
        teacher[0] = student[0]
        targets = torch.arange(rows, device=DEVICE) * 97 % columns
        targets[-1] = columns - 1
        statistics = kernels.row_statistics(student, teacher, temperature=temperature, local_targets=targets)
        pieces = {1: 1, 512: 4, 128: 1, 301: 2}[columns]
        assert statistics.shape == (pieces, 10, rows)
        merged = merge(statistics)
        assert torch.equal(merged["student_max"].float(), student.amax(1))
        assert torch.equal(merged["teacher_max"].float(), teacher.amax(1))
        assert torch.equal(merged["agreement"] == 1, student.argmax(1) == teacher.argmax(1))
        assert (merged["held"] == 1).all()
        normaliser = merged_normaliser(statistics, temperature)
        assert worst(normaliser, normaliser_of(student, teacher, temperature).double(), unit=1.0) < TOLERANCE
        for name, side in (("student", student), ("teacher", teacher)):
            actual = merged[f"{name}_target"] - merged[f"{name}_unit_log_sum"]
            expected = torch.log_softmax(side.double(), 1).gather(1, targets.unsqueeze(1)).squeeze(1)
            assert worst(actual, expected, unit=1.0) < TOLERANCE

    def test_every_piece_is_that_of_its_columns(self, kernels: ModuleType) -> None:
        student, teacher = logits(2, 301)
        targets = torch.tensor([10, 300], device=DEVICE)
        whole = kernels.row_statistics(student, teacher, temperature=0.7, local_targets=targets)
        # Four programs for two rows: two pieces of three blocks, two blocks in the first.
        assert whole.shape[0] == 2
        for number, begin in enumerate((0, 256)):
            columns = slice(begin, begin + 256)
            part = kernels.row_statistics(
                student[:, columns], teacher[:, columns], temperature=0.7, local_targets=targets - begin
            )
            assert torch.equal(part[:, 9].sum(0), whole[number, 9])
            assert torch.equal(part[:, 0].amax(0), whole[number, 0])
            assert torch.equal(part[:, 2].amax(0), whole[number, 2])
            assert worst(merged_normaliser(part, 0.7), merged_normaliser(whole[number : number + 1], 0.7)) < TOLERANCE

    def test_halves_of_two_ranks_merge_to_one_normaliser(self, kernels: ModuleType) -> None:
        student, teacher = logits(3, 300)
        teacher[0] = student[0]
        targets = torch.tensor([149, 150, 299], device=DEVICE)
        halves = []
        for begin, end in ((0, 150), (150, 300)):
            local = torch.where((targets >= begin) & (targets < end), targets - begin, -1)
            columns = slice(begin, end)  # Slices, so rows are 300 apart where only 150 columns are this rank's.
            halves.append(
                kernels.row_statistics(student[:, columns], teacher[:, columns], temperature=1.1, local_targets=local)
            )
        both = torch.cat(halves)
        expected = normaliser_of(student, teacher, 1.1).double()
        assert worst(merged_normaliser(both, 1.1), expected, unit=1.0) < TOLERANCE
        merged = merge(both)
        assert (merged["held"] == 1).all()
        assert halves[0][:, 9].sum(0).tolist() == [1, 0, 0]
        assert torch.equal(merged["agreement"] == 1, student.argmax(1) == teacher.argmax(1))
        # And the sums: those of both halves are those of the whole.
        spec = DivergenceSpec(0.5, 1.1, 1e-3)
        parts = [kernels.row_sums(student[:, a:b], teacher[:, a:b], expected.float(), spec) for a, b in HALVES]
        whole = kernels.row_sums(student, teacher, expected.float(), spec)
        assert worst(parts[0] + parts[1], whole) < TOLERANCE

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_maxima_in_different_columns_or_pieces_do_not_agree(self, kernels: ModuleType, temperature: float) -> None:
        student, teacher = torch.zeros(4, 301, device=DEVICE), torch.zeros(4, 301, device=DEVICE)
        for row, (student_top, teacher_top) in enumerate([(3, 3), (3, 131), (131, 3), (3, 299)]):
            student[row, student_top] = teacher[row, teacher_top] = 2.0
        statistics = kernels.row_statistics(student, teacher, temperature=temperature, local_targets=None)
        assert merge(statistics)["agreement"].tolist() == [1, 0, 0, 0]
        # A tie for the largest logit agrees with either.
        student[1, 131] = 2.0
        statistics = kernels.row_statistics(student, teacher, temperature=temperature, local_targets=None)
        assert merge(statistics)["agreement"].tolist() == [1, 1, 0, 0]

    def test_rows_may_be_further_apart_than_their_columns(self, kernels: ModuleType) -> None:
        student, teacher = logits(3, 301)
        targets = torch.tensor([0, 150, 300], device=DEVICE)
        spec = DivergenceSpec(0.1, 0.7, 1e-3)
        normaliser = normaliser_of(student, teacher, 0.7)
        factor, shift = torch.randn(2, 3, device=DEVICE)
        far_student, far_teacher = in_rows_of(student, 317), in_rows_of(teacher, 333)
        for function in (
            lambda s, t: kernels.row_statistics(s, t, temperature=0.7, local_targets=targets),
            lambda s, t: kernels.row_sums(s, t, normaliser, spec),
        ):
            assert torch.equal(function(far_student, far_teacher), function(student, teacher))
        # The small inputs may be slices of something larger as well.
        sparse = normaliser.repeat_interleave(2, 1)[:, ::2]
        kernels.write_gradient_(far_student, far_teacher, sparse, factor, shift, spec)
        kernels.write_gradient_(student, teacher, normaliser, factor, shift, spec)
        assert torch.equal(far_student, student)
        # Nothing is written between the rows.
        assert (far_student.as_strided((3, 16), (317, 1), 301) == 7).all()

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_statistics_of_extreme_logits(
        self, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, temperature: float
    ) -> None:
        monkeypatch.setattr(kernels, "PROGRAMS", 8)
        student, teacher = extreme_logits()
        targets = torch.tensor([290, 0, 3, 100], device=DEVICE)
        statistics = kernels.row_statistics(student, teacher, temperature=temperature, local_targets=targets)
        assert not statistics.isnan().any()
        assert statistics.shape[0] == 2
        assert statistics[0, [0, 1, 4, 5], 3].tolist() == [-math.inf, 0, 0, 0]
        normaliser = normaliser_of(student, teacher, temperature).double()
        assert worst(merged_normaliser(statistics, temperature), normaliser, unit=1.0) < TOLERANCE
        merged = merge(statistics)
        assert not merged["agreement"].any()
        actual = merged["student_target"] - merged["student_unit_log_sum"]
        expected = torch.log_softmax(student.double(), 1).gather(1, targets.unsqueeze(1)).squeeze(1)
        assert expected.isinf().tolist() == [False, True, False, True]
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=TOLERANCE)

    def test_the_lowest_number_is_a_logit_like_any_other(self, kernels: ModuleType) -> None:
        lowest = torch.finfo(torch.float32).min
        student, teacher = torch.full((1, 301), lowest, device=DEVICE), torch.zeros(1, 301, device=DEVICE)
        student[0, :256] = -torch.inf
        statistics = kernels.row_statistics(student, teacher, temperature=0.7, local_targets=None)
        assert statistics[:, 0, 0].tolist() == [-math.inf, -math.inf, lowest]
        assert statistics[:, 1, 0].tolist() == statistics[:, 5, 0].tolist() == [0, 0, 45]
        assert statistics[:, 4, 0].tolist() == [0, 0, 1]

    @pytest.mark.parametrize("beta", BETAS)
    def test_extreme_logits_stay_finite(self, kernels: ModuleType, beta: float) -> None:
        student, teacher = extreme_logits()
        normaliser = normaliser_of(student, teacher, 0.7)
        for clip, mode in ((None, "entry"), (0.05, "entry"), (0.05, "bregman")):
            spec = DivergenceSpec(beta, 0.7, clip, mode)
            sums = kernels.row_sums(student, teacher, normaliser, spec)
            assert sums.isfinite().all()
            gradient = student.clone()
            kernels.write_gradient_(gradient, teacher, normaliser, torch.ones(4, device=DEVICE), sums[1], spec)
            assert gradient.isfinite().all()
            # Disjoint one-hots: no entropy, each KL is the distance of the logits, and between them nothing but beta.
            assert sums[5:7, 0].tolist() == [0, 0]
            assert sums[7:9, 0].tolist() == pytest.approx([2e4 / 0.7] * 2, rel=1e-6)
            if 0 < beta < 1:
                expected = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
                assert sums[0, 0].item() == pytest.approx(expected, rel=1e-6)

    def test_an_entry_without_probability_adds_exactly_nothing(self, kernels: ModuleType) -> None:
        student, teacher = logits(2, 100)
        normaliser = normaliser_of(student, teacher, 1.0)
        padded = [torch.cat([side, side.new_full((2, 28), -torch.inf)], 1) for side in (student, teacher)]
        for beta in (0.0, 0.5, 1.0):
            spec = DivergenceSpec(beta, 1.0, 1e-3)
            assert torch.equal(
                kernels.row_sums(*padded, normaliser, spec), kernels.row_sums(student, teacher, normaliser, spec)
            )

    @pytest.mark.parametrize(("bad", "column"), [(math.nan, 0), (math.nan, 200), (math.inf, 200), (math.inf, 300)])
    def test_a_logit_that_is_no_number_marks_its_side(self, kernels: ModuleType, bad: float, column: int) -> None:
        student, teacher = logits(3, 301)
        student[0, column] = bad
        teacher[1, column] = bad
        statistics = kernels.row_statistics(student, teacher, temperature=0.7, local_targets=None)
        maxima = statistics[:, [0, 2]].amax(0)
        assert torch.equal(maxima == torch.inf, torch.tensor([[1, 0, 0], [0, 1, 0]], device=DEVICE).bool())
        assert torch.equal(maxima[:, 2], torch.stack([student[2].amax(), teacher[2].amax()]))

    def test_an_empty_shard_adds_nothing(self, kernels: ModuleType) -> None:
        student, teacher = logits(3, 0)
        targets = torch.full((3,), -1, device=DEVICE)
        statistics = kernels.row_statistics(student, teacher, temperature=0.7, local_targets=targets)
        assert (statistics[:, [0, 2]] == -torch.inf).all()
        assert not statistics[:, [1, *range(3, 10)]].any()
        spec = DivergenceSpec(0.5, 0.7, 0.05)
        nothing = torch.zeros(4, 3, device=DEVICE)
        assert torch.equal(kernels.row_sums(student, teacher, nothing, spec), torch.zeros(9, 3, device=DEVICE))
        kernels.write_gradient_(student, teacher, nothing, nothing[0], nothing[1], spec)

    def test_targets_outside_of_the_shard_are_not_held(self, kernels: ModuleType) -> None:
        student, teacher = logits(4, 301)
        targets = torch.tensor([-1, 301, 1 << 40, 5], device=DEVICE)
        statistics = kernels.row_statistics(student, teacher, temperature=1.0, local_targets=targets)
        assert statistics[:, 9].sum(0).tolist() == [0, 0, 0, 1]
        assert not statistics[:, 7:, :3].any()
        without = kernels.row_statistics(student, teacher, temperature=1.0, local_targets=None)
        assert torch.equal(without[:, :7], statistics[:, :7])
        assert not without[:, 7:].any()

    def test_the_constants_in_use(self) -> None:
        from opsd_megatron.losses import triton_rows

        student, teacher = logits(2, 2 * triton_rows.BLOCK + 77)
        spec = DivergenceSpec(0.5, 1.1, 1e-3)
        statistics = triton_rows.row_statistics(student, teacher, temperature=1.1, local_targets=None)
        normaliser = normaliser_of(student, teacher, 1.1)
        assert worst(merged_normaliser(statistics, 1.1), normaliser.double(), unit=1.0) < TOLERANCE
        s, t = (torch.log_softmax(side.double() / 1.1, 1) for side in (student, teacher))
        sums = triton_rows.row_sums(student, teacher, normaliser, spec)
        expected = reference_sums(s, t, Case(0.5, 1.1, 1e-3))
        assert worst(sums[[0, 2, 5, 6, 7, 8]], expected[[0, 2, 5, 6, 7, 8]], unit=1.0) < 2 * TOLERANCE

    def test_inputs_that_a_kernel_would_misread_are_refused(self, kernels: ModuleType) -> None:
        student, teacher = logits(2, 64)
        with pytest.raises(ValueError, match=r"teacher is torch\.bfloat16"):
            kernels.row_statistics(student, teacher.bfloat16(), temperature=1.0, local_targets=None)
        with pytest.raises(ValueError, match=r"teacher is torch\.float32 \(2, 63\)"):
            kernels.row_sums(student, teacher[:, 1:], torch.zeros(4, 2), DivergenceSpec(0.5))
        with pytest.raises(ValueError, match="student has strides"):
            kernels.row_statistics(student.t(), teacher.t(), temperature=1.0, local_targets=None)
