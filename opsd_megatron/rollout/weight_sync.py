"""The trainer's weights into the rollout engine, with the list of tensors checked on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from opsd_megatron.distributed.parallel import ParallelDims
from opsd_megatron.models.export import export_hf_weights
from opsd_megatron.models.qwen3 import Qwen3Spec
from opsd_megatron.models.weight_map import hf_shapes
from opsd_megatron.rollout.engine import RolloutEngine


def sync_weights(engine: RolloutEngine, model: Sequence[torch.nn.Module], spec: Qwen3Spec, dims: ParallelDims) -> None:
    """Replace the engine's weights by the model's.

    Ranks: every rank of the world.

    Args:
        engine: Awake or asleep; see :meth:`~opsd_megatron.rollout.engine.RolloutEngine.update_weights`.
        model: This rank's chunks of the unwrapped model.
        spec: What its ``config.json`` says, which names the tensors there must be.
        dims: The mesh it is spread over.

    Raises:
        AssertionError: A tensor is missing, repeated, unknown or of another shape than ``config.json`` calls for. An
            engine keeps the old value of a tensor it does not get, so this must not go unnoticed.
    """
    stream = CheckedStream(export_hf_weights(model, spec, dims), hf_shapes(spec))
    engine.update_weights(iter(stream))
    stream.check_complete()


class CheckedStream:
    """Passes named tensors on and compares them with a manifest."""

    def __init__(self, tensors: Iterator[tuple[str, Tensor]], manifest: Mapping[str, tuple[int, ...]]) -> None:
        self._tensors = tensors
        self._missing = dict(manifest)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor in its order.

        Raises:
            AssertionError: One is not in the manifest, has passed before, or has another shape.
        """
        for name, tensor in self._tensors:
            shape = self._missing.pop(name, None)
            if shape is None:
                raise AssertionError(f"{name} is unknown to config.json or was exported twice")
            if tuple(tensor.shape) != shape:
                raise AssertionError(f"{name} was exported with shape {tuple(tensor.shape)} instead of {shape}")
            yield name, tensor

    def check_complete(self) -> None:
        """Raise ``AssertionError`` if tensors of the manifest have not passed."""
        if self._missing:
            raise AssertionError(
                f"{len(self._missing)} tensors were not exported, the first is {next(iter(self._missing))}"
            )
