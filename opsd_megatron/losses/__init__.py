"""Losses from logits or hidden states, exact across vocabulary shards. Imports torch only."""

from opsd_megatron.losses.cross_entropy import linear_cross_entropy
from opsd_megatron.losses.divergences import ClipMode
from opsd_megatron.losses.linear import linear_divergence, linear_divergence_with_diagnostics
from opsd_megatron.losses.rows import Diagnostics
from opsd_megatron.losses.vocab_parallel import vocab_parallel_divergence

__all__ = [
    "ClipMode",
    "Diagnostics",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_divergence_with_diagnostics",
    "vocab_parallel_divergence",
]
