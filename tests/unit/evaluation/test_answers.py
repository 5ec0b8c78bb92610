from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opsd_megatron.evaluation import answers as answers_module
from opsd_megatron.evaluation.answers import JudgeError, Verdict, judge_answers

TIMEOUT = Verdict(correct=False, boxed=True, status="timeout")
RIGHT = Verdict(correct=True, boxed=True, status="ok")
WRONG = Verdict(correct=False, boxed=True, status="ok")


def boxed(content: str) -> str:
    return f"So the answer is $\\boxed{{{content}}}$."


def test_verdicts_in_order() -> None:
    cases = [
        (boxed("42"), "42", RIGHT),
        (boxed("43"), "42", WRONG),
        (boxed("0.5"), r"\frac{1}{2}", RIGHT),
        (boxed("1,234"), "1234", RIGHT),
        (boxed(r"\text{Yes}"), "Yes", RIGHT),
        (boxed("(3, 4)"), "(3,4)", RIGHT),
        (boxed(r"2\sqrt{2}"), r"\sqrt{8}", RIGHT),
        ("the answer is 42", "42", Verdict(correct=False, boxed=False, status="ok")),
        (boxed("1") + boxed("42"), "42", RIGHT),
        (boxed("42") + boxed("1"), "42", WRONG),
        (boxed("42"), r"\boxed{42}", RIGHT),
        (boxed(""), "42", Verdict(correct=False, boxed=True, status="unparsable")),
        (boxed(r"\frac{1}{"), "42", Verdict(correct=False, boxed=False, status="ok")),
        (boxed("\ud800"), "42", Verdict(correct=False, boxed=True, status="unparsable")),
        (boxed("5\n0"), "50", WRONG),
    ]
    verdicts = judge_answers([case[0] for case in cases], [case[1] for case in cases], seconds=20)
    assert verdicts == [case[2] for case in cases]


def test_a_hostile_answer_costs_only_itself() -> None:
    hostile = [
        "9^{9^{9^9}}",  # inside one C call, where no Python signal handler runs
        "(" * 3000 + "1" + ")" * 3000,  # deep nesting
        "10000000000!",
    ]
    responses = [boxed("1"), boxed(hostile[0]), boxed("2"), boxed(hostile[1]), boxed(hostile[2]), boxed("3")]
    verdicts = judge_answers(responses, ["1", "1", "2", "1", "1", "3"], seconds=1)
    assert verdicts == [RIGHT, TIMEOUT, RIGHT, TIMEOUT, TIMEOUT, RIGHT]


def test_an_answer_that_crashes_the_process_counts_as_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _replace_math_verify(monkeypatch, tmp_path, "os._exit(139)")
    verdicts = judge_answers([boxed("1"), boxed("bad"), boxed("2")], ["1", "1", "2"], seconds=20)
    assert verdicts == [RIGHT, TIMEOUT, RIGHT]


def test_an_answer_that_exhausts_memory_counts_as_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _replace_math_verify(monkeypatch, tmp_path, "bytearray(2**40)")
    assert judge_answers([boxed("bad"), boxed("2")], ["1", "2"], seconds=20) == [TIMEOUT, RIGHT]


def test_what_a_parser_prints_does_not_disturb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _replace_math_verify(monkeypatch, tmp_path, "os.write(1, b'[true, \"ok\"]\\n')")
    assert judge_answers([boxed("bad"), boxed("2")], ["1", "2"], seconds=20) == [WRONG, RIGHT]


def _replace_math_verify(monkeypatch: pytest.MonkeyPatch, directory: Path, on_bad: str) -> None:
    """Put a math_verify before the real one that compares texts and runs ``on_bad`` when it reads ``bad``."""
    (directory / "math_verify.py").write_text(
        "import os\n"
        "def parse(text, parsing_timeout):\n"
        "    if 'bad' in text:\n"
        f"        {on_bad}\n"
        "    return [len(text), text]\n"
        "def verify(gold, answer, timeout_seconds):\n"
        "    return gold == answer\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(directory), prepend=os.pathsep)


def test_equal_pairs_are_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []

    def judge(pairs: list[tuple[str, str]], *, seconds: float) -> list[Verdict]:
        seen.extend(pairs)
        return [RIGHT] * len(pairs)

    monkeypatch.setattr(answers_module, "_judge_pairs", judge)
    verdicts = judge_answers([boxed("1"), "none", boxed("1"), boxed("1")], ["1", "1", "1", "2"], seconds=1)
    assert seen == [("1", "1"), ("1", "2")]
    assert [verdict.boxed for verdict in verdicts] == [True, False, True, True]


def test_many_answers_over_several_processes_keep_their_order() -> None:
    numbers = range(600)
    verdicts = judge_answers([boxed(str(n)) for n in numbers], [str(n + (n % 3 == 0)) for n in numbers], seconds=20)
    assert [verdict.correct for verdict in verdicts] == [n % 3 != 0 for n in numbers]


def test_a_judge_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('sympy is broken here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(JudgeError, match=r"(?s)install math-verify.*sympy is broken here"):
        judge_answers([boxed("1")], ["1"], seconds=1)


def test_nothing_boxed_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("a process was started"))
    assert judge_answers(["no"], ["1"], seconds=1) == [Verdict(correct=False, boxed=False, status="ok")]
    assert judge_answers([], [], seconds=1) == []


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 responses but 1 answers"):
        judge_answers(["a", "b"], ["1"], seconds=1)


def test_the_worker_is_light_and_leaves_the_entry_module_alone(tmp_path: Path) -> None:
    """The entry module, unguarded as a user's may be, runs once; the worker loads neither torch nor the package."""
    (tmp_path / "math_verify.py").write_text(
        "import sys\n"
        "heavy = sorted({'torch', 'megatron', 'vllm', 'opsd_megatron'} & set(sys.modules))\n"
        "assert not heavy, heavy\n"
        "import statistics; assert hasattr(statistics, 'mean')\n"  # the standard library's, not evaluation's
        "parse = lambda text, parsing_timeout: [len(text)]\n"
        "verify = lambda gold, answer, timeout_seconds: True\n"
    )
    entry = tmp_path / "entry.py"
    entry.write_text(
        "print('entered')\n"
        "from opsd_megatron.evaluation.answers import judge_answers\n"
        "print(judge_answers([r'\\boxed{1}'], ['1'], seconds=5)[0].correct)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])])
    finished = subprocess.run(
        [sys.executable, str(entry)], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert finished.stdout.split() == ["entered", "True"]
