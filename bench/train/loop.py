"""The one training loop, for every method."""

from __future__ import annotations

import itertools
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.data.loader import DenseDataset, training_batches
from bench.errors import BenchError
from bench.files import replacing
from bench.recipe import Recipe, Schedule
from bench.train.losses import LOSSES
from methods.model import MultiTaskModel, upsample_logits

CHECK_EVERY = 50  # steps: reading a loss makes the GPU wait, so not each one


class DivergedError(RuntimeError):
    """A loss became NaN or infinite."""


def learning_rate(schedule: Schedule, step: int, total: int) -> float:
    """The factor on the base rate at `step` of `total` (from 0): linear warm-up, then the schedule's own decay."""
    warmup = schedule.warmup * total
    if step < warmup:
        return schedule.warmup_start + (1 - schedule.warmup_start) * step / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)  # a loss scale may settle beyond the end
    if schedule.name == "constant":
        return 1.0
    remaining = {
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "poly": (1 - progress) ** schedule.power,
    }[schedule.name]
    return schedule.final + (1 - schedule.final) * remaining


def make_optimizer(model: MultiTaskModel, recipe: Recipe, batch_size: int) -> torch.optim.Optimizer:
    """Over the trainable parameters alone: frozen ones get neither state nor decay. What learns at the recipe's own
    rate, the decoder at least, comes first, so that the first group's rate is that."""
    settings = recipe.optimizer
    lr = settings.lr * (batch_size / settings.base_batch_size if settings.base_batch_size else 1)
    factors = {"decoder": 1.0, "adaptation": settings.adaptation_factor, "backbone": settings.adaptation_factor}
    if model.trains_whole_backbone():
        factors["backbone"] = model.backbone_factor or settings.backbone_factor
    roles = model.roles()
    found: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            factor = factors[roles[name]]
            exempt = p.dim() <= 1 and not settings.decay_one_dimensional
            found.setdefault((factor != 1, factor, exempt), []).append(p)
    groups = [
        {"params": parameters, "lr": lr * factor, "weight_decay": 0.0 if exempt else settings.weight_decay}
        for (_, factor, exempt), parameters in sorted(found.items(), key=lambda item: item[0])
    ]
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=settings.momentum)
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=lr, betas=settings.betas)


PHASES = ("forward", "loss", "backward", "optimizer")  # loss: upsampling, losses and their backward to the logits


class Trainer:
    """A model, its optimizer and one optimization step."""

    def __init__(
        self, model: MultiTaskModel, recipe: Recipe, batch_size: int, total_steps: int, accelerator: Accelerator
    ) -> None:
        self.recipe, self.total_steps, self.accelerator = recipe, total_steps, accelerator
        self.plain_model = model
        self.model, self.optimizer = accelerator.prepare(model, make_optimizer(model, recipe, batch_size))
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.clip_groups = model.clip_groups()
        self.losses_together = False  # the plain way, for comparison: all full-resolution logits at once
        self.phase: Callable[[str], None] = lambda name: None  # called as a step enters each of PHASES
        self.model.train()

    def step(self, batch: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """Forward, losses, backward, clipping, optimizer step. Returns each task's unweighted loss, detached.

        Upsampling, loss and their backward go one task at a time from the decoder's own resolution, and the
        backward of the model then starts from the collected gradients: the same gradients, without the
        full-resolution logits of all tasks in memory at once.
        """
        self.phase("forward")
        factor = learning_rate(self.recipe.schedule, step, self.total_steps)
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * factor
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._backward_at_once(batch) if self.losses_together else self._backward(batch)
        self.phase("optimizer")
        if self.recipe.clip_norm is not None:
            self.accelerator.unscale_gradients(self.optimizer)
            for group in self.clip_groups:
                nn.utils.clip_grad_norm_(group, self.recipe.clip_norm)
        self.optimizer.step()
        self.phase("")
        return losses

    def _backward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits = self.model(batch["image"], upsample=False)
        losses, leaves = {}, []
        self.phase("loss")
        for task, out in logits.items():
            leaf = out.detach().requires_grad_()
            loss = LOSSES[task](upsample_logits(leaf, batch["image"].shape[-2:]), batch[task])
            self.accelerator.backward(self.recipe.loss_weights[task] * loss)
            losses[task] = loss.detach()
            leaves.append(leaf)
        self.phase("backward")
        torch.autograd.backward(list(logits.values()), [leaf.grad for leaf in leaves])
        return losses

    def _backward_at_once(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = self.model(batch["image"])
        self.phase("loss")
        losses = {task: LOSSES[task](out, batch[task]) for task, out in outputs.items()}
        self.phase("backward")
        self.accelerator.backward(sum(self.recipe.loss_weights[task] * loss for task, loss in losses.items()))
        return {task: loss.detach() for task, loss in losses.items()}

    def total_loss(self, losses: Mapping[str, Tensor]) -> float:
        return sum(self.recipe.loss_weights[task] * loss.item() for task, loss in losses.items())


def losses_by_batch(trainer: Trainer, dataset: DenseDataset, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Unweighted losses with their graph, one training batch after the other without end; in evaluation mode, so that
    nothing changes. Under fp16 they are scaled, all alike: small gradients would vanish."""
    scaler = trainer.accelerator.scaler
    scale = scaler.get_scale() if scaler is not None else 1.0
    trainer.model.eval()
    try:
        for batch in training_batches(dataset, batch_size, 0, sys.maxsize, workers=0, pin=False):
            batch = to_device(batch, trainer.accelerator.device)
            outputs = trainer.model(batch["image"])
            losses = {task: scale * LOSSES[task](out, batch[task]) for task, out in outputs.items()}
            del batch, outputs
            yield losses
            del losses  # and with it the graph, before the next one is made
    finally:
        trainer.model.train()


def gradient_cosines(trainer: Trainer, batch: Mapping[str, Tensor]) -> dict[tuple[str, str], float]:
    """Cosine of every two tasks' gradients on the parameters that tasks share (VMT-Adapter, eq. 8); empty where they
    share none, and without a task that the batch has no label of. In evaluation mode: neither weights, running
    statistics nor random numbers change."""
    model = trainer.plain_model
    owners = model.owners()
    shared = [p for name, p in model.named_parameters() if p.requires_grad and owners[name] is None]
    if not shared:
        return {}
    scaler = trainer.accelerator.scaler
    scale = scaler.get_scale() if scaler is not None else 1.0  # under fp16 small gradients would vanish
    trainer.model.eval()
    outputs = trainer.model(batch["image"])
    flat = {}
    for task, out in outputs.items():
        loss = scale * LOSSES[task](out, batch[task])
        found = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
        flat[task] = torch.cat(
            [(torch.zeros_like(p) if g is None else g).flatten().double() for g, p in zip(found, shared, strict=True)]
        )
    trainer.model.train()
    # A task without a label in the batch has no direction, nor has one whose gradient overflowed.
    norms = {task: gradient.norm() for task, gradient in flat.items()}
    told = [task for task, norm in norms.items() if norm > 0 and norm.isfinite()]
    return {(a, b): (flat[a] @ flat[b] / (norms[a] * norms[b])).item() for a, b in itertools.combinations(told, 2)}


@dataclass
class Progress:
    """What a training run has to show so far; part of its checkpoint."""

    step: int = 0
    loader_wait: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    cosines: dict[str, list[float]] = field(default_factory=dict)  # "task,task" -> one a probe
    commits: list[str] = field(default_factory=list)  # of the code that trained, one after the other
    codes: list[str] = field(default_factory=list)  # its fingerprints, likewise
    preparation: dict[str, Any] = field(default_factory=dict)  # what the method found out before it trained


def train(
    trainer: Trainer,
    dataset: DenseDataset,
    batch_size: int,
    workers: int,
    checkpoint: Path,
    checkpoint_seconds: float,
    report: Callable[[int, int, float], None],
    probes: int = 0,
    commit: str | None = None,
    code: str | None = None,
) -> Progress:
    """Train from the last checkpoint, if there is one, to the end; a method that looks at training data first does so
    at the start. `report(step, total, loss)` is called as it goes; `probes` times, evenly spread, the tasks' gradients
    are compared. `commit` and `code` name the code that trains.

    An interrupt leaves a checkpoint of the last whole step behind. Raises DivergedError.
    """
    progress = load_checkpoint(checkpoint, trainer) if checkpoint.exists() else Progress()
    for known, name in ((progress.commits, commit), (progress.codes, code)):
        if name and name not in known:
            known.append(name)
    if progress.step == 0 and trainer.plain_model.prepare is not None:
        device = trainer.accelerator.device
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            closing(losses_by_batch(trainer, dataset, batch_size)) as losses,
        ):
            progress.preparation = trainer.plain_model.prepare(losses)
    total = trainer.total_steps
    log_every = max(1, total // 100)
    pin = trainer.accelerator.device.type == "cuda"
    batches = iter(training_batches(dataset, batch_size, progress.step, total, workers, pin))
    began = saved = time.monotonic()
    try:
        while progress.step < total:
            started = time.monotonic()
            batch = to_device(next(batches), trainer.accelerator.device)
            waited = time.monotonic() - started
            with uninterrupted():
                if probes and (
                    progress.step == 0 or progress.step * probes // total > (progress.step - 1) * probes // total
                ):
                    for pair, value in gradient_cosines(trainer, batch).items():
                        progress.cosines.setdefault(",".join(pair), []).append(value)
                losses = trainer.step(batch, progress.step)
                progress.step, progress.loader_wait = progress.step + 1, progress.loader_wait + waited
                if progress.step % CHECK_EVERY == 0:
                    _require_finite(losses, progress.step)
                if progress.step % log_every == 0 or progress.step == total:
                    _log(progress, trainer, losses)
                    report(progress.step, total, progress.history[-1]["loss"])
            if time.monotonic() - saved > checkpoint_seconds:
                save_checkpoint(checkpoint, trainer, progress)
                saved = time.monotonic()
        if time.monotonic() - began > checkpoint_seconds:  # evaluation may be interrupted too
            save_checkpoint(checkpoint, trainer, progress)
    except KeyboardInterrupt:
        save_checkpoint(checkpoint, trainer, progress)
        raise
    return progress


def _log(progress: Progress, trainer: Trainer, losses: Mapping[str, Tensor]) -> None:
    """Append to the history. Raises DivergedError where a loss is not finite."""
    _require_finite(losses, progress.step)
    each = {f"loss/{task}": value.item() for task, value in losses.items()}
    rate = trainer.optimizer.param_groups[0]["lr"]
    progress.history.append({"step": progress.step, "loss": trainer.total_loss(losses), "lr": rate, **each})


def _require_finite(losses: Mapping[str, Tensor], step: int) -> None:
    bad = [task for task, value in losses.items() if not math.isfinite(value.item())]
    if bad:
        raise DivergedError(f"the loss of {', '.join(bad)} is not finite at step {step}")


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold an interrupt back until the block is done, so that no step is cut off half way."""
    pending: list[int] = []
    previous = {
        s: signal.signal(s, lambda number, frame: pending.append(number)) for s in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if pending:
        raise KeyboardInterrupt


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch of tensors, or of lists of them."""
    return {
        name: [each.to(device, non_blocking=True) for each in value]
        if isinstance(value, list)
        else value.to(device, non_blocking=True)
        for name, value in batch.items()
    }


def save_checkpoint(path: Path, trainer: Trainer, progress: Progress) -> None:
    """Trained tensors, optimizer state and random state, as safetensors, written atomically."""
    tensors = {f"model/{name}": tensor for name, tensor in trainer.plain_model.trained_state().items()}
    for index, state in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    tensors["rng/cpu"] = torch.get_rng_state()
    if trainer.accelerator.device.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    about = {"lr": trainer.recipe.optimizer.lr, **asdict(progress)}
    if trainer.accelerator.scaler is not None:
        about["scaler"] = trainer.accelerator.scaler.state_dict()
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path, alone=True) as temporary:
            save_file(held, temporary, {"bench": json.dumps(about)})
    except (OSError, SafetensorError) as error:
        raise BenchError(f"cannot write checkpoint {path}: {error}") from error


def load_checkpoint(path: Path, trainer: Trainer) -> Progress:
    """Put a trainer back to where `save_checkpoint` left it; to the start, where that was at another learning rate (a
    cell that tunes it may have chosen anew). Raises BenchError for the checkpoint of another model."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["bench"])
            if about["lr"] != trainer.recipe.optimizer.lr:
                return Progress()
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        trainer.plain_model.load_trained_state(_below(tensors, "model/"))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below(tensors, "optimizer/").items():
            index, key = name.split("/")
            state.setdefault(int(index), {})[key] = tensor
        groups = trainer.optimizer.state_dict()["param_groups"]
        trainer.optimizer.load_state_dict({"state": state, "param_groups": groups})
        torch.set_rng_state(tensors["rng/cpu"])
        if "rng/cuda" in tensors and trainer.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng/cuda"])
        if trainer.accelerator.scaler is not None and "scaler" in about:
            trainer.accelerator.scaler.load_state_dict(about["scaler"])
        return Progress(**{each.name: about[each.name] for each in fields(Progress)})
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise BenchError(f"cannot resume from {path}: {error}; delete it to start this cell anew") from error


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
