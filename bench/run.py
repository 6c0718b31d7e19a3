"""One cell, from spec to record."""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Literal

from bench.data import card as cards
from bench.errors import BenchError
from bench.failure import classify
from bench.measure import gpu_state, provenance
from bench.record import Estimated, MethodInfo, Parameters, Record, Weights
from bench.spec import Job, RunSpec
from bench.tuning import held_out
from methods.registry import MethodError, parse

if TYPE_CHECKING:
    from methods.backbones.base import Backbone
    from methods.model import MultiTaskModel

Emit = Callable[..., None]
FLOOR_SAMPLES = 200  # training images that the predictions without an image are fitted on


def method_info(expression: str) -> MethodInfo:
    """What a report needs to know of a method, from its canonical expression."""
    (configured,) = parse(expression)
    method = configured.method
    return MethodInfo(
        name=method.name,
        aliases=method.aliases,
        title=configured.title,
        family=method.family,
        citation=method.citation,
        options=dataclasses.asdict(configured.options),
        published_row=configured.published_row,
    )


def run_cell(job: Job, record: Record, emit: Emit) -> None:
    """Fill `record` as far as the cell gets: parameters, memory and time, then training and metrics."""
    import torch
    from accelerate import Accelerator

    from bench.data.loader import DenseDataset, steps_per_epoch, validation_batches
    from bench.data.subset import evenly_spaced
    from bench.measure import cuda
    from bench.measure.profile import floor_seconds, matmul_rate, measure, synthetic_batch
    from bench.train.loop import DivergedError, Trainer, losses_by_batch, train
    from bench.train.trained import save_trained
    from methods.backbones.load import WeightSource, load_backbone

    spec = job.spec
    on_gpu = spec.device_kind == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise BenchError("a CUDA device was asked for, but torch sees none")
    cuda.set_up(spec.precision, spec.cudnn_benchmark)

    def make_accelerator() -> Accelerator:
        mixed = spec.precision if spec.precision in ("bf16", "fp16") else "no"
        made = Accelerator(mixed_precision=mixed, cpu=not on_gpu)
        if made.device.type != spec.device_kind:  # figures of one device under the name of another
            raise RuntimeError(f"accelerate chose {made.device} where {spec.device_kind} was asked for")
        return made

    record.provenance.threads = torch.get_num_threads()
    card = cards.load(job.card)
    channels = card.channels(spec.tasks)
    source = "file" if spec.weights.startswith("file:") else spec.weights
    weights = WeightSource(source, job.weights_path, spec.weights.partition(":")[2])
    name = job.weights_path.name if job.weights_path else spec.backbone if source == "timm" else ""
    record.provenance.weights = Weights(source=source, name=name, sha256=weights.sha256)

    def build() -> MultiTaskModel:
        # The seed is set before the backbone is made: random backbone weights are the same for every method.
        torch.manual_seed(spec.seed)
        return finished_model(spec, channels, load_backbone(spec.backbone, spec.image_size, weights))

    def measure_efficiency() -> None:
        recipe = spec.recipe.untuned()
        if job.estimate:
            emit("phase", name="estimate")
            record.estimate = estimated(spec, channels)
        emit("phase", name="measure")
        accelerator = make_accelerator()
        model = build()
        ledger = model.ledger()
        record.parameters = Parameters(
            total=ledger.total,
            trainable=ledger.trainable,
            adaptation=ledger.adaptation,
            backbone=ledger.backbone,
            decoder=ledger.decoder,
            shared=ledger.shared,
            per_task=ledger.per_task,
        )
        trainer = Trainer(model, recipe, spec.batch_size, recipe.measure.warmup + recipe.measure.steps, accelerator)
        batch = synthetic_batch(channels, spec.image_size, spec.batch_size, accelerator.device)
        uuid = str(torch.cuda.get_device_properties(0).uuid) if on_gpu else ""
        record.provenance.gpu_before = gpu_state.read(uuid) if uuid else None

        def look() -> None:  # while the GPU still works: at rest nothing slows it down
            record.provenance.gpu_after = gpu_state.read(uuid) if uuid else None

        record.memory, record.time = measure(
            trainer, batch, recipe.measure, lambda step, total: emit("step", step=step, total=total), look
        )
        record.parameters.passes = model.passes(batch["image"][:1])
        del trainer, model
        accelerator.free_memory()
        backbone = load_backbone(spec.backbone, spec.image_size, weights)
        record.time.floor = floor_seconds(backbone, batch["image"], accelerator, recipe.measure.steps)
        record.time.matmul_rate = matmul_rate(accelerator)
        del backbone, batch
        accelerator.free_memory()

    if spec.trial is None:
        measure_efficiency()
    if spec.steps == 0:
        return

    from bench.train.evaluation import evaluate
    from bench.train.floor import best_constants, best_maps, score_floors, sum_labels

    record.tuned = job.tuned
    if job.tuned is not None and job.tuned.rate is None:
        diverged = all(each.status == "diverged" for each in job.tuned.tried)
        raise DivergedError(job.tuned.reason) if diverged else BenchError(job.tuned.reason)
    accelerator = make_accelerator()  # training starts with a loss scale of its own
    recipe = spec.recipe.with_rate(job.tuned.rate) if spec.recipe.tune else spec.recipe

    def samples(split: Literal["train", "val"], limit: int | None, **how: Any) -> DenseDataset:
        return DenseDataset(
            card, split, spec.tasks, spec.image_size, job.data_root, limit, skipped=spec.skipped, cache=job.cache, **how
        )

    training = {"augment": recipe.augment, "seed": spec.seed, "shuffled_labels": spec.shuffled_labels}
    train_set = samples("train", spec.limit_train, **training)
    total_steps = spec.steps or spec.epochs * steps_per_epoch(len(train_set), spec.batch_size)
    original_labels = spec.eval_size == "original"
    if spec.trial is None:
        val_set = samples("val", spec.limit_val, original_labels=original_labels)
    else:
        kept, held = held_out(train_set.names, spec.trial.holdout)
        train_set = samples("train", None, names=kept, **training)
        # What is left of a control is a control too.
        how = {"original_labels": original_labels, "seed": spec.seed, "shuffled_labels": spec.shuffled_labels}
        val_set = samples("train", None, names=held, **how)
        total_steps = max(1, round(total_steps * spec.trial.length))
    emit("phase", name="train")
    job.trained_path.unlink(missing_ok=True)  # of an earlier run of the cell
    trainer = Trainer(build(), recipe, spec.batch_size, total_steps, accelerator)
    if trainer.plain_model.prepare is not None:
        batches = losses_by_batch(trainer, train_set, spec.batch_size)
        record.preparation = trainer.plain_model.prepare(batches)
        batches.close()
    torch.manual_seed(spec.seed)
    progress = train(
        trainer,
        train_set,
        spec.batch_size,
        job.workers,
        job.checkpoint_path,
        job.checkpoint_seconds,
        lambda step, total, loss: emit("step", step=step, total=total, loss=loss),
        job.probes,
        record.provenance.commit,
    )
    record.provenance.earlier_commits = [c for c in progress.commits if c != record.provenance.commit]
    record.history, record.loader_wait, record.cosines = progress.history, progress.loader_wait, progress.cosines

    emit("phase", name="evaluate")
    if spec.trial is None:
        fit_set = samples("train", None, names=evenly_spaced(train_set.names, FLOOR_SAMPLES))
        fit, score = (validation_batches(d, spec.batch_size, job.workers, pin=False) for d in (fit_set, val_set))
        sums = sum_labels(fit, channels)
        floors = score_floors((best_constants(sums), best_maps(sums)), score, channels)
        record.floor, record.floor_map = map(_finite, floors)
    values, per_class = evaluate(
        trainer.model,
        val_set,
        channels,
        spec.batch_size,
        job.workers,
        accelerator,
        lambda step, total: emit("step", step=step, total=total),
    )
    record.metrics = _finite(values)
    record.per_class = {
        task: dict(zip(card.tasks[task].classes, values, strict=True)) for task, values in per_class.items()
    }
    if job.keep_weights:
        record.trained_sha256 = save_trained(trainer.plain_model, job.trained_path)


def finished_model(spec: RunSpec, channels: Mapping[str, int], backbone: Backbone) -> MultiTaskModel:
    """The cell's model on a backbone of its own."""
    from methods.layers.checkpointing import checkpoint_activations
    from methods.model import Setting

    (configured,) = parse(spec.method)
    model = configured.build(backbone, channels, Setting(spec.protocol, spec.decoder))
    if spec.memory == "low":
        checkpoint_activations(model)
    return model


def estimated(spec: RunSpec, channels: Mapping[str, int]) -> Estimated:
    """The prediction that the measurement stands beside; its reason where there is none."""
    from bench.measure.estimate import estimate
    from methods.backbones.load import WeightSource, load_backbone

    def build() -> MultiTaskModel:
        return finished_model(spec, channels, load_backbone(spec.backbone, spec.image_size, WeightSource("random")))

    try:
        found = estimate(build, spec.image_size, spec.recipe.untuned(), spec.batch_size, spec.precision)
    except (BenchError, MethodError) as error:
        return Estimated(reason=str(error))
    return Estimated(
        peak=found.peak,
        weights=found.weights,
        phases=found.phases,
        holders=dict(list(found.holders.items())[:10]),
        forward=found.forward,
        backward=found.backward,
        evaluation=found.evaluation,
    )


def _finite(values: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
    return {t: {k: v if math.isfinite(v) else None for k, v in figures.items()} for t, figures in values.items()}


def blank_record(job: Job) -> Record:
    """A record that says what was to be run and where, before it has run."""
    about = provenance.describe(job.spec.device, job.device_name)
    about.data_fingerprint = job.spec.data_fingerprint
    return Record(status="interrupted", spec=job.spec, method=method_info(job.spec.method), provenance=about)


def run_in_process(job: Job, told: Connection) -> None:
    """The cell with its record, in the process that it has to itself. Progress is sent through `told`, an event a dict.
    Exits with 130 where the cell was interrupted."""

    def emit(event: str, **values: Any) -> None:
        try:
            told.send({"event": event, **values})
        except OSError:  # nobody listens any more: stop in an orderly way, with a checkpoint
            raise KeyboardInterrupt from None

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    started = time.monotonic()
    record = blank_record(job)
    try:
        run_cell(job, record, emit)
        record.status = "ok"
    except (Exception, KeyboardInterrupt) as error:
        record.status, record.failure = classify(error)
    for number in (signal.SIGINT, signal.SIGTERM):  # from here on there is nothing to interrupt but the writing
        signal.signal(number, signal.SIG_IGN)
    record.provenance.seconds = round(time.monotonic() - started, 1)
    record.write(job.out)
    if record.status in ("ok", "diverged"):
        job.checkpoint_path.unlink(missing_ok=True)
    if record.status == "interrupted":
        sys.exit(130)
