"""A rank's share of the vocabulary, and the reductions over the ranks that hold the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """Which vocabulary columns this rank holds.

    Attributes:
        group: Ranks that together hold the vocabulary, in order; ``None`` where this rank holds all of it.
        width: Columns of the shard, padding included; equal on every rank.
        columns: How many of them, from the first on, are true vocabulary entries; 0 is possible on the last ranks.
        offset: Vocabulary index of the shard's first column.
        vocab_size: Vocabulary entries over all ranks, without padding.
    """

    group: dist.ProcessGroup | None
    width: int
    columns: int
    offset: int
    vocab_size: int

    @classmethod
    def of(cls, width: int, vocab_size: int | None, group: dist.ProcessGroup | None) -> VocabShard:
        """The shard of this rank in ``group``.

        Raises:
            ValueError: ``vocab_size`` does not fit the shards.
        """
        size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        total = width * size
        true = total if vocab_size is None else vocab_size
        if not 0 < true <= total:
            raise ValueError(f"vocab_size={vocab_size} must be at least 1 and at most {size} x {width} shard columns")
        columns = min(max(true - rank * width, 0), width)
        return cls(group if size > 1 else None, width, columns, rank * width, true)

    def max_(self, tensor: Tensor) -> Tensor:
        """Reduce to the maximum over the ranks, in place; one collective, none on a single rank.

        Ranks: all of ``group``; the result is valid on every one.
        """
        if self.group is not None:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def sum_(self, tensor: Tensor) -> Tensor:
        """Reduce to the sum over the ranks, in place; one collective, none on a single rank.

        For use inside an ``autograd.Function`` only: autograd does not see this sum, and outside of one would drop the
        gradient that flows through the other ranks.

        Ranks: all of ``group``; the result is valid on every one.
        """
        if self.group is not None:
            dist.all_reduce(tensor, dist.ReduceOp.SUM, group=self.group)
        return tensor

    def sum_in_order(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, added in rank order; one collective, none on a single rank.

        An all-reduce adds in an order that depends on an element's place in the tensor, so that equal numbers in two
        places may get sums that differ in the last bit. Student and teacher with equal logits must not: their
        divergence would come out as rounding noise instead of zero.

        Ranks: all of ``group``; the result is valid on every one and bitwise equal.
        """
        if self.group is None:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, tensor, group=self.group)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def row_max(self, values: Tensor) -> Tensor:
        """This rank's largest column of every row, ``[R, columns] -> [R]``; NaN becomes +inf, no column gives -inf.

        Reductions to a maximum may lose a NaN on the way (gloo's and NCCL's do); +inf stays visible on every rank.
        """
        if values.shape[1] == 0:
            return values.new_full((values.shape[0],), -torch.inf)
        return values.amax(dim=1).nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)

    def pick(self, values: Tensor, ids: Tensor) -> Tensor:
        """``values[r, ids[r]]`` where this rank holds column ``ids[r]``, else 0: ``[R, columns], [R] -> [R]``.

        Summed over the ranks it is the value wherever it is held.
        """
        if values.shape[1] == 0:
            return values.new_zeros(values.shape[0])
        local, held = self._locate(ids)
        return values.gather(1, local.unsqueeze(1)).squeeze(1).masked_fill(~held, 0)

    def add_at_(self, values: Tensor, ids: Tensor, amount: float) -> None:
        """Add ``amount`` to ``values[r, ids[r]]`` where this rank holds column ``ids[r]``, in place."""
        if values.shape[1]:
            local, held = self._locate(ids)
            values.scatter_add_(1, local.unsqueeze(1), held.unsqueeze(1).to(values.dtype) * amount)

    def _locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Local column of each id (a valid one in any case), and whether this rank holds it."""
        local = ids - self.offset
        held = (local >= 0) & (local < self.columns)
        return local.clamp(0, self.columns - 1), held


def check_rows(bad: dict[str, Tensor]) -> None:
    """Raise if any row of any side is bad; one device synchronisation for all of them.

    Args:
        bad: Name of a side -> boolean mask of its bad rows, ``[R]``.

    Raises:
        FloatingPointError: Names the sides and the first bad row of each.
    """
    counts = torch.stack([mask.sum() for mask in bad.values()]).tolist()
    problems = [
        f"the {name}'s logits hold NaN or +inf in {count} of {mask.numel()} rows, first in {int(mask.int().argmax())}"
        for (name, mask), count in zip(bad.items(), counts, strict=True)
        if count
    ]
    if problems:
        raise FloatingPointError("; ".join(problems))


def check_targets(target_ids: Tensor, num_rows: int, shard: VocabShard) -> None:
    """Check that there is one target a row, each a true vocabulary entry.

    Raises:
        ValueError: Names the first target outside the vocabulary.
    """
    if target_ids.shape != (num_rows,) or target_ids.dtype != torch.int64:
        raise ValueError(f"target_ids must be [{num_rows}] int64, not {tuple(target_ids.shape)} {target_ids.dtype}")
    outside = (target_ids < 0) | (target_ids >= shard.vocab_size)
    if outside.any():
        row = int(outside.int().argmax())
        raise ValueError(f"target {int(target_ids[row])} of row {row} is outside the vocabulary of {shard.vocab_size}")
