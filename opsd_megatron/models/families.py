"""Which models there are: ``model_type`` in ``config.json`` decides the family, a family is a file and a row here."""

from __future__ import annotations

from pathlib import Path

from opsd_megatron.errors import ModelError
from opsd_megatron.models.config_file import ConfigFile
from opsd_megatron.models.qwen3 import Qwen3Spec
from opsd_megatron.models.qwen3_moe import Qwen3MoeSpec

FAMILIES: dict[str, type[Qwen3Spec]] = {
    "qwen3": Qwen3Spec,
    "qwen3_moe": Qwen3MoeSpec,
}

_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt"]


def resolve_model_path(path_or_name: str | Path, *, option: str = "model.path") -> Path:
    """The local directory of a model: the directory itself, or the Hub's snapshot, downloaded where needed.

    The download is of the whole model, weights included, also where the caller only checks a configuration: the check
    compares tensor names and shapes too, and a run that follows finds everything in the Hub's cache.

    Ranks: may be called by any rank alone. Downloads are shared through the Hub's cache on each host.

    Args:
        path_or_name: Directory or Hub name.
        option: What the user set it with, for messages.

    Raises:
        ModelError: Neither a directory nor a model that can be had from the Hub.
    """
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_name)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(f"{option}={name} is not a directory; pass a Hugging Face directory or a Hub name (org/model)")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # The Hub client raises many unrelated types: network, HTTP, validation, cache.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{option}={name} is not a local directory and cannot be downloaded from the Hugging Face Hub: {reason}"
        ) from error


def read_spec(path: str | Path) -> Qwen3Spec:
    """Read and check ``config.json``.

    Args:
        path: Hugging Face directory.

    Raises:
        ModelError: Names the file and the key at fault, or the architecture found instead of a known one.
    """
    config = ConfigFile.read(path)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        config.fail(f"model_type is {kind!r}; supported are {' and '.join(map(repr, FAMILIES))}")
    return FAMILIES[kind].read(config)


def family_of(spec: Qwen3Spec) -> str:
    """The ``model_type`` that a spec was read as."""
    return next(kind for kind, family in FAMILIES.items() if family is type(spec))
