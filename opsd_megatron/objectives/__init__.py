"""Objectives: one small file each, chosen by ``objective.name``."""

from __future__ import annotations

from collections.abc import Mapping

from opsd_megatron.config import Config
from opsd_megatron.data.prompts import PromptBuilder
from opsd_megatron.objectives.base import HeadLayout, LossOutput, Objective
from opsd_megatron.objectives.opsd import Opsd
from opsd_megatron.objectives.sft import Sft

__all__ = ["HeadLayout", "LossOutput", "Objective", "build_objective"]


def build_objective(
    config: Config,
    prompts: PromptBuilder,
    references: Mapping[str, str | None],
    head: HeadLayout,
) -> Objective:
    """The objective that ``config.objective.name`` chooses.

    Args:
        config: The run.
        prompts: Renders prompts.
        references: What the teacher sees beyond each problem, by problem id.
        head: How the output head is spread over ranks.
    """
    if config.objective.name == "sft":
        return Sft(config.objective, prompts, head)
    return Opsd(config.objective, prompts, references, config.rollout.temperature, head)
