"""From a configuration to a :class:`Trainer`: first everything that can be wrong, then everything that is expensive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from opsd_megatron.checkpoint.hf_io import SafetensorsReader
from opsd_megatron.checkpoint.state import check_output_dir, latest_checkpoint, load_checkpoint, load_model_weights
from opsd_megatron.config import Config
from opsd_megatron.data.problems import load_problems
from opsd_megatron.data.prompts import PromptBuilder, check_prompts, check_supervised, shuffled_references
from opsd_megatron.data.sampler import ProblemSampler
from opsd_megatron.distributed.parallel import ParallelDims
from opsd_megatron.distributed.seed import seed_everything
from opsd_megatron.errors import ModelError
from opsd_megatron.evaluation.evaluate import Evaluator, check_answers, sampling_of
from opsd_megatron.models.build import HiddenStatesGPT, build_model
from opsd_megatron.models.qwen3 import Qwen3Spec, check_mesh, read_spec, resolve_model_path
from opsd_megatron.models.weight_map import check_tensors, load_hf_weights
from opsd_megatron.objectives import build_objective
from opsd_megatron.rollout.engine import RolloutEngine
from opsd_megatron.rollout.scripted import ScriptedEngine
from opsd_megatron.rollout.vllm_engine import VllmEngine
from opsd_megatron.teacher.policies import FrozenTeacher, LiveTeacher, TeacherPolicy
from opsd_megatron.telemetry.files import set_aside, write_atomically
from opsd_megatron.telemetry.metrics import MetricsWriter
from opsd_megatron.telemetry.progress import Progress
from opsd_megatron.trainer.metrics import StepReporter
from opsd_megatron.trainer.optimizer import make_trainable
from opsd_megatron.trainer.trainer import Trainer
from opsd_megatron.types import Problem


@dataclass(frozen=True)
class Inputs:
    """What a run reads, checked, before any process group, engine or model exists.

    Attributes:
        source: Local Hugging Face directory.
        spec: The model's dimensions.
        tokenizer: Its tokenizer.
        problems: Training problems.
        eval_problems: Held-out problems; empty without ``data.eval``.
        prompts: Renders prompts.
        references: What the teacher sees beyond each training problem, by problem id.
        identity: What tells this run's checkpoints from another's.
    """

    source: Path
    spec: Qwen3Spec
    tokenizer: PreTrainedTokenizerBase
    problems: Sequence[Problem]
    eval_problems: Sequence[Problem]
    prompts: PromptBuilder
    references: Mapping[str, str | None]
    identity: dict[str, Any]


def check_inputs(config: Config) -> Inputs:
    """Read and check the model's configuration and tensor names, the data, the prompts and the output directory.

    Raises:
        OpsdError: One of them is wrong; nothing has been started or written.
    """
    source = resolve_model_path(config.model.path)
    spec = read_spec(source)
    check_mesh(spec, config)
    if config.model.checkpoint is None:
        check_tensors(spec, SafetensorsReader(source))
    identity = run_identity(config)
    check_output_dir(Path(config.output_dir), identity, resume=config.checkpoint.resume)
    sft = config.objective.name == "sft"
    privileged = config.data.privileged
    problems = load_problems(
        config.data, config.data.train, needs_solution=not sft and privileged != "none", needs_response=sft
    )
    eval_problems: list[Problem] = []
    if config.data.eval is not None:
        eval_problems = load_problems(config.data, config.data.eval, needs_solution=False, needs_response=False)
        eval_problems = eval_problems[: config.evaluation.max_problems]
        check_answers(eval_problems)
    tokenizer = _load_tokenizer(source)
    prompts = PromptBuilder(
        tokenizer,
        config.data,
        max_length=config.model.max_length or spec.max_positions,
        max_new_tokens=max(config.rollout.max_new_tokens, config.evaluation.max_new_tokens or 0),
    )
    if sft:
        check_supervised(problems, prompts)
    else:
        check_prompts(problems, prompts, with_teacher=True)
    check_prompts(eval_problems, prompts, with_teacher=False)
    return Inputs(
        source=source,
        spec=spec,
        tokenizer=tokenizer,
        problems=problems,
        eval_problems=eval_problems,
        prompts=prompts,
        references=_references(problems, privileged, seed=config.train.seed),
        identity=identity,
    )


def run_identity(config: Config) -> dict[str, Any]:
    """The settings that make two runs the same run; a checkpoint of one cannot be continued as another.

    The mesh, the number of steps and everything about evaluation and saving may change on resume.
    """
    whole = asdict(config)
    identity: dict[str, Any] = {key: whole[key] for key in ("objective", "teacher", "optimizer")}
    identity["objective"].pop("chunk_rows")
    identity["model"] = {key: whole["model"][key] for key in ("path", "checkpoint", "dtype")}
    identity["data"] = {key: value for key, value in whole["data"].items() if key != "eval"}
    sampled = ("temperature", "top_p", "top_k", "max_new_tokens", "samples_per_problem")
    identity["rollout"] = {key: whole["rollout"][key] for key in sampled}
    identity["train"] = {key: whole["train"][key] for key in ("seed", "problems_per_step")}
    return identity


def _load_tokenizer(source: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True)  # type: ignore[no-any-return]
    except Exception as error:  # transformers raises whatever the broken file led to
        raise ModelError(
            f"{source}: the tokenizer cannot be loaded ({type(error).__name__}: {error}); copy tokenizer.json and "
            "tokenizer_config.json of the model there"
        ) from error


def _references(problems: Sequence[Problem], privileged: str, *, seed: int) -> dict[str, str | None]:
    if privileged == "none":
        return {problem.id: None for problem in problems}
    shown = shuffled_references(problems, seed=seed) if privileged == "shuffled" else [p.solution for p in problems]
    return {problem.id: reference for problem, reference in zip(problems, shown, strict=True)}


def build_trainer(config: Config, inputs: Inputs) -> Trainer:
    """Start the engine, build the models, and load the newest checkpoint where the run resumes.

    Ranks: every rank of the world.

    Raises:
        OpsdError: The engine cannot start, or weights or a checkpoint cannot be read.
    """
    dims = ParallelDims.initialize(config.parallel)
    seed_everything(config.train.seed, dims)
    # The engine first: it sizes its cache by the free device memory, then sleeps while the trainer moves in.
    engine = _start_engine(config, inputs, dims)
    model = _initial_model(config, inputs, dims)
    trainable = make_trainable(model, config)
    objective = build_objective(config, inputs.prompts, inputs.references, inputs.spec.vocab_size, dims.tp_group)
    sampler = ProblemSampler(
        len(inputs.problems), config.train.problems_per_step, seed=config.train.seed, shuffle=config.data.shuffle
    )
    completed = 0
    newest = latest_checkpoint(Path(config.output_dir) / "checkpoints") if config.checkpoint.resume else None
    if newest is not None:
        state = load_checkpoint(newest, model=trainable.model, optimizer=trainable.optimizer)
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
        objective=objective,
        trainable=trainable,
        teacher=_teacher(config, inputs, dims, student=model) if objective.needs_teacher else None,
        engine=engine,
        evaluator=_evaluator(config, inputs),
        reporter=_reporter(config, dims, completed),
        identity=inputs.identity,
        completed=completed,
    )


def _initial_model(config: Config, inputs: Inputs, dims: ParallelDims) -> HiddenStatesGPT:
    """A model with the run's initial weights."""
    model = build_model(inputs.spec, config, dims)
    if config.model.checkpoint is None:
        load_hf_weights(model, inputs.spec, SafetensorsReader(inputs.source), dims)
    else:
        load_model_weights(Path(config.model.checkpoint), model)
    return model


def _teacher(config: Config, inputs: Inputs, dims: ParallelDims, *, student: HiddenStatesGPT) -> TeacherPolicy:
    if config.teacher.policy == "live":
        return LiveTeacher(student, dims)
    return FrozenTeacher(_initial_model(config, inputs, dims), dims)


def _start_engine(config: Config, inputs: Inputs, dims: ParallelDims) -> RolloutEngine | None:
    if not config.needs_engine:
        return None
    if config.rollout.engine == "scripted":
        assert config.rollout.script is not None, "Config.validate demands a script"
        return ScriptedEngine(Path(config.rollout.script))
    max_length = config.model.max_length or inputs.spec.max_positions
    engine = VllmEngine.start(inputs.source, config, max_length=max_length)
    engine.sleep()
    return engine


def _evaluator(config: Config, inputs: Inputs) -> Evaluator | None:
    if not inputs.eval_problems:
        return None
    return Evaluator(
        inputs.eval_problems,
        inputs.prompts,
        inputs.tokenizer,
        config.evaluation,
        sampling=sampling_of(config),
        seed=config.train.seed,
        records_dir=Path(config.output_dir) / "evaluations",
    )


def _reporter(config: Config, dims: ParallelDims, completed: int) -> StepReporter:
    output_dir = Path(config.output_dir)
    if dims.rank != 0:
        return StepReporter(output_dir, writer=None, progress=None, save_rollouts=False)
    _write_config(output_dir / "config.yaml", config)
    return StepReporter(
        output_dir,
        writer=MetricsWriter(output_dir / "metrics.jsonl", resume_step=completed),
        progress=Progress(config.train.steps, initial=completed),
        save_rollouts=config.rollout.save,
    )


def _write_config(path: Path, config: Config) -> None:
    """Write the resolved configuration; a differing one of the run's earlier part is set aside, not overwritten."""
    text = yaml.safe_dump(asdict(config), sort_keys=False)
    if path.exists() and path.read_text() != text:
        set_aside(path)
    write_atomically(path, [text])
