"""Memory and time of full training steps on a synthetic batch: forward, losses, backward, clipping, optimizer step.

On CUDA, memory and time are separate passes: peaks of the allocator, then seconds by CUDA events. On a CPU the
seconds are wall-clock and the memory is the process's resident peak, imports and all; both are marked as CPU figures.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bench.recipe import Measure
from bench.record import Memory, Time
from bench.train.loop import PHASES, Trainer
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
    trainer: Trainer,
    batch: Mapping[str, Tensor],
    settings: Measure,
    report: Callable[[int, int], None],
    meanwhile: Callable[[], None] = lambda: None,
) -> tuple[Memory, Time]:
    """Run the steps and return the figures. This trains the model: measure on one that is thrown away afterwards.

    `meanwhile` is called after a last step has been queued, which a GPU is then still at.
    """
    if trainer.accelerator.device.type == "cuda":
        return _cuda_memory(trainer, batch), _time(trainer, batch, settings, report, meanwhile, CUDA_CLOCK)
    timing = _time(trainer, batch, settings, report, meanwhile, CPU_CLOCK)
    return Memory(device="cpu", process_peak=resident_peak()), timing


@dataclass(frozen=True)
class Clock:
    """How moments are taken, and what lies between two of them in seconds once all is done."""

    device: Literal["cpu", "cuda"]
    now: Callable[[], Any]
    between: Callable[[Any, Any], float]
    wait: Callable[[], None]


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


CPU_CLOCK = Clock("cpu", lambda: time.perf_counter(), lambda a, b: b - a, lambda: None)
CUDA_CLOCK = Clock("cuda", _event, lambda a, b: a.elapsed_time(b) / 1000, lambda: torch.cuda.synchronize())
Marks = list[tuple[str, Any]]


def timed_step(trainer: Trainer, batch: Mapping[str, Tensor], step: int, clock: Clock) -> Marks:
    """One step; the moments at its start, at the start of each phase and at its end."""
    marks: Marks = [("", clock.now())]
    trainer.phase = lambda name: marks.append((name, clock.now()))
    trainer.step(batch, step)
    marks.append(("", clock.now()))
    trainer.phase = lambda name: None
    return marks


def seconds_of(marks: Marks, clock: Clock) -> float:
    return clock.between(marks[0][1], marks[-1][1])


def seconds_by_phase(marks: Marks, clock: Clock) -> dict[str, float]:
    found = dict.fromkeys(PHASES, 0.0)
    for (name, start), (_, end) in pairwise(marks):
        if name in found:
            found[name] += clock.between(start, end)
    return found


def _time(
    trainer: Trainer,
    batch: Mapping[str, Tensor],
    settings: Measure,
    report: Callable[[int, int], None],
    meanwhile: Callable[[], None],
    clock: Clock,
) -> Time:
    total = settings.warmup + settings.steps
    steps = []
    for step in range(total):
        steps.append(timed_step(trainer, batch, step, clock))
        report(step + 1, total)
    queued = None
    if clock.device == "cuda":
        queued = _seconds(clock.wait) if trainer.accelerator.scaler is None else None  # which waits in every step
        trainer.step(batch, total - 1)
    meanwhile()
    clock.wait()
    measured = steps[settings.warmup :]
    by_phase = [seconds_by_phase(marks, clock) for marks in measured]
    return Time(
        device=clock.device,
        warmup=settings.warmup,
        samples=[seconds_of(marks, clock) for marks in measured],
        batch_size=batch["image"].shape[0],
        phases={phase: [each[phase] for each in by_phase] for phase in PHASES},
        queued=queued,
    )


def _seconds(wait: Callable[[], None]) -> float:
    started = time.perf_counter()
    wait()
    return time.perf_counter() - started


def floor_seconds(backbone: nn.Module, image: Tensor, accelerator: Accelerator, repeats: int) -> list[float]:
    """The forward of the frozen backbone alone, in evaluation mode and without gradients, after two unmeasured ones."""
    clock = CUDA_CLOCK if image.device.type == "cuda" else CPU_CLOCK
    backbone.to(image.device).eval().requires_grad_(False)
    marks = []
    for _ in range(repeats + 2):
        start = clock.now()
        with torch.no_grad(), accelerator.autocast():  # left each time, so that no cast of a weight is kept
            backbone(image)
        marks.append((start, clock.now()))
    clock.wait()
    return [clock.between(start, end) for start, end in marks[2:]]


def predict(trainer: Trainer, batch: Mapping[str, Tensor]) -> None:
    """A batch as evaluation runs it; the optimizer's state and the last gradients are still there."""
    trainer.model.eval()
    with torch.no_grad():
        trainer.model(batch["image"])
    trainer.model.train()


def matmul_rate(accelerator: Accelerator, repeats: int = 5) -> float:
    """Operations a second of a large matrix product in the precision of the run: what the device can reach."""
    device = accelerator.device
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.rand(side, side, device=device) for _ in range(2))
    clock = CUDA_CLOCK if device.type == "cuda" else CPU_CLOCK
    marks = []
    with torch.no_grad(), accelerator.autocast():
        if torch.is_autocast_enabled(device.type):  # the casts are no part of it
            a, b = (x.to(torch.get_autocast_dtype(device.type)) for x in (a, b))
        for _ in range(repeats + 1):
            start = clock.now()
            a @ b
            marks.append((start, clock.now()))
    clock.wait()
    return 2 * side**3 / min(clock.between(start, end) for start, end in marks[1:])


def _cuda_memory(trainer: Trainer, batch: Mapping[str, Tensor]) -> Memory:
    """Peaks of two steps after one that has made the optimizer allocate its moments."""
    torch.cuda.synchronize()
    weights = torch.cuda.memory_allocated() - sum(x.numel() * x.element_size() for x in batch.values())
    settle(trainer, batch)
    peaks: dict[str, int] = {}
    current = ""

    def enter(phase: str) -> None:
        nonlocal current
        peaks[current] = max(peaks.get(current, 0), torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        current = phase

    torch.cuda.reset_peak_memory_stats()
    trainer.phase = enter
    for step in range(2):
        trainer.step(batch, step)
    enter("")
    trainer.phase = lambda name: None
    reserved = torch.cuda.memory_reserved()  # nothing is given back between the steps
    predict(trainer, batch)
    torch.cuda.synchronize()
    evaluation = torch.cuda.max_memory_allocated()
    return Memory(
        device="cuda",
        evaluation=evaluation,
        weights_allocated=weights,
        peak_allocated=max(peaks.values()),
        peak_reserved=reserved,
        process_peak=resident_peak(),
        phases={phase: peaks[phase] for phase in PHASES},
    )


def settle(trainer: Trainer, batch: Mapping[str, Tensor]) -> None:
    """Step until the optimizer has stepped: fp16's loss scale starts too high, and its first steps are skipped."""
    for step in range(30):
        trainer.step(batch, step)
        if not trainer.optimizer.step_was_skipped:
            return
    raise RuntimeError("no optimizer step was taken in 30 steps: every gradient overflowed in fp16")


def resident_peak() -> int:
    """Largest resident set of this process so far, in bytes."""
    if sys.platform.startswith("linux"):  # there getrusage begins with the peak of the process that started this one
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
