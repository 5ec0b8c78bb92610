"""The training loop, to be read top-down: :meth:`Trainer.run`, then :meth:`Trainer._step`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from signal import Signals
from typing import Any, cast

import numpy as np
import torch

from opsd_megatron.checkpoint.claim import OutputClaim
from opsd_megatron.checkpoint.output_dir import prune_checkpoints
from opsd_megatron.checkpoint.state import TrainerState, save_checkpoint
from opsd_megatron.config import Config
from opsd_megatron.data.context import split_context
from opsd_megatron.data.packing import PackingLayout, pack, packing_efficiency, plan_micro_batches
from opsd_megatron.data.prompts import PromptBuilder
from opsd_megatron.data.sampler import ProblemSampler
from opsd_megatron.data.teacher_prompts import TeacherPrompts
from opsd_megatron.distributed.collectives import largest
from opsd_megatron.distributed.parallel import ParallelDims
from opsd_megatron.errors import EngineError, Interrupted, TrainingError
from opsd_megatron.evaluation.evaluate import Evaluator
from opsd_megatron.models.qwen3 import Qwen3Spec
from opsd_megatron.objectives.base import HeadLayout, Objective, RatioObjective, weighed
from opsd_megatron.objectives.rollouts import engine_gap
from opsd_megatron.rollout.engine import RolloutEngine, Sampling
from opsd_megatron.rollout.weight_sync import sync_weights
from opsd_megatron.teacher.base import TeacherPolicy
from opsd_megatron.telemetry.memory import memory_peaks
from opsd_megatron.telemetry.timers import PhaseTimer
from opsd_megatron.trainer.interruption import Interruption
from opsd_megatron.trainer.metrics import StepReporter
from opsd_megatron.trainer.optimizer import Trainable
from opsd_megatron.trainer.step import StepResult, forward_metrics, optimizer_step, pass_over, with_old_log_probs
from opsd_megatron.trainer.verdicts import Judge
from opsd_megatron.types import AlignedSample, Generation, PackedMicroBatch, Problem, Rollout, TeacherTargets

# Keep the seeds of rollouts and analyses apart from each other's, and from those of evaluation (1).
_ROLLOUT_SEEDS = 0
_ANALYSIS_SEEDS = 2


@dataclass
class _Share:
    """What one update of a step computes.

    Attributes:
        micro_batches: This rank's.
        efficiency: How much of the computing, on all ranks, goes into tokens of samples.
    """

    micro_batches: list[PackedMicroBatch]
    efficiency: float


@dataclass
class Trainer:
    """Everything one rank needs for the loop; built by :func:`opsd_megatron.trainer.setup.build_trainer`.

    Ranks: every rank of the world builds one and calls :meth:`run`.

    Attributes:
        config: The run.
        dims: The mesh.
        spec: The model's dimensions.
        source: Local Hugging Face directory whose configuration and tokenizer travel with the checkpoints.
        problems: Training problems.
        sampler: Draws problem indices.
        prompts: Renders prompts.
        teacher_prompts: What the teacher reads for each rollout; ``None`` for objectives without a teacher.
        objective: Turns problems and rollouts into a loss.
        trainable: The student.
        teacher: The teacher; ``None`` for objectives without one.
        engine: The rollout engine; ``None`` where nothing is sampled.
        evaluator: Judges held-out problems; ``None`` where there are none.
        judge: Judges training rollouts; ``None`` where nobody asks.
        reporter: Writes metrics and shows progress.
        identity: What tells this run's checkpoints from another's.
        claim: Keeps other jobs out of ``output_dir`` while this one runs.
        completed: Optimizer steps done so far.
        engine_version: Optimizer steps behind the engine's weights; -1 while it has none of the trainer's.
        interruption: Whether this rank was told to stop.
    """

    config: Config
    dims: ParallelDims
    spec: Qwen3Spec
    source: Path
    problems: Sequence[Problem]
    sampler: ProblemSampler
    prompts: PromptBuilder
    teacher_prompts: TeacherPrompts | None
    objective: Objective
    trainable: Trainable
    teacher: TeacherPolicy | None
    engine: RolloutEngine | None
    evaluator: Evaluator | None
    judge: Judge | None
    reporter: StepReporter
    identity: dict[str, Any]
    claim: OutputClaim
    completed: int = 0
    engine_version: int = -1
    interruption: Interruption = field(default_factory=Interruption)

    def run(self) -> None:
        """Train to ``train.steps``, evaluating and saving as configured, and free the engine.

        Raises:
            TrainingError: The loss or a gradient is not finite.
            EngineError: The engine's log-probs are further from the trainer's than ``rollout.max_log_prob_gap``.
            Interrupted: Any rank got SIGTERM or SIGUSR1 before the last step; the step in which it came is done and
                saved.
        """
        with self.interruption:
            told = self._train()
            if told is not None:
                # Now, since the first rank that ends has torchrun end the others.
                self.reporter.message(
                    f"{told.name}: stopped after step {self.completed} of {self.config.train.steps}, which is saved; "
                    "checkpoint.resume=true goes on from it"
                )
        self.reporter.close()
        if self.engine is not None:
            self.engine.close()
        self.claim.release()
        if told is not None:
            raise Interrupted(told.name)

    def _train(self) -> Signals | None:
        """Train to the last step, or until one was done after a signal; then returns that."""
        timer = PhaseTimer()
        if self.completed == 0 and self.config.evaluation.at_start:
            self.reporter.evaluation(0, self._evaluate(0, timer), timer)
        timer = PhaseTimer()
        while self.completed < self.config.train.steps:
            told = self._step(timer)
            # A new timer before saving: a step's line is on disk before the checkpoint that vouches for it, so the
            # save is charged to the next line.
            timer = PhaseTimer()
            stops = told is not None and self.completed < self.config.train.steps
            self._save(timer, anyway=stops)
            if stops:
                return told
        return None

    def _step(self, timer: PhaseTimer) -> Signals | None:
        """One optimizer step and its report; the signal that any rank got so far."""
        step = self.completed + 1
        problems = [self.problems[index] for index in self.sampler.next()]
        rollouts, figures = self._rollouts(problems, step, timer)
        self.reporter.rollouts(step, rollouts)
        with timer("pack"):
            samples = self.objective.samples(problems, rollouts)
            parts = _even_parts(samples, self.config.train.updates_per_step)
            if len(parts) > 1:
                # By gradients of zero the optimizer's momentum would move the weights.
                parts = [part for part in parts if cast(RatioObjective, self.objective).teaches(part)]
            shares = [self._share(part, with_teacher=self.config.needs.teacher) for part in parts]
        if rollouts:
            figures |= self.objective.figures(rollouts)
        if self.teacher_prompts is not None:
            figures |= self.teacher_prompts.metrics(rollouts)
        # No samples on every rank alike: they are equal everywhere.
        result = self._updates(step, shares, timer) if samples else self._no_update(step, rollouts, timer)
        self.completed = step
        if self.teacher is not None:
            with timer("teacher"):
                self.teacher.after_step(step)
        evaluation = self._evaluate(step, timer)
        result = replace(result, metrics={**result.metrics, **figures})
        efficiency = sum(share.efficiency for share in shares) / max(len(shares), 1)
        peaks = memory_peaks()
        # One small exchange a step: how much memory each rank used, and whether one was told to stop.
        *values, number = largest([*peaks.values(), self.interruption.number], self.dims.device)
        peaks = dict(zip(peaks, values, strict=True))
        self.reporter.step(step, result, samples, rollouts, evaluation, timer, efficiency, peaks)
        return Signals(int(number)) if number else None

    def _updates(self, step: int, shares: list[_Share], timer: PhaseTimer) -> StepResult:
        """The updates of one step, each on its own share of the samples."""
        with timer("student"):
            # Before the weights move. The first share needs none: its ratio is 1.
            for share in shares[1:]:
                objective = cast(RatioObjective, self.objective)
                share.micro_batches = with_old_log_probs(self.trainable, objective, share.micro_batches, self.dims)
        results = []
        for number, share in enumerate(shares):
            targets: list[TeacherTargets | None] = [None] * len(share.micro_batches)
            if self.teacher is not None:
                with timer("teacher"):
                    targets = self.teacher.targets(share.micro_batches)
            results.append(self._update(step, number, share.micro_batches, targets, timer))
        return StepResult.of_updates(results)

    def _update(
        self,
        step: int,
        number: int,
        micro_batches: Sequence[PackedMicroBatch],
        targets: list[TeacherTargets | None],
        timer: PhaseTimer,
    ) -> StepResult:
        try:
            return optimizer_step(
                self.trainable,
                self.objective,
                micro_batches,
                targets,
                self.dims,
                accept=lambda metrics: self._check_engine(metrics, step),
                advance=number == 0,
                timer=timer,
            )
        except FloatingPointError as error:
            done = f"step {step - 1}" + (f" and {number} updates more" if number else "")
            raise TrainingError(
                f"step {step}: {error}; the weights are those of {done}. Lower optimizer.lr or "
                "optimizer.clip_grad in a new output_dir; model.checkpoint=DIR starts it, its frozen teacher too, from "
                "one of this run's checkpoints"
            ) from error

    def _no_update(self, step: int, rollouts: Sequence[Rollout], timer: PhaseTimer) -> StepResult:
        """A step with nothing to learn from; its rollouts still tell whether the engine holds the trainer's weights."""
        metrics: dict[str, float] = {}
        if rollouts and self.config.compares_log_probs:
            with timer("student"):
                responses = [
                    AlignedSample(
                        one.prompt_ids, None, one.generation.token_ids, engine_log_probs=one.generation.log_probs
                    )
                    for one in rollouts
                ]
                micro_batches = self._share(responses, with_teacher=False).micro_batches
                head = HeadLayout(self.spec.vocab_size, self.dims.tp_group, self.dims.sequence_parallel)
                evaluate = partial(engine_gap, config=self.config, head=head)
                metrics = forward_metrics(self.trainable, micro_batches, self.dims, evaluate)
            self._check_engine(metrics, step)
        return pass_over(self.trainable, metrics)

    def _rollouts(
        self, problems: Sequence[Problem], step: int, timer: PhaseTimer
    ) -> tuple[list[Rollout], dict[str, float]]:
        """Sample the responses of one step and what is asked about them; also what to report of that.

        The engine wakes once: verdicts come while it is awake, since what a teacher is shown, and analyses of it, may
        depend on them.
        """
        if not self.config.needs.rollouts:
            return [], {}
        settings = self.config.rollout
        repeated = [problem for problem in problems for _ in range(settings.samples_per_problem)]
        prompts = [self.prompts.student(problem) for problem in repeated]
        figures: dict[str, float] = {}
        with self._awake(timer, "rollout") as engine:
            with timer("rollout"):
                generations = self._sample(engine, prompts, settings.max_new_tokens, [_ROLLOUT_SEEDS, step])
            rollouts = [
                Rollout(problem, prompt, generation, policy_version=step - 1)
                for problem, prompt, generation in zip(repeated, prompts, generations, strict=True)
            ]
            if self.judge is not None:
                with timer("judge"):
                    rollouts, figures = self.judge.judge(rollouts)
            if self.teacher_prompts is not None:
                with timer("rollout"):
                    limit, seeds = self.config.data.analysis_max_tokens, [_ANALYSIS_SEEDS, step]
                    sample = partial(self._sample, engine, max_new_tokens=limit, seeds=seeds)
                    rollouts = self.teacher_prompts.analysed(rollouts, sample)
        return rollouts, figures

    @contextmanager
    def _awake(self, timer: PhaseTimer, phase: str) -> Iterator[RolloutEngine]:
        """The engine with the trainer's current weights, ready to sample; ``phase`` is charged for waking it.

        The order keeps the peak low: what only an update needs leaves the device before the engine's weights come back,
        those before its cache, and nothing of the trainer's returns before both have gone.
        """
        assert self.engine is not None
        if self.config.train.offload:
            with timer("offload"):
                self.trainable.offload()
        if torch.cuda.is_available():
            # The engine allocates beside PyTorch's allocator and cannot have what that has cached.
            torch.cuda.empty_cache()
        self._sync(self.engine, timer)
        with timer(phase):
            self.engine.wake_up()
        yield self.engine
        with timer(phase):
            self.engine.sleep()
        if self.config.train.offload:
            with timer("offload"):
                self.trainable.restore()

    def _sample(
        self, engine: RolloutEngine, prompts: Sequence[tuple[int, ...]], max_new_tokens: int, seeds: Sequence[int]
    ) -> list[Generation]:
        """One response to each prompt.

        Every seed depends on the run's seed and ``seeds`` only, so that a resumed run draws what an uninterrupted one
        would.
        """
        settings = self.config.rollout
        sampling = Sampling(settings.temperature, settings.top_p, settings.top_k, max_new_tokens)
        drawn = np.random.SeedSequence([self.config.train.seed, *seeds]).generate_state(len(prompts)) % 2**31
        return engine.generate(prompts, sampling, seeds=drawn.tolist())

    def _share(self, samples: Sequence[AlignedSample], *, with_teacher: bool) -> _Share:
        """The samples of one update, as micro-batches: this rank's part of the plan that every rank computes."""
        samples = weighed(samples, self.config.objective)
        plan = plan_micro_batches(
            samples,
            dp_size=self.dims.dp,
            token_budget=self.config.train.tokens_per_micro_batch,
            count_multiple_of=self.dims.pp if self.dims.vpp > 1 else 1,
        )
        layout = PackingLayout(self.dims.sequence_multiple, self.dims.packing_multiple)
        micro_batches = []
        for indices in plan[self.dims.dp_rank]:
            whole = pack([samples[index] for index in indices], with_teacher=with_teacher, layout=layout)
            part = split_context(whole, cp=self.dims.cp, rank=self.dims.cp_rank)
            micro_batches.append(part.to(self.dims.device))
        efficiency = packing_efficiency(
            samples, plan, with_teacher=with_teacher, layout=layout, in_step=self.dims.ep > 1
        )
        return _Share(micro_batches, efficiency)

    def _sync(self, engine: RolloutEngine, timer: PhaseTimer) -> None:
        """Bring the engine to the trainer's weights, right before it samples; at the start and after a resume too."""
        if self.engine_version != self.completed or not engine.holds_weights:
            first = self.engine_version < 0
            send = partial(sync_weights, engine, self.trainable.modules, self.spec, self.dims, mark_rest=first)
            with timer("sync"):
                # Asleep, the engine wakes for its weights only: its cache stays released while tensors stream in.
                moved = send()
            timer.moved("sync", moved)
            self.engine_version = self.completed
            if first and self.config.rollout.sleep_level == 2:
                engine.drop_weights_asleep(send)

    def _evaluate(self, step: int, timer: PhaseTimer) -> dict[str, Any] | None:
        """Evaluate where the configuration asks for it after ``step`` steps (0: before the first)."""
        settings = self.config.evaluation
        last = step == self.config.train.steps
        due = step == 0 or (settings.every and step % settings.every == 0) or (last and settings.at_end)
        if self.evaluator is None or self.engine is None or not due:
            return None
        with self._awake(timer, "evaluation") as engine, timer("evaluation"):
            return self.evaluator.evaluate(engine, step)

    def _save(self, timer: PhaseTimer, *, anyway: bool) -> None:
        """Save where the configuration asks for it, or ``anyway``."""
        step, settings = self.completed, self.config.checkpoint
        last = step == self.config.train.steps
        if not (anyway or (settings.every and step % settings.every == 0) or (last and settings.at_end)):
            return
        with timer("checkpoint"):
            root = Path(self.config.output_dir) / "checkpoints"
            save_checkpoint(
                root / f"step_{step}",
                state=TrainerState(step=step, sampler=self.sampler.state_dict(), identity=self.identity),
                model=self.trainable.chunks,
                optimizer=self.trainable.optimizer,
                teacher=self.teacher,
                source=self.source,
            )
            if settings.keep is not None:
                prune_checkpoints(root, settings.keep)

    def _check_engine(self, metrics: Mapping[str, float], step: int) -> None:
        """Before the update, compare the engine's log-probs of the step's responses with the trainer's own."""
        bound = self.config.rollout.max_log_prob_gap
        gap = metrics.get("log_prob_gap")
        # NaN: scripted responses without log-probs. An engine's own are finite, or it says so.
        if bound is not None and gap is not None and gap > bound:
            raise EngineError(
                f"step {step}: the engine's log-probs differ from the trainer's by {gap:.3g} on average, more "
                f"than rollout.max_log_prob_gap={bound}; the engine does not hold the trainer's weights, or the two "
                f"compute in different precision. The weights are those of step {step - 1}; rollout.engine, "
                "rollout.tensor and model.dtype are what to look at, or raise the bound (null: only log)"
            )


def _even_parts(samples: Sequence[AlignedSample], count: int) -> list[Sequence[AlignedSample]]:
    """The samples in ``count`` runs whose sizes are at most 1 apart, the empty ones left out."""
    bounds = [len(samples) * number // count for number in range(count + 1)]
    return [samples[first:last] for first, last in pairwise(bounds) if first < last]
