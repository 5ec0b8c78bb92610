"""Gradients of the policy objectives through the trainer's own step, against their definitions on dense float64 logits.

What the trainer does with samples is all there: weights, packing, Megatron-Core's schedule, the loss in row chunks
across vocabulary shards, the division by the step's tokens. The expected gradients know none of it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from opsd_megatron.config import Config
from opsd_megatron.types import AlignedSample, Generation, PackedMicroBatch, Problem, Rollout
from tests.distributed import run_distributed
from tests.tiny import make_tiny_qwen3
from tests.unit.losses.reference import Case, dense_divergence

VOCAB, TEACHER_HIDDEN, GROUP = 270, 24, 3
TEMPERATURE, CAP = 0.8, 1.3
LENGTHS = (5, 2, 9, 1, 4, 7)
CORRECT = (False, False, True, True, False, True)
# World size -> (tp, pp, sequence parallel); the meshes of one size share a launch.
MESHES = {1: [(1, 1, False)], 2: [(2, 1, False), (2, 1, True), (1, 2, False)]}


@dataclass(frozen=True)
class Arm:
    """An objective with its settings; ``later``: in a second update, whose weights are not those that sampled."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    later: bool = False


ARMS = [
    Arm("sampled_token", {"log_ratio_clip": 1.5}),
    Arm("grpo", {"importance_cap": CAP, "reduction": "sequence", "position_floor": 0.25}),
    Arm("grpo", {"importance_cap": CAP, "advantage_std": False}, later=True),
    Arm("opsd_grpo", {"importance_cap": CAP, "grpo_weight": 0.5, "beta": 0.3, "clip": 0.01}),
    Arm("opsd_grpo", {"clip_mode": "none", "beta": 0.0, "entropy_gate": 1.0, "entropy_gate_keep": "high"}),
]


def config_of(arm: Arm) -> Config:
    config = Config()
    config.objective.name = arm.name
    config.rollout.samples_per_problem, config.rollout.temperature = GROUP, TEMPERATURE
    config.train.updates_per_step = 2 if arm.later else 1
    config.model.dtype, config.optimizer.clip_grad = "float32", 0.0
    config.objective.chunk_rows = 4
    for key, value in arm.settings.items():
        setattr(config.objective, key, value)
    return config


def rollouts() -> list[Rollout]:
    """Two groups; what the engine says is near what a random model gives to a token, on either side of it."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for index, (length, correct) in enumerate(zip(LENGTHS, CORRECT, strict=True)):
        prompt, response = (torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in (3 + index, length))
        log_probs = (torch.randn(length, generator=generator) - 5.6).tolist()
        problem = Problem(f"p:{index // GROUP}", "?", answer="1")
        generation = Generation(tuple(response), tuple(log_probs), "stop")
        found.append(Rollout(problem, tuple(prompt), generation, policy_version=0, correct=correct))
    return found


def teacher(part: int) -> tuple[Tensor, Tensor]:
    """Hidden states at the rows of one half of the samples, and a head padded to a multiple of 4 entries."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(VOCAB + 2, TEACHER_HIDDEN, generator=generator) / 3
    generator.manual_seed(100 + part)
    return torch.randn(sum(LENGTHS[GROUP * part :][:GROUP]), TEACHER_HIDDEN, generator=generator), weight


def drift(rows: int) -> Tensor:
    """How much likelier tokens have become since the old weights: past both bounds of the ratio, for some."""
    return torch.linspace(-0.5, 0.5, rows)


def samples_of(arm: Arm, config: Config) -> list[AlignedSample]:
    from opsd_megatron.objectives import HeadLayout, build_objective
    from opsd_megatron.objectives.base import weighed

    class Taught:
        def prompts(self, given: list[Rollout]) -> list[tuple[int, ...]]:
            return [(1, 2)] * len(given)

    objective = build_objective(config, cast(Any, None), cast(Any, Taught()), HeadLayout(VOCAB))
    return weighed(objective.samples([], rollouts()), config.objective)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3(tmp_path_factory.mktemp("model"), vocab_size=VOCAB, heads=8, kv_heads=4, head_dim=16)


@pytest.fixture(scope="module")
def expected(model_path: Path) -> list[dict[str, Tensor]]:
    """Gradients of each arm, from formulas written out."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64, attn_implementation="eager")
    found = []
    for arm in ARMS:
        rows, total = [], 0
        for part in range(2):
            hidden, weight = teacher(part)
            others = (hidden.double() @ weight[:VOCAB].double().t()).split(LENGTHS[GROUP * part :][:GROUP])
            offsets = drift(len(hidden)).double().split(LENGTHS[GROUP * part :][:GROUP])
            for rollout, other, moved in zip(rollouts()[GROUP * part :][:GROUP], others, offsets, strict=True):
                ids = torch.tensor([*rollout.prompt_ids, *rollout.generation.token_ids])
                logits = model(ids[None]).logits[0, len(rollout.prompt_ids) - 1 : -1]
                rows.append(_dense_loss(arm, rollout, logits, other, moved))
                total += len(other)
        model.zero_grad()
        (torch.stack(rows).sum() / total).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return found


def _dense_loss(arm: Arm, rollout: Rollout, logits: Tensor, other: Tensor, moved: Tensor) -> Tensor:
    """The weighted sum of one response's losses."""
    get: Callable[[str, Any], Any] = arm.settings.get
    targets = torch.tensor(rollout.generation.token_ids)[:, None]
    s, t = ((side / TEMPERATURE).log_softmax(1) for side in (logits, other))
    s_y, t_y = s.gather(1, targets).squeeze(1), t.gather(1, targets).squeeze(1)
    if arm.name == "sampled_token":
        return (-(t_y - s_y).detach().clamp(-1.5, 1.5) * s_y).sum()
    index = [one.generation for one in rollouts()].index(rollout.generation)
    group = torch.tensor(CORRECT[index - index % GROUP :][:GROUP]).double()
    advantage = (group[index % GROUP] - group.mean()) / (group.std() if get("advantage_std", True) else 1)
    old = s_y.detach() - moved if arm.later else s_y.detach()
    ratio = (s_y - old).exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) * get("grpo_weight", 1.0)
    if arm.name == "opsd_grpo":
        clip = 0.01 if "clip" in arm.settings else None
        divergence = dense_divergence(logits, other, Case(arm.settings["beta"], TEMPERATURE, clip))
        if "entropy_gate" in arm.settings:
            divergence = divergence * (-(t.exp() * t).sum(1) > 1.0)
        loss = loss + divergence
    if "importance_cap" in arm.settings:
        loss = loss * (old - torch.tensor(rollout.generation.log_probs).double()).exp().clamp(max=CAP)
    if "position_floor" in arm.settings:
        places = (torch.arange(len(loss)).double() + 0.5) / len(loss)
        loss = loss * (0.25 + 0.75 * torch.sigmoid((places - 0.3) / 0.1))
    if get("reduction", "token") == "sequence":
        loss = loss * sum(LENGTHS) / len(LENGTHS) / len(loss)
    return loss.sum()


@pytest.mark.parametrize("world_size", MESHES)
def test_gradients_are_those_of_the_definitions(
    world_size: int, model_path: Path, expected: list[dict[str, Tensor]]
) -> None:
    for rank, meshes in enumerate(run_distributed(_on_meshes, world_size, model_path)):
        for mesh, found in zip(MESHES[world_size], meshes, strict=True):
            for arm, gradients, wanted in zip(ARMS, found, expected, strict=True):
                assert sorted(gradients) == sorted(wanted)
                for name, gradient in wanted.items():
                    error = float((gradients[name].double() - gradient).norm() / gradient.norm())
                    assert math.isfinite(error) and error < 5e-5, (rank, mesh, arm, name, error)


class _Enough(Exception):
    """Ends a step where its gradients are known."""


def _on_meshes(path: Path) -> list[list[dict[str, Tensor]]]:
    from megatron.core import parallel_state

    found = []
    for mesh in MESHES[dist.get_world_size()]:
        found.append(_gradients(path, *mesh))
        parallel_state.destroy_model_parallel()
    return found


def _gradients(path: Path, tp: int, pp: int, sequence: bool) -> list[dict[str, Tensor]]:
    """The worker: for each arm the gradients of one update by Hugging Face name, as the trainer's step forms them."""
    from opsd_megatron.checkpoint.hf_io import SafetensorsReader
    from opsd_megatron.distributed.parallel import ParallelDims
    from opsd_megatron.distributed.seed import seed_everything
    from opsd_megatron.models.build import build_model
    from opsd_megatron.models.families import read_spec
    from opsd_megatron.models.weight_map import load_hf_weights
    from opsd_megatron.objectives import HeadLayout, build_objective
    from opsd_megatron.trainer.optimizer import make_trainable
    from opsd_megatron.trainer.step import optimizer_step, with_old_log_probs

    config = config_of(ARMS[0])
    config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence = tp, pp, sequence
    dims = ParallelDims.initialize(config.parallel)
    seed_everything(0, dims)
    spec = read_spec(path)
    chunks = build_model(spec, config, dims)
    load_hf_weights(chunks, spec, SafetensorsReader(path), dims)
    trainable = make_trainable(chunks, config)
    head = HeadLayout(VOCAB, dims.tp_group, dims.sequence_parallel)
    found = []
    for arm in ARMS:
        config = config_of(arm)
        objective = build_objective(config, cast(Any, None), cast(Any, object()), head)
        batches = _batches(samples_of(arm, config), dims)
        if arm.later:
            batches = with_old_log_probs(trainable, cast(Any, objective), batches, dims)
            if dims.is_last_stage:
                batches = [_moved(batch) for batch in batches]
        gradients: dict[str, Tensor] = {}

        def capture(metrics: Mapping[str, float], gradients: dict[str, Tensor] = gradients) -> None:
            gradients.update(_exported(chunks, spec, dims))
            raise _Enough

        targets = _targets(spec, dims)
        watched = _FreesTargets(objective, targets)
        with pytest.raises(_Enough):
            optimizer_step(trainable, cast(Any, watched), batches, targets, dims, accept=capture)
        watched.check(len(targets))
        found.append(gradients)
    return found


class _FreesTargets:
    """The objective, which finds that of the teacher's hidden states nothing outlives its micro-batch."""

    def __init__(self, objective: Any, targets: list[Any]) -> None:
        self._objective = objective
        self._hidden = [None if target is None else weakref.ref(target.hidden) for target in targets]
        self._calls = 0

    def loss(self, *inputs: Any) -> Any:
        self.check(self._calls)
        self._calls += 1
        return self._objective.loss(*inputs)

    def check(self, done: int) -> None:
        states = [None if hidden is None else hidden() is not None for hidden in self._hidden]
        assert all(not state for state in states[:done]) and all(state is not False for state in states[done:])


def _moved(batch: PackedMicroBatch) -> PackedMicroBatch:
    assert batch.old_log_probs is not None
    return replace(batch, old_log_probs=batch.old_log_probs - drift(batch.num_rows))


def _batches(samples: list[AlignedSample], dims: Any) -> list[PackedMicroBatch]:
    from opsd_megatron.data.packing import PackingLayout, pack

    layout = PackingLayout(dims.sequence_multiple, dims.packing_multiple)
    return [pack(samples[first : first + GROUP], with_teacher=False, layout=layout) for first in (0, GROUP)]


def _targets(spec: Any, dims: Any) -> list[Any]:
    from opsd_megatron.types import TeacherTargets

    columns = spec.padded_vocab_size(dims.tp) // dims.tp
    targets = []
    for part in range(2):
        hidden, weight = teacher(part)
        own = torch.nn.functional.pad(weight, (0, 0, 0, 4))[columns * dims.tp_rank :][:columns]
        targets.append(TeacherTargets(hidden, own) if dims.is_last_stage else None)
    return targets


def _exported(chunks: Any, spec: Any, dims: Any) -> dict[str, Tensor]:
    """The exporter gathers whatever the parameters hold: for a moment they hold their gradients."""
    from opsd_megatron.models.export import export_hf_weights

    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    weights = [parameter.data.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.data.copy_(parameter.main_grad)
    gradients = {name: tensor.clone() for name, tensor in export_hf_weights(chunks, spec, dims)}
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data.copy_(weight)
    return gradients
