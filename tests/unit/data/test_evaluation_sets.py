"""Every known set against a directory shaped like its Hub repository, and what else a user may name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from opsd_megatron.config import DataConfig
from opsd_megatron.data.evaluation_sets import EvaluationSet, evaluation_set, known_sets
from opsd_megatron.errors import DataError

# For each set: the file its Hub repository holds, rows with all of its columns, and the (problem, answer) expected.
SHAPES: dict[str, tuple[str, list[dict[str, Any]], list[tuple[str, str]]]] = {
    "math500": (
        "test.jsonl",
        [
            {"problem": "p1", "solution": "s \\boxed{3}", "answer": "3", "subject": "x", "level": 2, "unique_id": "a"},
            {"problem": "p2", "solution": "s", "answer": r"\frac{1}{2}", "subject": "x", "level": 5, "unique_id": "b"},
        ],
        [("p1", "3"), ("p2", r"\frac{1}{2}")],
    ),
    "aime24": (
        "data/train-00000-of-00001.parquet",
        [{"id": 60, "problem": "p", "solution": "s", "answer": "204", "url": "https://", "year": "2024"}],
        [("p", "204")],
    ),
    "aime25": (
        "data/train-00000-of-00001.parquet",
        [{"id": 0, "problem": "p", "answer": 70, "solution": "", "url": "https://", "year": "2025"}],
        [("p", "70")],
    ),
    "hmmt25": (
        "data/train-00000-of-00001.parquet",
        [{"problem_idx": 1, "problem": "p", "answer": r"9\sqrt{23}", "problem_type": ["Geometry", "Algebra"]}],
        [("p", r"9\sqrt{23}")],
    ),
    "amo_bench": (
        "data/test-00000-of-00001.parquet",
        [
            {"question_id": 1, "prompt": "p", "solution": "s", "answer": r"$\boxed{8}$", "answer_type": "number"},
            {"question_id": 2, "prompt": "q", "solution": "s", "answer": "All primes", "answer_type": "description"},
            {"question_id": 3, "prompt": "r", "solution": "s", "answer": r"$\boxed{\{1\}}$", "answer_type": "set"},
        ],
        [("p", r"$\boxed{8}$"), ("r", r"$\boxed{\{1\}}$")],
    ),
    "amc23": (
        "test-00000-of-00001.parquet",
        [{"id": 0, "answer": 27.0, "url": "https://", "question": "p"}],
        [("p", "27")],
    ),
    "minerva": ("test.jsonl", [{"question": "p", "answer": "1.6e-19"}], [("p", "1.6e-19")]),
}  # fmt: skip


def write_repository(directory: Path, file: str, rows: list[dict[str, Any]]) -> Path:
    path = directory / file
    path.parent.mkdir(parents=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path)
    (directory / "README.md").write_text("---\n")
    return directory


def test_every_known_set_has_a_shape() -> None:
    assert list(known_sets()) == list(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_a_copy_of_a_known_set(name: str, tmp_path: Path) -> None:
    file, rows, expected = SHAPES[name]
    directory = write_repository(tmp_path / "copy", file, rows)
    known = evaluation_set(f"{name}@{directory}")
    assert known.name == name
    # The columns of the run's own data mean nothing here.
    problems = known.load(DataConfig(problem_column="q", solution_column="s", answer_column="a"))
    assert [(problem.problem, problem.answer) for problem in problems] == expected
    assert [problem.problem for problem in known.load(DataConfig(), most=1)] == [expected[0][0]]


@pytest.mark.parametrize("name", SHAPES)
def test_a_known_set_from_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, rows, expected = SHAPES[name]
    asked: list[tuple[str, str]] = []

    def load_dataset(hub_name: str, *, split: str) -> list[dict[str, Any]]:
        asked.append((hub_name, split))
        return rows

    monkeypatch.setattr("opsd_megatron.data.problems._load_dataset", load_dataset)
    problems = evaluation_set(name).load(DataConfig())
    assert [(problem.problem, problem.answer) for problem in problems] == expected
    assert asked == [(known_sets()[name]["source"], known_sets()[name]["split"])]
    # The split's name is that of the file in the repository.
    assert Path(file).name.startswith(asked[0][1])


def test_of_a_copy_with_several_splits_the_right_one_is_read(tmp_path: Path) -> None:
    directory = write_repository(tmp_path / "copy", "data/test-00000-of-00001.parquet", SHAPES["amc23"][1])
    parquet.write_table(pa.table({"question": ["other"], "answer": ["1"]}), directory / "data" / "train.parquet")
    assert [p.problem for p in evaluation_set(f"amc23@{directory}").load(DataConfig())] == ["p"]
    only = write_repository(tmp_path / "only", "amc.jsonl", [{"question": "q", "answer": "1"}])
    assert [p.problem for p in evaluation_set(f"amc23@{only}").load(DataConfig())] == ["q"]
    file = only / "amc.jsonl"
    assert [p.problem for p in evaluation_set(f"amc23@{file}").load(DataConfig())] == ["q"]


def test_a_copy_with_other_columns_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    directory = write_repository(tmp_path / "copy", "train.jsonl", [{"Problem": "p", "Answer": "1"}])
    with pytest.raises(DataError, match=r"train\.jsonl:1: no column 'problem'; it has: Problem, Answer.*"
                                        r"aime24 is a known set .* pass .*/copy:train under another name"):  # fmt: skip
        evaluation_set(f"aime24@{directory}").load(DataConfig())
    named = evaluation_set(f"mine@{directory}")
    columns = DataConfig(problem_column="Problem", answer_column="Answer")
    assert (named.name, [problem.problem for problem in named.load(columns)]) == ("mine", ["p"])


def test_an_own_set_may_lack_the_training_datas_answer_column(tmp_path: Path) -> None:
    """Its `answer` stands for it, but no solution's box."""
    config = DataConfig(answer_column="Answer")
    file = tmp_path / "mine.jsonl"
    file.write_text('{"problem": "p", "answer": 1, "Answer": 2}\n')
    assert evaluation_set(str(file)).load(config)[0].answer == "2"
    file.write_text('{"problem": "p", "answer": 1, "solution": "so \\\\boxed{3}"}\n')
    assert evaluation_set(str(file)).load(config)[0].answer == "1"
    file.write_text('{"problem": "p", "solution": "so \\\\boxed{3}"}\n')
    with pytest.raises(
        DataError, match=r"mine\.jsonl:1: no column 'Answer', here .*; it has: problem, solution; name "
    ):
        evaluation_set(str(file)).load(config)


def test_own_sources_have_names(tmp_path: Path) -> None:
    file = tmp_path / "held out@2.v1.jsonl"
    file.write_text('{"problem": "p", "answer": 1}\n')
    assert evaluation_set(str(file)) == EvaluationSet("held_out_2.v1", str(file))
    assert evaluation_set("org/maths-v1.1:test").name == "maths-v1.1_test"
    assert evaluation_set("some@org/maths") == EvaluationSet("some", "org/maths")


def test_a_misspelt_name_is_not_looked_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"aime23 is no evaluation set; known by name are math500, aime24, .*minerva"):
        evaluation_set("aime23")
    with pytest.raises(DataError, match="no such file"):
        evaluation_set(str(tmp_path / "no.jsonl")).load(DataConfig())


def test_a_problem_without_answer_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"problem": "p", "solution": "no box"}\n')
    with pytest.raises(DataError, match=r"mine\.jsonl:1: no column 'answer'; it has: problem, solution"):
        evaluation_set(str(file)).load(DataConfig())
