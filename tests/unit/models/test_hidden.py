"""The rows of the last stage's output under sequence parallelism."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_megatron.config import ParallelConfig
from opsd_megatron.distributed.parallel import ParallelDims
from opsd_megatron.models.hidden import response_hidden
from tests.distributed import run_distributed

ROWS = [5, 0, 3, 2]


def gathered() -> tuple[Tensor, Tensor, torch.dtype]:
    """Hidden states, the gradient of this rank's part, and the hidden states' dtype where there is none."""
    dims = ParallelDims.initialize(ParallelConfig(tensor=2, sequence=True))
    try:
        rank = dist.get_rank()
        output = torch.arange(3 * rank, 3 * rank + 3, dtype=torch.bfloat16).view(3, 1, 1).requires_grad_()
        hidden = response_hidden(output, torch.tensor(ROWS), dims)
        # Parts that cancel but for what bfloat16 cannot hold beside them.
        hidden.backward(torch.full_like(hidden, 1 + 2**-10 if rank == 0 else -1))
        assert output.grad is not None
        return hidden.detach(), output.grad, response_hidden(output.detach(), torch.tensor(ROWS), dims).dtype
    finally:
        dims.destroy()


def test_the_ranks_parts_of_a_gradient_are_summed_before_they_are_rounded() -> None:
    for rank, (hidden, gradient, without) in enumerate(run_distributed(gathered, 2)):
        assert hidden.dtype == torch.float32
        assert hidden.flatten().tolist() == ROWS
        assert gradient.dtype == without == torch.bfloat16
        assert gradient.flatten().tolist() == [2**-10 if 3 * rank + row in ROWS else 0 for row in range(3)]
