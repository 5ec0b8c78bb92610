"""Weight sync against the loop everyone writes: ``torchrun --nproc-per-node 2 benchmarks/sync.py [--engine]``.

A random Qwen3 of Qwen3-0.6B's dimensions, tensor-parallel over all ranks, goes to a consumer that keeps this rank's
part of every tensor, as an engine of the same tensor parallelism does: an all-gather and a copy for every parameter; in
buckets; as a run does that has to gather, in buckets over NCCL and one by one over gloo; and each rank's own shards,
which is what a run does with such an engine. Beside them a plain copy of as many bytes as the whole model has. Runs are
interleaved; seconds are medians of the slowest rank's. With ``--engine``, the same also go into vLLM itself. Prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_megatron.config import Config
from opsd_megatron.distributed.collectives import gather_shards
from opsd_megatron.distributed.parallel import ParallelDims, join_world
from opsd_megatron.models.build import build_model
from opsd_megatron.models.export import BUCKET_BYTES, export_hf_weights
from opsd_megatron.models.families import read_spec
from opsd_megatron.models.qwen3 import Qwen3Spec
from opsd_megatron.models.weight_map import hf_shapes, join_shards, partition_dim, placed_parameters, placements
from opsd_megatron.rollout.engine import ShardLayout
from opsd_megatron.rollout.weight_sync import own_shards

MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}

Weights = Iterator[tuple[str, Tensor]]


def plain_loop(chunks: list[Any], spec: Qwen3Spec, dims: ParallelDims) -> Weights:
    """Gather one parameter after the other, put it together, hand it over."""
    for place, parameter in placed_parameters(chunks, spec, dims):
        shards = gather_shards(parameter.detach(), dims.tp_group)
        yield from zip(place.hf_names, join_shards(place, spec, shards), strict=True)


class Consumer:
    """Keeps this rank's run of rows or columns of every tensor, as the linear layers of an engine do."""

    def __init__(self, spec: Qwen3Spec, dims: ParallelDims, dtype: torch.dtype) -> None:
        self._runs: dict[str, tuple[int, int, int]] = {}
        self._held: dict[str, Tensor] = {}
        shapes = hf_shapes(spec)
        for place in placements(spec):
            dim = partition_dim(place.rule)
            for name in place.hf_names:
                shape = list(shapes[name])
                if dim is not None:
                    shape[dim] //= dims.tp
                    self._runs[name] = (dim, shape[dim] * dims.tp_rank, shape[dim])
                self._held[name] = torch.zeros(shape, dtype=dtype, device=dims.device)

    def __call__(self, weights: Weights) -> None:
        """Take every tensor."""
        for name, tensor in weights:
            self._held[name].copy_(tensor.narrow(*self._runs[name]) if name in self._runs else tensor)

    def digest(self) -> float:
        """Equal where what is held is equal."""
        return math.fsum(float(tensor.double().sum()) for tensor in self._held.values())


def copy(target: Tensor, source: Tensor) -> None:
    """One memory copy."""
    target.copy_(source)


def wait_for(device: torch.device) -> None:
    """Until all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def slowest(action: Callable[[], None], device: torch.device) -> float:
    """Seconds of the slowest rank."""
    wait_for(device)
    dist.barrier()
    started = time.perf_counter()
    action()
    wait_for(device)
    seconds = torch.tensor(time.perf_counter() - started, device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def interleaved(actions: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each, after one run that does not count."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats + 1):
        for name, action in actions.items():
            times[name].append(slowest(action, device))
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def report(rank: int, title: str, seconds: dict[str, float], size: float, against: str) -> None:
    """One table."""
    if rank == 0:
        print(f"\n| {title} | s | GB/s | times as fast |\n| --- | --- | --- | --- |")
        for name, each in seconds.items():
            print(f"| {name} | {each:.3f} | {size / each:.2f} | {seconds[against] / each:.1f} |", flush=True)


def main() -> None:
    """Run the benchmark; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--bucket", type=int, default=BUCKET_BYTES // 2**20, help="MiB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engine", action="store_true", help="also into vLLM")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    config = Config()
    config.model.dtype = options.dtype
    config.rollout.kv_cache_gib = 0.1
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL | {"torch_dtype": options.dtype}))
        measure(Path(folder), config, options)


def measure(path: Path, config: Config, options: argparse.Namespace) -> None:
    """Build the model and compare."""
    join_world(config.parallel.timeout_minutes)
    config.parallel.tensor = config.rollout.tensor = dist.get_world_size()
    dims = ParallelDims.initialize(config.parallel)
    spec = read_spec(path)
    chunks = build_model(spec, config, dims)
    seeds = {"whole": 0, "cut": 1 + dims.rank}
    generators = {kind: torch.Generator(dims.device).manual_seed(seed) for kind, seed in seeds.items()}
    with torch.no_grad():
        for place, parameter in placed_parameters(chunks, spec, dims):
            generator = generators["whole" if partition_dim(place.rule) is None else "cut"]  # replicas are equal
            parameter.uniform_(-0.05, 0.05, generator=generator)
    dtype = next(chunks[0].parameters()).dtype
    numbers = sum(map(math.prod, hf_shapes(spec).values()))
    own = own_shards(spec, dims, ShardLayout(dims.tp, 64))
    assert own == hf_shapes(spec).keys()
    sources: dict[str, Callable[[], Weights]] = {
        "gather and load, one parameter after the other": lambda: plain_loop(chunks, spec, dims),
        f"in buckets of {options.bucket} MiB": lambda: export_hf_weights(
            chunks, spec, dims, bucket_bytes=options.bucket * 2**20
        ),
        "as a run does over this backend": lambda: export_hf_weights(chunks, spec, dims),
        "own shards": lambda: export_hf_weights(chunks, spec, dims, own_shards_of=own),
    }
    against = next(iter(sources))

    def into(consumer: Callable[[Weights], None]) -> dict[str, Callable[[], None]]:
        return {name: lambda source=source: consumer(source()) for name, source in sources.items()}  # type: ignore[misc]

    consumer, digests = Consumer(spec, dims, dtype), set()
    for action in into(consumer).values():
        action()
        digests.add(consumer.digest())
    assert len(digests) == 1, "the consumer got different weights"
    here, there = (make(numbers, dtype=dtype, device=dims.device) for make in (torch.ones, torch.zeros))
    actions = {**into(consumer), "plain copy of the whole model's bytes": partial(copy, there, here)}
    size = numbers * dtype.itemsize / 1e9
    if dims.rank == 0:
        print(f"{numbers / 1e9:.2f}e9 parameters, {size:.2f} GB in {options.dtype}, {dims.tp} ranks, 1 thread each")
    report(dims.rank, "export", interleaved(actions, options.repeats, dims.device), size, against)
    if options.engine:
        from opsd_megatron.rollout.vllm_engine import VllmEngine

        del consumer, here, there, actions
        engine = VllmEngine.start(path, config, max_length=64)
        report(
            dims.rank,
            "into vLLM",
            interleaved(into(engine.update_weights), options.repeats, dims.device),
            size,
            against,
        )
        engine.close()
    dims.destroy()


if __name__ == "__main__":
    main()
