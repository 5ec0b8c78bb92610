"""Drawing tokens on CPU without a random number for every entry of the vocabulary.

vLLM's CPU build (0.32) adds Gumbel noise to each entry and counts the entries above the token it drew, a rank that
nobody here asks for. With Qwen3's vocabulary of 151,936 that is a good part of a small model's decoding step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Entries of a block: the noise is least near the square root of the vocabulary, and this divides Qwen3's. Another
# vocabulary has blocks of the greatest common divisor: with an odd one as many random numbers as entries.
_BLOCK = 128


def draw_by_blocks(worker: Any) -> None:
    """Have the sampler of vLLM's ``worker`` draw with :func:`draw` and report no ranks."""
    sampler = worker.model_runner.sampler
    sampler.topk_topp_sampler.forward = partial(_forward, sampler.logprobs_mode == "processed_logprobs")
    sampler.gather_logprobs = partial(_log_probs_of_sampled, sampler.gather_logprobs)


def draw(logits: Tensor, generators: Mapping[int, torch.Generator]) -> Tensor:
    """One token a row, with probability softmax(logits): first its block, by the blocks' sums, then it in the block.

    Each of the two is a race of exponential clocks, ``argmax(p / E)``, ``E ~ Exp(1)``, which is what Gumbel noise on
    logits is too. As there, logits that change by a rounding change few tokens; inverting the cumulative distribution
    would move a boundary at every entry.

    Args:
        logits: ``[B, V]`` float32; overwritten.
        generators: By row; a row's token depends on its logits and its generator alone. Rows without one take the
            global generator.

    Returns:
        ``[B]`` int64. An entry of ``-inf`` is never drawn while the row has another.
    """
    rows, entries = logits.shape
    size = math.gcd(entries, _BLOCK)
    blocks = entries // size
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_().unflatten(-1, (blocks, size))
    clocks = torch.empty(rows, blocks + size)
    if len(generators) < rows:
        clocks.exponential_()
    for row, generator in generators.items():
        clocks[row].exponential_(generator=generator)
    clocks.clamp_(min=torch.finfo(clocks.dtype).tiny)  # 0 / 0 would win
    of_blocks, within = clocks.split([blocks, size], dim=-1)
    block = (weights.sum(-1) / of_blocks).argmax(-1)
    chosen = weights[torch.arange(rows), block]
    return block * size + (chosen / within).argmax(-1)


def _forward(
    processed: bool,
    logits: Tensor,
    generators: dict[int, torch.Generator],
    k: Tensor | None,
    p: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Like vLLM's ``TopKTopPSampler.forward``: tokens, and log-probs of the distribution drawn from where wanted."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    logits = apply_top_k_top_p(logits, k, p)
    log_probs = logits.log_softmax(-1) if processed else None
    return draw(logits, generators), log_probs


def _log_probs_of_sampled(
    original: Callable[[Tensor, int, Tensor], Any], logprobs: Tensor, num_logprobs: int, token_ids: Tensor
) -> Any:
    """Like vLLM's ``Sampler.gather_logprobs``, with rank 0 where no other token's log-prob is asked for."""
    from vllm.v1.outputs import LogprobsTensors

    if num_logprobs:
        return original(logprobs, num_logprobs, token_ids)
    sampled = token_ids.unsqueeze(-1)
    return LogprobsTensors(sampled.to(torch.int32), logprobs.gather(-1, sampled), torch.zeros_like(token_ids))
