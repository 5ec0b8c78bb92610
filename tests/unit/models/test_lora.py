"""Adapters on every kind of mesh: gradients against transformers in float64, switching off, merging, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opsd_megatron.config import LoraConfig
from tests.distributed import run_distributed
from tests.tiny import make_tiny_qwen3, make_tiny_qwen3_moe
from tests.unit.models.adapted import (
    ALPHA,
    LENGTHS,
    RANK,
    SHAPE,
    Mesh,
    adapted,
    fill_adapters,
    hidden_states,
    make_adapted,
    samples,
    save,
)

SP2: dict[str, Any] = {"tensor": 2, "sequence": True}
# On four ranks; data parallelism takes what is left.
MESHES = {
    "dp4": Mesh("dense"),
    "tp2 dp2": Mesh("dense", {"tensor": 2}),
    "tp2 sp dp2": Mesh("dense", SP2),
    "tp2 sp pp2, full recompute": Mesh("dense", {**SP2, "pipeline": 2}, recompute="full"),
    "pp2 vpp2 dp2, selective recompute": Mesh("dense", {"pipeline": 2, "virtual_stages": 2}, recompute="selective"),
    "tp2 cp2": Mesh("dense", {"tensor": 2, "context": 2}),
    "ep2 dp4": Mesh("moe", {"expert": 2}),
    "tp2 sp etp2 dp2": Mesh("moe", SP2),
    "tp2 sp pp2 ep2 etp1": Mesh("moe", {**SP2, "pipeline": 2, "expert": 2, "expert_tensor": 1}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {
        "dense": make_tiny_qwen3(base / "dense", ffn=48, with_tokenizer=False, **SHAPE),
        "moe": make_tiny_qwen3_moe(base / "moe", experts=4, expert_ffn=24, with_tokenizer=False, **SHAPE),
    }


def gradients(models: dict[str, Path], adapted_models: Path, folder: Path) -> dict[str, Any]:
    """The worker: on each mesh one pass as a training step makes it. Its gradients become a checkpoint's factors."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from opsd_megatron.checkpoint.state import load_checkpoint
    from opsd_megatron.data.context import split_context
    from opsd_megatron.data.packing import PackingLayout, pack
    from opsd_megatron.losses import linear_cross_entropy
    from opsd_megatron.models.build import forward_packed
    from opsd_megatron.models.hidden import response_hidden
    from opsd_megatron.trainer.optimizer import make_trainable

    outcome = {}
    for name, mesh in MESHES.items():
        with adapted(models[mesh.model], mesh) as (chunks, spec, dims, config):
            load_checkpoint(adapted_models / mesh.model, model=chunks)
            trainable = make_trainable(chunks, config)

            def forward_step(indices, model):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
                index = next(indices)
                layout = PackingLayout(dims.sequence_multiple, dims.packing_multiple)
                batch = pack(samples(index), with_teacher=False, layout=layout)
                part = split_context(batch, cp=dims.cp, rank=dims.cp_rank)
                output = forward_packed(model, part.student)

                def loss(output: Tensor) -> tuple[Tensor, Tensor, None]:
                    rows = linear_cross_entropy(
                        response_hidden(output, part.student.rows, dims),
                        model.module.output_head(),
                        part.response_ids,
                        tp_group=dims.tp_group,
                        vocab_size=spec.vocab_size,
                        reduce_hidden_grad=not dims.sequence_parallel,
                    )
                    # One token in all, so that Megatron-Core divides by 1.
                    return rows.sum(), torch.tensor(int(index == dims.cp_rank == 0), dtype=torch.int), None

                return output, loss

            for chunk in trainable.chunks:
                chunk.zero_grad_buffer()
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(range(dims.dp_rank, len(LENGTHS), dims.dp)) for _ in chunks],
                model=trainable.chunks,
                num_microbatches=len(LENGTHS) // dims.dp,
                seq_length=64,
                micro_batch_size=1,
                forward_only=False,
            )
            assert chunks[0].config.finalize_model_grads_func is finalize_model_grads
            outcome[name] = check_gradients(chunks, dims)
            trainable.optimizer.prepare_grads()
            outcome[name]["norm"] = trainable.optimizer.get_grad_norm()
            for chunk in chunks:
                for parameter in chunk.parameters():
                    if parameter.requires_grad:
                        parameter.data.copy_(parameter.main_grad)
            save(chunks, folder / name, models[mesh.model])
    return outcome


def check_gradients(chunks: Any, dims: Any) -> dict[str, Any]:
    """That the base has neither gradients nor buffers, and that ranks agree on the gradients of what they all hold."""
    import torch.distributed as dist

    frozen = [p for chunk in chunks for n, p in chunk.named_parameters() if "_lora." not in n]
    apart = 0.0
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            whole = name.endswith("_b") if "linear_proj" in name or "linear_fc2" in name else name.endswith("_a")
            if "_lora." in name and whole:
                group = dims.pg_collection.expt_tp if "experts" in name else dims.tp_group
                first = parameter.main_grad.clone()
                dist.broadcast(first, src=dist.get_global_rank(group, 0), group=group)
                apart = max(apart, float((first - parameter.main_grad).abs().max()))
    touched = [p for p in frozen if p.requires_grad or p.grad is not None or hasattr(p, "main_grad")]
    return {"frozen": len(frozen), "touched": len(touched), "apart": apart}


@pytest.fixture(scope="module")
def adapted_models(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapted")
    run_distributed(make_adapted, 1, models, folder)
    return folder


def factors(checkpoint: Path) -> dict[tuple[str, str], Tensor]:
    """Every factor in a checkpoint, by the Hugging Face name of what it adapts, and ``a`` or ``b``."""
    from opsd_megatron.checkpoint.tensor_store import TensorStore

    store = TensorStore(checkpoint)
    found = {}
    for name in store.names():
        if "_lora." not in name:
            continue
        shape = store.shape(name)
        stacked = store.read(name, (0,) * len(shape), shape)
        projection, factor = name.split("_lora.")[1].rsplit("_", 1)
        part = "self_attn" if "self_attention" in name else "mlp"
        for layer, of_layer in enumerate(stacked):
            if ".experts." not in name:
                found[f"model.layers.{layer}.{part}.{projection}", factor] = of_layer
                continue
            for expert, of_expert in enumerate(of_layer):
                found[f"model.layers.{layer}.mlp.experts.{expert}.{projection}", factor] = of_expert
    return found


def weight_in(model: Any, name: str) -> Tensor:
    """A projection's weight in transformers, which keeps all experts of a layer together; a view."""
    if ".experts." not in name:
        return model.get_submodule(name).weight
    prefix, expert, projection = name.rsplit(".", 2)
    experts = model.get_submodule(prefix)
    if projection == "down_proj":
        return experts.down_proj[int(expert)]
    return experts.gate_up_proj[int(expert)].chunk(2)[int(projection == "up_proj")]


@pytest.fixture(scope="module")
def expected(models: dict[str, Path], adapted_models: Path) -> dict[str, dict[tuple[str, str], Tensor]]:
    """By the chain rule from the merged weights' gradients: with W' = W + s B A, dA = s B^T dW' and dB = s dW' A^T."""
    from transformers import AutoModelForCausalLM

    scale = ALPHA / RANK
    result = {}
    for kind, path in models.items():
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        )
        adapters = {key: tensor.double() for key, tensor in factors(adapted_models / kind).items()}
        names = {name for name, _ in adapters}
        with torch.no_grad():
            for name in names:
                weight_in(model, name).add_(adapters[name, "b"] @ adapters[name, "a"], alpha=scale)
        for sample in (sample for index in range(len(LENGTHS)) for sample in samples(index)):
            ids = torch.tensor([sample.student_prompt_ids + sample.response_ids])
            logits = model(ids).logits[0, len(sample.student_prompt_ids) - 1 : -1]
            F.cross_entropy(logits, torch.tensor(sample.response_ids), reduction="sum").backward()
        for parameter in model.parameters():  # so that weight_in finds gradients
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        result[kind] = {}
        for name in names:
            gradient = weight_in(model, name).detach()
            result[kind][name, "a"] = scale * adapters[name, "b"].T @ gradient
            result[kind][name, "b"] = scale * gradient @ adapters[name, "a"].T
    return result


@pytest.fixture(scope="module")
def found(
    models: dict[str, Path], adapted_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[dict[str, Any]], Path]]:
    folder = tmp_path_factory.mktemp("gradients")
    outcomes = run_distributed(gradients, 4, models, adapted_models, folder)
    return {name: ([outcome[name] for outcome in outcomes], folder / name) for name in MESHES}


@pytest.mark.parametrize("name", MESHES)
def test_gradients_of_every_factor(
    name: str,
    found: dict[str, tuple[list[dict[str, Any]], Path]],
    expected: dict[str, dict[tuple[str, str], Tensor]],
) -> None:
    outcomes, checkpoint = found[name]
    gradients, right = factors(checkpoint), expected[MESHES[name].model]
    assert gradients.keys() == right.keys()
    for key, gradient in right.items():
        assert gradient.norm() > 0
        assert (gradients[key].double() - gradient).norm() < 2e-5 * gradient.norm(), key
    norm = float(torch.stack([gradient.square().sum() for gradient in right.values()]).sum().sqrt())
    for outcome in outcomes:
        assert outcome["frozen"] > 0 and outcome["touched"] == 0
        assert outcome["apart"] < 1e-5 * norm
        assert outcome["norm"] == pytest.approx(norm, rel=1e-5)


def switch_and_merge(models: dict[str, Path], adapted_models: Path) -> dict[str, dict[str, bool]]:
    """On two tensor-parallel ranks: what adapters change, and when."""
    from opsd_megatron.checkpoint.hf_io import SafetensorsReader
    from opsd_megatron.checkpoint.state import load_checkpoint, load_model_weights
    from opsd_megatron.models.build import build_model
    from opsd_megatron.models.export import export_hf_weights
    from opsd_megatron.models.lora import adapters_off
    from opsd_megatron.models.weight_map import load_hf_weights

    outcome = {}
    for name in ("dense", "moe"):
        mesh = Mesh(name, {**SP2, "expert": 2, "expert_tensor": 1} if name == "moe" else SP2)
        with adapted(models[name], mesh) as (chunks, spec, dims, config):
            reader = SafetensorsReader(models[name])
            plain = build_model(spec, config, dims)
            load_hf_weights(plain, spec, reader, dims)
            base = hidden_states(plain)
            exported = dict(export_hf_weights(chunks, spec, dims))
            checks = {
                "fresh adapters change no output": torch.equal(hidden_states(chunks), base),
                "fresh adapters change no export": all(torch.equal(exported[n], reader.get(n)) for n in reader.names()),
            }
            load_checkpoint(adapted_models / name, model=chunks)
            acting = hidden_states(chunks)
            with adapters_off(chunks):
                checks["off is the base, bit for bit"] = torch.equal(hidden_states(chunks), base)
            checks["on again afterwards"] = torch.equal(hidden_states(chunks), acting)
            try:
                with adapters_off(chunks):
                    raise InterruptedError
            except InterruptedError:
                checks["on again after an error"] = torch.equal(hidden_states(chunks), acting)
            checks["they act"] = not torch.allclose(acting, base, atol=0.1)
            load_model_weights(adapted_models / name, plain)
            checks["merged on loading"] = torch.allclose(hidden_states(plain), acting, rtol=1e-4, atol=1e-4)
            checks["no adapter left there"] = not any("_lora" in n for n, _ in plain[0].named_modules())
            checks["trainable again"] = all(p.requires_grad for p in plain[0].parameters())
            merged = {n: t.clone() for n, t in export_hf_weights(chunks, spec, dims)}
            checks["the export is merged"] = all(
                torch.equal(merged[n], t) for n, t in export_hf_weights(plain, spec, dims)
            )
            outcome[name] = checks
    return outcome


def test_switching_off_and_merging(models: dict[str, Path], adapted_models: Path) -> None:
    for outcome in run_distributed(switch_and_merge, 2, models, adapted_models):
        assert outcome == {name: dict.fromkeys(checks, True) for name, checks in outcome.items()}
        assert outcome.keys() == {"dense", "moe"}


def some_targets(path: Path) -> dict[str, Any]:
    from opsd_megatron.models.lora import effective_weight

    chosen = {"k_proj", "up_proj"}
    with adapted(path, Mesh("dense"), targets=["up_proj", "k_proj"]) as (chunks, _, _, _):
        parameters = dict(chunks[0].named_parameters())
        first = {n: p.detach().clone() for n, p in parameters.items() if p.requires_grad}
        fill_adapters(chunks)
        acting = hidden_states(chunks)
        changed = {}
        for layer in range(SHAPE["num_layers"]):
            for part in ("self_attention.linear_qkv", "mlp.linear_fc1"):
                weight = parameters[f"decoder.layers.{layer}.{part}.weight"]
                changed[part] = (effective_weight(weight) != weight).any(dim=1)
                weight.data.copy_(effective_weight(weight))
        for name in first:
            if name.endswith("_b"):
                parameters[name].data.zero_()
        merged = hidden_states(chunks)
    with adapted(path, Mesh("dense"), targets=sorted(chosen)) as (chunks, _, _, _):
        again = {n: p.detach() for n, p in chunks[0].named_parameters() if p.requires_grad}
        same_draw = all(torch.equal(tensor, again[n]) for n, tensor in first.items())
    return {"first": first, "changed": changed, "equal": torch.allclose(acting, merged, atol=1e-4), "same": same_draw}


def test_some_of_the_projections(models: dict[str, Path]) -> None:
    """Others' rows stay as they are, between and beside the adapted ones."""
    (outcome,) = run_distributed(some_targets, 1, models["dense"])
    assert outcome["equal"] and outcome["same"]
    # Of each of two key/value heads: 2 query heads, a key and a value, of 8 rows each.
    assert outcome["changed"]["self_attention.linear_qkv"].tolist() == (([False] * 16 + [True] * 8 + [False] * 8) * 2)
    assert outcome["changed"]["mlp.linear_fc1"].tolist() == [False] * 48 + [True] * 48
    drawn = {name: tensor for name, tensor in outcome["first"].items() if name.endswith("_a")}
    assert len(drawn) == 2 * SHAPE["num_layers"] == len(outcome["first"]) // 2
    bound = SHAPE["hidden_size"] ** -0.5
    for name, tensor in outcome["first"].items():
        if name in drawn:
            assert tensor.shape == (RANK, SHAPE["hidden_size"])
            assert 0.9 * bound < tensor.abs().max() <= bound and abs(tensor.mean()) < 0.1 * bound * 2
        else:
            assert not tensor.any()
    assert len({tuple(tensor.flatten().tolist()) for tensor in drawn.values()}) == len(drawn)


def test_transformer_engine_s_layers_get_their_norms_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Megatron-Core's own specification of its layers, which can be read without it, if not built."""
    from megatron.core.extensions import transformer_engine as engine
    from megatron.core.extensions import transformer_engine_spec_provider as provider
    from megatron.core.models.gpt import gpt_layer_specs

    from opsd_megatron.models.backends import block_spec

    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", provider.TESpecProvider, raising=False)
    monkeypatch.setattr(provider, "is_te_min_version", lambda version: True)
    attention = LoraConfig(RANK, targets=["q_proj"])
    fused, outside = (block_spec("transformer_engine", [0, 4], lora) for lora in (LoraConfig(), attention))
    for with_experts, before, after in zip((False, True), fused.layer_specs, outside.layer_specs, strict=True):
        old, new = before.submodules, after.submodules
        assert old.self_attention.submodules.linear_qkv is engine.TELayerNormColumnParallelLinear
        assert new.self_attention.submodules.linear_qkv is engine.TEColumnParallelLinear
        assert new.input_layernorm is new.pre_mlp_layernorm is engine.TENorm
        if with_experts:
            assert old.mlp == new.mlp
        else:
            assert old.mlp.submodules.linear_fc1 is engine.TELayerNormColumnParallelLinear
            assert new.mlp.submodules.linear_fc1 is engine.TEColumnParallelLinear
        # Checkpoints have the names that they have with the norm inside, as from the torch backend.
        torch_layer = block_spec("torch", [4 * with_experts], attention).layer_specs[0].submodules
        assert torch_layer.sharded_state_dict_keys_map.items() <= new.sharded_state_dict_keys_map.items()
        assert old.sharded_state_dict_keys_map.items() <= new.sharded_state_dict_keys_map.items()
