"""Which tokens end a response."""

from __future__ import annotations

import json
from pathlib import Path

from opsd_megatron.errors import EngineError


def stop_token_ids(model_path: Path) -> tuple[int, ...]:
    """The tokens that end a response: those of the generation config (else of the model config) and the tokenizer's.

    Raises:
        EngineError: ``model_path`` has no readable ``config.json``, or names no end-of-sequence token anywhere.
    """
    stop: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = model_path / name
        if name == "config.json" or path.is_file():
            try:
                named = json.loads(path.read_text()).get("eos_token_id")
            except (OSError, ValueError, AttributeError) as error:
                raise EngineError(f"{path} cannot be read: {error}") from error
            stop.update([named] if isinstance(named, int) else named or [])
        if stop:
            break
    if (model_path / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        eos = AutoTokenizer.from_pretrained(model_path).eos_token_id
        stop.update([] if eos is None else [eos])
    if not stop:
        raise EngineError(
            f"{model_path} names no end-of-sequence token: set eos_token_id in its generation_config.json"
        )
    return tuple(sorted(stop))
