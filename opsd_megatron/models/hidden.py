"""From the last stage's output to the hidden states that carry loss."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from opsd_megatron.distributed.parallel import ParallelDims


def response_hidden(output: Tensor, rows: Tensor, dims: ParallelDims) -> Tensor:
    """Select the hidden states at the response rows.

    Under sequence parallelism only the selected rows travel: gathered forward, reduce-scattered backward. Backward
    therefore wants each rank's own part of their gradient, not the sum (``reduce_hidden_grad=False`` of the losses):
    summed there already, it would count tp times, and two collectives would do the work of one. Where there is a
    gradient, rows travel in float32 at least: the ranks' parts of it cancel in good part, and are not to be rounded
    before they are summed.

    Ranks: every rank of a tensor-parallel group on the last pipeline stage.

    Args:
        output: What the last stage returns: ``[T, 1, H]``, or ``[T/tp, 1, H]`` under sequence parallelism.
        rows: Packed positions to keep, ``[R]``.
        dims: The mesh.

    Returns:
        ``[R, H]``, replicated over tp; under sequence parallelism in float32 at least where it takes a gradient.
    """
    output = output[:, 0]
    if not dims.sequence_parallel or len(rows) == 0:
        return output.index_select(0, rows)
    owner = rows // output.shape[0]
    counts = torch.bincount(owner, minlength=dims.tp)
    # Each rank sends its rows in their order, filled up to the longest such list: never more than all positions.
    place = torch.empty_like(rows)
    order = owner.argsort(stable=True)
    place[order] = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[owner[order]]
    longest = int(counts.max())
    own = rows[owner == dims.tp_rank] % output.shape[0]
    sent = torch.nn.functional.pad(output.index_select(0, own), (0, 0, 0, longest - len(own)))
    if sent.requires_grad:
        sent = sent.to(torch.promote_types(sent.dtype, torch.float32))
    gathered = gather_from_sequence_parallel_region(sent, tensor_parallel_output_grad=True, group=dims.tp_group)
    return gathered.index_select(0, owner * longest + place)
