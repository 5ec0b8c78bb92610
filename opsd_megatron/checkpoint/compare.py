"""Whether a Megatron checkpoint and a Hugging Face directory hold the same model: their tensors, and its logits."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from opsd_megatron.checkpoint.convert import stored_adapters, stored_tensors
from opsd_megatron.checkpoint.hf_io import SafetensorsReader
from opsd_megatron.checkpoint.hf_writer import TensorPieces
from opsd_megatron.checkpoint.layout import find_slots
from opsd_megatron.checkpoint.record import hf_folder
from opsd_megatron.checkpoint.state import load_model_weights
from opsd_megatron.checkpoint.tensor_store import TensorStore
from opsd_megatron.config import Config
from opsd_megatron.distributed.parallel import ParallelDims
from opsd_megatron.models.build import HiddenStatesGPT, build_model, forward_packed
from opsd_megatron.models.families import read_spec
from opsd_megatron.models.qwen3 import Qwen3Spec
from opsd_megatron.models.rules import EMBEDDING, HEAD
from opsd_megatron.models.weight_map import head_repeats_embedding, placed_parameters
from opsd_megatron.types import PackedSequences


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that is not equal bit for bit. ``largest`` is None where the shapes differ or one side lacks it."""

    name: str
    reason: str
    largest: float | None = None


def compare_tensors(source: str | Path, checkpoint: str | Path) -> tuple[int, list[TensorDifference]]:
    """Compare every tensor of a Hugging Face directory with a checkpoint's, bit for bit.

    Where the checkpoint was converted to another dtype, the directory's tensors are cast to it first.

    Returns:
        The number of tensors compared, and those that differ.

    Raises:
        CheckpointError: ``checkpoint`` is incomplete or damaged.
        ModelError: A file of ``source`` is.
    """
    spec = read_spec(hf_folder(checkpoint))
    reader = SafetensorsReader(source)
    differences: list[TensorDifference] = []
    names: set[str] = set()
    for name, tensor in stored_tensors(TensorStore(Path(checkpoint)), spec):
        names.add(name)
        difference = _compare(name, tensor, reader)
        if difference is not None:
            differences.append(difference)
    for name in reader.names():
        # Some directories repeat a tied head.
        repeated = spec.tied and name == HEAD.hf[0] and EMBEDDING.hf[0] in reader and head_repeats_embedding(reader)
        if name not in names and not repeated:
            differences.append(TensorDifference(name, "not in the checkpoint"))
            names.add(name)
    return len(names), differences


def _compare(name: str, tensor: TensorPieces, reader: SafetensorsReader) -> TensorDifference | None:
    if name not in reader:
        return TensorDifference(name, "not in the Hugging Face directory")
    if reader.shape(name) != tensor.shape:
        return TensorDifference(name, f"shape {reader.shape(name)} became {tensor.shape}")
    row, largest, equal = 0, 0.0, True
    for piece in tensor.pieces:
        expected = reader.get(name, slice(row, row + piece.shape[0])).to(piece.dtype)
        row += piece.shape[0]
        if not torch.equal(expected, piece):
            equal, largest = False, max(largest, (expected.double() - piece.double()).abs().max().item())
    return None if equal else TensorDifference(name, "values differ", largest)


def stored_dtypes(checkpoint: str | Path) -> dict[str, torch.dtype]:
    """The type in which a checkpoint keeps each tensor of its model, by Hugging Face name; reads no tensor.

    Raises:
        CheckpointError: ``checkpoint`` is incomplete or damaged.
    """
    store = TensorStore(Path(checkpoint))
    found = find_slots(store, read_spec(hf_folder(checkpoint)), stored_adapters(store))
    return {name: store.dtype(slot.name) for slot in found for name in slot.place.hf_names}


def checkpoint_logits(checkpoint: str | Path, sequences: list[list[int]]) -> list[Tensor]:
    """Logits of a checkpoint's model, computed in float32.

    Its weights are those that :func:`compare_tensors` compares: adapters are merged, the sums rounded to the type in
    which the checkpoint keeps what they adapt.

    Args:
        checkpoint: A Megatron checkpoint.
        sequences: Token ids; packed into one forward pass.

    Returns:
        For each sequence, ``[tokens, V]`` float32.
    """
    spec = read_spec(hf_folder(checkpoint))
    lengths = [len(sequence) for sequence in sequences]
    packed = PackedSequences(
        ids=torch.tensor([token for sequence in sequences for token in sequence]),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
        rows=torch.arange(sum(lengths)),
    )
    dtypes = stored_dtypes(checkpoint)
    with _model(spec) as (chunks, dims), torch.no_grad():
        load_model_weights(checkpoint, chunks)
        for place, parameter in placed_parameters(chunks, spec, dims):
            parameter.copy_(parameter.to(dtypes[place.hf_names[0]]))
        (model,) = chunks  # without a pipeline
        logits = forward_packed(model, packed).squeeze(1) @ model.output_head().T
    return list(logits[:, : spec.vocab_size].split(lengths))


@contextmanager
def _model(spec: Qwen3Spec) -> Iterator[tuple[list[HiddenStatesGPT], ParallelDims]]:
    """An uninitialised float32 model on a mesh of this one process."""
    config = Config()
    config.model.backend = "torch"
    config.model.dtype = "float32"
    dims = ParallelDims.initialize(config.parallel)
    try:
        yield build_model(spec, config, dims), dims
    finally:
        dims.destroy()
        gc.collect()
