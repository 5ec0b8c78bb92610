"""The records that travel through a training step, in the order they appear.

Legend, used in every module: ``R`` response rows (tokens that carry loss), ``T`` packed tokens, ``S`` packed sequences,
``H`` hidden size, ``V`` vocabulary, ``tp`` tensor-parallel size.

Worked example. The student's prompt is ``[10, 11]``, the teacher's (it also holds the reference) ``[20, 21, 22]`` and
the student sampled ``[7, 8]``. Alone in a micro-batch they pack to

    student.ids  = [10, 11, 7, 8]        student.rows = [1, 2]
    teacher.ids  = [20, 21, 22, 7, 8]    teacher.rows = [2, 3]
    response_ids = [7, 8]

Row ``r`` of each side is the position whose hidden state predicts ``response_ids[r]``, so
``ids[rows + 1] == response_ids`` on both sides. :meth:`PackedMicroBatch.check` asserts it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Role = Literal["student", "teacher"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Problem:
    """One row of a data set.

    Attributes:
        id: Unique within its source, ``"<file name>:<line>"`` for files (line 1 is the first).
        problem: The statement both roles see.
        solution: The reference solution only the teacher sees; empty where the objective needs none.
        answer: What a response is judged against; the last ``\\boxed{}`` of ``solution`` where the data has no answer.
        response: Supervised target text, for objectives that learn from one.
        role: Whose prompt the supervised target follows.
    """

    id: str
    problem: str
    solution: str = ""
    answer: str | None = None
    response: str | None = None
    role: Role = "student"


@dataclass(frozen=True)
class Generation:
    """One sampled response, tokens in and tokens out.

    Attributes:
        token_ids: Response tokens, the end-of-sequence token included where one was sampled.
        log_probs: The engine's log-probability of each token: at temperature 1 and before top-p and top-k, or with
            ``objective.importance_cap`` of the distribution sampled from.
        finish_reason: ``"length"`` where the token limit cut the response off.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: FinishReason


@dataclass(frozen=True)
class Rollout:
    """A generation together with what it answers and the weights that produced it.

    Attributes:
        problem: The problem answered.
        prompt_ids: The student prompt as the engine received it.
        generation: What the engine sampled.
        policy_version: Optimizer steps behind the sampling weights (0 for the initial ones).
        correct: Whether its answer is the problem's; ``None`` where nobody asked.
        analysis: What the same weights said about the text the teacher is shown for it; ``None`` where nobody asked.
    """

    problem: Problem
    prompt_ids: tuple[int, ...]
    generation: Generation
    policy_version: int
    correct: bool | None = None
    analysis: Generation | None = None


@dataclass(frozen=True)
class AlignedSample:
    """One response under the student's prompt and, for distillation, under the teacher's.

    Attributes:
        student_prompt_ids: Tokens before the response as the student sees them; at least one.
        teacher_prompt_ids: The same for the teacher; ``None`` for objectives without a teacher.
        response_ids: The tokens that carry loss, identical for both roles; at least one.
        row_weight: Factor on the loss of every row of this sample.
        token_weights: Further factors, one for each row; ``None`` for 1.
        advantage: How much better this response is than others to the same problem, for objectives that compare them.
        engine_log_probs: The engine's log-probabilities of ``response_ids``; ``None`` for supervised targets.
    """

    student_prompt_ids: tuple[int, ...]
    teacher_prompt_ids: tuple[int, ...] | None
    response_ids: tuple[int, ...]
    row_weight: float = 1.0
    token_weights: tuple[float, ...] | None = None
    advantage: float = 0.0
    engine_log_probs: tuple[float, ...] | None = None

    @property
    def student_tokens(self) -> int:
        """Packed length on the student's side."""
        return len(self.student_prompt_ids) + len(self.response_ids)

    @property
    def teacher_tokens(self) -> int:
        """Packed length on the teacher's side; 0 without a teacher."""
        return 0 if self.teacher_prompt_ids is None else len(self.teacher_prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class PackedSequences:
    """Sequences laid end to end (THD layout).

    Under context parallelism a rank's ``ids``, ``positions`` and ``rows`` are of the ``T / cp`` tokens it holds
    (``data.context``), while ``cu_seqlens`` and ``max_seqlen`` are of the whole sequences.

    Attributes:
        ids: Token ids, ``[T]`` int64.
        positions: Position of each token within its own sequence, ``[T]`` int64.
        cu_seqlens: Start of every sequence and the end of the last, ``[S + 1]`` int32; stays on the host, where it is
            needed as numbers. Padding that context parallelism asks for belongs to the sequence it follows.
        max_seqlen: Longest sequence, in tokens.
        rows: Packed positions whose hidden state predicts a response token, ``[R]`` int64.
    """

    ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    rows: Tensor

    def to(self, device: torch.device | str) -> PackedSequences:
        """The same sequences on ``device``, but for ``cu_seqlens``."""
        return PackedSequences(
            ids=self.ids.to(device),
            positions=self.positions.to(device),
            cu_seqlens=self.cu_seqlens,
            max_seqlen=self.max_seqlen,
            rows=self.rows.to(device),
        )


@dataclass(frozen=True)
class RowExchange:
    """How the teacher's rows reach the context-parallel ranks that own the student's.

    Attributes:
        send_counts: Rows for each rank, cp of them; ``teacher.rows`` lists them in this order.
        receive_counts: Rows from each rank.
        order: Where each of this rank's student rows is among the received ones, ``[R]`` int64.
    """

    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    order: Tensor

    def to(self, device: torch.device | str) -> RowExchange:
        """The same exchange on ``device``."""
        return RowExchange(self.send_counts, self.receive_counts, self.order.to(device))


@dataclass(frozen=True)
class PackedMicroBatch:
    """What one micro-batch feeds to the model: both roles' sequences and the rows they share.

    A micro-batch may hold no samples (``R == 0``): ranks run equal numbers of micro-batches, so some get an empty one,
    which still runs forward and backward.

    Attributes:
        student: Student sequences.
        teacher: Teacher sequences, or ``None`` for objectives without a teacher.
        response_ids: The token each row predicts, ``[R]`` int64.
        row_weights: Loss weight of each row, ``[R]`` float32.
        engine_log_probs: The engine's log-probability of each response token, ``[R]`` float32; NaN where there is none.
        advantages: The advantage of each row's sample, ``[R]`` float32.
        old_log_probs: The student's log-probability of each response token before the first of several updates on these
            responses, at the sampling temperature, ``[R]`` float32; ``None`` in that first update.
        exchange: How teacher rows travel under context parallelism; ``None`` where ``teacher.rows`` are in the order of
            ``student.rows`` already.
    """

    student: PackedSequences
    teacher: PackedSequences | None
    response_ids: Tensor
    row_weights: Tensor
    engine_log_probs: Tensor
    advantages: Tensor
    old_log_probs: Tensor | None = None
    exchange: RowExchange | None = None

    @property
    def num_rows(self) -> int:
        """R, the tokens of this micro-batch that carry loss."""
        return self.response_ids.numel()

    def check(self) -> None:
        """Assert the row invariant of the module docstring on both sides, before context parallelism splits them.

        Raises:
            AssertionError: A row does not predict its response token; packing is broken.
        """
        for name, side in (("student", self.student), ("teacher", self.teacher)):
            if side is not None and not torch.equal(side.ids[side.rows + 1], self.response_ids):
                raise AssertionError(f"{name} rows do not predict the response tokens: packing is broken")

    def to(self, device: torch.device | str) -> PackedMicroBatch:
        """The same micro-batch on ``device``."""
        return PackedMicroBatch(
            student=self.student.to(device),
            teacher=None if self.teacher is None else self.teacher.to(device),
            response_ids=self.response_ids.to(device),
            row_weights=self.row_weights.to(device),
            engine_log_probs=self.engine_log_probs.to(device),
            advantages=self.advantages.to(device),
            old_log_probs=None if self.old_log_probs is None else self.old_log_probs.to(device),
            exchange=None if self.exchange is None else self.exchange.to(device),
        )


@dataclass(frozen=True)
class TeacherTargets:
    """What the teacher pass keeps of a micro-batch: hidden states, never logits.

    Attributes:
        hidden: Final-norm hidden states at the teacher's rows, ``[R, H]``, replicated over tp.
        head_weight: This rank's vocabulary shard of the teacher's output head, ``[V/tp, H]``.
    """

    hidden: Tensor
    head_weight: Tensor
