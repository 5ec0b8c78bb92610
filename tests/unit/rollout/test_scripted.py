"""The scripted engine: which line answers a request, and what a malformed script says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from opsd_megatron.errors import EngineError
from opsd_megatron.rollout.engine import RolloutEngine, Sampling
from opsd_megatron.rollout.scripted import ScriptedEngine

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=4)


def write_script(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_seed_chooses_among_the_lines_of_a_prompt(tmp_path: Path) -> None:
    script = write_script(
        tmp_path / "script.jsonl",
        {"prompt_ids": [1, 2], "token_ids": [7], "log_probs": [-0.5]},
        {"prompt_ids": [3], "token_ids": [4, 5, 6, 7, 8]},
        "",
        {"prompt_ids": [1, 2], "token_ids": [8, 9], "log_probs": [-1, -2.0]},
    )
    engine: RolloutEngine = ScriptedEngine(script)
    drawn = engine.generate([[1, 2], (3,), [1, 2], [1, 2]], SAMPLING, seeds=[0, 5, 3, 2])
    assert [generation.token_ids for generation in drawn] == [(7,), (4, 5, 6, 7), (8, 9), (7,)]
    assert [generation.finish_reason for generation in drawn] == ["stop", "length", "stop", "stop"]
    assert drawn[2].log_probs == (-1.0, -2.0)
    assert len(drawn[1].log_probs) == 4 and all(map(math.isnan, drawn[1].log_probs))


def test_unknown_prompt_is_named(tmp_path: Path) -> None:
    engine = ScriptedEngine(write_script(tmp_path / "script.jsonl", {"prompt_ids": [1], "token_ids": [7]}))
    with pytest.raises(EngineError, match=r"script\.jsonl has no response for prompt_ids \[1, 2\]"):
        engine.generate([[1, 2]], SAMPLING, seeds=[0])


def test_update_weights_drains_the_iterator(tmp_path: Path) -> None:
    engine = ScriptedEngine(write_script(tmp_path / "script.jsonl", {"prompt_ids": [1], "token_ids": [7]}))
    weights = iter([("a", torch.ones(1)), ("b", torch.ones(1))])
    engine.update_weights(weights)
    assert next(weights, None) is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ({"token_ids": [1]}, "prompt_ids must be"),
        ({"prompt_ids": [], "token_ids": [1]}, "prompt_ids must be"),
        ({"prompt_ids": [1]}, "token_ids must be"),
        ({"prompt_ids": [1], "token_ids": [True]}, "token_ids must be"),
        ({"prompt_ids": [1], "token_ids": [-1]}, "token_ids must be"),
        ({"prompt_ids": [1], "token_ids": [1, 2], "log_probs": [0.0]}, "log_probs must be 2 numbers"),
        ({"prompt_ids": [1], "token_ids": [1], "log_probs": ["x"]}, "log_probs must be 1 numbers"),
    ],
)
def test_malformed_line_is_named(tmp_path: Path, row: object, message: str) -> None:
    script = write_script(tmp_path / "script.jsonl", {"prompt_ids": [1], "token_ids": [1]}, row)
    with pytest.raises(EngineError, match=rf"script\.jsonl:2: {message}"):
        ScriptedEngine(script)


def test_missing_or_empty_script(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be read"):
        ScriptedEngine(tmp_path / "absent.jsonl")
    with pytest.raises(EngineError, match="holds no response"):
        ScriptedEngine(write_script(tmp_path / "script.jsonl"))
