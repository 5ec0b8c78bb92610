"""The teacher's forward pass: hidden states at the response rows, never logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from opsd_megatron.distributed.parallel import ParallelDims
from opsd_megatron.models.build import HiddenStatesGPT, forward_packed
from opsd_megatron.models.hidden import response_hidden
from opsd_megatron.types import PackedMicroBatch, PackedSequences, TeacherTargets


def _teacher_side(micro_batch: PackedMicroBatch) -> PackedSequences:
    assert micro_batch.teacher is not None, "this micro-batch was packed without a teacher"
    return micro_batch.teacher


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
        sequences = _teacher_side(next(batches))
        output = forward_packed(model, sequences)

        def keep(hidden: Tensor, non_loss_data: bool = False) -> Tensor:
            return response_hidden(hidden, sequences.rows, dims)

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
