"""Objectives: one small file each, chosen by ``objective.name``."""

from __future__ import annotations

from collections.abc import Mapping

from torch.distributed import ProcessGroup

from opsd_megatron.config import Config
from opsd_megatron.data.prompts import PromptBuilder
from opsd_megatron.objectives.base import LossOutput, Objective
from opsd_megatron.objectives.opsd import Opsd
from opsd_megatron.objectives.sft import Sft

__all__ = ["LossOutput", "Objective", "build_objective"]


def build_objective(
    config: Config,
    prompts: PromptBuilder,
    references: Mapping[str, str | None],
    vocab_size: int,
    tp_group: ProcessGroup | None,
) -> Objective:
    """The objective that ``config.objective.name`` chooses.

    Args:
        config: The run.
        prompts: Renders prompts.
        references: What the teacher sees beyond each problem, by problem id.
        vocab_size: Vocabulary without padding columns.
        tp_group: Tensor-parallel group of the head shards.
    """
    if config.objective.name == "sft":
        return Sft(config.objective, prompts, vocab_size, tp_group)
    return Opsd(config.objective, prompts, references, config.rollout.temperature, vocab_size, tp_group)
