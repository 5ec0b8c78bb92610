"""What is put back after vLLM has been in the process, and what is left to the user in its environment."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist

from opsd_megatron.rollout.process import (
    default_group_kept,
    prepare_environment,
    process_state_kept,
    uncompiled_on_cpu,
)


def test_environment_keeps_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_NO_USAGE_STATS", raising=False)
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    prepare_environment()
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert "TORCH_COMPILE_DISABLE" not in os.environ  # it would be the trainer's too


@pytest.mark.skipif(torch.cuda.is_available(), reason="there vLLM compiles")
def test_only_what_runs_inside_is_left_uncompiled() -> None:
    compiled = torch.compile(lambda values: values + int(torch.compiler.is_compiling()), backend="eager")
    seen = []
    for _ in range(2):
        with uncompiled_on_cpu():
            seen.append(int(compiled(torch.zeros(1))))
        seen.append(int(compiled(torch.zeros(1))))
    assert seen == [0, 1, 0, 1]


def test_process_state_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.delenv("VLLM_KEPT", raising=False)
    before = (torch.get_num_threads(), torch.set_num_threads, torch.get_rng_state().tolist(), random.getstate())
    drawn = np.random.get_state()[1].tolist()
    with pytest.raises(RuntimeError), process_state_kept():
        os.environ.update(LOCAL_WORLD_SIZE="1", LD_PRELOAD="library", VLLM_KEPT="1")
        torch.set_num_threads(before[0] + 1)
        monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
        torch.set_default_dtype(torch.bfloat16)
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(1234)
        raise RuntimeError
    after = (torch.get_num_threads(), torch.set_num_threads, torch.get_rng_state().tolist(), random.getstate())
    assert after == before
    assert np.random.get_state()[1].tolist() == drawn
    assert torch.get_default_dtype() == torch.float32
    assert os.environ["LOCAL_WORLD_SIZE"] == "8"
    assert "LD_PRELOAD" not in os.environ
    assert os.environ.pop("VLLM_KEPT") == "1"


def test_only_the_default_group_survives_a_shutdown() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        other = dist.new_group([0])
        with default_group_kept():
            dist.destroy_process_group(other)
            dist.destroy_process_group()
        assert dist.is_initialized()
        with pytest.raises(ValueError, match="is not registered"):
            dist.get_rank(other)
    finally:
        dist.destroy_process_group()
    assert not dist.is_initialized()
