"""Conversion between Hugging Face directories and Megatron checkpoints, in one process on the CPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from opsd_megatron.checkpoint import torch_dist
from opsd_megatron.checkpoint.atomic import refuse_existing
from opsd_megatron.checkpoint.hf_io import SafetensorsReader, write_hf_directory
from opsd_megatron.checkpoint.state import TrainerState, hf_folder, load_model_weights, save_checkpoint
from opsd_megatron.config import Config
from opsd_megatron.distributed.parallel import ParallelDims
from opsd_megatron.errors import ModelError
from opsd_megatron.models.build import HiddenStatesGPT, build_model, forward_packed
from opsd_megatron.models.export import export_hf_weights
from opsd_megatron.models.families import read_spec
from opsd_megatron.models.qwen3 import Qwen3Spec
from opsd_megatron.models.weight_map import check_tensors, load_hf_weights
from opsd_megatron.types import PackedSequences

# What Megatron models are held in here; float16 weights fit into float32 without loss.
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float32"}


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that is not equal bit for bit. ``largest`` is None where the shapes differ or one side lacks it."""

    name: str
    reason: str
    largest: float | None = None


def hf_to_megatron(source: str | Path, output: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Convert a Hugging Face directory to a Megatron checkpoint that loads at any TP, PP and DP.

    Args:
        source: Hugging Face directory.
        output: Directory to make.
        dtype: float32 or bfloat16; ``None`` keeps the directory's.

    Raises:
        ModelError: ``source`` is no complete Qwen3.
        CheckpointError: ``output`` exists or cannot be written; nothing is left there.
    """
    source, output = Path(source), Path(output)
    refuse_existing(output)
    spec = read_spec(source)
    reader = SafetensorsReader(source)
    check_tensors(spec, reader)
    stored = reader.dtype("model.embed_tokens.weight")
    if dtype is None and stored not in _DTYPE_NAMES:
        raise ModelError(f"{source} holds {stored} weights: pass --dtype float32 or bfloat16")
    with _model(spec, dtype or stored) as (model, dims):
        load_hf_weights(model, spec, reader, dims)
        save_checkpoint(output, state=TrainerState(step=0), model=model, source=source)


def megatron_to_hf(checkpoint: str | Path, output: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Convert a Megatron checkpoint, of the trainer or of :func:`hf_to_megatron`, to a Hugging Face directory.

    Args:
        checkpoint: A ``step_N`` directory or a converted one; it carries the configuration and tokenizer.
        output: Directory to make.
        dtype: Cast to this type; ``None`` keeps the checkpoint's.

    Raises:
        CheckpointError: ``checkpoint`` is not complete, or ``output`` exists or cannot be written.
    """
    refuse_existing(Path(output))
    folder = hf_folder(checkpoint)
    spec = read_spec(folder)
    with _model(spec, torch_dist.stored_dtype(Path(checkpoint))) as (model, dims):
        load_model_weights(checkpoint, model)
        write_hf_directory(output, export_hf_weights(model, spec, dims), source=folder, dtype=dtype)


def compare_tensors(source: str | Path, checkpoint: str | Path) -> tuple[int, list[TensorDifference]]:
    """Compare every tensor of a Hugging Face directory with a checkpoint's, bit for bit.

    Where the checkpoint was converted to another dtype, the directory's tensors are cast to it first.

    Returns:
        The number of tensors compared, and those that differ.
    """
    spec = read_spec(hf_folder(checkpoint))
    reader = SafetensorsReader(source)
    differences: list[TensorDifference] = []
    names: set[str] = set()
    with _model(spec, torch_dist.stored_dtype(Path(checkpoint))) as (model, dims):
        load_model_weights(checkpoint, model)
        for name, tensor in export_hf_weights(model, spec, dims):
            names.add(name)
            difference = _compare(name, tensor, reader)
            if difference is not None:
                differences.append(difference)
    for name in reader.names():
        # Some directories repeat a tied head.
        if name not in names and not (spec.tied and name == "lm_head.weight"):
            differences.append(TensorDifference(name, "not in the checkpoint"))
            names.add(name)
    return len(names), differences


def _compare(name: str, tensor: Tensor, reader: SafetensorsReader) -> TensorDifference | None:
    if name not in reader:
        return TensorDifference(name, "not in the Hugging Face directory")
    expected = reader.get(name).to(tensor.dtype)
    if expected.shape != tensor.shape:
        return TensorDifference(name, f"shape {tuple(expected.shape)} became {tuple(tensor.shape)}")
    if torch.equal(expected, tensor):
        return None
    largest = (expected.double() - tensor.double()).abs().max().item()
    return TensorDifference(name, "values differ", largest)


def checkpoint_logits(checkpoint: str | Path, sequences: list[list[int]]) -> list[Tensor]:
    """Logits of a checkpoint's model in float32.

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
    with _model(spec, torch.float32) as (chunks, _), torch.no_grad():
        load_model_weights(checkpoint, chunks)
        (model,) = chunks  # without a pipeline
        logits = forward_packed(model, packed).squeeze(1) @ model.output_head().T
    return list(logits[:, : spec.vocab_size].split(lengths))


@contextmanager
def _model(spec: Qwen3Spec, dtype: torch.dtype) -> Iterator[tuple[list[HiddenStatesGPT], ParallelDims]]:
    """An uninitialised model on a mesh of this one process."""
    config = Config()
    config.model.backend = "torch"
    config.model.dtype = _DTYPE_NAMES[dtype]
    dims = ParallelDims.initialize(config.parallel)
    try:
        yield build_model(spec, config, dims), dims
    finally:
        dims.destroy()
        gc.collect()
