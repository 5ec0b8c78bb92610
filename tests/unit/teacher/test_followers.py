"""Teachers that follow the student: the average against its closed form, copies at their steps, and both through
checkpoints of any mesh."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opsd_megatron.checkpoint.hf_io import SafetensorsReader
from opsd_megatron.checkpoint.state import TrainerState, load_checkpoint, save_checkpoint
from opsd_megatron.models.build import build_model
from opsd_megatron.models.export import export_hf_weights
from opsd_megatron.models.qwen3 import Qwen3Spec
from opsd_megatron.models.weight_map import load_hf_weights
from opsd_megatron.teacher import shares
from opsd_megatron.teacher.ema import EmaTeacher
from opsd_megatron.teacher.frozen import FrozenTeacher
from opsd_megatron.teacher.refresh import RefreshedTeacher
from tests.distributed import run_distributed
from tests.tiny import make_tiny_qwen3, make_tiny_qwen3_moe
from tests.unit.checkpoint.mesh import Mesh, Run, run_on, stored

DECAY = 0.9
EVERY = 2
STEPS = 3

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied, with a vocabulary that tp 2 pads, a key/value head that it cuts, and sizes that three would not divide."""
    return make_tiny_qwen3(tmp_path_factory.mktemp("dense"), vocab_size=271, kv_heads=1)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3_moe(tmp_path_factory.mktemp("moe"), num_layers=2, experts=4)


def follower(kind: str, run: Run, *, over_data: bool = True, offload: bool = False) -> EmaTeacher | RefreshedTeacher:
    """A teacher of ``run``'s model, with the initial weights."""
    mesh = run.model[0].config
    config = Mesh(dtype="bfloat16" if mesh.bf16 else "float32").config()
    model = build_model(run.spec, config, run.dims)
    load_hf_weights(model, run.spec, SafetensorsReader(run.source), run.dims)
    if kind == "refresh":
        return RefreshedTeacher(model, run.model, run.spec, run.dims, every=EVERY, offload=offload)
    return EmaTeacher(model, run.model, run.spec, run.dims, decay=DECAY, over_data=over_data, offload=offload)


def exported(teacher: FrozenTeacher, run: Run) -> Weights:
    return {name: tensor.clone() for name, tensor in export_hf_weights(teacher._model, run.spec, run.dims)}


def save(run: Run, teacher: FrozenTeacher, directory: Path) -> None:
    state = TrainerState(step=0)
    save_checkpoint(
        directory,
        state=state,
        model=run.trainable.chunks,
        optimizer=run.trainable.optimizer,
        teacher=teacher,
        source=run.source,
    )


def step(run: Run, teacher: FrozenTeacher, number: int) -> Weights:
    """One step of the student and its teacher; the student's weights after it."""
    run.steps(number, number)
    teacher.after_step(number)
    return run.exported()


def equal(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def average(history: Sequence[Weights]) -> Weights:
    """The closed form: ``d^n w_0 + (1 - d) sum_k d^(n-k) w_k``, in float64."""
    n = len(history) - 1
    shares = [DECAY**n] + [(1 - DECAY) * DECAY ** (n - k) for k in range(1, n + 1)]
    return {
        name: sum(
            (share * weights[name].double() for share, weights in zip(shares, history, strict=True)), torch.zeros(())
        )
        for name in history[0]
    }


def interleaved(weights: Weights, spec: Qwen3Spec) -> Weights:
    """With the query, key and value rows of each key/value head below each other in one tensor, as they are stored."""
    joined = {}
    for name, tensor in weights.items():
        if name.endswith("q_proj.weight"):
            parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            heads = [part.view(spec.num_kv_heads, -1, spec.hidden_size) for part in parts]
            joined[name.replace("q_proj", "qkv_proj")] = torch.cat(heads, dim=1).flatten(0, 1)
        elif not name.endswith(("k_proj.weight", "v_proj.weight")):
            joined[name] = tensor
    return joined


def distance(found: Weights, expected: Weights) -> float:
    """Largest difference, as a share of the tensor's largest entry."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in expected)


def travel(kind: str, source: Path, root: Path, meshes: list[Mesh]) -> dict[str, object]:
    """Follow over the first mesh, saving in the middle; continue from there on it, and carry it over the others."""
    outcome: dict[str, object] = {}
    with run_on(meshes[0], source) as run:
        teacher = follower(kind, run)
        history = [run.exported()]
        outcome["starts from the initial weights"] = equal(exported(teacher, run), history[0])
        history.append(step(run, teacher, 1))
        save(run, teacher, root / "step_1")
        saved = exported(teacher, run)
        history += [step(run, teacher, 2), step(run, teacher, 3)]
        final = exported(teacher, run)
        if kind == "ema":
            outcome["distance"] = distance(final, average(history))
            outcome["moved"] = distance(final, history[0])
        else:
            outcome["copies"] = equal(final, history[2]) and not equal(history[2], history[3])
    with run_on(meshes[0], source) as run:
        teacher = follower(kind, run)
        load_checkpoint(root / "step_1", model=run.trainable.chunks, optimizer=run.trainable.optimizer, teacher=teacher)
        outcome["loaded"] = equal(exported(teacher, run), saved)
        for number in (2, 3):
            step(run, teacher, number)
        outcome["resumed"] = equal(exported(teacher, run), final)
    expected = stored(root / "step_1")
    if kind == "ema":
        # Kept in float32 also where the model is not.
        first = interleaved(average(history[:2]), run.spec)
        kept = {name: expected[f"teacher.{name}"] for name in first}
        outcome["stored"] = distance(
            {n: kept[n].flatten()[: first[n].numel()].reshape(first[n].shape) for n in first}, first
        )
    outcome["tensors"] = sum(name.startswith("teacher.") for name in expected)
    for number, mesh in enumerate(meshes[1:], start=1):
        with run_on(mesh, source) as run:
            teacher = follower(kind, run, over_data=mesh.sharded_optimizer)
            load_checkpoint(root / f"step_{number}", model=run.trainable.chunks, teacher=teacher)
            save(run, teacher, root / f"step_{number + 1}")
            again = stored(root / f"step_{number + 1}")
            outcome[str(mesh)] = equal(_teacher(again), _teacher(expected))
    return outcome


def _teacher(tensors: Weights) -> Weights:
    return {
        name: tensor[:271] if len(tensor) == 272 else tensor
        for name, tensor in tensors.items()
        if name.startswith("teacher.")
    }


DENSE_MESHES = [
    Mesh(tp=2),
    Mesh(pp=2),
    Mesh(),
    Mesh(tp=2, pp=2),
    Mesh(pp=2, vpp=2, sharded_optimizer=False),
    Mesh(cp=2),
]
MOE_MESHES = [Mesh(ep=2), Mesh(tp=2, ep=4, etp=1, sequence=True), Mesh(pp=2), Mesh(ep=4)]


def travel_each(dense: Path, moe: Path, root: Path) -> dict[str, dict[str, object]]:
    shares._BUCKET = 30_000  # so that a model's shares take several
    return {
        "ema": travel("ema", dense, root / "ema", DENSE_MESHES),
        "refresh": travel("refresh", dense, root / "refresh", DENSE_MESHES[:3]),
        "ema in bf16": travel("ema", dense, root / "bf16", [Mesh(dtype="bfloat16"), Mesh(tp=2, dtype="bfloat16")]),
        "ema of experts": travel("ema", moe, root / "moe", MOE_MESHES),
    }


def test_followers_over_four_ranks(dense: Path, moe: Path, tmp_path: Path) -> None:
    """Each starts from the initial weights, follows as it should, and continues bit for bit, on any mesh."""
    for outcome in run_distributed(travel_each, 4, dense, moe, tmp_path):
        for name, of in outcome.items():
            assert of.pop("stored", 0.0) < 1e-6, name  # float32's rounding
            # The model that the average is used in has its own dtype.
            assert of.pop("distance", 0.0) < (1e-6 if name != "ema in bf16" else 2**-8), name
            assert of.pop("moved", 1.0) > 1e-2, name
            # Of each layer 9 tensors, or 7 and three for each of 4 experts; and two or three more.
            assert of.pop("tensors") == (4 * 9 + 2 if name != "ema of experts" else 2 * (7 + 12) + 3)
            assert of and all(value is True for value in of.values()), (name, of)
