"""One optimizer update on prepared micro-batches: forward, backward, reduction of metrics, update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from opsd_megatron.distributed.parallel import ParallelDims
from opsd_megatron.models.build import forward_packed
from opsd_megatron.models.hidden import response_hidden
from opsd_megatron.objectives.base import LossOutput, Objective, RatioObjective
from opsd_megatron.telemetry.timers import PhaseTimer
from opsd_megatron.trainer.optimizer import Trainable
from opsd_megatron.types import PackedMicroBatch, TeacherTargets

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class StepResult:
    """What one optimizer update, or all of a step, report; equal on every rank.

    Attributes:
        metrics: The objective's metrics: means over all rows, and maxima.
        grad_norm: Global gradient norm before clipping; of several updates the largest.
        lr: Learning rate.
        rows: Response tokens over the whole world.
        maxima: Which of the metrics are maxima.
    """

    metrics: dict[str, float]
    grad_norm: float
    lr: float
    rows: int
    maxima: frozenset[str] = frozenset()

    @classmethod
    def of_updates(cls, updates: Sequence[StepResult]) -> StepResult:
        """What the updates of one step report together; a metric that not all of them have is that of the others."""
        if len(updates) == 1:
            return updates[0]
        metrics: dict[str, float] = {}
        maxima = frozenset().union(*(update.maxima for update in updates))
        for name in dict.fromkeys(name for update in updates for name in update.metrics):
            having = [update for update in updates if name in update.metrics]
            if name in maxima:
                metrics[name] = max(update.metrics[name] for update in having)
            else:
                rows = sum(update.rows for update in having)
                metrics[name] = sum(update.metrics[name] * update.rows for update in having) / max(rows, 1)
        return cls(
            metrics,
            max(update.grad_norm for update in updates),
            updates[0].lr,
            sum(update.rows for update in updates),
            maxima,
        )


def pass_over(trainable: Trainable, metrics: Mapping[str, float]) -> StepResult:
    """A step in which nothing is to be learnt from: weights and optimizer state stay, the schedule moves on.

    An update by gradients of zero would not do that: the optimizer's momentum would move the weights.

    Args:
        trainable: The student.
        metrics: What there is to report all the same.
    """
    trainable.scheduler.step(1)
    return StepResult(metrics=dict(metrics), grad_norm=0.0, lr=trainable.scheduler.get_lr({}), rows=0)


def optimizer_step(
    trainable: Trainable,
    objective: Objective,
    micro_batches: Sequence[PackedMicroBatch],
    targets: MutableSequence[TeacherTargets | None],
    dims: ParallelDims,
    *,
    accept: Callable[[Mapping[str, float]], None] = lambda metrics: None,
    advance: bool = True,
    timer: PhaseTimer | None = None,
) -> StepResult:
    """Accumulate gradients over micro-batches and update the weights.

    Ranks: every rank, with equal numbers of micro-batches.

    Args:
        trainable: The student.
        objective: Gives the loss.
        micro_batches: This data-parallel rank's share.
        targets: The teacher's side of each. They are taken out one by one, so that each is freed after its loss unless
            the caller holds it elsewhere.
        dims: The mesh.
        accept: Sees the metrics, equal on every rank, before the update, and raises where there must be none.
        advance: Move the schedule on first: in the first update of a step.
        timer: Charged with the phases ``student``, the gradients and their reduction, and ``optimizer``.

    Raises:
        FloatingPointError: The loss or a gradient is not finite; the weights are left as they were.
    """
    timer = timer or PhaseTimer()
    with timer("student"):
        outputs = _gradients(trainable, objective, micro_batches, targets, dims)
        metrics, maxima, rows = _reduce_metrics(outputs, micro_batches, dims)
    if not math.isfinite(metrics["loss"]):
        raise FloatingPointError(f"the loss is {metrics['loss']}")
    accept(metrics)
    # The schedule counts from 1, so that warm-up does not spend its first step at a learning rate of 0 and the last
    # step ends the decay.
    if advance:
        trainable.scheduler.step(1)
    lr = trainable.scheduler.get_lr({})
    with timer("optimizer"):
        _, grad_norm, _ = trainable.optimizer.step()
    return StepResult(metrics, float(grad_norm or 0.0), lr, rows, maxima)


def _gradients(
    trainable: Trainable,
    objective: Objective,
    micro_batches: Sequence[PackedMicroBatch],
    targets: MutableSequence[TeacherTargets | None],
    dims: ParallelDims,
) -> list[LossOutput]:
    """This step's alone, reduced; the outputs are there on the last pipeline stage only."""
    for chunk in trainable.chunks:
        chunk.zero_grad_buffer()
    trainable.optimizer.zero_grad()
    try:
        return _forward_backward(trainable.chunks, objective, micro_batches, targets, dims)
    except RuntimeError as error:
        # Megatron's check of the gradients before they are reduced, which has no type of its own.
        if "grad norm" not in str(error):
            raise
        raise FloatingPointError("a gradient is not finite") from error


def with_old_log_probs(
    trainable: Trainable, objective: RatioObjective, micro_batches: Sequence[PackedMicroBatch], dims: ParallelDims
) -> list[PackedMicroBatch]:
    """The micro-batches with the student's current log-probs, which later updates compare with.

    Ranks: every rank, with equal numbers of micro-batches. They are there on the last pipeline stage only, where the
    loss is.
    """
    kept = _without_gradients(trainable, micro_batches, dims, objective.log_probs)
    if not dims.is_last_stage:
        return list(micro_batches)
    return [replace(batch, old_log_probs=old) for batch, old in zip(micro_batches, kept, strict=True)]


def forward_metrics(
    trainable: Trainable,
    micro_batches: Sequence[PackedMicroBatch],
    dims: ParallelDims,
    evaluate: Callable[[Tensor, Tensor, PackedMicroBatch], LossOutput],
) -> dict[str, float]:
    """The metrics of micro-batches that are not trained on.

    Ranks: every rank, with equal numbers of micro-batches; equal on all of them.

    Args:
        trainable: The student.
        micro_batches: This data-parallel rank's share.
        dims: The mesh.
        evaluate: Hidden states at the rows, the head's shard and the micro-batch to metrics; called on the last stage.
    """
    outputs = _without_gradients(trainable, micro_batches, dims, evaluate)
    return _reduce_metrics(outputs, micro_batches, dims)[0]


def _without_gradients(
    trainable: Trainable,
    micro_batches: Sequence[PackedMicroBatch],
    dims: ParallelDims,
    evaluate: Callable[[Tensor, Tensor, PackedMicroBatch], _Found],
) -> list[_Found]:
    """Megatron's schedule over the student side, forward only; there are results on the last stage only."""

    def forward_step(
        batches: Iterator[PackedMicroBatch], model: DistributedDataParallel
    ) -> tuple[Tensor, Callable[..., _Found]]:
        batch = next(batches)
        output = forward_packed(model, batch.student)

        def keep(output: Tensor, non_loss_data: bool = False) -> _Found:
            hidden = response_hidden(output, batch.student.rows, dims)
            return evaluate(hidden, model.module.output_head(), batch)

        return output, keep

    with torch.no_grad():
        kept: list[_Found] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in trainable.chunks],
            model=trainable.chunks,
            num_microbatches=len(micro_batches),
            # Only a bound: stages exchange the true shape of every micro-batch (variable_seq_lengths).
            seq_length=max(batch.student.ids.numel() for batch in micro_batches),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return kept


def _forward_backward(
    chunks: list[DistributedDataParallel],
    objective: Objective,
    micro_batches: Sequence[PackedMicroBatch],
    targets: MutableSequence[TeacherTargets | None],
    dims: ParallelDims,
) -> list[LossOutput]:
    """Megatron's schedule over the student side; the outputs are there on the last pipeline stage only."""

    def forward_step(
        numbered: Iterator[tuple[int, PackedMicroBatch]], model: DistributedDataParallel
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, LossOutput]]]:
        number, batch = next(numbered)
        output = forward_packed(model, batch.student)

        def loss(output: Tensor) -> tuple[Tensor, Tensor, LossOutput]:
            hidden = response_hidden(output, batch.student.rows, dims)
            target, targets[number] = targets[number], None
            result = objective.loss(hidden, model.module.output_head(), batch, target)
            rows = torch.tensor(batch.num_rows, dtype=torch.int, device=output.device)
            detached = LossOutput(result.loss_sum.detach(), result.sums, result.maxima)
            return result.loss_sum, rows, detached

        return output, loss

    outputs: list[LossOutput] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(enumerate(micro_batches)) for _ in chunks],
        model=chunks,
        num_microbatches=len(micro_batches),
        # Only a bound: stages exchange the true shape of every micro-batch (variable_seq_lengths).
        seq_length=max(batch.student.ids.numel() for batch in micro_batches),
        micro_batch_size=1,
        forward_only=False,
    )
    return outputs


def _reduce_metrics(
    outputs: Sequence[LossOutput], micro_batches: Sequence[PackedMicroBatch], dims: ParallelDims
) -> tuple[dict[str, float], frozenset[str], int]:
    """Sum over micro-batches and the ranks that share rows out, then tell the earlier pipeline stages.

    The last stage holds the names; it sends them along with the values, since the others never see a loss.
    """
    message: list[object] = [None]
    if dims.is_last_stage:
        sums = {name: torch.stack([output.sums[name] for output in outputs]).sum() for name in outputs[0].sums}
        maxima = {name: torch.stack([output.maxima[name] for output in outputs]).max() for name in outputs[0].maxima}
        rows = torch.tensor(float(sum(batch.num_rows for batch in micro_batches)), device=dims.device)
        # float64: sums over millions of rows, and the row count must stay exact.
        total = torch.stack([rows, *sums.values()]).double()
        dist.all_reduce(total, group=dims.dp_cp_group)
        values = total.tolist()
        count = int(values[0])
        metrics = {name: value / max(count, 1) for name, value in zip(sums, values[1:], strict=True)}
        if maxima:
            largest = torch.stack(list(maxima.values())).double()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=dims.dp_cp_group)
            metrics |= dict(zip(maxima, largest.tolist(), strict=True))
        message = [(metrics, frozenset(maxima), count)]
    if dims.pp > 1:
        dist.broadcast_object_list(message, src=dims.last_stage_rank, group=dims.pp_group)
    return cast("tuple[dict[str, float], frozenset[str], int]", message[0])
