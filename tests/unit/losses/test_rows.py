"""The order of work: what runs while a collective is under way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from opsd_megatron.losses import TopK, linear_divergence
from opsd_megatron.losses.head import Head
from opsd_megatron.losses.rows import Steps, finished, overlapped
from opsd_megatron.losses.shard import Pending, VocabShard
from tests.distributed import run_distributed
from tests.unit.losses.linear_checks import WIDTH, Problem
from tests.unit.losses.reference import world


def test_two_tasks_are_in_flight_and_results_keep_their_order() -> None:
    done: list[str] = []

    def task(name: str) -> Steps[str]:
        for part in ("first", "second"):
            done.append(f"{name} {part}")
            yield
        done.append(f"{name} third")
        return name

    assert overlapped(task(name) for name in "abc") == ["a", "b", "c"]
    assert done == [
        *("a first", "a second"),
        *("b first", "a third", "b second"),
        *("c first", "b third", "c second", "c third"),
    ]
    assert overlapped([]) == []
    assert finished(task("d")) == "d"


@contextmanager
def recorded() -> Iterator[list[str]]:
    """What the loss starts and waits for, in order. The teacher's product comes after the student's."""
    events: list[str] = []

    def noting(owner: type, method: str, name: str) -> mock._patch[mock.Mock]:
        plain = getattr(owner, method)

        def noted(*args: object, **kwargs: object) -> object:
            events.append(name)
            return plain(*args, **kwargs)

        return mock.patch.object(owner, method, noted)

    with (
        noting(Head, "logits", "product"),
        noting(Head, "hidden_gradient", "gradient"),
        noting(VocabShard, "start_gather", "gather"),
        noting(VocabShard, "start_sum", "sum"),
        noting(Pending, "wait", "wait"),
    ):
        yield events


def _order(support: TopK | None) -> list[str]:
    hidden, weight, *teacher = Problem.draw(WIDTH, torch.float32, rows=9).leaves(world())
    weight.requires_grad_(False)
    with recorded() as events:
        linear_divergence(hidden, weight, *teacher, beta=0.5, tp_group=world(), chunk_rows=3, support=support)
    return events


@pytest.mark.parametrize("support", [None, TopK(3)])
def test_the_next_chunk_is_multiplied_while_a_collective_is_under_way(support: TopK | None) -> None:
    start = ["product", "product", "gather"]
    expected = [
        *start,
        *("wait", "sum"),
        # The second chunk's products fill the wait for the first one's sum, whose gradient fills its gather.
        *start,
        *("wait", "gradient"),
        *("wait", "sum"),
        *start,
        *("wait", "gradient"),
        *("wait", "sum"),
        *("wait", "gradient"),
        "sum",  # of the hidden gradient; backward waits for it
    ]
    assert run_distributed(_order, 2, support) == [expected, expected]


def test_one_rank_waits_for_nobody() -> None:
    """There a chunk is finished before the next begins, so that logits of one exist at a time."""
    steps = ["product", "product", "gather", "wait", "sum", "wait", "gradient"]
    assert _order(None) == [*steps * 3, "sum"]
