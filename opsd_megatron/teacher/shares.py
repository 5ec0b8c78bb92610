"""Weights in the parts in which ranks keep and store them, which have the same names on any mesh."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from opsd_megatron.distributed.collectives import gather_shards
from opsd_megatron.distributed.parallel import ParallelDims
from opsd_megatron.models.build import HiddenStatesGPT
from opsd_megatron.models.lora import effective_weight
from opsd_megatron.models.qwen3 import Qwen3Spec
from opsd_megatron.models.rules import EMBEDDING
from opsd_megatron.models.weight_map import Placement, partition_dim, placed_parameters

# Bytes put together in one collective when ranks tell each other their shares.
_BUCKET = 256 * 2**20


@dataclass(frozen=True)
class Share:
    """What this rank answers for of one tensor.

    Attributes:
        name: The Hugging Face tensor's; ``qkv_proj`` is query, key and value rows as Megatron-Core interleaves them,
            which any tensor parallelism cuts into equal runs.
        shard: This rank's tensor-parallel shard of it: a view into the parameter, or with adapters their sum.
        dim: The dimension of ``shard`` that data-parallel ranks divide; never the one that tensor parallelism cuts.
        part: This rank's part of it.
        parts: Parts there are; 1 where every rank keeps the whole shard.
        group: Ranks that hold equal shards.
        tensor_cut: Dimension, this rank's place and the number of places of the tensor-parallel cut; ``None`` for none.
        replica: Which copy of the share this is in a checkpoint; the one of zeros is written.
        padded: Whether the shard may hold rows beyond the vocabulary.
    """

    name: str
    shard: Tensor
    dim: int
    part: int
    parts: int
    group: dist.ProcessGroup
    tensor_cut: tuple[int, int, int] | None
    replica: tuple[int, int, int]
    padded: bool

    @property
    def own(self) -> Tensor:
        """The part of ``shard`` that is this rank's, a view."""
        return self.shard.chunk(self.parts, self.dim)[self.part]

    def stored(self, tensor: Tensor) -> ShardedTensor:
        """``tensor``, of the shape of :attr:`own`, as a checkpoint of any mesh places it."""
        cuts = [cut for cut in (self.tensor_cut, (self.dim, self.part, self.parts)) if cut is not None and cut[2] > 1]
        return ShardedTensor.from_rank_offsets(
            f"teacher.{self.name}", tensor, *cuts, replica_id=self.replica, allow_shape_mismatch=self.padded
        )


class Shares:
    """This rank's shares of a model."""

    def __init__(
        self,
        chunks: Sequence[HiddenStatesGPT],
        spec: Qwen3Spec,
        dims: ParallelDims,
        *,
        over_data: bool,
        merged_dtype: torch.dtype | None = None,
    ) -> None:
        """Look up where everything is.

        Args:
            chunks: This rank's chunks of the model.
            spec: What they were built from.
            dims: The mesh.
            over_data: Share every shard out over the ranks that hold an equal one, where its hidden dimension divides.
            merged_dtype: Of weights with adapters added; ``None`` for the model's.
        """
        self._placed = list(placed_parameters(chunks, spec, dims))
        self._dims, self._over_data, self._merged_dtype = dims, over_data, merged_dtype

    def __iter__(self) -> Iterator[Share]:
        """Every share, in an order that is the same on all ranks that hold equal shards.

        Taken anew each time: the memory of a parameter may have moved since.
        """
        for place, parameter in self._placed:
            yield from self._of(place, effective_weight(parameter, self._merged_dtype))

    def _of(self, place: Placement, shard: Tensor) -> Iterator[Share]:
        dims, cut = self._dims, partition_dim(place.rule)
        of_expert = place.expert is not None
        group = dims.expert_data_group if of_expert else dims.dp_cp_group
        tp, tp_rank = (dims.etp, dims.etp_rank) if of_expert else (dims.tp, dims.tp_rank)
        # With tied embeddings the last of several stages holds a copy of the first one's.
        copy = place.rule is EMBEDDING and not dims.is_first_stage
        for name, view in _named(place, shard):
            dim = 0 if cut == view.dim() - 1 else view.dim() - 1
            divides = self._over_data and view.dim() > 1 and view.shape[dim] % group.size() == 0
            yield Share(
                name=name,
                shard=view,
                dim=dim,
                part=group.rank() if divides else 0,
                parts=group.size() if divides else 1,
                group=group,
                tensor_cut=None if cut is None else (cut, tp_rank, tp),
                replica=(int(copy), tp_rank if cut is None else 0, 0 if divides else group.rank()),
                padded=place.rule.kind == "vocab",
            )


def _named(place: Placement, shard: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a shard has a run of rows or columns of, and its runs, as views of it."""
    if place.rule.kind == "gate_up":
        yield from zip(place.hf_names, shard.chunk(2), strict=True)
    else:
        yield place.hf_names[0].replace(".q_proj.", ".qkv_proj."), shard


def fill(shares: Iterable[Share], values: Iterable[Tensor]) -> None:
    """Write into the parameters what their ranks keep of them, each rank its own share.

    Ranks: every rank that holds an equal shard of any of them, with its own values.

    Args:
        shares: The model's :class:`Shares`.
        values: For each its new value, of the shape of :attr:`Share.own`, on the device that computes.
    """
    waiting: list[tuple[Share, Tensor]] = []
    size = 0
    for share, value in zip(shares, values, strict=True):
        value = value.to(share.shard.dtype)
        if share.parts == 1:
            share.shard.copy_(value)
            continue
        if waiting and (waiting[0][0].group != share.group or size + share.parts * value.nbytes > _BUCKET):
            _exchange(waiting)
            waiting, size = [], 0
        waiting.append((share, value))
        size += share.parts * value.nbytes
    if waiting:
        _exchange(waiting)


def _exchange(bucket: Sequence[tuple[Share, Tensor]]) -> None:
    """Bring the parts of several shards of one group together, in one collective."""
    flat = torch.cat([value.reshape(-1) for _, value in bucket])
    sizes = [value.numel() for _, value in bucket]
    for part, received in enumerate(gather_shards(flat, bucket[0][0].group)):
        for (share, value), numbers in zip(bucket, received.split(sizes), strict=True):
            share.shard.chunk(share.parts, share.dim)[part].copy_(numbers.view(value.shape))
