"""What engines hold and sample after syncs from trainers of several meshes; for the process of an engine."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from opsd_megatron.config import ParallelConfig
from tests.functional.engine_setup import (
    MAX_LENGTH,
    PROMPTS,
    SAMPLED,
    SEEDS,
    engine_config,
    megatron_model,
    update_from,
)
from tests.functional.engine_weights import differing, weights_as_loaded

# Engine size and the trainer's meshes of two ranks that it is synchronised from. Where tensor parallelism is the same,
# vocabulary included (320 entries are a multiple of vLLM's 64), no tensor crosses a rank.
SYNCS: dict[str, list[tuple[int, list[ParallelConfig]]]] = {
    "dense": [
        (1, [ParallelConfig(tensor=2), ParallelConfig()]),  # the second lends the trainer's embedding
        (2, [ParallelConfig(tensor=2), ParallelConfig(pipeline=2)]),
    ],
    "experts": [
        (1, [ParallelConfig(expert=2)]),
        (2, [ParallelConfig(tensor=2), ParallelConfig(tensor=2, expert=2, expert_tensor=1)]),
    ],
}


def observe_syncs(models: dict[str, tuple[Path, Path]]) -> dict[str, list[tuple[bool, list[str]]]]:
    """Of every sync: whether the engine then samples what it does from the same weights on disk, and what it holds.

    The latter is the names of what differs from the published tensors in any bit, or is missing; the trainer's own too,
    should the engine have written to them by the end of its next update. Between the two the engine has other weights.
    The first sync of each engine marks what it must not read.
    """
    from opsd_megatron.distributed.parallel import ParallelDims
    from opsd_megatron.rollout.vllm_engine import VllmEngine
    from opsd_megatron.rollout.weight_sync import sync_weights

    outcomes: dict[str, list[tuple[bool, list[str]]]] = {}
    for kind, (model, other) in models.items():
        for tensor, meshes in SYNCS[kind]:
            engine = VllmEngine.start(model, engine_config(model, tensor), max_length=MAX_LENGTH)
            update_from(engine, model)
            expected = engine.generate(PROMPTS, SAMPLED, seeds=SEEDS)
            for number, parallel in enumerate(meshes):
                update_from(engine, other)
                changed = engine.generate(PROMPTS, SAMPLED, seeds=SEEDS) != expected
                dims = ParallelDims.initialize(parallel)
                trained = megatron_model(model, dims, parallel)
                kept = [(weight, weight.clone()) for chunk in trained[0] for weight in chunk.parameters()]
                (held_by,) = engine._running.apply_model(lambda model: model)
                gather = mock.patch.object(dist, "all_gather", wraps=dist.all_gather)
                with weights_as_loaded(held_by) as held, gather as gathered:
                    sync_weights(engine, *trained, mark_rest=number == 0)
                synced = engine.generate(PROMPTS, SAMPLED, seeds=SEEDS)
                wrong = differing(held, model, tensor)
                # The model with experts has one key/value head, whose rows Megatron-Core cuts and the engine does not.
                if kind == "dense" and parallel == ParallelConfig(tensor=tensor) and gathered.called:
                    wrong.append("parts crossed ranks though both cut alike")
                update_from(engine, other)
                wrong += ["the trainer's" for weight, copy in kept if not torch.equal(weight, copy)]
                dims.destroy()
                outcomes.setdefault(f"{kind} {tensor}", []).append((changed and synced == expected, wrong))
            engine.close()
    return outcomes
