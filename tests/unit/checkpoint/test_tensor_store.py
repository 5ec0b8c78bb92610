"""Tensors of torch_dist checkpoints without a model: any region from any chunks, and damage by name."""

from __future__ import annotations

import errno
import random
import resource
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opsd_megatron.checkpoint.tensor_store import Chunk, TensorStore, write_chunks
from opsd_megatron.errors import CheckpointError
from tests.distributed import run_distributed

SHAPE = (3, 7, 5)


def tensor() -> Tensor:
    return torch.arange(105, dtype=torch.float32).reshape(SHAPE).to(torch.bfloat16)


def cut(full: Tensor, *edges: tuple[int, ...], name: str = "a") -> list[Chunk]:
    """``full`` in chunks between ``edges`` of every dimension."""
    runs = [list(pairwise(edge)) for edge in edges]
    chunks = []
    for box in product(*runs):
        part = full[tuple(slice(*run) for run in box)]
        offset, size = tuple(run[0] for run in box), tuple(part.shape)
        chunks.append(Chunk(name, tuple(full.shape), full.dtype, offset, size, part.contiguous))
    return chunks


@pytest.mark.parametrize(
    "edges",
    [
        ((0, 3), (0, 7), (0, 5)),
        ((0, 1, 2, 3), (0, 7), (0, 5)),
        ((0, 1, 2, 3), (0, 3, 7), (0, 5)),
        ((0, 1, 2, 3), (0, 7), (0, 2, 5)),
        ((0, 2, 3), (0, 6, 7), (0, 1, 2, 5)),
    ],
)
def test_regions_of_any_chunks(tmp_path: Path, edges: tuple[tuple[int, ...], ...]) -> None:
    full, scalar = tensor(), torch.tensor(2.5)
    write_chunks(
        tmp_path, [*cut(full, *edges), *cut(full[0], (0, 6, 7), (0, 5), name="b"), *cut(scalar, name="scalar")]
    )
    store = TensorStore(tmp_path)
    assert store.names() == ["a", "b", "scalar"] and "a" in store and "c" not in store
    assert (store.shape("a"), store.dtype("a")) == (SHAPE, torch.bfloat16)
    bounds = [[(start, stop) for stop in range(size + 1) for start in range(stop)] for size in SHAPE]
    for box in random.Random(0).sample(list(product(*bounds)), 300):
        region = store.read("a", [run[0] for run in box], [stop - start for start, stop in box])
        assert torch.equal(region, full[tuple(slice(*run) for run in box)])
        assert region.untyped_storage().nbytes() == region.nbytes  # nothing else is kept alive
    assert torch.equal(store.read("b", (6, 1), (1, 2)), full[0, 6:, 1:3])
    assert torch.equal(store.read("b", (5, 0), (2, 5)), full[0, 5:])
    assert torch.equal(store.read("scalar", (), ()), scalar)


def test_runs_of_rows_follow_the_chunks(tmp_path: Path) -> None:
    write_chunks(
        tmp_path,
        [*cut(tensor(), (0, 1, 2, 3), (0, 3, 6, 7), (0, 2, 5)), *cut(tensor()[0], (0, 4, 7), (0, 5), name="b")],
    )
    store = TensorStore(tmp_path)
    assert store.row_runs("a", (1,), range(7)) == [range(3), range(3, 6), range(6, 7)]
    assert store.row_runs("a", (1,), range(1, 5)) == [range(1, 3), range(3, 5)]
    assert store.row_runs("b", (), range(6)) == [range(4), range(4, 6)]


def test_a_chunk_of_another_type_than_listed_is_named(tmp_path: Path) -> None:
    write_chunks(tmp_path, cut(tensor(), (0, 3), (0, 7), (0, 5)))
    store = TensorStore(tmp_path)
    store._tensors["a"].properties.dtype = torch.float32
    with pytest.raises(CheckpointError, match=r"holds \(3, 7, 5\) torch\.bfloat16, not \(3, 7, 5\) torch\.float32 as"):
        store.read("a", (0, 0, 0), SHAPE)


def test_megatron_core_loads_it(tmp_path: Path) -> None:
    write_chunks(tmp_path, cut(tensor(), (0, 1, 2, 3), (0, 3, 7), (0, 5)))
    assert run_distributed(load_with_megatron_core, 2, tmp_path) == [True, True]


def load_with_megatron_core(folder: Path) -> bool:
    """Whether every layer comes back, cast to what is asked for."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    rank, full = torch.distributed.get_rank(), tensor()
    request = {
        str(layer): ShardedTensor.from_rank_offsets(
            "a", torch.zeros(7, 5), (0, layer, 3), prepend_axis_num=1, replica_id=rank
        )
        for layer in range(3)
    }
    loaded = dist_checkpointing.load(request, str(folder))
    return all(torch.equal(loaded[str(layer)], full[layer].float()) for layer in range(3))


def test_what_megatron_core_saved(tmp_path: Path) -> None:
    run_distributed(save_with_megatron_core, 2, tmp_path)
    store = TensorStore(tmp_path)
    assert store.names() == ["a"] and store.shape("a") == (3, 14, 5)
    full = tensor()
    for layer in range(3):
        expected = torch.cat([full[layer], full[layer] + 1])
        assert torch.equal(store.read("a", (layer, 0, 0), (1, 14, 5))[0], expected)
        assert torch.equal(store.read("a", (layer, 5, 1), (1, 4, 2))[0], expected[5:9, 1:3])


def save_with_megatron_core(folder: Path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    from opsd_megatron.distributed.cpu import install_cpu_stand_ins

    install_cpu_stand_ins()
    rank, full = torch.distributed.get_rank(), tensor()
    state = {
        str(layer): ShardedTensor.from_rank_offsets(
            "a", full[layer] + rank, (0, layer, 3), (1, rank, 2), prepend_axis_num=1
        )
        for layer in range(3)
    }
    dist_checkpointing.save(state, str(folder))


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def cut_file(file: Path, at: int) -> None:
    file.write_bytes(file.read_bytes()[:at])


@pytest.mark.parametrize("damage", [flip, cut_file])
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path, int], None]) -> None:
    big = torch.arange(1000.0).reshape(10, 100)
    write_chunks(tmp_path, [*cut(big, (0, 5, 10), (0, 100), name="big"), *cut(tensor(), (0, 3), (0, 7), (0, 5))])
    file = tmp_path / "__0_0.distcp"
    # The bytes of the number 750, in the second chunk of the first tensor.
    damage(file, file.read_bytes().index(torch.arange(740.0, 760.0).numpy().tobytes()) + 40)
    store = TensorStore(tmp_path)
    assert torch.equal(store.read("big", (0, 0), (5, 100)), big[:5])
    with pytest.raises(CheckpointError, match=rf"{file}: tensor big at \(5, 0\) is damaged"):
        store.read("big", (0, 0), (10, 100))


@pytest.mark.parametrize("exhaust", [lambda: bytes(2**60), lambda: torch.empty(2**60)])
def test_memory_that_runs_out_is_not_called_damage(
    exhaust: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_chunks(tmp_path, cut(tensor(), (0, 3), (0, 7), (0, 5)))
    monkeypatch.setattr(torch, "load", lambda *_, **__: exhaust())
    with pytest.raises((MemoryError, RuntimeError)):  # no CheckpointError
        TensorStore(tmp_path).read("a", (0, 0, 0), SHAPE)


def test_a_missing_file_and_a_missing_list_are_named(tmp_path: Path) -> None:
    write_chunks(tmp_path, cut(tensor(), (0, 3), (0, 7), (0, 5)))
    store = TensorStore(tmp_path)
    (tmp_path / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: tensor a at \(0, 0, 0\) is damaged: .*No such file"):
        store.read("a", (0, 0, 0), (1, 1, 1))
    (tmp_path / ".metadata").write_bytes(b"\x07" * 100)
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read"):
        TensorStore(tmp_path)


def test_chunks_that_leave_a_gap_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="60 of"):
        write_chunks(tmp_path, cut(tensor(), (0, 3), (0, 4), (0, 5)))
    assert not list(tmp_path.iterdir())


def test_errors_of_reading_and_writing_come_out_as_they_are(tmp_path: Path) -> None:
    def broken() -> Tensor:
        raise CheckpointError("this one")

    def unreadable() -> Tensor:
        raise CheckpointError("this one") from OSError(errno.EIO, "Input/output error")

    for read in (broken, unreadable):
        with pytest.raises(CheckpointError, match="this one"):
            write_chunks(tmp_path, [Chunk("a", (1,), torch.float32, (0,), (1,), read)])
    assert run_distributed(write_beyond_the_limit, 1, tmp_path) == [errno.EFBIG]


def write_beyond_the_limit(folder: Path) -> int | None:
    """The error where the system refuses to let files grow, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    try:
        write_chunks(folder, cut(torch.ones(1 << 20), (0, 1 << 19, 1 << 20)))
    except OSError as error:
        return error.errno
    return None
