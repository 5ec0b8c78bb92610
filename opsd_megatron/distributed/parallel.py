"""The mesh, and the one place that knows Megatron-Core's global process groups: all others get a ParallelDims."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from opsd_megatron.config import ParallelConfig
from opsd_megatron.config.mesh import check_mesh
from opsd_megatron.distributed.cpu import install_cpu_stand_ins
from opsd_megatron.errors import ConfigError


@dataclass(frozen=True, eq=False)
class ParallelDims:
    """Sizes, this rank's coordinates and process groups of the mesh.

    Ranks are laid out tensor-parallel first, then context-parallel, then data-parallel, then pipeline: neighbouring
    ranks share a tensor-parallel group, the heaviest traffic.

    Attributes:
        tp: Tensor-parallel size.
        pp: Pipeline ranks.
        vpp: Chunks of the model on each of them; above 1 the pipeline is interleaved.
        cp: Context-parallel size: ranks that each sequence is split over.
        dp: Data-parallel size.
        sequence_parallel: Whether activations are sharded over ``tp_group`` along the sequence outside attention and
            MLP.
        rank: Rank in the world.
        world_size: Processes of the job.
        device: Where this rank computes.
        pg_collection: The groups as Megatron-Core wants them handed over.
    """

    tp: int
    pp: int
    vpp: int
    cp: int
    dp: int
    sequence_parallel: bool
    rank: int
    world_size: int
    device: torch.device
    pg_collection: ProcessGroupCollection
    _owns_world: bool = False

    @staticmethod
    def initialize(parallel: ParallelConfig) -> ParallelDims:
        """Join the job and build the mesh.

        A default process group that exists already is used as it is. Otherwise one is made from torchrun's
        environment, over NCCL where a CUDA device exists and over gloo elsewhere; without such an environment this
        process is a world of its own.

        Ranks: every rank of the world, once; :meth:`destroy` first to build another mesh.

        Raises:
            ConfigError: The sizes make no mesh of this many processes; names the key, its value and what would be
                valid.
        """
        install_cpu_stand_ins()
        device, owns_world = join_world(parallel.timeout_minutes)
        try:
            check_mesh(parallel, dist.get_world_size())
        except ConfigError:
            if owns_world:
                dist.destroy_process_group()
            raise
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            context_parallel_size=parallel.context,
            virtual_pipeline_model_parallel_size=parallel.virtual_stages if parallel.virtual_stages > 1 else None,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor,
            distributed_timeout_minutes=parallel.timeout_minutes,
        )
        groups = ProcessGroupCollection.use_mpu_process_groups()
        return ParallelDims(
            tp=parallel.tensor,
            pp=parallel.pipeline,
            vpp=parallel.virtual_stages,
            cp=parallel.context,
            dp=groups.dp.size(),
            sequence_parallel=parallel.sequence,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            device=device,
            pg_collection=groups,
            _owns_world=owns_world,
        )

    def destroy(self) -> None:
        """Take the mesh down, and the default process group too where :meth:`initialize` made it.

        Ranks: every rank of the world.
        """
        # Megatron-Core only forgets its groups, and each keeps its connections and threads: gloo's wake up a hundred
        # times a second. The first entry stands for the world.
        for group in (parallel_state._global_process_group_list or [None])[1:]:
            dist.destroy_process_group(group)
        parallel_state.destroy_model_parallel()
        if self._owns_world:
            dist.destroy_process_group()

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """Ranks that hold shards of the same tensors."""
        return self.pg_collection.tp

    @property
    def pp_group(self) -> dist.ProcessGroup:
        """Ranks that hold consecutive layers, first stage first."""
        return self.pg_collection.pp

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """Ranks that hold equal weights and see different data."""
        return self.pg_collection.dp

    @property
    def cp_group(self) -> dist.ProcessGroup:
        """Ranks that hold equal weights and parts of the same sequences."""
        return self.pg_collection.cp

    @property
    def dp_cp_group(self) -> dist.ProcessGroup:
        """Ranks that hold equal weights: those that gradients are summed over."""
        return self.pg_collection.dp_cp

    @property
    def expert_data_group(self) -> dist.ProcessGroup:
        """Ranks that hold equal weights of experts."""
        return self.pg_collection.expt_dp

    @property
    def expert_group(self) -> dist.ProcessGroup:
        """Ranks that together hold all experts of their layers: for each expert-parallel rank, the parts of its own."""
        return self.pg_collection.tp_ep

    @property
    def ep(self) -> int:
        """Expert-parallel size: over how many ranks a layer's experts are spread."""
        return self.pg_collection.ep.size()

    @property
    def ep_rank(self) -> int:
        """This rank's share of the experts."""
        return self.pg_collection.ep.rank()

    @property
    def etp(self) -> int:
        """Expert-tensor-parallel size: into how many parts an expert is cut."""
        return self.pg_collection.expt_tp.size()

    @property
    def etp_rank(self) -> int:
        """This rank's part of its experts."""
        return self.pg_collection.expt_tp.rank()

    @property
    def tp_rank(self) -> int:
        """This rank's shard."""
        return self.tp_group.rank()

    @property
    def pp_rank(self) -> int:
        """This rank's place in the pipeline."""
        return self.pp_group.rank()

    @property
    def cp_rank(self) -> int:
        """This rank's part of each sequence."""
        return self.cp_group.rank()

    @property
    def dp_rank(self) -> int:
        """This rank's share of the data."""
        return self.dp_group.rank()

    @property
    def sequence_multiple(self) -> int:
        """What the length of every packed sequence must be a multiple of (``data.context``)."""
        return 2 * self.cp if self.cp > 1 else 1

    @property
    def packing_multiple(self) -> int:
        """What the tokens of a micro-batch must be a multiple of; sequence parallelism splits each part again."""
        return math.lcm(self.sequence_multiple, self.cp * self.tp if self.sequence_parallel else 1)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds the tokens."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output head and computes the loss."""
        return self.pp_rank == self.pp - 1

    @property
    def last_stage_rank(self) -> int:
        """World rank of the last one in this rank's pipeline."""
        return dist.get_global_rank(self.pp_group, self.pp - 1)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    # NVIDIA's containers let products of float32 matrices round to TF32, which leaves three digits of a logit.
    torch.set_float32_matmul_precision("highest")
    return device


def join_world(timeout_minutes: int) -> tuple[torch.device, bool]:
    """Join torchrun's job, or make a world of this process alone.

    Ranks: every rank of the world; calling it again does nothing.

    Args:
        timeout_minutes: How long a collective of the world may wait for its slowest rank. torch's own limit is 10
            minutes over NCCL, less than ranks may rightly wait for one another (``ParallelConfig.timeout_minutes``).

    Returns:
        Where this rank computes, and whether the default process group was made here rather than found.
    """
    device = _device()
    if dist.is_initialized():
        return device, False
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    return device, True
