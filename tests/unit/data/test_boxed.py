from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsd_megatron.data.boxed import last_boxed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no box at all", None),
        (r"\boxed{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{1} and then cut off: \boxed{2", "1"),
        (r"\boxed{1 + \boxed{2", None),
        (r"{ unbalanced \boxed{3}", "3"),
        (r"stray } before \boxed{3}", "3"),
        (r"\boxed{}", ""),
        (r"\boxed{ 4 }", "4"),
        (r"\boxed 5", None),
        (r"\\boxed{5}", None),
        (r"boxed{1}", None),
        ("\\boxed{never \\", None),
        ("\\boxed{a\\\\}", "a\\\\"),
    ],
)
def test_last_boxed(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


@given(st.text(alphabet="{}\\b", max_size=40), st.text(alphabet="ab{}", max_size=10))
def test_a_balanced_box_at_the_end_is_always_the_last(prefix: str, content: str) -> None:
    balanced = content.replace("{", "").replace("}", "")
    # "x" ends what a trailing backslash would escape.
    assert last_boxed(f"{prefix}x\\boxed{{{balanced}}}") == balanced


def test_last_boxed_takes_one_pass() -> None:
    # The obvious scan, from each opening to the end, would need 10^10 steps for this.
    assert last_boxed("\\boxed{" * 150_000) is None
