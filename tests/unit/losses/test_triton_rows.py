"""The whole loss through the Triton kernels against the dense reference, and how rows are cut up for them.

Without a GPU ``TestWholeLoss`` runs in the process that ``test_triton_kernels.py`` starts for Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

from opsd_megatron.losses.row_losses import DivergenceLoss
from tests.distributed import run_distributed
from tests.unit.losses.kernel_checks import (
    check_cases,
    check_equal_sides,
    check_extras,
    check_shard_without_probability,
)

pytest.importorskip("triton", reason="the kernels need triton, which CUDA builds of torch bring along")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


@contextmanager
def through_kernels() -> Iterator[None]:
    """Every block of logits goes through the kernels, on CPU as well, in several pieces of several small blocks."""
    from opsd_megatron.losses import triton_rows

    def block(task: DivergenceLoss, student: Tensor, teacher: Tensor, targets: Tensor | None, rows: slice) -> object:
        targets = None if targets is None else targets[rows]
        return triton_rows.TritonRows(student[rows], teacher[rows], task.spec, task.shard, targets)

    with (
        mock.patch.object(DivergenceLoss, "_block", block),
        mock.patch.object(triton_rows, "BLOCK", 64),
        mock.patch.object(triton_rows, "PROGRAMS", 4),
    ):
        yield


class TestWholeLoss:
    __test__ = DEVICE == "cuda" or INTERPRETED

    def test_cases_on_one_rank(self) -> None:
        check_cases(through_kernels, DEVICE, every=2)  # two ranks have them all

    def test_equal_sides_on_one_rank(self) -> None:
        check_equal_sides(through_kernels, DEVICE, every=3)

    def test_extras_on_one_rank(self) -> None:
        check_extras(through_kernels, DEVICE)

    def test_pieces_without_probability(self) -> None:
        check_shard_without_probability(through_kernels, DEVICE)

    @pytest.mark.skipif(DEVICE == "cuda", reason="two ranks of one group need a GPU each")
    @pytest.mark.parametrize("check", [check_cases, check_equal_sides, check_extras, check_shard_without_probability])
    def test_on_two_ranks(self, check: Callable[..., None]) -> None:
        run_distributed(check, 2, through_kernels, DEVICE)


class TestCuts:
    """How rows are cut into pieces; runs anywhere, no kernel involved."""

    @pytest.mark.parametrize("rows", [1, 2, 100, 768, 2047, 2048, 5000])
    @pytest.mark.parametrize("columns", [0, 1, 1024, 1025, 18992, 151936])
    def test_pieces_cover_the_columns_with_none_empty(self, rows: int, columns: int) -> None:
        from opsd_megatron.losses.triton_rows import BLOCK, PROGRAMS, _cut

        pieces, piece = _cut(rows, columns)
        assert piece % BLOCK == 0
        assert (pieces - 1) * piece < max(columns, 1) <= pieces * piece
        assert pieces == 1 or rows * pieces < 2 * PROGRAMS

    @pytest.mark.parametrize(("rows", "pieces", "blocks"), [(768, 3, 50), (128, 15, 10), (1, 149, 1), (2048, 1, 149)])
    def test_few_rows_are_many_programs(self, rows: int, pieces: int, blocks: int) -> None:
        from opsd_megatron.losses.triton_rows import BLOCK, _cut

        assert _cut(rows, 151_936) == (pieces, blocks * BLOCK)
