"""From problems to token ids, for both roles. Tokens in, tokens out: nothing made here is decoded again.

The boundary rule
-----------------
A role's prompt is its user message in the tokenizer's chat template, up to and including the header that opens the
assistant's turn. Response tokens are appended **directly after each role's own header; nothing else is inserted** on
either side. The header follows the role's thinking mode. In Qwen3's template it is, in thinking mode,

    <|im_start|>assistant\\n

and in non-thinking mode the same with an empty thought that closes the thinking before it began:

    <|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n

With the paper's choice (student off, teacher on) the first response token therefore follows an empty thought at the
student and the bare header at the teacher, which would rather open with ``<think>``: the divergence on the first token
or so is large for a reason that has nothing to do with the reference. Set ``data.teacher_thinking`` equal to
``data.student_thinking`` to give both roles the same header. ``PromptBuilder.header`` shows a role's header.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, cast

from opsd_megatron.config import DataConfig
from opsd_megatron.errors import ConfigError, DataError, ModelError
from opsd_megatron.types import Problem, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)

# {{name}} is a literal {name}; LaTeX such as \boxed{} or \frac{1}{2} in a template is neither.
_PLACEHOLDER = re.compile(r"\{\{(?P<literal>[A-Za-z_]\w*)\}\}|\{(?P<name>[A-Za-z_]\w*)\}")
# A tokenizer makes at most one token of a byte, and what it does to the text first (NFC, marking spaces) at most
# triples the bytes.
_MAX_TOKENS_PER_BYTE = 3


class PromptTemplate:
    """A user message with placeholders.

    Values are put in verbatim, in one pass: braces in a problem mean nothing.

    Args:
        path: The user's file; ``None``: the packaged one of the role.
        role: Whose message it is.

    Raises:
        ConfigError: The file cannot be read, lacks a placeholder, or holds an unknown one.
    """

    def __init__(self, path: str | None, *, role: Role) -> None:
        needed = {"problem"} if role == "student" else {"problem", "reference"}
        try:
            if path is None:
                text = resources.files(__package__).joinpath("prompts", f"{role}.txt").read_text("utf-8")
            else:
                text = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.{role}_template={path}: cannot be read as UTF-8 text: {error}") from error
        self._text = text.strip("\n")
        where = f"{path or f'prompts/{role}.txt'} (data.{role}_template)"
        found: set[str] = set()
        for match in _PLACEHOLDER.finditer(text):
            name = match["name"]
            if name is None:
                continue
            if name not in needed:
                line = text.count("\n", 0, match.start()) + 1
                raise ConfigError(
                    f"{where}, line {line}: unknown placeholder {{{name}}}; this template may use "
                    f"{_braced(needed)}; write {{{{{name}}}}} for a literal {{{name}}}"
                )
            found.add(name)
        if needed - found:
            raise ConfigError(f"{where}: lacks the placeholder {_braced(needed - found)}")

    def fill(self, values: Mapping[str, str]) -> str:
        """The message with every placeholder replaced by its value."""
        return _PLACEHOLDER.sub(
            lambda match: values[match["name"]] if match["literal"] is None else f"{{{match['literal']}}}", self._text
        )


def _braced(names: Iterable[str]) -> str:
    return " and ".join(f"{{{name}}}" for name in sorted(names))


class PromptBuilder:
    """Token ids of prompts and supervised targets, within the length limits. See the module's boundary rule.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        config: Templates, thinking modes, ``privileged``, ``max_prompt_tokens``.
        max_length: Longest sequence, prompt and response together, in tokens.
        max_new_tokens: Tokens kept free for the response after every prompt.

    Attributes:
        config: As given.
        max_new_tokens: As given.
        shortened_references: Teacher prompts so far whose reference was cut to make them fit.

    Raises:
        ConfigError: A template file is wrong, or ``max_new_tokens`` leaves no room for a prompt.
        ModelError: The tokenizer has no chat template, or one that fails.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, *, max_length: int, max_new_tokens: int
    ) -> None:
        self._tokenizer = tokenizer
        self.config = config
        self._max_length = max_length
        self.max_new_tokens = max_new_tokens
        self._student_template = PromptTemplate(config.student_template, role="student")
        self._teacher_template = PromptTemplate(config.teacher_template, role="teacher")
        self._thinking: dict[Role, bool] = {"student": config.student_thinking, "teacher": config.teacher_thinking}
        self.shortened_references = 0
        if max_new_tokens >= max_length:
            raise ConfigError(
                f"responses of {max_new_tokens} tokens (rollout.max_new_tokens, evaluation.max_new_tokens) leave no "
                f"room for a prompt within the {max_length} tokens of model.max_length (by default the model's "
                "max_position_embeddings); lower the former"
            )
        _check_chat_template(self, tokenizer, config)
        # What the chat template adds around a message, in bytes.
        self._chat_bytes = max(
            len(self._render("", thinking, generation_prompt=True).encode()) for thinking in (False, True)
        )

    def student(self, problem: Problem) -> tuple[int, ...]:
        """The student's prompt.

        Raises:
            DataError: It is too long; names the problem, the length and the limit.
        """
        return self._student(problem, self.max_new_tokens)

    def teacher(self, problem: Problem, reference: str | None) -> tuple[int, ...]:
        """The teacher's prompt.

        Where it does not fit, the *reference* loses as much of its end as needed, never the instruction or the
        header.

        Args:
            problem: The problem.
            reference: What the teacher sees beyond it. ``None``: nothing, the user message is exactly the student's
                (the control ``data.privileged=none``).

        Raises:
            DataError: It is too long even without any reference.
        """
        return self._teacher(problem, reference, self.max_new_tokens)

    def response(self, problem: Problem) -> tuple[int, ...]:
        """The supervised target: the response's tokens and the end-of-sequence token, unless it ends with that.

        Raises:
            ModelError: The tokenizer has no end-of-sequence token.
        """
        if problem.response is None:
            raise ValueError(f"{problem.id} has no response: its data was loaded without needs_response")
        eos = cast("int | None", self._tokenizer.eos_token_id)
        if eos is None:
            raise ModelError(
                "the tokenizer has no end-of-sequence token, which a supervised target ends with; set eos_token in the "
                "model directory's tokenizer_config.json"
            )
        ids = tuple(cast("list[int]", self._tokenizer(problem.response, add_special_tokens=False)["input_ids"]))
        return ids if ids and ids[-1] == eos else (*ids, eos)

    def supervised(self, problem: Problem) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Prompt and target of a supervised example, the prompt being that of the problem's role.

        The room kept for the response is the target's own length, not ``max_new_tokens``.

        Raises:
            DataError: The two together exceed ``max_length``.
        """
        response = self.response(problem)
        if problem.role == "student":
            return self._student(problem, len(response)), response
        return self._teacher(problem, problem.solution, len(response)), response

    def header(self, role: Role) -> str:
        """The text that opens the assistant's turn in a role's prompt: the response follows it directly."""
        message, thinking = "?", self._thinking[role]
        closed = self._render(message, thinking, generation_prompt=False)
        return self._render(message, thinking, generation_prompt=True).removeprefix(closed)

    def surely_fits(self, problem: Problem, role: Role, *, with_reference: bool, kept: int) -> bool:
        """Whether a role's prompt fits with certainty, judged by bytes alone (no tokenisation).

        Args:
            problem: The problem.
            role: Whose prompt; the student's never has a reference.
            with_reference: Use the teacher's template, around an empty reference.
            kept: Tokens kept for the response.
        """
        template = self._teacher_template if with_reference else self._student_template
        message = template.fill({"problem": problem.problem, "reference": ""})
        most_tokens = _MAX_TOKENS_PER_BYTE * (len(message.encode()) + self._chat_bytes)
        return most_tokens <= self._limit(role, kept)[0]

    def _student(self, problem: Problem, kept: int) -> tuple[int, ...]:
        ids = self._encode(self._student_template.fill({"problem": problem.problem}), self._thinking["student"])
        return self._checked(ids, problem, "student", kept)

    def _teacher(self, problem: Problem, reference: str | None, kept: int) -> tuple[int, ...]:
        thinking = self._thinking["teacher"]
        if reference is None:
            ids = self._encode(self._student_template.fill({"problem": problem.problem}), thinking)
            return self._checked(ids, problem, "teacher", kept)

        def prompt(characters: int) -> tuple[int, ...]:
            values = {"problem": problem.problem, "reference": reference[:characters]}
            return self._encode(self._teacher_template.fill(values), thinking)

        limit, _ = self._limit("teacher", kept)
        whole = prompt(len(reference))
        if len(whole) <= limit:
            return whole
        best, fits, too_long = self._checked(prompt(0), problem, "teacher", kept), 0, len(reference)
        # The length need not grow with every character (a longer text can merge into fewer tokens), so what is kept is
        # a prompt whose own length was checked.
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            ids = prompt(middle)
            if len(ids) <= limit:
                best, fits = ids, middle
            else:
                too_long = middle
        self._report_shortened(problem, reference, len(whole), fits)
        return best

    def _report_shortened(self, problem: Problem, reference: str, tokens: int, kept: int) -> None:
        self.shortened_references += 1
        if self.shortened_references == 1:
            _logger.warning(
                "%s: the teacher prompt has %d tokens with its whole reference; the first %d of the reference's %d "
                "characters are kept. Further ones are counted, not reported; raise model.max_length to avoid it.",
                problem.id, tokens, kept, len(reference),
            )  # fmt: skip

    def _limit(self, role: Role, kept: int) -> tuple[int, str]:
        """The most tokens a prompt may have, and the words for why."""
        room = self._max_length - kept
        if role == "student" and self.config.max_prompt_tokens is not None and self.config.max_prompt_tokens < room:
            return self.config.max_prompt_tokens, f"data.max_prompt_tokens={self.config.max_prompt_tokens}"
        return room, (
            f"model.max_length={self._max_length} less the {kept} tokens of the response (rollout.max_new_tokens, "
            "evaluation.max_new_tokens, or the supervised target)"
        )

    def _checked(self, ids: tuple[int, ...], problem: Problem, role: Role, kept: int) -> tuple[int, ...]:
        limit, why = self._limit(role, kept)
        if len(ids) > limit:
            what = "" if role == "student" else ", even without any reference"
            raise DataError(
                f"{problem.id}: the {role} prompt has {len(ids)} tokens{what}; at most {max(limit, 0)} fit: {why}; "
                "remove the problem or raise the limit"
            )
        return ids

    def _render(self, message: str, thinking: bool, *, generation_prompt: bool) -> str:
        return cast(
            str,
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": message}],
                add_generation_prompt=generation_prompt,
                enable_thinking=thinking,
                tokenize=False,
            ),
        )

    def _encode(self, message: str, thinking: bool) -> tuple[int, ...]:
        ids = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": message}],
            add_generation_prompt=True,
            enable_thinking=thinking,
            tokenize=True,
            return_dict=False,
        )
        return tuple(cast("list[int]", ids))


def _check_chat_template(builder: PromptBuilder, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template; use a chat model "
            "(Qwen/Qwen3-1.7B rather than a Base one), or put a chat_template.jinja into the model directory"
        )
    try:
        headers = builder.header("student"), builder.header("teacher")
    except Exception as error:  # the template is a program of its own: whatever it raises is about the model directory
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path or 'the model'} fails on a single user message: {error}"
        ) from error
    if config.student_thinking != config.teacher_thinking and headers[0] == headers[1]:
        _logger.warning(
            "this chat template ignores enable_thinking: data.student_thinking and data.teacher_thinking differ, yet "
            "both roles get the header %r",
            headers[0],
        )


def check_prompts(problems: Iterable[Problem], builder: PromptBuilder, *, with_teacher: bool) -> None:
    """Find prompts that cannot fit before any engine is built.

    Only problems whose size in bytes leaves a doubt are tokenised, so tens of thousands take a second or so.

    Args:
        problems: What will be shown.
        builder: Makes the prompts.
        with_teacher: Check the teacher's prompts too (without the reference, which would be shortened).

    Raises:
        DataError: As :meth:`PromptBuilder.student` and :meth:`PromptBuilder.teacher` do, for the first such problem.
    """
    kept = builder.max_new_tokens
    with_reference = builder.config.privileged != "none"
    for problem in problems:
        if not builder.surely_fits(problem, "student", with_reference=False, kept=kept):
            builder.student(problem)
        if with_teacher and not builder.surely_fits(problem, "teacher", with_reference=with_reference, kept=kept):
            builder.teacher(problem, "" if with_reference else None)


def check_supervised(problems: Iterable[Problem], builder: PromptBuilder) -> None:
    """Find supervised examples that cannot fit before any model is built, as :func:`check_prompts` does for prompts.

    Raises:
        DataError: As :meth:`PromptBuilder.supervised` does, for the first such problem.
        ModelError: The tokenizer has no end-of-sequence token.
    """
    for number, problem in enumerate(problems):
        kept = _MAX_TOKENS_PER_BYTE * len((problem.response or "").encode()) + 1
        with_reference = problem.role == "teacher"
        # The first one is always built: it shows what is wrong with the tokenizer.
        if number == 0 or not builder.surely_fits(problem, problem.role, with_reference=with_reference, kept=kept):
            builder.supervised(problem)


def shuffled_references(problems: Sequence[Problem], *, seed: int) -> list[str]:
    """Every problem's reference taken from another problem: the control ``data.privileged=shuffled``.

    A reference equal to a problem's own counts as its own. No problem gets it, unless more than half the problems share
    one text; then as few as possible do.

    Raises:
        ConfigError: There are fewer than two problems.
    """
    if len(problems) < 2:
        raise ConfigError(
            f"data.privileged=shuffled needs at least two problems to exchange references, data.train has "
            f"{len(problems)}"
        )
    order = list(range(len(problems)))
    random.Random(seed).shuffle(order)
    equal: dict[str, list[int]] = {}
    for index in order:
        equal.setdefault(problems[index].solution, []).append(index)
    # With equal texts side by side, moving everyone on by the size of the largest group leaves every group behind.
    circle = [index for group in equal.values() for index in group]
    step = max(len(group) for group in equal.values())
    references = [""] * len(problems)
    for place, index in enumerate(circle):
        references[index] = problems[circle[(place + step) % len(circle)]].solution
    return references
