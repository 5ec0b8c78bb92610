"""Streaming reads of Hugging Face model directories; writing is in ``hf_writer``.

A tensor, or some of its rows or columns, is read when it is asked for. The safetensors format is simple enough to read
directly (an 8-byte little-endian header length, a JSON header, then the tensors back to back;
https://huggingface.co/docs/safetensors), and doing so keeps memory bounded: mapped files would count towards the
process as they are touched.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from opsd_megatron.checkpoint.atomic import is_unfinished
from opsd_megatron.errors import ModelError

# How safetensors calls them.
DTYPES: dict[str, torch.dtype] = {
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

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000  # what the safetensors library accepts


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
                    f"tensor {name} is not in {file}, where {self.path / INDEX_FILE} lists it: download both again"
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

    def nbytes(self, name: str) -> int:
        """Size of a tensor in its file, without reading it."""
        entry = self._entry(name)
        return entry.end - entry.begin

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
    if (path / SINGLE_FILE).is_file():
        return [path / SINGLE_FILE], {}
    index = path / INDEX_FILE
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
    try:
        size = file.stat().st_size
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror}): download it again") from error
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
            entry = _Entry(file, DTYPES[fields["dtype"]], tuple(fields["shape"]), data + begin, data + end)
            if entry.end - entry.begin != entry.dtype.itemsize * _numel(entry.shape) or begin < 0:
                raise ValueError(f"offsets of {name} do not fit its shape")
            entries[name] = entry
        expected = _end_of_tensors(entries, data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"  # the repr of some holds the whole header
        raise ModelError(f"{file} is damaged: its header cannot be read ({reason}); download it again") from error
    if expected != size:
        raise ModelError(f"{file} is damaged: it has {size} bytes where its header says {expected}; download it again")
    return entries


def _end_of_tensors(entries: dict[str, _Entry], begin: int) -> int:
    """Where the last tensor ends.

    Raises:
        ValueError: They do not lie back to back from ``begin`` on, as the format wants them.
    """
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != begin:
            raise ValueError(f"{name} does not begin where the tensor before it ends")
        begin = entry.end
    return begin


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
