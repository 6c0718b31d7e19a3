"""Memory and operations of a training step without a GPU: it runs on fake tensors, which have shapes and no values.

What is counted is live tensors, in blocks of 512 bytes as CUDA's allocator gives them. What is not: workspaces inside
kernels, fragmentation, the CUDA context.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from bench.errors import BenchError
from bench.measure.cuda_like import LikeCUDA
from bench.measure.live import LiveBytes
from bench.measure.profile import predict, synthetic_batch
from bench.recipe import Recipe
from bench.spec import Precision
from bench.train.loop import PHASES, Trainer
from methods.model import MultiTaskModel
from methods.registry import MethodError, described, place

CUDA_GRANULE = 512  # bytes
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Estimate:
    """Bytes and operations of one training step at `batch_size`.

    phases    peak while the step was in each of PHASES
    holders   who held the bytes of the highest peak, the most first: a module's path, "weights" for parameters,
              buffers and the batch, "" for what is made outside the model (losses, gradients, optimizer)
    evaluation          peak while the predictions of a batch are made, next to what training keeps
    forward, backward   floating-point operations (a multiply-add is two); losses and optimizer have none that count
    """

    batch_size: int
    trainable: int
    weights: int
    peak: int
    phases: dict[str, int]
    forward: int
    backward: int
    evaluation: int = 0
    holders: dict[str, int] = field(default_factory=dict)


class _FakeBytes(LiveBytes):
    """Fake tensors have no values: a step counter of the optimizer reads as 1, anything else is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if (
            self._phase == "optimizer"
            and func is torch.ops.aten._local_scalar_dense.default
            and isinstance(args[0], FakeTensor)
        ):
            return 1.0
        return super().__torch_dispatch__(func, types, args, kwargs)


def estimate(
    build: Callable[[], MultiTaskModel],
    size: tuple[int, int],
    recipe: Recipe,
    batch_size: int,
    precision: Precision = "fp32",
    cuda: bool = True,
    losses_together: bool = False,
) -> Estimate:
    """The second of two steps (the first makes the optimizer's moments) of the model that `build` gives, for images of
    (height, width) = size. `cuda=False`: as a CPU would run it; `losses_together` as in Trainer.

    Raises BenchError naming an operator whose result depends on values, or that has no rule for shapes alone.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # a method may hold a tensor that is no parameter and no buffer
    try:
        model = fake_model(build, mode)
        with mode:
            trainer = Trainer(model, recipe, batch_size, 2, _NoAccelerator())
            trainer.losses_together = losses_together
            batch = synthetic_batch(model.tasks, size, batch_size, torch.device("cpu"))
            with _quiet(), _as_on_cuda(trainer, AUTOCAST.get(precision)) if cuda else nullcontext():
                return step_bytes(trainer, batch, _FakeBytes(CUDA_GRANULE if cuda else 1))
    except MethodError:
        raise
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        read = error.func is torch.ops.aten._local_scalar_dense.default
        why = ": the method reads a tensor's value, as .item() does" if read else ""
        raise BenchError(f"no estimate: {error.func} has no result without values{why}{place(error)}") from error
    except Exception as error:  # whatever else a method does that shapes alone cannot answer
        raise BenchError(f"no estimate: {described(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own log of an operator that failed: the exception says it all."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class _NoAccelerator:
    """What Trainer uses of accelerate, without its state: that is the process's own, and a cell that is estimated first
    must still find its GPU and its precision."""

    device, scaler = torch.device("cpu"), None

    def prepare(self, *objects: Any) -> tuple[Any, ...]:
        return objects

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def unscale_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        pass


def step_bytes(trainer: Trainer, batch: Mapping[str, Tensor], live: LiveBytes) -> Estimate:
    """Run two steps under `live` and sum up the second."""
    model = trainer.plain_model
    with live, live.watching(model):
        live.hold([*model.parameters(), *model.buffers()])
        weights = live.live
        live.hold(batch.values())
        trainer.phase = live.phase
        trainer.step(batch, 0)
        live.restart()
        trainer.step(batch, 1)
        step, holders = (live.peak, dict(live.peaks), live.flops), dict(live.holders.most_common())
        live.restart()
        predict(trainer, batch)
    peak, peaks, flops = step
    return Estimate(
        batch_size=batch["image"].shape[0],
        trainable=model.ledger().trainable,
        weights=weights,
        peak=peak,
        phases={phase: peaks[phase] for phase in PHASES},
        forward=flops["forward"],
        backward=flops["backward"],
        evaluation=live.peak,
        holders=holders,
    )


def fake_model(build: Callable[[], MultiTaskModel], mode: FakeTensorMode) -> MultiTaskModel:
    """The model, built on the meta device, with every tensor as a fake one on the CPU; what is shared stays so."""
    with torch.device("meta"):
        model = build()
    storages: dict[tuple, Tensor] = {}
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def fake(old: Tensor) -> Tensor:
        if id(old) not in made:
            place = (old.untyped_storage()._cdata, old.storage_offset(), tuple(old.shape), old.stride())
            with mode:
                if place not in storages:
                    storages[place] = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device="cpu")
                new = storages[place]
                new = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
            made[id(old)] = (old, new)  # the old one too: an id is its own only while it lives
        return made[id(old)][1]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})
    return model


@contextmanager
def _as_on_cuda(trainer: Trainer, dtype: torch.dtype | None) -> Iterator[None]:
    """CUDA's rules for forward and what of it is recomputed in backward; the optimizer takes all tensors at once."""
    forward, cuda = trainer.model.forward, LikeCUDA(dtype)

    def in_float32(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        logits = forward(*args, **kwargs)
        cuda.forget_casts()  # autocast ends with the forward
        return {task: out.float() for task, out in logits.items()}  # as accelerate does

    trainer.model.forward = in_float32
    for group in trainer.optimizer.param_groups:
        group["foreach"] = True
    with cuda:
        yield


def largest_batch(measure: Callable[[int], int], limit: int, start: int = 8, most: int = 4096) -> int:
    """The largest batch whose peak `measure(batch)` is at most `limit` bytes; 0 where one image does not fit.

    Peaks lie nearly on a straight line, so the search interpolates, and bisects where that does not get far.
    """
    peaks = {1: measure(1)}
    if peaks[1] > limit:
        return 0
    low, high = 1, max(most, start) + 1  # one that fits, one that does not
    probe = max(start, 2)
    for turn in itertools.count(1):
        peaks[probe] = measure(probe)
        low, high = (probe, high) if peaks[probe] <= limit else (low, probe)
        if high - low == 1:
            return low
        other = high if high in peaks else max((n for n in peaks if n < low), default=1)
        slope = (peaks[other] - peaks[low]) / (other - low) if other != low else 0
        guess = low + int((limit - peaks[low]) / slope) if slope > 0 else most
        # A batch past the guess closes in from above where nothing has been too large yet.
        guess = (low + high) // 2 if turn % 4 == 0 else guess if high in peaks else guess + 1
        probe = min(max(guess, low + 1), high - 1)
