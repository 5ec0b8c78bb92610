"""From the last stage's output to the hidden states that carry loss."""

from __future__ import annotations

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from opsd_megatron.distributed.parallel import ParallelDims


def response_hidden(output: Tensor, rows: Tensor, dims: ParallelDims) -> Tensor:
    """Select the hidden states at the response rows.

    Ranks: every rank of a tensor-parallel group on the last pipeline stage.

    Args:
        output: What the last stage returns: ``[T, 1, H]``, or ``[T/tp, 1, H]`` under sequence parallelism.
        rows: Packed positions to keep, ``[R]``.
        dims: The mesh.

    Returns:
        ``[R, H]``, replicated over tp. The loss hands back a complete gradient on every tp rank, so the gather's
        backward only takes this rank's part of the sequence: summing there would count it tp times.
    """
    if dims.sequence_parallel:
        output = gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=False, group=dims.tp_group)
    return output[:, 0].index_select(0, rows)
