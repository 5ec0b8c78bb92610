"""The embedding's gradient, added to the rows that were looked up, against the one that autograd makes of all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from opsd_megatron.config import ParallelConfig
from opsd_megatron.models.embedding import add_rows
from tests.distributed import run_distributed

VOCAB, HIDDEN, TOKENS = 24, 8, 40


@pytest.mark.parametrize("num_tokens", [0, 1, 2, TOKENS])
def test_rows_are_summed_as_autograd_sums_them(num_tokens: int) -> None:
    """Bit for bit, in two goes; other rows keep what they have."""
    generator = torch.Generator().manual_seed(num_tokens)
    total, expected = torch.zeros(VOCAB, HIDDEN), torch.zeros(VOCAB, HIDDEN)
    for _ in range(2):
        rows = torch.randint(0, VOCAB // 2, (num_tokens,), generator=generator)
        values = torch.randn(num_tokens, HIDDEN, generator=generator)
        add_rows(total, rows, values)
        weight = torch.zeros(VOCAB, HIDDEN, requires_grad=True)
        torch.nn.functional.embedding(rows, weight).backward(values)
        assert weight.grad is not None
        expected += weight.grad
    assert torch.equal(total, expected) and not total[VOCAB // 2 :].any()
    assert bool(total.any()) == bool(num_tokens)


def test_half_precision_is_summed_in_float32() -> None:
    values = torch.full((300, 1), 1.0 + 2**-7, dtype=torch.bfloat16)  # bfloat16 has no room for the sum
    total = torch.zeros(3, 1)
    add_rows(total, torch.ones(300, dtype=torch.long), values)
    assert total.flatten().tolist() == [0.0, 300 * (1.0 + 2**-7), 0.0]


def gradients(sequence: bool, tp: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Output and weight gradient of Megatron-Core's embedding, as it is and accumulating by row; this rank's."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import VocabParallelEmbedding

    from opsd_megatron.distributed.parallel import ParallelDims
    from opsd_megatron.models.embedding import RowAccumulatingEmbedding

    dims = ParallelDims.initialize(ParallelConfig(tensor=tp, sequence=sequence))
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(VOCAB, HIDDEN, generator=generator)
    ids = torch.randint(0, VOCAB, (1, TOKENS), generator=generator)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name in ("as it is", "by row", "without main_grad"):
        embedding: Any = VocabParallelEmbedding(
            VOCAB,
            HIDDEN,
            init_method=lambda weight: None,
            reduce_scatter_embeddings=sequence,
            config=ModelParallelConfig(use_cpu_initialization=True, perform_initialization=False),
            tp_group=dims.tp_group,
        )
        embedding.weight.data.copy_(full.chunk(tp)[dims.tp_rank])
        if name == "by row":
            embedding.weight.main_grad = torch.zeros_like(embedding.weight)
        if name != "as it is":
            RowAccumulatingEmbedding.take_over(embedding)
        out = embedding(ids)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1 + sequence * dims.tp_rank))
        out.backward(upstream)
        assert (embedding.weight.grad is None) == (name == "by row")
        gradient = embedding.weight.main_grad if name == "by row" else embedding.weight.grad
        found[name] = out.detach(), gradient
    dims.destroy()
    return found


@pytest.mark.parametrize(("tp", "sequence"), [(1, False), (2, False), (2, True)])
def test_the_embedding_is_megatrons_with_its_gradient_in_main_grad(tp: int, sequence: bool) -> None:
    for found in run_distributed(gradients, tp, sequence, tp):
        out, gradient = found["as it is"]
        assert gradient.any(dim=1).sum() > VOCAB // tp // 2
        for name in ("by row", "without main_grad"):
            assert torch.equal(found[name][0], out) and torch.equal(found[name][1], gradient), name
