"""tools/checkpoint: round trips are bitwise, the result is a model transformers loads, and bad input costs nothing."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import torch

from opsd_megatron.checkpoint.convert import compare_tensors, hf_to_megatron, megatron_to_hf
from opsd_megatron.checkpoint.hf_io import SafetensorsReader
from tests.distributed import run_distributed
from tests.tiny import make_tiny_qwen3

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools" / "checkpoint"
HF_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def files(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def same_tensors(first: Path, second: Path) -> bool:
    ours, theirs = SafetensorsReader(first), SafetensorsReader(second)
    return ours.names() == theirs.names() and all(
        ours.dtype(name) == theirs.dtype(name) and torch.equal(ours.get(name), theirs.get(name))
        for name in ours.names()
    )


def round_trips(root: Path) -> dict[str, bool]:
    """Convert every kind of directory there and back; whether each came back equal."""
    outcome = {}
    for source in sorted((root / "models").iterdir()):
        megatron, back = root / "megatron" / source.name, root / "back" / source.name
        hf_to_megatron(source, megatron)
        megatron_to_hf(megatron, back)
        outcome[source.name] = same_tensors(source, back)
    return outcome


def test_round_trips_are_bitwise_and_everything_travels(tmp_path: Path) -> None:
    models = tmp_path / "models"
    for tied in (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            for shards in ("5GB", "100KB"):
                name = f"{'tied' if tied else 'untied'}-{dtype}-{shards}"
                make_tiny_qwen3(models / name, tied=tied, dtype=dtype, num_layers=2, max_shard_size=shards)
    (outcome,) = run_distributed(round_trips, 1, tmp_path)
    assert len(outcome) == 8 and all(outcome.values()), outcome
    for source in models.iterdir():
        assert len(list(source.glob("*.safetensors"))) == 1 or source.name.endswith("100KB")
        back = tmp_path / "back" / source.name
        for file in HF_FILES:
            assert (back / file).read_bytes() == (source / file).read_bytes()
        assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOLS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_commands(tmp_path: Path) -> None:
    source = make_tiny_qwen3(tmp_path / "model", num_layers=2)
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    converted = tool("hf_to_megatron", "--hf", source, "--output", megatron)
    assert (converted.returncode, converted.stderr) == (0, "") and str(megatron) in converted.stdout
    exported = tool(
        "megatron_to_hf", "--checkpoint", megatron, "--output", back, "--dtype", "bfloat16", "--max-shard-size", "100KB"
    )
    assert (exported.returncode, exported.stderr) == (0, "")
    assert len(list(back.glob("*.safetensors"))) > 1 and (back / "model.safetensors.index.json").is_file()
    agreeing = tool("verify", "--hf", source, "--checkpoint", megatron)
    assert agreeing.returncode == 0 and "24 of 24 equal" in agreeing.stdout and "DIFFERENT" not in agreeing.stdout

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, loading = AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and model.dtype == torch.bfloat16
    reader = SafetensorsReader(source)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, reader.get(name).to(torch.bfloat16))
    assert AutoTokenizer.from_pretrained(back).chat_template == AutoTokenizer.from_pretrained(source).chat_template


def script(name: str) -> ModuleType:
    """A tool as a module."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Verdicts:
    """What the comparison says of each directory against one bfloat16 checkpoint of the first."""

    differences: dict[str, tuple[int, dict[str, str]]]
    agree: dict[str, bool]
    table: dict[str, str]


def compare(models: Path, names: list[str]) -> Verdicts:
    megatron = models / "megatron"
    hf_to_megatron(models / names[0], megatron, dtype=torch.bfloat16)
    verdicts = Verdicts({}, {}, {})
    for name in names:
        count, differences = compare_tensors(models / name, megatron)
        verdicts.differences[name] = count, {difference.name: difference.reason for difference in differences}
        with contextlib.redirect_stdout(io.StringIO()) as output:
            verdicts.agree[name] = script("verify").verify(str(models / name), str(megatron))
        verdicts.table[name] = output.getvalue()
    return verdicts


def test_a_single_changed_value_is_found(tmp_path: Path) -> None:
    names = ["model", "value", "names"]
    for name in names:
        weights = make_tiny_qwen3(tmp_path / name, num_layers=2) / "model.safetensors"
        # Representable in bfloat16, so that verify's float32 logits of both sides come from equal weights.
        tensors = {key: tensor.bfloat16().float() for key, tensor in safetensors.torch.load_file(weights).items()}
        if name == "value":
            tensors["model.layers.1.self_attn.k_norm.weight"][3] += 0.5
        if name == "names":
            tensors["extra"] = torch.ones(1)
            del tensors["model.norm.weight"]
        safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    (verdicts,) = run_distributed(compare, 1, tmp_path, names)
    assert verdicts.differences == {
        "model": (24, {}),
        "value": (24, {"model.layers.1.self_attn.k_norm.weight": "values differ"}),
        "names": (25, {"model.norm.weight": "not in the Hugging Face directory", "extra": "not in the checkpoint"}),
    }
    assert verdicts.agree == {"model": True, "value": False, "names": False}
    assert [verdicts.table[name].count("DIFFERENT") for name in names] == [0, 2, 2]
    assert "values differ by up to 0.5" in verdicts.table["value"]
    assert "not compared" in verdicts.table["names"]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("hf_to_megatron", "--hf ./nowhere --output new", "--hf=./nowhere is not a directory"),
        ("hf_to_megatron", "--hf model --output mine", "mine already exists"),
        ("hf_to_megatron", "--hf cut --output new", "model.safetensors is damaged"),
        ("hf_to_megatron", "--hf other --output new", "model_type is 'llama'"),
        ("hf_to_megatron", "--hf less --output new", "model.norm.weight"),
        ("megatron_to_hf", "--checkpoint nowhere --output new", "there is no checkpoint"),
        ("megatron_to_hf", "--checkpoint mine --output new", "is not a complete checkpoint"),
        ("megatron_to_hf", "--checkpoint nowhere --output mine", "mine already exists"),
        ("megatron_to_hf", "--checkpoint nowhere --output new --max-shard-size big", "'big' is not a size such as 5GB"),
        ("verify", "--hf model --checkpoint nowhere", "there is no checkpoint"),
        ("verify", "--hf ./nowhere --checkpoint mine", "--hf=./nowhere is not a directory"),
    ],
)
def test_bad_input(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    arguments: str,
    message: str,
) -> None:
    for directory in ("model", "cut", "other", "less"):
        make_tiny_qwen3(tmp_path / directory, num_layers=1, with_tokenizer=False)
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text().replace('"qwen3"', '"llama"'))
    tensors = safetensors.torch.load_file(tmp_path / "less" / "model.safetensors")
    del tensors["model.norm.weight"]
    safetensors.torch.save_file(tensors, tmp_path / "less" / "model.safetensors")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    before = files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", [name, *arguments.split()])
    assert script(name).main() == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]
    assert files(tmp_path) == before and not (tmp_path / "new").exists()
