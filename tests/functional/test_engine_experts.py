"""A model with experts in co-located vLLM: spread over two ranks in the trainer, it arrives in engines of one and two.

The experts are 48 rows wide, 24 at engine size 2; the CPU build pads them to a multiple of 32 and packs them, in a
reload as well as at the start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opsd_megatron.config import Config, ModelConfig, ParallelConfig
from opsd_megatron.types import Generation
from tests.distributed import run_distributed
from tests.functional.engine_setup import MAX_LENGTH, PROMPTS, SAMPLED, SEEDS, engine_config, reference_logits
from tests.tiny import make_tiny_qwen3_moe


def worker(paths: list[Path]) -> dict[int, list[list[Generation]]]:
    """For each engine size the answers after each of several syncs."""
    from opsd_megatron.distributed.parallel import ParallelDims
    from opsd_megatron.rollout.vllm_engine import VllmEngine

    dims = ParallelDims.initialize(ParallelConfig(expert=2))
    answers: dict[int, list[list[Generation]]] = {}
    for tensor in (1, 2):
        engine = VllmEngine.start(paths[0], engine_config(paths[0], tensor), max_length=MAX_LENGTH)
        answers[tensor] = []
        for path in paths:
            sync(engine, path, dims)
            answers[tensor].append(engine.generate(PROMPTS, SAMPLED, seeds=SEEDS))
        engine.close()
    return answers


def sync(engine: Any, path: Path, dims: Any) -> None:
    """Push the weights of ``path`` from Megatron-Core's model into the engine."""
    from opsd_megatron.checkpoint.hf_io import SafetensorsReader
    from opsd_megatron.models.build import build_model
    from opsd_megatron.models.families import read_spec
    from opsd_megatron.models.weight_map import load_hf_weights
    from opsd_megatron.rollout.weight_sync import sync_weights

    spec = read_spec(path)
    model = build_model(spec, Config(model=ModelConfig(path=str(path), dtype="float32")), dims)
    load_hf_weights(model, spec, SafetensorsReader(path), dims)
    sync_weights(engine, model, spec, dims)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A model and one with other weights; the second layer has no experts."""
    root = tmp_path_factory.mktemp("models")
    return [
        make_tiny_qwen3_moe(root / str(seed), num_layers=3, dense_layers=(1,), kv_heads=1, seed=seed) for seed in (0, 1)
    ]


@pytest.fixture(scope="module")
def answers(paths: list[Path]) -> list[dict[int, list[list[Generation]]]]:
    return run_distributed(worker, 2, [*paths, paths[0]])


def test_every_rank_gets_every_answer(answers: list[dict[int, list[list[Generation]]]]) -> None:
    assert answers[0] == answers[1]


@pytest.mark.parametrize("tensor", [1, 2])
def test_log_probs_after_each_sync_are_those_of_transformers(
    answers: list[dict[int, list[list[Generation]]]], paths: list[Path], tensor: int
) -> None:
    from transformers import AutoModelForCausalLM

    first, second, again = answers[0][tensor]
    for path, found in zip(paths, (first, second), strict=True):
        reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for prompt, answer in zip(PROMPTS, found, strict=True):
            expected = reference_logits(reference, prompt, answer.token_ids).log_softmax(-1)
            expected = expected.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(answer.log_probs), expected, rtol=0, atol=1e-4)
    assert first != second
    assert again == first
