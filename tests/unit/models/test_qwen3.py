from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from opsd_megatron.config import Config
from opsd_megatron.errors import ConfigError, ModelError
from opsd_megatron.models.families import read_spec, resolve_model_path
from opsd_megatron.models.qwen3 import Qwen3Spec, check_mesh
from tests.unit.models.published import DENSE, write_config

SPEC = Qwen3Spec(
    num_layers=28,
    hidden_size=1024,
    ffn_size=3072,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=151936,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    tied=True,
    max_positions=40960,
)


def write(directory: Path, **changes: object) -> Path:
    return write_config(directory, DENSE, **changes)


def test_published_config(tmp_path: Path) -> None:
    assert read_spec(write(tmp_path)) == SPEC


def test_config_as_transformers_5_writes_it(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1000000}
    write(tmp_path, rope_theta=..., rope_scaling=..., rope_parameters=rope, torch_dtype=..., dtype="bfloat16")
    assert read_spec(tmp_path) == SPEC


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"head_dim": ...}, "head_dim is missing"),
        ({"num_hidden_layers": ...}, "num_hidden_layers is missing"),
        ({"rope_theta": ...}, "rope_theta is missing"),
        ({"hidden_size": "1024"}, "hidden_size='1024' is not a positive number"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"num_attention_heads": 2.5}, "num_attention_heads=2.5 is not an integer"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type='linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "rope_parameters.rope_type='llama3'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters.factor is missing"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 1.0}}, "rope_scaling.factor=1.0 must be above 1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "bets_fast": 1}}, "rope_scaling.bets_fast is not known"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' is not an object"),
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
            },
            "rope_parameters and rope_scaling are both there and differ",
        ),
        (
            {
                "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e6},
                "rope_scaling": {"type": "yarn", "factor": 2.0, "rope_theta": 1e4},
            },
            "rope_parameters and rope_scaling are both there and differ",
        ),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' is neither true nor false"),
        ({"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention_config"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types sliding_attention"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
    ],
)
def test_what_is_not_supported_is_named_with_its_file(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError) as raised:
        read_spec(write(tmp_path, **changes))
    assert named in str(raised.value)
    assert str(tmp_path / "config.json") in str(raised.value)


@pytest.mark.parametrize(("text", "named"), [('{"model_type": ', "JSON"), ("[1]", "JSON list"), ("\xff\xfe", "JSON")])
def test_malformed_config_names_its_file(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=named) as raised:
        read_spec(tmp_path)
    assert str(tmp_path / "config.json") in str(raised.value)


def test_directory_without_config_and_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        read_spec(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        read_spec(tmp_path / "absent")


def test_a_local_directory_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    assert resolve_model_path("Qwen/Qwen3-0.6B") == Path("Qwen/Qwen3-0.6B")


def test_a_hub_name_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    published = ["config.json", "generation_config.json", "model-00001-of-00002.safetensors", "tokenizer.json"]
    published += ["model.safetensors.index.json", "vocab.json", "merges.txt", "chat_template.jinja"]
    asked: list[str] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        files = [*published, "pytorch_model.bin", "README.md"]
        asked.extend(file for file in files if any(fnmatch(file, pattern) for pattern in allow_patterns))
        return str(tmp_path / name.replace("/", "--"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model_path("Qwen/Qwen3-0.6B") == tmp_path / "Qwen--Qwen3-0.6B"
    assert asked == published


def test_an_unreachable_hub_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError("connection refused\nand much more")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(
        ModelError, match=r"^model\.path=Qwen/Qwen3-0\.6B is not a local directory.*connection refused$"
    ):
        resolve_model_path("Qwen/Qwen3-0.6B")


@pytest.mark.parametrize("path", ["/absent/model", "./absent", "absent", "a/b/c"])
def test_what_cannot_be_a_hub_name_is_not_asked_for(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(ModelError, match=rf"^model\.path={path} is not a directory"):
        resolve_model_path(path)
    with pytest.raises(ModelError, match=rf"^--hf={path} is not a directory"):
        resolve_model_path(path, option="--hf")


def config(**keys: object) -> Config:
    made = Config()
    for key, value in keys.items():
        group, name = key.split("__")
        setattr(getattr(made, group), name, value)
    return made


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"parallel__tensor": 8, "parallel__pipeline": 7},
        {"model__max_length": 40960},
        {"parallel__tensor": 1, "rollout__tensor": 16},  # ranks share key/value heads
        {"parallel__tensor": 16},
        {"parallel__tensor": 16, "lora__rank": 4, "lora__targets": ["o_proj", "up_proj"]},
        {"rollout__max_new_tokens": 40959},
        {"objective__name": "sft", "rollout__max_new_tokens": 50000, "rollout__tensor": 3},  # no engine, no rule
    ],
)
def test_meshes_that_fit(keys: dict[str, object]) -> None:
    check_mesh(SPEC, config(**keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"parallel__tensor": 32}, r"parallel.tensor=32 does not fit .* 16 attention heads, .* or 8 or 16 would"),
        ({"parallel__tensor": 3}, r"parallel.tensor=3 does not fit .* 3072 FFN rows; 1 or 2 or 4 or 8 or 16 would"),
        (
            {"parallel__tensor": 16, "lora__rank": 4},
            r"lora.targets has q_proj, k_proj, v_proj, .* use at most 8, or leave .* lora.targets",
        ),
        ({"parallel__pipeline": 29}, r"parallel.pipeline=29 makes more stages than the model has layers, 28; lower it"),
        ({"model__max_length": 40961}, r"model.max_length=40961 .* at most 40960"),
        ({"rollout__tensor": 3}, r"rollout.tensor=3 does not fit .* 3072 FFN rows; 1 or 2 or 4 or 8 or 16 would"),
        ({"parallel__expert": 2}, r"parallel.expert=2 needs a model with experts, .* use parallel.expert=1"),
        ({"parallel__expert_tensor": 2}, r"parallel.expert_tensor=2 needs a model with experts"),
    ],
)
def test_meshes_that_do_not_fit(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_mesh(SPEC, config(**keys))


def test_the_vocabulary_is_padded_to_equal_shards() -> None:
    assert [SPEC.padded_vocab_size(tp) for tp in (1, 3, 128)] == [151936, 151938, 151936]


def test_rows_that_ranks_cannot_share_evenly() -> None:
    """By hand: 18 heads of 4 rows, 72, over 16 ranks."""
    spec = replace(SPEC, num_kv_heads=1, head_dim=4)
    with pytest.raises(ConfigError, match=r"parallel.tensor=16 does not divide the model's 72 query, key and value"):
        check_mesh(spec, config(parallel__tensor=16))
    check_mesh(spec, config(parallel__tensor=8, rollout__tensor=16))  # the engine repeats the head
