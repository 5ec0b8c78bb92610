"""Low-rank adapters (LoRA, arXiv 2106.09685) on Megatron-Core's linear layers, on any mesh.

Except those on ``linear_qkv`` where tensor-parallel ranks share key/value heads (``qwen3.check_adapters``).

Megatron-Core keeps query, key and value in one linear layer, gate and up in another. PEFT adapts each projection by
itself, with an A and a B of its own, and so does this module: a shared A would be another, smaller model, which no PEFT
adapter of the same rank stands for. So what trains here is what PEFT would train, parameter by parameter.

The base layers stay what they are. An :class:`Adapter` lies beside its linear layer, as ``linear_qkv_lora`` beside
``linear_qkv``, and adds to its output through a forward hook.

How factors lie on ranks, with ``y = W x + s B (A x)``. Every rank of a tensor-parallel group (of experts: of an
expert-tensor-parallel group) has all ``rank`` rows of A and columns of B, so that the rank need not divide by anything,
and what travels is as narrow as the rank:

========  =================  =================  ===========================================================
W is cut  A ``[rank, in]``   B ``[out, rank]``  ``A x`` forward; backward
========  =================  =================  ===========================================================
by rows   whole              by rows            nothing (under sequence parallelism gathered); its gradient is
                                                summed (reduce-scattered)
by cols   by columns         whole              summed (reduce-scattered); nothing (gathered)
========  =================  =================  ===========================================================

Under sequence parallelism each rank's gradient of a whole factor covers its own tokens; the ``sequence_parallel`` mark
has Megatron-Core's ``finalize_model_grads`` sum them. For experts the token dispatcher gathers tokens before and sums
outputs after, and in backward the other way round, so there only the whole factors' own gradients are summed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from opsd_megatron.config import LoraConfig
from opsd_megatron.distributed.collectives import sum_gradient, summed
from opsd_megatron.models.rules import ADAPTER_SUFFIX


class _Layout(NamedTuple):
    """How a linear layer is made of projections.

    Attributes:
        prefix: What the projections' Hugging Face names begin with, as ``model.layers.0.mlp.``.
        projections: Their names, in the order of the layer's rows.
        by_rows: Whether the weight is cut by rows (``ColumnParallelLinear``) or by columns.
        groups: Runs of this rank's rows, each with a part of every projection.
        of_expert: Whether it is an expert's.
    """

    prefix: str
    projections: tuple[str, ...]
    by_rows: bool
    groups: int = 1
    of_expert: bool = False


class Adapter(nn.Module):
    """The adapters of one linear layer.

    Parameters are called ``q_proj_a`` (``[rank, in]``), ``q_proj_b`` (``[out, rank]``) and so on; B holds this rank's
    rows in Hugging Face's order.

    Attributes:
        settings: Rank, scale and targets of the whole model.
        active: Whether they act.
    """

    def __init__(self, layout: _Layout, weight: Tensor, settings: LoraConfig, groups: Any, config: Any) -> None:
        """Make adapters that do nothing.

        Args:
            layout: What the linear layer is made of.
            weight: This rank's part of its weight.
            settings: ``rank`` at least 1.
            groups: Megatron-Core's process groups.
            config: Megatron-Core's configuration.
        """
        super().__init__()
        self.settings, self.active = settings, True
        self._layout = layout
        self._group: dist.ProcessGroup = groups.expt_tp if layout.of_expert else groups.tp
        self._sequence_parallel = config.sequence_parallel and not layout.of_expert
        self._rows = _rows_of_projections(layout, weight, config)
        self._targets = tuple(name for name in layout.projections if name in settings.targets)
        for name in self._targets:
            for factor, shape in (("a", (settings.rank, weight.shape[1])), ("b", (self._rows[name], settings.rank))):
                parameter = nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
                self._mark(parameter, factor)
                self.register_parameter(f"{name}_{factor}", parameter)

    def _mark(self, parameter: nn.Parameter, factor: str) -> None:
        """Tell Megatron-Core whose gradients to sum and which to count once in the norm."""
        cut = self._cut(factor)
        if self._layout.of_expert:
            # Summed over the ranks that hold the same experts. In the norm's group nobody else has the same expert, cut
            # or not, but for the whole factors of an expert that is itself cut.
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.shared = cut is None and self._group.rank() > 0  # type: ignore[attr-defined]
            set_tensor_model_parallel_attributes(parameter, True, cut or 0, 1)
        elif cut is None:
            parameter.sequence_parallel = self._sequence_parallel  # type: ignore[attr-defined]
        else:
            set_tensor_model_parallel_attributes(parameter, True, cut, 1)

    def _cut(self, factor: str) -> int | None:
        """The dimension that a factor is cut along; ``None`` where every rank has all of it."""
        if self._layout.by_rows:
            return 0 if factor == "b" else None
        return 1 if factor == "a" else None

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """Draw A as PEFT does, uniform in ``+- 1/sqrt(in)``, and set B to zero.

        The whole A is drawn, from a seed of its own name, and cut: it is the same one on any mesh.
        """
        for name in self._targets:
            a, b = getattr(self, f"{name}_a"), getattr(self, f"{name}_b")
            parts = 1 if self._layout.by_rows else self._group.size()
            digest = hashlib.sha256(f"{seed} {self._layout.prefix}{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            whole = torch.rand(a.shape[0], a.shape[1] * parts, generator=generator)
            bound = 1 / math.sqrt(whole.shape[1])
            a.copy_(whole.mul_(2 * bound).sub_(bound).chunk(parts, dim=1)[self._group.rank() if parts > 1 else 0])
            b.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """What the adapters add to the layer's output.

        Ranks: every rank of the tensor-parallel group.

        Args:
            x: The layer's input, ``[..., in]`` or this rank's columns of it.
        """
        a = torch.cat([getattr(self, f"{name}_a") for name in self._targets])
        if self._layout.of_expert and self._layout.by_rows:
            a = sum_gradient(a, self._group)
        narrow = (self._exchange(F.linear(x, a)) * self.settings.scale).chunk(len(self._targets), dim=-1)
        parts = dict(zip(self._targets, narrow, strict=True))
        added = []
        for name, rows in self._rows.items():
            if name not in parts:
                added.append(narrow[0].new_zeros(*narrow[0].shape[:-1], rows))
                continue
            b = getattr(self, f"{name}_b")
            if self._layout.of_expert and not self._layout.by_rows:
                b = sum_gradient(b, self._group)
            added.append(F.linear(parts[name], b))
        return self._join(added, -1)

    def _exchange(self, narrow: Tensor) -> Tensor:
        """Between A and B; see the module's docstring."""
        if self._layout.of_expert or self._group.size() == 1:
            return narrow
        if self._sequence_parallel:
            if self._layout.by_rows:
                return gather_from_sequence_parallel_region(narrow, tensor_parallel_output_grad=True, group=self._group)
            return reduce_scatter_to_sequence_parallel_region(narrow, group=self._group)
        return (sum_gradient if self._layout.by_rows else summed)(narrow, self._group)

    def _join(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """The projections' parts in the order of the layer's rows, along dimension 0 or -1."""
        inner = dim + 1 if dim >= 0 else dim
        grouped = [part.unflatten(dim, (self._layout.groups, -1)) for part in parts]
        return torch.cat(grouped, inner).flatten(inner - 1, inner)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """This rank's part of what the adapters add to the weight, float32, in the weight's shape."""
        parts = []
        for name, rows in self._rows.items():
            if name in self._targets:
                a, b = getattr(self, f"{name}_a"), getattr(self, f"{name}_b")
                parts.append(b.float() @ a.float() * self.settings.scale)
            else:
                columns: int = getattr(self, f"{self._targets[0]}_a").shape[1]
                parts.append(torch.zeros(rows, columns, device=getattr(self, f"{self._targets[0]}_a").device))
        return self._join(parts, 0)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The factors with their place in the global ones, as Megatron-Core's modules have it."""
        assert metadata is not None
        state = self.state_dict(prefix="", keep_vars=True)
        cuts = {name: cut for name in state if (cut := self._cut(name[-1])) is not None}
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            state, prefix, cuts, sharded_offsets, tp_group=self._group, dp_cp_group=metadata["dp_cp_group"]
        )
        return sharded


def _rows_of_projections(layout: _Layout, weight: Tensor, config: TransformerConfig) -> dict[str, int]:
    """This rank's rows of each projection."""
    if "q_proj" in layout.projections:
        key = layout.groups * config.kv_channels
        return {"q_proj": weight.shape[0] - 2 * key, "k_proj": key, "v_proj": key}
    return dict.fromkeys(layout.projections, weight.shape[0] // len(layout.projections))


def add_adapters(chunks: Sequence[GPTModel], settings: LoraConfig, *, seed: int) -> None:
    """Freeze a model and give it adapters that do nothing yet.

    Call after the weights are loaded and before the model is wrapped for training.

    Ranks: every rank (no collectives).

    Args:
        chunks: This rank's chunks of the unwrapped model.
        settings: ``rank`` at least 1.
        seed: Decides every A.
    """
    for chunk in chunks:
        chunk.requires_grad_(False)
        for adapter in _attach(chunk, settings.resolved()):
            adapter.draw(seed)
        if chunk.pre_process:
            chunk.embedding.register_forward_hook(_start_graph)


def _start_graph(_: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
    """Let gradients be recorded from the frozen embedding's output on.

    Recomputation keeps a layer's graph only where its input needs a gradient (mcore's ``CheckpointFunction``).
    """
    return output.detach().requires_grad_() if torch.is_grad_enabled() else None


def _attach(chunk: GPTModel, settings: LoraConfig) -> list[Adapter]:
    """Put adapters, which do nothing yet, beside a chunk's linear layers."""
    adapters = []
    for owner, attribute, layout in _linear_layers(chunk):
        if set(layout.projections).isdisjoint(settings.targets):
            continue
        linear = getattr(owner, attribute)
        adapter = Adapter(layout, linear.weight, settings, chunk.pg_collection, chunk.config)
        owner.add_module(attribute + ADAPTER_SUFFIX, adapter)
        adapter.hook = linear.register_forward_hook(_adding(adapter))
        linear.weight.adapter = adapter
        adapters.append(adapter)
    return adapters


def _adding(adapter: Adapter) -> Callable[..., Any]:
    """What adds the adapter's output to that of the linear layer, which comes with its bias."""

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any] | None:
        return (output[0] + adapter(inputs[0]), output[1]) if adapter.active else None

    return add


def _linear_layers(chunk: GPTModel) -> Iterator[tuple[nn.Module, str, _Layout]]:
    """The linear layers that can be adapted: the module that holds each, and its name there."""
    heads = chunk.config.num_query_groups // chunk.pg_collection.tp.size()
    for layer in chunk.decoder.layers:
        prefix = f"model.layers.{layer.layer_number - 1}."
        attention = prefix + "self_attn."
        yield layer.self_attention, "linear_qkv", _Layout(attention, ("q_proj", "k_proj", "v_proj"), True, heads)
        yield layer.self_attention, "linear_proj", _Layout(attention, ("o_proj",), False)
        experts = getattr(layer.mlp, "experts", None)
        if experts is None:
            yield from _mlp(layer.mlp, prefix + "mlp.", of_expert=False)
            continue
        # Experts that one layer takes at once have no such list, and no adapters (backends.groups_experts).
        local = getattr(experts, "local_experts", ())
        first = chunk.pg_collection.ep.rank() * len(local)
        for number, expert in enumerate(local, start=first):
            yield from _mlp(expert, f"{prefix}mlp.experts.{number}.", of_expert=True)


def _mlp(mlp: nn.Module, prefix: str, *, of_expert: bool) -> Iterator[tuple[nn.Module, str, _Layout]]:
    yield mlp, "linear_fc1", _Layout(prefix, ("gate_proj", "up_proj"), True, of_expert=of_expert)
    yield mlp, "linear_fc2", _Layout(prefix, ("down_proj",), False, of_expert=of_expert)


def _adapters(chunks: Sequence[nn.Module]) -> list[Adapter]:
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Adapter)]


def adapter_settings(chunks: Sequence[nn.Module]) -> LoraConfig | None:
    """What a model's adapters were made with; ``None`` where it has none."""
    adapters = _adapters(chunks)
    return adapters[0].settings if adapters else None


@contextmanager
def adapters_off(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """The model as it was before it was adapted, bit for bit: adapters do not act within.

    Ranks: each for its own chunks; all of them around what they compute together.

    Args:
        chunks: This rank's chunks, wrapped for data parallelism or not.
    """
    adapters = _adapters(chunks)
    for adapter in adapters:
        adapter.active = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.active = True


def effective_weight(parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """This rank's part of a weight as it acts: with its adapters added, where it has some.

    Added in float32 and rounded once. Where there is no adapter, the parameter itself, detached, in its own dtype.

    Args:
        parameter: The weight.
        dtype: What the sum is rounded to; ``None`` for the weight's. In bfloat16 the weight keeps nothing of a delta
            below half of its last digit.
    """
    adapter: Adapter | None = getattr(parameter, "adapter", None)
    if adapter is None:
        return parameter.detach()
    return adapter.delta().add_(parameter.detach()).to(dtype or parameter.dtype)


@contextmanager
def adapters_to_merge(chunks: Sequence[GPTModel], settings: LoraConfig) -> Iterator[None]:
    """Give a model adapters to load, then add them to its weights and take them away again.

    Ranks: each for its own chunks.
    """
    for chunk in chunks:
        _attach(chunk, settings)
    yield
    with torch.no_grad():
        for chunk in chunks:
            for owner, attribute, _ in _linear_layers(chunk):
                adapter = getattr(owner, attribute + ADAPTER_SUFFIX, None)
                if adapter is not None:
                    weight = getattr(owner, attribute).weight
                    weight.copy_(effective_weight(weight))
                    adapter.hook.remove()
                    del weight.adapter
                    delattr(owner, attribute + ADAPTER_SUFFIX)
