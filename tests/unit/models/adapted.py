"""Tiny models with adapters on any mesh, and what runs through them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opsd_megatron.config import Config, LoraConfig
from opsd_megatron.types import AlignedSample

RANK, ALPHA = 3, 7.0
# Of four micro-batches' samples: lengths of prompt and response.
LENGTHS = (((3, 8), (5, 9)), ((7, 2), (1, 15)), ((20, 12),), ((2, 3), (4, 4), (3, 9)))
SHAPE: dict[str, Any] = {"num_layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 8, "hidden_size": 32}


@dataclass(frozen=True)
class Mesh:
    model: str
    parallel: dict[str, Any] = field(default_factory=dict)
    recompute: str = "none"


@contextmanager
def adapted(path: Path, mesh: Mesh, *, targets: list[str] | None = None) -> Iterator[tuple[Any, Any, Any, Config]]:
    """Chunks with adapters that do nothing yet, their spec, mesh and configuration."""
    from opsd_megatron.checkpoint.hf_io import SafetensorsReader
    from opsd_megatron.distributed.parallel import ParallelDims
    from opsd_megatron.distributed.seed import seed_everything
    from opsd_megatron.models.build import build_model
    from opsd_megatron.models.families import read_spec
    from opsd_megatron.models.lora import add_adapters
    from opsd_megatron.models.weight_map import load_hf_weights

    config = Config(lora=LoraConfig(RANK, ALPHA))
    if targets is not None:
        config.lora.targets = targets
    config.model.dtype, config.model.recompute = "float32", mesh.recompute
    config.parallel.distributed_optimizer = False
    for key, value in mesh.parallel.items():
        setattr(config.parallel, key, value)
    dims = ParallelDims.initialize(config.parallel)
    try:
        seed_everything(0, dims)
        spec = read_spec(path)
        chunks = build_model(spec, config, dims)
        load_hf_weights(chunks, spec, SafetensorsReader(path), dims)
        add_adapters(chunks, config.lora, seed=5)
        yield chunks, spec, dims, config
    finally:
        dims.destroy()


def fill_adapters(chunks: Any) -> None:
    """Random factors of which both matter. On one rank only: where a factor is cut, ranks would draw alike."""
    generator = torch.Generator().manual_seed(1)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if "_lora." in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def samples(micro_batch: int) -> list[AlignedSample]:
    generator = torch.Generator().manual_seed(micro_batch)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 270, (count,), generator=generator).tolist())

    return [AlignedSample(tokens(prompt), None, tokens(response)) for prompt, response in LENGTHS[micro_batch]]


def save(chunks: Any, directory: Path, source: Path) -> None:
    from opsd_megatron.checkpoint.state import TrainerState, save_checkpoint

    save_checkpoint(directory, state=TrainerState(step=0), model=chunks, source=source)


def make_adapted(models: dict[str, Path], folder: Path) -> None:
    """Checkpoints of both models with random factors, from one rank."""
    for name, path in models.items():
        with adapted(path, Mesh(name)) as (chunks, *_):
            fill_adapters(chunks)
            save(chunks, folder / name, path)


def hidden_states(chunks: Any) -> Tensor:
    from opsd_megatron.data.packing import PackingLayout, pack
    from opsd_megatron.models.build import forward_packed

    (chunk,) = chunks
    batch = pack(samples(0), with_teacher=False, layout=PackingLayout(1, 2))
    with torch.no_grad():
        return forward_packed(chunk, batch.student)
