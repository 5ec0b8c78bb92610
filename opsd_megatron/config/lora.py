"""The group ``lora`` of the configuration, and the rules on it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from opsd_megatron.errors import ConfigError

# The linear layers that can be adapted, as Hugging Face and PEFT call them.
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", *MLP_PROJECTIONS)


@dataclass
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) that train while the model's own weights stay as they are.

    An adapted weight acts as ``W + alpha / rank * B @ A``, with one A and one B for each projection as PEFT has them.
    A starts random, B at zero, so that training starts from the model itself.

    Attributes:
        rank: Rows of each A; need not divide by anything. 0 trains all of the model's weights instead.
        alpha: Scale; ``None``: twice the rank.
        targets: The projections that are adapted. In a layer with experts, ``gate_proj``, ``up_proj`` and ``down_proj``
            are those of every expert. ``q_proj``, ``k_proj`` and ``v_proj`` need a ``parallel.tensor`` of at most the
            model's key/value heads.
    """

    rank: int = 0
    alpha: float | None = None
    targets: list[str] = field(default_factory=lambda: list(PROJECTIONS))

    @property
    def scale(self) -> float:
        """What ``B @ A`` is multiplied by."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    @property
    def adapts_mlps(self) -> bool:
        """Whether any projection of MLPs, and so of experts, is adapted."""
        return self.rank > 0 and any(name in MLP_PROJECTIONS for name in self.targets)

    def resolved(self) -> LoraConfig:
        """The same adapters in the one form that all who mean them have: alpha in full, targets in PEFT's order."""
        alpha = float(2 * self.rank if self.alpha is None else self.alpha)
        return LoraConfig(self.rank, alpha, [name for name in PROJECTIONS if name in self.targets])


def check_lora(lora: LoraConfig) -> None:
    """Check the group.

    Raises:
        ConfigError: Names the key, its value and what would be valid.
    """
    if lora.rank < 0:
        raise ConfigError(f"lora.rank={lora.rank} must be at least 1, or 0 to train all weights")
    if lora.alpha is not None and not 0 < lora.alpha < math.inf:
        raise ConfigError(f"lora.alpha={lora.alpha} must be above 0, or null for twice the rank")
    names = list(lora.targets)
    if unknown := [name for name in names if name not in PROJECTIONS]:
        raise ConfigError(f"lora.targets: {unknown[0]!r} is not one of {', '.join(PROJECTIONS)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"lora.targets=[{','.join(names)}] names a projection twice")
    if lora.rank and not names:
        raise ConfigError(f"lora.targets is empty; name some of {', '.join(PROJECTIONS)}, or set lora.rank=0")
