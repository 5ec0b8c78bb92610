"""Streaming writes of Hugging Face model directories.

Two runs of rows are in memory at a time, one of them on its way to the disk; the safetensors library's writer needs a
whole file's tensors at once.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from opsd_megatron.checkpoint.atomic import atomic_directory
from opsd_megatron.checkpoint.hf_io import DTYPES, INDEX_FILE, SINGLE_FILE
from opsd_megatron.errors import ConfigError, ModelError

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Space kept for the JSON header of a file written here: some 130 bytes a tensor. A full header starts a new shard.
_HEADER_ROOM = 512 * 1024
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".distcp"}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)

DEFAULT_SHARD_BYTES = 5 * 1024**3


@dataclass(frozen=True)
class TensorPieces:
    """A tensor that comes in runs of rows, so that it need not be held in full.

    Attributes:
        shape: Of the whole tensor.
        dtype: Of every piece.
        pieces: The runs in order; taken once.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Iterable[Tensor]


def parse_size(text: str) -> int:
    """Bytes of a size as people write it: ``5GB`` (powers of 1000), ``4GiB`` (powers of 1024), ``1000``.

    Raises:
        ConfigError: It is no size, or less than one byte.
    """
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise ConfigError(f"{text!r} is not a size such as 5GB")
    return size


def write_hf_directory(
    output: str | Path,
    tensors: Iterator[tuple[str, Tensor | TensorPieces]],
    *,
    source: str | Path,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a Hugging Face directory from a stream of tensors; it appears complete or not at all.

    Args:
        output: Directory to make; must not exist or be empty.
        tensors: Names and tensors, whole or in pieces, taken one at a time, on any device.
        source: Directory whose files other than weights (``config.json``, tokenizer, generation config, chat template,
            licence) are copied along. ``config.json``'s dtype is corrected where the tensors have another one.
        max_shard_bytes: Most tensor bytes in one file. What fits in one file becomes ``model.safetensors``, more
            becomes numbered shards with an index. A larger tensor gets a file of its own.
        dtype: Cast floating-point tensors to this type; ``None`` keeps theirs.

    Raises:
        CheckpointError: ``output`` holds something, or cannot be written (disk full); nothing is left there.
        ModelError: A number is finite, but not in ``dtype``.
        ValueError: A name comes twice, or pieces do not make up the shape they were announced with.
    """
    with atomic_directory(Path(output).absolute()) as folder:
        copy_hf_files(source, folder)
        shards = _ShardedWriter(folder, max_shard_bytes)
        try:
            for name, tensor in tensors:
                whole = (
                    TensorPieces(tuple(tensor.shape), tensor.dtype, [tensor]) if isinstance(tensor, Tensor) else tensor
                )
                shards.add(name, whole if dtype is None else _cast(name, whole, dtype))
            shards.finish()
        finally:
            shards.close()
        _correct_dtype(folder / "config.json", shards.dtypes)


def _cast(name: str, tensor: TensorPieces, dtype: torch.dtype) -> TensorPieces:
    if not tensor.dtype.is_floating_point or tensor.dtype == dtype:
        return tensor
    return TensorPieces(tensor.shape, dtype, (cast_checked(name, piece, dtype) for piece in tensor.pieces))


def cast_checked(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in another floating-point type.

    Raises:
        ModelError: A number is too large for ``dtype``: float16 ends at 65,504.
    """
    if tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype)
    if not is_finite(cast) and is_finite(tensor):
        raise ModelError(f"tensor {name} holds numbers too large for {str(dtype).removeprefix('torch.')}")
    return cast


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinities; takes no memory of the tensor's size."""
    return not tensor.numel() or all(bool(bound.isfinite()) for bound in tensor.aminmax())


def copy_hf_files(source: str | Path, target: Path) -> None:
    """Copy what a Hugging Face directory holds besides weights.

    Top-level files only (a Hub cache's links are followed), and the folder of additional chat templates.

    Raises:
        ModelError: ``source`` has no ``config.json``.
        OSError: ``target`` cannot be written.
    """
    source = Path(source)
    if not (source / "config.json").is_file():
        raise ModelError(f"{source} has no config.json: it is no Hugging Face model directory")
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not _is_weights(file):
            shutil.copyfile(file, target / file.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, target / templates.name)


def _is_weights(file: Path) -> bool:
    return file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json")


def _correct_dtype(config_file: Path, dtypes: set[torch.dtype]) -> None:
    """Let ``config.json`` name the dtype of the tensors written; untouched where it already does."""
    if len(dtypes) != 1:
        return
    name = str(next(iter(dtypes))).removeprefix("torch.")
    config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
    # transformers 5 writes "dtype", earlier releases "torch_dtype"; both read the latter.
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    if any(config.get(key) != name for key in keys):
        config.update(dict.fromkeys(keys, name))
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class _ShardedWriter:
    """Spreads a stream of tensors over safetensors files in ``folder``."""

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self._thread = ThreadPoolExecutor(1)
        self.shards: list[_ShardWriter] = []
        self.shard_of: dict[str, int] = {}
        self.dtypes: set[torch.dtype] = set()

    def add(self, name: str, tensor: TensorPieces) -> None:
        if name in self.shard_of:
            raise ValueError(f"tensor {name} came twice")
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        if not self.shards or not self.shards[-1].has_room(name, size, self.max_shard_bytes):
            if self.shards:
                self.shards[-1].finish()
            self._begin()
        self.shards[-1].add(name, tensor)
        self.shard_of[name] = len(self.shards) - 1
        if tensor.dtype.is_floating_point:
            self.dtypes.add(tensor.dtype)

    def _begin(self) -> None:
        # The number of shards, part of their names, is known only at the end.
        self.shards.append(_ShardWriter(self.folder / f"part-{len(self.shards):05d}", self._thread))

    def finish(self) -> None:
        """Complete the last file, give all their final names and write the index."""
        if not self.shards:
            self._begin()
        self.shards[-1].finish()
        if len(self.shards) == 1:
            self.shards[0].path.rename(self.folder / SINGLE_FILE)
            return
        count = len(self.shards)
        names = [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
        for shard, name in zip(self.shards, names, strict=True):
            shard.path.rename(self.folder / name)
        index = {
            "metadata": {"total_size": sum(shard.data_bytes for shard in self.shards)},
            "weight_map": {name: names[shard] for name, shard in sorted(self.shard_of.items())},
        }
        (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Let go of the open file, also after a failure."""
        self._thread.shutdown()
        for shard in self.shards:
            shard.stream.close()


class _ShardWriter:
    """One safetensors file whose header is filled in last, into space kept for it.

    The format allows trailing spaces in the header, so the header may be shorter than its room. A piece is written in
    ``thread`` while the next one is made; what the disk says to it is raised then.
    """

    def __init__(self, path: Path, thread: Executor) -> None:
        self.path = path
        self._thread = thread
        self._writing: Future[int] | None = None
        self.stream: IO[bytes] = path.open("wb")
        self.stream.seek(8 + _HEADER_ROOM)
        self.data_bytes = 0
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._header_bytes = 256

    def has_room(self, name: str, size: int, max_bytes: int) -> bool:
        fits = self.data_bytes + size <= max_bytes or self.data_bytes == 0
        return fits and self._header_bytes + _header_cost(name) <= _HEADER_ROOM

    def add(self, name: str, tensor: TensorPieces) -> None:
        begin = self.data_bytes
        for piece in tensor.pieces:
            flat = piece.detach().to("cpu", tensor.dtype).contiguous().reshape(-1)
            if flat.numel():
                self._wait()
                self._writing = self._thread.submit(self.stream.write, flat.view(torch.uint8).numpy().data)
            self.data_bytes += flat.numel() * flat.element_size()
        if self.data_bytes - begin != math.prod(tensor.shape) * tensor.dtype.itemsize:
            raise ValueError(f"the pieces of tensor {name} do not make up {tensor.shape}")
        self._header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, self.data_bytes],
        }
        self._header_bytes += _header_cost(name)

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def finish(self) -> None:
        self._wait()
        header = json.dumps(self._header, separators=(",", ":")).encode()
        self.stream.seek(0)
        self.stream.write(_HEADER_ROOM.to_bytes(8, "little") + header.ljust(_HEADER_ROOM))
        self.stream.close()


def _header_cost(name: str) -> int:
    """Upper bound on the header bytes of one tensor: its name as JSON writes it, type, shape and offsets."""
    return len(json.dumps(name)) + 160
