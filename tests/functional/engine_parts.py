"""How far what is put into vLLM's CPU engine is from what it replaces; for the process of an engine."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from opsd_megatron.rollout import vllm_cpu, vllm_cpu_sampling


def processed_error() -> float:
    """Largest difference of the log-probs given back with tokens drawn from a part from those of that part."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 320, generator=generator)
    k, p = torch.full((64,), 20), torch.full((64,), 0.9)
    tokens, log_probs = vllm_cpu_sampling._forward(True, logits.clone(), {}, k, p)
    assert log_probs is not None
    top = logits.topk(20)
    before = top.values.softmax(-1).cumsum(-1) - top.values.softmax(-1)
    kept = top.values.masked_fill(before >= 0.9, -torch.inf)
    expected = torch.full_like(logits, -torch.inf).scatter(1, top.indices, kept.log_softmax(-1))
    assert expected.gather(1, tokens[:, None]).isfinite().all()
    assert torch.equal(log_probs.isfinite(), expected.isfinite())
    return float((log_probs - expected)[expected.isfinite()].abs().max())


def head_products() -> dict[str, bool]:
    """Whether large heads as they are packed give the very bits that vLLM's own packed copies of them give, by kind."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, *([torch.bfloat16] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [])]
    same = {}
    for dtype, size, rows in product(dtypes, (24_007, 32_064), (1, 2, 7, 8, 9, 64)):
        model, theirs = torch.nn.Module(), torch.nn.Module()
        model.lm_head, model.model = torch.nn.Module(), torch.nn.Module()
        model.model.embed_tokens = model.lm_head
        weight = torch.nn.Parameter(torch.randn(size, 96, generator=generator).to(dtype), requires_grad=False)
        model.lm_head.weight = theirs.weight = weight
        vllm_cpu.pack_head(model)
        dispatch_cpu_unquantized_gemm(theirs, remove_weight=False)
        x = torch.randn(rows, 96, generator=generator).to(dtype)
        ours, own = (module.cpu_linear(x, weight, None) for module in (model.lm_head, theirs))
        same[f"{dtype} {size} {rows}"] = torch.equal(ours, own)
    return same


def kernel_errors(model: torch.nn.Module) -> dict[str, float]:
    """Largest difference of each kind of layer from what vLLM composes of PyTorch's operations."""
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.layernorm import RMSNorm

    generator = torch.Generator().manual_seed(0)
    errors: dict[str, float] = {}
    for module in model.modules():
        found: list[Tensor] = []
        if isinstance(module, (RMSNorm, SiluAndMul)):
            assert "forward" in vars(module), "not replaced"
        if isinstance(module, RMSNorm):
            wide = torch.randn(5, 3 * module.hidden_size, generator=generator)
            x, residual = wide[:, : module.hidden_size], torch.randn(5, module.hidden_size, generator=generator)
            found += [module(x), module.forward_native(x)]
            pairs = module(x.clone(), residual.clone()), module.forward_native(x.clone(), residual.clone())
            found += [tensor for pair in zip(*pairs, strict=True) for tensor in pair]
        elif isinstance(module, SiluAndMul):
            x = torch.randn(5, 64, generator=generator)
            found += [module(x), module.forward_native(x)]
        for ours, theirs in zip(found[::2], found[1::2], strict=True):
            kind = type(module).__name__
            errors[kind] = max(errors.get(kind, 0.0), float((ours - theirs).abs().max()))
    return errors
