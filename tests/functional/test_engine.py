"""Co-located vLLM against transformers, at engine tensor-parallel sizes 1 and 2 in one world of two ranks.

Everything runs in a single launch, because importing vllm takes longer than all of the checks: the engine of size 1 is
started before Megatron-Core's process groups exist, is closed, and the engine of size 2 follows them. Not covered: CUDA
(the order of sleep and wake is in tests/unit/rollout/test_vllm_engine.py) and replicas on several machines.
"""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from opsd_megatron.config import ParallelConfig
from opsd_megatron.errors import EngineError
from opsd_megatron.rollout import vllm_cpu_sampling
from opsd_megatron.rollout.engine import Sampling
from opsd_megatron.types import Generation
from tests.distributed import run_distributed
from tests.functional.engine_parts import head_products, kernel_errors, processed_error
from tests.functional.engine_setup import (
    MAX_LENGTH,
    NEW_TOKENS,
    PROMPTS,
    SAMPLED,
    SEEDS,
    engine_config,
    megatron_model,
    reference_logits,
    update_from,
)
from tests.functional.engine_syncs import SYNCS, observe_syncs
from tests.tiny import make_tiny_qwen3, make_tiny_qwen3_moe

EOS = 258
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=-1, max_new_tokens=NEW_TOKENS)
# Another distribution to draw from; log-probs are at temperature 1 over the whole vocabulary all the same.
NARROWED = Sampling(temperature=0.7, top_p=0.9, top_k=20, max_new_tokens=NEW_TOKENS)
# One prompt's next token, often enough to count.
COUNTED = Sampling(temperature=0.3, top_p=1.0, top_k=20, max_new_tokens=1)
DRAWS = 1000
# More tokens of prompts, for each of two replicas, than vLLM runs through the model at a time; some stand alone again.
CROWD = [[(7 * first + step) % 256 for step in range(100)] for first in range(180)]
BRIEF = Sampling(temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=4)


@dataclass
class Observed:
    """What one rank saw of one engine."""

    answers: dict[str, list[Generation]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    kernels: dict[str, float] = field(default_factory=dict)
    # By kind: whether the packed head gives the bits of vLLM's.
    heads: dict[str, bool] = field(default_factory=dict)
    draws: int = 0
    processed: float = torch.nan
    shared_memory: str = ""


def process_state() -> dict[str, Any]:
    import numpy as np

    return {
        "threads": torch.get_num_threads(),
        "set_num_threads": torch.set_num_threads.__module__,
        "affinity": os.sched_getaffinity(0),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "torch generator": torch.get_rng_state().tolist(),
        "python generator": random.getstate(),
        "numpy generator": np.random.get_state()[1].tolist(),
        "local world": os.environ["LOCAL_WORLD_SIZE"],
        "preloaded": os.environ.get("LD_PRELOAD"),
    }


def observe(bare: Path, model: Path, other: Path, tensor: int, dims: Any) -> Observed:
    """Start on random weights, sample with those of ``model``, of ``other``, and of ``model`` from Megatron-Core."""
    from opsd_megatron.rollout.vllm_engine import VllmEngine
    from opsd_megatron.rollout.weight_sync import sync_weights

    seen = Observed()
    before = process_state()
    engine = VllmEngine.start(bare, engine_config(bare, tensor), max_length=MAX_LENGTH)
    seen.shared_memory = os.environ["VLLM_DIST_IDENT"]
    with pytest.raises(AssertionError, match="update_weights must run before generate"):
        engine.generate(PROMPTS, SAMPLED, seeds=SEEDS)
    update_from(engine, model)
    seen.answers["sampled"] = engine.generate(PROMPTS, SAMPLED, seeds=SEEDS)
    with mock.patch.object(vllm_cpu_sampling, "draw", wraps=vllm_cpu_sampling.draw) as draw:
        seen.answers["again"] = engine.generate(PROMPTS, SAMPLED, seeds=SEEDS)
    seen.draws = draw.call_count
    seen.answers["greedy"] = engine.generate(PROMPTS, GREEDY, seeds=SEEDS)
    seen.answers["narrowed"] = engine.generate(PROMPTS, NARROWED, seeds=SEEDS)
    seen.answers["counted"] = engine.generate([PROMPTS[0]] * DRAWS, COUNTED, seeds=range(DRAWS))
    seen.answers["crowd"] = engine.generate(CROWD, BRIEF, seeds=range(len(CROWD)))
    seen.answers["few"] = engine.generate(CROWD[-5:], BRIEF, seeds=range(len(CROWD))[-5:])
    seen.answers["one"] = engine.generate(PROMPTS[:1], SAMPLED, seeds=SEEDS[:1])  # fewer prompts than replicas
    for name, prompt in (("empty", []), ("long", [1] * MAX_LENGTH)):
        with pytest.raises(EngineError) as error:
            engine.generate([PROMPTS[0], prompt], SAMPLED, seeds=[0, 1])
        seen.errors[name] = str(error.value)
    update_from(engine, other)
    seen.answers["updated"] = engine.generate(PROMPTS, SAMPLED, seeds=SEEDS)
    seen.answers["updated greedy"] = engine.generate(PROMPTS, GREEDY, seeds=SEEDS)
    after = process_state()
    seen.changed = [key for key in before if before[key] != after[key]]
    if dims is not None:
        sync_weights(engine, *megatron_model(model, dims))
        seen.answers["synced"] = engine.generate(PROMPTS, SAMPLED, seeds=SEEDS)
    seen.kernels = engine._running.apply_model(kernel_errors)[0]
    seen.processed = processed_error()
    seen.heads = head_products()
    engine.sleep()
    engine.wake_up()
    with pytest.raises(AssertionError, match="update_weights must run before generate"):
        engine.generate(PROMPTS, SAMPLED, seeds=SEEDS)  # on CPU a sleep drops the weights
    engine.close()
    engine.close()
    return seen


def observe_untied(model: Path, other: Path) -> list[Generation]:
    """Greedy answers after an update of an engine whose head is not the embedding."""
    from opsd_megatron.rollout.vllm_engine import VllmEngine

    engine = VllmEngine.start(model, engine_config(model, 2), max_length=MAX_LENGTH)
    update_from(engine, model)
    update_from(engine, other)
    answers = engine.generate(PROMPTS, GREEDY, seeds=SEEDS)
    engine.close()
    return answers


def start_failures(model: Path, empty: Path) -> dict[str, str]:
    """Messages of engines that cannot start. The last one leaves vLLM half started: nothing may follow it."""
    from opsd_megatron.rollout.vllm_engine import VllmEngine

    messages = {}
    # One rank's trouble is everybody's: rank 1 alone gets a directory without a model.
    with pytest.raises(EngineError) as error:
        VllmEngine.start(empty if os.environ["RANK"] == "1" else model, engine_config(model, 1), max_length=MAX_LENGTH)
    messages["model"] = str(error.value)
    config = engine_config(model, 2)
    config.rollout.kv_cache_gib = 1e-6
    with pytest.raises(EngineError) as error:
        VllmEngine.start(model, config, max_length=MAX_LENGTH)
    messages["cache"] = str(error.value)
    return messages


def compilations() -> tuple[int, int]:
    """Frames that torch has compiled so far in this process, and in a loss of a large vocabulary after that."""
    from torch._dynamo.utils import counters

    from opsd_megatron.losses import linear_divergence

    before = counters["frames"]["ok"]
    hidden, head = torch.randn(2, 8), torch.randn(1 << 14, 8, requires_grad=True)
    linear_divergence(hidden, head, hidden + 1, head, beta=0.5).sum().backward()
    return before, counters["frames"]["ok"] - before


def worker(
    bare: Path,
    model: Path,
    other: Path,
    untied: tuple[Path, Path],
    even: dict[str, tuple[Path, Path]],
    empty: Path,
) -> dict[Any, Any]:

    seen: dict[Any, Any] = {1: observe(bare, model, other, 1, None)}
    from opsd_megatron.distributed.parallel import ParallelDims

    dims = ParallelDims.initialize(ParallelConfig(tensor=2))
    seen[2] = observe(bare, model, other, 2, dims)
    seen["compilations"] = compilations() if dist.get_rank() == 0 else None
    # Closing the engines left the trainer's groups in order.
    total = torch.tensor([1 + dist.get_rank()])
    dist.all_reduce(total, group=dims.tp_group)
    seen["total"] = total.item()
    seen["untied"] = observe_untied(*untied)
    dims.destroy()
    seen["syncs"] = observe_syncs(even)
    seen["failures"] = start_failures(model, empty)
    return seen


@dataclass
class Outcome:
    model: Path
    other: Path
    untied: Path
    ranks: list[dict[Any, Any]]

    def answers(self, tensor: int, name: str) -> list[Generation]:
        answers: list[Generation] = self.ranks[0][tensor].answers[name]
        return answers


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    root = tmp_path_factory.mktemp("engine")
    model = make_tiny_qwen3(root / "model", num_layers=2, seed=0)
    other = make_tiny_qwen3(root / "other", num_layers=2, seed=1)
    untied = tuple(make_tiny_qwen3(root / f"untied {seed}", num_layers=1, tied=False, seed=seed) for seed in (2, 3))
    # What a run that takes its weights from a checkpoint has of the model: everything but the safetensors.
    bare = Path(shutil.copytree(model, root / "bare", ignore=shutil.ignore_patterns("*.safetensors")))
    # One key/value head: an engine of two ranks repeats it, Megatron-Core cuts its rows.
    makers = {"dense": make_tiny_qwen3, "experts": partial(make_tiny_qwen3_moe, kv_heads=1)}
    even = {
        kind: tuple(make(root / f"{kind} {seed}", num_layers=2, vocab_size=320, seed=seed) for seed in (4, 5))
        for kind, make in makers.items()
    }
    (root / "empty").mkdir()
    ranks = run_distributed(worker, 2, bare, model, other, untied, even, root / "empty")
    return Outcome(model, other, untied[1], ranks)


@pytest.fixture(scope="module")
def references(outcome: Outcome) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    paths = {"model": outcome.model, "other": outcome.other, "untied": outcome.untied}
    return {name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for name, path in paths.items()}


both_sizes = pytest.mark.parametrize("tensor", [1, 2])


@both_sizes
@pytest.mark.parametrize(
    ("name", "weights"), [("sampled", "model"), ("narrowed", "model"), ("greedy", "model"), ("updated", "other")]
)
def test_log_probs_are_those_of_transformers(
    outcome: Outcome, references: dict[str, Any], tensor: int, name: str, weights: str
) -> None:
    answers = outcome.answers(tensor, name)
    assert len(answers) == len(PROMPTS)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = reference_logits(references[weights], prompt, answer.token_ids).log_softmax(-1)
        expected = expected.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer.log_probs), expected, rtol=0, atol=1e-4)


@both_sizes
@pytest.mark.parametrize(("name", "weights"), [("greedy", "model"), ("updated greedy", "other")])
def test_greedy_answers_are_those_of_transformers(
    outcome: Outcome, references: dict[str, Any], tensor: int, name: str, weights: str
) -> None:
    check_greedy(references[weights], outcome.answers(tensor, name))


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_beside_an_engine_the_loss_is_compiled_and_the_engine_is_not(outcome: Outcome) -> None:
    # A probe of the compiler, and the loss's three passes.
    assert outcome.ranks[0]["compilations"] == (0, 4)


def test_untied_head_is_updated(outcome: Outcome, references: dict[str, Any]) -> None:
    check_greedy(references["untied"], outcome.ranks[0]["untied"])


def check_greedy(reference: Any, answers: list[Generation]) -> None:
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        best = reference_logits(reference, prompt, answer.token_ids).argmax(-1)
        assert answer.token_ids == tuple(best.tolist())
        assert len(answer.token_ids) == NEW_TOKENS or answer.token_ids[-1] == EOS


@both_sizes
def test_every_rank_gets_every_answer(outcome: Outcome, tensor: int) -> None:
    first, second = (rank[tensor].answers for rank in outcome.ranks)
    assert first == second
    assert first["one"][0].token_ids == first["sampled"][0].token_ids


@both_sizes
def test_responses_repeat_with_their_seed_and_differ_without(outcome: Outcome, tensor: int) -> None:
    sampled = outcome.answers(tensor, "sampled")
    assert outcome.answers(tensor, "again") == sampled
    assert sampled[-1].token_ids != sampled[0].token_ids  # the same prompt, another seed
    assert outcome.answers(tensor, "updated") != sampled


@both_sizes
def test_prompts_of_more_tokens_than_fit_a_step_are_answered_alike(outcome: Outcome, tensor: int) -> None:
    assert outcome.answers(tensor, "crowd")[-5:] == outcome.answers(tensor, "few")


@both_sizes
def test_vllm_draws_tokens_as_it_is_told_to(outcome: Outcome, tensor: int) -> None:
    for rank in outcome.ranks:
        assert rank[tensor].draws >= NEW_TOKENS
        assert rank[tensor].processed < 1e-5


@both_sizes
def test_tokens_come_as_often_as_they_should(outcome: Outcome, references: dict[str, Any], tensor: int) -> None:
    """The 20 likeliest, with the softmax of their logits over the temperature; chi-squared, 19 degrees of freedom."""
    logits = reference_logits(references["model"], PROMPTS[0], (0,))[0]
    top = logits.topk(20)
    expected = DRAWS * (top.values / COUNTED.temperature).softmax(-1)
    drawn = torch.tensor([answer.token_ids[0] for answer in outcome.answers(tensor, "counted")])
    observed = (drawn[:, None] == top.indices).sum(0)
    assert observed.sum() == DRAWS
    assert ((observed - expected).square() / expected).sum() < 43.8  # passed by one in 1,000


def test_responses_do_not_depend_on_the_engine_size(outcome: Outcome) -> None:
    one, two = (outcome.answers(tensor, "sampled") for tensor in (1, 2))
    assert [answer.token_ids for answer in one] == [answer.token_ids for answer in two]


@both_sizes
def test_end_of_sequence_is_kept_and_ends_the_response(outcome: Outcome, tensor: int) -> None:
    reasons = set()
    for name in ("sampled", "narrowed", "updated"):
        for answer in outcome.answers(tensor, name):
            reasons.add(answer.finish_reason)
            assert EOS not in answer.token_ids[:-1]
            if answer.finish_reason == "stop":
                assert answer.token_ids[-1] == EOS
            else:
                assert len(answer.token_ids) == NEW_TOKENS and answer.token_ids[-1] != EOS
    assert reasons == {"stop", "length"}


def test_sync_from_megatron_restores_the_engine_bit_for_bit(outcome: Outcome) -> None:
    assert outcome.answers(2, "synced") == outcome.answers(2, "sampled")


def test_sync_from_any_mesh_into_an_engine_of_either_size(outcome: Outcome) -> None:
    right = (True, [])
    expected = {f"{kind} {tensor}": [right] * len(meshes) for kind, sizes in SYNCS.items() for tensor, meshes in sizes}
    assert [rank["syncs"] for rank in outcome.ranks] == [expected] * 2


@both_sizes
def test_fused_layers_compute_what_they_replace(outcome: Outcome, tensor: int) -> None:
    for rank in outcome.ranks:
        errors = rank[tensor].kernels
        assert set(errors) == {"RMSNorm", "SiluAndMul"} and max(errors.values()) < 1e-5
        heads = rank[tensor].heads
        assert heads and [kind for kind, same in heads.items() if not same] == []


@both_sizes
def test_the_process_is_left_as_it_was(outcome: Outcome, tensor: int) -> None:
    assert [rank[tensor].changed for rank in outcome.ranks] == [[], []]
    assert [rank["total"] for rank in outcome.ranks] == [3, 3]


def test_shared_memory_has_a_name_of_its_own_and_leaves_no_file(outcome: Outcome) -> None:
    first, second = ({rank[tensor].shared_memory for rank in outcome.ranks} for tensor in (1, 2))
    assert len(first) == len(second) == 1 and first != second
    for name in first | second:
        assert name.startswith("opsd-")
        assert not list(Path("/dev/shm").glob(f"{name}*"))


@both_sizes
def test_prompts_that_do_not_fit_are_errors_on_every_rank(outcome: Outcome, tensor: int) -> None:
    for rank in outcome.ranks:
        assert "prompt 1 has 0 tokens" in rank[tensor].errors["empty"]
        assert (
            f"prompt 1 has {MAX_LENGTH} tokens; the engine takes 1 to {MAX_LENGTH - 1}" in rank[tensor].errors["long"]
        )


def test_an_engine_that_cannot_start_says_why_on_every_rank(outcome: Outcome) -> None:
    for rank in outcome.ranks:
        assert "empty/config.json cannot be read" in rank["failures"]["model"]
        assert "the rollout engine did not start" in rank["failures"]["cache"]
        lower = "lower model.max_length or evaluation.max_length (the longer is 128)"
        assert f"change rollout.kv_cache_gib=1e-06, or {lower}" in rank["failures"]["cache"]
