"""The trainer's weights into the rollout engine, with the list of tensors checked on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from opsd_megatron.distributed.parallel import ParallelDims
from opsd_megatron.models.export import export_hf_weights
from opsd_megatron.models.qwen3 import Qwen3Spec
from opsd_megatron.models.rules import EMBEDDING, HEAD
from opsd_megatron.models.weight_map import hf_shapes, missing_parameters, placements
from opsd_megatron.rollout.engine import RolloutEngine, ShardLayout


def sync_weights(
    engine: RolloutEngine,
    model: Sequence[torch.nn.Module],
    spec: Qwen3Spec,
    dims: ParallelDims,
    *,
    mark_rest: bool = False,
) -> int:
    """Replace the engine's weights by the model's.

    Where the engine cuts tensors as the trainer does, every rank hands its own shards over and none crosses a rank.

    Ranks: every rank of the world.

    Args:
        engine: Awake or asleep; see :meth:`~opsd_megatron.rollout.engine.RolloutEngine.update_weights`.
        model: This rank's chunks of the unwrapped model.
        spec: What its ``config.json`` says, which names the tensors there must be.
        dims: The mesh it is spread over.
        mark_rest: Hand over NaN where other ranks' shards would be. An engine that reads them after all then gives NaN
            log-probs, rather than plausible ones of wrong weights. Once is enough, since layouts stay.

    Returns:
        Bytes of the whole model, which each replica of the engine holds once.

    Raises:
        AssertionError: A tensor is missing, repeated, unknown or of another shape or dtype than ``config.json`` and the
            model call for. An engine keeps the old value of a tensor it does not get, so this must not go unnoticed.
            A parameter that this rank lacks is found before anything is handed over.
    """
    if missing := missing_parameters(model, spec, dims):
        raise AssertionError(f"this rank has no parameter for {missing[0].hf_names[0]} and {len(missing) - 1} more")
    shapes, dtype = hf_shapes(spec), next(model[0].parameters()).dtype
    own = own_shards(spec, dims, engine.layout)
    tensors = export_hf_weights(model, spec, dims, own_shards_of=own, mark_rest=mark_rest)
    stream = CheckedStream(tensors, shapes, dtype)
    engine.update_weights(iter(stream))
    stream.check_complete()
    return sum(map(math.prod, shapes.values())) * dtype.itemsize


def own_shards(spec: Qwen3Spec, dims: ParallelDims, layout: ShardLayout | None) -> frozenset[str]:
    """The tensors of which an engine reads on every rank just the shard that the trainer has there."""
    if layout is None or dims.pp > 1 or layout.tensor != dims.tp:
        return frozenset()
    # Padded by the two to different sizes, a vocabulary is cut in different places.
    alike = spec.vocab_size % layout.vocab_multiple == 0 and spec.vocab_size % dims.tp == 0
    experts_alike = dims.ep == 1 and dims.etp == dims.tp
    # With fewer of them than ranks, the engine repeats key/value heads; Megatron-Core cuts them.
    heads_alike = dims.tp <= spec.num_kv_heads
    return frozenset(
        name
        for place in placements(spec)
        for name in place.hf_names
        if (alike or place.rule not in (EMBEDDING, HEAD))
        and (experts_alike or place.expert is None)
        and (heads_alike or place.rule.kind != "qkv")
    )


class CheckedStream:
    """Passes named tensors on and compares them with a manifest."""

    def __init__(
        self, tensors: Iterator[tuple[str, Tensor]], manifest: Mapping[str, tuple[int, ...]], dtype: torch.dtype
    ) -> None:
        self._tensors = tensors
        self._missing = dict(manifest)
        self._dtype = dtype

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor in its order.

        Raises:
            AssertionError: One is not in the manifest, has passed before, or has another shape or dtype.
        """
        for name, tensor in self._tensors:
            shape = self._missing.pop(name, None)
            if shape is None:
                raise AssertionError(f"{name} is unknown to config.json or was exported twice")
            if tuple(tensor.shape) != shape:
                raise AssertionError(f"{name} was exported with shape {tuple(tensor.shape)} instead of {shape}")
            if tensor.dtype != self._dtype:
                raise AssertionError(f"{name} was exported as {tensor.dtype} instead of {self._dtype}")
            yield name, tensor

    def check_complete(self) -> None:
        """Raise ``AssertionError`` if tensors of the manifest have not passed."""
        if self._missing:
            raise AssertionError(
                f"{len(self._missing)} tensors were not exported, the first is {next(iter(self._missing))}"
            )
