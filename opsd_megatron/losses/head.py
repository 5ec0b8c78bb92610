"""The output head in row chunks: logits of a few rows at a time, and their gradients on the way back.

Every loss that starts from hidden states shares this: at no time do logits of more than ``chunk_rows`` rows exist.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opsd_megatron.losses.shard import VocabShard

# Logits of one chunk and side, counted in elements (96 MiB in float32). Large enough that the matrix products run at
# full speed and that the head weight's gradient is not read and written too often.
_CHUNK_ELEMENTS = 3 << 23
# On one CPU rank the entries of a chunk are worked on in blocks of so many elements: the temporaries of a dozen
# elementwise steps then stay in the cache and never exist for a whole chunk.
_BLOCK_ELEMENTS = 1 << 18


class Head:
    """The true rows of a head shard, in a dtype whose matrix products can end in float32.

    Half-precision products are accumulated and handed out in float32: rounding the logits to bfloat16 would cost more
    digits than everything after it. CUDA can do that directly; on CPU the weight is widened once, here.

    Attributes:
        weight: ``[columns, H]``.
    """

    def __init__(self, weight: Tensor, shard: VocabShard) -> None:
        self.weight = weight[: shard.columns]
        if weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16):
            self.weight = self.weight.float()

    @property
    def _mixed(self) -> bool:
        return self.weight.dtype in (torch.bfloat16, torch.float16)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """``[r, H] -> [r, columns]`` in float32 (float64 for float64).

        Args:
            hidden: Hidden states of any dtype.
            out: Buffer of at least ``r`` rows to write to, from :meth:`buffer`. Fresh memory for every chunk would be
                paid for page by page.
        """
        return self._product(hidden.to(self.weight.dtype), self.weight.t(), out)

    def buffer(self, rows: int) -> Tensor:
        """Memory for the logits of up to ``rows`` rows."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return self.weight.new_empty((rows, self.weight.shape[0]), dtype=dtype)

    def hidden_gradient(self, grad_logits: Tensor) -> Tensor:
        """This rank's part of the hidden states' gradient, ``[r, columns] -> [r, H]``; the rest is on other ranks."""
        return self._product(grad_logits.to(self.weight.dtype), self.weight)

    def add_weight_gradient(self, total: Tensor, grad_logits: Tensor, hidden: Tensor, *, first: bool) -> None:
        """Add a chunk's weight gradient to ``total``, ``[columns, H]`` float32, in place; the first one is written."""
        dtype = self.weight.dtype
        if self._mixed:
            product = self._product(grad_logits.to(dtype).t(), hidden.to(dtype))
            total.copy_(product) if first else total.add_(product)
        elif first:
            torch.mm(grad_logits.t(), hidden.to(dtype), out=total)
        else:
            total.addmm_(grad_logits.t(), hidden.to(dtype))

    def _product(self, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        if self._mixed:
            return torch.mm(left, right, out_dtype=torch.float32)
        return torch.mm(left, right, out=None if out is None else out[: left.shape[0]])


class HeadGradients:
    """Gathers the gradients of hidden states and head weight over the chunks of one backward pass.

    Only those asked for are formed. Sums are in float32 (float64 for float64 inputs) whatever the inputs' dtype.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, shard: VocabShard, *, for_hidden: bool, for_weight: bool
    ) -> None:
        self._head = Head(weight, shard)
        self._hidden_in, self._weight_in, self._shard = hidden, weight, shard
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self._hidden = torch.zeros_like(hidden, dtype=dtype) if for_hidden else None
        self._weight = torch.empty_like(weight, dtype=dtype) if for_weight else None
        self._empty = True

    @property
    def head(self) -> Head:
        """The head these are gradients of."""
        return self._head

    @property
    def wanted(self) -> bool:
        """Whether any gradient is asked for."""
        return self._hidden is not None or self._weight is not None

    def add(self, rows: slice, grad_logits: Tensor) -> None:
        """Take in the logit gradient of one chunk, ``[r, columns]``."""
        if self._hidden is not None:
            self._hidden[rows] = self._head.hidden_gradient(grad_logits)
        if self._weight is not None:
            true_rows = self._weight[: self._shard.columns]
            self._head.add_weight_gradient(true_rows, grad_logits, self._hidden_in[rows], first=self._empty)
        self._empty = False

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """The complete gradients of ``hidden`` and ``weight`` in their own dtypes.

        Ranks: all of the shard's group. One all-reduce, of the hidden gradient, if it is asked for and has rows.
        """
        hidden, weight = self._hidden, self._weight
        if weight is not None:
            weight[0 if self._empty else self._shard.columns :].zero_()
        if hidden is not None and hidden.shape[0]:
            self._shard.sum_(hidden)
        return (
            None if hidden is None else hidden.to(self._hidden_in.dtype),
            None if weight is None else weight.to(self._weight_in.dtype),
        )


def row_chunks(num_rows: int, shard: VocabShard, chunk_rows: int | None) -> Iterator[slice]:
    """Slices that cover ``num_rows`` rows; the same on every rank of the shard's group."""
    step = max(1, _CHUNK_ELEMENTS // shard.width) if chunk_rows is None else chunk_rows
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def row_blocks(rows: slice, shard: VocabShard) -> Iterator[slice]:
    """Slices that cover a chunk's ``rows``, each to be evaluated on its own; the same on every rank.

    Across ranks every block would cost its own collectives, so there a chunk is one block.
    """
    whole = rows.stop - rows.start
    on_cpu = not torch.cuda.is_available()
    step = max(1, _BLOCK_ELEMENTS // shard.width) if on_cpu and shard.group is None else whole
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def keep_small_blocks_mapped() -> None:
    """Have the C library keep the memory of freed temporaries, instead of returning it after every block.

    glibc maps and unmaps every allocation above a threshold, and gives back the top of its heap above twice as much;
    each time the kernel zeroes the pages anew, which takes longer than the arithmetic on them. Freeing one allocation
    of just under 32 MiB raises the threshold to that size (mallopt(3), M_MMAP_THRESHOLD). Nothing is touched, so this
    costs microseconds; elsewhere than on glibc it does nothing.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def check_head(side: str, hidden: Tensor, weight: Tensor, chunk_rows: int | None) -> None:
    """Check the shapes of one side's hidden states and head.

    Raises:
        ValueError: Names the side and what does not fit.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{side}: hidden states [R, H] and head weight [V/tp, H] do not fit: "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows} must be at least 1, or None")
