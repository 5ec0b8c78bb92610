"""What the stand-alone command checks before it starts an engine."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from opsd_megatron.checkpoint.convert import hf_to_megatron
from opsd_megatron.config.compose import compose_config
from opsd_megatron.errors import EXIT_BAD_INPUT, OpsdError
from opsd_megatron.evaluate import main, run
from opsd_megatron.evaluation.answers import Judge, JudgeError
from opsd_megatron.evaluation.stand_alone import StandAlone
from opsd_megatron.rollout.engine import Sampling
from opsd_megatron.trainer.setup import check_inputs
from opsd_megatron.types import Generation
from tests.distributed import run_distributed
from tests.tiny import make_tiny_qwen3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3(tmp_path_factory.mktemp("model") / "model", num_layers=1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"problem": f"p{n}", "answer": n}) + "\n" for n in range(5)))
    return file


def arguments(model: Path, data: Path, *overrides: str) -> list[str]:
    output = data.parent / "out"
    base = [f"model.path={model}", f"data.eval={data}", "evaluation.max_new_tokens=8", f"output_dir={output}"]
    return [*base, *overrides]


def test_check_says_what_there_is_to_do(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["--check", "4", *arguments(model, data, "rollout.tensor=2", "evaluation.max_problems=3")])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["valid for 4 processes", f"mine: 3 problems of {data}, 4 samples each"]
    assert not (data.parent / "out").exists()


def test_several_sets_in_the_order_given(model: Path, data: Path) -> None:
    amc = data.parent / "amc.jsonl"
    amc.write_text('{"question": "p", "answer": 27.0}\n')
    sets = f"evaluation.sets=[amc23@{amc},mine@{data},{data}]"
    with pytest.raises(OpsdError, match=r"evaluation\.sets has mine twice; give one a name of its own, NAME@SOURCE"):
        StandAlone.check(compose_config(arguments(model, data, sets)))
    sets = f"evaluation.sets=[amc23@{amc},mine@{data},again@{data}]"
    checked = StandAlone.check(compose_config(arguments(model, data, sets)))
    assert [(one.name, len(problems)) for one, problems in checked.sets] == [("amc23", 1), ("mine", 5), ("again", 5)]


def test_a_checkpoint_brings_its_own_configuration(model: Path, data: Path, tmp_path: Path) -> None:
    hf_to_megatron(model, tmp_path / "converted")
    overrides = arguments(model, data, f"model.checkpoint={tmp_path / 'converted'}", "model.path=org/not_downloaded")
    checked = StandAlone.check(compose_config(overrides))
    assert checked.source == tmp_path / "converted" / "hf"
    plain = StandAlone.check(compose_config(arguments(model, data)))
    assert checked.max_length == plain.max_length < 1024
    assert checked.fingerprint != plain.fingerprint


def test_a_model_of_another_family_can_be_evaluated(model: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text()) | {"model_type": "llama", "max_position_embeddings": 300}
    (other / "config.json").write_text(json.dumps(config))
    StandAlone.check(compose_config(arguments(other, data)))
    with pytest.raises(OpsdError, match="within the 300 tokens"):
        StandAlone.check(compose_config(arguments(other, data, "evaluation.max_new_tokens=300")))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path="], "neither model.path nor model.checkpoint is set"),
        (["data.eval=null"], r"no evaluation set is named; pass evaluation\.sets=\[aime24,\.\.\.\]"),
        (["output_dir="], "output_dir is not set"),
        (["rollout.engine=scripted"], "rollout.engine=scripted cannot evaluate"),
        (["parallel.tensor=0"], "parallel.tensor=0 must be at least 1"),
        (["rollout.tensor=3"], "rollout.tensor=3 does not divide the world size 1"),
        (["evaluation.samples_per_problem=0"], "evaluation.samples_per_problem=0 must be at least 1"),
        (["evaluation.sets=[aime23]"], "aime23 is no evaluation set; known by name are math500"),
        (["data.problem_column=question"], r"mine\.jsonl:1: no column 'question'; it has: problem, answer"),
        (["evaluation.max_new_tokens=1024"], "leave no room for a prompt within the 1024 tokens"),
        (["evaluation.max_length=40"], r"mine\.jsonl:1: the student prompt has \d+ tokens; at most 32 fit"),
        (["data.student_template=nowhere.txt"], "data.student_template=nowhere.txt is not a file"),
        (["model.checkpoint=nowhere"], "nowhere"),
        (["model.pth=x"], "unknown key model.pth; did you mean model.path?"),
    ],
)
def test_bad_input_is_one_line(
    model: Path, data: Path, overrides: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.argv", ["evaluate", *arguments(model, data), *overrides])
    assert main() == EXIT_BAD_INPUT
    printed = capsys.readouterr()
    with pytest.raises(OpsdError, match=message):
        raise OpsdError(printed.err)
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert not (data.parent / "out").exists()


def test_a_judge_that_cannot_start_is_known_before_anything_is_sampled(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(judge: Judge) -> None:
        raise JudgeError("the answer judge does not start")

    monkeypatch.setattr(Judge, "start", start)
    with pytest.raises(JudgeError, match="does not start"):
        run(["--check", "1", *arguments(model, data)])


@pytest.mark.parametrize("experiment", ["qwen3_1.7b_opsd", "qwen3_4b_sft", "qwen3_8b_grpo"])
def test_the_papers_protocol_is_a_choice(
    experiment: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Longer responses than the recipes train on, within the positions of Qwen3: in training and by itself."""
    paper = ["evaluation=paper", f"experiment={experiment}", f"output_dir={tmp_path / 'out'}", f"data.eval={data}"]
    model = make_tiny_qwen3(tmp_path / "model", num_layers=1, max_positions=40960)
    training = tmp_path / "train.jsonl"
    training.write_text(json.dumps({"problem": "p", "solution": "s", "Answer": "1"}) + "\n")
    config = compose_config([*paper, f"model.path={model}", f"data.train={training}"])
    settings = config.evaluation
    assert (settings.samples_per_problem, settings.temperature, settings.max_new_tokens) == (12, 1.0, 38912)
    assert settings.thinking is True
    config.validate(1)
    inputs = check_inputs(config)
    assert inputs.engine_length == StandAlone.check(config).max_length
    assert 38912 < inputs.engine_length < 38912 + 400
    assert inputs.identity["model"]["max_length"] == config.model.max_length < 38912
    if experiment != "qwen3_1.7b_opsd":
        return
    (model / "config.json").write_text((model / "config.json").read_text().replace("40960", "32768"))
    for check in (check_inputs, StandAlone.check):
        with pytest.raises(OpsdError, match=r"38912 tokens .* leave no room .* 32768 tokens of evaluation.max_length"):
            check(config)
    run(["--cfg", "job", "evaluation=paper", "evaluation.samples_per_problem=3"])
    assert "max_new_tokens: 38912" in capsys.readouterr().out


def test_compare_of_what_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate", "compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert main() == EXIT_BAD_INPUT
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/a: is no file, and no directory")


class Killed(Exception):
    """What ends an evaluation here."""


class Engine:
    """Answers by seed alone; is killed in call number ``fails_in``."""

    def __init__(self, fails_in: int | None) -> None:
        self.sizes: list[int] = []
        self._fails_in = fails_in

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int]
    ) -> list[Generation]:
        self.sizes.append(len(prompts))
        if len(self.sizes) == self._fails_in:
            raise Killed
        ids = [tuple(f"\\boxed{{{seed % 5}}}".encode()) for seed in seeds]
        return [Generation(own, (0.0,) * len(own), "stop") for own in ids]

    def close(self) -> None:
        pass


def _evaluations(runs: list[tuple[list[str], int | None]]) -> list[tuple[list[int], list[str]]]:
    """The worker: what each run asked of the engine, and the lines that it showed."""
    found = []
    for overrides, fails_in in runs:
        engine, shown = Engine(fails_in), list[str]()
        started = mock.patch.object(StandAlone, "_start_engine", lambda self, engine=engine: engine)
        with started, mock.patch.object(Judge, "start"):  # a second for each run
            try:
                StandAlone.check(compose_config(overrides)).run(shown.append)
            except Killed:
                shown.append("killed")
        found.append((engine.sizes, shown))
    return found


def test_an_evaluation_that_was_killed_goes_on_where_it_ended(model: Path, data: Path, tmp_path: Path) -> None:
    """Two sets of 5 problems and 2 samples, 4 responses a call: the first takes calls 1 to 3, the second 4 to 6."""

    def settings(name: str, *more: str) -> list[str]:
        return arguments(
            model, data, f"evaluation.sets=[one@{data},two@{data}]", "evaluation.samples_per_problem=2",
            "evaluation.responses_per_call=4", f"output_dir={tmp_path / name}", *more,
        )  # fmt: skip

    def files(name: str) -> dict[str, Any]:
        return {path.name: path.read_text() for path in (tmp_path / name).glob("[!.]*")}

    runs = [
        (settings("whole"), None),
        (settings("parted"), 5),
        (settings("parted", "train.seed=1"), 1),  # another evaluation: it goes on with nothing, and neither with it
        (settings("parted"), 6),
        (settings("again"), 5),
        (settings("again"), None),
        (settings("again"), None),
    ]
    (whole, first, other, second, begun, resumed, anew), on_rank_1 = run_distributed(_evaluations, 2, runs)
    assert [sizes for sizes, _ in on_rank_1] == [one[0] for one in (whole, first, other, second, begun, resumed, anew)]
    assert (whole[0], first[0], other[0]) == ([4, 4, 2, 4, 4, 2], [4, 4, 2, 4, 4], [4])
    assert second[0] == [4, 4, 2, 4, 4, 2] and second[1][-1] == "killed"
    assert any(name.startswith("one.jsonl.replaced") for name in files("parted"))
    assert resumed[0] == [4, 2] and resumed[1][0] == "going on where this evaluation was ended: one, two"
    # A finished one is done anew, and the earlier is set aside.
    assert anew[0] == whole[0] and len(files("again")) == 3 + 4
    for name in ("one.jsonl", "two.jsonl", "results.json"):
        assert files("again")[name] == files("whole")[name]
    assert sorted(files("whole")) == ["one.jsonl", "results.json", "two.jsonl"]


def test_another_evaluation_in_the_same_directory_is_kept_out(model: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    with (output / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        overrides = arguments(model, data, f"output_dir={output}")
        with pytest.raises(AssertionError, match=f"CheckpointError: output_dir={output} is in use by another process"):
            run_distributed(_evaluations, 1, [(overrides, None)])
    assert [path.name for path in output.iterdir()] == [".lock"]
