"""What is written to a file system that is full, at any point of the writing: real ones, of some megabytes.

Whatever fits and whatever does not, there is one error that names the directory, nothing is left that looks finished,
and with room made the same call succeeds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from opsd_megatron.checkpoint.compare import compare_tensors
from opsd_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf
from opsd_megatron.checkpoint.record import latest_checkpoint
from opsd_megatron.errors import CheckpointError, OutputError
from opsd_megatron.telemetry.files import write_atomically
from opsd_megatron.telemetry.metrics import MetricsWriter
from tests.distributed import run_distributed
from tests.small_disk import files_on, leave_free, small_disk, without_free_space
from tests.tiny import make_tiny_qwen3
from tests.unit.checkpoint.mesh import Mesh, run_on, stored

SIZE = 16 * 2**20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3(tmp_path_factory.mktemp("model"), num_layers=2)


def bytes_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def rooms(needed: int) -> list[int]:
    """Free bytes that end the writing at its beginning, in its middle and near its end."""
    return [0, 16_384, needed // 2, needed - 8192]


def save_when_full(source: Path, disk: Path) -> list[str]:
    """Save once, then with too little room again and again; the messages. At last save with room."""
    messages = []
    with run_on(Mesh(tp=2), source) as run:
        run.steps(1, 1)
        run.save(disk / "step_1", 1)
        for free in rooms(bytes_of(disk / "step_1")):
            if run.dims.rank == 0:
                leave_free(disk, free)
            torch.distributed.barrier()
            try:
                run.save(disk / "step_2", 2)
            except CheckpointError as error:
                messages.append(str(error))
            torch.distributed.barrier()
            assert files_on(disk) == ["step_1"] and latest_checkpoint(disk) == disk / "step_1"
            torch.distributed.barrier()
        if run.dims.rank == 0:
            leave_free(disk, SIZE)
        torch.distributed.barrier()
        run.save(disk / "step_2", 2)
        first, second = stored(disk / "step_1"), stored(disk / "step_2")
        assert all(torch.equal(first[name], second[name]) for name in first)
    return messages


def test_a_checkpoint_that_does_not_fit(source: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", SIZE) as disk:
        ranks = run_distributed(save_when_full, 2, source, disk)
        assert latest_checkpoint(disk) == disk / "step_2"
    told = [[without_free_space(message) for message in messages] for messages in ranks]
    assert told[0] == told[1] and len(told[0]) == len(rooms(SIZE))
    for message in ranks[0]:
        assert message.startswith(f"cannot write {disk / 'step_2'}: ") and "\n" not in message
        assert "No space left on device (" in message and f"GB are free in the file system at {disk})" in message
        assert "nothing was left there" in message
    assert "Make room there; checkpoint.resume=true then goes on from the newest" in ranks[0][-1]


def test_conversions_that_do_not_fit(source: Path, tmp_path: Path) -> None:
    converted, exported = tmp_path / "converted", tmp_path / "exported"
    hf_to_megatron(source, converted)
    megatron_to_hf(converted, exported)
    writes: list[tuple[Path, Callable[[Path], None]]] = [
        (converted, lambda output: hf_to_megatron(source, output)),
        (exported, lambda output: megatron_to_hf(converted, output)),
        (exported, lambda output: megatron_to_hf(converted, output, max_shard_bytes=100_000)),
    ]
    with small_disk(tmp_path / "disk", SIZE) as disk:
        for expected, write in writes:
            for free in rooms(bytes_of(expected)):
                leave_free(disk, free)
                with pytest.raises(CheckpointError) as raised:
                    write(disk / "output")
                message = str(raised.value)
                assert message.startswith(f"cannot write {disk / 'output'}: No space left on device (")
                assert f"are free in the file system at {disk}); nothing was left there" in message
                assert files_on(disk) == []
        leave_free(disk, SIZE)
        hf_to_megatron(source, disk / "megatron")
        megatron_to_hf(disk / "megatron", disk / "hf")
        assert compare_tensors(disk / "hf", disk / "megatron")[1] == []


def test_lines_that_do_not_fit(tmp_path: Path) -> None:
    rollouts = "a rollout of many tokens\n" * 1000
    with small_disk(tmp_path / "disk", SIZE) as disk:
        writer = MetricsWriter(disk / "metrics.jsonl")
        write_atomically(disk / "rollouts" / "step_1.jsonl", [rollouts])
        writer.write({"step": 1})
        leave_free(disk, 0)
        full = rf"No space left on device \(.* GB are free in the file system at {disk}\)"
        with pytest.raises(OutputError, match=rf"^cannot write {disk}/rollouts/step_2.jsonl: {full}; check"):
            write_atomically(disk / "rollouts" / "step_2.jsonl", [rollouts])
        with pytest.raises(OutputError, match=rf"^cannot write {writer.path}: {full}; check"):
            writer.write({"step": 2, "text": "x" * 10_000})
        with suppress(OutputError):
            writer.close()
        leave_free(disk, SIZE)
        assert files_on(disk / "rollouts") == ["step_1.jsonl"]
        # A run that goes on after step 1 finds its line whole and the cut one out of the way.
        resumed = MetricsWriter(writer.path, resume_step=1)
        resumed.write({"step": 2})
        resumed.close()
        assert writer.path.read_text() == '{"step": 1}\n{"step": 2}\n'
