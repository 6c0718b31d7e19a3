"""Whether a batch fits, tried in a process of its own: `python -m bench.measure.probe < request.json`.

The answer is one JSON object on standard output, an Answer.
"""

from __future__ import annotations

import os
import resource
import sys
import time

from pydantic import BaseModel

from bench.failure import classify
from bench.recipe import Recipe
from bench.spec import MemoryUse, Precision, Protocol

STEPS = 2  # the first makes the optimizer's moments


class Request(BaseModel):
    method: str  # canonical expression
    backbone: str  # full timm name
    image_size: tuple[int, int]
    channels: dict[str, int]
    protocol: Protocol
    memory: MemoryUse
    precision: Precision
    recipe: Recipe
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
    from accelerate import Accelerator

    from bench.measure.models import random_model
    from bench.measure.profile import resident_peak, settle, synthetic_batch
    from bench.train.loop import Trainer
    from methods.registry import parse

    try:
        (method,) = parse(request.method)  # every import before the limit
        if request.limit is not None:
            _limit(request.limit, request.cuda)
        mixed = request.precision if request.precision in ("bf16", "fp16") else "no"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = request.precision == "tf32"
        accelerator = Accelerator(mixed_precision=mixed, cpu=not request.cuda)
        model = random_model(
            method, request.backbone, request.image_size, request.channels, request.protocol, request.memory
        )
        trainer = Trainer(model, request.recipe, request.batch_size, STEPS, accelerator)
        batch = synthetic_batch(request.channels, request.image_size, request.batch_size, accelerator.device)
        settle(trainer, batch)
        start = time.perf_counter()
        trainer.step(batch, STEPS - 1)
        if request.cuda:
            torch.cuda.synchronize()
    except Exception as error:
        status, failure = classify(error)
        return Answer(fits=False, error="" if status == "out_of_memory" else f"{failure.kind}: {failure.message}")
    peak = torch.cuda.max_memory_allocated() if request.cuda else resident_peak()
    if request.limit is not None and peak > request.limit:  # the kernel counts private memory, not all that is resident
        return Answer(fits=False)
    return Answer(fits=True, peak=peak, seconds=time.perf_counter() - start)


def _limit(size: int, cuda: bool) -> None:
    if cuda:
        import torch

        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def main() -> None:
    request = Request.model_validate_json(sys.stdin.read())
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    print(answer(request).model_dump_json(), file=channel, flush=True)


if __name__ == "__main__":
    main()
