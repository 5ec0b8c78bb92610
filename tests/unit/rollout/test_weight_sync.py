"""The manifest check on the way of the weights into the engine."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from opsd_megatron.rollout.weight_sync import CheckedStream

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
