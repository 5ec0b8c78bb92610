"""What vLLM is started with, from the configuration, and what its failure to start means for the configuration."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from opsd_megatron.config import Config
from opsd_megatron.models.families import read_spec
from opsd_megatron.models.memory import cache_token_bytes

# Sequences decoded at a time and tokens run through the model at a time. On CPU there is no memory profile for vLLM to
# choose by; on CUDA its own defaults for the device hold.
_CPU_MAX_SEQUENCES = 256
_CPU_MAX_BATCHED_TOKENS = 8192
# The cache is divided into blocks of so many tokens (vLLM's size on CPU), and every page of it is touched at the start.
_CPU_BLOCK_TOKENS = 128
_CPU_CACHE_BYTES = 2**30


def engine_options(model_path: Path, config: Config, max_length: int, *, read_weights: bool) -> dict[str, Any]:
    """The keyword arguments of ``vllm.LLM``.

    Args:
        model_path: Hugging Face directory.
        config: ``model.dtype``, ``engine_tensor`` and ``rollout`` are used.
        max_length: Longest sequence (prompt and response) in tokens.
        read_weights: Whether vLLM loads the model's weights; random ones otherwise.
    """
    options: dict[str, Any] = {
        "model": str(model_path),
        "load_format": "auto" if read_weights else "dummy",  # dummy weights are random
        "dtype": config.model.dtype,
        "tensor_parallel_size": config.engine_tensor,
        "distributed_executor_backend": "external_launcher",
        "max_model_len": max_length,
        "logprobs_mode": "processed_logprobs" if config.needs_sampling_log_probs else "raw_logprobs",
        "enable_prefix_caching": True,
        # Tokens in, tokens out: sampling is given in full with every request and nothing is decoded.
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "seed": 0,
        "use_tqdm_on_load": False,
    }
    if torch.cuda.is_available():
        options |= {
            "gpu_memory_utilization": config.rollout.memory_fraction,
            "enable_sleep_mode": True,
            "enforce_eager": config.rollout.enforce_eager,
        }
    else:
        options |= {
            "kv_cache_memory_bytes": _cpu_cache_bytes(model_path, config, max_length),
            "enforce_eager": True,
            "max_num_seqs": _CPU_MAX_SEQUENCES,
            # A prompt cut in two draws a token too many, and vLLM then sets its generator back, which one on CPU
            # refuses ("CPU Generator does not use offset"). Whole prompts need room for the longest.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(_CPU_MAX_BATCHED_TOKENS, max_length),
        }
    return options


def _cpu_cache_bytes(model_path: Path, config: Config, max_length: int) -> int:
    """Size of a rank's key/value cache: as configured, or what the sequences decoded at a time can fill."""
    if config.rollout.kv_cache_gib is not None:
        return int(config.rollout.kv_cache_gib * 2**30)
    blocks = math.ceil(max_length / _CPU_BLOCK_TOKENS) + 1
    longest = blocks * _CPU_BLOCK_TOKENS * cache_token_bytes(read_spec(model_path), config)
    sequences = config.train.problems_per_step * config.rollout.samples_per_problem
    if config.evaluation_sets or sequences > _CPU_MAX_SEQUENCES:
        sequences = _CPU_MAX_SEQUENCES
    return max(longest, min(sequences * longest, _CPU_CACHE_BYTES))


def start_failure(error: Exception, config: Config, max_length: int) -> str:
    """One line on why vLLM did not start, with a remedy."""
    text = " ".join(str(error).split()) or type(error).__name__
    rollout = config.rollout
    if any(sign in text.lower() for sign in ("kv cache", "memory")):
        size = (
            f"rollout.memory_fraction={rollout.memory_fraction}"
            if torch.cuda.is_available()
            else f"rollout.kv_cache_gib={'null' if rollout.kv_cache_gib is None else rollout.kv_cache_gib}"
        )
        remedy = f"change {size}, or lower model.max_length or evaluation.max_length (the longer is {max_length})"
    elif "divisible" in text:
        remedy = f"choose rollout.tensor (now {config.engine_tensor}) so that it divides the attention heads"
    else:
        remedy = "VLLM_LOGGING_LEVEL=INFO shows vLLM's own account"
    return f"the rollout engine did not start: {text}; {remedy}"
