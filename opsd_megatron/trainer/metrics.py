"""What a step reports: one line of ``metrics.jsonl``, progress for people, rollouts on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from opsd_megatron.telemetry.files import write_atomically
from opsd_megatron.telemetry.memory import current_device
from opsd_megatron.telemetry.metrics import MetricsWriter, to_json_line
from opsd_megatron.telemetry.progress import Progress
from opsd_megatron.telemetry.timers import PhaseTimer
from opsd_megatron.trainer.flops import StepFlops
from opsd_megatron.trainer.step import StepResult
from opsd_megatron.types import AlignedSample, Rollout


@dataclass
class StepReporter:
    """Reports on rank 0; every method is a no-op on the others.

    Attributes:
        output_dir: The run's directory.
        writer: ``metrics.jsonl``; ``None`` on every rank but 0.
        progress: Bar or lines; ``None`` on every rank but 0.
        save_rollouts: Write each step's rollouts to ``rollouts/step_N.jsonl``.
        first_divergence: The unclipped divergence of the run's first step, where that has been reported.
        flops: What the steps compute; ``None`` on every rank but 0.
    """

    output_dir: Path
    writer: MetricsWriter | None
    progress: Progress | None
    save_rollouts: bool
    first_divergence: float | None = None
    flops: StepFlops | None = None

    def evaluation(self, step: int, result: dict[str, Any] | None, timer: PhaseTimer) -> None:
        """Report an evaluation that belongs to no optimizer step (the one before the first)."""
        if self.writer is None or result is None:
            return
        self.writer.write({"step": step, "time": _utc(), "eval": result, "seconds": timer.seconds, **_sync_rate(timer)})
        self._show_evaluation(step, result)

    def step(
        self,
        step: int,
        result: StepResult,
        samples: Sequence[AlignedSample],
        rollouts: Sequence[Rollout],
        evaluation: dict[str, Any] | None,
        timer: PhaseTimer,
        packing_efficiency: float,
        peaks: Mapping[str, float],
    ) -> None:
        """Report one optimizer step; ``peaks`` are :func:`memory_peaks`, the largest of all ranks."""
        if self.writer is None or self.progress is None:
            return
        packed = sum(sample.student_tokens + sample.teacher_tokens for sample in samples)
        seconds = timer.seconds
        phases = ("offload", "sync", "rollout", "judge", "pack", "teacher", "student", "optimizer")
        trained = sum(seconds.get(phase, 0.0) for phase in phases)
        line: dict[str, Any] = {
            "step": step,
            "time": _utc(),
            **result.metrics,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens": result.rows,
            "packed_tokens": packed,
            "packed_tokens_per_second": packed / trained,
            "step_seconds": timer.elapsed,
            "seconds": seconds,
            **_sync_rate(timer),
            **({} if self.flops is None else self.flops.report(samples, seconds)),
            **peaks,
            **current_device(),
        }
        if samples:
            line["packing_efficiency"] = packing_efficiency
            line["response_tokens_mean"] = result.rows / len(samples)
        if rollouts:
            cut = sum(rollout.generation.finish_reason == "length" for rollout in rollouts)
            line["truncated"] = cut / len(rollouts)
            line["sampled_tokens"] = sum(map(_sampled_tokens, rollouts))
            line["policy_version"] = rollouts[0].policy_version
        if evaluation is not None:
            line["eval"] = evaluation
        line["alarm"] = self._alarm(line)
        self.writer.write(line)
        self.progress.update(step, _summary(line))
        if line["alarm"]:
            self.progress.message(f"step {step}: {line['alarm']}")
        if evaluation is not None:
            self._show_evaluation(step, evaluation)

    def rollouts(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Keep the step's rollouts as ``rollouts/step_N.jsonl``, one object a rollout."""
        if self.writer is None or not self.save_rollouts or not rollouts:
            return
        lines = (
            {
                "problem_id": rollout.problem.id,
                "policy_version": rollout.policy_version,
                "prompt_ids": rollout.prompt_ids,
                "token_ids": rollout.generation.token_ids,
                "log_probs": rollout.generation.log_probs,
                "finish_reason": rollout.generation.finish_reason,
                **({} if rollout.correct is None else {"correct": rollout.correct}),
                **({} if rollout.analysis is None else {"analysis_ids": rollout.analysis.token_ids}),
            }
            for rollout in rollouts
        )
        path = self.output_dir / "rollouts" / f"step_{step}.jsonl"
        write_atomically(path, (to_json_line(line) for line in lines))

    def message(self, text: str) -> None:
        """Show a line."""
        if self.progress is not None:
            self.progress.message(text)

    def close(self) -> None:
        """Finish the bar and the file."""
        if self.progress is not None:
            self.progress.close()
        if self.writer is not None:
            self.writer.close()

    def _alarm(self, line: dict[str, Any]) -> str | None:
        """A clipped loss below zero is no divergence: it can fall while student and teacher drift apart."""
        divergence = line.get("divergence")
        if divergence is None:
            return None
        if self.first_divergence is None:
            self.first_divergence = divergence
        # Beside a policy's loss, which may be negative, the divergence's share of the sum.
        loss = line["loss"] - line.get("policy_loss", 0.0)
        if loss < 0 and divergence >= self.first_divergence:
            return (
                f"the loss is negative ({loss:.4g}) while the unclipped divergence ({divergence:.4g}) has not "
                f"fallen since the start ({self.first_divergence:.4g}): the clip drives the gradient, not the "
                "teacher; see objective.clip_mode"
            )
        return None

    def _show_evaluation(self, step: int, result: dict[str, Any]) -> None:
        if self.progress is None:
            return
        for name, figures in result.get("sets", {"": result}).items():
            low, high = figures["avg_interval"]
            k = figures["samples_per_problem"]
            self.progress.message(
                f"step {step}: {name}{': ' if name else ''}avg@{k} {100 * figures['avg_at_k']:.1f}% (95% interval "
                f"{100 * low:.1f} to {100 * high:.1f}), pass@{k} {100 * figures['pass_at_k']:.1f}%, "
                f"{figures['num_problems']} problems"
            )


def _utc() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _sampled_tokens(rollout: Rollout) -> int:
    """What the engine drew for a rollout, trained on or not."""
    analysis = () if rollout.analysis is None else rollout.analysis.token_ids
    return len(rollout.generation.token_ids) + len(analysis)


def _sync_rate(timer: PhaseTimer) -> dict[str, float]:
    """How much the engine got and how fast, where it got something."""
    if "sync" not in timer.bytes:
        return {}
    moved = timer.bytes["sync"] / 1e9
    return {"sync_gb": moved, "sync_gb_per_second": moved / timer.seconds["sync"]}


def _summary(line: dict[str, Any]) -> str:
    shown = {"loss": "loss", "divergence": "div", "grad_norm": "|g|", "log_prob_gap": "gap"}
    parts = [f"{label} {line[key]:.4g}" for key, label in shown.items() if line.get(key) is not None]
    return " ".join(parts)
