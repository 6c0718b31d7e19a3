"""How a GPU is doing while it is measured, by NVML: clocks, temperature, power, throttling, who else is on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from bench.errors import BenchError
from bench.record import GPUState

# What slows a GPU down, by NVML's bits (nvml.h, nvmlClocksEventReason...). Idling and set clocks are no slowdown.
THROTTLING = {
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


def read(uuid: str) -> GPUState | None:
    """The state of the GPU of this UUID (as torch gives it); None where NVML does not answer, and for each figure that
    it does not tell."""
    import pynvml as nvml

    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(_full(uuid))
    except nvml.NVMLError:
        return None

    def ask(question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return question(handle, *arguments)
        except nvml.NVMLError:
            return None

    power, reasons = ask(nvml.nvmlDeviceGetPowerUsage), ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
    processes = ask(nvml.nvmlDeviceGetComputeRunningProcesses) or []
    own = [process for process in processes if process.pid == os.getpid()]
    return GPUState(
        temperature=ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        watts=None if power is None else power / 1000,
        clock=ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        clock_limit=ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
        memory_clock=ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
        throttled=[name for bit, name in THROTTLING.items() if (reasons or 0) & bit],
        process_bytes=own[0].usedGpuMemory if own else None,
        others=len(processes) - len(own),
    )


def refuse_company(uuid: str, name: str) -> None:
    """Raise BenchError where another process computes on the GPU: what it does would be measured too."""
    state = read(uuid)
    if state is not None and state.others:
        count = f"{state.others} other processes" if state.others > 1 else "another process"
        raise BenchError(
            f"{count} on {name}: its memory and time would be measured too; wait, choose another GPU with "
            "--device cuda:N, or allow it with --shared-gpu (the records say so)"
        )


def _full(uuid: str) -> str:
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
