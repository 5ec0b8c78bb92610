"""The rules on the mesh: what sizes go together, and in a job of how many processes."""

from __future__ import annotations

import math

from opsd_megatron.config.groups import ParallelConfig
from opsd_megatron.errors import ConfigError

_SIZES = ("tensor", "pipeline", "virtual_stages", "context", "expert", "expert_tensor")


def check_sizes(parallel: ParallelConfig) -> None:
    """Check each size by itself.

    Raises:
        ConfigError: Names the key, its value and what would be valid.
    """
    for name in _SIZES:
        size = getattr(parallel, name)
        if size is not None and size < 1:
            raise ConfigError(f"parallel.{name}={size} must be at least 1")


def check_mesh(parallel: ParallelConfig, world_size: int) -> None:
    """Check that the sizes make a mesh of ``world_size`` processes.

    Raises:
        ConfigError: Names the key, its value and what would be valid.
    """
    check_sizes(parallel)
    sizes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "context": parallel.context}
    model_ranks = math.prod(sizes.values())
    if world_size % model_ranks:
        raise ConfigError(
            f"the world size {world_size} is not a multiple of {' * '.join(f'parallel.{name}' for name in sizes)} = "
            f"{' * '.join(map(str, sizes.values()))}; start a multiple of {model_ranks} processes "
            "(torchrun --nnodes * --nproc-per-node) or change the mesh"
        )
    if parallel.virtual_stages > 1 and parallel.pipeline == 1:
        raise ConfigError(
            f"parallel.virtual_stages={parallel.virtual_stages} interleaves the stages of a pipeline: it needs "
            "parallel.pipeline > 1"
        )
    expert_ranks = parallel.expert * parallel.expert_parts
    if (stage_ranks := world_size // parallel.pipeline) % expert_ranks:
        raise ConfigError(
            f"parallel.expert={parallel.expert} * parallel.expert_tensor={parallel.expert_parts} does not divide the "
            f"{stage_ranks} ranks of a pipeline stage; choose sizes whose product does (parallel.expert_tensor is "
            "parallel.tensor unless set)"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError("parallel.sequence=true shards over tensor-parallel ranks: it needs parallel.tensor > 1")
