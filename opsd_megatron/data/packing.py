"""From samples to micro-batches: who computes which sample, and the sequences laid end to end.

A response token ``k`` of a sample whose prompt has ``P`` tokens and whose sequence begins at packed position ``start``
is predicted at position ``start + P - 1 + k``. That is the whole of the offset arithmetic, done once for each side
(student, teacher); everything later goes by the row indices made here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opsd_megatron.types import AlignedSample, PackedMicroBatch, PackedSequences


@dataclass(frozen=True)
class PackingLayout:
    """What the lengths of packed sequences must be multiples of, so that ranks can share them evenly.

    Attributes:
        sequence_multiple: Each sequence's length becomes a multiple of this (context parallelism splits each one) by
            padding at its end, which nothing before it sees and which carries no loss.
        total_multiple: Each side's T becomes a multiple of this, itself one of ``sequence_multiple`` (sequence
            parallelism splits T), by one more sequence of filler at the end, which carries no loss.
    """

    sequence_multiple: int = 1
    total_multiple: int = 1

    def padding(self, tokens: int) -> int:
        """Padding of a sequence of so many tokens."""
        return -tokens % self.sequence_multiple

    def filler(self, tokens: int) -> int:
        """Filler after so many packed tokens.

        Without samples a side still has two: the least that a causal model treats as an ordinary sequence.
        """
        return -tokens % self.total_multiple if tokens else max(2, self.total_multiple)


@dataclass
class _Bin:
    """A micro-batch being filled."""

    samples: list[int] = field(default_factory=list)
    student_tokens: int = 0
    teacher_tokens: int = 0

    @property
    def work(self) -> int:
        return _work(self.student_tokens, self.teacher_tokens)

    def fits(self, sample: AlignedSample, token_budget: int) -> bool:
        """Whether both sides stay within the budget; a micro-batch of one sample may exceed it."""
        return not self.samples or (
            self.student_tokens + sample.student_tokens <= token_budget
            and self.teacher_tokens + sample.teacher_tokens <= token_budget
        )

    def add(self, index: int, sample: AlignedSample) -> None:
        self.samples.append(index)
        self.student_tokens += sample.student_tokens
        self.teacher_tokens += sample.teacher_tokens


def _work(student_tokens: int, teacher_tokens: int) -> int:
    # In forward passes of a token: the student also runs backward, which costs about two more.
    return 3 * student_tokens + teacher_tokens


def plan_micro_batches(
    samples: Sequence[AlignedSample], *, dp_size: int, token_budget: int, count_multiple_of: int = 1
) -> list[list[list[int]]]:
    """Share samples out over data-parallel ranks and micro-batches.

    Samples go to ranks, the most work first and each to the least loaded rank. Every rank then runs as many
    micro-batches as the one that needs most under the budget, filled the same way: longest first, each into the least
    loaded one that has room. The plan depends on the lengths alone, so every rank computes the same one without
    talking.

    Args:
        samples: All samples of the step, in the same order on every rank.
        dp_size: Data-parallel ranks.
        token_budget: Most tokens of a micro-batch, on either side. A longer sample is alone in its micro-batch.
        count_multiple_of: The number of micro-batches becomes a multiple of this: Megatron's interleaved schedule takes
            as many at a time as there are pipeline ranks.

    Returns:
        Indices into ``samples`` as ``[data-parallel rank][micro-batch][sample]``. Every rank has the same number of
        micro-batches, at least one; some may be empty. Every sample occurs exactly once.
    """
    work = [_work(sample.student_tokens, sample.teacher_tokens) for sample in samples]
    longest_side = [max(sample.student_tokens, sample.teacher_tokens) for sample in samples]
    shares: list[list[int]] = [[] for _ in range(dp_size)]
    loads = [0] * dp_size
    for index in sorted(range(len(samples)), key=lambda i: (-work[i], i)):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += work[index]
    for share in shares:
        share.sort(key=lambda i: (-longest_side[i], i))
    count = max(1, *(_first_fit(samples, share, token_budget) for share in shares))
    count += -count % count_multiple_of
    while True:
        plan = [_spread(samples, share, count, token_budget) for share in shares]
        if all(rank is not None for rank in plan):
            return [rank for rank in plan if rank is not None]
        count += count_multiple_of  # ends: with a micro-batch for every sample there is always an empty one


def packing_efficiency(
    samples: Sequence[AlignedSample],
    plan: Sequence[Sequence[Sequence[int]]],
    *,
    with_teacher: bool,
    layout: PackingLayout = PackingLayout(),
    in_step: bool = False,
) -> float:
    """How much of the step's computing goes into tokens of samples.

    The rest is padding, and waiting for the data-parallel rank that has most to do. Tokens count by the forward passes
    they cost, as in the plan: a student's three times, since it also runs backward.

    Args:
        samples: All samples of the step.
        plan: What :func:`plan_micro_batches` made of them.
        with_teacher: As for :func:`pack`.
        layout: As for :func:`pack`.
        in_step: Whether ranks meet in every micro-batch, as those that exchange tokens with each other's experts do,
            and so wait for the busiest one of each instead of the busiest one of the step.

    Returns:
        Useful work over ranks times the work that all of them wait for; above 0, at most 1.
    """

    def slots(lengths: Sequence[int]) -> int:
        total = sum(length + layout.padding(length) for length in lengths)
        return total + layout.filler(total)

    def work(indices: Sequence[int]) -> int:
        student = slots([samples[i].student_tokens for i in indices])
        return _work(student, slots([samples[i].teacher_tokens for i in indices]) if with_teacher else 0)

    useful = sum(_work(sample.student_tokens, sample.teacher_tokens) for sample in samples)
    works = [[work(indices) for indices in rank] for rank in plan]
    waited = sum(map(max, zip(*works, strict=True))) if in_step else max(map(sum, works))
    return useful / (len(plan) * waited)


def _first_fit(samples: Sequence[AlignedSample], order: Sequence[int], token_budget: int) -> int:
    """Micro-batches needed when each sample goes into the first that has room, close to the fewest possible."""
    bins: list[_Bin] = []
    for index in order:
        target = next((b for b in bins if b.fits(samples[index], token_budget)), None)
        if target is None:
            target = _Bin()
            bins.append(target)
        target.add(index, samples[index])
    return len(bins)


def _spread(
    samples: Sequence[AlignedSample], order: Sequence[int], count: int, token_budget: int
) -> list[list[int]] | None:
    """Fill ``count`` micro-batches evenly, empty ones last; ``None`` where that leaves a sample without room."""
    bins = [_Bin() for _ in range(count)]
    for index in order:
        with_room = [b for b in bins if b.fits(samples[index], token_budget)]
        if not with_room:
            return None
        min(with_room, key=lambda b: b.work).add(index, samples[index])
    return sorted((sorted(b.samples) for b in bins), key=lambda indices: (not indices, indices))


def pack(
    samples: Sequence[AlignedSample],
    *,
    with_teacher: bool,
    layout: PackingLayout = PackingLayout(),
    pad_id: int = 0,
) -> PackedMicroBatch:
    """Lay samples end to end, on both sides in the same order, and check the row invariant.

    Args:
        samples: The samples of one micro-batch; none makes one that holds filler only.
        with_teacher: Pack the teacher's side too.
        layout: Which lengths need padding or filler.
        pad_id: The padding's token id.

    Returns:
        The micro-batch on CPU; ``R`` is the number of response tokens, 0 without samples.

    Raises:
        ValueError: A sample breaks the rules of :class:`AlignedSample`.
    """
    for sample in samples:
        _check_sample(sample, with_teacher)

    def side(pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> PackedSequences:
        return _sequences(pairs, layout, pad_id)

    batch = PackedMicroBatch(
        student=side([(s.student_prompt_ids, s.response_ids) for s in samples]),
        teacher=side([(s.teacher_prompt_ids or (), s.response_ids) for s in samples]) if with_teacher else None,
        response_ids=_int64(token for s in samples for token in s.response_ids),
        row_weights=torch.tensor([weight for s in samples for weight in _weights(s)], dtype=torch.float32),
        engine_log_probs=torch.tensor([p for s in samples for p in _log_probs(s)], dtype=torch.float32),
        advantages=torch.tensor([s.advantage for s in samples for _ in s.response_ids], dtype=torch.float32),
    )
    batch.check()
    return batch


def _check_sample(sample: AlignedSample, with_teacher: bool) -> None:
    if not sample.student_prompt_ids or not sample.response_ids:
        raise ValueError("a sample needs at least one prompt token and one response token")
    if with_teacher and not sample.teacher_prompt_ids:
        raise ValueError("packing the teacher's side needs a teacher prompt of at least one token in every sample")
    if sample.engine_log_probs is not None and len(sample.engine_log_probs) != len(sample.response_ids):
        raise ValueError(
            f"{len(sample.engine_log_probs)} engine log-probs for a response of {len(sample.response_ids)} tokens"
        )
    if sample.token_weights is not None and len(sample.token_weights) != len(sample.response_ids):
        raise ValueError(
            f"{len(sample.token_weights)} token weights for a response of {len(sample.response_ids)} tokens"
        )


def _sequences(
    pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], layout: PackingLayout, pad_id: int
) -> PackedSequences:
    """One side: prompt, response and padding of each sample, then filler."""
    ids: list[int] = []
    rows: list[int] = []
    lengths: list[int] = []
    for prompt, response in pairs:
        first = len(ids) + len(prompt) - 1
        rows.extend(range(first, first + len(response)))
        ids.extend(prompt)
        ids.extend(response)
        padding = layout.padding(len(prompt) + len(response))
        ids.extend([pad_id] * padding)
        lengths.append(len(prompt) + len(response) + padding)
    filler = layout.filler(len(ids))
    if filler:
        ids.extend([pad_id] * filler)
        lengths.append(filler)
    return PackedSequences(
        ids=_int64(ids),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
        rows=_int64(rows),
    )


def _int64(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


def _weights(sample: AlignedSample) -> tuple[float, ...]:
    factors = (1.0,) * len(sample.response_ids) if sample.token_weights is None else sample.token_weights
    return tuple(sample.row_weight * factor for factor in factors)


def _log_probs(sample: AlignedSample) -> tuple[float, ...]:
    if sample.engine_log_probs is None:
        return (float("nan"),) * len(sample.response_ids)
    return sample.engine_log_probs
