"""Packed sequences as context-parallel ranks share them, and what they computed put together again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_megatron.data.context import context_indices
from opsd_megatron.types import PackedSequences


@dataclass(frozen=True)
class Layout:
    """A micro-batch of sequences, padded where several ranks share each of them.

    Attributes:
        lengths: Of the padded sequences.
        places: Where the tokens are among the padding, ``[T]``.
        held: Which positions each context-parallel rank holds, in its order.
    """

    lengths: tuple[int, ...]
    places: Tensor
    held: tuple[Tensor, ...]

    @staticmethod
    def of(lengths: tuple[int, ...], cp: int = 1) -> Layout:
        if cp == 1:
            everything = torch.arange(sum(lengths))
            return Layout(lengths, everything, (everything,))
        padded = tuple(length + -length % (2 * cp) for length in lengths)
        real = [torch.arange(size) < length for size, length in zip(padded, lengths, strict=True)]
        held = tuple(context_indices(_bounds(padded), cp=cp, rank=rank) for rank in range(cp))
        return Layout(padded, torch.cat(real).nonzero().squeeze(1), held)

    def part(self, values: Tensor, rank: int = 0) -> Tensor:
        """A rank's part of something each token has, ``[T, ...]``; padding has zeros."""
        padded = values.new_zeros(sum(self.lengths), *values.shape[1:])
        padded[self.places] = values
        return padded[self.held[rank]]

    def whole(self, parts: list[Tensor]) -> Tensor:
        """What each token has, from the parts of all ranks."""
        padded = parts[0].new_empty(sum(self.lengths), *parts[0].shape[1:])
        padded[torch.cat(self.held)] = torch.cat(parts)
        return padded[self.places]

    def sequences(self, ids: Tensor, rank: int = 0) -> PackedSequences:
        """A rank's part of the sequences whose tokens are ``ids``, ``[T]``."""
        return PackedSequences(
            ids=self.part(ids, rank),
            positions=torch.cat([torch.arange(length) for length in self.lengths])[self.held[rank]],
            cu_seqlens=_bounds(self.lengths),
            max_seqlen=max(self.lengths),
            rows=torch.arange(0),
        )


def _bounds(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
