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
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import torch

from opsd_megatron.checkpoint.compare import compare_tensors
from opsd_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf
from opsd_megatron.checkpoint.hf_io import SafetensorsReader
from tests.distributed import run_distributed
from tests.tiny import make_tiny_qwen3, make_tiny_qwen3_moe

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
    """What the comparison says of each directory against one checkpoint of the first."""

    differences: dict[str, tuple[int, dict[str, str]]]
    agree: dict[str, bool]
    table: dict[str, str]


def compare(models: Path, names: list[str], dtype: torch.dtype | None) -> Verdicts:
    megatron = models / f"{names[0]}-megatron"
    hf_to_megatron(models / names[0], megatron, dtype=dtype)
    verdicts = Verdicts({}, {}, {})
    for name in names:
        count, differences = compare_tensors(models / name, megatron)
        verdicts.differences[name] = count, {difference.name: difference.reason for difference in differences}
        with contextlib.redirect_stdout(io.StringIO()) as output:
            verdicts.agree[name] = script("verify").verify(str(models / name), str(megatron))
        verdicts.table[name] = output.getvalue()
    return verdicts


def compare_all(models: Path, cases: list[tuple[list[str], torch.dtype | None]]) -> list[Verdicts]:
    return [compare(models, names, dtype) for names, dtype in cases]


def test_what_differs_is_found_and_rounding_is_not(tmp_path: Path) -> None:
    """Models of float32, which their checkpoints keep in bfloat16; one of large logits, one of experts."""
    theta, eps = {"rope_parameters": {"rope_type": "default", "rope_theta": 9e5}}, {"rms_norm_eps": 1e-5}
    dense, large, moe = ["model", "value", "names", "theta", "eps"], ["large"], ["moe"]
    for name in (*dense, *large, *moe):
        make = make_tiny_qwen3_moe if name in moe else partial(make_tiny_qwen3, tied=name != "large")
        weights = make(tmp_path / name, num_layers=2) / "model.safetensors"
        tensors = safetensors.torch.load_file(weights)
        tensors["model.layers.1.self_attn.k_norm.weight"][3] = 1.5 if name == "value" else 1.0
        if name == "names":
            tensors["extra"] = torch.ones(1)
            del tensors["model.norm.weight"]
        if name == "large":
            tensors["lm_head.weight"] *= 1000
        safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
        config = weights.with_name("config.json")
        changes = theta if name == "theta" else eps if name == "eps" else {}
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    cases = [(dense, torch.bfloat16), (large, None), (moe, torch.bfloat16)]
    ((verdicts, of_large, of_moe),) = run_distributed(compare_all, 1, tmp_path, cases)
    assert verdicts.differences == {
        "model": (24, {}),
        "value": (24, {"model.layers.1.self_attn.k_norm.weight": "values differ"}),
        "names": (25, {"model.norm.weight": "not in the Hugging Face directory", "extra": "not in the checkpoint"}),
        "theta": (24, {}),
        "eps": (24, {}),
    }
    assert verdicts.agree == {"model": True, "value": False, "names": False, "theta": False, "eps": False}
    assert [verdicts.table[name].count("DIFFERENT") for name in dense] == [0, 2, 2, 1, 1]
    assert "values differ by up to 0.5" in verdicts.table["value"]
    assert "not compared" in verdicts.table["names"]
    assert all("rounded to the checkpoint's bfloat16" in table for table in verdicts.table.values())
    assert of_large.agree == {"large": True} and "rounded" not in of_large.table["large"]
    difference = float(of_large.table["large"].split("largest difference ")[1].split(",")[0])
    assert difference > 1e-4, "no test of a bound that grows with the logits"
    assert of_moe.agree == {"moe": True}


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
        ("verify", "--hf mine --checkpoint nowhere", "mine/config.json is missing"),
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
