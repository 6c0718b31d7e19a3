"""Where the time of a training step goes, by torch's own profiler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

UNNAMED = "kernels of no operator"


@dataclass(frozen=True)
class Operator:
    """`seconds` of its own, without the operators that it calls: on a GPU of its kernels, on a CPU of the processor."""

    name: str  # as torch calls it, e.g. mm, native_layer_norm
    calls: int
    seconds: float


def operators(step: Callable[[], None], cuda: bool) -> list[Operator]:
    """Every operator of one step, the most expensive first.

    On a GPU kernels run one after the other, so that their sum is how long it was busy. The profiler slows the host
    down: what the host needs is told by steps without it.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiled:
        step()
        if cuda:
            torch.cuda.synchronize()
    events = [event for event in profiled.key_averages() if not event.is_user_annotation]
    called = [event for event in events if event.device_type == DeviceType.CPU]
    found = [
        Operator(
            event.key.removeprefix("aten::"),
            event.count,
            (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6,
        )
        for event in called
    ]
    kernels = sum(event.self_device_time_total for event in events if event.device_type == DeviceType.CUDA) / 1e6
    unnamed = kernels - sum(each.seconds for each in found)
    if cuda and unnamed > 0:
        found.append(Operator(UNNAMED, 0, unnamed))
    return sorted((each for each in found if each.seconds > 0), key=lambda each: -each.seconds)
