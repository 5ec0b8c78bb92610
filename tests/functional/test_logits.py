"""The model on every mesh against transformers: logits, gradients, packing, and weights there and back.

One launch for each mesh does everything, for a tied and an untied model; the tests look at what it found. The gradient
is that of one number made of all logits of two micro-batches, so it takes every path a training step takes: through
Megatron-Core's schedule, its data-parallel wrapper and ``finalize_model_grads``. At tp > 1 that is where a forgotten
sum over ranks shows, above all for the query and key norms, whose gradients are partial even without sequence
parallelism, and for the tied embedding, which two pipeline stages share.

Vocabulary 270 and tp 4 make two rows of padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opsd_megatron.config import Config
from opsd_megatron.types import PackedSequences
from tests.distributed import run_distributed
from tests.tiny import make_tiny_qwen3

VOCAB = 270
# Lengths of the sequences of two micro-batches; each adds up to a multiple of 4 for sequence parallelism.
LENGTHS = ((5, 17, 2), (9, 1, 2))


@dataclass(frozen=True)
class Mesh:
    tp: int
    pp: int
    vpp: int = 1
    sequence: bool = False
    recompute: str = "none"

    def __str__(self) -> str:
        interleaved = f"-vpp{self.vpp}" * (self.vpp > 1)
        recompute = f"-{self.recompute}-recompute" * (self.recompute != "none")
        return f"tp{self.tp}-pp{self.pp}{interleaved}" + "-sp" * self.sequence + recompute


MESHES = (
    Mesh(1, 1),
    Mesh(2, 1),
    Mesh(1, 2),
    Mesh(2, 2),
    Mesh(2, 1, sequence=True, recompute="full"),
    Mesh(2, 2, sequence=True),
    Mesh(1, 2, vpp=2, recompute="selective"),
    Mesh(2, 2, vpp=2, sequence=True),
    Mesh(4, 1, sequence=True),
)


@dataclass(frozen=True)
class Outcome:
    """What one mesh made of one model.

    Attributes:
        logits: Packed ``[T, VOCAB]`` of each micro-batch.
        alone: The same with every sequence in a micro-batch of its own; ``None`` with stages or a sharded sequence.
        gradients: By Hugging Face name, complete.
        exported: By Hugging Face name.
        replicas_agree: Whether all ranks exported the same.
    """

    logits: list[Tensor]
    alone: list[Tensor] | None
    gradients: dict[str, Tensor]
    exported: dict[str, Tensor]
    replicas_agree: bool


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    return {
        tied: make_tiny_qwen3(
            tmp_path_factory.mktemp("model"), tied=tied, vocab_size=VOCAB, heads=8, kv_heads=4, head_dim=16
        )
        for tied in (True, False)
    }


@pytest.fixture(scope="module")
def reference(models: dict[bool, Path], tied: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Transformers' logits and gradients, one sequence at a time without padding."""
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(models[tied], dtype=torch.float32, attn_implementation="eager")
    logits = []
    for index, lengths in enumerate(LENGTHS):
        ids = token_ids(index)
        logits.append(torch.cat([model(part[None]).logits[0] for part in ids.split(lengths)]))
        (logits[-1] * coefficients(index)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [x.detach() for x in logits], gradients


_outcomes: dict[str, dict[bool, Outcome]] = {}


@pytest.fixture(scope="module", params=MESHES, ids=str)
def mesh(request: pytest.FixtureRequest) -> Mesh:
    mesh: Mesh = request.param
    return mesh


@pytest.fixture
def outcome(mesh: Mesh, tied: bool, models: dict[bool, Path]) -> Outcome:
    if str(mesh) not in _outcomes:
        # The last rank is on the last stage, which holds the logits.
        _outcomes[str(mesh)] = run_distributed(measure, mesh.tp * mesh.pp, mesh, models)[-1]
    return _outcomes[str(mesh)][tied]


def test_logits_equal_those_of_transformers(
    outcome: Outcome, reference: tuple[list[Tensor], dict[str, Tensor]]
) -> None:
    for found, expected in zip(outcome.logits, reference[0], strict=True):
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 1e-4
        assert expected.std() > 0.1  # logits worth comparing


# Pipelines run whole micro-batches through the schedule; there transformers' logits, made one by one, say the same.
@pytest.mark.parametrize("mesh", MESHES[:2], indirect=True, ids=str)
def test_packed_equals_one_by_one(outcome: Outcome) -> None:
    assert outcome.alone is not None
    for packed, alone in zip(outcome.logits, outcome.alone, strict=True):
        assert (packed - alone).abs().max() < 1e-5


def test_gradients_equal_those_of_transformers(
    outcome: Outcome, reference: tuple[list[Tensor], dict[str, Tensor]]
) -> None:
    expected = reference[1]
    assert sorted(outcome.gradients) == sorted(expected)
    for name, gradient in expected.items():
        error = (outcome.gradients[name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, f"{name}: relative error {error:.2e}"


def test_export_gives_back_what_was_loaded(outcome: Outcome, models: dict[bool, Path], tied: bool) -> None:
    from safetensors.torch import load_file

    stored = load_file(models[tied] / "model.safetensors")
    assert set(outcome.exported) == set(stored)
    assert all(torch.equal(outcome.exported[name], tensor) for name, tensor in stored.items())
    assert outcome.replicas_agree


def token_ids(micro_batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(micro_batch)
    return torch.randint(0, VOCAB, (sum(LENGTHS[micro_batch]),), generator=generator)


def coefficients(micro_batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + micro_batch)
    return torch.randn(sum(LENGTHS[micro_batch]), VOCAB, generator=generator)


def packed(ids: Tensor, lengths: tuple[int, ...]) -> PackedSequences:
    return PackedSequences(
        ids=ids,
        positions=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
        rows=torch.arange(0),
    )


def measure(mesh: Mesh, models: dict[bool, Path]) -> dict[bool, Outcome]:
    """The worker: both models on one mesh."""
    from opsd_megatron.distributed.parallel import ParallelDims
    from opsd_megatron.distributed.seed import seed_everything

    config = Config()
    config.model.dtype = "float32"
    config.model.recompute = mesh.recompute
    config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence = mesh.tp, mesh.pp, mesh.sequence
    config.parallel.virtual_stages = mesh.vpp
    dims = ParallelDims.initialize(config.parallel)
    seed_everything(0, dims)
    return {tied: _measure_one(path, config, dims) for tied, path in models.items()}


def _measure_one(path: Path, config: Config, dims) -> Outcome:  # type: ignore[no-untyped-def]  # noqa: ANN001
    from opsd_megatron.checkpoint.hf_io import SafetensorsReader
    from opsd_megatron.distributed.collectives import gather_objects
    from opsd_megatron.models.build import build_model, forward_packed
    from opsd_megatron.models.export import export_hf_weights
    from opsd_megatron.models.qwen3 import read_spec
    from opsd_megatron.models.weight_map import load_hf_weights

    spec = read_spec(path)
    chunks = build_model(spec, config, dims)
    load_hf_weights(chunks, spec, SafetensorsReader(path), dims)
    exported = {name: tensor.clone() for name, tensor in export_hf_weights(chunks, spec, dims)}
    sums = gather_objects({name: tensor.sum().item() for name, tensor in exported.items()})
    alone = None
    if dims.pp == 1 and not dims.sequence_parallel:
        (model,) = chunks
        with torch.no_grad():
            alone = [
                torch.cat(
                    [
                        _full_logits(_logits(forward_packed(model, packed(part, (len(part),))), model, dims), dims)
                        for part in token_ids(index).split(lengths)
                    ]
                )
                for index, lengths in enumerate(LENGTHS)
            ]
    logits, gradients = _train_pass(chunks, spec, dims)
    return Outcome(logits, alone, gradients, exported, all(s == sums[0] for s in sums))


def _logits(output: Tensor, model, dims) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: ANN001
    """This rank's vocabulary columns for every packed position; the gradient of the hidden states is summed over tp."""
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

    from opsd_megatron.models.hidden import response_hidden

    hidden = response_hidden(output, torch.arange(output.shape[0] * (dims.tp if dims.sequence_parallel else 1)), dims)
    return copy_to_tensor_model_parallel_region(hidden, group=dims.tp_group) @ model.output_head().t()


def _full_logits(local: Tensor, dims) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: ANN001
    from opsd_megatron.distributed.collectives import gather_shards

    return torch.cat(gather_shards(local.detach(), dims.tp_group), dim=1)[:, :VOCAB]


def _train_pass(chunks, spec, dims) -> tuple[list[Tensor], dict[str, Tensor]]:  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Forward and backward as a training step does it; the gradients by Hugging Face name on every rank."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from opsd_megatron.models.build import forward_packed
    from opsd_megatron.models.export import export_hf_weights

    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    wrapped = [DistributedDataParallel(chunk.config, settings, chunk) for chunk in chunks]
    chunks[0].config.finalize_model_grads_func = finalize_model_grads
    columns = spec.padded_vocab_size(dims.tp) // dims.tp

    def forward_step(indices, model):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        index = next(indices)
        output = forward_packed(model, packed(token_ids(index), LENGTHS[index]))

        def loss(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            local = _logits(output, model.module, dims)
            padded = torch.nn.functional.pad(coefficients(index), (0, columns * dims.tp - VOCAB))
            part = padded[:, columns * dims.tp_rank : columns * (dims.tp_rank + 1)]
            # One token in all, so that Megatron-Core divides by 1.
            return (local * part).sum(), torch.tensor(int(index == 0), dtype=torch.int), _full_logits(local, dims)

        return output, loss

    for chunk in wrapped:
        chunk.zero_grad_buffer()
    logits: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(range(len(LENGTHS))) for _ in wrapped],
        model=wrapped,
        num_microbatches=len(LENGTHS),
        seq_length=max(map(sum, LENGTHS)),
        micro_batch_size=1,
        forward_only=False,
    )
    # The exporter gathers whatever the parameters hold: let them hold their gradients.
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)
    return logits, {name: tensor.clone() for name, tensor in export_hf_weights(chunks, spec, dims)}
