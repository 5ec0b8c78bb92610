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


def memory_peaks() -> dict[str, float]:
    """What this process has used at most, as metrics; the same keys on every rank of a job.

    Returns:
        ``host_peak_gib``. With CUDA also ``allocator_peak_gib``, the most that PyTorch's allocator held on the current
        device since the last call (the co-located engine's share included; NCCL and the driver are not).
    """
    peaks = {"host_peak_gib": peak_host_gib()}
    if torch.cuda.is_available():
        peaks["allocator_peak_gib"] = torch.cuda.max_memory_allocated() / _GIB
        torch.cuda.reset_peak_memory_stats()
    return peaks


def current_device() -> dict[str, float]:
    """What :func:`~opsd_megatron.telemetry.nvml.device_report` finds on this process's device; empty without CUDA."""
    if not torch.cuda.is_available():
        return {}
    return device_report(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))
