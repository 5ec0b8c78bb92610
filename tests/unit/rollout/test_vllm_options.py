"""What vLLM is started with, and what its failures to start are said to mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opsd_megatron.config import Config
from opsd_megatron.rollout.vllm_options import engine_options, start_failure
from tests.tiny import make_tiny_qwen3


def config() -> Config:
    result = Config()
    result.rollout.tensor, result.rollout.kv_cache_gib, result.rollout.memory_fraction = 2, 1.5, 0.3
    return result


@pytest.mark.parametrize("cuda", [False, True])
def test_memory_is_bounded_as_the_device_wants_it(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    options = engine_options(Path("model"), config(), 512, read_weights=False)
    assert (options["tensor_parallel_size"], options["max_model_len"]) == (2, 512)
    assert options.get("gpu_memory_utilization") == (0.3 if cuda else None)
    assert options.get("kv_cache_memory_bytes") == (None if cuda else int(1.5 * 2**30))
    assert options.get("enable_sleep_mode", False) == cuda
    assert options["enforce_eager"] == (not cuda)


def test_the_cache_on_cpu_holds_a_step_s_responses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = make_tiny_qwen3(tmp_path / "model", num_layers=2, kv_heads=2, head_dim=32, with_tokenizer=False)
    one = Config()
    one.model.dtype, one.train.problems_per_step, one.rollout.samples_per_problem = "float32", 4, 2

    def size(max_length: int) -> int:
        return int(engine_options(model, one, max_length, read_weights=False)["kv_cache_memory_bytes"])

    token = 2 * 2 * 2 * 32 * 4  # keys and values, layers, heads, numbers, bytes
    assert size(300) == 8 * (384 + 128) * token  # whole blocks of 128 tokens, and one more each
    one.parallel.tensor = 2
    assert size(300) == 8 * (384 + 128) * token // 2
    one.data.eval = "problems.jsonl"  # an evaluation decodes as many as vLLM is let
    assert size(300) == 256 * (384 + 128) * token // 2
    assert size(10**5) == 2**30
    assert size(10**7) > 10**7 * token // 2  # one sequence has to fit, however long


def test_on_cpu_a_prompt_is_never_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for max_length in (512, 20_000):
        options = engine_options(Path("model"), config(), max_length, read_weights=False)
        assert not options["enable_chunked_prefill"] and options["max_num_batched_tokens"] >= max_length


def test_weights_and_log_probs_are_as_asked_for() -> None:
    one = config()
    assert engine_options(Path("model"), one, 512, read_weights=True)["load_format"] == "auto"
    options = engine_options(Path("model"), one, 512, read_weights=False)
    assert (options["load_format"], options["logprobs_mode"]) == ("dummy", "raw_logprobs")
    one.objective.importance_cap = 2.0
    assert engine_options(Path("model"), one, 512, read_weights=False)["logprobs_mode"] == "processed_logprobs"


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            "No available memory\n for the cache blocks",
            "change rollout.kv_cache_gib=1.5, or lower model.max_length or evaluation.max_length (the longer is 512)",
        ),
        ("Total number of heads (3) must be divisible by 2", "choose rollout.tensor (now 2) so that it divides"),
        ("", "VLLM_LOGGING_LEVEL=INFO shows"),
    ],
)
def test_failures_have_a_remedy_in_one_line(error: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = start_failure(ValueError(error), config(), 512)
    assert message.startswith(f"the rollout engine did not start: {' '.join(error.split()) or 'ValueError'}; ")
    assert remedy in message and "\n" not in message
