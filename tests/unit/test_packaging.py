"""setup.py, the lock and the Dockerfile agree with one another and with the package index."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def setup_arguments() -> dict[str, Any]:
    """What setup.py passes to setuptools."""
    with mock.patch("setuptools.setup") as setup, mock.patch.object(sys, "path", [str(ROOT), *sys.path]):
        runpy.run_path(str(ROOT / "setup.py"))
    return dict(setup.call_args.kwargs)


@pytest.fixture(scope="module")
def locked() -> dict[str, Version]:
    """The distributions of requirements/cpu.lock."""
    lines = [line for line in (ROOT / "requirements/cpu.lock").read_text().splitlines() if not line.startswith("#")]
    pins = [re.fullmatch(r"([a-z0-9-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line) for line in lines]
    assert all(pins), [line for line, pin in zip(lines, pins, strict=True) if not pin]
    return {pin[1]: Version(pin[2]) for pin in pins if pin}


@pytest.fixture(scope="module")
def lock_script() -> ModuleType:
    """requirements/lock.py as a module."""
    spec = importlib.util.spec_from_file_location("lock", ROOT / "requirements/lock.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lock_holds_what_setup_asks_for(setup_arguments: dict[str, Any], locked: dict[str, Version]) -> None:
    extras = setup_arguments["extras_require"]
    for text in (*setup_arguments["install_requires"], *extras["cpu"], *extras["dev"]):
        requirement = Requirement(text)
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None and version in requirement.specifier, f"{text}: locked is {version}"


def test_lock_keeps_cuda_builds_out(locked: dict[str, Version], lock_script: ModuleType) -> None:
    assert locked["torch"].local == "cpu"
    assert not lock_script.EXCLUDED & set(locked)
    assert not [name for name in locked if name.startswith("nvidia-") and name != "nvidia-ml-py"]


def test_lock_lines_leave_out_cuda_builds_and_the_project(lock_script: ModuleType) -> None:
    def entry(name: str, **archive: object) -> dict[str, object]:
        return {"metadata": {"name": name, "version": "1.0"}, "download_info": {"url": "u", "archive_info": archive}}

    hashed = {"hashes": {"sha256": "ab"}}
    report = [entry("torchvision", **hashed), entry("Zope.Event", **hashed), entry("a_b", **hashed)]
    report.append({"metadata": {"name": "opsd_megatron", "version": "0.1.0"}, "download_info": {"dir_info": {}}})
    assert lock_script.lock_lines(report) == ["a-b==1.0 --hash=sha256:ab", "zope-event==1.0 --hash=sha256:ab"]
    with pytest.raises(SystemExit, match="six: pip reported no sha256"):
        lock_script.lock_lines([entry("six")])


def test_no_requirement_is_the_apex_of_pypi(setup_arguments: dict[str, Any], locked: dict[str, Version]) -> None:
    named = {Requirement(text).name for text in setup_arguments["install_requires"]}
    for extra in setup_arguments["extras_require"].values():
        named |= {Requirement(text).name for text in extra}
    assert "apex" not in named | set(locked)


def test_wheel_holds_every_configuration_and_prompt(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "opsd_megatron", tmp_path / "opsd_megatron", ignore=ignored)
    shutil.copy(ROOT / "setup.py", tmp_path)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", "wheel"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheel").iterdir()
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {
        str(path.relative_to(tmp_path))
        for path in (tmp_path / "opsd_megatron").rglob("*")
        if path.is_file() and path.name != "py.typed"
    }
    assert shipped == sources


# --- The Dockerfile ---------------------------------------------------------------------------------------------------


def dockerfile_commands() -> list[str]:
    """Every `pip install ...` of the Dockerfile, with build arguments at their defaults."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    arguments = dict(re.findall(r"^ARG (\w+)=(.*)$", text, re.MULTILINE))
    lines = [line for line in text.splitlines() if line.startswith("RUN ")]
    commands = [command for line in lines for command in re.findall(r"pip install [^;&]+", line)]
    return [re.sub(r"\$\{(\w+)\}", lambda name: arguments[name[1]], command).strip() for command in commands]


def dockerfile_requirements() -> list[Requirement]:
    """What those commands take from the package index, pinned extras of the named packages included."""
    found: list[Requirement] = []
    for command in dockerfile_commands():
        words = [word.strip('"') for word in command.split()[2:]]
        if "-r" in words:
            file = ROOT / "requirements" / Path(words[words.index("-r") + 1]).name
            found += [Requirement(line) for line in file.read_text().splitlines() if not line.startswith("#")]
        found += [Requirement(word) for word in words if re.match(r"[A-Za-z][\w.-]*(\[.*\])?==", word)]
    return found


def test_dockerfile_installs_what_the_package_needs(
    setup_arguments: dict[str, Any], locked: dict[str, Version]
) -> None:
    named = {canonicalize_name(requirement.name): requirement for requirement in dockerfile_requirements()}
    from_base = {"torch", "vllm", "transformers", "numpy", "safetensors", "pyyaml", "huggingface-hub", "tqdm"}
    assert not from_base & set(named), "the base image's own builds must stay"
    for text in (*setup_arguments["install_requires"], *setup_arguments["extras_require"]["gpu"]):
        name = canonicalize_name(Requirement(text).name)
        assert name in from_base | set(named), f"the Dockerfile installs no {name}"
    for name, requirement in named.items():
        if name in locked:
            assert locked[name] in requirement.specifier, f"{requirement} is not what the lock tests"


def test_dockerfile_pins_nothing_that_the_base_may_hold() -> None:
    """Each version of the base is a constraint: beside another exact one, pip finds no solution."""
    pinned = {one.name for one in dockerfile_requirements() if any(part.operator == "==" for part in one.specifier)}
    assert pinned == {"megatron-core", "hydra-core", "transformer-engine"}


def test_dockerfile_ends_by_importing_training_and_evaluation() -> None:
    """Both load what they are built on; that they can be imported without a GPU, tests of theirs show."""
    (last,) = re.findall(r"import (opsd_megatron\..*)\"$", (ROOT / "Dockerfile").read_text())
    modules = [importlib.import_module(name) for name in last.split(", ")]
    assert [module.__name__.rpartition(".")[2] for module in modules] == ["setup", "stand_alone"]
    assert {"torch", "megatron.core"} <= sys.modules.keys()


def test_dockerfile_leaves_apex_to_nvidias_source() -> None:
    (apex,) = [command for command in dockerfile_commands() if "apex" in command]
    assert '"git+https://github.com/NVIDIA/apex@' in apex


def run_pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Pip for the container's Python, 3.12; it gives up soon where the index does not answer."""
    command = [sys.executable, "-m", "pip", *arguments, "--python-version", "3.12"]
    environment = {**os.environ, "PIP_RETRIES": "1", "PIP_TIMEOUT": "20", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def index_versions(name: str) -> set[str]:
    """The versions of ``name`` on the package index, as wheel or source, or an empty set."""
    listed = re.search(r"^Available versions: (.*)$", run_pip("index", "versions", name).stdout, re.MULTILINE)
    return set(listed[1].split(", ")) if listed else set()


@pytest.fixture(scope="module")
def engine() -> Requirement:
    """The Dockerfile's Transformer Engine. Its extras are distributions of their own and of the same version."""
    (pinned,) = [requirement for requirement in dockerfile_requirements() if requirement.name == "transformer-engine"]
    return pinned


@pytest.fixture(scope="module")
def container_wheels(engine: Requirement, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What pip would install of the Dockerfile's requirements in one call, as it describes each wheel.

    ``--no-deps``: their own dependencies are the base image's, or wheels that its Python resolves during the build.
    """
    if not index_versions("pip"):
        pytest.skip("the package index is out of reach")
    folder = tmp_path_factory.mktemp("pip")
    options = ["--dry-run", "--ignore-installed", "--no-deps", "--only-binary=:all:", "--quiet"]
    options += ["--target", str(folder / "unused"), "--report", str(folder / "report.json")]
    wanted = [*map(str, dockerfile_requirements()), f"transformer-engine-cu13{engine.specifier}"]
    resolved = run_pip("install", *options, *wanted)
    assert resolved.returncode == 0, resolved.stderr
    return [entry["metadata"] for entry in json.loads((folder / "report.json").read_text())["install"]]


@pytest.mark.network
def test_dockerfile_requirements_resolve(container_wheels: list[dict[str, Any]]) -> None:
    found = {canonicalize_name(wheel["name"]): Version(wheel["version"]) for wheel in container_wheels}
    for requirement in dockerfile_requirements():
        assert found[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.mark.network
def test_dockerfile_requirements_agree_with_one_another(container_wheels: list[dict[str, Any]]) -> None:
    found = {canonicalize_name(wheel["name"]): wheel["version"] for wheel in container_wheels}
    container = {"python_version": "3.12", "python_full_version": "3.12.0", "extra": ""}
    for wheel in container_wheels:
        for needed in map(Requirement, wheel.get("requires_dist", [])):
            version = found.get(canonicalize_name(needed.name))
            if version is not None and (needed.marker is None or needed.marker.evaluate(container)):
                assert version in needed.specifier, f"{wheel['name']} needs {needed}, the Dockerfile has {version}"


@pytest.mark.network
def test_the_torch_extension_of_transformer_engine_is_on_the_index(engine: Requirement) -> None:
    if not index_versions("pip"):
        pytest.skip("the package index is out of reach")
    assert {*engine.specifier.filter(index_versions("transformer-engine-torch"))}  # as source only: no wheel to resolve


def test_transformer_engine_is_one_that_megatron_core_declares(engine: Requirement) -> None:
    (declared,) = [
        requirement
        for requirement in map(Requirement, metadata.requires("megatron-core") or [])
        if requirement.name == engine.name
    ]
    assert {*declared.specifier.filter(pin.version for pin in engine.specifier)}
