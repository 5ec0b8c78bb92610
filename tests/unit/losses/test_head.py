"""The head's products: on CUDA's path dtypes and shapes of every call, on a device without memory; on CPU the values,
in bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opsd_megatron.losses import linear_divergence
from opsd_megatron.losses.head import Head, HeadGradients, row_chunks
from opsd_megatron.losses.shard import VocabShard
from tests.unit.losses.linear_checks import LargestTensor

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


@pytest.mark.parametrize(("rows", "columns"), [(191, 2000), (192, 960), (256, 2000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_many_rows_come_in_parts(rows: int, columns: int, dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(rows, 32, dtype=dtype), torch.randn(2048, 32, dtype=dtype)
    head = Head(weight, VocabShard.of(2048, columns, None))
    buffer = head.buffer(rows).fill_(float("nan"))
    logits = head.logits(hidden, buffer)
    torch.testing.assert_close(logits, hidden @ weight[:columns].t())
    assert logits.data_ptr() == buffer.data_ptr()


def test_chunks_leave_room_for_what_a_loss_makes_beside_the_logits() -> None:
    shard = VocabShard.of(1 << 17, None, None)
    sizes = [row_chunks(10_000, shard, None, torch.device("cuda"), temporaries=extra)[0].stop for extra in (0, 1, 4)]
    assert sizes == [1024, 768, 512]  # 4 buffers of 512 MiB, 5 of at most 410, 8 of 256


def test_half_precision_products_end_in_float32() -> None:
    """Each is handed half-precision factors, as CUDA demands where the result is wider, and rounded once, later."""
    shard = VocabShard.of(WIDTH, COLUMNS, None)
    hidden, weight = empty(ROWS, HIDDEN, dtype=torch.bfloat16), empty(WIDTH, HIDDEN, dtype=torch.bfloat16)
    head = Head(weight, shard)
    gradients = HeadGradients(hidden, weight, shard, for_hidden=True, for_weight=True, reduce_hidden=True)
    with _Products() as products:
        logits = head.logits(hidden, head.buffer(ROWS))
        gradients.add(head, slice(0, ROWS), logits)
        gradients.add(head, slice(0, ROWS), logits)
    assert products.casts == [logits.shape] * 2  # one of each chunk's gradient, for both of its products
    assert [name for name, _ in products.seen] == [
        "aten::mm.dtype_out",
        "aten::mm.dtype",
        "aten::mm.dtype_out",
        "aten::mm.dtype",
        "aten::addmm.dtype_out",
    ]
    for _, tensors in products.seen:
        *sums, left, right = tensors
        assert left.dtype == right.dtype == torch.bfloat16
        assert all(tensor.dtype == torch.float32 for tensor in sums)


class _Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the matrix products, by operator and positional tensors, and the shapes that were cast."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[Tensor]]] = []
        self.casts: list[torch.Size] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        if "mm" in func._schema.name:
            name = f"{func._schema.name}.{func._schema.overload_name}"
            self.seen.append((name, [arg for arg in args if isinstance(arg, Tensor)]))
        if func._schema.name == "aten::_to_copy":
            self.casts.append(args[0].shape)
        return func(*args, **(kwargs or {}))


def test_bfloat16_products_on_cpu() -> None:
    """Large enough for the processor's bfloat16 units, where it has them; the mode is left as it was found."""
    generator = torch.Generator().manual_seed(0)
    rows, hidden_size, columns = 128, 256, 3000  # more columns than are widened at a time
    hidden = torch.randn(rows, hidden_size, generator=generator).bfloat16()
    weight = torch.randn(columns, hidden_size, generator=generator).bfloat16()
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    head = Head(weight, VocabShard.of(columns, None, None))
    logits = head.logits(hidden, head.buffer(rows))
    exact = hidden.double() @ weight.double().t()
    sizes = hidden.double().abs() @ weight.double().abs().t()
    # Exact products; only their sum rounds, in float32.
    assert bool(((logits.double() - exact).abs() <= sizes * hidden_size * 2**-24).all())
    gradient = torch.randn(rows, columns, generator=generator)
    total = torch.empty(columns, hidden_size)
    for first in (True, False):
        head.add_weight_gradient(total, gradient, hidden, first=first)
    exact = 2 * gradient.double().t() @ hidden.double()
    sizes = 2 * gradient.double().abs().t() @ hidden.double().abs()
    # The logits' gradient may be rounded to bfloat16 once, as on CUDA.
    assert bool(((total.double() - exact).abs() <= sizes * 2**-9).all())
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]


class TestUnitUpstream:
    """A head whose losses are known to be derived with a gradient of 1 adds to ``main_grad`` in forward."""

    WIDTH, COLUMNS, HIDDEN, ROWS = 5040, 5000, 8, 5  # more columns than are widened at a time

    def _weight(self, dtype: torch.dtype = torch.bfloat16, *, marked: bool = True) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(self.WIDTH, self.HIDDEN, generator=generator).to(dtype).requires_grad_()
        weight.main_grad = torch.ones(self.WIDTH, self.HIDDEN)  # type: ignore[attr-defined]
        if marked:
            weight.unit_upstream = True  # type: ignore[attr-defined]
        return weight

    def _loss(self, weight: Tensor, seed: int = 0, rows: int = ROWS) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(rows, self.HIDDEN, generator=generator).to(weight.dtype).requires_grad_()
        teacher = torch.randn(rows, self.HIDDEN, generator=generator).to(weight.dtype)
        loss = linear_divergence(
            hidden, weight, teacher, weight.detach(), beta=0.5, vocab_size=self.COLUMNS, chunk_rows=2
        )
        return hidden, loss

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_same_gradients_without_a_tensor_of_the_heads_size(self, dtype: torch.dtype, tied: bool) -> None:
        weights = [self._weight(dtype, marked=marked) for marked in (True, False)]
        found = []
        for weight in weights:
            if tied:
                weight.zero_out_wgrad = True  # type: ignore[attr-defined]
            with LargestTensor() as largest:
                for seed, rows in enumerate((self.ROWS, 0, 3)):
                    hidden, loss = self._loss(weight, seed, rows)
                    loss.sum().backward()
                    assert (weight.grad is None) == tied
                    assert hasattr(weight, "grad_added_to_main_grad") != tied
                    weight.grad = None
            found.append((hidden.grad, largest.elements, weight.main_grad))  # type: ignore[attr-defined]
        (hidden_grad, _, main_grad), (other_hidden_grad, _, other_main_grad) = found
        assert torch.equal(hidden_grad, other_hidden_grad)
        torch.testing.assert_close(main_grad, other_main_grad, rtol=1e-6, atol=1e-6)
        assert not torch.equal(main_grad[: self.COLUMNS], torch.ones(self.COLUMNS, self.HIDDEN))
        assert torch.equal(main_grad[self.COLUMNS :], torch.ones(self.WIDTH - self.COLUMNS, self.HIDDEN))
        # Autograd is given an empty dummy for an untied head, which is as large in either case.
        if tied:
            sizes = [elements for _, elements, _ in found]
            assert sizes[0] < self.COLUMNS * self.HIDDEN <= sizes[1]

    @pytest.mark.parametrize("upstream", [torch.full((5,), 2.0), torch.arange(5.0)])
    def test_another_gradient_is_an_error(self, upstream: Tensor) -> None:
        _, loss = self._loss(self._weight())
        with pytest.raises(RuntimeError, match="unit_upstream"):
            loss.backward(upstream)

    def test_main_grad_in_half_precision_is_added_to_once(self) -> None:
        weight = self._weight()
        weight.main_grad = torch.ones(self.WIDTH, self.HIDDEN, dtype=torch.bfloat16)  # type: ignore[attr-defined]
        _, loss = self._loss(weight)
        assert (weight.main_grad == 1).all()  # type: ignore[attr-defined]
        loss.sum().backward()
        assert not (weight.main_grad == 1).all()  # type: ignore[attr-defined]
