"""The parts of the vLLM engine that need no vLLM; the engine itself is in tests/functional/test_engine.py."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from opsd_megatron.errors import EngineError
from opsd_megatron.rollout import vllm_engine
from opsd_megatron.rollout.vllm_engine import prepare_environment, share, stop_token_ids
from tests.tiny import make_tiny_qwen3


@pytest.mark.parametrize(("num", "replicas"), [(0, 1), (1, 4), (7, 3), (8, 4), (33, 2)])
def test_shares_tile_and_balance(num: int, replicas: int) -> None:
    shares = [share(num, replicas, replica) for replica in range(replicas)]
    assert [index for own in shares for index in own] == list(range(num))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def write_json(path: Path, **content: object) -> None:
    path.write_text(json.dumps(content))


def test_stop_ids_come_from_the_generation_config_before_the_model_config(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", eos_token_id=3)
    assert stop_token_ids(tmp_path) == (3,)
    write_json(tmp_path / "generation_config.json", temperature=1.0)
    assert stop_token_ids(tmp_path) == (3,)
    write_json(tmp_path / "generation_config.json", eos_token_id=[9, 5])
    assert stop_token_ids(tmp_path) == (5, 9)


def test_stop_ids_include_the_tokenizers(tmp_path: Path) -> None:
    model = make_tiny_qwen3(tmp_path, num_layers=1)
    write_json(tmp_path / "generation_config.json", eos_token_id=256)
    assert stop_token_ids(model) == (256, 258)


def test_no_stop_id_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"config\.json cannot be read"):
        stop_token_ids(tmp_path)
    write_json(tmp_path / "config.json")
    with pytest.raises(EngineError, match="names no end-of-sequence token"):
        stop_token_ids(tmp_path)


def test_environment_keeps_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_COMPILE_DISABLE", "VLLM_NO_USAGE_STATS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.delitem(sys.modules, "torch._dynamo.config", raising=False)
    prepare_environment()
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert os.environ.get("TORCH_COMPILE_DISABLE") == (None if torch.cuda.is_available() else "1")


def test_process_state_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.delenv("VLLM_KEPT", raising=False)
    before = (torch.get_num_threads(), torch.set_num_threads, torch.get_rng_state().tolist(), random.getstate())
    drawn = np.random.get_state()[1].tolist()
    with pytest.raises(RuntimeError), vllm_engine._process_state_kept():
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
        with vllm_engine._default_group_kept():
            dist.destroy_process_group(other)
            dist.destroy_process_group()
        assert dist.is_initialized()
        with pytest.raises(ValueError, match="is not registered"):
            dist.get_rank(other)
    finally:
        dist.destroy_process_group()
    assert not dist.is_initialized()
