"""A job that is told to stop, and one in which a rank dies, as torchrun sees them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opsd_megatron.train import run
from tests.distributed import run_distributed
from tests.functional.runs import SmallRun, make_small_run
from tests.functional.test_resume import trajectory

ROOT = Path(__file__).resolve().parents[2]

# In step 3 rank 1 tells torchrun's agent to stop, and goes on once torchrun has passed that on to it. Rank 0 may learn
# of it in that step or later.
SIGNALLED = """
import os, signal, time
from opsd_megatron.trainer.trainer import Trainer
plain = Trainer._step
def step(self, timer):
    if self.completed == 2 and self.dims.rank == 1:
        os.kill(os.getppid(), signal.SIGTERM)
        while not self.interruption.number:
            time.sleep(0.01)
    return plain(self, timer)
Trainer._step = step
"""
# In step 2 rank 1 has a defect, while rank 0 waits for it in a collective.
BROKEN = """
from opsd_megatron.trainer import trainer
plain = trainer.optimizer_step
def step(trainable, objective, micro_batches, targets, dims, **rest):
    if dims.rank == 1 and trainable.scheduler.num_steps == 1:
        raise RuntimeError("a defect of rank 1")
    return plain(trainable, objective, micro_batches, targets, dims, **rest)
trainer.optimizer_step = step
"""
PROGRAM = "\nfrom opsd_megatron import train\ntrain.leave(train.main())\n"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return make_small_run(tmp_path_factory.mktemp("small"))


def torchrun(script: Path, changed: str, overrides: list[str]) -> subprocess.CompletedProcess[str]:
    """Two ranks under a real agent, with the program changed as a test needs it."""
    script.write_text(changed + PROGRAM)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, str(script), *overrides], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )


def test_a_job_told_to_stop_saves_and_goes_on_as_if_it_had_not(small: SmallRun, tmp_path: Path) -> None:
    """The signal comes in mid-step, where no checkpoint is due before the end."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    keys: dict[str, object] = {"parallel__tensor": 2, "checkpoint__every": 0, "checkpoint__at_end": True}
    stopped = torchrun(tmp_path / "signalled.py", SIGNALLED, small.overrides(parted, steps=5, **keys))
    assert stopped.returncode != 0
    assert "SIGTERM: stopped after step 3 of 5, which is saved; checkpoint.resume=true goes on" in stopped.stderr
    assert [path.name for path in (parted / "checkpoints").iterdir()] == ["step_3"]
    resumed = small.overrides(parted, steps=5, checkpoint__resume=True, **keys)
    run_distributed(_run_both, 2, resumed, small.overrides(whole, steps=5, **keys))
    starts = json.loads((parted / "environment.json").read_text())
    assert [(start["completed_steps"], start["world_size"]) for start in starts] == [(0, 2), (3, 2)]
    assert trajectory(parted) == trajectory(whole)
    assert _tensors(parted / "checkpoints/step_5") == _tensors(whole / "checkpoints/step_5")


def _run_both(first: list[str], second: list[str]) -> None:
    """One launch for two runs, since importing what they need takes longer than they do."""
    from megatron.core import parallel_state

    run(first)
    parallel_state.destroy_model_parallel()
    run(second)


def _tensors(checkpoint: Path) -> dict[str, bytes]:
    """The files that hold a checkpoint's tensors."""
    found = {path.name: path.read_bytes() for path in checkpoint.glob("*.distcp")}
    assert found
    return found


def test_a_rank_that_dies_in_mid_step_ends_the_job(small: SmallRun, tmp_path: Path) -> None:
    overrides = small.overrides(tmp_path / "run", steps=3, parallel__tensor=2)
    broken = torchrun(tmp_path / "broken.py", BROKEN, overrides)
    assert broken.returncode != 0
    assert "rank 1:\nTraceback (most recent call last):" in broken.stderr
    assert "RuntimeError: a defect of rank 1" in broken.stderr
