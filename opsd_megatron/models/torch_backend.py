"""The modules of the ``torch`` backend: what Transformer Engine provides elsewhere, written in plain PyTorch.

They run on CPU and on CUDA. Attention runs one call for each packed sequence, which is exact everywhere; on CUDA in
bf16 PyTorch's flash attention takes all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from opsd_megatron.data.context import context_indices
from opsd_megatron.models.backends import norm_names
from opsd_megatron.types import PackedSequences


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467), computed in float32.

    Megatron-Core's own plain-torch norm refuses sequence parallelism. Under it every rank sees part of the sequence,
    so the weight's gradient is a partial sum; the ``sequence_parallel`` mark has ``finalize_model_grads`` complete it.
    The query and key norms see part of the heads under any tensor parallelism, or of a head that ranks share part of
    the gradient; those it recognises by name.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size]`` to the same shape and dtype."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class _Piece(NamedTuple):
    """Consecutive queries of one sequence.

    Attributes:
        start: Where the sequence starts among the keys.
        visible: How many of its keys the last query sees.
        queries: How many queries there are; they come after those of the piece before.
    """

    start: int
    visible: int
    queries: int


class _Bounds(NamedTuple):
    """What PyTorch's variable-length attention wants to know of the pieces, on their device.

    Attributes:
        seen: The keys of each piece after those of the piece before; ``None`` where they lie so already.
        queries: Start of every piece's queries and the end of the last, int32.
        keys: The same of its keys.
        most_queries: Of a piece.
        most_keys: Of a piece.
    """

    seen: Tensor | None
    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int


@dataclass(kw_only=True)
class TorchPacking(PackedSeqParams):
    """Where the sequences of a micro-batch lie, and who attends to what: worked out once, not by every layer.

    ``cu_seqlens_q`` stays on the host. Megatron-Core's rotary embedding, too, wants it as numbers, and to read them off
    a device is to wait for it.

    Attributes:
        context: The context-parallel group.
        device: The model's.
    """

    context: dist.ProcessGroup
    device: torch.device

    @staticmethod
    def of(sequences: PackedSequences, context: dist.ProcessGroup) -> TorchPacking:
        """Of sequences on the model's device, whose tokens the ranks of ``context`` share."""
        return TorchPacking(
            qkv_format="thd",
            cu_seqlens_q=sequences.cu_seqlens,
            cu_seqlens_kv=sequences.cu_seqlens,
            max_seqlen_q=sequences.max_seqlen,
            max_seqlen_kv=sequences.max_seqlen,
            context=context,
            device=sequences.ids.device,
        )

    @cached_property
    def pieces(self) -> list[_Piece]:
        """Whole sequences, or under context parallelism two chunks of each (``data.context``)."""
        cp, rank = self.context.size(), self.context.rank()
        pieces = []
        for start, end in pairwise(self.cu_seqlens_q.tolist()):
            if cp == 1:
                pieces.append(_Piece(start, end - start, end - start))
            else:
                chunk = (end - start) // (2 * cp)
                pieces.append(_Piece(start, chunk * (rank + 1), chunk))
                pieces.append(_Piece(start, chunk * (2 * cp - rank), chunk))
        return pieces

    @cached_property
    def order(self) -> Tensor:
        """Where each position of the whole sequences is among those gathered from all ranks, ``[T]`` int64."""
        cp = self.context.size()
        held = torch.cat([context_indices(self.cu_seqlens_q, cp=cp, rank=rank) for rank in range(cp)])
        return self._placed(held.argsort())

    @cached_property
    def bounds(self) -> _Bounds:
        """See there."""
        pieces = self.pieces
        seen = None
        if any(piece.queries != piece.visible for piece in pieces):
            # The kernel wants each piece's keys after the previous one's; two pieces of a sequence share some.
            seen = self._placed(torch.cat([torch.arange(one.start, one.start + one.visible) for one in pieces]))
        queries, visible = [piece.queries for piece in pieces], [piece.visible for piece in pieces]
        of_queries, of_keys = (
            self._placed(torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)) for sizes in (queries, visible)
        )
        return _Bounds(seen, of_queries, of_keys, max(queries), max(visible))

    def _placed(self, tensor: Tensor) -> Tensor:
        """``tensor`` on the device, which is not waited for."""
        return tensor.to(self.device, non_blocking=True)


class PackedAttention(torch.nn.Module):
    """Causal attention within each of the packed sequences.

    Through PyTorch's variable-length flash attention where that exists, on CUDA in bf16, and its
    scaled-dot-product attention, sequence by sequence, elsewhere.

    Under context parallelism a rank's queries see keys and values gathered from all ranks of the group; in backward
    their gradients are summed and scattered back.
    """

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection, **_: Any) -> None:
        super().__init__()
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: TorchPacking,
        **_: Any,
    ) -> Tensor:
        """Attend.

        Ranks: every rank of the context-parallel group.

        Args:
            query: ``[T, heads/tp, head_dim]``, T this rank's part under context parallelism.
            key: ``[T, kv_heads/tp, head_dim]``, or one head that ranks share.
            value: Like ``key``.
            attention_mask: Not used: the packing says what is visible.
            packed_seq_params: Where sequences start and end.

        Returns:
            ``[T, heads/tp * head_dim]``.
        """
        if self.cp_group.size() > 1:
            key, value = self._gather(key, value, packed_seq_params.order)
        if query.is_cuda and query.dtype == torch.bfloat16:
            return _attend_together(query, key, value, packed_seq_params.bounds).flatten(1)
        return _attend_one_by_one(query, key, value, packed_seq_params.pieces).flatten(1)

    def _gather(self, key: Tensor, value: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole sequences, shaped as before but for their T, in one collective."""
        both = gather_from_sequence_parallel_region(
            torch.stack([key, value], dim=1), tensor_parallel_output_grad=True, group=self.cp_group
        )
        key, value = both.index_select(0, order).unbind(1)
        return key, value


def _attend_one_by_one(query: Tensor, key: Tensor, value: Tensor, pieces: Sequence[_Piece]) -> Tensor:
    """``[T, heads, head_dim]`` through one call for each piece."""
    # [T, n, d] -> [1, n, T, d], as scaled_dot_product_attention wants it.
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    # Split at once rather than sliced one by one: the gradient of a slice is as large as what it was cut from.
    queries = query.split([piece.queries for piece in pieces], dim=2)
    starts = sorted({piece.start for piece in pieces})
    lengths = [end - start for start, end in pairwise([*starts, key.shape[2]])]
    parts = zip(starts, key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True)
    sequences = {start: pair for start, *pair in parts}
    attended = []
    for piece, own in zip(pieces, queries, strict=True):
        keys, values = (part[:, :, : piece.visible] for part in sequences[piece.start])
        whole = piece.queries == piece.visible
        attended.append(
            F.scaled_dot_product_attention(
                own,
                keys,
                values,
                attn_mask=None if whole else _lower_right(piece.queries, piece.visible, query.device),
                is_causal=whole,
                enable_gqa=True,
            )
        )
    return torch.cat(attended, dim=2).squeeze(0).transpose(0, 1)


def _attend_together(query: Tensor, key: Tensor, value: Tensor, bounds: _Bounds) -> Tensor:
    """``[T, heads, head_dim]`` through one call for all pieces; CUDA only."""
    if bounds.seen is not None:
        key, value = key.index_select(0, bounds.seen), value.index_select(0, bounds.seen)
    # A window of everything before and nothing after is causal, the last query seeing the last key.
    attended = varlen_attn(
        query,
        key,
        value,
        bounds.queries,
        bounds.keys,
        bounds.most_queries,
        bounds.most_keys,
        window_size=(-1, 0),
        enable_gqa=True,
    )
    return cast(Tensor, attended)


def _lower_right(queries: int, visible: int, device: torch.device) -> Tensor:
    """Which keys each query may see when the last query sees all of them."""
    return torch.ones(queries, visible, dtype=torch.bool, device=device).tril(visible - queries)


def block_spec(experts: Sequence[int]) -> TransformerBlockSubmodules:
    """Layers and the final norm, built from this module and Megatron-Core's parallel linear layers and expert layer.

    Args:
        experts: For each layer how many experts it has; 0 for a plain MLP.
    """
    layers = {with_experts: _layer_spec(with_experts) for with_experts in (False, True)}
    return TransformerBlockSubmodules(layer_specs=[layers[count > 0] for count in experts], layer_norm=RMSNorm)


def _layer_spec(with_experts: bool) -> ModuleSpec:
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=PackedAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=RMSNorm,
            k_layernorm=RMSNorm,
        ),
    )
    mlp_parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    mlp = ModuleSpec(module=MLP, submodules=mlp_parts)
    if with_experts:
        each = ModuleSpec(module=SequentialMLP, submodules=mlp_parts)
        mlp = ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=each))
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=norm_names(with_experts=with_experts),
        ),
    )
