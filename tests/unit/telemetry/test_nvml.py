from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from opsd_megatron.telemetry.memory import current_device, memory_peaks, peak_host_gib
from opsd_megatron.telemetry.nvml import device_report

UUID = "12345678-aaaa-bbbb-cccc-1234567890ab"
WHOLE = {"device_used_gib": 3.0, "device_total_gib": 80.0, "device_utilization": 0.25}


class NVMLError(Exception):
    pass


class FakeNvml(ModuleType):
    """Stands in for ``pynvml``: one device; the calls named in ``broken`` fail as the driver does."""

    NVMLError = NVMLError

    def __init__(self, *broken: str) -> None:
        super().__init__("pynvml")
        self.broken = broken
        self.open = 0

    def _call(self, name: str) -> None:
        if name in self.broken:
            raise NVMLError(name)

    def nvmlInit(self) -> None:
        self._call("nvmlInit")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self._call("nvmlDeviceGetHandleByUUID")
        if uuid != f"GPU-{UUID}":
            raise NVMLError("not found")
        return "handle"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        self._call("nvmlDeviceGetMemoryInfo")
        assert handle == "handle"
        return SimpleNamespace(used=3 * 2**30, total=80 * 2**30)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        self._call("nvmlDeviceGetUtilizationRates")
        assert handle == "handle"
        return SimpleNamespace(gpu=25, memory=10)


def install(monkeypatch: pytest.MonkeyPatch, *broken: str) -> FakeNvml:
    nvml = FakeNvml(*broken)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


@pytest.mark.parametrize("uuid", [UUID, f"GPU-{UUID}"])
def test_the_device_is_found_by_uuid(monkeypatch: pytest.MonkeyPatch, uuid: str) -> None:
    nvml = install(monkeypatch)
    assert device_report(uuid) == WHOLE
    assert nvml.open == 0


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ("nvmlInit", {}),
        ("nvmlDeviceGetHandleByUUID", {}),
        ("nvmlDeviceGetMemoryInfo", {}),
        ("nvmlDeviceGetUtilizationRates", {"device_used_gib": 3.0, "device_total_gib": 80.0}),
    ],
)
def test_what_the_driver_refuses_is_left_out(
    monkeypatch: pytest.MonkeyPatch, broken: str, expected: dict[str, float]
) -> None:
    nvml = install(monkeypatch, broken)
    assert device_report(UUID) == expected
    assert nvml.open == 0


def test_without_the_package_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it raises ImportError
    assert device_report(UUID) == {}


def test_without_cuda_the_report_is_the_host_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    install(monkeypatch, "nvmlInit")
    assert list(memory_peaks()) == ["host_peak_gib"] and current_device() == {}


def test_with_cuda_the_report_holds_allocator_and_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = [2 * 2**30]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peaks[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peaks.__setitem__(0, 2**30))
    devices = {1: SimpleNamespace(uuid=UUID)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: devices[index])
    install(monkeypatch)
    first, second = memory_peaks(), memory_peaks()
    assert first == {"host_peak_gib": first["host_peak_gib"], "allocator_peak_gib": 2.0}
    assert current_device() == WHOLE
    assert second["allocator_peak_gib"] == 1.0  # since the last report


def test_host_peak_is_the_kernel_s_and_never_falls() -> None:
    # VmHWM is the same figure by another way.
    before = peak_host_gib()
    with open("/proc/self/status") as status:
        high_water = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**20
    assert before <= high_water * 1.01 + 0.01 and high_water <= peak_host_gib() * 1.01 + 0.01
