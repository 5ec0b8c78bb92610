"""Every combination of sizes is either refused in one line that names its keys, or Megatron-Core builds it.

One process stands for one rank of each mesh: its collectives go to torch's fake backend.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from opsd_megatron.config import Config, ParallelConfig
from opsd_megatron.errors import ConfigError
from tests.distributed import run_distributed
from tests.tiny import make_tiny_qwen3, make_tiny_qwen3_moe

SIZES: dict[str, tuple[Any, ...]] = {
    "tensor": (1, 2, 4),
    "pipeline": (1, 2, 3),
    "virtual_stages": (1, 2, 3),
    "context": (1, 2),
    "expert": (1, 2, 3),
    "expert_tensor": (None, 1, 2),
    "sequence": (False, True),
}


def configs() -> Iterator[Config]:
    for values in itertools.product(*SIZES.values()):
        config = Config(parallel=ParallelConfig(**dict(zip(SIZES, values, strict=True))))
        config.model.path, config.data.train, config.output_dir = "m", "t", "o"
        config.model.dtype, config.model.backend = "float32", "torch"
        yield config


@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (6, 3), (8, 7)])
def test_refused_in_one_line_or_built(tmp_path: Path, world_size: int, rank: int) -> None:
    shape: dict[str, Any] = {"num_layers": 5, "heads": 4, "kv_heads": 2}
    models = [
        make_tiny_qwen3(tmp_path / "dense", **shape),
        make_tiny_qwen3_moe(tmp_path / "moe", experts=6, **shape),
    ]
    (built, refused) = run_distributed(_try_all, 1, models, world_size, rank)[0]
    assert built >= {1: 4, 6: 60, 8: 100}[world_size] and refused > built


def _try_all(models: list[Path], world_size: int, rank: int) -> tuple[int, int]:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from opsd_megatron.models.families import read_spec
    from opsd_megatron.models.qwen3 import check_mesh

    # The gloo groups that Megatron-Core makes beside the others would wait for the other ranks.
    parallel_state.initialize_model_parallel = partial(
        parallel_state.initialize_model_parallel, create_gloo_process_groups=False
    )
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), world_size=world_size, rank=rank)
    built = refused = 0
    for path, config in itertools.product(models, configs()):
        spec = read_spec(path)
        try:
            config.validate(world_size)
            check_mesh(spec, config)
        except ConfigError as error:
            assert "parallel." in str(error) and "\n" not in str(error)
            refused += 1
            continue
        try:
            _build(spec, config)
        except Exception as error:
            raise AssertionError(f"passed, but cannot be built: {config.parallel}, {path.name}") from error
        built += 1
    return built, refused


def _build(spec: Any, config: Config) -> None:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from opsd_megatron.distributed.parallel import ParallelDims
    from opsd_megatron.distributed.seed import seed_everything
    from opsd_megatron.models.build import build_model

    dims = ParallelDims.initialize(config.parallel)
    seed_everything(0, dims)
    assert dims.tp * dims.cp * dims.pp * dims.dp == dims.world_size
    chunks = build_model(spec, config, dims)
    assert len(chunks) == dims.vpp and all(chunk.decoder.layers for chunk in chunks)
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True)
    for chunk in chunks:
        DistributedDataParallel(chunk.config, settings, chunk)
    dims.destroy()
