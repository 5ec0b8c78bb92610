"""The stand-ins, in a process of their own: they are global and would outlive a test."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import run_distributed


def test_stand_ins() -> None:
    run_distributed(_stand_ins, 1)


def _stand_ins() -> None:
    import megatron.core.tensor_parallel  # noqa: F401 - imported before them, as after: the order does not matter

    from opsd_megatron.distributed.cpu import install_cpu_stand_ins

    install_cpu_stand_ins()
    _cuda_requests_land_on_the_cpu()
    _tensor_types_read_as_cuda_and_still_convert()
    _random_state_is_tracked_on_the_cpu_generator()
    _a_lone_rank_exchanges_nothing_with_itself()
    import megatron.core.optimizer.clip_grads as clip_grads

    seen, kind = clip_grads.torch, torch.Tensor.type
    install_cpu_stand_ins()
    assert clip_grads.torch is seen
    assert torch.Tensor.type is kind
    # What is not Megatron-Core's own is left alone, at no cost to the rest of the process.
    assert torch._C._len_torch_function_stack() == 0
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        torch.zeros(2, device="cuda")


def _cuda_requests_land_on_the_cpu() -> None:
    import megatron.core.dist_checkpointing.exchange_utils as exchange_utils

    seen = exchange_utils.torch  # type: ignore[attr-defined]
    for made in (
        seen.zeros(2, device="cuda"),
        seen.tensor([1.0], device=torch.device("cuda", 0)),
        torch.empty(2, device=torch.cuda.current_device()),
        seen.empty_like(torch.zeros(2), device="cuda:1"),
    ):
        assert made.device.type == "cpu"
    assert seen.zeros(2, device="meta").device.type == "meta"
    x = torch.zeros(2)
    assert x.cuda() is x
    torch.cuda.synchronize()
    assert not seen.tensor([1], pin_memory=True).is_pinned()


def _tensor_types_read_as_cuda_and_still_convert() -> None:
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


def _random_state_is_tracked_on_the_cpu_generator() -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    draws = []
    for _ in range(2):
        model_parallel_cuda_manual_seed(5, tp_rank=0, ep_rank=0, etp_rank=0)
        with get_cuda_rng_tracker().fork():
            inside = torch.rand(3)
        draws.append((inside, torch.rand(3)))
    assert torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(*draws[0])


def _a_lone_rank_exchanges_nothing_with_itself() -> None:
    import megatron.core.distributed.param_and_grad_buffer as buffers

    group = torch.distributed.group.WORLD
    for exchange in (buffers.dist_all_gather_func, buffers.dist_reduce_scatter_func):
        whole = torch.arange(4.0)
        version = whole._version
        exchange(whole, whole[:], group=group, async_op=False)
        assert whole._version == version
        elsewhere = torch.zeros(4)
        exchange(elsewhere, whole, group=group, async_op=False)
        assert torch.equal(elsewhere, whole)


def test_a_cuda_host_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from opsd_megatron.distributed.cpu import install_cpu_stand_ins

    before = (torch.cuda.current_device, torch.cuda.synchronize, torch.Tensor.cuda, torch.Tensor.type)
    depth = torch._C._len_torch_function_stack()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    install_cpu_stand_ins()
    assert before == (torch.cuda.current_device, torch.cuda.synchronize, torch.Tensor.cuda, torch.Tensor.type)
    assert torch._C._len_torch_function_stack() == depth


def test_unequal_parts_are_gathered_and_reduced() -> None:
    """Three rows of rank 0 and one of rank 1; each rank's rows are then summed over both, times rank + 1."""
    for gathered, reduced in run_distributed(_exchange_parts, 2, [3, 1]):
        assert gathered == [[0.0], [0.0], [0.0], [10.0]]
        assert reduced in ([[0.0]] * 3, [[30.0]])


@pytest.mark.parametrize("sizes", [[0, 0], [0, 2]])
def test_parts_may_be_empty(sizes: list[int]) -> None:
    """As where no token of any rank goes to the experts of these."""
    for gathered, reduced in run_distributed(_exchange_parts, 2, sizes):
        assert gathered == [[10.0]] * sum(sizes)
        assert reduced in ([], [[30.0]] * sizes[1])


def _exchange_parts(sizes: list[int]) -> tuple[list[list[float]], list[list[float]]]:
    import torch.distributed as dist
    from megatron.core.tensor_parallel import mappings

    from opsd_megatron.distributed.cpu import install_cpu_stand_ins

    install_cpu_stand_ins()
    rank, group = dist.get_rank(), dist.group.WORLD
    own = torch.full((sizes[rank], 1), 10.0 * rank)
    gathered = mappings._gather_along_first_dim(own, group, sizes)
    reduced = mappings._reduce_scatter_along_first_dim(gathered * (rank + 1), group, sizes)
    assert len(reduced) == len(own)
    return gathered.tolist(), reduced.tolist()
