"""Conversion between Hugging Face directories and Megatron checkpoints, in one process on the CPU.

No model is built: the weight map says which rows of which tensors make up a parameter, so that two parts of parameters
are in memory at a time, one being read and one being written. The two formats are in ``hf_io`` and ``hf_writer``, and
in ``tensor_store``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from opsd_megatron.checkpoint.atomic import atomic_directory, refuse_existing
from opsd_megatron.checkpoint.hf_io import SafetensorsReader
from opsd_megatron.checkpoint.hf_writer import (
    DEFAULT_SHARD_BYTES,
    TensorPieces,
    cast_checked,
    is_finite,
    write_hf_directory,
)
from opsd_megatron.checkpoint.layout import AdapterSlot, Slot, adapter_slots, find_slots, slots
from opsd_megatron.checkpoint.record import adapters_of, hf_folder
from opsd_megatron.checkpoint.state import save_converted
from opsd_megatron.checkpoint.tensor_store import Chunk, TensorStore, write_chunks
from opsd_megatron.config import LoraConfig
from opsd_megatron.errors import CheckpointError, ModelError
from opsd_megatron.models.families import read_spec
from opsd_megatron.models.qwen3 import Qwen3Spec
from opsd_megatron.models.rules import ADAPTER_SUFFIX
from opsd_megatron.models.weight_map import check_tensors, hf_shapes, join_shards, read_shard, shard_shape

# What a checkpoint may hold; others, such as 8-bit floats, have to be cast.
_STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Parts of tensors that are read and written at a time, where they can be divided so finely.
_PART_BYTES = 64 * 2**20


def hf_to_megatron(source: str | Path, output: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Convert a Hugging Face directory to a Megatron checkpoint that loads at any mesh.

    Args:
        source: Hugging Face directory.
        output: Directory to make.
        dtype: float32 or bfloat16; ``None`` keeps every tensor's.

    Raises:
        ModelError: ``source`` is no complete Qwen3, a tensor is damaged, or tensors of different types would be stored
            as one; names them and their files.
        CheckpointError: ``output`` exists or cannot be written; nothing is left there.
    """
    source, output = Path(source), Path(output)
    refuse_existing(output)
    spec = read_spec(source)
    reader = _CheckedReader(source)
    check_tensors(spec, reader)
    if dtype is None:
        _check_dtypes(spec, reader)
    chunks = [chunk for slot in slots(spec) for chunk in _chunks(slot, spec, reader, dtype)]
    save_converted(output, partial(write_chunks, chunks=chunks), source=source)


class _CheckedReader(SafetensorsReader):
    """Refuses tensors that hold NaN or infinities, by name, since several are put together to one parameter.

    8-bit floats come as float32: PyTorch neither joins them with others nor finds their extremes.
    """

    def get(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        tensor = super().get(name, rows, columns)
        if tensor.dtype.itemsize == 1:
            tensor = tensor.float()
        if not is_finite(tensor):
            raise ModelError(
                f"{self.file_of(name)}: tensor {name} is damaged: it holds numbers that are NaN or infinite"
            )
        return tensor


def _check_dtypes(spec: Qwen3Spec, reader: SafetensorsReader) -> None:
    """Check that tensors which are stored as one, such as those of all layers, are of one type, and of a stored one.

    Raises:
        ModelError: They are not.
    """
    firsts: dict[str, str] = {}
    for slot in slots(spec):
        for name in slot.place.hf_names:
            first = firsts.setdefault(slot.name, name)
            if reader.dtype(name) not in _STORED_DTYPES:
                reason = "which a checkpoint does not hold"
            elif reader.dtype(name) != reader.dtype(first):
                reason = f"but {first}, which is stored with it, {reader.dtype(first)} in {reader.file_of(first)}"
            else:
                continue
            raise ModelError(
                f"{reader.file_of(name)}: tensor {name} is {reader.dtype(name)}, {reason}: pass --dtype float32 or "
                "bfloat16"
            )


@dataclass(frozen=True)
class _Part:
    """Rows of a parameter from ``row`` on, and how to get them."""

    row: int
    shape: tuple[int, ...]
    get: Callable[[], Tensor]


def _chunks(slot: Slot, spec: Qwen3Spec, reader: SafetensorsReader, dtype: torch.dtype | None) -> list[Chunk]:
    """A parameter as the chunks it is stored in; each is read when it is written."""
    name = slot.place.hf_names[0]
    target = dtype or reader.dtype(name)
    ones = (1,) * len(slot.index)

    def read(part: _Part) -> Tensor:
        return cast_checked(name, part.get(), target).reshape(*ones, *part.shape)

    return [
        Chunk(
            slot.name,
            shape=(*slot.stack, *slot.shape),
            dtype=target,
            offset=(*slot.index, part.row, *(0 for _ in part.shape[1:])),
            size=(*ones, *part.shape),
            read=partial(read, part),
        )
        for part in _parts(slot, spec, reader)
    ]


def _parts(slot: Slot, spec: Qwen3Spec, reader: SafetensorsReader) -> Iterator[_Part]:
    """A parameter at tp 1, divided by rows.

    Query, key and value rows are interleaved by heads, as tensor-parallel shards of them are. Every other parameter is
    its Hugging Face tensors one below the other.
    """
    place = slot.place
    if place.rule.kind == "qkv":
        tp = _fineness(spec.num_kv_heads, sum(reader.nbytes(name) for name in place.hf_names))
        shape = shard_shape(place, spec, tp)
        for rank in range(tp):
            yield _Part(rank * shape[0], shape, partial(read_shard, place, spec, reader, tp=tp, tp_rank=rank))
        return
    row = 0
    for name in place.hf_names:
        shape = reader.shape(name)
        step = max(1, shape[0] * _PART_BYTES // max(1, reader.nbytes(name)))
        for start in range(0, shape[0], step):
            rows = slice(start, min(start + step, shape[0]))
            yield _Part(row + start, (rows.stop - start, *shape[1:]), partial(reader.get, name, rows))
        row += shape[0]


def _fineness(divisible: int, size: int) -> int:
    """The fewest equal parts that are small enough, of those that ``divisible`` things can be divided into."""
    divisors = [n for n in range(1, divisible + 1) if divisible % n == 0]
    return next((n for n in divisors if size <= n * _PART_BYTES), divisible)


def megatron_to_hf(
    checkpoint: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Convert a Megatron checkpoint, of the trainer or of :func:`hf_to_megatron`, to a Hugging Face directory.

    A checkpoint's adapters are merged into the weights, in float32, and the sums rounded once to the type written: in
    bfloat16 they lose much of a small delta. :func:`megatron_to_adapter` writes the adapters by themselves.

    Args:
        checkpoint: A ``step_N`` directory or a converted one; it carries the configuration and tokenizer.
        output: Directory to make.
        dtype: Cast to this type; ``None`` keeps the checkpoint's.
        max_shard_bytes: Most tensor bytes in one file.

    Raises:
        CheckpointError: ``checkpoint`` is not complete or not of the model that its configuration describes, a tensor
            is damaged (names it and its file), or ``output`` exists or cannot be written; nothing is left there.
    """
    refuse_existing(Path(output))
    folder = hf_folder(checkpoint)
    tensors = stored_tensors(TensorStore(Path(checkpoint)), read_spec(folder), round_merged=dtype is None)
    write_hf_directory(output, tensors, source=folder, dtype=dtype, max_shard_bytes=max_shard_bytes)


def stored_tensors(
    store: TensorStore, spec: Qwen3Spec, *, round_merged: bool = True
) -> Iterator[tuple[str, TensorPieces]]:
    """A checkpoint's weights as Hugging Face tensors, in the order transformers writes them, read as they are taken.

    Adapters are merged, in float32.

    Args:
        store: The checkpoint.
        spec: Its model.
        round_merged: Round the merged weights to the type they are stored in, rather than leave them in float32.

    Raises:
        CheckpointError: The checkpoint is not of this model, or a tensor is damaged.
    """
    shapes, settings = hf_shapes(spec), stored_adapters(store)
    for slot in find_slots(store, spec, settings):
        adapters = {adapter.hf_name: adapter for adapter in adapter_slots(slot, spec, settings)}
        dtype, ones = store.dtype(slot.name), (1,) * len(slot.index)
        joined: dict[str, Tensor] = {}
        if slot.place.rule.kind == "qkv":
            stored = store.read(slot.name, (*slot.index, 0, 0), (*ones, *slot.shape)).reshape(slot.shape)
            joined = dict(zip(slot.place.hf_names, join_shards(slot.place, spec, [stored]), strict=True))
        row = 0
        for name in slot.place.hf_names:
            rows = range(row, row + shapes[name][0])
            pieces: Iterable[Tensor] = [joined[name]] if joined else _row_pieces(store, slot, rows)
            if name in adapters:
                assert settings is not None
                merged = dtype if round_merged else torch.float32
                pieces = _merged(pieces, store, adapters[name], settings.scale, merged)
                yield name, TensorPieces(shapes[name], merged, pieces)
            else:
                yield name, TensorPieces(shapes[name], dtype, pieces)
            row = rows.stop


def stored_adapters(store: TensorStore) -> LoraConfig | None:
    """What adapters a checkpoint has; ``None`` where it has none."""
    adapted = any(f"{ADAPTER_SUFFIX}." in name for name in store.names())
    return adapters_of(store.folder) if adapted else None


def _merged(
    pieces: Iterable[Tensor], store: TensorStore, adapter: AdapterSlot, scale: float, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Runs of a weight's rows with its adapter added, in ``dtype``."""
    a, b = _factors(store, adapter)
    row = 0
    for piece in pieces:
        added = b[row : row + piece.shape[0]].float() @ a.float() * scale
        row += piece.shape[0]
        yield added.add_(piece).to(dtype)


def _factors(store: TensorStore, adapter: AdapterSlot) -> tuple[Tensor, Tensor]:
    """A and B."""
    ones = (1,) * len(adapter.index)
    a, b = (
        store.read(name, (*adapter.index, 0, 0), (*ones, *shape)).reshape(shape)
        for name, shape in ((adapter.a, adapter.a_shape), (adapter.b, adapter.b_shape))
    )
    return a, b


def megatron_to_adapter(
    checkpoint: str | Path, output: str | Path, *, dtype: torch.dtype | None = None, base: str | None = None
) -> None:
    """Write a checkpoint's adapters as a directory that PEFT and vLLM load beside the model they were trained on.

    Args:
        checkpoint: A ``step_N`` directory of a run with ``lora.rank``.
        output: Directory to make.
        dtype: Cast to this type; ``None`` keeps the checkpoint's.
        base: Name or path of that model for ``adapter_config.json``, by which PEFT can find it.

    Raises:
        CheckpointError: ``checkpoint`` is not complete, has no adapters or such as PEFT has no place for, a tensor is
            damaged (names it and its file), or ``output`` exists or cannot be written; nothing is left there.
    """
    refuse_existing(Path(output))
    spec, store = read_spec(hf_folder(checkpoint)), TensorStore(Path(checkpoint))
    settings = adapters_of(checkpoint)
    if settings is None:
        raise CheckpointError(f"{checkpoint} has no adapters: it is of a run without lora.rank; leave out --adapter")
    _check_peft(checkpoint, spec, settings)
    tensors = {}
    for slot in find_slots(store, spec, settings):
        for adapter in adapter_slots(slot, spec, settings):
            stem = f"base_model.model.{adapter.hf_name.removesuffix('.weight')}"
            for factor, tensor in zip("AB", _factors(store, adapter), strict=True):
                name = f"{stem}.lora_{factor}.weight"
                tensors[name] = (tensor if dtype is None else cast_checked(name, tensor, dtype)).contiguous()
    with atomic_directory(Path(output).absolute()) as folder:
        (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
        (folder / "adapter_config.json").write_text(json.dumps(_peft_config(settings, base), indent=2) + "\n")


def _check_peft(checkpoint: str | Path, spec: Qwen3Spec, settings: LoraConfig) -> None:
    """Refuse adapters of which PEFT, which fuses those of experts, drops some or loads none (0.21).

    Raises:
        CheckpointError: They are such.
    """
    fused = {"gate_proj", "up_proj"} & set(settings.targets)
    if not spec.num_experts:
        return
    reason = None
    if len(fused) == 1:
        reason = f"of experts it takes gate_proj and up_proj together, not {fused.pop()} alone"
    elif (fused or "down_proj" in settings.targets) and not all(map(spec.experts_in, range(spec.num_layers))):
        reason = "it drops those of layers with a plain MLP where others have experts"
    if reason is not None:
        raise CheckpointError(
            f"{checkpoint}: PEFT cannot load its adapters: {reason}; leave out --adapter to merge them"
        )


def _peft_config(settings: LoraConfig, base: str | None) -> dict[str, Any]:
    """What PEFT's ``LoraConfig`` says of the same adapters."""
    alpha = settings.resolved().alpha
    assert alpha is not None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": settings.targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _row_pieces(store: TensorStore, slot: Slot, rows: range) -> Iterator[Tensor]:
    ones, rest = (1,) * len(slot.index), slot.shape[1:]
    for run in store.row_runs(slot.name, slot.index, rows):
        offset = (*slot.index, run.start, *(0 for _ in rest))
        yield store.read(slot.name, offset, (*ones, len(run), *rest)).reshape(len(run), *rest)
