"""Giving up the trainer's memory while the engine samples changes nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from opsd_megatron.config.compose import compose_config
from tests.distributed import run_distributed
from tests.functional.runs import make_small_run, read_metrics


def train_twice(plain: list[str], offloaded: list[str]) -> None:
    """Both runs end with the same bits; only in the second the gradient buffers are gone while the engine samples."""
    weights, sizes = zip(*(_train(overrides) for overrides in (plain, offloaded)), strict=True)
    assert len(sizes[0]) == len(sizes[1]) == 2
    assert min(sizes[0]) > 0
    assert max(sizes[1]) == 0
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def _train(overrides: list[str]) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Final weights, and the bytes of gradient buffers at each call of the engine."""
    from opsd_megatron.models.export import export_hf_weights
    from opsd_megatron.trainer.setup import build_trainer, check_inputs

    config = compose_config(overrides)
    trainer = build_trainer(config, check_inputs(config))
    assert trainer.engine is not None
    generate, sizes = trainer.engine.generate, []

    def watched(prompts: Sequence[Sequence[int]], *arguments: Any, **named: Any) -> Any:
        buffers = [buffer for chunk in trainer.trainable.chunks for buffer in chunk.buffers]
        sizes.append(sum(buffer.grad_data.untyped_storage().size() for buffer in buffers))
        return generate(prompts, *arguments, **named)

    trainer.engine.generate = watched  # type: ignore[method-assign]
    trainer.run()
    exported = export_hf_weights(trainer.trainable.modules, trainer.spec, trainer.dims)
    weights = {name: tensor.clone() for name, tensor in exported}
    trainer.dims.destroy()
    return weights, sizes


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_offload_changes_nothing(tmp_path: Path, dtype: str) -> None:
    small = make_small_run(tmp_path)
    plain, offloaded = (
        small.overrides(tmp_path / str(offload), steps=2, train__offload=offload, model__dtype=dtype)
        for offload in (False, True)
    )
    run_distributed(train_twice, 2, plain, offloaded)
    lines = read_metrics(tmp_path / "True")
    assert all(line["seconds"]["offload"] > 0 for line in lines)
    assert [line["loss"] for line in lines] == [line["loss"] for line in read_metrics(tmp_path / "False")]
