"""Which tokens end a response."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opsd_megatron.errors import EngineError
from opsd_megatron.rollout.stop_tokens import stop_token_ids
from tests.tiny import make_tiny_qwen3


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
