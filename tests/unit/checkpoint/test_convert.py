"""Conversion without a model: equal to what the trainer saves and loads, in little memory, and safe to kill."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from opsd_megatron.checkpoint import convert
from opsd_megatron.checkpoint.compare import compare_tensors
from opsd_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf
from opsd_megatron.checkpoint.hf_io import SafetensorsReader
from opsd_megatron.checkpoint.layout import find_slots
from opsd_megatron.checkpoint.record import hf_folder
from opsd_megatron.checkpoint.state import load_model_weights
from opsd_megatron.checkpoint.tensor_store import TensorStore, write_chunks
from opsd_megatron.errors import CheckpointError, ModelError
from opsd_megatron.models.families import read_spec
from tests.distributed import run_distributed
from tests.tiny import make_tiny_qwen3, make_tiny_qwen3_moe
from tests.unit.checkpoint.mesh import Mesh, run_on

ROOT = Path(__file__).parents[3]


def same(first: Path, second: Path) -> bool:
    ours, theirs = SafetensorsReader(first), SafetensorsReader(second)
    return ours.names() == theirs.names() and all(
        ours.dtype(name) == theirs.dtype(name) and torch.equal(ours.get(name), theirs.get(name))
        for name in ours.names()
    )


# 271 entries are padded to 272 at tp 2.
MODELS: dict[str, Callable[[Path], Path]] = {
    "tied": partial(make_tiny_qwen3, vocab_size=271),
    "untied": partial(make_tiny_qwen3, vocab_size=271, tied=False),
    "experts": partial(make_tiny_qwen3_moe, vocab_size=271, experts=4),
    "mixed": partial(make_tiny_qwen3_moe, vocab_size=271, experts=4, dense_layers=(1,)),
}
SAVING = {
    "tied": [Mesh(tp=2, pp=2), Mesh(pp=4), Mesh(tp=2, dtype="bfloat16")],
    "experts": [Mesh(tp=2, pp=2), Mesh(pp=2, ep=2), Mesh(tp=2, ep=2, dtype="bfloat16")],
}
SAVING |= {"untied": SAVING["tied"], "mixed": SAVING["experts"]}
LOADING = {name: meshes[:2] for name, meshes in SAVING.items()}


def with_the_trainer(root: Path) -> list[bool]:
    """Save a trained state on every mesh beside its weights; load what was converted; whether that was the model."""
    outcome = []
    for number, mesh in enumerate(SAVING[root.name]):
        with run_on(mesh, root / "model") as run:
            run.steps(1, 1)
            run.save(root / f"step_{number}")
            weights = run.exported()
            if torch.distributed.get_rank() == 0:
                torch.save(weights, root / f"exported-{number}")
    for mesh in LOADING[root.name]:
        with run_on(mesh, root / "model") as run:
            expected = run.exported()
        for name in ("whole", "parts"):
            with run_on(mesh, root / "model", weights=False) as run:
                load_model_weights(root / name, run.model)
                loaded = run.exported()
                outcome.append(
                    list(loaded) == list(expected) and all(torch.equal(loaded[name], expected[name]) for name in loaded)
                )
    return outcome


def with_all(roots: list[Path]) -> list[list[bool]]:
    return [with_the_trainer(root) for root in roots]


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Models of every kind, converted, and what the trainer made of them on four ranks."""
    base = tmp_path_factory.mktemp("models")
    roots = [base / name for name in MODELS]
    for root in roots:
        source = MODELS[root.name](root / "model")
        hf_to_megatron(source, root / "whole")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(convert, "_PART_BYTES", 5000)  # every matrix in several parts
            hf_to_megatron(source, root / "parts")
    assert run_distributed(with_all, 4, roots) == [[[True] * 4] * len(roots)] * 4
    return roots


def test_checkpoints_of_the_trainer_become_what_it_held(roots: list[Path], tmp_path: Path) -> None:
    for root in roots:
        for number in range(len(SAVING[root.name])):
            step, output = root / f"step_{number}", tmp_path / f"{root.name}-{number}"
            megatron_to_hf(step, output, max_shard_bytes=100_000)
            exported = torch.load(root / f"exported-{number}")
            reader = SafetensorsReader(output)
            assert reader.names() == sorted(exported)
            for name, tensor in exported.items():
                assert reader.dtype(name) == tensor.dtype and torch.equal(reader.get(name), tensor)
            assert len(list(output.glob("*.safetensors"))) > 3
            assert compare_tensors(output, step) == (len(exported), [])


def test_converted_checkpoints_are_as_the_trainer_s_but_in_parts(roots: list[Path], tmp_path: Path) -> None:
    for root in roots:
        # On this mesh, with tp 1, the vocabulary is not padded.
        saved = TensorStore(root / "step_1")
        weights = sorted(name for name in saved.names() if not name.startswith("optimizer."))
        for form in ("whole", "parts"):
            store = TensorStore(root / form)
            assert sorted(store.names()) == weights
            for name in weights:
                assert (store.shape(name), store.dtype(name)) == (saved.shape(name), saved.dtype(name))
            megatron_to_hf(root / form, tmp_path / root.name / form)
            assert same(root / "model", tmp_path / root.name / form)
        assert len(chunks(store, "embedding.word_embeddings.weight")) > 10
        if root.name == "mixed":
            assert len(chunks(store, "decoder.layers.1.self_attention.linear_qkv.weight")) == 2
            assert store.shape("decoder.layers.2.mlp.experts.experts.linear_fc1.weight") == (4, 96, 64)
        else:
            assert len(chunks(store, "decoder.layers.self_attention.linear_qkv.weight")) == 8
            assert store.shape("decoder.layers.self_attention.linear_qkv.weight") == (4, 256, 64)


def chunks(store: TensorStore, name: str) -> list[object]:
    return list(store._metadata.state_dict_metadata[name].chunks)


def test_layers_that_are_stored_apart(tmp_path: Path) -> None:
    """Megatron-Core's other form, for models whose layers differ."""
    from opsd_megatron.checkpoint.layout import slots
    from opsd_megatron.checkpoint.tensor_store import Chunk

    source = make_tiny_qwen3(tmp_path / "model", num_layers=2)
    hf_to_megatron(source, tmp_path / "stacked")
    store, spec = TensorStore(tmp_path / "stacked"), read_spec(source)
    apart = []
    for slot, one in zip(find_slots(store, spec), slots(spec, stacked=False), strict=True):
        size = (*(1 for _ in slot.index), *slot.shape)
        tensor = store.read(slot.name, (*slot.index, *(0 for _ in slot.shape)), size).reshape(slot.shape)
        apart.append(Chunk(one.name, slot.shape, tensor.dtype, tuple(0 for _ in slot.shape), slot.shape, tensor.clone))
    (tmp_path / "apart").mkdir()
    write_chunks(tmp_path / "apart", apart)
    assert "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight" in TensorStore(tmp_path / "apart")
    reader = SafetensorsReader(source)
    stored = dict(convert.stored_tensors(TensorStore(tmp_path / "apart"), spec))
    assert sorted(stored) == reader.names()
    for name, tensor in stored.items():
        assert torch.equal(torch.cat(list(tensor.pieces)), reader.get(name))


def damage_config(folder: Path, **values: int) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 3}, r"\.metadata lists tensor decoder\.layers\.\S+ with shape \(2, .* calls for \(3, "),
        ({"tie_word_embeddings": False}, r"\.metadata lists no tensor output_layer\.weight"),
        ({"vocab_size": 300}, r"lists tensor embedding\S+ with shape \(272, 64\), config\.json calls for \(300, 64\)"),
        ({"intermediate_size": 48}, r"\.linear_fc1\.weight with shape \(2, 192, 64\)"),
    ],
)
def test_checkpoints_of_another_model_are_refused(tmp_path: Path, values: dict[str, int], message: str) -> None:
    hf_to_megatron(make_tiny_qwen3(tmp_path / "model", num_layers=2), tmp_path / "megatron")
    damage_config(hf_folder(tmp_path / "megatron"), **values)
    with pytest.raises(CheckpointError, match=message):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_weights_that_the_model_does_not_have_are_named(tmp_path: Path) -> None:
    hf_to_megatron(make_tiny_qwen3(tmp_path / "model", num_layers=2, tied=False), tmp_path / "megatron")
    damage_config(hf_folder(tmp_path / "megatron"), tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"lists tensor output_layer\.weight, which config\.json does not"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")


def change(file: Path, name: str, action: Callable[[Tensor], Tensor]) -> None:
    """Replace a tensor of a safetensors file."""
    tensors = safetensors.torch.load_file(file)
    tensors[name] = action(tensors[name])
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["mlp.up", "self_attn.k", "mlp.down"])
def test_damaged_numbers_are_named_with_their_file(tmp_path: Path, kind: str) -> None:
    """Of several tensors that become one parameter, the one that is damaged."""
    source = make_tiny_qwen3(tmp_path / "model", num_layers=2, max_shard_size="100KB")
    name = f"model.layers.1.{kind}_proj.weight"
    file = SafetensorsReader(source).file_of(name)
    change(file, name, lambda tensor: tensor.index_fill(0, torch.tensor(3), torch.nan))
    with pytest.raises(ModelError) as raised:
        hf_to_megatron(source, tmp_path / "megatron")
    assert str(raised.value) == f"{file}: tensor {name} is damaged: it holds numbers that are NaN or infinite"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("kind", "first"),
    [("mlp.down", "model.layers.0.mlp.down_proj"), ("self_attn.k", "model.layers.0.self_attn.q_proj")],
)
def test_tensors_that_are_stored_as_one_are_of_one_type(tmp_path: Path, kind: str, first: str) -> None:
    """A layer's among those of all layers; a key projection beside the query's."""
    source = make_tiny_qwen3(tmp_path / "model", num_layers=2)
    file, layer = source / "model.safetensors", first.split(".")[2] if kind.endswith("k") else 1
    name = f"model.layers.{layer}.{kind}_proj.weight"
    change(file, name, Tensor.bfloat16)
    with pytest.raises(ModelError) as raised:
        hf_to_megatron(source, tmp_path / "megatron")
    assert str(raised.value) == (
        f"{file}: tensor {name} is torch.bfloat16, but {first}.weight, which is stored with it, torch.float32 in "
        f"{file}: pass --dtype float32 or bfloat16"
    )
    assert not (tmp_path / "megatron").exists()
    hf_to_megatron(source, tmp_path / "megatron", dtype=torch.float32)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert compare_tensors(source, tmp_path / "megatron")[1] == []
    change(file, name, lambda tensor: tensor.to(torch.float8_e4m3fn))
    with pytest.raises(ModelError, match=r"is torch\.float8_e4m3fn, which a checkpoint does not hold: pass --dtype"):
        hf_to_megatron(source, tmp_path / "eight")
    hf_to_megatron(source, tmp_path / "eight", dtype=torch.float32)
    assert compare_tensors(source, tmp_path / "eight")[1] == []


def test_a_head_that_is_not_the_tied_embedding_is_a_difference(tmp_path: Path) -> None:
    source = make_tiny_qwen3(tmp_path / "model", num_layers=2)
    file = source / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    assert "lm_head.weight" not in tensors
    hf_to_megatron(source, tmp_path / "megatron")
    head = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors | {"lm_head.weight": head}, file, metadata={"format": "pt"})
    assert compare_tensors(source, tmp_path / "megatron")[1] == []
    safetensors.torch.save_file(tensors | {"lm_head.weight": head + 1}, file, metadata={"format": "pt"})
    (difference,) = compare_tensors(source, tmp_path / "megatron")[1]
    assert difference.name == "lm_head.weight" and difference.reason == "not in the checkpoint"
    with pytest.raises(ModelError, match=r"tensor lm_head\.weight is not equal to model\.embed_tokens\.weight"):
        hf_to_megatron(source, tmp_path / "again")


def test_a_tensor_of_its_own_may_be_of_its_own_type(tmp_path: Path) -> None:
    source = make_tiny_qwen3(tmp_path / "model", num_layers=2, dtype=torch.bfloat16)
    change(source / "model.safetensors", "model.norm.weight", Tensor.float)
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert same(source, tmp_path / "back")


def test_an_empty_working_directory_is_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_tiny_qwen3(tmp_path / "model", num_layers=1)
    hf_to_megatron(source, tmp_path / "megatron")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    megatron_to_hf(tmp_path / "megatron", ".")
    assert same(source, tmp_path / "here")


def test_numbers_too_large_for_a_cast_are_errors(tmp_path: Path) -> None:
    source = make_tiny_qwen3(tmp_path / "model", num_layers=1)
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    safetensors.torch.save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(source, tmp_path / "megatron")
    with pytest.raises(ModelError, match=r"tensor model\.norm\.weight holds numbers too large for float16"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "half", dtype=torch.float16)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "brain", dtype=torch.bfloat16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["brain", "megatron", "model"]


def count_down(owner: Any, name: str, steps: int) -> None:
    """Let a method kill the process when it is called for the last of ``steps`` times."""
    method, left = getattr(owner, name), [steps]

    def counted(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **kwargs)

    setattr(owner, name, counted)


def die_and_repeat(
    conversion: Callable[[Path, Path], None], source: Path, output: Path
) -> list[tuple[int, bool, bool]]:
    """Convert in processes that are killed where the first, a middle and a late part is read, then to the end.

    Returns:
        Of each killed one: the signal, whether it had written something, whether ``output`` exists or can be used.
    """
    outcome, leftover = [], output.parent / f".{output.name}.tmp"
    for steps in (1, 9, 17):
        child = os.fork()
        if not child:
            count_down(SafetensorsReader if conversion is hf_to_megatron else TensorStore, METHODS[conversion], steps)
            conversion(source, output)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        usable = output.exists()
        for use in (hf_folder, SafetensorsReader):
            with contextlib.suppress(CheckpointError, ModelError):
                use(leftover)
                usable = True
        outcome.append((os.WTERMSIG(status), bool(list(leftover.iterdir())), usable))
    conversion(source, output)
    assert not leftover.exists()
    return outcome


METHODS = {hf_to_megatron: "get", megatron_to_hf: "read"}


def die_in_both_directions(root: Path) -> list[list[tuple[int, bool, bool]]]:
    return [
        die_and_repeat(hf_to_megatron, root / "model", root / "megatron"),
        die_and_repeat(megatron_to_hf, root / "megatron", root / "back"),
    ]


def test_a_killed_conversion_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    make_tiny_qwen3(tmp_path / "model", num_layers=2)
    (outcome,) = run_distributed(die_in_both_directions, 1, tmp_path)
    assert outcome == [[(signal.SIGKILL, True, False)] * 3] * 2
    assert same(tmp_path / "model", tmp_path / "back")


BOUNDED = """
import resource
import sys
from pathlib import Path
from opsd_megatron.checkpoint.compare import compare_tensors
from opsd_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf

ROOM = 64 * 2**20

def bounded(action, *arguments):
    data = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (data + ROOM, resource.RLIM_INFINITY))
    try:
        bytearray(2 * ROOM)
        sys.exit("nothing bounds the memory")
    except MemoryError:
        action(*arguments)
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

model, megatron, back = map(Path, sys.argv[1:])
hf_to_megatron(model.parent / "small", megatron.parent / "warm-up")  # what is imported on the way
bounded(hf_to_megatron, model, megatron)
bounded(megatron_to_hf, megatron, back)
bounded(compare_tensors, model, megatron)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """64 MiB for 246 MB in layers of 14 MB whose largest matrix has 4 MB.

    What a process may have, not what of it is resident: that also counts libraries that the kernel maps anew.
    """
    size = {"hidden_size": 512, "heads": 8, "kv_heads": 4, "head_dim": 64, "ffn": 2048}
    model = make_tiny_qwen3(tmp_path / "model", num_layers=16, **size)
    make_tiny_qwen3(tmp_path / "small", num_layers=1)
    assert sum(file.stat().st_size for file in model.glob("*.safetensors")) > 240e6
    command = [sys.executable, "-c", BOUNDED, model, tmp_path / "megatron", tmp_path / "back"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    assert same(tmp_path / "model", tmp_path / "back")
