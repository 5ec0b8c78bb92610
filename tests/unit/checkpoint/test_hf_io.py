"""Safetensors directories: what is read equals what the safetensors library reads, and damage is named."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from opsd_megatron.checkpoint import hf_writer
from opsd_megatron.checkpoint.atomic import begin, temporary_for
from opsd_megatron.checkpoint.hf_io import SafetensorsReader
from opsd_megatron.checkpoint.hf_writer import TensorPieces, parse_size, write_hf_directory
from opsd_megatron.errors import CheckpointError, ConfigError, ModelError


def _tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(6, 4, generator=generator),
        "a.weight": torch.randn(5, 3, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "ids": torch.arange(7),
        'long name with "quotes" and é': torch.randn(2, 2, 2, generator=generator),
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory with everything that travels along and some that must not."""
    path = tmp_path / "source"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "qwen3",   "torch_dtype": "float32"}')
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE"):
        (path / name).write_text(f"the {name}")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool.jinja").write_text("tool")
    for name in ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", ".gitattributes"):
        (path / name).write_text("must not travel")
    return path


def _write_index(path: Path, weight_map: dict[str, str]) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_reader_equals_the_library(tmp_path: Path) -> None:
    tensors = _tensors()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    reader = SafetensorsReader(tmp_path)
    assert reader.names() == sorted(tensors)
    for name, tensor in tensors.items():
        assert name in reader and reader.shape(name) == tuple(tensor.shape) and reader.dtype(name) == tensor.dtype
        assert reader.file_of(name) == tmp_path / "model.safetensors"
        assert torch.equal(reader.get(name), tensor)


@pytest.mark.parametrize("rows", [slice(2, 4), slice(0, 6), slice(3, 3), slice(4, 100), slice(-2, None), slice(5, 2)])
def test_rows(tmp_path: Path, rows: slice) -> None:
    tensors = _tensors()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    reader = SafetensorsReader(tmp_path)
    for name in ("b.weight", "a.weight", "empty"):
        assert torch.equal(reader.get(name, rows), tensors[name][rows])
    with pytest.raises(ValueError, match="contiguous"):
        reader.get("b.weight", slice(0, 6, 2))


@pytest.mark.parametrize("columns", [slice(1, 3), slice(0, 4), slice(2, 2), slice(3, 100), slice(-2, None)])
def test_columns_are_read_without_the_others(tmp_path: Path, columns: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = _tensors()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    reader = SafetensorsReader(tmp_path)
    read = []

    def count(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        read.append(len(buffers[0]))
        return preadv(descriptor, buffers, offset)

    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", count)
    for name in ("b.weight", "a.weight"):
        read.clear()
        expected = tensors[name][:, columns]
        assert torch.equal(reader.get(name, columns=columns), expected)
        assert sum(read) == expected.numel() * expected.element_size()
    with pytest.raises(ValueError, match="whole matrix"):
        reader.get("scalar", columns=slice(0, 1))
    with pytest.raises(ValueError, match="whole matrix"):
        reader.get("b.weight", slice(0, 1), slice(0, 1))


def test_reads_shards_and_any_file_naming(tmp_path: Path) -> None:
    tensors = _tensors()
    parts = [dict(list(tensors.items())[:3]), dict(list(tensors.items())[3:])]
    for index, part in enumerate(parts):
        safetensors.torch.save_file(part, tmp_path / f"weights_{index}.safetensors")
    assert SafetensorsReader(tmp_path).names() == sorted(tensors)
    _write_index(tmp_path, {name: f"weights_{index}.safetensors" for index, part in enumerate(parts) for name in part})
    reader = SafetensorsReader(tmp_path)
    assert reader.names() == sorted(tensors)
    assert all(torch.equal(reader.get(name), tensor) for name, tensor in tensors.items())


def test_missing_directory_and_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere is not a directory"):
        SafetensorsReader(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="holds no safetensors file"):
        SafetensorsReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"only as \.bin files"):
        SafetensorsReader(tmp_path)


def test_index_errors(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    _write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(ModelError, match=r"two\.safetensors is missing"):
        SafetensorsReader(tmp_path)
    _write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(ModelError, match=r"tensor b is not in .*one\.safetensors"):
        SafetensorsReader(tmp_path)
    safetensors.torch.save_file({"a": torch.ones(2), "b": torch.ones(1)}, tmp_path / "two.safetensors")
    _write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(ModelError, match=r"tensor a is both in .*one\.safetensors and in .*two\.safetensors"):
        SafetensorsReader(tmp_path)
    for text in ("not json", "[]", '{"weight_map": 3}', "{}"):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ModelError, match=r"index\.json is not a safetensors index"):
            SafetensorsReader(tmp_path)


def test_unknown_tensor(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="tensor b is in none of the safetensors files"):
        SafetensorsReader(tmp_path).get("b")


@pytest.mark.parametrize(
    "damage", ["cut data", "extra data", "cut header", "tiny", "noise header", "wrong offsets", "overlap"]
)
def test_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(_tensors(), file)
    data = file.read_bytes()
    header_size = int.from_bytes(data[:8], "little")
    damaged = {
        "cut data": data[:-5],
        "extra data": data + b"more",
        "cut header": data[: 8 + header_size // 2],
        "tiny": data[:5],
        "noise header": data[:8] + b"\xff" * header_size + data[8 + header_size :],
        "wrong offsets": data.replace(b'"shape":[6,4]', b'"shape":[5,4]'),
        "overlap": _with_offsets(data, "ids", "b.weight"),
    }[damage]
    assert damaged != data
    file.write_bytes(damaged)
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged") as raised:
        SafetensorsReader(tmp_path)
    assert len(str(raised.value)) < 300 + len(str(tmp_path))


def _with_offsets(data: bytes, name: str, other: str) -> bytes:
    """A file whose ``name`` is said to lie at the start of ``other``."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    begin, end = header[name]["data_offsets"]
    start = header[other]["data_offsets"][0]
    header[name]["data_offsets"] = [start, start + end - begin]
    written = json.dumps(header).encode()
    return len(written).to_bytes(8, "little") + written + data[8 + size :]


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(ModelError, match=r"a\.safetensors cannot be read \(No such file or directory\)"):
        SafetensorsReader(tmp_path)


def test_file_cut_while_open(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(100)}, file)
    reader = SafetensorsReader(tmp_path)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ModelError, match="ended 40 bytes early"):
        reader.get("a")


def test_write_single_file(tmp_path: Path, source: Path) -> None:
    tensors, output = _tensors(), tmp_path / "deep" / "output"
    write_hf_directory(output, iter(tensors.items()), source=source)
    loaded = safetensors.torch.load_file(output / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    travelled = {"config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE"}
    assert {file.name for file in output.iterdir()} == travelled | {"model.safetensors", "additional_chat_templates"}
    for name in travelled | {"additional_chat_templates/tool.jinja"}:
        assert (output / name).read_bytes() == (source / name).read_bytes()
    with safetensors.safe_open(output / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_write_shards(tmp_path: Path, source: Path) -> None:
    tensors = {f"t{index}": torch.full((10,), float(index)) for index in range(7)}
    output = tmp_path / "output"
    write_hf_directory(output, iter(tensors.items()), source=source, max_shard_bytes=80)
    names = [f"model-0000{index}-of-00004.safetensors" for index in (1, 2, 3, 4)]
    assert sorted(file.name for file in output.glob("*.safetensors")) == names
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 280 and list(index["weight_map"]) == sorted(tensors)
    for name in names:
        part = safetensors.torch.load_file(output / name)
        assert {key for key, file in index["weight_map"].items() if file == name} == part.keys()
    reader = SafetensorsReader(output)
    assert all(torch.equal(reader.get(name), tensor) for name, tensor in tensors.items())


def test_tensor_larger_than_a_shard_gets_its_own_file(tmp_path: Path, source: Path) -> None:
    tensors = {"small": torch.ones(2), "large": torch.ones(100), "last": torch.ones(2)}
    write_hf_directory(tmp_path / "output", iter(tensors.items()), source=source, max_shard_bytes=20)
    reader = SafetensorsReader(tmp_path / "output")
    assert len({reader.file_of(name) for name in tensors}) == 3


def test_a_full_header_starts_a_new_shard(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_writer, "_HEADER_ROOM", 1024)
    tensors = {f"model.layers.{index}.weight": torch.ones(1) for index in range(20)}
    write_hf_directory(tmp_path / "output", iter(tensors.items()), source=source)
    reader = SafetensorsReader(tmp_path / "output")
    assert reader.names() == sorted(tensors) and len({reader.file_of(name) for name in tensors}) > 1


def test_cast_and_config_dtype(tmp_path: Path, source: Path) -> None:
    tensors = {"a": torch.tensor([1.0, 1 / 3]), "ids": torch.arange(2)}
    write_hf_directory(tmp_path / "output", iter(tensors.items()), source=source, dtype=torch.bfloat16)
    reader = SafetensorsReader(tmp_path / "output")
    assert torch.equal(reader.get("a"), tensors["a"].to(torch.bfloat16)) and reader.dtype("ids") == torch.int64
    config = json.loads((tmp_path / "output" / "config.json").read_text())
    assert config == {"model_type": "qwen3", "torch_dtype": "bfloat16"}


def test_existing_output_is_untouched(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    write_hf_directory(output, iter({"a": torch.ones(1)}.items()), source=source)  # empty: may be used
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    with pytest.raises(CheckpointError, match="already exists"):
        write_hf_directory(output, iter({"a": torch.zeros(1)}.items()), source=source)
    assert before == {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    plain = tmp_path / "file"
    plain.write_text("mine")
    with pytest.raises(CheckpointError, match="already exists"):
        write_hf_directory(plain, iter({"a": torch.zeros(1)}.items()), source=source)
    assert plain.read_text() == "mine"


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failure_leaves_nothing(tmp_path: Path, source: Path, failure: BaseException) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.ones(10)
        raise failure

    output = tmp_path / "output"
    expected = CheckpointError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_hf_directory(output, tensors(), source=source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_leftover_of_a_killed_write_is_replaced_but_unknown_files_are_not(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "output"
    leftover = begin(output)
    (leftover / "part-00000").write_bytes(b"half a tensor")
    write_hf_directory(output, iter({"a": torch.ones(1)}.items()), source=source)
    assert not leftover.exists() and not (output / "part-00000").exists()

    mine = temporary_for(tmp_path / "other")
    mine.mkdir()
    (mine / "notes").write_text("mine")
    with pytest.raises(CheckpointError, match="in the way"):
        write_hf_directory(tmp_path / "other", iter({"a": torch.ones(1)}.items()), source=source)
    assert (mine / "notes").read_text() == "mine"


def test_source_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        write_hf_directory(tmp_path / "output", iter(()), source=tmp_path)
    assert not (tmp_path / "output").exists()


def test_duplicate_tensor(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ValueError, match="came twice"):
        write_hf_directory(tmp_path / "output", iter([("a", torch.ones(1)), ("a", torch.ones(1))]), source=source)


def test_pieces_are_written_one_after_the_other(tmp_path: Path, source: Path) -> None:
    full = torch.arange(30.0).reshape(10, 3)
    pieces = TensorPieces((10, 3), torch.float32, iter([full[:4], full[4:5], full[5:]]))
    write_hf_directory(tmp_path / "output", iter([("a", pieces), ("b", torch.ones(2))]), source=source)
    assert torch.equal(SafetensorsReader(tmp_path / "output").get("a"), full)
    short = TensorPieces((10, 3), torch.float32, iter([full[:4]]))
    with pytest.raises(ValueError, match=r"the pieces of tensor a do not make up \(10, 3\)"):
        write_hf_directory(tmp_path / "other", iter([("a", short)]), source=source)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("text", "size"), [("1000", 1000), ("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("4GiB", 4 * 2**30), ("2k", 2000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "5 apples", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size such as 5GB"):
        parse_size(text)
