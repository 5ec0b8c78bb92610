r"""The quickstart's maths task: word problems that add two three-digit numbers, with solutions worth learning from.

A problem looks like ``Ann has 478 coins and finds 356 more. How many?``. Its *own-style* solution, the text a model is
to produce, adds column by column from the right and then states the answer:

    <think>
    8+6=14
    7+5+1=13
    4+3+1=8
    </think>

    \boxed{834}

The *reference* is the same working in another style, on one line: ``8+6=14; 7+5+1=13; 4+3+1=8. So \boxed{834}``. Only
the teacher reads it.

The noise model makes a base model that can solve these problems but often does not: solutions it is warm-started on
contain slips (a digit replaced by another one, carried on consistently) and, in some of them, every carry is forgotten.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

DIGITS = 3
NAMES = ("Ann", "Bob", "Cal", "Dee", "Eve", "Fay", "Gus", "Hal", "Ivy", "Jon")
ITEMS = ("coins", "shells", "cards", "beads", "nuts", "pens")
TEMPLATES = (
    "{name} has {a} {item} and finds {b} more. How many?",
    "{name} sold {a} {item} in May and {b} in June. How many?",
    "A box holds {a} {item}. {name} adds {b}. How many?",
)


@dataclass(frozen=True)
class Addition:
    """One word problem.

    Attributes:
        a: First summand, of ``DIGITS`` digits.
        b: Second summand, of ``DIGITS`` digits.
        template: Index into ``TEMPLATES``.
        text: The statement.
    """

    a: int
    b: int
    template: int
    text: str

    @property
    def answer(self) -> str:
        """The sum, in digits."""
        return str(self.a + self.b)

    @property
    def pair(self) -> tuple[int, int]:
        """The summands in ascending order: two problems with equal pairs are the same sum."""
        return min(self.a, self.b), max(self.a, self.b)


@dataclass(frozen=True)
class Noise:
    """How solutions go wrong.

    Attributes:
        slip: Probability that a digit is replaced by another one as it is read, written or copied into the answer.
        forget_carries: For each template, the probability that a whole solution ignores every carry between columns.
    """

    slip: float = 0.02
    forget_carries: tuple[float, float, float] = (0.7, 0.3, 0.15)


def draw_problem(rng: random.Random) -> Addition:
    """A random problem that carries into the tens or the hundreds, so that forgetting carries gives a wrong answer."""
    while True:
        a, b = (rng.randint(10 ** (DIGITS - 1), 10**DIGITS - 1) for _ in range(2))
        if any(a % 10**column + b % 10**column >= 10**column for column in range(1, DIGITS)):
            break
    template = rng.randrange(len(TEMPLATES))
    text = TEMPLATES[template].format(name=rng.choice(NAMES), item=rng.choice(ITEMS), a=a, b=b)
    return Addition(a=a, b=b, template=template, text=text)


def solution(problem: Addition, *, noise: Noise | None = None, rng: random.Random | None = None) -> str:
    """The solution in the model's own style, without an end-of-sequence token.

    Args:
        problem: What to solve.
        noise: How it may go wrong; ``None`` for a correct solution.
        rng: Source of the noise; needed with ``noise``.
    """
    lines, answer = _work(problem, noise, rng)
    return "<think>\n" + "\n".join(lines) + "\n</think>\n\n\\boxed{" + answer + "}"


def reference(problem: Addition) -> str:
    """The correct working in the reference's style, on one line."""
    lines, answer = _work(problem, None, None)
    return "; ".join(lines) + ". So \\boxed{" + answer + "}"


def _work(problem: Addition, noise: Noise | None, rng: random.Random | None) -> tuple[list[str], str]:
    """The column sums, units first, and the answer they lead to."""
    if noise is None:
        forget, slip = False, 0.0
    else:
        if rng is None:
            raise ValueError("a noisy solution needs rng")
        forget, slip = rng.random() < noise.forget_carries[problem.template], noise.slip

    def read(digit: int) -> int:
        if rng is not None and slip and rng.random() < slip:
            return rng.choice([other for other in range(10) if other != digit])
        return digit

    lines: list[str] = []
    units: list[int] = []
    carry = 0
    for column in range(DIGITS):
        x, y = (read(summand // 10**column % 10) for summand in (problem.a, problem.b))
        carried = 0 if forget else carry
        carry, unit = divmod(x + y + carried, 10)
        units.append(read(unit))
        lines.append(f"{x}+{y}{'+1' if carried else ''}={carry or ''}{units[-1]}")
    answer = "".join(str(read(unit)) for unit in reversed(units))
    return lines, (str(carry) if carry else "") + answer
