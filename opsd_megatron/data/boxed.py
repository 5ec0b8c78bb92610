r"""The convention for final answers: the last ``\boxed{}`` of a text."""

from __future__ import annotations

import re

_TOKENS = re.compile(r"(\\boxed\s*\{)|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete ``\boxed{...}``, without blanks around it, or ``None``.

    Braces nest; an escaped one (``\{``) is text. Of nested boxes the inner one is the last. A box that is never closed
    (a response cut off by the token limit) is none. One pass, so linear in the length whatever the text.
    """
    opened: list[int | None] = []  # start of the content for a box, None for a plain brace
    start, content = -1, None
    for token in _TOKENS.finditer(text):
        if token.group(1):
            opened.append(token.end())
        elif token.group() == "{":
            opened.append(None)
        elif token.group() == "}" and opened:
            begin = opened.pop()
            if begin is not None and begin > start:
                start, content = begin, text[begin : token.start()].strip()
    return content
