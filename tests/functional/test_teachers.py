"""Every teacher in whole runs: what it is after some steps, that a resumed run goes on exactly, on real engines too."""

from __future__ import annotations

import gc
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opsd_megatron.checkpoint.convert import megatron_to_hf
from opsd_megatron.checkpoint.hf_io import SafetensorsReader
from opsd_megatron.checkpoint.tensor_store import TensorStore
from opsd_megatron.config.compose import compose_config
from opsd_megatron.errors import CheckpointError
from opsd_megatron.teacher.trust_region import TrustRegionTeacher
from opsd_megatron.trainer.setup import build_trainer, check_inputs
from tests.distributed import run_distributed
from tests.functional.runs import SmallRun, make_small_run, read_metrics
from tests.functional.test_resume import trajectory
from tests.tiny import make_tiny_qwen3, make_tiny_qwen3_moe

Weights = dict[str, Tensor]

EMA: dict[str, object] = {"teacher__policy": "ema", "teacher__ema_decay": 0.8}
# Saved after steps 2, 4 and 6: once as it was at first, once while it differs from the student.
REFRESH: dict[str, object] = {"teacher__policy": "refresh", "teacher__refresh_every": 3}
FOLLOWERS = {"ema": EMA, "refresh": REFRESH}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return make_small_run(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return make_small_run(tmp_path_factory.mktemp("moe"), make_model=make_tiny_qwen3_moe)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3(
        tmp_path_factory.mktemp("large"), num_layers=5, hidden_size=96, ffn=160, tied=False, vocab_size=300, seed=1
    )


def train_each(runs: dict[str, list[str]]) -> dict[str, bool]:
    """Train as each list of overrides says, one after the other; whether the teacher's own weights stayed as they were.

    With its weights the mark that they need a gradient has to stay: without it products are rounded otherwise.
    """
    stayed = {}
    for name, overrides in runs.items():
        config = compose_config(overrides)
        config.validate(torch.distributed.get_world_size())
        trainer = build_trainer(config, check_inputs(config))
        teacher = trainer.teacher
        chunks = teacher._initial._model if isinstance(teacher, TrustRegionTeacher) else teacher._model
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        assert parameters, name
        before = [parameter.detach().clone() for parameter in parameters]
        trainer.run()
        stayed[name] = all(p.requires_grad and torch.equal(p, kept) for p, kept in zip(parameters, before, strict=True))
        trainer.dims.destroy()
        del trainer, teacher, chunks, parameters
        gc.collect()
    return stayed


@pytest.fixture(scope="module")
def resumed(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of both followers over two data-parallel ranks: whole, and parted after step 4, then on two meshes."""
    root = tmp_path_factory.mktemp("resumed")
    runs = {}
    for name, keys in FOLLOWERS.items():
        saved: dict[str, object] = {"checkpoint__every": 2, "teacher__offload": name == "ema", **keys}
        runs[f"{name} whole"] = small.overrides(root / name / "whole", steps=6, **saved)
        runs[f"{name} parted"] = small.overrides(root / name / "parted", steps=4, **saved)
    run_distributed(train_each, 2, runs)
    runs = {}
    for name, keys in FOLLOWERS.items():
        shutil.copytree(root / name / "parted", root / name / "moved")
        saved = {"checkpoint__every": 2, "checkpoint__resume": True, **keys}
        runs[f"{name} parted"] = small.overrides(root / name / "parted", steps=6, **saved)
        runs[f"{name} moved"] = small.overrides(root / name / "moved", steps=6, parallel__tensor=2, **saved)
    run_distributed(train_each, 2, runs)
    return root


@pytest.mark.parametrize("name", FOLLOWERS)
def test_a_resumed_follower_is_the_one_that_never_stopped(resumed: Path, name: str) -> None:
    whole, parted, moved = (resumed / name / kind for kind in ("whole", "parted", "moved"))
    assert trajectory(parted) == trajectory(whole)
    kept, expected = teacher_tensors(parted / "checkpoints/step_6"), teacher_tensors(whole / "checkpoints/step_6")
    assert len(expected) == 38 and kept.keys() == expected.keys()
    assert all(torch.equal(kept[key], expected[key]) for key in expected)
    earlier = teacher_tensors(whole / "checkpoints/step_4")
    assert not any(torch.equal(earlier[key], expected[key]) for key in expected)
    for line, other in zip(read_metrics(moved), read_metrics(whole), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_a_checkpoint_with_a_teacher_is_one_of_the_student(resumed: Path, tmp_path: Path) -> None:
    """What it holds of the teacher is in nobody's way: it exports the student, whom the teacher is not."""
    checkpoint = resumed / "ema/whole/checkpoints/step_6"
    megatron_to_hf(checkpoint, tmp_path / "exported")
    exported, kept = SafetensorsReader(tmp_path / "exported"), teacher_tensors(checkpoint)
    weights = {name: exported.get(name) for name in exported.names()}
    # Query, key and value rows are one tensor there, of one key/value head after the other.
    for name in [name for name in weights if "q_proj" in name]:
        parts = [weights.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        heads = len(parts[1]) // len(weights[name.replace("q_proj", "k_norm")])
        rows = torch.cat([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 1)
        weights[name.replace("q_proj", "qkv_proj")] = rows
    assert {f"teacher.{name}" for name in weights} == kept.keys()
    for name, student in weights.items():
        teacher = kept[f"teacher.{name}"]
        assert teacher.shape == student.shape and not torch.equal(student, teacher)
        assert (teacher - student).norm() < 0.5 * student.norm()


def teacher_tensors(checkpoint: Path) -> Weights:
    """What a checkpoint keeps of the teacher, in full."""
    store = TensorStore(checkpoint)
    names = [name for name in store.names() if name.startswith("teacher.")]
    return {name: store.read(name, (0,) * len(store.shape(name)), store.shape(name)) for name in names}


def test_another_policys_checkpoint_is_refused_and_untouched(small: SmallRun, resumed: Path, large: Path) -> None:
    output = resumed / "ema/whole"
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    for keys, message in (
        ({}, r"teacher\.ema_decay was 0\.8, is None; teacher\.policy was 'ema', is 'frozen'"),
        (REFRESH, r"teacher\.policy was 'ema', is 'refresh'; teacher\.refresh_every was None, is 3"),
        ({**EMA, "teacher__ema_decay": 0.9}, r"teacher\.ema_decay was 0\.8, is 0\.9\)"),
        ({"teacher__policy": "separate", "teacher__path": large}, r"teacher\.weights was None"),
    ):
        config = compose_config(small.overrides(output, steps=8, checkpoint__resume=True, **keys))
        with pytest.raises(CheckpointError, match=message):
            check_inputs(config)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


Trajectory = list[dict[str, Any]]


@pytest.fixture(scope="module")
def others(
    small: SmallRun, moe: SmallRun, large: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Trajectory], dict[str, bool]]:
    """Short runs over two ranks: a separate teacher on several meshes, of and for experts, and the other policies."""
    root = tmp_path_factory.mktemp("others")
    experts = make_tiny_qwen3_moe(root / "experts", num_layers=2, hidden_size=80, expert_ffn=32, seed=2)
    separate: dict[str, object] = {"teacher__policy": "separate"}
    from_large, from_experts = {**separate, "teacher__path": large}, {**separate, "teacher__path": experts}
    two: dict[str, partial[list[str]]] = {
        name: partial(run.overrides, steps=2) for name, run in (("s", small), ("m", moe))
    }
    runs = {
        "large, dp": two["s"](root / "dp", teacher__offload=True, **from_large),
        "large, tp": two["s"](root / "tp", parallel__tensor=2, parallel__sequence=True, **from_large),
        "large, pp": two["s"](root / "pp", parallel__pipeline=2, parallel__virtual_stages=2, **from_large),
        "large, cp": two["s"](root / "cp", parallel__context=2, **from_large),
        "large for experts, dp": two["m"](root / "mdp", **from_large),
        "large for experts, ep": two["m"](root / "mep", parallel__expert=2, **from_large),
        "experts, dp": two["s"](root / "edp", **from_experts),
        "experts, tp": two["s"](root / "etp", parallel__tensor=2, parallel__sequence=True, **from_experts),
        "frozen": two["s"](root / "frozen"),
        "ema of an equal": two["s"](root / "equal", data__privileged="none", data__teacher_thinking=False, **EMA),
        "trust region": two["s"](root / "trust", teacher__policy="trust_region"),
        "ema of experts, dp": two["m"](root / "edm", **EMA),
        "ema of experts, ep": two["m"](root / "eem", parallel__expert=2, **EMA),
    }
    stayed = run_distributed(train_each, 2, runs)[0]
    lines = {}
    for name, overrides in runs.items():
        (output,) = (Path(text.removeprefix("output_dir=")) for text in overrides if text.startswith("output_dir="))
        lines[name] = read_metrics(output)
    return lines, stayed


def test_teachers_that_do_not_follow_keep_every_bit(others: tuple[dict[str, Trajectory], dict[str, bool]]) -> None:
    _, stayed = others
    assert {name for name, same in stayed.items() if not same} == {"ema of experts, dp", "ema of experts, ep"}


@pytest.mark.parametrize("name", ["large", "large for experts", "experts", "ema of experts"])
def test_a_teacher_is_the_same_on_every_mesh(others: tuple[dict[str, Trajectory], dict[str, bool]], name: str) -> None:
    lines = {mesh: of for mesh, of in others[0].items() if mesh.startswith(f"{name}, ")}
    expected = lines.pop(f"{name}, dp")
    assert lines and len(expected) == 2 and all(line["grad_norm"] > 0 for line in expected)
    for of in lines.values():
        for line, other in zip(of, expected, strict=True):
            for key in ("loss", "divergence", "teacher_entropy", "grad_norm"):
                assert line[key] == pytest.approx(other[key], rel=1e-4), key


def test_an_average_of_what_stays_is_what_stays(others: tuple[dict[str, Trajectory], dict[str, bool]]) -> None:
    """With the student's prompt it starts as the student, bit for bit, and there is nothing to learn."""
    assert [line["grad_norm"] for line in others[0]["ema of an equal"]] == [0.0, 0.0]
    assert others[1]["ema of an equal"]


def test_policies_differ_as_they_should(others: tuple[dict[str, Trajectory], dict[str, bool]]) -> None:
    """The trust region begins where the frozen teacher is, and holds the student less far from itself."""
    frozen, trust = others[0]["frozen"], others[0]["trust region"]
    assert trust[0]["divergence"] == pytest.approx(frozen[0]["divergence"], rel=1e-4)
    assert trust[1]["divergence"] < frozen[1]["divergence"] * (1 - 1e-3)
    assert others[0]["large, dp"][0]["divergence"] != pytest.approx(frozen[0]["divergence"], rel=1e-2)


def test_three_steps_on_real_engines(small: SmallRun, large: Path, tmp_path: Path) -> None:
    """Sampled by vLLM at TP 2; each policy's teacher has its say from the first step on, whatever it is shown."""
    policies: dict[str, dict[str, object]] = {
        "ema": EMA,
        "refresh": {**REFRESH, "teacher__refresh_every": 1},
        "separate": {"teacher__policy": "separate", "teacher__path": large},
        "live": {"teacher__policy": "live", "data__privileged": "shuffled"},
        "trust_region": {"teacher__policy": "trust_region", "data__privileged": "answer"},
    }
    shared: dict[str, object] = {
        "parallel__tensor": 2,
        "parallel__sequence": True,
        "rollout__kv_cache_gib": 0.1,
        "rollout__max_log_prob_gap": 1e-4,
        "train__problems_per_step": 4,
    }
    runs = {
        name: small.overrides(tmp_path / name, steps=3, scripted=False, **shared, **keys)
        for name, keys in policies.items()
    }
    stayed = run_distributed(train_each, 2, runs)[0]
    assert stayed == {"ema": False, "refresh": False, "separate": True, "live": False, "trust_region": True}
    for name in policies:
        lines = read_metrics(tmp_path / name)
        assert [line["policy_version"] for line in lines] == [0, 1, 2]
        assert all(line["divergence"] > 0 and line["grad_norm"] > 0 for line in lines)
