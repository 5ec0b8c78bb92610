"""The loss at the end of a real model, on every kind of mesh, against transformers and dense float64 autograd.

What a mesh changes is who sums which gradient: the hidden states' over tensor-parallel ranks (by the loss, or under
sequence parallelism by the reduce-scatter of the rows' gather), the head's in Megatron-Core's ``main_grad``, and that
of a tied head with the embedding's, on one stage by autograd and across two by Megatron-Core. Each shows in the
gradients of all weights, which are compared one by one.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opsd_megatron.config import Config
from opsd_megatron.types import PackedSequences
from tests.distributed import run_distributed
from tests.tiny import make_tiny_qwen3
from tests.unit.losses.reference import Case, dense_divergence

VOCAB, TEACHER_HIDDEN = 270, 24
# Lengths of the sequences of two micro-batches (multiples of 4 in all), and the rows that carry loss. Their number
# differs between sequence-parallel ranks; some have none.
LENGTHS = ((5, 17, 2), (9, 1, 2))
ROWS = ((1, 2, 3, 16, 17, 18, 19, 20, 23), (7, 8, 11))
CASE = Case(0.3, 0.9, 0.01)
# (tp, pp, dp, sequence parallel)
MESHES = [
    (1, 1, 1, False),
    (2, 1, 1, False),
    (2, 1, 1, True),
    (1, 2, 1, False),
    (2, 2, 1, True),
    (4, 1, 1, True),
    (1, 1, 2, False),
]


def _ids(micro_batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(micro_batch)
    return torch.randint(0, VOCAB, (sum(LENGTHS[micro_batch]),), generator=generator)


def _teacher(micro_batch: int) -> tuple[Tensor, Tensor]:
    """Hidden states at the rows and a head, which is that of every micro-batch; padded to a multiple of 4 entries."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(VOCAB + 2, TEACHER_HIDDEN, generator=generator)
    generator.manual_seed(100 + micro_batch)
    return torch.randn(len(ROWS[micro_batch]), TEACHER_HIDDEN, generator=generator), weight


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3(
        tmp_path_factory.mktemp("model"), vocab_size=VOCAB, heads=8, kv_heads=4, head_dim=16, tied=request.param
    )


@pytest.fixture(scope="module")
def expected(model_path: Path) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64, attn_implementation="eager")
    for index, lengths in enumerate(LENGTHS):
        logits = torch.cat([model(part[None]).logits[0] for part in _ids(index).split(lengths)])
        hidden, weight = _teacher(index)
        teacher = hidden.double() @ weight[:VOCAB].double().t()
        dense_divergence(logits[list(ROWS[index])], teacher, CASE).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("tp", "pp", "dp", "sequence"), MESHES)
def test_gradients_are_those_of_the_dense_loss(
    tp: int, pp: int, dp: int, sequence: bool, model_path: Path, expected: dict[str, Tensor]
) -> None:
    for rank, found in enumerate(run_distributed(_gradients, tp * pp * dp, model_path, tp, pp, sequence)):
        assert sorted(found) == sorted(expected)
        for name, gradient in expected.items():
            error = float((found[name].double() - gradient).norm() / gradient.norm())
            assert math.isfinite(error), (rank, name)
            assert error < 2e-5, (rank, name, error)


def _gradients(path: Path, tp: int, pp: int, sequence: bool) -> dict[str, Tensor]:
    """The worker: one pass as a training step makes it; gradients by Hugging Face name."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from opsd_megatron.checkpoint.hf_io import SafetensorsReader
    from opsd_megatron.distributed.parallel import ParallelDims
    from opsd_megatron.distributed.seed import seed_everything
    from opsd_megatron.losses import linear_divergence
    from opsd_megatron.models.build import build_model, forward_packed
    from opsd_megatron.models.export import export_hf_weights
    from opsd_megatron.models.families import read_spec
    from opsd_megatron.models.hidden import response_hidden
    from opsd_megatron.models.weight_map import load_hf_weights

    config = Config()
    config.model.dtype = "float32"
    config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence = tp, pp, sequence
    dims = ParallelDims.initialize(config.parallel)
    seed_everything(0, dims)
    spec = read_spec(path)
    chunks = build_model(spec, config, dims)
    load_hf_weights(chunks, spec, SafetensorsReader(path), dims)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    wrapped = [DistributedDataParallel(chunk.config, settings, chunk) for chunk in chunks]
    chunks[0].config.finalize_model_grads_func = finalize_model_grads
    columns = spec.padded_vocab_size(dims.tp) // dims.tp

    def forward_step(indices, model):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        index = next(indices)
        output = forward_packed(model, _packed(index))

        def loss(output: Tensor) -> tuple[Tensor, Tensor, None]:
            teacher_hidden, teacher_weight = _teacher(index)
            rows = linear_divergence(
                response_hidden(output, torch.tensor(ROWS[index]), dims),
                model.module.output_head(),
                teacher_hidden,
                torch.nn.functional.pad(teacher_weight, (0, 0, 0, 4))[columns * dims.tp_rank :][:columns],
                beta=CASE.beta,
                temperature=CASE.temperature,
                clip=CASE.clip,
                tp_group=dims.tp_group,
                vocab_size=VOCAB,
                chunk_rows=4,
                reduce_hidden_grad=not dims.sequence_parallel,
            )
            # One token in all, so that Megatron-Core divides by 1.
            return rows.sum(), torch.tensor(int(index == 0), dtype=torch.int), None

        return output, loss

    for chunk in wrapped:
        chunk.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(range(dims.dp_rank, len(LENGTHS), dims.dp)),
        model=wrapped,
        num_microbatches=len(LENGTHS) // dims.dp,
        seq_length=max(map(sum, LENGTHS)),
        micro_batch_size=1,
        forward_only=False,
    )
    # The exporter gathers whatever the parameters hold: let them hold their gradients.
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)
    return {name: tensor.clone() for name, tensor in export_hf_weights(chunks, spec, dims)}


def _packed(index: int) -> PackedSequences:
    lengths = LENGTHS[index]
    return PackedSequences(
        ids=_ids(index),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
        rows=torch.tensor(ROWS[index]),
    )
