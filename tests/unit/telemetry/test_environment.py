from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import opsd_megatron
from opsd_megatron.telemetry import environment
from opsd_megatron.telemetry.environment import describe_environment, record_environment


def test_each_start_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    record_environment(path, world_size=8, completed=0)
    (first,) = json.loads(path.read_text())
    record_environment(path, world_size=16, completed=25)
    kept, second = json.loads(path.read_text())
    assert kept == first
    assert [(entry["completed_steps"], entry["world_size"]) for entry in (kept, second)] == [(0, 8), (25, 16)]
    assert first["opsd_megatron"] == opsd_megatron.__version__
    assert first["torch"] == torch.__version__ and first["megatron-core"] == metadata.version("megatron-core")
    assert first["command"] == sys.argv


def test_what_is_no_list_of_starts_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    path.write_text("not JSON")
    record_environment(path, world_size=1, completed=0)
    assert len(json.loads(path.read_text())) == 1
    (aside,) = tmp_path.glob("environment.json.replaced-*")
    assert aside.read_text() == "not JSON"


def test_the_commit_is_the_packages_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracked and clean, tracked and changed, and untracked in somebody's repository."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(environment.opsd_megatron, "__file__", str(package / "__init__.py"))

    def found() -> list[object]:
        described = describe_environment()
        return [described["commit"], described["modified"]]

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    assert found() == [None, None]
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "other people's work")
    assert found() == [None, None]
    git("add", "package")
    git("commit", "-q", "-m", "the package")
    assert found() == [git("rev-parse", "HEAD"), False]
    (package / "__init__.py").write_text("changed")
    assert found() == [git("rev-parse", "HEAD"), True]
