"""The plan's promises as properties, and packed tensors against golden values."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_megatron.data.packing import PackingLayout, pack, packing_efficiency, plan_micro_batches
from opsd_megatron.types import AlignedSample, PackedSequences


def sample(student: int, teacher: int | None, response: int, first_id: int = 0) -> AlignedSample:
    """A sample of the given lengths whose tokens are all different."""
    ids = iter(range(first_id, first_id + 10_000))
    return AlignedSample(
        student_prompt_ids=tuple(next(ids) for _ in range(student)),
        teacher_prompt_ids=None if teacher is None else tuple(next(ids) for _ in range(teacher)),
        response_ids=tuple(next(ids) for _ in range(response)),
    )


lengths = st.tuples(st.integers(1, 30), st.integers(1, 60), st.integers(1, 40))
sample_lists = st.lists(lengths.map(lambda n: sample(*n)), max_size=40)


@settings(max_examples=150, deadline=None)
@given(sample_lists, st.integers(1, 5), st.integers(2, 300))
def test_plan_properties(samples: list[AlignedSample], dp_size: int, token_budget: int) -> None:
    plan = plan_micro_batches(samples, dp_size=dp_size, token_budget=token_budget)
    assert len(plan) == dp_size
    counts = {len(rank) for rank in plan}
    assert len(counts) == 1 and counts.pop() >= 1
    assert sorted(i for rank in plan for batch in rank for i in batch) == list(range(len(samples)))
    for batch in (batch for rank in plan for batch in rank):
        if len(batch) > 1:
            assert sum(samples[i].student_tokens for i in batch) <= token_budget
            assert sum(samples[i].teacher_tokens for i in batch) <= token_budget
    assert plan == plan_micro_batches(list(samples), dp_size=dp_size, token_budget=token_budget)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(lengths.map(lambda n: sample(*n)), min_size=1, max_size=40),
    st.integers(1, 4),
    st.sampled_from([50, 10**9]),
)
def test_plan_is_balanced(samples: list[AlignedSample], dp_size: int, token_budget: int) -> None:
    """Whatever the budget, ranks differ by at most one sample's work: the bound of greedy assignment."""
    work = [3 * s.student_tokens + s.teacher_tokens for s in samples]
    plan = plan_micro_batches(samples, dp_size=dp_size, token_budget=token_budget)
    loads = [sum(work[i] for batch in rank for i in batch) for rank in plan]
    assert max(loads) - min(loads) <= max(work)


def test_plan_golden() -> None:
    samples = [sample(2, 6, 4), sample(3, 3, 2), sample(20, 40, 10), sample(2, 6, 4), sample(1, 2, 1)]
    # Teacher sides: 10, 5, 50 (over the budget of 16: alone), 10, 3.
    assert plan_micro_batches(samples, dp_size=1, token_budget=16) == [[[0, 1], [2], [3, 4]]]
    assert plan_micro_batches(samples, dp_size=2, token_budget=16) == [[[2], []], [[0, 1], [3, 4]]]


def test_plan_in_groups_for_interleaved_pipelines() -> None:
    samples = [sample(2, 6, 4)] * 5
    for multiple, count in ((1, 3), (2, 4), (4, 4), (5, 5)):
        (plan,) = plan_micro_batches(samples, dp_size=1, token_budget=20, count_multiple_of=multiple)
        assert len(plan) == count
        assert sorted(index for batch in plan for index in batch) == list(range(5))


def test_efficiency_by_hand() -> None:
    """Student sides of 6 and 3 tokens (work 18 and 9), teacher sides of 10 and 5: 28 and 14 in all, 42."""
    samples = [sample(2, 6, 4), sample(1, 3, 2)]
    assert packing_efficiency(samples, [[[0, 1]]], with_teacher=True) == 1.0
    assert packing_efficiency(samples, [[[0]], [[1]]], with_teacher=True) == 42 / (2 * 28)
    # The empty micro-batch has two tokens on each side.
    assert packing_efficiency(samples, [[[0, 1], []]], with_teacher=True) == 42 / 50
    # Sides of 8 + 4 and 12 + 8 tokens, then 16 and 24.
    assert packing_efficiency(samples, [[[0, 1]]], with_teacher=True, layout=PackingLayout(4, 4)) == 42 / (3 * 12 + 20)
    padded = packing_efficiency(samples, [[[0, 1]]], with_teacher=True, layout=PackingLayout(4, 8))
    assert padded == 42 / (3 * 16 + 24)
    alone = [AlignedSample(s.student_prompt_ids, None, s.response_ids) for s in samples]
    assert packing_efficiency(alone, [[[0], [1]]], with_teacher=False, layout=PackingLayout(1, 2)) == 27 / 30


def test_efficiency_of_ranks_that_meet_in_every_micro_batch() -> None:
    """Equal sums, 28 + 14 and 14 + 28, of which each rank waits for the larger one twice."""
    samples = [sample(2, 6, 4), sample(1, 3, 2)] * 2
    plan = [[[0], [1]], [[3], [2]]]
    assert packing_efficiency(samples, plan, with_teacher=True) == 1.0
    assert packing_efficiency(samples, plan, with_teacher=True, in_step=True) == 84 / (2 * (28 + 28))


@pytest.mark.parametrize(
    ("dp", "problems", "sequence_multiple_of", "multiple_of"),
    [(4, 32, 1, 1), (8, 64, 1, 8), (8, 128, 4, 16), (16, 256, 16, 64)],
)
def test_realistic_lengths_leave_little_idle(
    dp: int, problems: int, sequence_multiple_of: int, multiple_of: int
) -> None:
    """Mathematics: prompts of some hundred tokens, references of several hundred, responses up to 2,048.

    The multiples are those of tp 8 with sequence parallelism, of cp 2 with tp 8, and of cp 8 with tp 8.
    """
    for seed in range(5):
        draw = random.Random(seed)

        def length(median: int, spread: float, most: int, draw: random.Random = draw) -> int:
            return max(1, min(most, round(draw.lognormvariate(0, spread) * median)))

        samples = [
            sample(prompt, prompt + length(500, 0.7, 4096), length(700, 0.7, 2048))
            for prompt in [length(120, 0.4, 1024) for _ in range(problems)]
        ]
        plan = plan_micro_batches(samples, dp_size=dp, token_budget=16384)
        layout = PackingLayout(sequence_multiple_of, multiple_of)
        assert packing_efficiency(samples, plan, with_teacher=True, layout=layout) >= 0.95
        # And it counts what pack() makes.
        slots = [
            sum(
                3 * batch.student.ids.numel() + (0 if batch.teacher is None else batch.teacher.ids.numel())
                for indices in rank
                for batch in [pack([samples[i] for i in indices], with_teacher=True, layout=layout)]
            )
            for rank in plan
        ]
        useful = sum(3 * s.student_tokens + s.teacher_tokens for s in samples)
        assert packing_efficiency(samples, plan, with_teacher=True, layout=layout) == useful / (dp * max(slots))


def test_plan_without_samples_gives_every_rank_an_empty_micro_batch() -> None:
    assert plan_micro_batches([], dp_size=3, token_budget=8) == [[[]], [[]], [[]]]


def test_plan_of_many_near_full_samples_is_quick() -> None:
    samples = [sample(30, None, 31 + i % 3) for i in range(1000)]
    plan = plan_micro_batches(samples, dp_size=4, token_budget=100)
    assert [len(rank) for rank in plan] == [250] * 4


def test_pack_golden() -> None:
    first = AlignedSample((10, 11), (20, 21, 22), (7, 8), row_weight=0.5, engine_log_probs=(-1.0, -2.0), advantage=-1.5)
    second = AlignedSample((12,), (23, 24), (9,), row_weight=2.0)
    batch = pack([first, second], with_teacher=True)
    assert batch.teacher is not None
    assert batch.student.ids.tolist() == [10, 11, 7, 8, 12, 9]
    assert batch.student.positions.tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.student.cu_seqlens.tolist() == [0, 4, 6]
    assert batch.student.max_seqlen == 4
    assert batch.student.rows.tolist() == [1, 2, 4]
    assert batch.teacher.ids.tolist() == [20, 21, 22, 7, 8, 23, 24, 9]
    assert batch.teacher.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.teacher.cu_seqlens.tolist() == [0, 5, 8]
    assert batch.teacher.max_seqlen == 5
    assert batch.teacher.rows.tolist() == [2, 3, 6]
    assert batch.response_ids.tolist() == [7, 8, 9]
    assert batch.row_weights.tolist() == [0.5, 0.5, 2.0]
    assert batch.advantages.tolist() == [-1.5, -1.5, 0.0] and batch.old_log_probs is None
    assert batch.engine_log_probs[:2].tolist() == [-1.0, -2.0] and batch.engine_log_probs[2].isnan()
    assert [t.dtype for t in (batch.student.ids, batch.student.positions, batch.student.rows)] == [torch.int64] * 3
    assert batch.student.cu_seqlens.dtype == torch.int32
    assert batch.row_weights.dtype == batch.engine_log_probs.dtype == torch.float32


def test_filler_ends_each_side_and_carries_no_loss() -> None:
    batch = pack(
        [AlignedSample((10, 11), (20, 21, 22), (7, 8))], with_teacher=True, layout=PackingLayout(1, 4), pad_id=99
    )
    assert batch.teacher is not None
    assert batch.student.ids.tolist() == [10, 11, 7, 8]  # already a multiple: no filler
    assert batch.student.cu_seqlens.tolist() == [0, 4]
    assert batch.teacher.ids.tolist() == [20, 21, 22, 7, 8, 99, 99, 99]
    assert batch.teacher.cu_seqlens.tolist() == [0, 5, 8]
    assert batch.teacher.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.num_rows == 2


@pytest.mark.parametrize(("multiple_of", "tokens"), [(1, 2), (2, 2), (3, 3), (8, 8)])
def test_empty_micro_batch(multiple_of: int, tokens: int) -> None:
    batch = pack([], with_teacher=True, layout=PackingLayout(1, multiple_of), pad_id=5)
    assert batch.teacher is not None
    for side in (batch.student, batch.teacher):
        assert side.ids.tolist() == [5] * tokens
        assert side.cu_seqlens.tolist() == [0, tokens]
        assert side.positions.tolist() == list(range(tokens))
        assert side.max_seqlen == tokens
        assert side.rows.shape == (0,) and side.rows.dtype == torch.int64
    assert batch.num_rows == 0
    assert batch.row_weights.shape == batch.engine_log_probs.shape == (0,)
    assert batch.row_weights.dtype == torch.float32


def test_padding_ends_each_sequence_and_carries_no_loss() -> None:
    samples = [AlignedSample((10, 11), None, (7, 8, 9)), AlignedSample((12,), None, (6,))]
    batch = pack(samples, with_teacher=False, layout=PackingLayout(4, 16), pad_id=99)
    assert batch.student.ids.tolist() == [10, 11, 7, 8, 9, 99, 99, 99, 12, 6, 99, 99, 99, 99, 99, 99]
    assert batch.student.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.student.cu_seqlens.tolist() == [0, 8, 12, 16]
    assert batch.student.rows.tolist() == [1, 2, 3, 8]
    assert batch.response_ids.tolist() == [7, 8, 9, 6]


@settings(max_examples=80, deadline=None)
@given(sample_lists, st.sampled_from([1, 2, 4, 7]), st.booleans())
def test_pack_properties(samples: list[AlignedSample], multiple_of: int, with_teacher: bool) -> None:
    batch = pack(samples, with_teacher=with_teacher, layout=PackingLayout(1, multiple_of))
    assert (batch.teacher is not None) == with_teacher
    prompts = [("student", [s.student_prompt_ids for s in samples], batch.student)]
    if batch.teacher is not None:
        prompts.append(("teacher", [s.teacher_prompt_ids or () for s in samples], batch.teacher))
    for _, side_prompts, side in prompts:
        assert side.ids.numel() % multiple_of == 0
        for i, (prompt, one) in enumerate(zip(side_prompts, samples, strict=True)):
            start, end = side.cu_seqlens[i : i + 2].tolist()
            assert tuple(side.ids[start:end].tolist()) == prompt + one.response_ids
            assert side.positions[start:end].tolist() == list(range(end - start))
        assert side.cu_seqlens[-1].item() == side.ids.numel()
        assert len(side.cu_seqlens) - 1 - len(samples) in (0, 1)  # at most one filler sequence
        assert side.max_seqlen == side.cu_seqlens.diff().max().item()
        assert torch.equal(side.ids[side.rows + 1], batch.response_ids)
    assert batch.num_rows == sum(len(s.response_ids) for s in samples)


def test_pack_checks_the_invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    from opsd_megatron.data import packing

    right = packing._sequences

    def off_by_one(*args: object) -> PackedSequences:
        side = right(*args)  # type: ignore[arg-type]
        return PackedSequences(side.ids, side.positions, side.cu_seqlens, side.max_seqlen, side.rows - 1)

    monkeypatch.setattr(packing, "_sequences", off_by_one)
    with pytest.raises(AssertionError, match="student rows"):
        pack([sample(3, None, 2)], with_teacher=False)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (AlignedSample((), (1,), (2,)), "at least one prompt token"),
        (AlignedSample((1,), (1,), ()), "one response token"),
        (AlignedSample((1,), None, (2,)), "teacher prompt"),
        (AlignedSample((1,), (1,), (2, 3), engine_log_probs=(-1.0,)), "1 engine log-probs for a response of 2"),
        (AlignedSample((1,), (1,), (2, 3), token_weights=(1.0,)), "1 token weights for a response of 2"),
    ],
)
def test_pack_refuses_broken_samples(bad: AlignedSample, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack([bad], with_teacher=True)
