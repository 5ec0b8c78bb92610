"""The student's data-parallel wrapper, its optimizer and schedule, all Megatron-Core's own.

Megatron-Core picks Transformer Engine's or Apex's fused Adam where one is installed and torch's AdamW elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from opsd_megatron.config import Config, OptimizerConfig
from opsd_megatron.models.build import HiddenStatesGPT


@dataclass(frozen=True)
class Trainable:
    """A model that trains: this rank's chunks of it with their gradient buffers, optimizer and schedule.

    Attributes:
        chunks: The wrapped chunks.
        optimizer: Megatron-Core's.
        scheduler: Megatron-Core's.
        own_weights: Whether the optimizer keeps weights of its own (the float32 master copy of bf16 ones), rather than
            updating the model's in place.
    """

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    own_weights: bool

    @property
    def modules(self) -> list[HiddenStatesGPT]:
        """The chunks without their wrapper."""
        return [chunk.module for chunk in self.chunks]

    def offload(self) -> None:
        """Give up the device memory that only an update needs, until :meth:`restore`. Gradients are lost.

        Gradient buffers are freed; of a bfloat16 model the optimizer's state moves to the host, its float32 weights
        with it. That of a float32 model stays: its weights are the model's own. Megatron-Core's functions for just
        this; on CPU the latter has nothing to move.
        """
        for chunk in self.chunks:
            chunk.offload_grad_buffers()
        if self.own_weights:
            self.optimizer.offload_to_cpu()

    def restore(self) -> None:
        """Take back what :meth:`offload` gave up; gradients are zero."""
        if self.own_weights:
            self.optimizer.restore_from_cpu()
        for chunk in self.chunks:
            chunk.restore_grad_buffers()


def make_trainable(model: Sequence[HiddenStatesGPT], config: Config) -> Trainable:
    """Wrap the chunks of a model for data parallelism and build their optimizer.

    Call after the weights are loaded: for bf16 the optimizer takes its float32 master copy from them here.

    Ranks: every rank.
    """
    distributed = config.parallel.distributed_optimizer
    chunks = [
        DistributedDataParallel(
            config=chunk.config,
            # Gradients are summed in float32 and divided once, by the step's token count over the whole world, in
            # finalize_model_grads; so the loss does not depend on how the batch is split.
            ddp_config=DistributedDataParallelConfig(
                use_distributed_optimizer=distributed, grad_reduce_in_fp32=True, check_for_nan_in_grad=True
            ),
            module=chunk,
        )
        for chunk in model
    ]
    for chunk in model:
        if chunk.post_process:
            # Objectives hand over sums of row losses, and finalize_model_grads divides: nothing scales on the way back.
            chunk.output_head().unit_upstream = True  # type: ignore[attr-defined]
    settled = model[0].config  # one object, which all chunks share
    settled.finalize_model_grads_func = finalize_model_grads
    settled.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    bf16 = config.model.dtype == "bfloat16"
    settings = config.optimizer
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            weight_decay=settings.weight_decay,
            clip_grad=settings.clip_grad,
            bf16=bf16,
            params_dtype=settled.params_dtype,
            use_distributed_optimizer=distributed,
        ),
        chunks,
    )
    for group in optimizer.param_groups:
        if "fused" in group:  # torch's: step by step it takes twice the time, and two temporaries of a tensor's size
            group["fused"] = True
    return Trainable(chunks, optimizer, _scheduler(optimizer, settings, config.train.steps), own_weights=bf16)


def _scheduler(optimizer: MegatronOptimizer, settings: OptimizerConfig, steps: int) -> OptimizerParamScheduler:
    decay_steps = steps if settings.decay_steps is None else settings.decay_steps
    if settings.schedule == "constant":
        decay_steps = max(decay_steps, settings.warmup_steps + 1)  # there is none, but Megatron wants one that fits
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.lr if settings.schedule == "constant" else settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
