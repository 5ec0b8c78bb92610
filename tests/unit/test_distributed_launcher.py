"""The launcher itself: results by rank, the failing rank's traceback, and nobody left behind."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_distributed


def _sum_of_ranks(offset: int) -> tuple[int, float, int]:
    value = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(value)
    return int(os.environ["RANK"]), value.item(), torch.get_num_threads()


def _second_rank_fails() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the reason")
    dist.barrier()


def _second_rank_dies() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    time.sleep(60)


def _never_returns() -> None:
    time.sleep(60)


def test_results_come_back_by_rank() -> None:
    assert run_distributed(_sum_of_ranks, 3, 10) == [(rank, 33.0, 1) for rank in range(3)]


def test_the_failing_rank_is_the_one_reported() -> None:
    with pytest.raises(AssertionError, match="ValueError: the reason") as failure:
        run_distributed(_second_rank_fails, 2)
    assert "rank 1 of 2" in str(failure.value)
    assert "rank 0 of 2" not in str(failure.value)


def test_a_dead_rank_is_reported() -> None:
    with pytest.raises(AssertionError, match="rank 1 of 2 ---\ndied with exit code 7"):
        run_distributed(_second_rank_dies, 2)


def test_a_hanging_rank_runs_into_the_timeout() -> None:
    with pytest.raises(AssertionError, match=r"ranks \[0\] of 1 did not return within 2 s"):
        run_distributed(_never_returns, 1, timeout=2.0)
