"""Whether a batch fits, tried in a process of its own."""

from __future__ import annotations

import resource
from multiprocessing.connection import Connection

from pydantic import BaseModel

from bench.failure import classify
from bench.step import Step

STEPS = 2  # the first makes the optimizer's moments
# What cuDNN and cuBLAS say where they get no memory of their own. Of a batch of one it would mean something else.
NEAR_THE_LIMIT = ("unable to find an engine", "CUBLAS_STATUS_NOT_INITIALIZED")


class Request(BaseModel):
    method: str  # canonical expression
    step: Step
    batch_size: int
    cuda: bool
    limit: int | None = None  # bytes: of the allocator on a GPU, of the whole process on a CPU


class Answer(BaseModel):
    fits: bool
    peak: int | None = None  # bytes: allocated on a GPU, resident on a CPU
    seconds: float | None = None  # of the last step
    error: str = ""  # what failed, other than memory


def answer(request: Request) -> Answer:
    import torch

    from bench.measure import cuda
    from bench.measure.profile import (
        CPU_CLOCK,
        CUDA_CLOCK,
        resident_peak,
        seconds_of,
        settle,
        synthetic_batch,
        timed_step,
    )
    from bench.train.loop import Trainer
    from methods.registry import parse

    of = request.step
    try:
        (method,) = parse(request.method)  # every import before the limit
        if request.limit is not None:
            _limit(request.limit, request.cuda)
        cuda.set_up(of.precision)
        accelerator = cuda.accelerator(of.precision, request.cuda)
        trainer = Trainer(of.model(method), of.recipe, request.batch_size, STEPS, accelerator)
        batch = synthetic_batch(of.channels, of.image_size, request.batch_size, accelerator.device)
        clock = CUDA_CLOCK if request.cuda else CPU_CLOCK
        settle(trainer, batch)
        marks = timed_step(trainer, batch, STEPS - 1, clock)
        clock.wait()
    except Exception as error:
        status, failure = classify(error)
        near = request.cuda and request.batch_size > 1 and any(sign in str(error) for sign in NEAR_THE_LIMIT)
        memory = near or status == "out_of_memory"
        return Answer(fits=False, error="" if memory else f"{failure.kind}: {failure.message}")
    peak = torch.cuda.max_memory_allocated() if request.cuda else resident_peak()
    if request.limit is not None and peak > request.limit:  # the kernel counts private memory, not all that is resident
        return Answer(fits=False)
    return Answer(fits=True, peak=peak, seconds=seconds_of(marks, clock))


def _limit(size: int, cuda: bool) -> None:
    if cuda:
        import torch

        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def reply(request: Request, told: Connection) -> None:
    told.send(answer(request))
