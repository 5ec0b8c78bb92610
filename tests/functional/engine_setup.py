"""What the engines of test_engine.py are started with, asked and given."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opsd_megatron.config import Config, ModelConfig, ParallelConfig, RolloutConfig
from opsd_megatron.rollout.engine import Sampling

MAX_LENGTH = 128
NEW_TOKENS = 24
SAMPLED = Sampling(temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=NEW_TOKENS)


def make_prompts() -> list[list[int]]:
    """An odd number of prompts of different lengths, so that two replicas get unequal shares; one is drawn twice."""
    draw = random.Random(0)
    prompts = [[draw.randrange(256) for _ in range(draw.randint(1, 40))] for _ in range(20)]
    return [*prompts, prompts[0]]


PROMPTS = make_prompts()
SEEDS = list(range(100, 100 + len(PROMPTS)))
# Tensors of the last update: the engine may read them where they lie until it sleeps.
HANDED_OVER: list[Tensor] = []


def engine_config(model: Path, tensor: int, **rollout: Any) -> Config:
    return Config(
        model=ModelConfig(path=str(model), dtype="float32"),
        rollout=RolloutConfig(tensor=tensor, kv_cache_gib=0.02, **rollout),
    )


def update_from(engine: Any, path: Path) -> None:
    """Hand the stored tensors of ``path`` to the engine; before that, have it sleep and overwrite what it had."""
    from safetensors.torch import load_file

    engine.sleep()
    for held in HANDED_OVER:
        held.fill_(torch.nan)
    tensors = load_file(path / "model.safetensors")
    engine.update_weights(iter(tensors.items()))
    engine.wake_up()
    HANDED_OVER[:] = tensors.values()


def megatron_model(path: Path, dims: Any, parallel: ParallelConfig | None = None) -> tuple[Any, Any, Any]:
    from opsd_megatron.checkpoint.hf_io import SafetensorsReader
    from opsd_megatron.models.build import build_model
    from opsd_megatron.models.families import read_spec
    from opsd_megatron.models.weight_map import load_hf_weights

    spec = read_spec(path)
    parallel = parallel or ParallelConfig(tensor=dims.tp)
    config = Config(model=ModelConfig(path=str(path), dtype="float32"), parallel=parallel)
    model = build_model(spec, config, dims)
    load_hf_weights(model, spec, SafetensorsReader(path), dims)
    return model, spec, dims


@torch.no_grad()
def reference_logits(reference: Any, prompt: list[int], response: tuple[int, ...]) -> Tensor:
    """Logits at the positions that predict ``response``, ``[len(response), V]``."""
    logits = reference(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
    return logits[len(prompt) - 1 : -1]
