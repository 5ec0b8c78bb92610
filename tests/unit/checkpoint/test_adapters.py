"""Checkpoints with adapters: they travel over meshes like everything else, and only load where they belong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opsd_megatron.checkpoint.convert import megatron_to_adapter, megatron_to_hf
from opsd_megatron.checkpoint.hf_io import SafetensorsReader
from opsd_megatron.checkpoint.state import load_checkpoint, load_model_weights
from opsd_megatron.errors import CheckpointError
from tests.distributed import run_distributed
from tests.tiny import make_tiny_qwen3, make_tiny_qwen3_moe
from tests.unit.checkpoint.mesh import Mesh, run_on, stored

SP2: dict[str, Any] = {"tp": 2, "sequence": True, "lora": 3}
BF16: dict[str, Any] = {"dtype": "bfloat16"}  # with float32 factors in the optimizer
MESHES = {
    "dense": [Mesh(**SP2), Mesh(pp=2, vpp=2, lora=3), Mesh(tp=2, cp=2, lora=3), Mesh(lora=3)],
    "moe": [Mesh(ep=2, lora=3, **BF16), Mesh(**SP2, ep=4, etp=1, **BF16), Mesh(pp=2, ep=2, lora=3, **BF16)],
}


def travel(models: dict[str, Path], root: Path) -> dict[str, list[bool]]:
    """Carry a state over meshes, saving it on each; whether each saved the same tensors, the optimizer's included."""
    outcome: dict[str, list[bool]] = {}
    for kind, meshes in MESHES.items():
        first: dict[str, Tensor] = {}
        for number, mesh in enumerate(meshes):
            with run_on(mesh, models[kind], weights=number == 0) as run:
                if number == 0:
                    run.steps(1, 2)
                else:
                    load_checkpoint(
                        root / f"{kind}_{number - 1}", model=run.trainable.chunks, optimizer=run.trainable.optimizer
                    )
                run.save(root / f"{kind}_{number}")
                found = stored(root / f"{kind}_{number}")
            if number == 0:
                first = found
            same = found.keys() == first.keys() and all(torch.equal(found[name], first[name]) for name in first)
            factors = [name for name in found if "_lora." in name]
            # Weights, both moments and their steps; of the frozen weights nothing but themselves.
            trained = [name for name in found if name.startswith("optimizer.state.exp_avg.")]
            assert len(trained) >= 14 and all("_lora." in name for name in trained) and len(factors) > 2 * len(trained)
            outcome.setdefault(kind, []).append(same)
    return outcome


def test_factors_and_optimizer_state_over_four_ranks(tmp_path: Path) -> None:
    models = {
        "dense": make_tiny_qwen3(tmp_path / "dense", with_tokenizer=False),
        "moe": make_tiny_qwen3_moe(tmp_path / "moe", num_layers=4, dense_layers=(0,), experts=4, with_tokenizer=False),
    }
    expected = {kind: [True] * len(meshes) for kind, meshes in MESHES.items()}
    assert run_distributed(travel, 4, models, tmp_path) == [expected] * 4


def misuse(source: Path, root: Path) -> dict[str, str]:
    messages = {}

    def refused(name: str, load: object) -> None:
        try:
            load()  # type: ignore[operator]
        except CheckpointError as error:
            messages[name] = str(error)

    for name, rank in {"plain": 0, "adapters": 3}.items():
        with run_on(Mesh(lora=rank), source) as run:
            run.save(root / name)
    for name, (checkpoint, rank) in {
        "another rank": ("adapters", 4),
        "no adapters": ("adapters", 0),
        "adapters of a plain one": ("plain", 3),
    }.items():
        with run_on(Mesh(lora=rank), source) as run:
            refused(name, lambda run=run, checkpoint=checkpoint: load_checkpoint(root / checkpoint, model=run.model))
    refused("no adapter to write", lambda: megatron_to_adapter(root / "plain", root / "out"))
    record = json.loads((root / "adapters/trainer.json").read_text())
    assert record["lora"]["rank"] == 3 and record["lora"]["alpha"] == 6.0
    record["lora"]["rank"] = 5
    (root / "adapters/trainer.json").write_text(json.dumps(record))
    refused("damaged record", lambda: megatron_to_hf(root / "adapters", root / "out"))
    for name, changes in {
        "adapters left out": {"rank": 3, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        "adapters without a record": None,
    }.items():
        changed = {**record, "lora": changes and {**record["lora"], **changes}}
        (root / "adapters/trainer.json").write_text(json.dumps(changed))
        with run_on(Mesh(), source) as run:
            refused(name, lambda run=run: load_model_weights(root / "adapters", run.model))
    record["lora"] = None
    (root / "adapters/trainer.json").write_text(json.dumps(record))
    refused("unknown tensors", lambda: megatron_to_hf(root / "adapters", root / "out"))
    assert not (root / "out").exists()
    return messages


def test_what_does_not_belong_together_is_named(tmp_path: Path) -> None:
    source = make_tiny_qwen3(tmp_path / "model", num_layers=2, with_tokenizer=False)
    (messages,) = run_distributed(misuse, 1, source, tmp_path)
    for name, words in {
        "another rank": ("'rank': 3", "'rank': 4", "lora.rank", "model.checkpoint="),
        "no adapters": ("'rank': 3", "None", "lora.rank"),
        "adapters of a plain one": ("adapters None", "'rank': 3"),
        "no adapter to write": ("has no adapters", "leave out --adapter"),
        "damaged record": ("q_proj_a", "(2, 3, 64)", "(2, 5, 64)"),
        "adapters left out": ("linear_fc1_lora.gate_proj_a of an adapter", "model.backend", "trainer.json"),
        "adapters without a record": ("linear_fc1_lora.gate_proj_a of an adapter", "model.backend", "trainer.json"),
        "unknown tensors": ("_lora.", "config.json does not call for"),
    }.items():
        assert all(word in messages[name] for word in words), messages[name]


def export_small_deltas(source: Path, root: Path) -> dict[str, Tensor]:
    with run_on(Mesh(lora=3, **BF16), source) as run:
        with torch.no_grad():
            for name, parameter in run.model[0].named_parameters():
                if name.endswith("o_proj_b"):
                    parameter.fill_(1e-5)
        run.save(root / "checkpoint", weights_only=True)
        tensors = stored(root / "checkpoint")
    for name, dtype in {"kept": None, "bfloat16": torch.bfloat16, "float32": torch.float32}.items():
        megatron_to_hf(root / "checkpoint", root / name, dtype=dtype)
    return tensors


def test_a_float32_export_has_all_of_the_delta(tmp_path: Path) -> None:
    """Of bfloat16 weights and factors: one in their own type keeps little of it."""
    source = make_tiny_qwen3(tmp_path / "model", num_layers=1, with_tokenizer=False)
    (tensors,) = run_distributed(export_small_deltas, 1, source, tmp_path)
    stem = "decoder.layers.self_attention.linear_proj"
    a, b = (tensors[f"{stem}_lora.o_proj_{factor}"][0].float() for factor in "ab")
    expected = tensors[f"{stem}.weight"][0].float() + 2.0 * b @ a
    name = "model.layers.0.self_attn.o_proj.weight"
    kept, narrow, wide = (SafetensorsReader(tmp_path / kind).get(name) for kind in ("kept", "bfloat16", "float32"))
    assert wide.dtype == torch.float32 and torch.allclose(wide, expected, rtol=1e-6, atol=0.0)
    assert torch.equal(kept, narrow) and torch.equal(kept, expected.bfloat16())
    assert (kept == tensors[f"{stem}.weight"][0]).float().mean() > 0.9


def export_experts(source: Path, mixed: Path, root: Path) -> dict[str, str]:
    messages = {}
    for name, model, targets in (
        ("gate alone", source, ["gate_proj", "q_proj"]),
        ("plain layers", mixed, ["down_proj"]),
        ("attention", mixed, ["q_proj"]),
    ):
        with run_on(Mesh(lora=2), model, targets=targets) as run:
            run.save(root / name, weights_only=True)
        try:
            megatron_to_adapter(root / name, root / f"{name} exported")
        except CheckpointError as error:
            messages[name] = str(error)
        assert (root / f"{name} exported").exists() == (name not in messages)
    with run_on(Mesh(lora=3), source) as run:
        run.steps(1, 3)
        run.save(root / "checkpoint")
    megatron_to_hf(root / "checkpoint", root / "merged")
    megatron_to_adapter(root / "checkpoint", root / "adapter", dtype=torch.float32)
    return messages


def test_peft_loads_adapters_of_experts(tmp_path: Path) -> None:
    """They are written expert by expert, as vLLM takes them; PEFT puts them together as transformers has experts."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    source = make_tiny_qwen3_moe(tmp_path / "model", num_layers=2, experts=4, with_tokenizer=False)
    mixed = make_tiny_qwen3_moe(tmp_path / "mixed", num_layers=2, dense_layers=(0,), experts=4, with_tokenizer=False)
    (messages,) = run_distributed(export_experts, 1, source, mixed, tmp_path)
    assert messages.keys() == {"gate alone", "plain layers"}
    assert "not gate_proj alone; leave out --adapter" in messages["gate alone"]
    assert "drops those of layers with a plain MLP" in messages["plain layers"]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        base = AutoModelForCausalLM.from_pretrained(source)
        before = base(ids).logits
        found = PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
    assert (found - expected).abs().max() < 1e-4 < 1e-2 < (before - expected).abs().max()
