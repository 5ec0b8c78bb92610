"""What vLLM's CPU build (0.32) needs done to it to be reloaded, to be quick, and to run beside another job."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_megatron.distributed.collectives import broadcast_object

# The kernels for norms and activations take multiples of so many columns.
_KERNEL_COLUMNS = 8
# The rows that the head is packed for. It takes any number, but packed for one it rounds a single row as no other.
_HEAD_ROWS = 8
# From so many bytes on PyTorch asks for huge pages.
_HUGE_PAGE = 2 * 2**20


def vocabulary_in_place(model: torch.nn.Module, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Have embedding and output head read what comes for them where it lies, and pass the other weights on.

    ``reload_weights`` would make these, by far the largest, anew, pack them and copy them over: seconds and gigabytes.
    What comes is most often the trainer's own memory, which lasts until its next update; the engine gives up its
    weights before that. Copied is what does not fit as it is: a tensor of which this rank reads some rows only, what
    vLLM pads, or holds in another dtype.

    Args:
        model: vLLM's model, before the reload starts, which puts other tensors in its place meanwhile.
        weights: By Hugging Face name; drained as the result is.
    """
    head, embedding = _vocabulary(model)
    used = {"lm_head.weight": (head, head.weight), "model.embed_tokens.weight": (embedding, embedding.weight)}

    def rest() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if name in used:
                _take(*used[name], tensor)
            else:
                yield name, tensor

    return rest()


def _take(module: Any, weight: Any, tensor: Tensor) -> None:
    """Make ``tensor``, or this rank's rows of it, what ``weight`` holds."""
    fits = tensor.shape == weight.shape and tensor.dtype == weight.dtype and tensor.is_contiguous()
    if fits:
        weight.data = tensor
    else:
        if getattr(weight, "lent", False):
            weight.data = torch.empty_like(weight.data)  # not into somebody else's memory
        module.weight_loader(weight, tensor)
    weight.lent = fits


def pack_head(model: torch.nn.Module) -> None:
    """Make the output head multiply by the weights it has, and keep no other packed copy.

    vLLM's CPU build multiplies by packed copies, which each module makes of its weight when it is loaded: an embedding
    too, which never multiplies, and a tied head not again when the embedding has new weights.

    A large head's copy is PyTorch's instead: packed and multiplied by the same library (oneDNN), bit for bit alike, but
    in memory of PyTorch's, which can have huge pages: all of it is read for every token.
    """
    head, embedding = _vocabulary(model)
    for module in (head, embedding):
        module.cpu_linear = None  # frees the old copy before the new one is made
    weight = head.weight.detach()
    packable = weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if packable and weight.nbytes >= _HUGE_PAGE:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _HEAD_ROWS)
        head.cpu_linear = partial(_multiply_packed, packed)
    else:
        head.quant_method.process_weights_after_loading(head)


def _multiply_packed(packed: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.t() + bias`` by the packed copy of ``weight``."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


def drop_packed(model: torch.nn.Module) -> None:
    """Free the packed copies of the head and of linear layers, which have nothing else; a reload makes new ones.

    Left are norms, experts, which are packed in place, and the embedding, which is the trainer's or a copy.
    """
    for module in model.modules():
        if hasattr(module, "cpu_linear"):
            module.cpu_linear = None  # type: ignore[assignment]


def _vocabulary(model: torch.nn.Module) -> tuple[Any, Any]:
    """Output head and embedding."""
    return model.get_submodule("lm_head"), model.get_submodule("model.embed_tokens")


def use_fused_kernels(model: torch.nn.Module) -> None:
    """Have norms and activations of vLLM's model run as one operation each, in kernels that its CPU build brings.

    It calls those on GPUs only and composes norms and SwiGLU of PyTorch's operations elsewhere, up to ten for a norm.
    For the few rows of a decoding step starting them takes most of the time.
    """
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.layernorm import RMSNorm

    for module in model.modules():
        # Not subclasses, which compute something else.
        if type(module) is RMSNorm and module.has_weight and module.variance_size_override is None:
            module.forward = partial(_fused_norm, module)  # type: ignore[method-assign]
        elif type(module) is SiluAndMul:
            module.forward = partial(_fused_swiglu, module)  # type: ignore[method-assign]


def _fused_norm(norm: Any, x: Tensor, residual: Tensor | None = None) -> Any:
    """What vLLM's ``RMSNorm.forward`` does; with a residual both are changed in place, as its kernel on GPUs has it."""
    fits = x.shape[-1] % _KERNEL_COLUMNS == 0 and x.dtype == norm.weight.dtype
    if not fits or not (residual is None or residual.is_contiguous()):
        return norm.forward_native(x, residual)
    x = x.contiguous()  # the kernel takes no strides: a rank's queries are a slice of what the product gave
    if residual is None:
        out = torch.empty_like(x)
        torch.ops._C.rms_norm(out, x, norm.weight, norm.variance_epsilon)
        return out
    torch.ops._C.fused_add_rms_norm(x, residual, norm.weight, norm.variance_epsilon)
    return x, residual


def _fused_swiglu(layer: Any, x: Tensor) -> Any:
    """What vLLM's ``SiluAndMul.forward`` does: ``[..., 2 d] -> [..., d]``."""
    columns = x.shape[-1] // 2
    if columns % _KERNEL_COLUMNS:
        return layer.forward_native(x)
    out = x.new_empty((*x.shape[:-1], columns))
    torch.ops._C.silu_and_mul(out, x.contiguous())
    return out


def forget_expert_kernels(model: torch.nn.Module) -> None:
    """Make vLLM's CPU build pack the weights of experts again in a reload.

    It pads and packs them while it makes the layer's kernel, which it does once (0.32: ``_setup_kernel`` in
    ``unquantized_fused_moe_method.py``). A reload would leave them as they come: an error where padding changes their
    shape, and nonsense, read as packed weights, where it does not.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


@contextmanager
def private_shared_memory() -> Iterator[None]:
    """On CPU, give this engine's shared memory a name no other job on the machine has, and leave no file of it behind.

    vLLM derives the name from the launcher's address, which under ``external_launcher`` is the constant ``env://``:
    a second job with an engine of the same size fails with "create shm in SHMManager failed. errno: 17", and so does
    the next one after a job that was killed. The address is otherwise unused once the default group exists. Once all
    ranks have mapped the memory its name has served; vLLM removes it only when a process ends by itself.

    Ranks: every rank of the world.
    """
    if torch.cuda.is_available():
        yield
        return
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    name = broadcast_object(f"opsd-{uuid.uuid4().hex[:12]}")
    original: Callable[[Any], tuple[str, int, int]] = ExecutorWithExternalLauncher._distributed_args

    def arguments(executor: Any) -> tuple[str, int, int]:
        address, rank, local_rank = original(executor)
        return f"{address}:{name}", rank, local_rank

    ExecutorWithExternalLauncher._distributed_args = arguments
    try:
        yield
        dist.barrier()
    finally:
        ExecutorWithExternalLauncher._distributed_args = original
        for path in Path("/dev/shm").glob(f"{name}-*"):
            path.unlink(missing_ok=True)  # ranks of one machine do this side by side
