"""Golden problems from every kind of source, and one clear error for every kind of bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from opsd_megatron.config import DataConfig
from opsd_megatron.data.problems import load_problems
from opsd_megatron.errors import DataError
from opsd_megatron.types import Problem


def write(path: Path, *rows: object) -> str:
    """Rows as JSON lines; text rows are written as they are."""
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", "utf-8")
    return str(path)


def load(
    source: str, *, solution: bool = True, response: bool = False, answer: bool = False, **columns: str
) -> list[Problem]:
    config = DataConfig(**columns)
    return load_problems(config, source, needs_solution=solution, needs_response=response, needs_answer=answer)


def test_jsonl_golden(tmp_path: Path) -> None:
    source = write(
        tmp_path / "train.jsonl",
        {"problem": "1+1?", "solution": "It is \\boxed{2}.", "other": [1]},
        "",
        {"problem": "ünïcode {x}?", "solution": "\\boxed{3}", "answer": "three"},
        {"problem": "p", "solution": "no box", "answer": 7},
        {"problem": "q", "solution": "\\boxed{8}", "answer": None},
    )
    assert load(source) == [
        Problem(id="train.jsonl:1", problem="1+1?", solution="It is \\boxed{2}.", answer="2"),
        Problem(id="train.jsonl:3", problem="ünïcode {x}?", solution="\\boxed{3}", answer="three"),
        Problem(id="train.jsonl:4", problem="p", solution="no box", answer="7"),
        Problem(id="train.jsonl:5", problem="q", solution="\\boxed{8}", answer="8"),
    ]


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"problem": "a", "solution": "b"}\r\n{"problem": "c", "solution": "d"}\r\n')
    assert [p.problem for p in load(str(path))] == ["a", "c"]


def test_only_needed_columns_are_required(tmp_path: Path) -> None:
    source = write(tmp_path / "eval.jsonl", {"problem": "p", "answer": 1.0}, {"problem": "p", "solution": [1]})
    problems = load(source, solution=False)
    assert [(p.solution, p.answer) for p in problems] == [("", "1"), ("", None)]
    with pytest.raises(DataError, match=r"eval\.jsonl:1: no column 'solution'"):
        load(source)


def test_renamed_columns_responses_and_roles(tmp_path: Path) -> None:
    source = write(
        tmp_path / "sft.jsonl",
        {"q": "a", "s": "ref", "r": "out", "who": "teacher"},
        {"q": "b", "r": "out2", "who": "student"},
    )
    columns = {"problem_column": "q", "solution_column": "s", "response_column": "r", "role_column": "who"}
    assert load(source, solution=False, response=True, **columns) == [
        Problem(id="sft.jsonl:1", problem="a", solution="ref", response="out", role="teacher"),
        Problem(id="sft.jsonl:2", problem="b", response="out2", role="student"),
    ]
    # Without supervision the role and response columns mean nothing.
    assert {p.role for p in load(source, solution=False, **columns)} == {"student"}


def test_columns_within_columns(tmp_path: Path) -> None:
    nested = {"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": 2}, "a.b": "dotted"}
    columns = {"problem_column": "prompt.0.content", "answer_column": "reward_model.ground_truth"}
    jsonl = write(tmp_path / "nested.jsonl", nested)
    (problem,) = load(jsonl, solution=False, answer=True, **columns)
    assert (problem.problem, problem.answer) == ("1+1?", "2")
    parquet.write_table(pa.Table.from_pylist([nested]), tmp_path / "nested.parquet")
    (same,) = load(str(tmp_path / "nested.parquet"), solution=False, answer=True, **columns)
    assert (same.problem, same.answer) == ("1+1?", "2")
    assert load(jsonl, solution=False, problem_column="a.b")[0].problem == "dotted"
    for column in ("prompt.1.content", "prompt.0.text", "prompt.x", "reward_model.ground_truth.0"):
        with pytest.raises(DataError, match=f"no column '{column}'; it has: prompt, reward_model, a.b; name the one"):
            load(jsonl, solution=False, problem_column=column)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(7, "7"), (7.0, "7"), (0.5, "0.5"), ("007", "007"), (["7"], "7"), ([1, 2], "1, 2"), ([], "8"), ([None], "8")],
)
def test_answers_are_numbers_texts_or_lists_of_them(tmp_path: Path, answer: object, expected: str) -> None:
    source = write(tmp_path / "d.jsonl", {"problem": "p", "solution": "\\boxed{8}", "answer": answer})
    assert load(source, answer=True)[0].answer == expected


def test_a_named_answer_column_that_no_row_has(tmp_path: Path) -> None:
    """The solution's box is no answer to a mistyped name; where some rows have the column, it is for the others."""
    boxed = {"problem": "p", "solution": "\\boxed{8}"}
    config = DataConfig(answer_column="meta.gold")

    def answers(*rows: dict[str, object]) -> list[str | None]:
        source = write(tmp_path / "d.jsonl", *rows)
        return [one.answer for one in load_problems(config, str(source), needs_solution=True, needs_response=False)]

    assert answers(boxed, {**boxed, "meta": {"gold": "9"}}) == ["8", "9"]
    with pytest.raises(DataError, match=r"d\.jsonl:1: no column 'meta\.gold', here or in any other row; it has: "
                                        r"problem, solution, meta; .* data\.answer_column=NAME, .*=null"):  # fmt: skip
        answers({**boxed, "meta": {}}, boxed)
    # A name of the user's own choosing is one, the default's too.
    for column in ("answer", None):
        config = DataConfig(answer_column=column)
        if column is None:
            assert answers(boxed, {**boxed, "answer": "9"}) == answers({**boxed}, {**boxed, "answer": 9}) == ["8", "9"]
            assert answers(boxed) == ["8"]
        else:
            with pytest.raises(DataError, match="no column 'answer', here or in any other row"):
                answers(boxed)
    # Where nobody asks for an answer, its column need not be there.
    source = write(tmp_path / "d.jsonl", boxed)
    load_problems(config, str(source), needs_solution=True, needs_response=False, uses_answer=False)


def test_a_needed_answer_that_is_not_there(tmp_path: Path) -> None:
    rows = {"problem": "p", "solution": "s", "answer": "1"}, {"problem": "p", "solution": "s", "final": "1"}
    source = write(tmp_path / "d.jsonl", *rows)
    with pytest.raises(DataError, match=r"d\.jsonl:2: no column 'answer'; it has: problem, solution, final; name .*"
                                        r"data\.answer_column=NAME"):  # fmt: skip
        load(source, answer=True)
    assert [problem.answer for problem in load(source)] == ["1", None]
    empty = write(tmp_path / "e.jsonl", {"problem": "p", "solution": "s", "answer": " "})
    with pytest.raises(DataError, match=r"e\.jsonl:1: column 'answer' .* is empty, and the solution in 'solution'"):
        load(empty, answer=True)


def test_rows_can_be_left_out(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", *({"problem": str(n), "kind": kind} for n, kind in enumerate("abca")))
    config = DataConfig()
    problems = load_problems(
        config, source, needs_solution=False, needs_response=False, without={"kind": ["a", "c"], "other": ["x"]}
    )
    assert [(problem.id, problem.problem) for problem in problems] == [("d.jsonl:2", "1")]
    with pytest.raises(DataError, match="holds no rows"):
        load_problems(config, source, needs_solution=False, needs_response=False, without={"kind": ["a", "b", "c"]})


def test_directories_as_hub_repositories_have_them(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---")
    (tmp_path / "infos.json").write_text("{}")
    data = tmp_path / "data"
    data.mkdir()
    for name, problem in [("test-00000-of-00002", "a"), ("test-00001-of-00002", "b"), ("train-00000-of-00001", "c")]:
        parquet.write_table(pa.table({"problem": [problem]}), data / f"{name}.parquet")
    assert [p.problem for p in load(str(tmp_path), solution=False)] == ["a", "b", "c"]
    assert [p.problem for p in load(f"{tmp_path}:test", solution=False)] == ["a", "b"]
    with pytest.raises(
        DataError, match=r"has no files of the split 'dev'; it holds test-00000-of-00002\.parquet, test"
    ):
        load(f"{tmp_path}:dev", solution=False)
    lines = tmp_path / "lines"
    lines.mkdir()
    write(lines / "test.jsonl", {"problem": "d"})
    assert [(p.id, p.problem) for p in load(f"{lines}:test", solution=False)] == [("test.jsonl:1", "d")]


def test_response_defaults_to_the_solution(tmp_path: Path) -> None:
    source = write(tmp_path / "sft.jsonl", {"problem": "a", "solution": "s"})
    assert load(source, solution=False, response=True)[0].response == "s"
    missing = write(tmp_path / "no.jsonl", {"problem": "a"})
    with pytest.raises(DataError, match=r"no column 'solution'.*data\.solution_column=NAME"):
        load(missing, solution=False, response=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"problem": "p", ', r"data\.jsonl:2: malformed JSON at column \d+"),
        ("[1, 2]", r"data\.jsonl:2: holds a list; every line must be one JSON object"),
        ("3", r"data\.jsonl:2: holds a number"),
        ('{"question": "p", "solution": "s"}', r"data\.jsonl:2: no column 'problem'; it has: question, solution; .*"
         r"data\.problem_column=NAME"),
        ("{}", r"data\.jsonl:2: no column 'problem'; it has: none"),
        ('{"problem": "", "solution": "s"}', r"data\.jsonl:2: column 'problem' \(data\.problem_column\) is empty"),
        ('{"problem": "p", "solution": " \\n"}', r"data\.jsonl:2: column 'solution' \(data\.solution_.* is empty"),
        ('{"problem": 5, "solution": "s"}', r"data\.jsonl:2: column 'problem' .* holds a number where text"),
        ('{"problem": "p", "solution": null}', r"data\.jsonl:2: column 'solution' .* holds null where text"),
        ('{"problem": "p", "solution": "s", "answer": {}}', r"data\.jsonl:2: column 'answer' .* holds an object"),
        ('{"problem": "\\ud800", "solution": "s"}', r"data\.jsonl:2: column 'problem' .* surrogate"),
    ],
)  # fmt: skip
def test_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    source = write(tmp_path / "data.jsonl", {"problem": "p", "solution": "s"}, line)
    with pytest.raises(DataError, match=message):
        load(source)


def test_unknown_role_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", {"problem": "p", "solution": "s", "role": "judge"})
    with pytest.raises(DataError, match=r"d\.jsonl:1: role='judge' is neither student nor teacher \(data\.role_column"):
        load(source, response=True, role_column="role")


def test_role_teacher_needs_a_solution(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", {"problem": "p", "r": "x", "role": "teacher"})
    with pytest.raises(DataError, match=r"d\.jsonl:1: no column 'solution'"):
        load(source, solution=False, response=True, response_column="r", role_column="role")


def test_encoding_error_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"problem": "p", "solution": "s"}\n{"problem": "caf\xe9", "solution": "s"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl:2: not UTF-8 text \(byte 17 of the line\)"):
        load(str(path))


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"empty\.jsonl: holds no rows"):
        load(str(tmp_path / "empty.jsonl"))


@pytest.mark.parametrize(
    "source",
    ["missing.jsonl", "./org/name", "/org/name", "a/b/c", "org/name.parquet", "../x", "name", "~/x", "a/b:c:d"],
)
def test_missing_paths_are_not_looked_up_on_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsd_megatron.data.problems._load_dataset", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(DataError, match="no such file or directory"):
        load(source)


def test_unsupported_suffix_and_directory_without_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"a\.csv: unknown kind of file '\.csv'; data must be"):
        load(str(tmp_path / "a.csv"))
    with pytest.raises(DataError, match=r"holds no \.parquet or \.jsonl files"):
        load(str(tmp_path))


def test_parquet_file_and_directory(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"problem": ["c"], "solution": [""]}), tmp_path / "b.parquet")
    parquet.write_table(pa.table({"problem": ["a", "b"], "solution": ["\\boxed{1}", "s"]}), tmp_path / "a.parquet")
    problems = load(str(tmp_path), solution=False)
    assert [(p.id, p.problem, p.answer) for p in problems] == [
        ("a.parquet:1", "a", "1"), ("a.parquet:2", "b", None), ("b.parquet:1", "c", None),
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"b\.parquet: row 1: column 'solution' .* is empty"):
        load(str(tmp_path / "b.parquet"))
    (tmp_path / "broken.parquet").write_bytes(b"nope")
    with pytest.raises(DataError, match=r"broken\.parquet: cannot be read as Parquet"):
        load(str(tmp_path / "broken.parquet"))
    parquet.write_table(pa.table({"problem": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(DataError, match=r"none\.parquet: holds no rows"):
        load(str(tmp_path / "none.parquet"))


def test_hub_name_split_and_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def fake(name: str, *, split: str) -> list[dict[str, str]]:
        asked.append((name, split))
        if split == "nope":
            raise ValueError('Unknown split "nope".\nmore')
        return [{"problem": "p", "solution": "s"}, {"problem": "", "solution": "s"}][: 1 if split == "train" else 2]

    monkeypatch.setattr("opsd_megatron.data.problems._load_dataset", fake)
    assert load("org/maths-v1.1")[0].id == "org/maths-v1.1:train:1"
    with pytest.raises(DataError, match=r"^org/name:test: row 2: column 'problem'"):
        load("org/name:test")
    with pytest.raises(
        DataError, match=r'^org/name:nope: cannot be loaded .* ValueError: Unknown split "nope"\.; check'
    ):
        load("org/name:nope")
    assert asked == [("org/maths-v1.1", "train"), ("org/name", "test"), ("org/name", "nope")]
