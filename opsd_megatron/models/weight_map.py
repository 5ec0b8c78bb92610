"""How Megatron-Core's parameters correspond to Hugging Face's tensors, as data, and loading by it.

Megatron-Core keeps two pairs of matrices together:

* ``linear_qkv`` interleaves query, key and value rows by key/value head: ``[q..., k, v]`` of head 0, of head 1, ...;
  a tensor-parallel shard is one of equal runs of these rows: of whole heads, or where there are more shards than
  key/value heads, of part of one. Megatron-Core then gathers what the rows give before it takes its heads.
* ``linear_fc1`` stacks gate and up, each shard its own part of both: ``[gate_i; up_i]``.

Experts are spread over expert-parallel ranks, each a run of neighbouring ones, and each of them over
expert-tensor-parallel ranks like an MLP over tensor-parallel ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from opsd_megatron.distributed.parallel import ParallelDims
from opsd_megatron.errors import ModelError
from opsd_megatron.models.qwen3 import Qwen3Spec
from opsd_megatron.models.rules import ADAPTER_SUFFIX, EMBEDDING, FINAL_NORM, HEAD, Rule
from opsd_megatron.models.stages import stage_layers


class TensorReader(Protocol):
    """Where tensors come from: a safetensors directory, or a dictionary in tests."""

    def names(self) -> Iterable[str]:
        """Every tensor there is."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a tensor, without reading it."""
        ...

    def get(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        """A tensor, or some of its rows or columns (not both), on the CPU."""
        ...


# Files named in a message.
_FILES = 3
_COMPARED_ROWS = 4096
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Placement:
    """One parameter of the whole model.

    Attributes:
        rule: What kind it is.
        layer: Of which layer, counted over all stages from 0; ``None`` outside the layers.
        expert: Of which of the layer's experts, counted over all ranks from 0; ``None`` where it is none's.
    """

    rule: Rule
    layer: int | None = None
    expert: int | None = None

    @property
    def hf_names(self) -> tuple[str, ...]:
        """The Hugging Face tensors it is made of."""
        prefix = "" if self.layer is None else f"model.layers.{self.layer}."
        return tuple(prefix + name for name in self.rule.hf_names(self.expert))


def placements(spec: Qwen3Spec) -> Iterator[Placement]:
    """Every parameter of the model in Hugging Face order; a tied head is not listed, it is the embedding."""
    yield Placement(EMBEDDING)
    for layer in range(spec.num_layers):
        for of_expert, rules in groupby(spec.layer_rules(layer), lambda rule: rule.of_expert):
            together = tuple(rules)
            for expert in range(spec.experts_in(layer)) if of_expert else (None,):
                for rule in together:
                    yield Placement(rule, layer, expert)
    yield Placement(FINAL_NORM)
    if not spec.tied:
        yield Placement(HEAD)


def find_placement(name: str, spec: Qwen3Spec, layer_offset: int, expert_offset: int = 0) -> Placement:
    """The placement of a Megatron-Core parameter.

    Args:
        name: As ``named_parameters()`` of the unwrapped model gives it.
        spec: What the model was built from.
        layer_offset: Layers before the first one of this chunk of the model.
        expert_offset: Experts of a layer on the expert-parallel ranks before this one.

    Raises:
        KeyError: No rule covers the name: the model was built from other modules than this map knows.
    """
    if match := _LAYER.fullmatch(name):
        layer = int(match[1]) + layer_offset
        for rule in spec.layer_rules(layer):
            if found := rule.match(match[2]):
                return Placement(rule, layer, int(found["expert"]) + expert_offset if rule.of_expert else None)
    for rule in (EMBEDDING, FINAL_NORM, HEAD):
        if name in rule.mcore:
            # With tied embeddings the last of several stages holds a copy of the embedding as its head.
            return Placement(EMBEDDING if rule is HEAD and spec.tied else rule)
    raise KeyError(f"no rule for the parameter {name}")


def local_experts(spec: Qwen3Spec, dims: ParallelDims) -> range:
    """The experts of a layer that this rank holds, of those layers that have any."""
    count = spec.num_experts // dims.ep
    return range(count * dims.ep_rank, count * (dims.ep_rank + 1))


def placed_parameters(
    chunks: Sequence[torch.nn.Module], spec: Qwen3Spec, dims: ParallelDims
) -> Iterator[tuple[Placement, torch.nn.Parameter]]:
    """Every parameter on this rank with its place in the whole model, but for adapters (``models.lora``).

    Args:
        chunks: What ``build_model`` returned: this pipeline rank's chunks of the model.
        spec: What they were built from.
        dims: The mesh they were built on.
    """
    first_expert = local_experts(spec, dims).start
    own_layers = stage_layers(spec.num_layers, pp=dims.pp, vpp=dims.vpp)[dims.pp_rank]
    for chunk, layers in zip(chunks, own_layers, strict=True):
        for name, parameter in chunk.named_parameters():
            if f"{ADAPTER_SUFFIX}." in name:
                continue
            yield find_placement(name, spec, layers.start, first_expert), parameter


def missing_parameters(chunks: Sequence[torch.nn.Module], spec: Qwen3Spec, dims: ParallelDims) -> list[Placement]:
    """What of the whole model this rank should hold and does not; see :func:`placed_parameters`."""
    layers = {layer for run in stage_layers(spec.num_layers, pp=dims.pp, vpp=dims.vpp)[dims.pp_rank] for layer in run}
    outside = {EMBEDDING: dims.is_first_stage, FINAL_NORM: dims.is_last_stage, HEAD: dims.is_last_stage}
    held = {place for place, _ in placed_parameters(chunks, spec, dims)}
    return [
        place
        for place in placements(spec)
        if (outside[place.rule] if place.layer is None else place.layer in layers)
        and (place.expert is None or place.expert in local_experts(spec, dims))
        and place not in held
    ]


def hf_shapes(spec: Qwen3Spec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor the model has, in Hugging Face order."""
    return {name: spec.tensor_shape(name) for place in placements(spec) for name in place.hf_names}


def check_tensors(spec: Qwen3Spec, reader: TensorReader) -> None:
    """Compare what there is with what ``config.json`` calls for. Reads no tensor, but for a tied model's stored head.

    Raises:
        ModelError: Tensors are missing, unexpected, of another shape, or not floating-point (quantized), or a tied
            model's head is stored and not its embedding; names the first of them and their files.
    """
    expected = hf_shapes(spec)
    found = set(reader.names())
    if missing := [name for name in expected if name not in found]:
        raise ModelError(f"{_source(reader)} {_list(missing)} missing; config.json calls for {len(expected)} tensors")
    allowed = set(expected) | ({HEAD.hf[0]} if spec.tied else set())
    if extra := sorted(found - allowed, key=lambda name: (_source(reader, name), name)):
        listed = [f"{source} {_list(list(names))}" for source, names in groupby(extra, partial(_source, reader))]
        files = f" and tensors in {len(listed) - _FILES} more files" if len(listed) > _FILES else ""
        raise ModelError(
            f"{'; '.join(listed[:_FILES])}{files} not expected by config.json "
            f"(num_hidden_layers={spec.num_layers}, tie_word_embeddings={str(spec.tied).lower()})"
        )
    for name, shape in expected.items():
        if tuple(reader.shape(name)) != shape:
            raise ModelError(
                f"{_source(reader, name)} tensor {name} has shape {tuple(reader.shape(name))}, "
                f"config.json calls for {shape}"
            )
        if not reader.dtype(name).is_floating_point:
            raise ModelError(
                f"{_source(reader, name)} tensor {name} holds {str(reader.dtype(name)).removeprefix('torch.')}, not "
                "floating-point numbers; training needs the unquantized model"
            )
    if spec.tied and HEAD.hf[0] in found and not head_repeats_embedding(reader):
        raise ModelError(
            f"{_source(reader, HEAD.hf[0])} tensor {HEAD.hf[0]} is not equal to {EMBEDDING.hf[0]}, though config.json "
            "says tie_word_embeddings=true; set it to false to have both, or remove the one that is not meant"
        )


def head_repeats_embedding(reader: TensorReader) -> bool:
    """Whether a stored output head is the stored embedding; reads both, some rows at a time."""
    head, embedding = HEAD.hf[0], EMBEDDING.hf[0]
    shape = tuple(reader.shape(head))
    if shape != tuple(reader.shape(embedding)):
        return False
    pieces = (slice(row, row + _COMPARED_ROWS) for row in range(0, shape[0], _COMPARED_ROWS))
    return all(torch.equal(reader.get(head, rows).float(), reader.get(embedding, rows).float()) for rows in pieces)


def _source(reader: TensorReader, name: str | None = None) -> str:
    """The file of a tensor, or the reader's directory, where the reader tells."""
    if name is not None and hasattr(reader, "file_of"):
        return f"{reader.file_of(name)}:"
    return f"{reader.path}:" if hasattr(reader, "path") else "model weights:"


def _list(names: list[str], most: int = 5) -> str:
    shown = ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
    return f"tensor {shown} is" if len(names) == 1 else f"tensors {shown} are"


def read_shard(place: Placement, spec: Qwen3Spec, reader: TensorReader, *, tp: int, tp_rank: int) -> Tensor:
    """One tensor-parallel shard of a parameter, in the stored dtype; reads no other shard's rows or columns.

    For an expert's parameter, ``tp`` and ``tp_rank`` are those of the expert-tensor-parallel group.
    """

    def part(size: int) -> slice:
        return slice(size // tp * tp_rank, size // tp * (tp_rank + 1))

    names = place.hf_names
    kind = place.rule.kind
    if kind == "whole":
        return reader.get(names[0])
    if kind == "columns":
        return reader.get(names[0], columns=part(reader.shape(names[0])[1]))
    if kind == "gate_up":
        return torch.cat([reader.get(name, part(reader.shape(name)[0])) for name in names])
    if kind == "vocab":
        rows = part(spec.padded_vocab_size(tp))
        shard = reader.get(names[0], slice(min(rows.start, spec.vocab_size), min(rows.stop, spec.vocab_size)))
        padding = shard.new_zeros(rows.stop - rows.start - shard.shape[0], spec.hidden_size)
        return torch.cat([shard, padding])
    if tp > spec.num_kv_heads:
        slices = _rows_of_part(spec, tp, tp_rank)
        return torch.cat([reader.get(name, rows) for name, rows in zip(names, slices, strict=True)])
    heads = spec.num_kv_heads // tp
    blocks = [reader.get(name, part(reader.shape(name)[0])).reshape(heads, -1, spec.hidden_size) for name in names]
    return torch.cat(blocks, dim=1).flatten(0, 1)


def join_shards(place: Placement, spec: Qwen3Spec, shards: list[Tensor]) -> list[Tensor]:
    """The full Hugging Face tensors of a parameter from all its shards: the inverse of :func:`read_shard`.

    Views of a single shard but for queries, keys and values, whose rows have to be sorted.
    """
    kind = place.rule.kind
    if kind == "whole":
        return [shards[0]]
    if kind == "columns":
        return [_joined(shards, dim=1)]
    if kind == "gate_up":
        halves = [shard.chunk(2) for shard in shards]
        return [_joined([half[i] for half in halves]) for i in range(2)]
    if kind == "vocab":
        return [_joined(shards)[: spec.vocab_size]]
    if len(shards) > spec.num_kv_heads:
        shards = [torch.cat(shards)]
    blocks = [_by_head(spec, shard) for shard in shards]
    return [torch.cat([block[i] for block in blocks]).flatten(0, 1) for i in range(3)]


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    """``torch.cat``, which would copy a single part too."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _by_head(spec: Qwen3Spec, shard: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value rows of a ``linear_qkv`` of whole heads, each ``[kv heads, rows a head, H]``; views."""
    sizes = _rows_of_head(spec)
    return shard.view(-1, sum(sizes), spec.hidden_size).split(sizes, dim=1)


def _rows_of_head(spec: Qwen3Spec) -> list[int]:
    """How many query, key and value rows belong to a key/value head."""
    return [spec.num_heads // spec.num_kv_heads * spec.head_dim, spec.head_dim, spec.head_dim]


def _rows_of_part(spec: Qwen3Spec, tp: int, tp_rank: int) -> list[slice]:
    """The query, key and value rows, some of them none, of a ``linear_qkv`` shard that is part of one head."""
    parts = tp // spec.num_kv_heads
    head, part = divmod(tp_rank, parts)
    sizes = _rows_of_head(spec)
    length = sum(sizes) // parts
    start = part * length
    slices = []
    for size in sizes:
        first, last = (min(max(edge, 0), size) for edge in (start, start + length))
        slices.append(slice(head * size + first, head * size + last))
        start -= size
    return slices


def spread_shard(
    place: Placement, spec: Qwen3Spec, shard: Tensor, *, tp: int, tp_rank: int, mark_rest: bool = False
) -> list[Tensor]:
    """Full Hugging Face tensors of a parameter in which only one shard's rows or columns are filled in.

    The rest is NaN with ``mark_rest`` and uninitialised memory without. At tp 1, the tensors themselves. A shard of
    part of a key/value head has no such tensors.
    """
    kind = place.rule.kind
    if tp == 1 or kind == "whole":
        return join_shards(place, spec, [shard])
    own: Sequence[Tensor] = (shard,)
    if kind == "gate_up":
        own = shard.chunk(2)
    elif kind == "qkv":
        own = [part.flatten(0, 1) for part in _by_head(spec, shard)]
    shapes = [spec.tensor_shape(name) for name in place.hf_names]
    full = [shard.new_full(shape, torch.nan) if mark_rest else shard.new_empty(shape) for shape in shapes]
    for part, whole in zip(own, full, strict=True):
        dim = 1 if kind == "columns" else 0
        start = tp_rank * part.shape[dim]
        size = min(part.shape[dim], whole.shape[dim] - start)  # without a vocabulary's padding
        if size > 0:
            whole.narrow(dim, start, size).copy_(part.narrow(dim, 0, size))
    return full


def shard_shape(place: Placement, spec: Qwen3Spec, tp: int) -> tuple[int, ...]:
    """Shape of one tensor-parallel shard of a parameter."""
    shapes = [spec.tensor_shape(name) for name in place.hf_names]
    kind = place.rule.kind
    if kind == "whole":
        return shapes[0]
    if kind == "columns":
        return (shapes[0][0], shapes[0][1] // tp)
    if kind == "vocab":
        return (spec.padded_vocab_size(tp) // tp, spec.hidden_size)
    return (sum(shape[0] for shape in shapes) // tp, spec.hidden_size)


def partition_dim(rule: Rule) -> int | None:
    """The dimension a parameter is sharded along over tp; ``None`` where it is replicated."""
    return {"whole": None, "columns": 1}.get(rule.kind, 0)


@torch.no_grad()
def load_hf_weights(
    chunks: Sequence[torch.nn.Module], spec: Qwen3Spec, reader: TensorReader, dims: ParallelDims
) -> None:
    """Fill this rank's chunks of the model from Hugging Face tensors, cast to their dtype.

    Every rank reads for itself, and only what it holds. Load before the model is wrapped for training: an optimizer
    that keeps float32 master weights takes them when it is built.

    Ranks: every rank (no collectives; all of them make the same checks and fail alike).

    Raises:
        ModelError: From :func:`check_tensors`.
    """
    check_tensors(spec, reader)
    for place, parameter in placed_parameters(chunks, spec, dims):
        tp, rank = (dims.tp, dims.tp_rank) if place.expert is None else (dims.etp, dims.etp_rank)
        parameter.copy_(read_shard(place, spec, reader, tp=tp, tp_rank=rank))
