"""Conversion against a copy of the same files: ``python benchmarks/convert.py --work DIR [--hidden 2560 ...]``.

Makes a random Qwen3 (Qwen3-4B's dimensions in bfloat16, 8.0 GB, if not told otherwise), converts it to a Megatron
checkpoint and back with the tools in ``tools/checkpoint``, compares what came back bit for bit, and prints a Markdown
table: seconds, MB/s and peak memory (maximum resident set size) of each process, beside a plain copy of the same files.
Input files are dropped from the page cache before each measurement, output files are on disk (fsync) when it ends.
``DIR`` needs room for four copies of the model; everything made there is removed again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from opsd_megatron.checkpoint.hf_io import SafetensorsReader
from opsd_megatron.checkpoint.hf_writer import TensorPieces, write_hf_directory
from opsd_megatron.models.families import read_spec
from opsd_megatron.models.weight_map import hf_shapes

TOOLS = Path(__file__).parents[1] / "tools" / "checkpoint"
PIECE_NUMBERS = 2**24


def make_model(folder: Path, options: argparse.Namespace) -> None:
    """A random model without a tokenizer, written as it is drawn."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": options.hidden,
        "intermediate_size": options.ffn,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "torch_dtype": options.dtype,
    }
    blueprint = folder.parent / "blueprint"
    blueprint.mkdir()
    (blueprint / "config.json").write_text(json.dumps(config))
    write_hf_directory(folder, random_tensors(hf_shapes(read_spec(blueprint)), options.dtype), source=blueprint)


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype: str) -> Iterator[tuple[str, TensorPieces]]:
    """Uniform numbers, in pieces of some MB."""
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)

    def pieces(shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        row = shape[1] if len(shape) > 1 else 1
        step = max(1, PIECE_NUMBERS // row)
        for start in range(0, shape[0], step):
            size = (min(step, shape[0] - start), *shape[1:])
            yield torch.empty(size, dtype=kind).uniform_(-0.1, 0.1, generator=generator)

    for name, shape in shapes.items():
        yield name, TensorPieces(shape, kind, pieces(shape))


def weight_files(folder: Path) -> list[Path]:
    """The large files of either format."""
    return [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".distcp")]


def evict(folder: Path) -> None:
    """Have the system read these files from disk next time."""
    for file in weight_files(folder):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, target: Path) -> float:
    """Seconds of copying the large files to disk."""
    evict(source)
    started = time.perf_counter()
    target.mkdir()
    for file in weight_files(source):
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as stream:
            os.fsync(stream.fileno())
    return time.perf_counter() - started


def run_tool(name: str, *arguments: object, source: Path) -> tuple[float, float]:
    """Seconds and peak memory in GB of one of the tools."""
    evict(source)
    environment = {**os.environ, "PYTHONPATH": str(TOOLS.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOLS / f"{name}.py"), *map(str, arguments)]
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name} failed")
    return time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e9


def same(first: Path, second: Path) -> bool:
    """Whether two directories hold the same tensors, bit for bit."""
    ours, theirs = SafetensorsReader(first), SafetensorsReader(second)
    return ours.names() == theirs.names() and all(
        torch.equal(ours.get(name).view(torch.uint8), theirs.get(name).view(torch.uint8)) for name in ours.names()
    )


def measure(root: Path, options: argparse.Namespace) -> None:
    """Make, convert, copy, compare; print the table."""
    hf, megatron, back = root / "hf", root / "megatron", root / "back"
    make_model(hf, options)
    size = sum(file.stat().st_size for file in weight_files(hf)) / 1e6
    rows = [("copy of the safetensors", copy(hf, root / "copy"), None)]
    shutil.rmtree(root / "copy")
    rows.append(("hf_to_megatron.py", *run_tool("hf_to_megatron", "--hf", hf, "--output", megatron, source=hf)))
    rows.append(("copy of the checkpoint", copy(megatron, root / "copy"), None))
    shutil.rmtree(root / "copy")
    arguments = ("--checkpoint", megatron, "--output", back)
    rows.append(("megatron_to_hf.py", *run_tool("megatron_to_hf", *arguments, source=megatron)))
    arguments = ("--hf", hf, "--checkpoint", megatron, "--tensors-only")
    rows.append(("verify.py --tensors-only", *run_tool("verify", *arguments, source=megatron)))
    print(f"{size / 1000:.2f} GB; bit for bit equal after the round trip: {same(hf, back)}\n")
    print("| | s | MB/s | peak memory, GB |\n| --- | --- | --- | --- |")
    for what, seconds, memory in rows:
        print(f"| {what} | {seconds:.1f} | {size / seconds:.0f} | {'' if memory is None else f'{memory:.2f}'} |")


def main() -> None:
    """Run the benchmark; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, type=Path, metavar="DIR", help="where to make the files")
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--ffn", type=int, default=9728)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    options = parser.parse_args()
    root = options.work / "convert-benchmark"
    root.mkdir(parents=True)
    try:
        measure(root, options)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
