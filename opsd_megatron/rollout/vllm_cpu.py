"""What vLLM's CPU build (0.32) needs done to it to be reloaded, and to run beside another job."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_megatron.distributed.collectives import broadcast_object


def vocabulary_in_place(model: torch.nn.Module, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Load embedding and output head into the tensors that vLLM uses, and pass the other weights on.

    ``reload_weights`` would make these, by far the largest, anew, pack them and copy them over: seconds and gigabytes.

    Args:
        model: vLLM's model, before the reload starts, which puts other tensors in its place meanwhile.
        weights: By Hugging Face name; drained as the result is.
    """
    head, embedding = _vocabulary(model)
    used = {"lm_head.weight": (head, head.weight), "model.embed_tokens.weight": (embedding, embedding.weight)}

    def rest() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if name in used:
                module, weight = used[name]
                module.weight_loader(weight, tensor)
            else:
                yield name, tensor

    return rest()


def pack_head(model: torch.nn.Module) -> None:
    """Make the output head multiply by the weights it has, and keep no other packed copy.

    vLLM's CPU build multiplies by packed copies, which each module makes of its weight when it is loaded: an embedding
    too, which never multiplies, and a tied head not again when the embedding has new weights.
    """
    head, embedding = _vocabulary(model)
    for module in (head, embedding):
        module.cpu_linear = None  # frees the old copy before the new one is made
    head.quant_method.process_weights_after_loading(head)


def _vocabulary(model: torch.nn.Module) -> tuple[Any, Any]:
    """Output head and embedding."""
    return model.get_submodule("lm_head"), model.get_submodule("model.embed_tokens")


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
