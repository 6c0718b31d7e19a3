"""Memory and time of full training steps on a synthetic batch: forward, losses, backward, clipping, optimizer step.

On CUDA, memory and time are separate passes: peaks of the allocator, then seconds by CUDA events. On a CPU the
seconds are wall-clock and the memory is the process's resident peak, imports and all; both are marked as CPU figures.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bench.recipe import Measure
from bench.record import Memory, Time
from bench.train.loop import Trainer
from bench.train.losses import synthetic_label


def synthetic_batch(
    channels: Mapping[str, int], size: tuple[int, int], batch_size: int, device: torch.device
) -> dict[str, Tensor]:
    """Random images and labels of every task, (height, width) = size."""
    generator = torch.Generator().manual_seed(0)
    batch = {"image": torch.rand(batch_size, 3, *size, generator=generator)}
    batch |= {task: synthetic_label(task, n, (batch_size, *size), generator) for task, n in channels.items()}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def measure(
    trainer: Trainer, batch: Mapping[str, Tensor], settings: Measure, report: Callable[[int, int], None]
) -> tuple[Memory, Time]:
    """Run the steps and return the figures. This trains the model: measure on one that is thrown away afterwards."""
    if trainer.accelerator.device.type == "cuda":
        return _cuda_memory(trainer, batch), _cuda_time(trainer, batch, settings, report)
    seconds = _cpu_seconds(trainer, batch, settings, report)
    batch_size = batch["image"].shape[0]
    return (
        Memory(device="cpu", process_peak=resident_peak()),
        Time(device="cpu", warmup=settings.warmup, samples=seconds, batch_size=batch_size),
    )


def _cuda_memory(trainer: Trainer, batch: Mapping[str, Tensor]) -> Memory:
    """Peaks of two steps after one that has made the optimizer allocate its moments."""
    torch.cuda.synchronize()
    weights = torch.cuda.memory_allocated() - sum(x.numel() * x.element_size() for x in batch.values())
    _settle(trainer, batch)
    torch.cuda.reset_peak_memory_stats()
    for step in range(2):
        trainer.step(batch, step)
    torch.cuda.synchronize()
    return Memory(
        device="cuda",
        weights_allocated=weights,
        peak_allocated=torch.cuda.max_memory_allocated(),
        peak_reserved=torch.cuda.max_memory_reserved(),
        process_peak=resident_peak(),
    )


def _settle(trainer: Trainer, batch: Mapping[str, Tensor]) -> None:
    """Step until the optimizer has stepped: fp16's loss scale starts too high, and its first steps are skipped."""
    for step in range(30):
        trainer.step(batch, step)
        if not trainer.optimizer.step_was_skipped:
            return
    raise RuntimeError("no optimizer step was taken in 30 steps: every gradient overflowed in fp16")


def _cuda_time(
    trainer: Trainer, batch: Mapping[str, Tensor], settings: Measure, report: Callable[[int, int], None]
) -> Time:
    total = settings.warmup + settings.steps
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(total + 1)]
    marks[0].record()
    for step in range(total):
        trainer.step(batch, step)
        marks[step + 1].record()
        report(step + 1, total)
    torch.cuda.synchronize()
    seconds = [before.elapsed_time(after) / 1000 for before, after in zip(marks, marks[1:], strict=False)]
    return Time(
        device="cuda", warmup=settings.warmup, samples=seconds[settings.warmup :], batch_size=batch["image"].shape[0]
    )


def _cpu_seconds(
    trainer: Trainer, batch: Mapping[str, Tensor], settings: Measure, report: Callable[[int, int], None]
) -> list[float]:
    seconds = []
    for step in range(settings.warmup + settings.steps):
        started = time.perf_counter()
        trainer.step(batch, step)
        seconds.append(time.perf_counter() - started)
        report(step + 1, settings.warmup + settings.steps)
    return seconds[settings.warmup :]


def resident_peak() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
