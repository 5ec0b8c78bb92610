"""A tiny random Qwen3 directory for tests: the real architecture, tokenizer included, a few hundred kilobytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

# Ids 0..255 are the bytes, then these in order. As in Qwen3, the thinking marks are ordinary added tokens: decoding
# with skip_special_tokens keeps them.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINKING_TOKENS = ("<think>", "</think>")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
"""


def make_tiny_qwen3(
    path: str | Path,
    *,
    tied: bool = True,
    num_layers: int = 4,
    hidden_size: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    ffn: int = 96,
    vocab_size: int = 272,
    max_positions: int = 1024,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    rope: dict[str, object] | None = None,
    with_tokenizer: bool = True,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a random Qwen3 as a Hugging Face directory with transformers itself.

    Norm weights are random too, so a test notices a norm that is skipped or swapped, and weights are large enough for
    logits that differ clearly between tokens.

    Args:
        path: Directory to write; made if absent.
        tied: Whether the output head is the embedding matrix.
        head_dim: As in Qwen3, not ``hidden_size / heads``.
        vocab_size: Rows of the embedding; at least 261 with a tokenizer, which leaves the rest unused as Qwen3 does.
        rope: ``rope_parameters`` but for ``rope_theta``; ``None``: unscaled.
        with_tokenizer: Also write a byte-level tokenizer with Qwen's chat tokens and a chat template that knows
            ``enable_thinking``.
        max_shard_size: Larger models are written as several safetensors files with an index.

    Returns:
        ``path``.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=hidden_size,
        intermediate_size=ffn,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        **_common(vocab_size, rope, dtype, with_tokenizer),
    )
    return _save(
        Path(path),
        config,
        Qwen3ForCausalLM,
        with_tokenizer=with_tokenizer,
        max_shard_size=max_shard_size,
        dtype=dtype,
        seed=seed,
    )


def _common(
    vocab_size: int, rope: dict[str, object] | None, dtype: torch.dtype, with_tokenizer: bool
) -> dict[str, object]:
    """What the configurations of both families have."""
    eos_id, pad_id = (vocab_size - 1, 0) if not with_tokenizer else (258, 256)
    return {
        "vocab_size": vocab_size,
        "rope_parameters": {"rope_theta": 1_000_000.0, **(rope or {"rope_type": "default"})},
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.08,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "bos_token_id": None,
        "dtype": dtype,
    }


def _save(
    path: Path,
    config: Any,
    family: Any,
    *,
    with_tokenizer: bool,
    max_shard_size: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    from transformers import GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.uniform_(0.5, 1.5)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    if with_tokenizer:
        _save_tokenizer(path, config.vocab_size)
    return path


def make_tiny_qwen3_moe(
    path: str | Path,
    *,
    num_layers: int = 4,
    hidden_size: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    ffn: int = 96,
    expert_ffn: int = 48,
    experts: int = 8,
    experts_per_token: int = 2,
    normalized: bool = True,
    sparse_step: int = 1,
    dense_layers: tuple[int, ...] = (),
    vocab_size: int = 272,
    rope: dict[str, object] | None = None,
    seed: int = 0,
    max_shard_size: str = "5GB",
    with_tokenizer: bool = True,
) -> Path:
    """:func:`make_tiny_qwen3` with experts; untied, as the published ones are.

    Args:
        normalized: Whether a token's weights on its experts sum to 1.
        sparse_step: Every so many layers one has experts.
        dense_layers: Layers (from 0) that have none all the same.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=hidden_size,
        intermediate_size=ffn,
        moe_intermediate_size=expert_ffn,
        num_experts=experts,
        num_experts_per_tok=experts_per_token,
        norm_topk_prob=normalized,
        decoder_sparse_step=sparse_step,
        mlp_only_layers=list(dense_layers),
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        **_common(vocab_size, rope, torch.float32, with_tokenizer),
    )
    return _save(
        Path(path), config, Qwen3MoeForCausalLM, with_tokenizer=with_tokenizer, max_shard_size=max_shard_size, seed=seed
    )


def _save_tokenizer(path: Path, vocab_size: int) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 256 + len(SPECIAL_TOKENS) + len(THINKING_TOKENS):
        raise ValueError(f"a byte-level tokenizer needs vocab_size of at least 261, not {vocab_size}")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINKING_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
