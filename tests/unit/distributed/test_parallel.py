from __future__ import annotations

import os
import random
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from opsd_megatron.config import ParallelConfig
from opsd_megatron.errors import ConfigError
from tests.distributed import run_distributed


def test_coordinates_and_groups_of_a_mesh_of_four() -> None:
    """Tensor-parallel ranks are neighbours, stages are furthest apart."""
    found = run_distributed(_coordinates, 4, ParallelConfig(tensor=2, pipeline=2, sequence=True))
    assert [(c["tp_rank"], c["pp_rank"], c["dp_rank"]) for c in found] == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert [c["tp_ranks"] for c in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [c["pp_ranks"] for c in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [c["first_last"] for c in found] == [(True, False)] * 2 + [(False, True)] * 2
    assert [c["last"] for c in found] == [2, 3, 2, 3]
    assert all(c["sizes"] == (2, 2, 1, 4) and c["sequence"] for c in found)


def _coordinates(parallel: ParallelConfig) -> dict[str, Any]:
    from opsd_megatron.distributed.parallel import ParallelDims

    dims = ParallelDims.initialize(parallel)
    assert dims.device == torch.device("cpu")
    assert dims.pg_collection.dp_cp.size() == dims.dp
    assert dims.rank == dist.get_rank()
    return {
        "tp_rank": dims.tp_rank,
        "pp_rank": dims.pp_rank,
        "dp_rank": dims.dp_rank,
        "tp_ranks": dist.get_process_group_ranks(dims.tp_group),
        "pp_ranks": dist.get_process_group_ranks(dims.pp_group),
        "first_last": (dims.is_first_stage, dims.is_last_stage),
        "last": dims.last_stage_rank,
        "sizes": (dims.tp, dims.pp, dims.dp, dims.world_size),
        "sequence": dims.sequence_parallel,
    }


def test_experts_are_laid_out_within_a_stage() -> None:
    """tp 2 with dp 2: experts whole over all four ranks, or halves of experts over two pairs."""
    whole, halves = zip(*run_distributed(_expert_coordinates, 4), strict=True)
    assert list(whole) == [(4, rank, 1, 0, [0, 1, 2, 3]) for rank in range(4)]
    assert list(halves) == [(2, rank // 2, 2, rank % 2, [0, 1, 2, 3]) for rank in range(4)]


def _expert_coordinates() -> list[Any]:
    from opsd_megatron.distributed.parallel import ParallelDims

    found = []
    for expert, expert_tensor in ((4, 1), (2, None)):
        dims = ParallelDims.initialize(
            ParallelConfig(tensor=2, sequence=True, expert=expert, expert_tensor=expert_tensor)
        )
        group = dist.get_process_group_ranks(dims.expert_group)
        found.append((dims.ep, dims.ep_rank, dims.etp, dims.etp_rank, group))
        dims.destroy()
    return found


def test_what_makes_no_mesh_is_explained_and_leaves_no_world_behind() -> None:
    run_distributed(_no_meshes, 1)


def _no_meshes() -> None:
    from opsd_megatron.distributed.parallel import ParallelDims

    # The launcher made a world; what is refused must neither need nor end it.
    for again in (False, True):
        if again:
            dist.destroy_process_group()
            for name in ("RANK", "WORLD_SIZE"):
                os.environ.pop(name, None)
        for sizes, message in (
            ({"tensor": 2}, "world size 1 is not a multiple .* = 2 . 1 . 1; start a multiple of 2 processes"),
            ({"context": 0}, "parallel.context=0 must be at least 1"),
            ({"expert": 2}, "parallel.expert=2 . parallel.expert_tensor=1 does not divide the 1 ranks"),
            ({"virtual_stages": 2}, "parallel.virtual_stages=2 .* needs parallel.pipeline > 1"),
            ({"sequence": True}, "parallel.sequence=true .* needs parallel.tensor > 1"),
        ):
            with pytest.raises(ConfigError, match=message):
                ParallelDims.initialize(ParallelConfig(**sizes))
            assert dist.is_initialized() is not again
        ParallelDims.initialize(ParallelConfig()).destroy()


def test_two_ranks_rebuild_seed_and_communicate() -> None:
    """One launch of two ranks for what needs no more: data parallelism, another mesh, seeds, object collectives."""
    run_distributed(_two_ranks, 2)


def _two_ranks() -> None:
    from opsd_megatron.distributed.collectives import broadcast_object, gather_objects, gather_shards
    from opsd_megatron.distributed.parallel import ParallelDims

    dims = ParallelDims.initialize(ParallelConfig())
    rank = dist.get_rank()
    assert (dims.dp, dims.dp_rank, dims.tp, dims.is_first_stage, dims.is_last_stage) == (2, rank, 1, True, True)
    dims.destroy()
    # The default group was there before the mesh, and torch holds none of the mesh's own any more.
    assert list(dist.distributed_c10d._world.pg_map) == [dist.group.WORLD]

    dims = ParallelDims.initialize(ParallelConfig(tensor=2))
    assert dims.tp_rank == rank
    _check_seeds(dims)
    assert broadcast_object({"rank": rank}, src=1) == {"rank": 1}
    assert gather_objects(("rank", rank)) == [("rank", 0), ("rank", 1)]
    transposed = torch.full((2, 3), float(rank)).t()
    assert [shard.tolist() for shard in gather_shards(transposed, dims.tp_group)] == [[[0.0] * 2] * 3, [[1.0] * 2] * 3]


def _check_seeds(dims: Any) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from opsd_megatron.distributed.collectives import gather_objects
    from opsd_megatron.distributed.seed import seed_everything

    def draw() -> tuple[tuple[float, float, float], float]:
        seed_everything(3, dims)
        common = (random.random(), float(np.random.rand()), torch.rand(()).item())
        with get_cuda_rng_tracker().fork():
            return common, torch.rand(()).item()

    first, second = draw(), draw()
    assert first == second
    (common_0, own_0), (common_1, own_1) = gather_objects(first)
    assert common_0 == common_1
    assert own_0 != own_1


def test_a_process_without_torchrun_is_a_world_of_its_own() -> None:
    run_distributed(_alone, 1)


def _alone() -> None:
    from opsd_megatron.distributed.collectives import broadcast_object
    from opsd_megatron.distributed.parallel import ParallelDims

    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    for _ in range(2):
        dims = ParallelDims.initialize(ParallelConfig())
        assert (dims.world_size, dims.rank) == (1, 0)
        assert broadcast_object("here") == "here"
        dims.destroy()
        assert not dist.is_initialized()


def test_collectives_wait_as_long_as_the_configuration_says() -> None:
    """Those of the world and of Megatron-Core's groups, with torchrun's environment and without."""
    assert ParallelConfig().timeout_minutes == 30
    limits = [timedelta(minutes=7)] * 2
    assert run_distributed(_timeouts, 1, True) == [limits]
    assert run_distributed(_timeouts, 1, False) == [limits]


def _timeouts(launched: bool) -> list[timedelta]:
    from opsd_megatron.distributed.parallel import ParallelDims

    dist.destroy_process_group()
    if not launched:
        del os.environ["RANK"]
    dims = ParallelDims.initialize(ParallelConfig(timeout_minutes=7))
    groups = [dist.group.WORLD, dims.tp_group]
    return [group._get_backend(dims.device).options._timeout for group in groups if group is not None]
