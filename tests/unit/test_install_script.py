"""requirements/install.sh, run in a scratch folder with a Python that only writes down what it is asked to do."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "requirements" / "install.sh"
# Everything the script calls. A PATH of these alone is a machine on which the test decides which Pythons there are.
TOOLS = (
    "awk bash cat cp df dirname find flock getconf grep ls mkdir mv rm sed sha256sum tail tee touch uname".split()  # noqa: SIM905 - a command line's worth of names
)
LOCK = "setuptools==1 --hash=sha256:aa\ntorch==2+cpu --hash=sha256:bb\nnumpy==3 --hash=sha256:cc\n"

FAKE_PYTHON = """#!/bin/bash
root={root}
case "$1 $2" in
    "-c import sys"*) echo {version} ;;
    "-c import ensurepip"*) test ! -e $root/no_ensurepip ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/python3.11" ;;
    "-m pip")
        echo "$*" >> $root/pip_calls
        if [[ -p $root/pip_waits ]]; then exec {python} -c '{wait}' $root/pip_waits; fi
        for pattern in $(cat $root/pip_fails 2>/dev/null); do
            if [[ "$*" == *"$pattern"* ]]; then echo "pip says no"; exit 1; fi
        done ;;
esac
"""

# pip when it is interrupted: it ends by itself and with an ordinary exit status.
WAIT_FOR_INTERRUPT = """
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
open(sys.argv[1]).read(0)
signal.sigwait([signal.SIGINT])
sys.exit(1)
"""


def fake_python(root: Path, version: str) -> str:
    """A shell script that stands for a Python of this version."""
    return FAKE_PYTHON.format(root=root, version=version, python=sys.executable, wait=WAIT_FOR_INTERRUPT)


@dataclass
class Machine:
    """A folder with the script, and a PATH that holds nothing but ``bin``."""

    root: Path

    def fake(self, name: str, text: str) -> None:
        """Put an executable on the PATH in place of whatever is there."""
        path = self.root / "bin" / name
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def python(self, name: str = "python3.11", version: str = "3.11") -> None:
        """Put an interpreter on the PATH."""
        self.fake(name, fake_python(self.root, version))

    def install(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the script to its end."""
        return subprocess.run(
            [shutil.which("bash") or "bash", str(self.root / "requirements" / "install.sh")],
            # As under make, and in a shell where the environment is activated.
            env={"PATH": f"{self.venv}/bin:{self.root}/bin", **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    def pip_calls(self) -> list[str]:
        """What pip was asked since the last time this was called."""
        log = self.root / "pip_calls"
        calls = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return calls

    def pip_fails_on(self, *patterns: str) -> None:
        """Let pip fail where its arguments contain one of these."""
        (self.root / "pip_fails").write_text(" ".join(patterns))

    @property
    def venv(self) -> Path:
        """The environment the script makes."""
        return self.root / ".venv"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine on which the script succeeds."""
    (tmp_path / "requirements").mkdir()
    shutil.copy(SCRIPT, tmp_path / "requirements")
    (tmp_path / "requirements" / "cpu.lock").write_text(LOCK)
    (tmp_path / "setup.py").write_text("")
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        path = shutil.which(tool)
        assert path is not None, tool
        (tmp_path / "bin" / tool).symlink_to(path)
    made = Machine(tmp_path)
    made.python()
    made.fake("df", "#!/bin/bash\nprintf 'head\\n/dev/x 9 9 999999 1%% /\\n'\n")
    return made


def assert_refused(machine: Machine, *said: str, **environment: str) -> None:
    """The script ends with one clear error, before it touched anything."""
    result = machine.install(**environment)
    assert result.returncode == 1, result
    assert result.stderr.startswith("error: "), result
    for text in said:
        assert text in result.stderr
    assert machine.pip_calls() == []


def test_installs_torch_then_the_lock_then_the_package(machine: Machine) -> None:
    result = machine.install()
    assert result.returncode == 0, result
    setuptools, torch, rest, package = machine.pip_calls()
    for call, name in ((setuptools, "setuptools.txt"), (torch, "torch.txt"), (rest, "rest.txt")):
        assert "--no-deps" in call and "--require-hashes" in call and call.endswith(name)
        assert "--index-url" not in call
    assert package.endswith("--no-build-isolation --no-deps -e .")
    assert "Installed in" in result.stdout


def test_second_run_installs_nothing_and_says_nothing(machine: Machine) -> None:
    machine.install()
    machine.pip_calls()
    result = machine.install()
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert machine.pip_calls() == []


def test_torch_comes_from_its_own_index_where_the_configured_one_lacks_it(machine: Machine) -> None:
    machine.fake(
        "python3.11",
        fake_python(machine.root, "3.11").replace(
            'echo "$*" >> $root/pip_calls',
            'echo "$*" >> $root/pip_calls\nif [[ "$*" == *torch.txt && "$*" != *--index-url* ]]; then exit 1; fi',
        ),
    )
    result = machine.install()
    assert result.returncode == 0, result
    calls = machine.pip_calls()
    assert len(calls) == 5
    assert "--index-url https://download.pytorch.org/whl/cpu" in calls[2] and "--require-hashes" in calls[2]
    assert "not in pip's configured index" in result.stdout


@pytest.mark.parametrize("step", ["setuptools.txt", "torch.txt", "rest.txt"])
def test_failed_install_is_explained_and_done_again(machine: Machine, step: str) -> None:
    machine.pip_fails_on(step)
    result = machine.install()
    assert result.returncode == 1
    assert "pip says no" in result.stderr and "error: pip could not install" in result.stderr
    machine.pip_fails_on()
    machine.pip_calls()
    (machine.venv / "leftover").touch()
    assert machine.install().returncode == 0
    assert len(machine.pip_calls()) == 4
    assert not (machine.venv / "leftover").exists()


def test_interrupted_install_stops_and_is_done_again(machine: Machine) -> None:
    waits = machine.root / "pip_waits"
    os.mkfifo(waits)
    process = subprocess.Popen(
        [shutil.which("bash") or "bash", str(machine.root / "requirements" / "install.sh")],
        env={"PATH": str(machine.root / "bin")},
        start_new_session=True,
        # A process started in the background of a shell ignores interrupts, and so do those it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stderr=subprocess.PIPE,
        text=True,
    )
    with waits.open("w"):  # opens once pip is there to be interrupted
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "interrupted; the next run starts over" in errors
    assert len(machine.pip_calls()) == 1, "what follows the interrupted step was not started"
    waits.unlink()
    assert machine.install().returncode == 0
    assert len(machine.pip_calls()) == 4


def test_changed_lock_or_moved_folder_makes_the_environment_anew(machine: Machine, tmp_path: Path) -> None:
    machine.install()
    machine.pip_calls()
    (machine.root / "requirements" / "cpu.lock").write_text(LOCK + "six==1 --hash=sha256:dd\n")
    assert machine.install().returncode == 0
    assert len(machine.pip_calls()) == 4
    moved = Machine(machine.root.with_name("moved"))
    machine.root.rename(moved.root)
    moved.python()
    assert moved.install().returncode == 0
    assert len(moved.pip_calls()) == 4


def test_changed_setup_installs_the_package_only(machine: Machine) -> None:
    machine.install()
    machine.pip_calls()
    (machine.root / "setup.py").write_text("# other extras")
    assert machine.install().returncode == 0
    assert [call[-4:] for call in machine.pip_calls()] == ["-e ."]
    assert machine.install().stdout == ""


def test_somebody_elses_environment_is_left_alone(machine: Machine) -> None:
    machine.venv.mkdir()
    (machine.venv / "mine").touch()
    assert_refused(machine, ".venv exists and was not made by this script", "mv .venv")
    assert (machine.venv / "mine").exists()


def test_needs_python_3_11(machine: Machine) -> None:
    (machine.root / "bin" / "python3.11").unlink()
    assert_refused(machine, "Python 3.11 is needed and was not found (no Python that runs)", "apt install python3.11")
    machine.python("python3", version="3.12")
    assert_refused(machine, f"{machine.root}/bin/python3 is 3.12", "PYTHON=/path/to/python3.11")
    machine.python("python", version="3.11")
    assert machine.install().returncode == 0


def test_python_variable_names_the_interpreter(machine: Machine) -> None:
    machine.python("other", version="3.13")
    assert_refused(machine, "PYTHON=other: other is 3.13", PYTHON="other")
    machine.python("other", version="3.11")
    assert "[1/4] .venv from other\n" in machine.install(PYTHON="other").stdout


def test_needs_the_venv_module(machine: Machine) -> None:
    (machine.root / "no_ensurepip").touch()
    assert_refused(machine, "lacks the standard modules venv and ensurepip", "apt install python3.11-venv")


def test_needs_disk_space(machine: Machine) -> None:
    machine.fake("df", "#!/bin/bash\nprintf 'Filesystem\\n/dev/x 9 9 6143 1%% /\\n'\n")
    assert_refused(machine, "needs 6144 MiB free", "there are 6143 MiB")
    machine.fake("df", "#!/bin/bash\nprintf 'Filesystem\\n/dev/x 9 9 6144 1%% /\\n'\n")
    assert machine.install().returncode == 0


@pytest.mark.parametrize("system", ["Darwin arm64", "Linux aarch64"])
def test_needs_linux_x86_64(machine: Machine, system: str) -> None:
    name, processor = system.split()
    machine.fake("uname", f"#!/bin/bash\nif [[ $1 == -s ]]; then echo {name}; else echo {processor}; fi\n")
    assert_refused(machine, f"this machine is {system}", "docs/install.md")


@pytest.mark.parametrize(("getconf", "found"), [("echo glibc 2.31", "glibc 2.31"), ("exit 1", "another C library")])
def test_needs_a_recent_c_library(machine: Machine, getconf: str, found: str) -> None:
    machine.fake("getconf", f"#!/bin/bash\n{getconf}\n")
    assert_refused(machine, "glibc 2.34 or newer", f"this system has {found}")


def test_needs_avx2(machine: Machine) -> None:
    real = os.path.realpath(shutil.which("grep") or "")
    machine.fake("grep", f'#!/bin/bash\nif [[ $* == *avx2* ]]; then exit 1; fi\nexec {real} "$@"\n')
    assert_refused(machine, "AVX2")
