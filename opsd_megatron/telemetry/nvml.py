"""A device as the driver sees it, through NVML (package nvidia-ml-py, module ``pynvml``)."""

from __future__ import annotations

import importlib

_GIB = 2**30


def device_report(uuid: str) -> dict[str, float]:
    """Memory and utilisation of one GPU; empty where NVML has nothing to say: telemetry never stops a run.

    Args:
        uuid: The device's UUID, with or without its ``GPU-`` prefix. An index would not do: CUDA's numbering follows
            ``CUDA_VISIBLE_DEVICES``, NVML's does not.

    Returns:
        ``device_used_gib`` and ``device_total_gib`` (the whole device, all processes) and ``device_utilization``, the
        share of the driver's last sampling period (up to a second) in which a kernel ran. A value the driver does not
        offer (utilisation under MIG, say) is left out.
    """
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # no package, no driver, no permission: all mean that there is nothing to report
        return {}
    report: dict[str, float] = {}
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        report |= {"device_used_gib": memory.used / _GIB, "device_total_gib": memory.total / _GIB}
        report["device_utilization"] = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    except nvml.NVMLError:
        pass  # what was read before stands
    finally:
        nvml.nvmlShutdown()
    return report
