"""The tensors of a ``torch_dist`` checkpoint one at a time, in one process, without a model.

Such a checkpoint (``torch.distributed.checkpoint``'s file-system format, as Megatron-Core uses it) keeps every tensor
under a global name in chunks: boxes with an offset and a size, one for each rank that saved a part. ``.metadata`` says
which byte range of which file holds a chunk; a chunk is what ``torch.save`` writes. So any region can be put together
from the chunks that overlap it, whatever mesh saved them, and a checkpoint can be written chunk by chunk.
"""

from __future__ import annotations

import io
import math
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from opsd_megatron.errors import CheckpointError, OpsdError

Box = tuple[int, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor to write.

    Attributes:
        name: Global name of the tensor.
        shape: Of the whole tensor.
        dtype: Of the whole tensor.
        offset: Where this part begins in each dimension.
        size: How far it extends in each dimension.
        read: Makes the part, with ``size`` and ``dtype``; called once, in another thread.
    """

    name: str
    shape: Box
    dtype: torch.dtype
    offset: Box
    size: Box
    read: Callable[[], Tensor]


def write_chunks(folder: Path, chunks: Iterable[Chunk]) -> None:
    """Write a checkpoint that ``megatron.core.dist_checkpointing.load`` reads into an existing, empty folder.

    Chunks are made and written one after the other, each made while the one before is written. Together they must cover
    every tensor exactly once.

    Raises:
        OSError: The disk failed.
        Exception: Whatever a chunk's ``read`` raised.
    """
    planner = _ChunkPlanner(list(chunks))
    # Nothing is copied ahead: that is for tensors that are still on a device.
    writer = FileSystemWriter(folder, thread_count=1, per_thread_copy_ahead=0)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as it should be
            torch_checkpoint.save({}, storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        if isinstance(cause, OpsdError):  # what it was raised upon is no trouble of this disk
            raise cause from error
        raise disk_error(cause) or cause from error
    save_common({}, folder)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def save_common(state: dict[str, Any], folder: Path) -> None:
    """Write what is no tensor. ``torch.save`` on a file would hide what the disk said.

    Raises:
        OSError: The disk failed.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    (folder / COMMON_STATE_FNAME).write_bytes(buffer.getbuffer())


def disk_error(error: BaseException | None) -> OSError | None:
    """What the disk said behind an error: where it is full, torch.save ends with one about the file's position."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


class _ChunkPlanner(SavePlanner):
    """Tells torch's writer what there is to write and makes each chunk when its turn comes."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = chunks
        self._made = _ahead((chunk, chunk.read()) for chunk in chunks)

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing to do: what there is to write was handed over already."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(chunk) for chunk in self._chunks])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            covered = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
            assert covered == math.prod(tensor.size), f"{covered} of {tuple(tensor.size)} numbers of {name}"
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        chunk, tensor = next(self._made)
        # One thread that copies nothing ahead takes them in the plan's order.
        assert write_item.index == MetadataIndex(chunk.name, torch.Size(chunk.offset)), f"{write_item} is not {chunk}"
        assert (tuple(tensor.shape), tensor.dtype) == (chunk.size, chunk.dtype), f"{chunk} became {tensor.shape}"
        return tensor


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """Take items in a thread of its own, one ahead of the caller."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _write_item(chunk: Chunk) -> WriteItem:
    offset = torch.Size(chunk.offset)
    return WriteItem(
        MetadataIndex(chunk.name, offset),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            ChunkStorageMetadata(offset, torch.Size(chunk.size)),
            TensorProperties(dtype=chunk.dtype),
            torch.Size(chunk.shape),
        ),
    )


class TensorStore:
    """The tensors of a checkpoint, read on demand."""

    def __init__(self, folder: str | Path) -> None:
        """Read the list of tensors.

        Raises:
            CheckpointError: There is no list, or it is damaged.
        """
        self.folder = Path(folder)
        self._metadata = read_metadata(self.folder)
        self._tensors: dict[str, TensorStorageMetadata] = {
            name: tensor
            for name, tensor in self._metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }
        # By the first index, where a chunk lies at one: a tensor of many stacked layers has thousands of chunks.
        self._chunks: dict[tuple[str, int | None], list[ChunkStorageMetadata]] = defaultdict(list)
        for name, tensor in self._tensors.items():
            for chunk in tensor.chunks:
                first = chunk.offsets[0] if len(chunk.sizes) and chunk.sizes[0] == 1 else None
                self._chunks[name, first].append(chunk)

    def names(self) -> list[str]:
        """Every tensor: weights, optimizer state and whatever else there is."""
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        """Whether a tensor of that name exists."""
        return name in self._tensors

    def shape(self, name: str) -> Box:
        """Shape of a whole tensor."""
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a tensor."""
        return self._tensors[name].properties.dtype

    def row_runs(self, name: str, index: Sequence[int], rows: range) -> list[range]:
        """Divide rows of a matrix so that reading run after run reads no chunk twice, unless it spans several runs.

        Args:
            name: One of :meth:`names`.
            index: Place of the matrix in the dimensions before its own.
            rows: The rows to divide.
        """
        axis = len(index)
        edges = {rows.start, rows.stop}
        for chunk in self._near(name, index[0] if index else None):
            begin, extent = chunk.offsets[axis], chunk.sizes[axis]
            edges |= {edge for edge in (begin, begin + extent) if edge in rows}
        return [range(*run) for run in pairwise(sorted(edges))]

    def _near(self, name: str, first: int | None) -> list[ChunkStorageMetadata]:
        """The chunks that may hold what is at the first index ``first``; all of them where that is ``None``."""
        if first is None:
            return self._tensors[name].chunks
        return [*self._chunks[name, first], *self._chunks[name, None]]

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """A region of a tensor in fresh memory on the CPU; reads the chunks that overlap it.

        Args:
            name: One of :meth:`names`.
            offset: Where the region begins in each dimension.
            size: How far it extends in each dimension.

        Raises:
            CheckpointError: A chunk is damaged, or the chunks leave a gap; names the tensor and the file.
        """
        assert len(offset) == len(size) == len(self.shape(name))
        region: Tensor | None = None
        missing = math.prod(size)
        for chunk in self._near(name, offset[0] if size and size[0] == 1 else None):
            overlap = [
                (max(a, b), min(a + n, b + m))
                for a, n, b, m in zip(offset, size, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(stop <= start for start, stop in overlap):
                continue
            stored = self._load(name, chunk)
            here = stored[tuple(slice(s - b, e - b) for (s, e), b in zip(overlap, chunk.offsets, strict=True))]
            missing -= here.numel()
            if tuple(here.shape) == tuple(size):
                region = here if here.numel() == stored.numel() else here.clone()
                break
            region = torch.empty(tuple(size), dtype=stored.dtype) if region is None else region
            region[tuple(slice(s - a, e - a) for (s, e), a in zip(overlap, offset, strict=True))] = here
        if region is None or missing:
            raise CheckpointError(f"{self.folder / '.metadata'}: {missing} numbers of tensor {name} are in no chunk")
        return region

    def _load(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self._metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        file = self.folder / info.relative_path
        try:
            with file.open("rb", buffering=0) as stream:
                part = _FileSlice(stream, info.offset, info.length)
                # torch.load does not look at the checksums that torch.save writes.
                with zipfile.ZipFile(part) as archive:
                    damaged = archive.testzip()
                if damaged is not None:
                    raise ValueError(f"{damaged} does not match its checksum")
                part.seek(0)
                tensor = torch.load(part, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
            if tensor.shape != chunk.sizes or tensor.dtype != self.dtype(name):
                held, listed = f"{tuple(tensor.shape)} {tensor.dtype}", f"{tuple(chunk.sizes)} {self.dtype(name)}"
                raise ValueError(f"it holds {held}, not {listed} as .metadata lists")
        except Exception as error:  # damage can raise anything
            if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch has no type for it
                raise
            reason = (str(error).splitlines() or [repr(error)])[0]
            raise CheckpointError(f"{file}: tensor {name} at {tuple(chunk.offsets)} is damaged: {reason}") from error
        return tensor  # type: ignore[no-any-return]


def read_metadata(folder: Path) -> Metadata:
    """What a checkpoint holds, and where.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    try:
        return FileSystemReader(folder).read_metadata()
    except Exception as error:  # a pickle: damage can raise anything
        raise CheckpointError(f"{folder / '.metadata'} cannot be read: {error!r}") from error


class _FileSlice(io.RawIOBase):
    """A byte range of an open file as a file of its own."""

    def __init__(self, stream: io.FileIO, begin: int, length: int) -> None:
        self._stream, self._begin, self._length, self._at = stream, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._stream.seek(self._begin + self._at)
        count = self._stream.readinto(view)
        self._at += count or 0
        return count or 0
