"""Stand-ins that let Megatron-Core 0.16.1 run on a host without a CUDA device.

Megatron-Core computes with ordinary tensor operations but names CUDA in places: as a device, for random-number state,
to order work. Each redirect below says which of its lines needs it (paths are relative to ``megatron/core``). Nothing
here touches a host that has a CUDA device. Not thread-safe: install from the main thread, where training runs.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

_plain_type = Tensor.type


class _TorchOnCpu:
    """The module ``torch`` to those files of Megatron-Core that write ``device="cuda"`` out.

    Creates their tensors on the CPU, in memory that is not pinned; everything else is torch's own. A function mode
    would see such calls wherever they are, and every other call of the process as well: a tenth of a small step's time.
    """

    _CREATORS = ("empty", "empty_like", "ones", "tensor", "zeros")

    def __init__(self) -> None:
        for name in self._CREATORS:
            setattr(self, name, self._on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def _on_cpu(create: Any) -> Any:
        def created(*args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("device")).startswith("cuda"):
                kwargs["device"] = "cpu"
            kwargs.pop("pin_memory", None)
            return create(*args, **kwargs)

        return created


# Which files these are, and where: token counts (schedules :596,983,2138), norms and overflow flags (optimizer
# :473,481,485,907, clip_grads :90-207, utils :1207), parallel save and load (exchange_utils :104,110,326,
# state_dict_saver :204), chunk numbers under context parallelism (rope_utils :63, pinned).
_FILES_WITH_CUDA_LITERALS = (
    "pipeline_parallel.schedules",
    "optimizer.optimizer",
    "optimizer.clip_grads",
    "utils",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.state_dict_saver",
    "models.common.embeddings.rope_utils",
)


def _type(tensor: Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    """``Tensor.type`` that answers ``torch.cuda.FloatTensor`` where torch says ``torch.FloatTensor``."""
    if dtype is not None:
        return _plain_type(tensor, dtype, *args, **kwargs)
    name = _plain_type(tensor)
    return name if "cuda" in name else name.replace("torch.", "torch.cuda.", 1)


def _splits_as_numpy(dispatcher: Any, point: str, tokens_per_expert: Any = None) -> Any:
    """``MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize`` for counts that are on the host already."""
    if point == dispatcher.cuda_dtoh_point:
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            if isinstance(splits := getattr(dispatcher, name), Tensor):
                setattr(dispatcher, name, splits.numpy())
    return tokens_per_expert


def _even_collectives(mappings: Any) -> None:
    """Let ``tensor_parallel.mappings`` gather and reduce-scatter unequal parts by padding; gloo takes equal ones."""
    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def pad(part: Tensor, length: int) -> Tensor:
        return torch.cat([part, part.new_zeros(length - len(part), *part.shape[1:])])

    def gather_parts(
        own: Tensor, group: Any, sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        if sizes is None or group.size() == 1:
            return gather(own, group, None, use_global_buffer)  # type: ignore[no-any-return]
        # tensor_split: where no rank has any, they are as many parts all the same.
        parts = gather(pad(own, max(sizes)), group).tensor_split(len(sizes))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def reduce_parts(
        parts: Tensor, group: Any, sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        if sizes is None or group.size() == 1:
            return reduce_scatter(parts, group, None, use_global_buffer)  # type: ignore[no-any-return]
        padded = torch.cat([pad(part, max(sizes)) for part in parts.split(sizes)])
        return reduce_scatter(padded, group)[: sizes[group.rank()]]  # type: ignore[no-any-return]

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_parts, reduce_parts


def _alone_in_place(collective: Any) -> Any:
    """``all_gather_into_tensor`` or ``reduce_scatter_tensor`` that leaves a lone rank's tensor where it is."""

    def exchange(output: Tensor, own: Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        in_place = output.data_ptr() == own.data_ptr() and output.shape == own.shape
        if in_place and group is not None and group.size() == 1 and not kwargs.get("async_op"):
            return None
        return collective(output, own, *args, group=group, **kwargs)

    return exchange


_installed = False


def install_cpu_stand_ins() -> None:
    """Redirect the CUDA calls of Megatron-Core to the CPU. Idempotent; does nothing where a CUDA device exists.

    Imports Megatron-Core, and may be called before or after anything else has.
    """
    global _installed
    if torch.cuda.is_available() or _installed:
        return
    _installed = True

    # tensor_parallel/mappings.py:91-181 and layers.py:552-607, utils.py:631 (buffers of the sequence-parallel
    # collectives), models/common/embeddings/rotary_pos_embedding.py:162, pipeline_parallel/p2p_communication.py:190-321
    # (received shapes and activations), distributed/param_and_grad_buffer.py:783-806 (parameter and gradient buffers).
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]

    # pipeline_parallel/p2p_communication.py:242 (after exchanging shapes), dist_checkpointing/strategies/
    # filesystem_async.py:230 and fully_parallel.py:281, timers.py:152,165. CPU work is done when its call returns.
    torch.cuda.synchronize = lambda *args, **kwargs: None

    # models/common/language_module/language_module.py:244 (the tied embedding of the last pipeline stage),
    # dist_checkpointing/exchange_utils.py:336,499.
    Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]

    # optimizer/distrib_optimizer.py:361,420,582 and optimizer/optimizer.py:671,690 sort parameters by
    # "torch.cuda.FloatTensor"-like strings; optimizer/clip_grads.py:167 asserts one.
    Tensor.type = _type  # type: ignore[method-assign, assignment]

    # tensor_parallel/random.py:235-238,422 (the trackers of model-parallel random state) keep states of the CUDA
    # generator; there is one generator here, the CPU's.
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    import megatron.core.tensor_parallel.random as megatron_random

    # tensor_parallel/random.py:240-277,447,457 call two helpers of the same file that reach into torch._C and
    # torch.cuda.default_generators, which are empty without a device.
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    # transformer/moe/token_dispatcher.py:427,869-899 copies counts to the host on a stream of its own, and leaves split
    # sizes as tensors where they are there already, which gloo's all-to-all does not take. Not torch's streams but the
    # method is replaced: vLLM puts placeholders of its own in their place when it is imported.
    import megatron.core.transformer.moe.moe_utils as moe_utils
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = object()
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = _splits_as_numpy

    # The dispatcher gathers over expert-tensor-parallel ranks what expert-parallel ones sent them, in unequal parts
    # (:694-700,747).
    import megatron.core.tensor_parallel.mappings as mappings

    _even_collectives(mappings)

    # transformer/moe/moe_utils.py:1192,1225 look at a name that exists only beside Transformer Engine.
    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)

    # distributed/param_and_grad_buffer.py:285,443 exchange a step's gradients and weights, in place, also among
    # one rank. NCCL has nothing to do then; gloo copies all of them, three times over.
    import megatron.core.distributed.param_and_grad_buffer as buffers

    buffers.dist_all_gather_func = _alone_in_place(buffers.dist_all_gather_func)
    buffers.dist_reduce_scatter_func = _alone_in_place(buffers.dist_reduce_scatter_func)

    on_cpu = _TorchOnCpu()
    for name in _FILES_WITH_CUDA_LITERALS:
        importlib.import_module(f"megatron.core.{name}").torch = on_cpu  # type: ignore[attr-defined]
