"""The teacher's forward pass: hidden states at the response rows, never logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from opsd_megatron.distributed.parallel import ParallelDims
from opsd_megatron.models.build import HiddenStatesGPT, forward_packed
from opsd_megatron.models.hidden import response_hidden
from opsd_megatron.types import PackedMicroBatch, PackedSequences, RowExchange, TeacherTargets


def _teacher_side(micro_batch: PackedMicroBatch) -> PackedSequences:
    assert micro_batch.teacher is not None, "this micro-batch was packed without a teacher"
    return micro_batch.teacher


def exchange_rows(hidden: Tensor, exchange: RowExchange, group: dist.ProcessGroup) -> Tensor:
    """Bring the teacher's rows to the context-parallel ranks that own the student's. Not differentiable.

    Ranks: every rank of ``group``.

    Args:
        hidden: The teacher's hidden states at this rank's ``teacher.rows``, ``[sum(send_counts), H]``.
        exchange: Who gets which.
        group: The context-parallel group.

    Returns:
        ``[R, H]``, in the order of this rank's student rows.
    """
    received = hidden.new_empty(sum(exchange.receive_counts), hidden.shape[1])
    counts = list(exchange.receive_counts), list(exchange.send_counts)
    dist.all_to_all_single(received, hidden.contiguous(), *counts, group=group)
    return received[exchange.order]


def collect_targets(
    chunks: Sequence[HiddenStatesGPT], micro_batches: Sequence[PackedMicroBatch], dims: ParallelDims
) -> list[TeacherTargets | None]:
    """Run the teacher over the teacher side of every micro-batch through Megatron's schedule, without gradient.

    Ranks: every rank, with equal numbers of micro-batches on every data-parallel rank.

    Args:
        chunks: This rank's chunks of the teacher; not wrapped for data parallelism, since nothing is reduced.
        micro_batches: This data-parallel rank's micro-batches, on ``dims.device``.
        dims: The mesh.

    Returns:
        One :class:`TeacherTargets` for each micro-batch on the last pipeline stage; ``None`` on the others.
    """

    def forward_step(
        batches: Iterator[PackedMicroBatch], model: HiddenStatesGPT
    ) -> tuple[Tensor, Callable[..., Tensor]]:
        batch = next(batches)
        sequences = _teacher_side(batch)
        output = forward_packed(model, sequences)

        def keep(hidden: Tensor, non_loss_data: bool = False) -> Tensor:
            rows = response_hidden(hidden, sequences.rows, dims)
            return rows if batch.exchange is None else exchange_rows(rows, batch.exchange, dims.cp_group)

        return output, keep

    with torch.no_grad():
        kept: list[Tensor] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(micro_batches),
            # Only a bound: stages exchange the true shape of every micro-batch (variable_seq_lengths).
            seq_length=max(_teacher_side(batch).ids.numel() for batch in micro_batches),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not dims.is_last_stage:
        return [None] * len(micro_batches)
    head_weight = chunks[-1].output_head().detach()
    return [TeacherTargets(hidden, head_weight) for hidden in kept]
