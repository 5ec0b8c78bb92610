"""From a configuration to a :class:`Trainer`: first everything that can be wrong, then everything that is expensive."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedTokenizerBase

from opsd_megatron.checkpoint.claim import claim_output_dir
from opsd_megatron.checkpoint.compatibility import check_checkpoint
from opsd_megatron.checkpoint.hf_io import SafetensorsReader
from opsd_megatron.checkpoint.output_dir import agreed_checkpoint, check_output_dir
from opsd_megatron.checkpoint.record import adapters_of
from opsd_megatron.checkpoint.state import load_checkpoint, load_model_weights
from opsd_megatron.config import Config
from opsd_megatron.data.evaluation_sets import EvaluationSet, load_sets
from opsd_megatron.data.problems import load_problems
from opsd_megatron.data.prompts import PromptBuilder, check_prompts, check_supervised
from opsd_megatron.data.sampler import ProblemSampler
from opsd_megatron.data.teacher_prompts import TeacherPrompts
from opsd_megatron.distributed.parallel import ParallelDims
from opsd_megatron.distributed.seed import seed_everything
from opsd_megatron.errors import ConfigError
from opsd_megatron.evaluation.evaluate import Evaluator, evaluation_length, evaluation_prompts, sampling_of
from opsd_megatron.models.backends import Backend, choose_backend, groups_experts
from opsd_megatron.models.build import HiddenStatesGPT, build_model
from opsd_megatron.models.families import read_spec, resolve_model_path
from opsd_megatron.models.lora import add_adapters
from opsd_megatron.models.qwen3 import Qwen3Spec, check_adapters, check_mesh
from opsd_megatron.models.stages import describe_stages
from opsd_megatron.models.tokenizer import load_tokenizer
from opsd_megatron.models.weight_map import check_tensors, load_hf_weights
from opsd_megatron.objectives import HeadLayout, build_objective
from opsd_megatron.rollout.engine import RolloutEngine
from opsd_megatron.rollout.scripted import ScriptedEngine
from opsd_megatron.rollout.stop_tokens import stop_token_ids
from opsd_megatron.rollout.vllm_engine import VllmEngine
from opsd_megatron.teacher.base import StudentFiles, TeacherParts
from opsd_megatron.teacher.policies import policy_class
from opsd_megatron.telemetry.environment import record_environment
from opsd_megatron.telemetry.files import set_aside, write_atomically
from opsd_megatron.telemetry.metrics import MetricsWriter
from opsd_megatron.telemetry.progress import Progress
from opsd_megatron.trainer.flops import StepFlops, known_peak
from opsd_megatron.trainer.identity import run_identity
from opsd_megatron.trainer.metrics import StepReporter
from opsd_megatron.trainer.optimizer import make_trainable
from opsd_megatron.trainer.trainer import Trainer
from opsd_megatron.trainer.verdicts import Judge, check_training_answers
from opsd_megatron.types import Problem


@dataclass(frozen=True)
class Inputs:
    """What a run reads, checked, before any process group, engine or model exists.

    Attributes:
        source: Local Hugging Face directory.
        spec: The model's dimensions.
        tokenizer: Its tokenizer.
        problems: Training problems.
        eval_sets: What to evaluate on, with its problems; empty for nothing.
        prompts: Renders prompts for training.
        eval_prompts: The same with the room that evaluation's responses need.
        engine_length: Longest sequence that the engine takes, of training or evaluation, in tokens.
        separate_teacher: Dimensions of a teacher that is another model.
        teacher_prompts: What the teacher reads for each rollout; ``None`` for objectives without a teacher.
        identity: What tells this run's checkpoints from another's.
    """

    source: Path
    spec: Qwen3Spec
    tokenizer: PreTrainedTokenizerBase
    problems: Sequence[Problem]
    eval_sets: Sequence[tuple[EvaluationSet, list[Problem]]]
    prompts: PromptBuilder
    eval_prompts: PromptBuilder
    engine_length: int
    separate_teacher: Qwen3Spec | None
    teacher_prompts: TeacherPrompts | None
    identity: dict[str, Any]


def check_inputs(config: Config) -> Inputs:
    """Read and check the model's configuration and tensor names, the data, the prompts and the output directory.

    Raises:
        OpsdError: One of them is wrong; nothing has been started or written.
    """
    output_dir = Path(config.output_dir)
    check_writable(output_dir)
    source = resolve_model_path(config.model.path)
    spec = read_spec(source)
    check_mesh(spec, config)
    _check_weights(config, source, spec)
    # Where the backend is chosen later, build_trainer checks again.
    _check_stored_adapters(config, spec, "transformer_engine" if config.model.backend == "transformer_engine" else None)
    needs = config.needs
    problems = load_problems(
        config.data,
        config.data.train,
        needs_solution=config.needs_solutions,
        needs_response=needs.targets,
        uses_answer=config.needs_answers,
    )
    if config.needs_verdicts:
        key = "objective.name" if needs.verdicts else "data.privileged"
        check_training_answers(problems, asked_by=f"{key}={config.get(key)}")
    eval_sets = load_sets(config.evaluation_sets, config.data, most=config.evaluation.max_problems)
    tokenizer = load_tokenizer(source, spec)
    max_length = config.model.max_length or spec.max_positions
    # Supervised targets bring their own length; nothing is sampled after those prompts.
    room = config.rollout.max_new_tokens if needs.rollouts else 1
    prompts = PromptBuilder(tokenizer, config.data, max_length=max_length, max_new_tokens=room)
    eval_prompts = evaluation_prompts(tokenizer, config, positions=spec.max_positions) if eval_sets else prompts
    if needs.targets:
        check_supervised(problems, prompts)
    if needs.rollouts:
        check_prompts(problems, prompts, with_teacher=needs.teacher)
    engine_length = max_length
    if eval_sets:
        engine_length = max(max_length, evaluation_length([own for _, own in eval_sets], eval_prompts, config))
    teacher_prompts = TeacherPrompts.build(prompts, problems, seed=config.train.seed) if needs.teacher else None
    policy = policy_class(config.teacher.policy)
    teacher = policy.check(StudentFiles(config, source, spec, tokenizer, max_length)) if needs.teacher else None
    identity = run_identity(config, source, spec, problems, max_length, teacher=teacher)
    check_output_dir(output_dir, identity, resume=config.checkpoint.resume)
    return Inputs(
        source=source,
        spec=spec,
        tokenizer=tokenizer,
        problems=problems,
        eval_sets=eval_sets,
        prompts=prompts,
        eval_prompts=eval_prompts,
        engine_length=engine_length,
        separate_teacher=policy.own_spec(config) if needs.teacher else None,
        teacher_prompts=teacher_prompts,
        identity=identity,
    )


def check_writable(output_dir: Path) -> None:
    """Check that ``output_dir`` is a directory this process may write to, or can be made; makes nothing.

    Raises:
        ConfigError: It is not.
    """
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"output_dir={output_dir}: {existing} is a file; choose another directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir={output_dir}: no permission to write to {existing}; choose another directory")


def _check_weights(config: Config, source: Path, spec: Qwen3Spec) -> None:
    """The initial weights, and what the engine needs beside them."""
    if config.model.checkpoint is None:
        check_tensors(spec, SafetensorsReader(source))
    else:
        check_checkpoint(config.model.checkpoint, spec, source)
    if not config.needs_engine:
        return
    if config.rollout.engine == "scripted":
        assert config.rollout.script is not None, "Config.validate demands a script"
        ScriptedEngine(config.rollout.script)
    else:
        stop_token_ids(source)


def _check_stored_adapters(config: Config, spec: Qwen3Spec, backend: Backend | None) -> None:
    """Whether the adapters of the checkpoint that the run starts from can be merged; ``None``: on any backend."""
    stored = None if config.model.checkpoint is None else adapters_of(config.model.checkpoint)
    if stored is None:
        return
    merged = "merge them with tools/checkpoint/megatron_to_hf.py and start from its output as model.path"
    check_adapters(spec, stored, config, f"model.checkpoint={config.model.checkpoint}", otherwise=merged)
    if backend and stored.adapts_mlps and spec.num_experts and groups_experts(backend, config.lora):
        raise ConfigError(
            f"model.checkpoint={config.model.checkpoint} has adapters on experts, which Transformer Engine's layer for "
            f"all of a rank's experts cannot merge; {merged}"
        )


def build_trainer(config: Config, inputs: Inputs) -> Trainer:
    """Start the engine, build the models, and load the newest checkpoint where the run resumes.

    Ranks: every rank of the world.

    Raises:
        OpsdError: The engine cannot start, or weights or a checkpoint cannot be read.
    """
    # Here and not with the inputs: those may be checked on a machine without the GPUs of the run.
    backend = choose_backend(config.model.backend, dtype=config.model.dtype, on_cuda=torch.cuda.is_available())
    _check_stored_adapters(config, inputs.spec, backend)
    dims = ParallelDims.initialize(config.parallel)
    seed_everything(config.train.seed, dims)
    # The engine first: it sizes its cache by the free device memory, then sleeps while the trainer moves in.
    engine = _start_engine(config, inputs, dims)
    # Not before: where the engine cannot start, nothing has been made.
    claim = claim_output_dir(Path(config.output_dir))
    model = _initial_model(config, inputs, dims)
    if config.lora.rank:
        add_adapters(model, config.lora, seed=config.train.seed)
    trainable = make_trainable(model, config)
    head = HeadLayout(inputs.spec.vocab_size, dims.tp_group, dims.sequence_parallel)
    objective = build_objective(config, inputs.prompts, inputs.teacher_prompts, head)
    sampler = ProblemSampler(
        len(inputs.problems), config.train.problems_per_step, seed=config.train.seed, shuffle=config.data.shuffle
    )
    # Before a checkpoint is loaded: the teacher starts from the initial weights.
    teacher = None
    if config.needs.teacher:
        initial_model = partial(_initial_model, config, inputs, dims)
        parts = TeacherParts(config, inputs.spec, dims, student=model, initial_model=initial_model)
        teacher = policy_class(config.teacher.policy).build(parts)
    completed = 0
    newest = agreed_checkpoint(Path(config.output_dir) / "checkpoints") if config.checkpoint.resume else None
    if newest is not None:
        state = load_checkpoint(newest, model=trainable.chunks, optimizer=trainable.optimizer, teacher=teacher)
        sampler.load_state_dict(state.sampler)
        completed = state.step
        trainable.scheduler.step(completed)
    return Trainer(
        config=config,
        dims=dims,
        spec=inputs.spec,
        source=inputs.source,
        problems=inputs.problems,
        sampler=sampler,
        prompts=inputs.prompts,
        teacher_prompts=inputs.teacher_prompts,
        objective=objective,
        trainable=trainable,
        teacher=teacher,
        engine=engine,
        evaluator=_evaluator(config, inputs),
        judge=Judge(inputs.tokenizer, config.evaluation.judge_seconds) if config.needs_verdicts else None,
        reporter=_reporter(config, inputs, dims, completed),
        identity=inputs.identity,
        claim=claim,
        completed=completed,
    )


def _initial_model(config: Config, inputs: Inputs, dims: ParallelDims) -> list[HiddenStatesGPT]:
    """This rank's chunks of a model with the run's initial weights."""
    model = build_model(inputs.spec, config, dims)
    if config.model.checkpoint is None:
        load_hf_weights(model, inputs.spec, SafetensorsReader(inputs.source), dims)
    else:
        load_model_weights(Path(config.model.checkpoint), model)
    return model


def _start_engine(config: Config, inputs: Inputs, dims: ParallelDims) -> RolloutEngine | None:
    if not config.needs_engine:
        return None
    if config.rollout.engine == "scripted":
        assert config.rollout.script is not None, "Config.validate demands a script"
        return ScriptedEngine(Path(config.rollout.script))
    engine = VllmEngine.start(inputs.source, config, max_length=inputs.engine_length)
    engine.sleep()
    return engine


def _evaluator(config: Config, inputs: Inputs) -> Evaluator | None:
    if not inputs.eval_sets:
        return None
    return Evaluator(
        {one.name: problems for one, problems in inputs.eval_sets},
        inputs.eval_prompts,
        inputs.tokenizer,
        config.evaluation,
        sampling=sampling_of(config),
        seed=config.train.seed,
        records_dir=Path(config.output_dir) / "evaluations",
    )


def _reporter(config: Config, inputs: Inputs, dims: ParallelDims, completed: int) -> StepReporter:
    output_dir = Path(config.output_dir)
    if dims.rank != 0:
        return StepReporter(output_dir, writer=None, progress=None, save_rollouts=False)
    _write_config(output_dir / "config.yaml", config)
    record_environment(output_dir / "environment.json", world_size=dims.world_size, completed=completed)
    for folder in (output_dir / "rollouts", output_dir / "evaluations", *(output_dir / "evaluations").glob("*/")):
        _set_aside_later(folder, completed)
    writer = MetricsWriter(output_dir / "metrics.jsonl", resume_step=completed)
    progress = Progress(config.train.steps, initial=completed)
    if dims.pp > 1:
        progress.message(describe_stages(inputs.spec.num_layers, pp=dims.pp, vpp=dims.vpp))
    if config.checkpoint.resume:
        progress.message(f"resuming after step {completed}" if completed else "no checkpoint to resume from: step 0")
    return StepReporter(
        output_dir,
        writer=writer,
        progress=progress,
        save_rollouts=config.rollout.save,
        first_divergence=_first_divergence(output_dir / "metrics.jsonl"),
        flops=StepFlops(
            inputs.spec,
            inputs.separate_teacher or inputs.spec,
            adapters=config.lora.rank > 0,
            world_size=dims.world_size,
            peak_tflops=_peak_tflops(config),
        ),
    )


def _peak_tflops(config: Config) -> float | None:
    known = config.telemetry.peak_tflops
    if known is None and torch.cuda.is_available() and config.model.dtype == "bfloat16":
        known = known_peak(torch.cuda.get_device_name())
    return known


def _write_config(path: Path, config: Config) -> None:
    """Write the resolved configuration; a differing one of the run's earlier part is set aside, not overwritten."""
    settings = asdict(config)
    settings["checkpoint"]["resume"] = False  # says how the program was called, not what the run is
    text = yaml.safe_dump(settings, sort_keys=False)
    if path.exists() and path.read_text() != text:
        set_aside(path)
    write_atomically(path, [text])


def _set_aside_later(folder: Path, completed: int) -> None:
    """Set aside the files ``step_N.jsonl`` of steps that this run does anew: of an earlier run, or after a resume."""
    for path in sorted(folder.glob("step_*.jsonl")):
        number = path.stem.removeprefix("step_")
        if number.isdigit() and (completed == 0 or int(number) > completed):
            set_aside(path)


def _first_divergence(metrics: Path) -> float | None:
    """The unclipped divergence of the run's first step, where its line is kept."""
    with metrics.open() as file:
        values = (json.loads(line).get("divergence") for line in file)
        return next((value for value in values if isinstance(value, float)), None)
