"""The head's products on the path that CUDA takes: dtypes and shapes of every call, on a device without memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opsd_megatron.losses.head import Head, HeadGradients, row_chunks
from opsd_megatron.losses.shard import VocabShard

ROWS, HIDDEN, WIDTH, COLUMNS = 7, 6, 48, 43
META = torch.device("meta")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.filterwarnings("error:An output with one or more elements was resized")
def test_every_product_fits_where_it_is_written(dtype: torch.dtype) -> None:
    shard = VocabShard.of(WIDTH, COLUMNS, None)
    wide = torch.promote_types(dtype, torch.float32)
    hidden, weight = empty(ROWS, HIDDEN, dtype=dtype), empty(WIDTH, HIDDEN, dtype=dtype)
    head = Head(weight, shard)
    gradients = HeadGradients(hidden, weight, shard, for_hidden=True, for_weight=True, reduce_hidden=True)
    buffer = head.buffer(3)
    assert (buffer.shape, buffer.dtype, buffer.device) == ((3, COLUMNS), wide, META)
    chunks = row_chunks(ROWS, shard, 3, META)
    # The weight gradient of the first is written, those of the others are added.
    assert [rows.stop - rows.start for rows in chunks] == [3, 3, 1]
    for rows in chunks:
        logits = head.logits(hidden[rows], buffer)
        assert logits.shape == (rows.stop - rows.start, COLUMNS)
        assert logits.dtype == wide
        assert logits._base is buffer
        gradients.add(head, rows, logits)
    gradients.complete()
    for gradient, leaf in (
        (gradients.take_hidden(None), hidden),
        (gradients.take_weight(weight, empty(dtype=wide)), weight),
    ):
        assert gradient is not None
        assert (gradient.shape, gradient.dtype, gradient.device) == (leaf.shape, dtype, META)


def test_half_precision_products_end_in_float32() -> None:
    """Each is handed half-precision factors, as CUDA demands where the result is wider, and rounded once, later."""
    shard = VocabShard.of(WIDTH, COLUMNS, None)
    hidden, weight = empty(ROWS, HIDDEN, dtype=torch.bfloat16), empty(WIDTH, HIDDEN, dtype=torch.bfloat16)
    head = Head(weight, shard)
    with _Products() as products:
        logits = head.logits(hidden, head.buffer(ROWS))
        assert head.hidden_gradient(logits).dtype == torch.float32
        total = empty(COLUMNS, HIDDEN)
        head.add_weight_gradient(total, logits, hidden, first=True)
        head.add_weight_gradient(total, logits, hidden, first=False)
    assert [name for name, _ in products.seen] == [
        "aten::mm.dtype_out",
        "aten::mm.dtype",
        "aten::mm.dtype_out",
        "aten::addmm.dtype_out",
    ]
    for _, tensors in products.seen:
        *sums, left, right = tensors
        assert left.dtype == right.dtype == torch.bfloat16
        assert all(tensor.dtype == torch.float32 for tensor in sums)


class _Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the matrix products, by operator and positional tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[Tensor]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        if "mm" in func._schema.name:
            name = f"{func._schema.name}.{func._schema.overload_name}"
            self.seen.append((name, [arg for arg in args if isinstance(arg, Tensor)]))
        return func(*args, **(kwargs or {}))
