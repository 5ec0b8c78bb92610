"""Order, epochs and exact resume."""

from __future__ import annotations

import json

import pytest

from opsd_megatron.data.sampler import ProblemSampler
from opsd_megatron.errors import CheckpointError


def draw(sampler: ProblemSampler, steps: int) -> list[int]:
    return [index for _ in range(steps) for index in sampler.next()]


def test_golden_order() -> None:
    assert ProblemSampler(5, 7, seed=0, shuffle=False).next() == [0, 1, 2, 3, 4, 0, 1]
    # The order is part of what a seed promises: a change here changes every run.
    assert ProblemSampler(6, 12, seed=0, shuffle=True).next() == [2, 3, 1, 0, 5, 4, 2, 3, 4, 0, 5, 1]


@pytest.mark.parametrize("per_step", [1, 3, 10, 23])
def test_every_epoch_is_a_new_permutation(per_step: int) -> None:
    drawn = draw(ProblemSampler(10, per_step, seed=3, shuffle=True), 40)
    epochs = [tuple(drawn[start : start + 10]) for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 4


def test_seeds_differ_and_the_step_size_does_not_change_the_order() -> None:
    assert draw(ProblemSampler(50, 50, seed=1, shuffle=True), 1) != draw(
        ProblemSampler(50, 50, seed=2, shuffle=True), 1
    )
    assert draw(ProblemSampler(50, 5, seed=1, shuffle=True), 20) == draw(
        ProblemSampler(50, 20, seed=1, shuffle=True), 5
    )


@pytest.mark.parametrize(("num_problems", "per_step"), [(7, 3), (7, 7), (2, 9)])
def test_resume_is_exact_from_every_step(num_problems: int, per_step: int) -> None:
    sampler = ProblemSampler(num_problems, per_step, seed=5, shuffle=True)
    for _ in range(8):
        state = json.loads(json.dumps(sampler.state_dict()))
        resumed = ProblemSampler(num_problems, per_step, seed=5, shuffle=True)
        resumed.load_state_dict(state)
        assert resumed.epoch == sampler.epoch
        assert [resumed.next(), resumed.next()] == [sampler.next(), sampler.next()]


def test_epoch_is_that_of_the_next_problem() -> None:
    sampler = ProblemSampler(4, 2, seed=0, shuffle=True)
    seen = []
    for _ in range(5):
        seen.append(sampler.epoch)
        sampler.next()
    assert seen == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (ProblemSampler(9, 2, seed=0, shuffle=True), "num_problems=8, this run has num_problems=9.*data.train"),
        (ProblemSampler(8, 2, seed=1, shuffle=True), "seed=0, this run has seed=1.*train.seed"),
        (ProblemSampler(8, 2, seed=0, shuffle=False), "shuffle=1, this run has shuffle=0.*data.shuffle"),
    ],
)
def test_a_state_of_other_data_is_refused(other: ProblemSampler, words: str) -> None:
    state = ProblemSampler(8, 2, seed=0, shuffle=True).state_dict()
    before = other.state_dict()
    with pytest.raises(CheckpointError, match=words):
        other.load_state_dict(state)
    assert other.state_dict() == before
