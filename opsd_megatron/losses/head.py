"""The output head in row chunks: logits of a few rows at a time, and their gradients on the way back.

Every loss that starts from hidden states shares this: at no time do logits of more than a few chunks of rows exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from opsd_megatron.losses.shard import Pending, VocabShard

# Most logits of one chunk and side, counted in elements: 200 MiB in float32 on CPU, 512 MiB elsewhere. Enough that the
# matrix products run at full speed and that reading and writing the head weight's gradient once a chunk costs little
# beside them: at r rows a chunk it moves 8 bytes for 8 r operations, and a GPU does hundreds of operations a byte.
_CHUNK_ELEMENTS_ON_CPU, _CHUNK_ELEMENTS = 25 << 21, 1 << 27
# There, rows of a chunk are a multiple of this: the tile of a matrix product.
_TILE_ROWS = 128
# On CPU the entries of a chunk are worked on in blocks of so many elements: the temporaries of a dozen elementwise
# steps then stay in the cache and never exist for a whole chunk.
BLOCK_ELEMENTS = 1 << 19
_NOT_UNIT = "the loss's upstream gradient is not 1 in all rows, as unit_upstream of the head's weight promises"
_NOT_FINITE = (
    "the gradient of the student's hidden states holds NaN or infinities: either its head holds -inf (0 times which is "
    "NaN), or factors of its rows are not finite"
)
# Rows of a half-precision head that are widened at a time on CPU: few enough to stay in the cache.
_WIDENED_ROWS = 2048
# From so many rows of hidden states on, MKL's product with a whole head is a fifth slower than with so many of the
# head's rows at a time (benchmarks/logits.py).
_BLOCKED_FROM, _PRODUCT_ROWS = 192, 960


class Head:
    """The true rows of a head shard, and products with it.

    Half-precision products are accumulated and handed out in float32: rounding the logits to bfloat16 would cost more
    digits than everything after it. CUDA can do that directly. On CPU the weight is widened, a few rows at a time, to
    be multiplied as the bfloat16 it came from (:func:`_narrow_products`), for the logits and the weight's gradient;
    only the hidden gradient, which ends in half precision, is formed in it.
    """

    def __init__(self, weight: Tensor, shard: VocabShard) -> None:
        self._weight = weight[: shard.columns]
        self._half = weight.dtype in (torch.bfloat16, torch.float16)
        self._on_cpu = weight.device.type == "cpu"
        self._dtype = torch.promote_types(weight.dtype, torch.float32)
        rows = min(_WIDENED_ROWS, shard.columns) if self._half and self._on_cpu else 0
        self._widened = weight.new_empty((rows, weight.shape[1]), dtype=self._dtype)

    @property
    def temporaries(self) -> int:
        """Tensors of a chunk's size that the products make; one of half its bytes counts as one."""
        return int(self._half and self._on_cpu)  # the gradient as bfloat16; on GPUs chunks are not so tight

    def buffer(self, rows: int) -> Tensor:
        """Memory for the logits of up to ``rows`` rows, to be used again: fresh memory is paid for page by page."""
        return self._weight.new_empty((rows, self._weight.shape[0]), dtype=self._dtype)

    def logits(self, hidden: Tensor, buffer: Tensor) -> Tensor:
        """``[r, H] -> [r, columns]``, in the first ``r`` rows of ``buffer``."""
        out = buffer[: hidden.shape[0]]
        if self._half and not self._on_cpu:
            return torch.mm(hidden.to(self._weight.dtype), self._weight.t(), out_dtype=torch.float32, out=out)
        if not self._half:
            hidden = hidden.to(self._dtype)
            blocked = self._on_cpu and hidden.shape[0] >= _BLOCKED_FROM
            for rows in _slices(0, out.shape[1], _PRODUCT_ROWS if blocked else max(1, out.shape[1])):
                torch.mm(hidden, self._weight[rows].t(), out=out[:, rows])
            return out
        hidden = hidden.to(self._weight.dtype).to(self._dtype)
        with _narrow_products(self._weight.dtype):
            for rows in _slices(0, self._weight.shape[0], _WIDENED_ROWS):
                block = self._widened[: rows.stop - rows.start].copy_(self._weight[rows])
                torch.mm(hidden, block.t(), out=out[:, rows])
        return out

    def narrowed(self, grad_logits: Tensor) -> Tensor:
        """The logits' gradient as both products take it: on GPUs in the weight's dtype, rounded once for both."""
        return grad_logits.to(self._weight.dtype) if self._half and not self._on_cpu else grad_logits

    def hidden_gradient(self, grad_logits: Tensor) -> Tensor:
        """This rank's part of the hidden states' gradient, ``[r, columns] -> [r, H]``; the rest is on other ranks.

        Args:
            grad_logits: As :meth:`narrowed` gives it.
        """
        grad_logits = grad_logits.to(self._weight.dtype)
        if self._half and not self._on_cpu:
            return torch.mm(grad_logits, self._weight, out_dtype=torch.float32)
        return torch.mm(grad_logits, self._weight)

    def add_weight_gradient(self, total: Tensor, grad_logits: Tensor, hidden: Tensor, *, first: bool) -> None:
        """Add a chunk's weight gradient to ``total``, ``[columns, H]`` float32, in place; the first one is written.

        Args:
            total: The sum so far.
            grad_logits: ``[r, columns]``, as :meth:`narrowed` gives it.
            hidden: ``[r, H]``.
            first: Whether there is nothing in ``total`` yet.
        """
        if self._half and not self._on_cpu:
            hidden = hidden.to(self._weight.dtype)
            if first:
                torch.mm(grad_logits.t(), hidden, out_dtype=torch.float32, out=total)
            else:
                torch.addmm(total, grad_logits.t(), hidden, out_dtype=torch.float32, out=total)
            return
        with _narrow_products(self._weight.dtype):
            if first:
                torch.mm(grad_logits.t(), hidden.to(self._dtype), out=total)
            else:
                total.addmm_(grad_logits.t(), hidden.to(self._dtype))


class HeadGradients:
    """Gradients of the hidden states and the head weight, put together chunk by chunk.

    Only those asked for are formed. Sums are in float32 (float64 for float64 inputs) whatever the inputs' dtype. The
    weight's is a tensor of its own, as large as the head in float32, until the upstream gradient is known. That is
    saved where the weight says beforehand that it will be 1 (``weight.unit_upstream = True``) and has a ``main_grad``
    in the sums' dtype: the chunks are then added there, in forward.

    Args:
        hidden: The student's hidden states, ``[R, H]``.
        weight: Its head shard, ``[V/tp, H]``.
        shard: Which columns of the vocabulary that is.
        for_hidden: Whether the gradient of ``hidden`` is wanted.
        for_weight: Whether that of ``weight`` is wanted.
        reduce_hidden: Sum the hidden gradient over the ranks; else each is left with its part.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        shard: VocabShard,
        *,
        for_hidden: bool,
        for_weight: bool,
        reduce_hidden: bool,
    ) -> None:
        self._hidden_in, self._shard, self._reduce_hidden = hidden, shard, reduce_hidden
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self._hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if for_hidden else None
        main_grad: Tensor | None = getattr(weight, "main_grad", None)
        self._at_once = main_grad is not None and main_grad.dtype == dtype and getattr(weight, "unit_upstream", False)
        self._weight: Tensor | None = None
        if for_weight:
            self._weight = main_grad if self._at_once else torch.empty_like(weight, dtype=dtype)
        self._weight_dtype = weight.dtype
        self._summing: Pending | None = None
        self._empty = True

    @property
    def wanted(self) -> bool:
        """Whether any gradient is asked for."""
        return self._hidden is not None or self._weight is not None

    def add(self, head: Head, rows: slice, grad_logits: Tensor) -> None:
        """Take in the logit gradient of one chunk, ``[r, columns]``."""
        grad_logits = head.narrowed(grad_logits) if self.wanted else grad_logits
        if self._hidden is not None:
            self._hidden[rows] = head.hidden_gradient(grad_logits)
        if self._weight is not None:
            true_rows = self._weight[: self._shard.columns]
            first = self._empty and not self._at_once
            head.add_weight_gradient(true_rows, grad_logits, self._hidden_in[rows], first=first)
        self._empty = False

    def complete(self) -> None:
        """Say that all chunks are in.

        Ranks: all of the shard's group. Starts one all-reduce, of the hidden gradient, if it is to be summed and has
        rows; it goes on until the gradient is taken.
        """
        if self._weight is not None and not self._at_once:
            self._weight[0 if self._empty else self._shard.columns :].zero_()
        if self._hidden is not None and self._hidden.shape[0] and self._reduce_hidden:
            self._summing = self._shard.start_sum(self._hidden)

    def _wait(self) -> None:
        """Wait for the sum that :meth:`complete` started."""
        if self._summing is not None:
            self._summing.wait()

    def discard(self) -> None:
        """Give up on these gradients, for an upstream gradient that they cannot be scaled to.

        Raises:
            RuntimeError: The weight's is in ``main_grad`` already.
        """
        self._wait()
        if self._at_once and self._weight is not None and not self._empty:
            raise RuntimeError(_NOT_UNIT)

    def take_hidden(self, scale: Tensor | None) -> Tensor | None:
        """The hidden states' gradient times ``scale`` (a scalar; ``None`` for 1), in their dtype.

        Raises:
            FloatingPointError: It is not finite; on every rank if it is summed. On CUDA found out later.
        """
        if self._hidden is None:
            return None
        self._wait()
        _require(self._hidden.isfinite().all(), FloatingPointError(_NOT_FINITE))
        return _scaled(self._hidden, scale).to(self._hidden_in.dtype)

    def take_weight(self, weight: Tensor, scale: Tensor | None) -> Tensor | None:
        """The weight's gradient times ``scale``, in its dtype; or added to ``weight.main_grad``, where that exists.

        ``main_grad`` is where Megatron-Core's data-parallel wrapper accumulates, in float32 as a rule: a gradient added
        there is not rounded to the weight's dtype first. It then takes what autograd is given for a dummy that is not
        to be read (``grad_added_to_main_grad``). Where the same weight may get another gradient through autograd, which
        would add the dummy to it (tied embeddings on one stage, marked ``zero_out_wgrad``), autograd is given nothing.

        Raises:
            RuntimeError: ``scale`` is not 1 though the weight said that it would be; on CUDA found out later.
        """
        if self._weight is None:
            return None
        main_grad: Tensor | None = getattr(weight, "main_grad", None)
        if main_grad is None:
            return _scaled(self._weight, scale).to(self._weight_dtype)
        if self._at_once:
            if scale is not None:
                _require(scale == 1, RuntimeError(_NOT_UNIT))
        else:
            main_grad.add_(_scaled(self._weight, scale))
        if getattr(weight, "zero_out_wgrad", False):
            return None
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return torch.empty_like(weight)


@contextmanager
def _narrow_products(dtype: torch.dtype) -> Iterator[None]:
    """Where ``dtype`` is bfloat16, multiply float32 matrices on CPU as bfloat16 and add up in float32.

    Of values that were bfloat16 before they were widened the products stay exact. Processors with bfloat16 units do
    several times as many of them; on others this changes nothing.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if dtype == torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def row_chunks(
    num_rows: int, shard: VocabShard, chunk_rows: int | None, device: torch.device, *, temporaries: int = 0
) -> list[slice]:
    """Slices that cover ``num_rows`` rows; the same on every rank of the shard's group.

    Args:
        num_rows: How many there are.
        shard: Which columns this rank holds.
        chunk_rows: Rows of a chunk; ``None``: as many as keep the matrix products at full speed.
        device: Where the rows are.
        temporaries: Tensors of a chunk's size that are made beside up to four of logits; chunks are the smaller for it.
    """
    if chunk_rows is None:
        elements, tile = (_CHUNK_ELEMENTS_ON_CPU, 1) if device.type == "cpu" else (_CHUNK_ELEMENTS, _TILE_ROWS)
        elements = elements * 4 // (4 + temporaries)
        chunk_rows = max(elements // shard.width // tile, 1) * tile
        # Chunks of like size: a short last one costs as much to set up and multiplies more slowly.
        chunks = max(-(-num_rows // chunk_rows), 1)
        chunk_rows = max(-(-num_rows // chunks // tile) * tile, 1)
    return list(_slices(0, num_rows, chunk_rows))


def row_blocks(num_rows: int, shard: VocabShard, device: torch.device, elements: int = BLOCK_ELEMENTS) -> list[slice]:
    """Slices that cover a chunk's rows, each to be worked on by itself; on CPU of up to ``elements`` logits."""
    whole = device.type != "cpu"
    return list(_slices(0, num_rows, num_rows if whole else max(1, elements // shard.width)))


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


def check_same_rows(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> None:
    """Check that both sides have the same rows and the same vocabulary shard.

    Raises:
        ValueError: Names all four shapes.
    """
    if student_hidden.shape[0] != teacher_hidden.shape[0] or student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            "student and teacher differ in rows or in vocabulary: hidden "
            f"{tuple(student_hidden.shape)} and {tuple(teacher_hidden.shape)}, head weight "
            f"{tuple(student_weight.shape)} and {tuple(teacher_weight.shape)}"
        )


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def _require(truth: Tensor, error: Exception) -> None:
    """Raise ``error`` unless ``truth``. A GPU finds out by itself, later, so that nobody waits for it."""
    if truth.device.type != "cpu":
        torch._assert_async(truth, str(error))
    elif not truth:
        raise error


def _scaled(gradient: Tensor, scale: Tensor | None) -> Tensor:
    return gradient if scale is None else gradient.mul_(scale.to(gradient.dtype))
