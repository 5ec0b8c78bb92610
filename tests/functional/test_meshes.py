"""One batch, one trajectory: losses, gradient norms and weights depend neither on the mesh nor on how a batch is split.

With scripted rollouts every mesh trains on the same tokens from the same weights, so ten steps must agree to rounding.
What this does not cover: the sampled tokens themselves, which depend on the engine (test_engine.py).

Five layers make every pipeline uneven: stages of 3 and 2 layers, of 2, 1, 1 and 1, or two chunks of each size.
"""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opsd_megatron.config.compose import compose_config
from opsd_megatron.train import run
from tests.distributed import run_distributed
from tests.functional.runs import SmallRun, make_small_run, read_metrics
from tests.tiny import make_tiny_qwen3, make_tiny_qwen3_moe

STEPS = 10

_SHAPE: dict[str, Any] = {"num_layers": 5, "heads": 8, "kv_heads": 4, "head_dim": 16}
MODELS = {
    "dense": partial(make_tiny_qwen3, **_SHAPE),
    # Any tensor parallelism cuts the one key/value head.
    "moe": partial(make_tiny_qwen3_moe, **_SHAPE | {"kv_heads": 1}),
    "dense-lora": partial(make_tiny_qwen3, **_SHAPE),
    "moe-lora": partial(make_tiny_qwen3_moe, **_SHAPE | {"kv_heads": 1}),
}
# With adapters of a rank that divides by nothing, and the teacher that the student is without them.
LORA: dict[str, object] = {"lora__rank": 3, "teacher__policy": "adapter_off", "optimizer__lr": 5e-3}

# On four ranks each; data parallelism takes what the sizes leave.
TP2_SP: dict[str, object] = {"tensor": 2, "sequence": True}
PP2_VPP2: dict[str, object] = {"pipeline": 2, "virtual_stages": 2}
MESHES: dict[str, dict[str, dict[str, object]]] = {
    "dense": {
        "dp4": {},
        "tp4-sp": {"tensor": 4, "sequence": True},
        "tp2-dp2": {"tensor": 2},
        "tp2-sp-dp2-plain-optimizer": {**TP2_SP, "distributed_optimizer": False},
        "tp2-pp2": {"tensor": 2, "pipeline": 2},
        "pp2-dp2-full-recompute": {"pipeline": 2, "recompute": "full"},
        "pp4": {"pipeline": 4},
        "pp2-vpp2-dp2": PP2_VPP2,
        "tp2-sp-pp2-vpp2": {**TP2_SP, **PP2_VPP2},
        "cp4": {"context": 4},
        "cp2-dp2": {"context": 2},
        "tp2-sp-cp2": {**TP2_SP, "context": 2},
        "pp2-cp2-selective-recompute": {"pipeline": 2, "context": 2, "recompute": "selective"},
        "pp2-vpp2-cp2": {**PP2_VPP2, "context": 2},
    },
    "moe": {
        "ep2-dp4": {"expert": 2},
        "ep4-dp4": {"expert": 4},
        "pp2-vpp2-ep2-dp2": {**PP2_VPP2, "expert": 2},
        "tp2-sp-ep2-dp2": {**TP2_SP, "expert": 2},
        "tp2-sp-ep4-etp1-dp2": {**TP2_SP, "expert": 4, "expert_tensor": 1},
        "tp2-sp-pp2-vpp2-ep2-etp1-full-recompute": {
            **TP2_SP,
            **PP2_VPP2,
            "expert": 2,
            "expert_tensor": 1,
            "recompute": "full",
        },
        "ep4-cp2-dp2": {"expert": 4, "context": 2},
        "tp2-sp-ep2-etp1-cp2-selective-recompute": {
            **TP2_SP,
            "expert": 2,
            "expert_tensor": 1,
            "context": 2,
            "recompute": "selective",
        },
    },
    "dense-lora": {
        "lora-tp4-sp": {"tensor": 4, "sequence": True},
        "lora-tp2-cp2-plain-optimizer": {"tensor": 2, "context": 2, "distributed_optimizer": False},
        "lora-tp2-sp-pp2-vpp2-full-recompute": {**TP2_SP, **PP2_VPP2, "recompute": "full"},
    },
    "moe-lora": {
        "lora-tp2-sp-etp2-dp2": TP2_SP,
        "lora-pp2-ep2-dp2": {"pipeline": 2, "expert": 2},
        "lora-tp2-sp-ep4-etp1-dp2": {**TP2_SP, "expert": 4, "expert_tensor": 1},
    },
}
# Budgets of tokens, in turn: from a micro-batch for each sample or two to one for each rank.
BUDGETS = (400, 150, 4096)
CASES = [(model, mesh) for model, meshes in MESHES.items() for mesh in meshes]


# What has adapters. Where ranks share key/value heads, query, key and value projections cannot.
TARGETS = {
    "dense-lora": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "moe-lora": ("o_proj", "gate_proj", "up_proj", "down_proj"),
}


def keys_of(model: str) -> dict[str, object]:
    return LORA | {"lora__targets": f"[{','.join(TARGETS[model])}]"} if model in TARGETS else {}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SmallRun]:
    return {name: make_small_run(tmp_path_factory.mktemp(name), make_model=make) for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def small(runs: dict[str, SmallRun]) -> SmallRun:
    return runs["dense"]


# One launch trains on all meshes in turn: minutes on two cores, many more where waking a process is slow.
pytestmark = pytest.mark.timeout(2000)
Outcome = tuple[list[dict[str, Any]], dict[str, Tensor]]


@pytest.fixture(scope="module")
def references(runs: dict[str, SmallRun], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Both models on one rank, with all samples of a step in one micro-batch."""
    root = tmp_path_factory.mktemp("references")
    outputs = {name: root / name for name in runs}
    whole = {"train__tokens_per_micro_batch": 4096, "objective__chunk_rows": 7}
    overrides = {name: runs[name].overrides(outputs[name], steps=STEPS, **{**whole, **keys_of(name)}) for name in runs}
    (weights,) = run_distributed(train_each, 1, overrides)
    return {name: (read_metrics(outputs[name]), weights[name]) for name in runs}


@pytest.fixture(scope="module")
def outcomes(runs: dict[str, SmallRun], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Every mesh, one after the other in the same four processes."""
    root = tmp_path_factory.mktemp("meshes")
    overrides = {}
    for number, (model, mesh) in enumerate(CASES):
        settings = dict(MESHES[model][mesh])
        keys: dict[str, object] = {"train__tokens_per_micro_batch": BUDGETS[number % len(BUDGETS)]}
        keys["model__recompute"] = settings.pop("recompute", "none")
        keys |= {f"parallel__{key}": value for key, value in settings.items()} | keys_of(model)
        overrides[mesh] = runs[model].overrides(root / mesh, steps=STEPS, **keys)
    weights = run_distributed(train_each, 4, overrides, timeout=1900.0)[0]
    return {mesh: (read_metrics(root / mesh), weights[mesh]) for _, mesh in CASES}


def train_each(overrides: dict[str, list[str]]) -> dict[str, dict[str, Tensor]]:
    """Train as each list of overrides says; the final weights, by Hugging Face name."""
    from opsd_megatron.models.export import export_hf_weights
    from opsd_megatron.trainer.setup import build_trainer, check_inputs

    weights = {}
    for name, settings in overrides.items():
        config = compose_config(settings)
        trainer = build_trainer(config, check_inputs(config))
        trainer.run()
        exported = export_hf_weights(trainer.trainable.modules, trainer.spec, trainer.dims)
        weights[name] = {tensor_name: tensor.clone() for tensor_name, tensor in exported}
        trainer.dims.destroy()
        del trainer
        gc.collect()
    return weights


@pytest.mark.parametrize("model", MODELS)
def test_reference_run_learns(references: dict[str, Outcome], runs: dict[str, SmallRun], model: str) -> None:
    from safetensors.torch import load_file

    lines, weights = references[model]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["grad_norm"] > 0 for line in lines)
    # Batches of different steps hold different problems, so the ends are compared over several steps.
    assert sum(line["divergence"] for line in lines[-3:]) < sum(line["divergence"] for line in lines[:3])
    # Weights that moved by far more than what meshes may differ by, but for experts that no token went to.
    initial = load_file(runs[model].model / "model.safetensors")
    if model in TARGETS:
        frozen = [name for name in initial if name.split(".")[-2] not in TARGETS[model]]
        assert frozen and all(torch.equal(weights[name], initial.pop(name)) for name in frozen)
    still = [name for name, tensor in initial.items() if (weights[name] - tensor).norm() < 20 * 1e-4 * tensor.norm()]
    assert all(".experts." in name for name in still) and len(still) < len(initial) // 4


@pytest.mark.parametrize(("model", "mesh"), CASES, ids=[f"{model}-{mesh}" for model, mesh in CASES])
def test_mesh_invariance(references: dict[str, Outcome], outcomes: dict[str, Outcome], model: str, mesh: str) -> None:
    (lines, weights), (expected_lines, expected_weights) = outcomes[mesh], references[model]
    assert len(lines) == STEPS
    for line, expected in zip(lines, expected_lines, strict=True):
        assert line["tokens"] == expected["tokens"]
        for key in ("loss", "divergence", "grad_norm"):
            assert line[key] == pytest.approx(expected[key], rel=1e-4), (line["step"], key)
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        assert (weights[name] - tensor).norm() <= 1e-4 * tensor.norm(), name


def test_bf16_trains_close_to_float32(small: SmallRun, references: dict[str, Outcome], tmp_path: Path) -> None:
    """bf16 weights and activations with float32 reductions: the first step agrees to bf16's two to three digits."""
    output = tmp_path / "run"
    keys = {"parallel__tensor": 2, "parallel__sequence": True, "model__dtype": "bfloat16"}
    run_distributed(run, 2, small.overrides(output, steps=3, **keys))
    lines = read_metrics(output)
    assert lines[0]["loss"] == pytest.approx(references["dense"][0][0]["loss"], rel=0.05)
    assert lines[0]["grad_norm"] == pytest.approx(references["dense"][0][0]["grad_norm"], rel=0.05)
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_a_run_that_blows_up_says_so(small: SmallRun, tmp_path: Path) -> None:
    output = tmp_path / "run"
    huge = {"optimizer__lr": 1e30, "optimizer__clip_grad": 0}
    with pytest.raises(AssertionError, match=r"TrainingError: step \d: .*Lower optimizer\.lr"):
        run_distributed(run, 1, small.overrides(output, steps=4, **huge))


def test_equal_prompts_and_weights_give_nothing_to_learn(small: SmallRun, tmp_path: Path) -> None:
    """A live teacher that sees the student's prompt is the student: loss and gradient are exactly zero."""
    output = tmp_path / "run"
    same = {"teacher__policy": "live", "data__privileged": "none", "data__teacher_thinking": False}
    run_distributed(run, 2, small.overrides(output, steps=2, parallel__tensor=2, **same))
    for line in read_metrics(output):
        assert line["loss"] == 0.0
        assert line["divergence"] == 0.0
        assert line["grad_norm"] == 0.0


def test_frozen_teacher_without_a_reference_starts_at_zero_and_stays_there(small: SmallRun, tmp_path: Path) -> None:
    output = tmp_path / "run"
    same = {"data__privileged": "none", "data__teacher_thinking": False}
    run_distributed(run, 1, small.overrides(output, steps=3, **same))
    assert [line["grad_norm"] for line in read_metrics(output)] == [0.0, 0.0, 0.0]
