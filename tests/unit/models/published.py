"""What the published models' ``config.json`` say, where it decides their shape, and how many parameters they have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Qwen/Qwen3-0.6B, written before transformers 5.
DENSE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# Qwen/Qwen3-30B-A3B.
MOE: dict[str, Any] = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}
_BASE = {"eos_token_id": 151643, "max_position_embeddings": 32768}
_LONG = {"max_position_embeddings": 262144, "rope_theta": 5000000}


def _shape(layers: int, hidden: int, ffn: int, heads: int, *, tied: bool = False) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }


_235B = MOE | _shape(94, 4096, 12288, 64) | {"moe_intermediate_size": 1536, "max_window_layers": 94}
# Name -> config.json and number of parameters, a tied head counted once.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "0.6B": (DENSE, 596_049_920),
    "0.6B-Base": (DENSE | _BASE, 596_049_920),
    "1.7B": (DENSE | _shape(28, 2048, 6144, 16, tied=True), 1_720_574_976),
    "4B": (DENSE | _shape(36, 2560, 9728, 32, tied=True), 4_022_468_096),
    "4B-Base": (DENSE | _shape(36, 2560, 9728, 32, tied=True) | _BASE, 4_022_468_096),
    "4B-Instruct-2507": (DENSE | _shape(36, 2560, 9728, 32, tied=True) | _LONG, 4_022_468_096),
    "4B-Thinking-2507": (DENSE | _shape(36, 2560, 9728, 32, tied=True) | _LONG, 4_022_468_096),
    "8B": (DENSE | _shape(36, 4096, 12288, 32), 8_190_735_360),
    "8B-Base": (DENSE | _shape(36, 4096, 12288, 32) | _BASE, 8_190_735_360),
    "14B": (DENSE | _shape(40, 5120, 17408, 40), 14_768_307_200),
    "32B": (DENSE | _shape(64, 5120, 25600, 64), 32_762_123_264),
    "30B-A3B": (MOE, 30_532_122_624),
    "30B-A3B-Base": (MOE | _BASE, 30_532_122_624),
    "30B-A3B-Instruct-2507": (MOE | _LONG | {"rope_theta": 10000000}, 30_532_122_624),
    "235B-A22B": (_235B, 235_093_634_560),
    "235B-A22B-Instruct-2507": (_235B | _LONG, 235_093_634_560),
    "235B-A22B-Thinking-2507": (_235B | _LONG, 235_093_634_560),
}


def write_config(directory: Path, values: dict[str, Any], **changes: object) -> Path:
    """Write ``config.json``; a change to ``...`` leaves the key out."""
    raw = {key: value for key, value in (values | changes).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(raw))
    return directory
