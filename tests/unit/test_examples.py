"""The launch scripts of examples/qwen3 and the paper's recipe, without a GPU and without starting a training run."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from opsd_megatron.config.compose import compose_config

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "qwen3"
SCRIPTS = sorted(path for suffix in ("*.sh", "*.sbatch") for path in (ROOT / "examples").rglob(suffix))


def environment(**extra: str) -> dict[str, str]:
    """What a user with the environment active has, without what this test run may have been started under."""
    kept = {key: os.environ[key] for key in ("HOME", "TMPDIR", "LANG") if key in os.environ}
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"])
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **extra}


def run_script(name: str, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(EXAMPLE / name), *arguments], env=environment(**extra), cwd=ROOT, capture_output=True, text=True
    )


def dry_run(name: str, *arguments: str, **extra: str) -> tuple[list[str], dict[str, dict[str, object]]]:
    """The commands that ``name`` would start, and the configuration it prints."""
    finished = run_script(name, *arguments, DRY_RUN="1", **extra)
    assert finished.returncode == 0, finished.stderr
    commands, _, configuration = finished.stdout.partition("# configuration:\n")
    return [line for line in commands.splitlines() if line.startswith("# command:")], yaml.safe_load(configuration)


def test_there_are_scripts() -> None:
    assert {path.name for path in SCRIPTS} >= {"run_single_node.sh", "run_multi_node.sh", "slurm.sbatch"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_is_silent(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=environment()["PATH"])
    assert shellcheck is not None, "shellcheck is missing; install the development requirements"
    finished = subprocess.run([shellcheck, str(script)], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout
    assert "\nset -euo pipefail\n" in script.read_text()


def test_single_node_dry_run_shows_command_and_configuration() -> None:
    commands, config = dry_run("run_single_node.sh", "output_dir=/data/my runs/a", "train.steps=7", GPUS_PER_NODE="2")
    assert commands == [
        "# command: torchrun --standalone --nproc-per-node 2 -m opsd_megatron.train "
        "experiment=qwen3_1.7b_opsd output_dir=/data/my\\ runs/a train.steps=7"
    ]
    assert config["output_dir"] == "/data/my runs/a"
    assert config["train"]["steps"] == 7
    assert config["model"]["path"] == "Qwen/Qwen3-1.7B"


def test_multi_node_dry_run() -> None:
    commands, config = dry_run("run_multi_node.sh", "train.seed=3", NNODES="4", NODE_RANK="2", MASTER_ADDR="node0")
    assert commands == [
        "# command: torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node0:29500 "
        "--rdzv-id opsd-node0-29500 --rdzv-conf is_host=0 -m opsd_megatron.train experiment=qwen3_1.7b_opsd "
        "train.seed=3"
    ]
    assert config["train"]["seed"] == 3


def test_the_experiment_is_chosen_by_a_variable() -> None:
    commands, config = dry_run("run_single_node.sh", EXPERIMENT="qwen3_8b_sft")
    assert commands == [
        "# command: torchrun --standalone --nproc-per-node 8 -m opsd_megatron.train experiment=qwen3_8b_sft"
    ]
    assert (config["model"]["path"], config["objective"]["name"]) == ("Qwen/Qwen3-8B", "sft")


@pytest.mark.parametrize("missing", ["NNODES", "NODE_RANK", "MASTER_ADDR"])
def test_multi_node_names_the_variable_that_is_missing(missing: str) -> None:
    variables = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "node0"}
    del variables[missing]
    finished = run_script("run_multi_node.sh", DRY_RUN="1", **variables)
    assert finished.returncode != 0
    assert missing in finished.stderr and "set it to" in finished.stderr


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("NODE_RANK", "a", "NODE_RANK=a must be a whole number from 0 up"),
        ("NODE_RANK", "-1", "NODE_RANK=-1 must be"),
        ("NODE_RANK", "2", "NODE_RANK=2 must be below NNODES=2"),
        ("NNODES", "0", "NNODES=0 must be a whole number from 1 up"),
        ("NNODES", "1:2", "NNODES=1:2 must be"),
        ("MASTER_PORT", "tcp", "MASTER_PORT=tcp must be"),
        ("GPUS_PER_NODE", "08", "GPUS_PER_NODE=08 must be"),
    ],
)
def test_multi_node_refuses_what_is_no_number(variable: str, value: str, message: str) -> None:
    variables = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "node0", "DRY_RUN": "1", variable: value}
    finished = run_script("run_multi_node.sh", **variables)
    assert finished.returncode == 2 and finished.stdout == ""
    assert finished.stderr.startswith(f"error: {message}")


def test_single_node_refuses_what_is_no_number() -> None:
    finished = run_script("run_single_node.sh", DRY_RUN="1", GPUS_PER_NODE="all")
    assert finished.returncode == 2 and finished.stderr == "error: GPUS_PER_NODE=all is not a number of GPUs\n"


@pytest.mark.parametrize(
    ("script", "variables", "world"),
    [
        ("run_single_node.sh", {"GPUS_PER_NODE": "2"}, 2),
        ("run_multi_node.sh", {"NNODES": "3", "NODE_RANK": "0", "MASTER_ADDR": "node0"}, 24),
    ],
)
def test_a_dry_run_says_what_it_leaves_unchecked_and_how_to_check_it(
    script: str, variables: dict[str, str], world: int, tmp_path: Path
) -> None:
    finished = run_script(script, f"model.path={tmp_path / 'no model'}", DRY_RUN="1", **variables)
    assert finished.returncode == 0, finished.stderr
    (note,) = [line for line in finished.stdout.splitlines() if line.startswith("# not checked:")]
    command = shlex.split(note.partition("): ")[2])
    assert command[:5] == ["python", "-m", "opsd_megatron.train", "--check", str(world)]
    checked = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert checked.returncode == 2
    assert checked.stderr.startswith("error: ") and "no model" in checked.stderr


def test_slurm_dry_run_shows_both_commands() -> None:
    commands, config = dry_run("slurm.sbatch", "train.steps=7", SRUN_ARGS="--container-image=a --container-mounts=/b")
    script = EXAMPLE / "run_multi_node.sh"
    assert commands[0] == (
        f"# command: srun --kill-on-bad-exit=1 --container-image=a --container-mounts=/b {script} "
        "checkpoint.resume=true train.steps=7"
    )
    assert "--rdzv-conf is_host=1" in commands[1] and "train.steps=7" in commands[1]
    assert config["train"]["steps"] == 7 and config["checkpoint"]["resume"] is True


def stand_in(folder: Path, programs: dict[str, str]) -> None:
    """Put bash scripts of these names and bodies into ``folder``."""
    for name, body in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\nset -eu\n{body}\n")
        (folder / name).chmod(0o755)


def test_inside_a_slurm_job_every_node_gets_its_part(tmp_path: Path) -> None:
    """With stand-ins for scontrol, srun (two tasks) and torchrun, which prints how it was called."""
    stand_ins = {
        "scontrol": 'printf "%s\\n" gpu07 gpu09',
        "srun": 'for node in 0 1; do SLURM_NODEID=$node "${@:2}"; done',
        "torchrun": 'echo "$CUDA_DEVICE_MAX_CONNECTIONS" "$SRUN_CPUS_PER_TASK" "$OMP_NUM_THREADS" "$@"',
    }
    stand_in(tmp_path, stand_ins)
    finished = run_script(
        "slurm.sbatch",
        "train.steps=7",
        PATH=f"{tmp_path}:{environment()['PATH']}",
        SLURM_JOB_NODELIST="gpu[07,09]",
        SLURM_NNODES="2",
        SLURM_JOB_ID="123456",
        SLURM_GPUS_ON_NODE="4",
        SLURM_CPUS_PER_TASK="26",
        SLURM_SUBMIT_DIR=str(ROOT),
        OMP_NUM_THREADS="",
    )
    assert finished.returncode == 0, finished.stderr
    calls = finished.stdout.splitlines()
    assert [call.replace(f"is_host={1 - node}", "is_host=X") for node, call in enumerate(calls)] == [
        "1 26 6 --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint gpu07:23456 "
        "--rdzv-id opsd-gpu07-23456 --rdzv-conf is_host=X -m opsd_megatron.train experiment=qwen3_1.7b_opsd "
        "checkpoint.resume=true train.steps=7"
    ] * 2


def test_a_slurm_job_near_its_time_limit_stops_its_ranks_and_is_queued_again(tmp_path: Path) -> None:
    """The batch script's SIGUSR1 arrives at the ranks, past torchrun, which ignores it and ends when they have."""
    log, rank = tmp_path / "log", tmp_path / "rank.py"
    # In Python as the real one is: bash could not listen to a signal that was ignored when it began.
    rank.write_text(
        "import signal, sys\n"
        "def save(*_): print('saved', flush=True); sys.exit(75)\n"
        "signal.signal(signal.SIGUSR1, save)\n"
        "print('ready', flush=True)\n"
        "while True: signal.pause()\n"
    )
    stand_in(
        tmp_path,
        {
            "scontrol": f'[[ $1 == show ]] && echo gpu07 || echo "scontrol $*" >> {log}',
            "srun": 'SLURM_NODEID=0 exec "${@:2}"',
            "torchrun": f"kill -USR1 $$\n{sys.executable} {rank} >> {log} || exit 1",
        },
    )
    job = subprocess.Popen(
        ["bash", str(EXAMPLE / "slurm.sbatch")],
        env=environment(
            PATH=f"{tmp_path}:{environment()['PATH']}",
            SLURM_JOB_NODELIST="gpu07",
            SLURM_NNODES="1",
            SLURM_JOB_ID="123456",
            SLURM_SUBMIT_DIR=str(ROOT),
        ),
    )
    try:
        deadline = time.monotonic() + 30
        while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=300) == 1
    finally:
        job.kill()
    assert log.read_text().splitlines() == ["ready", "saved", "scontrol requeue 123456"]


def test_a_slurm_job_whose_ranks_end_as_the_signal_comes_is_queued_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    stand_in(
        tmp_path,
        {
            "scontrol": f'[[ $1 == show ]] && echo gpu07 || echo "scontrol $*" >> {log}',
            # The signal and srun's end reach the script together.
            "srun": "trap '' USR1; sleep 0.5; kill -USR1 $PPID; exit 75",
        },
    )
    finished = run_script(
        "slurm.sbatch",
        PATH=f"{tmp_path}:{environment()['PATH']}",
        SLURM_JOB_NODELIST="gpu07",
        SLURM_NNODES="1",
        SLURM_JOB_ID="123456",
        SLURM_SUBMIT_DIR=str(ROOT),
    )
    assert finished.returncode != 0
    assert log.read_text().splitlines() == ["scontrol requeue 123456"]


def test_slurm_script_outside_a_job_is_an_error() -> None:
    finished = run_script("slurm.sbatch")
    assert finished.returncode == 2
    assert "not inside a Slurm job" in finished.stderr


def test_an_unknown_key_fails_the_dry_run() -> None:
    finished = run_script("run_single_node.sh", "train.stesp=3", DRY_RUN="1")
    assert finished.returncode != 0
    assert "did you mean train.steps?" in finished.stderr


def test_two_agents_meet_and_form_one_world() -> None:
    """Two torchrun agents on this machine reach the trainer, which refuses a mesh that their world does not fit."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    nodes = [
        subprocess.Popen(
            ["bash", str(EXAMPLE / "run_multi_node.sh"), "parallel.tensor=4"],
            env=environment(
                NNODES="2", NODE_RANK=str(node), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GPUS_PER_NODE="1"
            ),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in (1, 0)
    ]
    try:
        outputs = [node.communicate(timeout=600)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert all(node.returncode != 0 for node in nodes)
    assert "the world size 2 is not a multiple of parallel.tensor * parallel.pipeline" in "".join(outputs)


def test_the_recipe_is_the_papers() -> None:
    config = compose_config(["experiment=qwen3_1.7b_opsd"])
    for world_size in (1, 4, 8, 16):
        config.validate(world_size)
    expected = {
        "objective.name": "opsd",
        "objective.beta": 0.0,
        "objective.clip": 0.05,
        "objective.clip_mode": "entry",
        "teacher.policy": "adapter_off",
        "lora.rank": 64,
        "lora.alpha": 128,
        "data.train": "siyanzhao/Openthoughts_math_30k_opsd",
        "data.problem_column": "problem",
        "data.solution_column": "solution",
        "data.student_thinking": False,
        "data.teacher_thinking": True,
        "data.privileged": "reference",
        "model.dtype": "bfloat16",
        "rollout.temperature": 1.1,
        "rollout.top_p": 0.95,
        "rollout.top_k": 20,
        "rollout.max_new_tokens": 1024,
        "rollout.samples_per_problem": 1,
        "optimizer.lr": 5e-6,
        "optimizer.beta1": 0.9,
        "optimizer.beta2": 0.999,
        "optimizer.weight_decay": 0.0,
        "optimizer.clip_grad": 0.1,
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": 0,
        "train.problems_per_step": 32,
        "train.steps": 100,
        "checkpoint.every": 25,
    }
    assert {key: config.get(key) for key in expected} == expected
