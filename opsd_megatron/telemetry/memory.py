"""Memory of this process and of its device, for the metrics."""

from __future__ import annotations

import resource
import sys

import torch

from opsd_megatron.telemetry.nvml import device_report

_GIB = 2**30


def peak_host_gib() -> float:
    """Largest resident set of this process so far, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # Linux reports KiB, macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB


def memory_report() -> dict[str, float]:
    """What this process uses, as metrics.

    Returns:
        ``host_peak_gib``. With CUDA also ``allocator_peak_gib``, the most that PyTorch's allocator held on the current
        device since the last call (the co-located engine's share included; NCCL and the driver are not), and what
        :func:`~opsd_megatron.telemetry.nvml.device_report` finds.
    """
    report = {"host_peak_gib": peak_host_gib()}
    if torch.cuda.is_available():
        report["allocator_peak_gib"] = torch.cuda.max_memory_allocated() / _GIB
        torch.cuda.reset_peak_memory_stats()
        report |= device_report(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))
    return report
