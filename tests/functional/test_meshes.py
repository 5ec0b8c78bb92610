"""One batch, one trajectory: losses and gradient norms do not depend on the mesh, nor on how a batch is split.

With scripted rollouts every mesh trains on the same tokens from the same weights, so ten steps must agree to rounding.
What this does not cover: the sampled tokens themselves, which depend on the engine (test_engine.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from opsd_megatron.train import run
from tests.distributed import run_distributed
from tests.functional.runs import SmallRun, make_small_run, read_metrics

STEPS = 10


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return make_small_run(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def reference(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    output = tmp_path_factory.mktemp("reference") / "run"
    run_distributed(run, 1, small.overrides(output, steps=STEPS))
    return read_metrics(output)


def test_reference_run_learns(reference: list[dict[str, float]]) -> None:
    assert [line["step"] for line in reference] == list(range(1, STEPS + 1))
    assert all(line["grad_norm"] > 0 for line in reference)
    # Batches of different steps hold different problems, so the ends are compared over several steps.
    assert sum(line["divergence"] for line in reference[-3:]) < sum(line["divergence"] for line in reference[:3])


@pytest.mark.parametrize(
    ("tensor", "pipeline", "data", "keys"),
    [
        (2, 1, 1, {}),
        (2, 1, 1, {"parallel__sequence": True, "parallel__distributed_optimizer": False}),
        (1, 2, 1, {"model__recompute": "full"}),
        (1, 1, 2, {"train__tokens_per_micro_batch": 150}),
        (2, 2, 1, {}),
        (1, 2, 1, {"parallel__virtual_stages": 2, "train__tokens_per_micro_batch": 250}),
        (1, 3, 1, {}),
        (1, 1, 1, {"train__tokens_per_micro_batch": 4096, "objective__chunk_rows": 7}),
    ],
    ids=[
        "tp2",
        "tp2-sp-plain-optimizer",
        "pp2-recompute",
        "dp2-small-micro-batches",
        "tp2-pp2",
        "pp2-vpp2",
        "pp3-uneven",
        "one-micro-batch",
    ],
)
def test_mesh_invariance(
    small: SmallRun,
    reference: list[dict[str, float]],
    tmp_path: Path,
    tensor: int,
    pipeline: int,
    data: int,
    keys: dict[str, object],
) -> None:
    output = tmp_path / "run"
    mesh = {"parallel__tensor": tensor, "parallel__pipeline": pipeline}
    run_distributed(run, tensor * pipeline * data, small.overrides(output, steps=STEPS, **mesh, **keys), timeout=240.0)
    lines = read_metrics(output)
    assert len(lines) == STEPS
    for line, expected in zip(lines, reference, strict=True):
        assert line["tokens"] == expected["tokens"]
        for key in ("loss", "divergence", "grad_norm"):
            assert line[key] == pytest.approx(expected[key], rel=1e-4), (line["step"], key)


def test_bf16_trains_close_to_float32(small: SmallRun, reference: list[dict[str, float]], tmp_path: Path) -> None:
    """bf16 weights and activations with float32 reductions: the first step agrees to bf16's two to three digits."""
    output = tmp_path / "run"
    keys = {"parallel__tensor": 2, "parallel__sequence": True, "model__dtype": "bfloat16"}
    run_distributed(run, 2, small.overrides(output, steps=3, **keys))
    lines = read_metrics(output)
    assert lines[0]["loss"] == pytest.approx(reference[0]["loss"], rel=0.05)
    assert lines[0]["grad_norm"] == pytest.approx(reference[0]["grad_norm"], rel=0.05)
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
