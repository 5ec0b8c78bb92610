"""Rotary embeddings as ``config.json`` describes them: plain, or stretched with YaRN."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from opsd_megatron.models.config_file import ConfigFile

_YARN_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
}


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): low frequencies are interpolated, high ones kept, attention is sharpened a little.

    Attributes:
        factor: By how much the context grows.
        original_positions: Longest sequence before that.
        attention_factor: What the rotation's cosines and sines are multiplied by.
        beta_fast: Rotations over ``original_positions`` above which a frequency is kept.
        beta_slow: Rotations below which it is interpolated in full.
        truncate: Whether the dimensions where these bounds lie are rounded to whole ones.
    """

    factor: float
    original_positions: int = field(metadata={"key": "original_max_position_embeddings"})
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool

    def mcore_options(self) -> dict[str, float | int | bool]:
        """The attributes of ``TransformerConfig`` that Megatron-Core's YaRN reads; they are no fields of it.

        Megatron-Core takes the attention factor as ``m(mscale) / m(mscale_all_dim)``, ``m(x) = 0.1 x ln(factor) + 1``.
        """
        return {
            "yarn_rotary_scaling_factor": self.factor,
            "yarn_original_max_position_embeddings": self.original_positions,
            "yarn_beta_fast": self.beta_fast,
            "yarn_beta_slow": self.beta_slow,
            "yarn_mscale": (self.attention_factor - 1) / (0.1 * math.log(self.factor)),
            "yarn_mscale_all_dim": 0.0,
            "yarn_correction_range_round_to_int": self.truncate,
        }


def read_rope(config: ConfigFile) -> tuple[float, Yarn | None]:
    """The base of the rotary embedding and how it is scaled.

    Transformers 5 writes ``rope_parameters``; before, it was ``rope_theta`` beside an optional ``rope_scaling``.

    Raises:
        ModelError: The scaling is of another type than YaRN, or a value makes no sense; file and key are named.
    """
    written = {key: config.get(key) for key in ("rope_parameters", "rope_scaling") if config.get(key)}
    for key, value in written.items():
        if not isinstance(value, dict):
            config.fail(f"{key}={value!r} is not an object")
    if len(written) == 2 and not _agree(*written.values()):
        # Which of them counts depends on the reader's version.
        config.fail(
            "rope_parameters and rope_scaling are both there and differ; write all of it into rope_parameters and "
            "remove rope_scaling"
        )
    key = next(iter(written), "rope_scaling")
    values: dict[str, Any] = written.get(key, {})
    rope = ConfigFile(config.path, {"rope_theta": config.get("rope_theta"), **values}, within=key)
    if rope.get("rope_theta") is None:
        config.fail("rope_theta is missing, also from rope_parameters")
    theta = float(rope.number("rope_theta"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        rope.fail(f"rope_type={kind!r} is not supported, only 'default' and 'yarn'")
    if unknown := sorted(set(values) - _YARN_KEYS):
        rope.fail(f"{unknown[0]} is not known for rope_type='yarn'")
    return theta, _yarn(rope, config.integer("max_position_embeddings"))


def _agree(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two of them say the same; the base need not be in both, and the type has two names."""
    ours, theirs = ({"type" if key == "rope_type" else key: value for key, value in x.items()} for x in (one, other))
    bases = [x["rope_theta"] for x in (ours, theirs) if x.get("rope_theta") is not None]
    return bases[:1] * len(bases) == bases and ours | {"rope_theta": None} == theirs | {"rope_theta": None}


def _yarn(rope: ConfigFile, max_positions: int) -> Yarn:
    """With the defaults of transformers' ``modeling_rope_utils._compute_yarn_parameters``."""
    factor = float(rope.number("factor"))
    if factor <= 1:
        rope.fail(f"factor={factor} must be above 1: YaRN only stretches")
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    implied = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1.0)
    return Yarn(
        factor=factor,
        original_positions=rope.integer("original_max_position_embeddings", max_positions),
        attention_factor=float(rope.number("attention_factor", implied)),
        beta_fast=float(rope.number("beta_fast", 32.0)),
        beta_slow=float(rope.number("beta_slow", 1.0)),
        truncate=rope.flag("truncate", True),
    )


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0
