"""What NVML says of a GPU, with NVML's answers made up: which end up where, and what is refused."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from bench import device, grid
from bench.errors import BenchError
from bench.measure import gpu_state


class NVMLError(Exception):
    pass


def nvml(processes=(), reasons=0, missing=()):
    """A module that answers for GPU-abc alone."""

    def handle(uuid):
        if uuid != "GPU-abc":
            raise NVMLError
        return "handle"

    def answer(name, value):
        def ask(given, *arguments):
            assert given == "handle"
            if name in missing:
                raise NVMLError
            return value(*arguments) if callable(value) else value

        return ask

    answers = {
        "nvmlDeviceGetPowerUsage": 345_600,
        "nvmlDeviceGetCurrentClocksThrottleReasons": reasons,
        "nvmlDeviceGetComputeRunningProcesses": list(processes),
        "nvmlDeviceGetTemperature": lambda sensor: {0: 61}[sensor],
        "nvmlDeviceGetClockInfo": lambda clock: {1: 1755, 2: 3201}[clock],
        "nvmlDeviceGetMaxClockInfo": lambda clock: {1: 1980}[clock],
    }
    return SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=handle,
        NVML_TEMPERATURE_GPU=0, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2,
        **{name: answer(name, value) for name, value in answers.items()},
    )  # fmt: skip


def process(pid, used=1):
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


def test_the_constants_are_nvmls_own():
    import pynvml

    fake = nvml()
    for name in ("NVML_TEMPERATURE_GPU", "NVML_CLOCK_SM", "NVML_CLOCK_MEM"):
        assert getattr(fake, name) == getattr(pynvml, name)
    assert all(hasattr(pynvml, name) for name in vars(fake))
    theirs = {
        pynvml.nvmlClocksThrottleReasonSwPowerCap, pynvml.nvmlClocksThrottleReasonHwSlowdown,
        pynvml.nvmlClocksThrottleReasonSwThermalSlowdown, pynvml.nvmlClocksThrottleReasonHwThermalSlowdown,
        pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
    }  # fmt: skip
    assert set(gpu_state.THROTTLING) == theirs


def test_a_state_in_full(monkeypatch):
    own, other = process(os.getpid(), 7 * 2**30), process(1)
    monkeypatch.setitem(sys.modules, "pynvml", nvml([own, other], reasons=0x1 | 0x4 | 0x40))
    state = gpu_state.read("abc")
    assert state == gpu_state.read("GPU-abc")
    assert (state.temperature, state.watts, state.clock, state.clock_limit, state.memory_clock) == (
        61, 345.6, 1755, 1980, 3201,
    )  # fmt: skip
    assert state.throttled == ["software power cap", "hardware thermal slowdown"]  # idling (1) is none
    assert state.process_bytes == 7 * 2**30 and state.others == 1


def test_what_a_gpu_does_not_tell_is_none(monkeypatch):
    missing = ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetClockInfo")
    monkeypatch.setitem(sys.modules, "pynvml", nvml(missing=missing))
    state = gpu_state.read("abc")
    assert state.watts is state.clock is state.process_bytes is None and state.temperature == 61 and not state.others
    assert gpu_state.read("other") is None


def test_company_is_refused_unless_allowed(monkeypatch):
    monkeypatch.setattr(device, "_cuda_devices", lambda: [{"name": "NVIDIA Test", "major": 9, "uuid": "abc"}])
    given = {"methods": "ours", "weights": "random", "image_size": "64", "recipe": "smoke", "steps": 0}

    def jobs(**how):
        return grid.jobs(None, given, None, "cuda", None, grid.Path("runs"), **how)

    monkeypatch.setitem(sys.modules, "pynvml", nvml([process(1), process(2)]))
    with pytest.raises(BenchError, match="2 other processes on NVIDIA Test.*--shared-gpu"):
        jobs(shared_gpu=False)
    assert len(jobs(shared_gpu=True)) == 1
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    assert len(jobs(shared_gpu=False)) == 1
