"""Evaluation of a finished model, outside training: what ``python -m opsd_megatron.evaluate`` does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opsd_megatron.checkpoint.claim import claim_output_dir
from opsd_megatron.checkpoint.convert import stored_tensors
from opsd_megatron.checkpoint.digest import digest, weights_digest
from opsd_megatron.checkpoint.hf_io import SafetensorsReader
from opsd_megatron.checkpoint.record import hf_folder
from opsd_megatron.checkpoint.tensor_store import TensorStore
from opsd_megatron.config import Config
from opsd_megatron.data.evaluation_sets import EvaluationSet, load_sets
from opsd_megatron.data.prompts import PromptBuilder
from opsd_megatron.evaluation.answers import Judge
from opsd_megatron.evaluation.evaluate import evaluate, evaluation_length, evaluation_prompts, on_rank_0, sampling_of
from opsd_megatron.evaluation.figures import EvaluationResult
from opsd_megatron.models.config_file import ConfigFile
from opsd_megatron.models.families import FAMILIES, read_spec, resolve_model_path
from opsd_megatron.models.tokenizer import load_tokenizer
from opsd_megatron.models.weight_map import check_tensors, hf_shapes
from opsd_megatron.rollout.stop_tokens import stop_token_ids
from opsd_megatron.rollout.vllm_engine import VllmEngine
from opsd_megatron.rollout.weight_sync import CheckedStream
from opsd_megatron.telemetry.files import set_aside, write_atomically, writing
from opsd_megatron.types import Problem

RESULTS = "results.json"
# There from the first sample to the last figure: what is being evaluated, set by set.
UNFINISHED = "unfinished.json"


@dataclass(frozen=True)
class StandAlone:
    """A model and what it is to be evaluated on, checked, before any process group or engine exists.

    Attributes:
        config: ``model``, ``data``, ``rollout``, ``evaluation``, ``train.seed`` and ``output_dir`` are used.
        source: Local Hugging Face directory with configuration and tokenizer.
        checkpoint: Where the weights are, if not in ``source``.
        tokenizer: The model's.
        prompts: Renders problems.
        max_length: Longest sequence that the engine takes, in tokens.
        sets: What to evaluate on, each with its problems.
        weights: Digest of the weights.
    """

    config: Config
    source: Path
    checkpoint: Path | None
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptBuilder
    max_length: int
    sets: Sequence[tuple[EvaluationSet, list[Problem]]]
    weights: str

    @staticmethod
    def check(config: Config) -> StandAlone:
        """Read and check the model's configuration and tensor names, the problems, the prompts and the answer judge.

        ``model.checkpoint`` brings its own configuration and tokenizer; ``model.path`` is not looked at then.

        Raises:
            OpsdError: One of them is wrong; nothing has been started or written.
        """
        checkpoint = None if config.model.checkpoint is None else Path(config.model.checkpoint)
        source = resolve_model_path(config.model.path) if checkpoint is None else hf_folder(checkpoint)
        positions, tokenizer = _read_model(source, stored_there=checkpoint is None)
        prompts = evaluation_prompts(tokenizer, config, positions=positions)
        sets = load_sets(config.evaluation_sets, config.data, most=config.evaluation.max_problems)
        max_length = evaluation_length((problems for _, problems in sets), prompts, config)
        with Judge(seconds=config.evaluation.judge_seconds) as judge:
            judge.start()  # not only when hours of sampling are to be judged
        weights = weights_digest(source if checkpoint is None else checkpoint)
        return StandAlone(config, source, checkpoint, tokenizer, prompts, max_length, sets, weights)

    @property
    def fingerprint(self) -> str:
        """A digest of everything that all ranks must have in common."""
        problems = [astuple(problem) for _, own in self.sets for problem in own]
        return digest([json.dumps([asdict(self.config), self.weights, problems]).encode()])

    def describe(self) -> list[str]:
        """What there is to do, in lines of text."""
        k = self.config.evaluation.samples_per_problem
        return [
            f"{one.name}: {len(problems)} problems of {one.source}, {k} samples each" for one, problems in self.sets
        ]

    def run(self, show: Callable[[str], None]) -> dict[str, EvaluationResult]:
        """Evaluate, and write ``output_dir/SET.jsonl`` for each set and ``output_dir/results.json``.

        Problems are on disk when they are done. Where an evaluation was ended before its time in this directory, sets
        that it had begun with the same weights, problems, prompts and settings go on after the last problem done. Other
        files of an earlier evaluation are set aside.

        Ranks: every rank of the world, once the default process group exists; the result is the same on all of them.

        Args:
            show: Gets lines of text on rank 0: after each set, and on what goes on.

        Raises:
            EngineError: The engine cannot start.
            CheckpointError: A tensor of the checkpoint is damaged, or another job is at work in ``output_dir``.
            OutputError: A file cannot be written.
        """
        output_dir = Path(self.config.output_dir)
        engine = self._start_engine()
        claim = claim_output_dir(output_dir)
        try:
            results = self._evaluate(engine, output_dir, show)
        finally:
            claim.release()
        engine.close()
        return results

    def _evaluate(
        self, engine: VllmEngine, output_dir: Path, show: Callable[[str], None]
    ) -> dict[str, EvaluationResult]:
        """See :meth:`run`."""
        writes = dist.get_rank() == 0
        begun = on_rank_0(lambda: self._begin(output_dir))
        if writes and begun:
            show(f"going on where this evaluation was ended: {', '.join(begun)}")
        results: dict[str, EvaluationResult] = {}
        for one, problems in self.sets:
            results[one.name] = evaluate(
                engine,
                problems,
                self.prompts,
                self.tokenizer,
                self.config.evaluation,
                sampling=sampling_of(self.config),
                seed=self.config.train.seed,
                records_path=output_dir / f"{one.name}.jsonl",
                resume=one.name in begun,
            )
            if writes:
                write_atomically(output_dir / RESULTS, [json.dumps(self._document(results), indent=2) + "\n"])
                show(summary(one.name, results[one.name]))
        if writes:
            with writing(output_dir / UNFINISHED):
                (output_dir / UNFINISHED).unlink()
        return results

    def _begin(self, output_dir: Path) -> list[str]:
        """Say in ``output_dir`` what is going to be evaluated, and return the sets that have been begun already.

        What is not theirs is set aside first: a file of records beside :data:`UNFINISHED` is of the evaluation that it
        tells of.
        """
        identities = {one.name: self._identity(problems) for one, problems in self.sets}
        earlier = _read_identities(output_dir / UNFINISHED)
        begun = [name for name, identity in identities.items() if earlier.get(name) == identity]
        for name in identities.keys() - begun:
            set_aside(output_dir / f"{name}.jsonl")
            set_aside(output_dir / f"{name}.jsonl.part")
        set_aside(output_dir / RESULTS)
        write_atomically(output_dir / UNFINISHED, [json.dumps({"sets": identities}, indent=2) + "\n"])
        return begun

    def _identity(self, problems: Sequence[Problem]) -> str:
        """A digest of everything that the records of a set follow from."""
        settings = self.config.evaluation
        asked = [(*astuple(problem), list(self.prompts.student(problem))) for problem in problems]
        how = [settings.samples_per_problem, settings.judge_seconds, self.config.train.seed]
        model = [self.weights, self.config.model.dtype]
        return digest([json.dumps([model, astuple(sampling_of(self.config)), how, asked]).encode()])

    def _start_engine(self) -> VllmEngine:
        if self.checkpoint is None:
            engine = VllmEngine.start(self.source, self.config, max_length=self.max_length, read_weights=True)
        else:
            engine = VllmEngine.start(self.source, self.config, max_length=self.max_length)
            spec, dtype = read_spec(self.source), getattr(torch, self.config.model.dtype)
            stream = CheckedStream(self._stored(self.checkpoint, dtype), hf_shapes(spec), dtype)
            engine.update_weights(iter(stream))
            stream.check_complete()
        engine.wake_up()
        return engine

    def _stored(self, checkpoint: Path, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's weights, whole, one by one; every rank reads them for itself."""
        for name, tensor in stored_tensors(TensorStore(checkpoint), read_spec(self.source), round_merged=False):
            yield name, torch.cat([piece.to(dtype) for piece in tensor.pieces])

    def _document(self, results: Mapping[str, EvaluationResult]) -> dict[str, Any]:
        """``results.json``: what was evaluated and how, and what came out."""
        settings = self.config.evaluation
        thinking = self.config.data.student_thinking if settings.thinking is None else settings.thinking
        return {
            "model": str(self.source if self.checkpoint is None else self.checkpoint),
            "weights": self.weights,
            "dtype": self.config.model.dtype,
            "sampling": asdict(sampling_of(self.config)) | {"thinking": thinking, "seed": self.config.train.seed},
            "sets": {
                one.name: {"source": one.source} | results[one.name].as_dict()
                for one, _ in self.sets
                if one.name in results
            },
        }


def summary(name: str, result: EvaluationResult) -> str:
    """The main figures in one line."""
    n = result.samples_per_problem

    def share(label: str, value: float) -> str:
        return f"{label} {100 * value:.1f}%"

    low, high = result.average.interval.low, result.average.interval.high
    parts = [f"{share(f'avg@{n}', result.average.value)} (95% interval {100 * low:.1f} to {100 * high:.1f})"]
    if n > 1:
        parts += [share(f"pass@{n}", result.passes[n].value), share(f"maj@{n}", result.majorities[n].value)]
    parts += [share("boxed", result.box_rate.value), share("truncated", result.truncated.value)]
    parts.append(f"{result.mean_tokens.value:.0f} tokens")
    return f"{name}: {result.num_problems} problems, {', '.join(parts)}"


def _read_identities(path: Path) -> dict[str, Any]:
    """The sets of an evaluation that was ended before its time; none where the file tells of none."""
    try:
        sets = json.loads(path.read_text())["sets"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return sets if isinstance(sets, dict) else {}


def _read_model(source: Path, *, stored_there: bool) -> tuple[int, PreTrainedTokenizerBase]:
    """The model's longest sequence and its tokenizer. Families that can be trained here are checked in full."""
    config = ConfigFile.read(source)
    stop_token_ids(source)
    if config.get("model_type") not in FAMILIES:  # any that the engine knows can be evaluated
        return config.integer("max_position_embeddings"), load_tokenizer(source, None)
    spec = read_spec(source)
    if stored_there:
        check_tensors(spec, SafetensorsReader(source))
    return spec.max_positions, load_tokenizer(source, spec)
