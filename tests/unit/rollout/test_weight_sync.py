"""The manifest check on the way of the weights into the engine, and that a sync has it in its way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opsd_megatron.models.families import read_spec
from opsd_megatron.models.weight_map import hf_shapes
from opsd_megatron.rollout import weight_sync
from opsd_megatron.rollout.engine import ShardLayout
from opsd_megatron.rollout.weight_sync import CheckedStream, sync_weights
from tests.tiny import make_tiny_qwen3

MANIFEST = {"a": (2, 3), "b": (4,)}
A, B = ("a", torch.ones(2, 3)), ("b", torch.ones(4))


def drain(tensors: Iterable[tuple[str, torch.Tensor]]) -> CheckedStream:
    stream = CheckedStream(iter(tensors), MANIFEST, torch.float32)
    for _ in stream:
        pass
    return stream


def test_complete_stream_passes_unchanged() -> None:
    stream = CheckedStream(iter([B, A]), MANIFEST, torch.float32)
    assert list(stream) == [B, A]
    stream.check_complete()


def test_missing_tensor() -> None:
    stream = drain([A])
    with pytest.raises(AssertionError, match="1 tensors were not exported, the first is b"):
        stream.check_complete()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (A, "a is unknown to config.json or was exported twice"),
        (("c", torch.ones(1)), "c is unknown"),
        (("b", torch.ones(5)), r"b was exported with shape \(5,\) instead of \(4,\)"),
        (("b", torch.ones(4).bfloat16()), r"b was exported as torch\.bfloat16 instead of torch\.float32"),
    ],
)
def test_wrong_tensor(extra: tuple[str, torch.Tensor], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        drain([A, extra])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("none", None),
        ("missing", "1 tensors were not exported"),
        ("repeated", "was exported twice"),
        ("renamed", "is unknown to config.json"),
    ],
)
def test_a_sync_checks_what_is_exported_and_asks_for_own_shards(
    fault: str, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = read_spec(make_tiny_qwen3(tmp_path, with_tokenizer=False))
    tensors = {name: torch.zeros(shape) for name, shape in hf_shapes(spec).items()}
    *others, last = tensors
    names = {"none": [*others, last], "missing": others, "repeated": [*others, last, last]}
    asked: list[frozenset[str]] = []

    def export(*_: Any, own_shards_of: frozenset[str], **__: Any) -> Iterator[tuple[str, torch.Tensor]]:
        asked.append(own_shards_of)
        yield from ((name, tensors[name]) for name in names.get(fault, others))
        if fault == "renamed":
            yield "model.other", tensors[last]

    monkeypatch.setattr(weight_sync, "export_hf_weights", export)
    monkeypatch.setattr(weight_sync, "missing_parameters", lambda *_: [])
    engine: Any = SimpleNamespace(layout=ShardLayout(2, 1), update_weights=lambda weights: [*weights])
    dims: Any = SimpleNamespace(tp=2, pp=1, ep=1, etp=2)
    if message is None:
        moved = sync_weights(engine, [torch.nn.Linear(1, 1)], spec, dims)
        assert moved == sum(tensor.nbytes for tensor in tensors.values())
    else:
        with pytest.raises(AssertionError, match=message):
            sync_weights(engine, [torch.nn.Linear(1, 1)], spec, dims)
    assert asked == [frozenset(tensors)]
