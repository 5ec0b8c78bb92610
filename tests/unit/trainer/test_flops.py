from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from opsd_megatron.models.families import read_spec
from opsd_megatron.trainer.flops import StepFlops, known_peak
from opsd_megatron.types import AlignedSample
from tests.tiny import make_tiny_qwen3, make_tiny_qwen3_moe

LENGTH = 24


def flops(path: Path, *, adapters: bool = False) -> StepFlops:
    spec = read_spec(path)
    return StepFlops(spec, spec, adapters=adapters, world_size=2, peak_tflops=None)


def test_one_sequence_is_what_torch_counts_but_for_half_of_attention(tmp_path: Path) -> None:
    """torch counts the products of transformers' own model. There every token has logits, and attention no mask."""
    from transformers import Qwen3ForCausalLM

    path = make_tiny_qwen3(tmp_path / "model", with_tokenizer=False)
    model = Qwen3ForCausalLM.from_pretrained(path, attn_implementation="eager")
    ids = torch.arange(LENGTH).unsqueeze(0)
    with FlopCounterMode(display=False) as forward:
        logits = model(ids, use_cache=False).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    step = flops(path)
    spec = step.student
    attention = 2 * LENGTH**2 * spec.num_layers * spec.num_heads * spec.head_dim
    head = 2 * spec.hidden_size * spec.vocab_size
    # A sample has at least one token of prompt, which has no row.
    sample = AlignedSample((0,), None, tuple(range(1, LENGTH)))
    counted = forward.get_total_flops() + backward.get_total_flops()
    assert step.of([sample]) == counted - 3 * attention - 3 * head
    # The teacher's forward pass, of the same length.
    taught = replace(sample, teacher_prompt_ids=(0,))
    assert step.of([taught]) - step.of([sample]) == forward.get_total_flops() - attention - head
    # Frozen weights have no gradient: of what is not attention, two thirds.
    frozen = flops(path, adapters=True)
    assert frozen.of([sample]) == 2 / 3 * (step.of([sample]) - 3 * attention) + 3 * attention


def test_of_experts_the_chosen_ones_and_the_router_count(tmp_path: Path) -> None:
    dense = flops(make_tiny_qwen3(tmp_path / "dense", with_tokenizer=False))
    sparse = flops(make_tiny_qwen3_moe(tmp_path / "sparse", with_tokenizer=False))
    spec = sparse.student
    plain = replace(dense.student, **{name: getattr(spec, name) for name in vars(dense.student)})
    sample = AlignedSample((0,), None, (1, 2))
    difference = 0
    for layer in range(spec.num_layers):
        if spec.experts_in(layer):
            chosen, ffn = spec.experts_used(layer)
            assert 0 < chosen < spec.experts_in(layer)
            difference += 3 * (chosen * ffn - spec.ffn_size) * spec.hidden_size
            difference += spec.experts_in(layer) * spec.hidden_size
    assert difference
    assert sparse.of([sample]) - replace(dense, student=plain).of([sample]) == 3 * 2 * 3 * difference


def test_a_step_is_reported_by_the_seconds_of_its_two_passes(tmp_path: Path) -> None:
    step = flops(make_tiny_qwen3(tmp_path / "model", with_tokenizer=False))
    sample = AlignedSample((0,), None, (1, 2))
    seconds = {"rollout": 100.0, "teacher": 1.0, "student": 3.0}
    tflops = step.of([sample]) / 4 / 2 / 1e12
    assert step.report([sample], seconds) == {"model_tflops_per_gpu": pytest.approx(tflops, rel=1e-12)}
    known = replace(step, peak_tflops=5.0).report([sample], seconds)
    assert known["mfu"] == pytest.approx(tflops / 5, rel=1e-12)
    assert step.report([], seconds) == {}


def test_peaks_go_by_the_devices_name() -> None:
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA L4"]
    assert [known_peak(name) for name in names] == [989.4, 756.5, 989.4, 312.0, None]
