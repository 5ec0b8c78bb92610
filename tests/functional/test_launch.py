"""The command line as users start it: torchrun, two agents standing for two nodes, and errors that stop everything."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from opsd_megatron.train import run
from tests.distributed import run_distributed
from tests.functional.runs import SmallRun, make_small_run, read_metrics, torchrun


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return make_small_run(tmp_path_factory.mktemp("small"))


def start(arguments: list[str], overrides: list[str]) -> subprocess.Popen[str]:
    return torchrun(arguments, "opsd_megatron.train", overrides)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_two_agents_run_one_job(small: SmallRun, tmp_path: Path) -> None:
    """Two torchrun agents, each with one rank, meet at a rendezvous and train one tensor-parallel model.

    It samples with a vLLM of the same two ranks.
    """
    output = tmp_path / "run"
    engine = {"rollout__kv_cache_gib": 0.1, "rollout__max_log_prob_gap": 1e-3}
    overrides = small.overrides(output, steps=3, scripted=False, parallel__tensor=2, parallel__sequence=True, **engine)
    port = free_port()
    agents = [
        start(
            [
                *("--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node)),
                *("--master-addr", "127.0.0.1", "--master-port", str(port)),
            ],
            overrides,
        )
        for node in range(2)
    ]
    outputs = [agent.communicate(timeout=600)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    lines = read_metrics(output)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["divergence"] > 0 and line["grad_norm"] > 0 for line in lines)


def test_bad_input_on_one_node_ends_the_job_on_all(small: SmallRun, tmp_path: Path) -> None:
    """The second node lacks the data: both end, and each says why."""
    port = free_port()
    agents = [
        start(
            [
                *("--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node)),
                *("--master-addr", "127.0.0.1", "--master-port", str(port)),
            ],
            small.overrides(tmp_path / "run", steps=1, data__train=data),
        )
        for node, data in enumerate([small.data, tmp_path / "absent.jsonl"])
    ]
    outputs = [agent.communicate(timeout=600)[0] for agent in agents]
    assert all(agent.returncode != 0 for agent in agents)
    assert "error: on rank 1: " in outputs[0] and "absent.jsonl" in outputs[0]
    assert not (tmp_path / "run").exists()


def test_nodes_with_different_settings_are_told(small: SmallRun, tmp_path: Path) -> None:
    run_ = tmp_path / "run"
    with pytest.raises(AssertionError, match="rank 1 was started with other settings"):
        run_distributed(_run_with_own_seed, 2, small.overrides(run_, steps=1, parallel__tensor=2))
    assert not run_.exists()


def _run_with_own_seed(overrides: list[str]) -> None:
    run([*overrides, f"train.seed={os.environ['RANK']}"])


def test_bad_input_stops_every_rank_with_one_line(small: SmallRun, tmp_path: Path) -> None:
    output = tmp_path / "run"
    overrides = small.overrides(output, steps=1, data__train=tmp_path / "absent.jsonl")
    agent = start(["--standalone", "--nproc-per-node", "2"], overrides)
    printed = agent.communicate(timeout=600)[0]
    assert agent.returncode != 0
    assert printed.count("error: ") == 1, printed
    assert "absent.jsonl" in printed
    assert not output.exists()
