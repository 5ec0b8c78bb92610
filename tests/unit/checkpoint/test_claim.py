"""Who may write to an ``output_dir``."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import torch.distributed as dist

from opsd_megatron.checkpoint.claim import claim_output_dir
from opsd_megatron.errors import CheckpointError
from tests.distributed import run_distributed


def claimed(output_dirs: list[Path]) -> str:
    try:
        claim_output_dir(output_dirs[dist.get_rank()]).release()
    except CheckpointError as error:
        return str(error)
    return ""


def test_all_ranks_have_to_share_it(tmp_path: Path) -> None:
    assert run_distributed(claimed, 2, [tmp_path / "run"] * 2) == ["", ""]
    own = [tmp_path / "node_0/run", tmp_path / "node_1/run"]
    for rank, problem in enumerate(run_distributed(claimed, 2, own)):
        assert problem == (
            f"rank 1 does not see what rank 0 writes to output_dir={own[rank]}: it must be on a file system that all "
            "ranks share"
        )


def hold(output_dir: Path, ready: Connection) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    claim = claim_output_dir(output_dir)
    ready.send(os.getpid())
    signal.pause()
    claim.release()


def test_another_job_is_kept_out_until_the_first_one_ends_however_it_does(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, theirs = context.Pipe(duplex=False)
    process = context.Process(target=hold, args=(tmp_path, theirs))
    process.start()
    try:
        pid = ready.recv()
        (problem,) = run_distributed(claimed, 1, [tmp_path])
        assert problem.startswith(f"output_dir={tmp_path} is in use by process {pid} on ")
        assert problem.endswith(": wait for its end, or choose another")
    finally:
        process.kill()
        process.join()
    assert run_distributed(claimed, 1, [tmp_path]) == [""]


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    (problem,) = run_distributed(claimed, 1, [tmp_path / "run"])
    assert problem.startswith(f"output_dir={tmp_path}/run cannot be written: ")
