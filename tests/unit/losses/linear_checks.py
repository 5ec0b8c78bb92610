"""Losses from hidden states beside the dense reference: whole inputs, and how far a rank's results are off.

Every rank draws the same whole problem and takes its shard.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opsd_megatron.losses import (
    TopK,
    linear_cross_entropy,
    linear_divergence,
    linear_divergence_with_diagnostics,
    linear_sampled_token,
)
from tests.unit.losses.reference import Case, dense_divergence, dense_topk, entries, on_support, shard_of, world, worst

ROWS, HIDDEN, TEACHER_HIDDEN, WIDTH = 7, 6, 5, 48


@dataclass
class Problem:
    """Whole inputs, equal on every rank; weights hold ``vocab`` true rows and NaN below them."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    targets: Tensor
    upstream: Tensor
    vocab: int

    @classmethod
    def draw(
        cls, vocab: int, dtype: torch.dtype, rows: int = ROWS, seed: int = 0, padding: int | None = None
    ) -> Problem:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        padding = WIDTH - vocab if padding is None else padding
        pad = torch.full((padding, 1), torch.nan, dtype=dtype)
        return cls(
            normal(rows, HIDDEN),
            torch.cat([normal(vocab, HIDDEN), pad.expand(-1, HIDDEN)]),
            normal(rows, TEACHER_HIDDEN),
            torch.cat([normal(vocab, TEACHER_HIDDEN), pad.expand(-1, TEACHER_HIDDEN)]),
            torch.randint(vocab, (rows,), generator=generator),
            torch.rand(rows, generator=generator, dtype=torch.float64) + 0.5,
            vocab,
        )

    def logits(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Float64 leaves for hidden states and true head rows, and both sides' logits on top of them."""
        hidden = self.student_hidden.detach().double().clone().requires_grad_()
        weight = self.student_weight.detach().double()[: self.vocab].clone().requires_grad_()
        teacher = self.teacher_hidden.double() @ self.teacher_weight.double()[: self.vocab].t()
        return hidden, weight, hidden @ weight.t(), teacher

    def log_probs(self, logits: Tensor) -> Tensor:
        """The targets' log-probabilities."""
        return logits.log_softmax(1).gather(1, self.targets.unsqueeze(1)).squeeze(1)

    def gradients(self, loss: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Of the reference loss, that of the weight with zero rows for the padding."""
        grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight), self.upstream)
        padding = len(self.student_weight) - self.vocab
        return grad_hidden, torch.cat([grad_weight, grad_weight.new_zeros(padding, grad_weight.shape[1])])

    def leaves(self, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This rank's inputs; student's take gradients."""
        return (
            self.student_hidden.clone().requires_grad_(),
            shard_of(self.student_weight, 0, group).requires_grad_(),
            self.teacher_hidden.clone(),
            shard_of(self.teacher_weight, 0, group),
        )

    def vocab_size(self) -> int | None:
        return None if self.vocab == len(self.student_weight) else self.vocab


def grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def divergence_differences(
    problem: Problem, case: Case, chunk_rows: int | None, unit: float | None, *, weighted: bool
) -> float:
    """Largest difference of loss, hidden gradient and this rank's weight gradient from the reference.

    ``weighted``: rows are weighted inside, and backward scales the gradients that forward has formed. Otherwise the
    upstream gradient differs between rows, and backward forms them anew.
    """
    group = world()
    leaves = problem.leaves(group)
    loss = linear_divergence(
        *leaves,
        **asdict(case),
        tp_group=group,
        vocab_size=problem.vocab_size(),
        chunk_rows=chunk_rows,
        row_weights=4 * problem.upstream if weighted else None,
    )
    if weighted:
        (loss.sum() / 4).backward()
    else:
        loss.backward(problem.upstream.to(loss.dtype))
    hidden, weight, student, teacher = problem.logits()
    expected = dense_divergence(student, teacher, case)
    grad_hidden, grad_weight = problem.gradients(expected, hidden, weight)
    if weighted:
        expected, loss = expected * problem.upstream, loss / 4
    return max(
        worst(loss.detach(), expected.detach(), unit),
        worst(grad(leaves[0]), grad_hidden, unit),
        worst(grad(leaves[1]), shard_of(grad_weight, 0, group), unit or max(float(grad_weight.abs().max()), 1e-300)),
    )


def cross_entropy_differences(problem: Problem, chunk_rows: int | None) -> float:
    group = world()
    student_hidden, student_weight, _, _ = problem.leaves(group)
    loss = linear_cross_entropy(
        student_hidden,
        student_weight,
        problem.targets,
        tp_group=group,
        vocab_size=problem.vocab_size(),
        chunk_rows=chunk_rows,
    )
    loss.backward(problem.upstream.to(loss.dtype))
    hidden, weight, student, _ = problem.logits()
    expected = torch.nn.functional.cross_entropy(student, problem.targets, reduction="none")
    grad_hidden, grad_weight = problem.gradients(expected, hidden, weight)
    return max(
        worst(loss.detach(), expected.detach(), 1.0),
        worst(grad(student_hidden), grad_hidden, 1.0),
        worst(grad(student_weight), shard_of(grad_weight, 0, group), 1.0),
    )


SUPPORTS = [
    TopK(k, side, tail) for k in (1, 4, 29) for side in ("teacher", "student") for tail in ("bucket", "renormalise")
]


def topk_differences(problem: Problem, case: Case, support: TopK, chunk_rows: int | None) -> float:
    group = world()
    leaves = problem.leaves(group)
    loss, diagnostics = linear_divergence_with_diagnostics(
        *leaves,
        **asdict(case),
        tp_group=group,
        vocab_size=problem.vocab_size(),
        chunk_rows=chunk_rows,
        support=support,
        row_weights=problem.upstream,
        target_ids=problem.targets,
    )
    loss.sum().backward()
    hidden, weight, student, teacher = problem.logits()
    expected = dense_topk(student, teacher, case, support)
    grad_hidden, grad_weight = problem.gradients(expected, hidden, weight)
    facts = expected_diagnostics(problem, case, support)
    return max(
        worst(loss.detach(), expected.detach() * problem.upstream, 1.0),
        worst(grad(leaves[0]), grad_hidden, 1.0),
        worst(grad(leaves[1]), shard_of(grad_weight, 0, group), 1.0),
        # Diagnostics are float32 in any case.
        1e-6 * max(worst(getattr(diagnostics, name), value, 1.0) for name, value in facts.items()),
    )


def check_ties(support: TopK, chunk_rows: int | None) -> None:
    """Equal logits at the last place of the support, on every rank: some of them belong to it, and no more than that.

    Which ones is open. Where both sides have the same head row at all of these entries the loss does not depend on it,
    nor do the hidden gradient and the sum of those entries' weight gradients.
    """
    group = world()
    problem = Problem.draw(WIDTH, torch.float64)
    tied = torch.arange(3, WIDTH, WIDTH // 8)
    for hidden, weight in (
        (problem.student_hidden, problem.student_weight),
        (problem.teacher_hidden, problem.teacher_weight),
    ):
        # Every row's logit is 20 there, and 25 at one entry that has the first place to itself.
        hidden[:, 0], weight[:, 0] = 1.0, 0.0
        weight[tied] = weight[1] = 0.0
        weight[tied, 0], weight[1, 0] = 20.0, 25.0
    leaves = problem.leaves(group)
    loss = linear_divergence(*leaves, beta=0.5, tp_group=group, chunk_rows=chunk_rows, support=support)
    loss.backward(problem.upstream)
    hidden, weight, student, teacher = problem.logits()
    expected = dense_topk(student, teacher, Case(0.5), support)
    grad_hidden, grad_weight = problem.gradients(expected, hidden, weight)
    own_tied = shard_of(torch.zeros(WIDTH, 1).index_fill_(0, tied, 1), 0, group)[:, 0].bool()
    tied_sum = grad(leaves[1])[own_tied].sum(0)
    if group is not None:
        dist.all_reduce(tied_sum, group=group)
    assert worst(loss.detach(), expected.detach(), 1.0) < 1e-12
    assert worst(grad(leaves[0]), grad_hidden, 1.0) < 1e-12
    assert worst(grad(leaves[1])[~own_tied], shard_of(grad_weight, 0, group)[~own_tied], 1.0) < 1e-12
    assert worst(tied_sum, grad_weight[tied].sum(0), 1.0) < 1e-12


def sampled_token_differences(problem: Problem, temperature: float, clip: float | None) -> float:
    """Of loss, log-probabilities and gradients from the definition, by autograd on dense logits."""
    group = world()
    leaves = problem.leaves(group)
    loss, log_probs = linear_sampled_token(
        *leaves,
        problem.targets,
        temperature=temperature,
        clip=clip,
        tp_group=group,
        vocab_size=problem.vocab_size(),
        chunk_rows=3,
        row_weights=problem.upstream,
    )
    loss.sum().backward()
    hidden, weight, student, teacher = problem.logits()
    s, t = (problem.log_probs(side / temperature) for side in (student, teacher))
    bracket = (t - s).detach()
    expected = -(bracket if clip is None else bracket.clamp(-clip, clip)) * s
    grad_hidden, grad_weight = problem.gradients(expected, hidden, weight)
    return max(
        worst(loss.detach(), expected.detach() * problem.upstream),
        worst(log_probs.student, s.detach()),
        worst(log_probs.teacher, t),
        worst(log_probs.student_at_1, problem.log_probs(student).detach()),
        worst(log_probs.teacher_at_1, problem.log_probs(teacher)),
        worst(grad(leaves[0]), grad_hidden),
        worst(grad(leaves[1]), shard_of(grad_weight, 0, group), max(float(grad_weight.abs().max()), 1e-300)),
    )


def expected_diagnostics(problem: Problem, case: Case, support: TopK | None = None) -> dict[str, Tensor]:
    _, _, student, teacher = (tensor.detach() for tensor in problem.logits())
    s, t = (torch.log_softmax(logits / case.temperature, 1) for logits in (student, teacher))
    s_on, t_on = (s, t) if support is None else on_support(student, teacher, case, support)
    d = entries(s_on, t_on, case)
    clipped = torch.zeros_like(d)
    if case.clip is not None and case.clip_mode in ("entry", "bregman"):
        clipped = (d >= case.clip).double()
    elif case.clip is not None and case.clip_mode != "none":
        clipped = (d.sum(1, keepdim=True) >= case.clip).double().expand_as(d)
    rows = torch.arange(len(problem.targets))
    return {
        "divergence": d.sum(1),
        "clip_fraction": clipped.mean(1),
        "clipped_teacher_mass": (clipped * t_on.exp()).sum(1),
        "student_entropy": -(s.exp() * s).sum(1),
        "teacher_entropy": -(t.exp() * t).sum(1),
        "forward_kl": (t.exp() * (t - s)).sum(1),
        "reverse_kl": (s.exp() * (s - t)).sum(1),
        "top1_agreement": (student.argmax(1) == teacher.argmax(1)).double(),
        "student_log_prob": torch.log_softmax(student, 1)[rows, problem.targets],
        "teacher_log_prob": torch.log_softmax(teacher, 1)[rows, problem.targets],
        "policy_log_prob": s[rows, problem.targets],
    }


class LargestTensor(TorchDispatchMode):
    """Remembers the largest floating-point tensor that an operation made memory for.

    Bytes are no logits: see ``head.keep_small_blocks_mapped``.
    """

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        given = [*args, *(kwargs or {}).values()]
        known = {arg.untyped_storage().data_ptr() for arg in given if isinstance(arg, Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            made = isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known
            if made and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return result


def check_equal_sides_are_zero(
    hidden: Tensor, weight: Tensor, case: Case, *, vocab: int, chunk_rows: int, support: TopK | None = None
) -> None:
    """Equal hidden states and weights in different memory: loss and gradients are zero to the last bit.

    ``hidden`` and ``weight``, this rank's shard of ``world()``, are leaves without gradients.
    """
    loss, facts = linear_divergence_with_diagnostics(
        hidden,
        weight,
        hidden.detach().clone(),
        weight.detach().clone(),
        **asdict(case),
        tp_group=world(),
        vocab_size=vocab,
        chunk_rows=chunk_rows,
        support=support,
    )
    loss.sum().backward()
    zero = (loss, grad(hidden), grad(weight), facts.divergence, facts.clip_fraction, facts.forward_kl, facts.reverse_kl)
    for tensor in zero:
        assert torch.equal(tensor, torch.zeros_like(tensor)), (case, support)
    assert torch.equal(facts.top1_agreement, torch.ones_like(loss))
