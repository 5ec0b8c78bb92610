"""Streaming reads and writes of Hugging Face model directories.

Both directions hold one tensor in memory at a time. The safetensors format is simple enough to read and write directly
(an 8-byte little-endian header length, a JSON header, then the tensors back to back;
https://huggingface.co/docs/safetensors), and doing so keeps memory bounded: mapped files would count towards the
process as they are touched, and the library's writer needs a whole shard in memory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from opsd_megatron.checkpoint.atomic import atomic_directory, is_unfinished
from opsd_megatron.errors import ModelError

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000  # what the safetensors library accepts
# Space kept for the JSON header of a file written here: some 130 bytes a tensor. A full header starts a new shard.
_HEADER_ROOM = 256 * 1024
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".distcp"}

DEFAULT_SHARD_BYTES = 5 * 1024**3


@dataclass(frozen=True)
class _Entry:
    """Where one tensor lies: ``begin`` and ``end`` are absolute byte offsets in ``file``."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsReader:
    """The tensors of a Hugging Face directory, read on demand.

    Opening reads only the headers and checks that every file is complete, so a damaged download is found before
    anything is built.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the directory's ``model.safetensors``, or the shards its index names, or all its safetensors files.

        Raises:
            ModelError: There are no safetensors, a shard or a listed tensor is missing, a name occurs twice, a file is
                damaged, or writing the directory was interrupted; the file is named.
        """
        self.path = Path(path)
        if is_unfinished(self.path):
            raise ModelError(f"{self.path} is not complete: writing it was interrupted, write it again")
        self._entries: dict[str, _Entry] = {}
        files, listed = _find_files(self.path)
        for file in files:
            for name, entry in _read_header(file).items():
                if name in self._entries:
                    raise ModelError(
                        f"tensor {name} is both in {self._entries[name].file} and in {file}: remove one of the files"
                    )
                self._entries[name] = entry
        for name, file in listed.items():
            if name not in self._entries or self._entries[name].file != file:
                raise ModelError(
                    f"tensor {name} is not in {file}, where {self.path / _INDEX_FILE} lists it: download both again"
                )

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        """Whether a tensor of that name exists."""
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a tensor, without reading it."""
        return self._entry(name).dtype

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor, for messages."""
        return self._entry(name).file

    def get(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        """Read a tensor, or some of its rows or columns, into fresh memory on the CPU.

        Args:
            name: One of :meth:`names`.
            rows: Contiguous range of the first dimension; ``None`` for all. Only these bytes are read.
            columns: Contiguous range of a matrix's second dimension; not together with ``rows``. Only these bytes are
                read.

        Raises:
            ModelError: There is no such tensor, or its file has changed or cannot be read.
            ValueError: A range has a step other than 1, or both are given.
        """
        entry = self._entry(name)
        if columns is not None:
            if rows is not None or len(entry.shape) != 2:
                raise ValueError("columns are those of a whole matrix")
            return _read_columns(entry, *_bounds(columns, entry.shape[1]))
        shape, begin, end = entry.shape, entry.begin, entry.end
        if rows is not None:
            start, stop = _bounds(rows, shape[0])
            row_bytes = (end - begin) // shape[0] if shape[0] else 0
            begin, end = begin + start * row_bytes, begin + stop * row_bytes
            shape = (stop - start, *shape[1:])
        if begin == end:
            return torch.empty(shape, dtype=entry.dtype)
        data = bytearray(end - begin)
        _read_exactly(entry.file, begin, data)
        return torch.frombuffer(data, dtype=entry.dtype).reshape(shape)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise ModelError(f"tensor {name} is in none of the safetensors files of {self.path}")
        return self._entries[name]


def _find_files(path: Path) -> tuple[list[Path], dict[str, Path]]:
    """The files to read, and which file the index (if there is one) lists each tensor in."""
    if not path.is_dir():
        raise ModelError(f"{path} is not a directory; a Hugging Face model directory with safetensors is needed")
    if (path / _SINGLE_FILE).is_file():
        return [path / _SINGLE_FILE], {}
    index = path / _INDEX_FILE
    if not index.is_file():
        files = sorted(path.glob("*.safetensors"))
        if files:
            return files, {}
        if any(path.glob("*.bin")):
            raise ModelError(
                f"{path} holds weights only as .bin files, which are pickles and are not read; convert them with "
                "transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
            )
        raise ModelError(f"{path} holds no safetensors file: it is no complete Hugging Face model directory")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        listed = {str(name): path / str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not a safetensors index ({error!r}): download it again") from error
    files = sorted(set(listed.values()))
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file} is missing, but {index} lists tensors in it: download it again")
    return files, listed


def _read_header(file: Path) -> dict[str, _Entry]:
    """Parse and check a safetensors header.

    Raises:
        ModelError: The file is not safetensors, or is shorter or longer than its header says.
    """
    size = file.stat().st_size
    if size < 8:
        raise ModelError(f"{file} is damaged: it has {size} bytes, too few for a safetensors file; download it again")
    prefix = bytearray(8)
    _read_exactly(file, 0, prefix)
    header_size = int.from_bytes(prefix, "little")
    if header_size > min(size - 8, _LARGEST_HEADER):
        raise ModelError(
            f"{file} is damaged: its header claims {header_size} bytes and the file has {size}; download it again"
        )
    header = bytearray(header_size)
    _read_exactly(file, 8, header)
    data = 8 + header_size
    entries: dict[str, _Entry] = {}
    try:
        for name, fields in json.loads(header).items():
            if name == "__metadata__":
                continue
            begin, end = fields["data_offsets"]
            entry = _Entry(file, _DTYPES[fields["dtype"]], tuple(fields["shape"]), data + begin, data + end)
            if entry.end - entry.begin != entry.dtype.itemsize * _numel(entry.shape) or begin < 0:
                raise ValueError(f"offsets of {name} do not fit its shape")
            entries[name] = entry
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is damaged: its header cannot be read ({error!r}); download it again") from error
    expected = max((entry.end for entry in entries.values()), default=data)
    if expected != size:
        raise ModelError(f"{file} is damaged: it has {size} bytes where its header says {expected}; download it again")
    return entries


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _bounds(wanted: slice, size: int) -> tuple[int, int]:
    """First and past-the-last index of a contiguous range."""
    start, stop, step = wanted.indices(size)
    if step != 1:
        raise ValueError(f"a range must be contiguous, not {wanted}")
    return start, max(start, stop)


def _read_exactly(file: Path, offset: int, into: bytearray) -> None:
    try:
        with file.open("rb", buffering=0) as stream:
            _fill(file, stream, offset, memoryview(into))
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error}") from error


def _read_columns(entry: _Entry, start: int, stop: int) -> Tensor:
    """Columns ``start`` to ``stop`` of a matrix, row by row into the result."""
    rows, columns = entry.shape
    data = bytearray(rows * (stop - start) * entry.dtype.itemsize)
    if not data:
        return torch.empty(rows, stop - start, dtype=entry.dtype)
    view, size = memoryview(data), len(data) // rows
    try:
        with entry.file.open("rb", buffering=0) as stream:
            for row in range(rows):
                offset = entry.begin + (row * columns + start) * entry.dtype.itemsize
                _fill(entry.file, stream, offset, view[row * size : (row + 1) * size])
    except OSError as error:
        raise ModelError(f"{entry.file} cannot be read: {error}") from error
    return torch.frombuffer(data, dtype=entry.dtype).reshape(rows, stop - start)


def _fill(file: Path, stream: FileIO, offset: int, view: memoryview) -> None:
    while view:
        count = os.preadv(stream.fileno(), [view], offset)
        if not count:
            raise ModelError(f"{file} ended {len(view)} bytes early: it changed while it was being read")
        view, offset = view[count:], offset + count


def write_hf_directory(
    output: str | Path,
    tensors: Iterator[tuple[str, Tensor]],
    *,
    source: str | Path,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a Hugging Face directory from a stream of tensors; it appears complete or not at all.

    Args:
        output: Directory to make; must not exist or be empty.
        tensors: Names and tensors, taken one at a time, on any device.
        source: Directory whose files other than weights (``config.json``, tokenizer, generation config, chat template,
            licence) are copied along. ``config.json``'s dtype is corrected where the tensors have another one.
        max_shard_bytes: Most tensor bytes in one file. What fits in one file becomes ``model.safetensors``, more
            becomes numbered shards with an index. A larger tensor gets a file of its own.
        dtype: Cast floating-point tensors to this type; ``None`` keeps theirs.

    Raises:
        CheckpointError: ``output`` holds something, or cannot be written (disk full); nothing is left there.
        ValueError: A name comes twice.
    """
    with atomic_directory(Path(output)) as folder:
        copy_hf_files(source, folder)
        shards = _ShardedWriter(folder, max_shard_bytes)
        try:
            for name, tensor in tensors:
                if dtype is not None and tensor.is_floating_point():
                    tensor = tensor.to(dtype)
                shards.add(name, tensor)
            shards.finish()
        finally:
            shards.close()
        _correct_dtype(folder / "config.json", shards.dtypes)


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
        self.shards: list[_ShardWriter] = []
        self.shard_of: dict[str, int] = {}
        self.dtypes: set[torch.dtype] = set()

    def add(self, name: str, tensor: Tensor) -> None:
        if name in self.shard_of:
            raise ValueError(f"tensor {name} came twice")
        size = tensor.numel() * tensor.element_size()
        if not self.shards or not self.shards[-1].has_room(name, size, self.max_shard_bytes):
            if self.shards:
                self.shards[-1].finish()
            # The number of shards, part of their names, is known only at the end.
            self.shards.append(_ShardWriter(self.folder / f"part-{len(self.shards):05d}"))
        self.shards[-1].add(name, tensor)
        self.shard_of[name] = len(self.shards) - 1
        if tensor.is_floating_point():
            self.dtypes.add(tensor.dtype)

    def finish(self) -> None:
        """Complete the last file, give all their final names and write the index."""
        if not self.shards:
            self.shards.append(_ShardWriter(self.folder / "part-00000"))
        self.shards[-1].finish()
        if len(self.shards) == 1:
            self.shards[0].path.rename(self.folder / _SINGLE_FILE)
            return
        count = len(self.shards)
        names = [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
        for shard, name in zip(self.shards, names, strict=True):
            shard.path.rename(self.folder / name)
        index = {
            "metadata": {"total_size": sum(shard.data_bytes for shard in self.shards)},
            "weight_map": {name: names[shard] for name, shard in sorted(self.shard_of.items())},
        }
        (self.folder / _INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Let go of the open file, also after a failure."""
        for shard in self.shards:
            shard.stream.close()


class _ShardWriter:
    """One safetensors file whose header is filled in last, into space kept for it.

    The format allows trailing spaces in the header, so the header may be shorter than its room.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stream: IO[bytes] = path.open("wb")
        self.stream.seek(8 + _HEADER_ROOM)
        self.data_bytes = 0
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._header_bytes = 256

    def has_room(self, name: str, size: int, max_bytes: int) -> bool:
        fits = self.data_bytes + size <= max_bytes or self.data_bytes == 0
        return fits and self._header_bytes + _header_cost(name) <= _HEADER_ROOM

    def add(self, name: str, tensor: Tensor) -> None:
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        begin, self.data_bytes = self.data_bytes, self.data_bytes + flat.numel() * flat.element_size()
        if flat.numel():
            self.stream.write(flat.view(torch.uint8).numpy().data)
        self._header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, self.data_bytes],
        }
        self._header_bytes += _header_cost(name)

    def finish(self) -> None:
        header = json.dumps(self._header, separators=(",", ":")).encode()
        self.stream.seek(0)
        self.stream.write(_HEADER_ROOM.to_bytes(8, "little") + header.ljust(_HEADER_ROOM))
        self.stream.close()


def _header_cost(name: str) -> int:
    """Upper bound on the header bytes of one tensor: JSON may escape every character of the name."""
    return 6 * len(name) + 160
