"""The divergence from hidden states, without the logits in memory."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from opsd_megatron.losses.chunked import RowOptions, linear_rows
from opsd_megatron.losses.divergences import ClipMode, DivergenceSpec
from opsd_megatron.losses.head import check_head, check_same_rows
from opsd_megatron.losses.row_losses import DivergenceLoss
from opsd_megatron.losses.rows import NO_EXTRAS, Diagnostics, RowExtras
from opsd_megatron.losses.shard import VocabShard, check_row_weights, check_targets
from opsd_megatron.losses.topk import TopK


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    clip: float | None = None,
    clip_mode: ClipMode = "entry",
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    row_weights: Tensor | None = None,
    support: TopK | None = None,
    reduce_hidden_grad: bool = True,
) -> Tensor:
    """Divergence of the student's next-token distribution from the teacher's, per row, without the logits in memory.

    Equals :func:`~opsd_megatron.losses.vocab_parallel_divergence` of ``hidden @ weight.T``.

    Args:
        student_hidden: ``[R, H]``, equal on all ranks. Its gradient comes back complete, summed over ``tp_group``.
        student_weight: This rank's shard of the student's head, ``[V/tp, H]``; may be frozen. Where it has a
            ``main_grad`` (Megatron-Core's gradient buffer), its gradient is added to that, without being rounded to the
            weight's dtype; already in forward, which saves a tensor of the head's size, where it is marked with
            ``student_weight.unit_upstream = True``: the gradient of what is derived by this loss is then 1 in all rows.
        teacher_hidden: ``[R, Ht]``; the teacher's sizes may differ from the student's. Gets no gradient.
        teacher_weight: ``[V/tp, Ht]``; gets no gradient.
        beta: 0 is forward KL(teacher || student), 1 reverse KL, in between generalized Jensen-Shannon.
        temperature: Both sides' logits are divided by it.
        clip: Upper clip tau; ``None`` for no clip.
        clip_mode: Where the clip acts, see :mod:`opsd_megatron.losses.divergences`.
        tp_group: Ranks that hold the vocabulary's shards, in order; ``None`` where this rank holds all of it.
        vocab_size: Vocabulary entries without padding; later head rows are ignored and get a zero gradient.
        chunk_rows: Rows whose logits exist at a time, equal on all ranks (twice as many across ranks, where chunks
            overlap); ``None``: as many as keep the matrix products at full speed (``losses.head``).
        row_weights: Constant factor of each row's loss, ``[R]``; ``None`` for 1. Weighting here instead of weighting
            the result keeps the upstream gradient of a sum equal in all rows, which saves computing the logits again.
        support: Take the divergence over the k most likely entries only; ``None``: over the whole vocabulary.
        reduce_hidden_grad: Sum the gradient of ``student_hidden`` over ``tp_group``. ``False`` hands out each rank's
            part of it, for a caller whose own backward sums: under sequence parallelism a reduce-scatter does.

    Returns:
        Loss of each row in nats, ``[R]`` float32 (float64 for float64 inputs), equal on all ranks.

    Raises:
        ValueError: An argument is out of range or shapes do not fit.
        FloatingPointError: NaN or +inf among a side's logits; names the side. Raised on every rank. A logit of -inf is
            an entry without probability, but -inf in the student's head makes the hidden gradient NaN, which backward
            raises (on CUDA an assertion on the device, seen at its next synchronisation).

    Ranks: all of ``tp_group``, with equal ``R``. Two collectives a chunk, of a few numbers a row (with a support, a few
    and ``2 k``), and one all-reduce in all, of the hidden gradient if it is to be summed. All in forward, unless the
    upstream gradient differs between rows: backward then goes through the chunks again. None of them if ``R == 0``.
    """
    return linear_divergence_with_diagnostics(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        beta=beta,
        temperature=temperature,
        clip=clip,
        clip_mode=clip_mode,
        tp_group=tp_group,
        vocab_size=vocab_size,
        chunk_rows=chunk_rows,
        row_weights=row_weights,
        support=support,
        reduce_hidden_grad=reduce_hidden_grad,
    )[0]


def linear_divergence_with_diagnostics(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    clip: float | None = None,
    clip_mode: ClipMode = "entry",
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    row_weights: Tensor | None = None,
    support: TopK | None = None,
    reduce_hidden_grad: bool = True,
    target_ids: Tensor | None = None,
    extras: RowExtras = NO_EXTRAS,
) -> tuple[Tensor, Diagnostics]:
    """:func:`linear_divergence` together with what its forward pass sees on the way.

    Arguments as there, and ``target_ids``: the vocabulary index of each row's token, ``[R]`` int64, whose
    log-probabilities the diagnostics report (``None`` for no such report); ``extras``: weights and gates of rows that
    follow from the pass itself, and a loss of the target that is added, all from one set of logits.

    Raises:
        ValueError: Also for a target outside the vocabulary, or none where ``extras`` need one.
    """
    check_head("student", student_hidden, student_weight, chunk_rows)
    check_head("teacher", teacher_hidden, teacher_weight, chunk_rows)
    check_same_rows(student_hidden, student_weight, teacher_hidden, teacher_weight)
    spec = DivergenceSpec(beta, temperature, clip, clip_mode)
    shard = VocabShard.of(student_weight.shape[0], vocab_size, tp_group)
    check_row_weights(row_weights, student_hidden.shape[0])
    if target_ids is not None:
        check_targets(target_ids, student_hidden.shape[0], shard)
    elif extras.needs_targets:
        raise ValueError("importance weights and losses of a token need target_ids")
    task = DivergenceLoss(spec, support, shard, target_ids, extras)
    options = RowOptions(chunk_rows, row_weights, reduce_hidden_grad)
    loss, block = linear_rows(task, options, student_hidden, student_weight, teacher_hidden, teacher_weight)
    return loss, Diagnostics.from_block(block)
