"""From problems to token ids, for both roles. Tokens in, tokens out: what is trained on is never decoded and made anew.

The boundary rule
-----------------
A role's prompt is its user message in the tokenizer's chat template, up to and including the header that opens the
assistant's turn. Response tokens are appended **directly after the header; nothing else is inserted** on either side.
The header follows the role's thinking mode. In Qwen3's template it is, in thinking mode,

    <|im_start|>assistant\\n

and in non-thinking mode the same with an empty thought that closes the thinking before it began:

    <|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n

With the paper's choice (student off, teacher on) the first response token therefore follows an empty thought at the
student and the bare header at the teacher, which would rather open with ``<think>``: the divergence on the first token
or so is large for a reason that has nothing to do with the reference. ``data.boundary`` says whose header the teacher's
prompt ends with: ``own``, the rule so far; or ``student``, so that the response follows the same tokens in both roles,
while the rest of the teacher's prompt stays as its thinking mode makes it. (In Qwen3's template the mode changes the
header alone, so there ``boundary=student`` and equal thinking modes are two ways to say one thing.)
``PromptBuilder.header`` shows a role's header.

Analyse first
-------------
With ``data.analyse_first`` the teacher's prompt is a conversation of three turns: a user message with problem and
reference that asks for an analysis (``data.analysis_template``), the model's own analysis, and a user message with the
final instruction (``data.after_analysis_template``), followed by the header as above. Thinking is left out of the
analysis, as chat templates leave it out of earlier turns. A teacher whose analysis is empty gets its ordinary prompt.

Lengths
-------
A teacher prompt that does not fit has its *reference* cut at the end, never an instruction or a header; an analysis is
cut only where the prompt would not fit without any reference either.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from opsd_megatron.config import DataConfig
from opsd_megatron.config.privileged import PRIVILEGED
from opsd_megatron.data.chat import Chat, Message, assistant, user
from opsd_megatron.data.privileged import SOURCES
from opsd_megatron.data.templates import PromptTemplate
from opsd_megatron.errors import ConfigError, DataError, ModelError
from opsd_megatron.types import Generation, Problem, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)

# A tokenizer makes at most one token of a byte, and what it does to the text first (NFC, marking spaces) at most
# triples the bytes.
_MAX_TOKENS_PER_BYTE = 3


@dataclass(frozen=True)
class _Templates:
    """Every message that may be needed."""

    student: PromptTemplate
    teacher: PromptTemplate
    analysis: PromptTemplate
    after_analysis: PromptTemplate

    @classmethod
    def of(cls, config: DataConfig) -> _Templates:
        def template(name: str, packaged: str, needed: str, optional: str = "") -> PromptTemplate:
            key = f"{name}_template"
            return PromptTemplate(
                getattr(config, key),
                key=f"data.{key}",
                packaged=packaged,
                needed=needed.split(),
                optional=optional.split(),
            )

        return cls(
            student=template("student", "student.txt", "problem"),
            teacher=template("teacher", SOURCES[config.privileged].template, "problem reference"),
            analysis=template("analysis", "analysis.txt", "problem reference"),
            after_analysis=template("after_analysis", "after_analysis.txt", "", "problem"),
        )


class PromptBuilder:
    """Token ids of prompts and supervised targets, within the length limits. See the module's docstring for the rules.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        config: Templates, thinking modes, ``privileged``, ``boundary``, ``analyse_first``, ``max_prompt_tokens``.
        max_length: Longest sequence, prompt and response together, in tokens.
        max_new_tokens: Tokens kept free for the response after every prompt.
        length_key: The key of the configuration that ``max_length`` comes from.

    Attributes:
        config: As given.
        chat: The tokenizer's chat template.
        max_new_tokens: As given.
        shortened_references: Teacher prompts so far whose reference was cut to make them fit.

    Raises:
        ConfigError: A template file is wrong, or ``max_new_tokens`` leaves no room for a prompt.
        ModelError: The tokenizer has no chat template, or one that fails.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        *,
        max_length: int,
        max_new_tokens: int,
        length_key: str = "model.max_length",
    ) -> None:
        self._tokenizer = tokenizer
        self.config = config
        self._max_length = max_length
        self._length_key = length_key
        self.max_new_tokens = max_new_tokens
        self._templates = _Templates.of(config)
        self._thinking: dict[Role, bool] = {"student": config.student_thinking, "teacher": config.teacher_thinking}
        self.shortened_references = 0
        if max_new_tokens >= max_length:
            raise ConfigError(
                f"responses of {max_new_tokens} tokens (rollout.max_new_tokens, evaluation.max_new_tokens) leave no "
                f"room for a prompt within the {max_length} tokens of {length_key} (by default the model's "
                "max_position_embeddings); lower the former"
            )
        self.chat = Chat(tokenizer)
        if config.student_thinking != config.teacher_thinking and self.chat.header(True) == self.chat.header(False):
            _logger.warning(
                "this chat template ignores enable_thinking: data.student_thinking and data.teacher_thinking differ, "
                "yet both roles get the header %r",
                self.header("teacher"),
            )

    # --- prompts ------------------------------------------------------------------------------------------------------

    def student(self, problem: Problem) -> tuple[int, ...]:
        """The student's prompt.

        Raises:
            DataError: It is too long; names the problem, the length and the limit.
        """
        return self._student(problem, self.max_new_tokens)

    def teacher(self, problem: Problem, reference: str | None, analysis: str = "") -> tuple[int, ...]:
        """The teacher's prompt.

        Where it does not fit, the *reference* loses as much of its end as needed, never the instruction or the
        header.

        Args:
            problem: The problem.
            reference: What the teacher sees beyond it. ``None``: nothing, the user message is exactly the student's
                (the control ``data.privileged=none``).
            analysis: The model's analysis of the reference, a turn of its own; empty: there is no such turn.

        Raises:
            DataError: It is too long even without any reference.
        """
        return self._teacher(problem, reference, analysis, self.max_new_tokens)

    def analysis(self, problem: Problem, reference: str) -> tuple[int, ...]:
        """The prompt that asks the model for an analysis of the reference, which is cut as in the teacher's prompt.

        Raises:
            DataError: It is too long even without any reference.
        """

        def prompt(shown: str) -> tuple[int, ...]:
            return self.chat.encode([self._analysis_message(problem, shown)], thinking=self.config.analysis_thinking)

        return self._shortened(prompt, reference, problem, self.config.analysis_max_tokens)

    def analysis_text(self, generation: Generation) -> str:
        """What an analysis says: the turn that the teacher's prompt gets."""
        thinking = self.config.analysis_thinking
        return self.chat.text(generation.token_ids, thinking=thinking, keep_thoughts=False)

    def sibling_text(self, generation: Generation) -> str:
        """A student's response as a reference for the teacher."""
        return self.chat.text(
            generation.token_ids,
            thinking=self._thinking["student"],
            keep_thoughts=self.config.sibling_thoughts,
        )

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
        return self._teacher(problem, problem.solution, "", len(response)), response

    def header(self, role: Role) -> str:
        """The text that opens the assistant's turn in a role's prompt: the response follows it directly."""
        owner: Role = "student" if self.config.boundary == "student" else role
        return self.chat.header(self._thinking[owner])

    # --- whether they fit ---------------------------------------------------------------------------------------------

    def surely_fits(self, problem: Problem, role: Role, *, with_reference: bool, kept: int) -> bool:
        """Whether a role's prompt fits with certainty, judged by bytes alone (no tokenisation).

        Args:
            problem: The problem.
            role: Whose prompt; the student's never has a reference.
            with_reference: Use the teacher's template, around an empty reference.
            kept: Tokens kept for the response.
        """
        reference = "" if with_reference else None
        return self._surely_fit(self._messages(problem, reference, ""), self._limit(role, kept)[0])

    def check_teacher(self, problem: Problem, *, with_reference: bool) -> None:
        """Check that the teacher's prompts for a problem fit, but for the reference, which would be shortened.

        An analysis has its room too.

        Raises:
            DataError: One does not.
        """
        if not self.surely_fits(problem, "teacher", with_reference=with_reference, kept=self.max_new_tokens):
            self.teacher(problem, "" if with_reference else None)
        if not self.config.analyse_first:
            return
        tokens = self.config.analysis_max_tokens
        if not self._surely_fit([self._analysis_message(problem, "")], self._limit("teacher", tokens)[0]):
            self.analysis(problem, "")
        kept = self.max_new_tokens + tokens
        # The smallest analysis that makes a turn of its own.
        if not self._surely_fit(self._messages(problem, "", "?"), self._limit("teacher", kept)[0]):
            self._checked(self._encode_teacher(problem, "", "?"), problem, "teacher", kept)

    def _surely_fit(self, messages: Sequence[Message], limit: int) -> bool:
        return _MAX_TOKENS_PER_BYTE * self.chat.most_bytes(messages) <= limit

    def _limit(self, role: Role, kept: int) -> tuple[int, str]:
        """The most tokens a prompt may have, and the words for why."""
        room = self._max_length - kept
        if role == "student" and self.config.max_prompt_tokens is not None and self.config.max_prompt_tokens < room:
            return self.config.max_prompt_tokens, f"data.max_prompt_tokens={self.config.max_prompt_tokens}"
        analysis = ", data.analysis_max_tokens" if self.config.analyse_first else ""
        return room, (
            f"{self._length_key}={self._max_length} less the {kept} tokens of the response (rollout.max_new_tokens, "
            f"evaluation.max_new_tokens{analysis}, or the supervised target)"
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

    # --- how they are made --------------------------------------------------------------------------------------------

    def _student(self, problem: Problem, kept: int) -> tuple[int, ...]:
        ids = self.chat.encode(self._messages(problem, None, ""), thinking=self._thinking["student"])
        return self._checked(ids, problem, "student", kept)

    def _teacher(self, problem: Problem, reference: str | None, analysis: str, kept: int) -> tuple[int, ...]:
        if reference is None:
            return self._checked(self._encode_teacher(problem, None, ""), problem, "teacher", kept)
        limit, _ = self._limit("teacher", kept)
        if analysis and len(self._encode_teacher(problem, "", analysis)) > limit:
            # Its tokens, decoded and made again, can be more than were sampled.
            analysis, _ = _longest(lambda shown: self._encode_teacher(problem, "", shown), analysis, limit)
        return self._shortened(lambda shown: self._encode_teacher(problem, shown, analysis), reference, problem, kept)

    def _shortened(
        self, prompt: Callable[[str], tuple[int, ...]], reference: str, problem: Problem, kept: int
    ) -> tuple[int, ...]:
        """The prompt around as much of the reference as fits."""
        whole = prompt(reference)
        limit, _ = self._limit("teacher", kept)
        if len(whole) <= limit:
            return whole
        self._checked(prompt(""), problem, "teacher", kept)
        shown, ids = _longest(prompt, reference, limit)
        self.shortened_references += 1
        if self.shortened_references == 1:
            _logger.warning(
                "%s: the teacher prompt has %d tokens with its whole reference; the first %d of the reference's %d "
                "characters are kept. Further ones are counted, not reported; raise model.max_length to avoid it.",
                problem.id, len(whole), len(shown), len(reference),
            )  # fmt: skip
        return ids

    def _encode_teacher(self, problem: Problem, reference: str | None, analysis: str) -> tuple[int, ...]:
        header = self.header("teacher") if self.config.boundary == "student" else None
        messages = self._messages(problem, reference, analysis)
        return self.chat.encode(messages, thinking=self._thinking["teacher"], header=header)

    def _messages(self, problem: Problem, reference: str | None, analysis: str) -> list[Message]:
        """The turns before the response; without a reference they are the student's."""
        if reference is None:
            return [user(self._templates.student.fill({"problem": problem.problem}))]
        if not analysis:
            return [user(self._templates.teacher.fill({"problem": problem.problem, "reference": reference}))]
        last = self._templates.after_analysis.fill({"problem": problem.problem})
        return [self._analysis_message(problem, reference), assistant(analysis), user(last)]

    def _analysis_message(self, problem: Problem, reference: str) -> Message:
        return user(self._templates.analysis.fill({"problem": problem.problem, "reference": reference}))


def _longest(prompt: Callable[[str], tuple[int, ...]], text: str, limit: int) -> tuple[str, tuple[int, ...]]:
    """As much of ``text``'s beginning as makes a prompt within ``limit`` tokens (at worst nothing), and that prompt.

    The length need not grow with every character (a longer text can merge into fewer tokens), so what is returned is a
    prompt whose own length was checked.
    """
    best, fits, too_long = prompt(""), 0, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        ids = prompt(text[:middle])
        if len(ids) <= limit:
            best, fits = ids, middle
        else:
            too_long = middle
    return text[:fits], best


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
    with_reference = not PRIVILEGED[builder.config.privileged].nothing
    for problem in problems:
        if not builder.surely_fits(problem, "student", with_reference=False, kept=kept):
            builder.student(problem)
        if with_teacher:
            builder.check_teacher(problem, with_reference=with_reference)


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
