"""The model on every mesh against transformers: logits, gradients, packing, and weights there and back.

One launch for each mesh does everything, for every model that goes on it; the tests look at what it found. The gradient
is that of one number made of all logits of two micro-batches, so it takes every path a training step takes: through
Megatron-Core's schedule, its data-parallel wrapper and ``finalize_model_grads``. At tp > 1 that is where a forgotten
sum over ranks shows, above all for the query and key norms and the router, whose gradients are partial, and for the
tied embedding, which two pipeline stages share; at ep > 1 for the experts, which other ranks hold than other weights.

Vocabulary 270 and tp 4 make two rows of padding. Under context parallelism a rank has an early and a late part of every
sequence, padded to a multiple of ``2 * cp``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opsd_megatron.config import Config
from tests.distributed import run_distributed
from tests.functional.layouts import Layout
from tests.tiny import make_tiny_qwen3, make_tiny_qwen3_moe

VOCAB = 270
# Lengths of the sequences of two micro-batches; each adds up to a multiple of 4 for sequence parallelism.
LENGTHS = ((5, 17, 2), (9, 1, 2))

_DENSE = partial(make_tiny_qwen3, vocab_size=VOCAB, heads=8, kv_heads=4, head_dim=16)
_MOE = partial(make_tiny_qwen3_moe, vocab_size=VOCAB, heads=8, kv_heads=4, head_dim=16)
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
MODELS: dict[str, Callable[[Path], Path]] = {
    "tied": partial(_DENSE, tied=True),
    # Any tensor parallelism cuts the one key/value head.
    "untied": partial(_DENSE, tied=False, kv_heads=1),
    "moe": _MOE,
    # The first of two stages has no experts at all; one key/value head.
    "mixed": partial(_MOE, normalized=False, dense_layers=(0, 1), experts=4, kv_heads=1),
    "yarn": partial(_DENSE, rope=_YARN),
    "yarn-explicit": partial(
        _DENSE, rope=_YARN | {"attention_factor": 1.3, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}
    ),
    "yarn-mscale": partial(_DENSE, rope=_YARN | {"mscale": 0.8, "mscale_all_dim": 0.3}),
}


@dataclass(frozen=True)
class Mesh:
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int | None = None
    sequence: bool = False
    recompute: str = "none"

    def __str__(self) -> str:
        sizes = {"tp": self.tp, "pp": self.pp, "vpp": self.vpp, "cp": self.cp, "dp": self.dp, "ep": self.ep}
        name = "-".join(f"{key}{size}" for key, size in sizes.items() if size > 1) or "one"
        name += "" if self.etp is None else f"-etp{self.etp}"
        return name + "-sp" * self.sequence + f"-{self.recompute}-recompute" * (self.recompute != "none")

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def models(self) -> list[str]:
        """Those that go on this mesh; one rank has all of them."""
        if self == Mesh():
            return list(MODELS)
        dense = ["tied", "untied"] if self.ep == 1 and self.etp is None else []
        # Megatron-Core cuts YaRN's angles over context ranks in a place of its own.
        dense += ["yarn"] * (self.cp > 1 and self.ep == 1)
        return dense + (["moe", "mixed"] if self.tp == 1 or self.sequence else [])


MESHES = (
    Mesh(),
    Mesh(tp=2),
    Mesh(pp=2),
    Mesh(tp=2, pp=2),
    Mesh(tp=2, sequence=True, recompute="full"),
    Mesh(tp=2, pp=2, sequence=True),
    Mesh(pp=2, vpp=2, recompute="selective"),
    Mesh(tp=2, pp=2, vpp=2, sequence=True),
    Mesh(tp=4, sequence=True),
    Mesh(dp=2),
    Mesh(cp=2),
    Mesh(cp=2, ep=2),
    Mesh(dp=2, ep=2),
    Mesh(dp=2, ep=2, pp=2, recompute="full"),
    Mesh(tp=2, sequence=True, etp=1),
    Mesh(dp=2, etp=2),
    Mesh(tp=2, sequence=True, ep=2, etp=1),
    Mesh(tp=2, dp=2, ep=2, sequence=True),
    Mesh(tp=2, dp=2, ep=4, etp=1, sequence=True),
)


@dataclass(frozen=True)
class Outcome:
    """What one mesh made of one model.

    Attributes:
        logits: Packed ``[T, VOCAB]`` of each micro-batch.
        alone: The same with every sequence in a micro-batch of its own; only on one rank.
        gradients: By Hugging Face name, complete.
        exported: By Hugging Face name.
        replicas_agree: Whether all ranks exported the same.
    """

    logits: list[Tensor]
    alone: list[Tensor] | None
    gradients: dict[str, Tensor]
    exported: dict[str, Tensor]
    replicas_agree: bool


@dataclass(frozen=True)
class Reference:
    """Transformers' logits and gradients, one sequence at a time without padding."""

    logits: list[Tensor]
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def references(models: dict[str, Path]) -> dict[str, Reference]:
    return {name: _reference(path) for name, path in models.items()}


def _reference(path: Path) -> Reference:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    logits = []
    for index, lengths in enumerate(LENGTHS):
        ids = token_ids(index)
        logits.append(torch.cat([model(part[None]).logits[0] for part in ids.split(lengths)]))
        (logits[-1] * coefficients(index)).sum().backward()
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients |= _stored_form(name, parameter.grad)
    return Reference([x.detach() for x in logits], gradients)


def _stored_form(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """As it is in a safetensors file: transformers keeps all experts of a layer in one tensor, in memory only."""
    prefix, experts, kind = name.partition(".experts.")
    if not experts:
        return {name: tensor}
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[kind]
    return {
        f"{prefix}.experts.{expert}.{part}.weight": piece
        for expert, own in enumerate(tensor)
        for part, piece in zip(parts, own.chunk(len(parts)), strict=True)
    }


_outcomes: dict[Mesh, dict[str, Outcome]] = {}


def _outcome(mesh: Mesh, models: dict[str, Path]) -> dict[str, Outcome]:
    if mesh not in _outcomes:
        there = {name: models[name] for name in mesh.models}
        # The last rank is on the last stage, which holds the logits.
        _outcomes[mesh] = run_distributed(measure, mesh.world_size, mesh, there)[-1]
    return _outcomes[mesh]


CASES = [pytest.param(mesh, name, id=f"{mesh}-{name}") for mesh in MESHES for name in mesh.models]


@pytest.mark.parametrize(("mesh", "name"), CASES)
def test_logits_equal_those_of_transformers(
    mesh: Mesh, name: str, models: dict[str, Path], references: dict[str, Reference]
) -> None:
    for found, expected in zip(_outcome(mesh, models)[name].logits, references[name].logits, strict=True):
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 1e-4
        assert expected.std() > 0.1  # logits worth comparing


# Elsewhere micro-batches go through the schedule as they are; there transformers' logits, made one by one, say it all.
@pytest.mark.parametrize("name", Mesh().models)
def test_packed_equals_one_by_one(name: str, models: dict[str, Path]) -> None:
    outcome = _outcome(Mesh(), models)[name]
    assert outcome.alone is not None
    for packed, alone in zip(outcome.logits, outcome.alone, strict=True):
        assert (packed - alone).abs().max() < 1e-5


@pytest.mark.parametrize(("mesh", "name"), CASES)
def test_gradients_equal_those_of_transformers(
    mesh: Mesh, name: str, models: dict[str, Path], references: dict[str, Reference]
) -> None:
    found, expected = _outcome(mesh, models)[name].gradients, references[name].gradients
    assert sorted(found) == sorted(expected)
    for tensor, gradient in expected.items():
        # An expert that no token went to has a gradient of zero.
        error = (found[tensor] - gradient).norm()
        assert error <= 1e-4 * gradient.norm(), f"{tensor}: {error:.2e} of {gradient.norm():.2e}"


@pytest.mark.parametrize(("mesh", "name"), CASES)
def test_export_gives_back_what_was_loaded(mesh: Mesh, name: str, models: dict[str, Path]) -> None:
    from safetensors.torch import load_file

    outcome, stored = _outcome(mesh, models)[name], load_file(models[name] / "model.safetensors")
    assert set(outcome.exported) == set(stored)
    assert all(torch.equal(outcome.exported[name], tensor) for name, tensor in stored.items())
    assert outcome.replicas_agree


def test_yarn_changes_the_logits(references: dict[str, Reference]) -> None:
    """Otherwise equal logits would say nothing about it."""
    names = ("tied", "yarn", "yarn-explicit", "yarn-mscale")
    for i, name in enumerate(names):
        for other in names[:i]:
            assert (references[name].logits[0] - references[other].logits[0]).abs().max() > 0.01


def test_every_expert_is_used(references: dict[str, Reference]) -> None:
    gradients = {name: g for name, g in references["moe"].gradients.items() if ".experts." in name}
    assert all(gradient.any() for gradient in gradients.values())


def token_ids(micro_batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(micro_batch)
    return torch.randint(0, VOCAB, (sum(LENGTHS[micro_batch]),), generator=generator)


def coefficients(micro_batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + micro_batch)
    return torch.randn(sum(LENGTHS[micro_batch]), VOCAB, generator=generator)


def measure(mesh: Mesh, models: dict[str, Path]) -> dict[str, Outcome]:
    """The worker: every model on one mesh."""
    from opsd_megatron.distributed.parallel import ParallelDims
    from opsd_megatron.distributed.seed import seed_everything

    config = Config()
    config.model.dtype = "float32"
    config.model.recompute = mesh.recompute
    parallel = config.parallel
    parallel.tensor, parallel.pipeline, parallel.context = mesh.tp, mesh.pp, mesh.cp
    parallel.sequence = mesh.sequence
    parallel.expert, parallel.expert_tensor = mesh.ep, mesh.etp
    parallel.virtual_stages = mesh.vpp
    dims = ParallelDims.initialize(config.parallel)
    seed_everything(0, dims)
    assert (dims.dp, dims.cp) == (mesh.dp, mesh.cp)
    return {name: _measure_one(path, config, dims) for name, path in models.items()}


def _measure_one(path: Path, config: Config, dims) -> Outcome:  # type: ignore[no-untyped-def]  # noqa: ANN001
    from opsd_megatron.checkpoint.hf_io import SafetensorsReader
    from opsd_megatron.distributed.collectives import gather_objects
    from opsd_megatron.models.build import build_model, forward_packed
    from opsd_megatron.models.export import export_hf_weights
    from opsd_megatron.models.families import read_spec
    from opsd_megatron.models.weight_map import load_hf_weights

    spec = read_spec(path)
    chunks = build_model(spec, config, dims)
    load_hf_weights(chunks, spec, SafetensorsReader(path), dims)
    exported = {name: tensor.clone() for name, tensor in export_hf_weights(chunks, spec, dims)}
    sums = gather_objects({name: tensor.sum().item() for name, tensor in exported.items()})
    alone = None
    if dims.world_size == 1:
        (model,) = chunks
        with torch.no_grad():
            alone = [
                torch.cat(
                    [
                        _logits(forward_packed(model, Layout.of((len(part),)).sequences(part)), model, dims)
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
    if not dims.sequence_parallel:  # there the rows' own gather sums
        hidden = copy_to_tensor_model_parallel_region(hidden, group=dims.tp_group)
    return hidden @ model.output_head().t()


def _full_logits(local: Tensor, layout: Layout, dims) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: ANN001
    from opsd_megatron.distributed.collectives import gather_shards

    own = torch.cat(gather_shards(local.detach(), dims.tp_group), dim=1)[:, :VOCAB]
    return layout.whole(gather_shards(own, dims.cp_group))


def _train_pass(chunks, spec, dims) -> tuple[list[Tensor], dict[str, Tensor]]:  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Forward and backward as a training step does it; the gradients by Hugging Face name on every rank."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from opsd_megatron.distributed.collectives import gather_objects
    from opsd_megatron.models.build import forward_packed
    from opsd_megatron.models.export import export_hf_weights

    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    wrapped = [DistributedDataParallel(chunk.config, settings, chunk) for chunk in chunks]
    chunks[0].config.finalize_model_grads_func = finalize_model_grads
    columns = spec.padded_vocab_size(dims.tp) // dims.tp
    layouts = [Layout.of(lengths, dims.cp) for lengths in LENGTHS]

    def forward_step(indices, model):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        index = next(indices)
        layout = layouts[index]
        output = forward_packed(model, layout.sequences(token_ids(index), dims.cp_rank))

        def loss(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            local = _logits(output, model.module, dims)
            padded = torch.nn.functional.pad(coefficients(index), (0, columns * dims.tp - VOCAB))
            own = layout.part(padded[:, columns * dims.tp_rank : columns * (dims.tp_rank + 1)], dims.cp_rank)
            # One token in all, so that Megatron-Core divides by 1.
            tokens = torch.tensor(int(index == 0 and dims.cp_rank == 0), dtype=torch.int)
            return (local * own).sum(), tokens, _full_logits(local, layout, dims)

        return output, loss

    for chunk in wrapped:
        chunk.zero_grad_buffer()
    logits: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(range(dims.dp_rank, len(LENGTHS), dims.dp)) for _ in wrapped],
        model=wrapped,
        num_microbatches=len(LENGTHS) // dims.dp,
        seq_length=max(sum(layout.lengths) for layout in layouts),
        micro_batch_size=1,
        forward_only=False,
    )
    everyone = gather_objects(logits, group=dims.dp_group)
    logits = [everyone[index % dims.dp][index // dims.dp] for index in range(len(LENGTHS) if logits else 0)]
    # The exporter gathers whatever the parameters hold: let them hold their gradients.
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)
    return logits, {name: tensor.clone() for name, tensor in export_hf_weights(chunks, spec, dims)}
