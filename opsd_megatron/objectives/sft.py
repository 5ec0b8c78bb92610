"""Supervised fine-tuning: cross-entropy on given responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup

from opsd_megatron.config import ObjectiveConfig
from opsd_megatron.data.prompts import PromptBuilder
from opsd_megatron.losses import linear_cross_entropy
from opsd_megatron.objectives.base import LossOutput, with_row_weights
from opsd_megatron.types import AlignedSample, PackedMicroBatch, Problem, Rollout, TeacherTargets


@dataclass(frozen=True)
class Sft:
    """Mean negative log-likelihood of the response tokens, under the student's prompt or the teacher's.

    Attributes:
        config: Reduction and chunking.
        prompts: Renders prompts and targets.
        vocab_size: Vocabulary without padding columns.
        tp_group: Tensor-parallel group of the head shards.
    """

    config: ObjectiveConfig
    prompts: PromptBuilder
    vocab_size: int
    tp_group: ProcessGroup | None

    needs_rollouts = False
    needs_teacher = False

    def samples(self, problems: Sequence[Problem], rollouts: Sequence[Rollout]) -> list[AlignedSample]:
        """Each problem's own target after the prompt of its role."""
        samples = []
        for problem in problems:
            prompt_ids, response_ids = self.prompts.supervised(problem)
            samples.append(AlignedSample(prompt_ids, None, response_ids))
        return with_row_weights(samples, self.config.reduction)

    def loss(
        self, hidden: Tensor, head_weight: Tensor, batch: PackedMicroBatch, targets: TeacherTargets | None
    ) -> LossOutput:
        """See :class:`~opsd_megatron.objectives.base.Objective`."""
        row_loss = linear_cross_entropy(
            hidden,
            head_weight,
            batch.response_ids,
            tp_group=self.tp_group,
            vocab_size=self.vocab_size,
            chunk_rows=self.config.chunk_rows,
        )
        loss_sum = (row_loss * batch.row_weights).sum()
        return LossOutput(loss_sum, {"loss": loss_sum.detach()})
