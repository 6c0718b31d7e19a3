"""One cell, from spec to record."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Literal

from bench import processes
from bench.data import card as cards
from bench.data import derived
from bench.errors import BenchError
from bench.failure import classify
from bench.files import write_atomically
from bench.measure import code, gpu_state, provenance
from bench.record import Estimated, MethodInfo, Parameters, Record, Weights
from bench.spec import Job, RunSpec
from bench.tuning import held_out
from methods.registry import MethodError, parse

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    from bench.data.loader import DenseDataset
    from methods.backbones.base import Backbone
    from methods.model import MultiTaskModel

Emit = Callable[..., None]
Figures = dict[str, dict[str, float | None]]  # task -> metric key -> value; None where nothing was valid
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

    from bench.measure import cuda

    spec = job.spec
    if spec.device_kind == "cuda" and not torch.cuda.is_available():
        raise BenchError("a CUDA device was asked for, but torch sees none")
    cuda.set_up(spec.precision, spec.cudnn_benchmark)
    record.provenance.threads = torch.get_num_threads()
    cell = _Cell(job)
    source = cell.weights.source
    name = job.weights_path.name if job.weights_path else spec.backbone if source == "timm" else ""
    record.provenance.weights = Weights(source=source, name=name, sha256=cell.weights.sha256)
    if spec.trial is None:
        # On a CPU the estimate would be in the resident peak: it comes second, where measuring fails too.
        first = spec.device_kind == "cuda"
        if first:
            _estimate(cell, record, emit)
        try:
            _measure_efficiency(cell, record, emit)
        except Exception:
            if not first:
                with suppress(Exception):
                    _estimate(cell, record, emit)
            raise
        if not first:
            _estimate(cell, record, emit)
    if spec.steps == 0:
        return
    record.tuned = job.tuned
    if job.tuned is not None and job.tuned.rate is None:
        from bench.train.loop import DivergedError

        diverged = all(each.status == "diverged" for each in job.tuned.tried)
        raise DivergedError(job.tuned.reason) if diverged else BenchError(job.tuned.reason)
    _train_and_evaluate(cell, record, emit)


class _Cell:
    """What the parts of a cell are made of."""

    def __init__(self, job: Job) -> None:
        from methods.backbones.load import WeightSource

        self.job, self.spec = job, job.spec
        self.card = cards.load(job.card)
        self.channels = self.card.channels(self.spec.tasks)
        source = "file" if self.spec.weights.startswith("file:") else self.spec.weights
        self.weights = WeightSource(source, job.weights_path, self.spec.weights.partition(":")[2])

    def accelerator(self) -> Accelerator:
        """A new one, for a loss scale of its own."""
        from bench.measure import cuda

        return cuda.accelerator(self.spec.precision, self.spec.device_kind == "cuda")

    def backbone(self) -> Backbone:
        from methods.backbones.load import load_backbone

        return load_backbone(self.spec.backbone, self.spec.image_size, self.weights)

    def model(self) -> MultiTaskModel:
        import torch

        # The seed is set before the backbone is made: random backbone weights are the same for every method.
        torch.manual_seed(self.spec.seed)
        return finished_model(self.spec, self.channels, self.backbone())

    def samples(self, split: Literal["train", "val"], limit: int | None = None, **how: Any) -> DenseDataset:
        from bench.data.loader import DenseDataset

        spec, job = self.spec, self.job
        how = {"skipped": spec.skipped, "cache": job.cache} | how
        return DenseDataset(self.card, split, spec.tasks, spec.image_size, job.data_root, limit, **how)


def _measure_efficiency(cell: _Cell, record: Record, emit: Emit) -> None:
    import torch

    from bench.measure.profile import floor_seconds, matmul_rate, measure, synthetic_batch
    from bench.train.loop import Trainer

    spec, recipe = cell.spec, cell.spec.recipe.untuned()
    emit("phase", name="measure")
    accelerator = cell.accelerator()
    model = cell.model()
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
    batch = synthetic_batch(cell.channels, spec.image_size, spec.batch_size, accelerator.device)
    uuid = str(torch.cuda.get_device_properties(0).uuid) if spec.device_kind == "cuda" else ""
    record.provenance.gpu_before = gpu_state.read(uuid) if uuid else None

    def look() -> None:  # while the GPU still works: at rest nothing slows it down
        record.provenance.gpu_after = gpu_state.read(uuid) if uuid else None

    record.memory, record.time = measure(
        trainer, batch, recipe.measure, lambda step, total: emit("step", step=step, total=total), look
    )
    record.parameters.passes = model.passes(batch["image"][:1])
    del trainer, model
    accelerator.free_memory()
    backbone = cell.backbone()
    record.time.floor = floor_seconds(backbone, batch["image"], accelerator, recipe.measure.steps)
    record.time.matmul_rate = matmul_rate(accelerator)
    del backbone, batch
    accelerator.free_memory()


def _estimate(cell: _Cell, record: Record, emit: Emit) -> None:
    if cell.job.estimate:
        emit("phase", name="estimate")
        record.estimate = estimated(cell.spec, cell.channels)


def _split(cell: _Cell) -> tuple[DenseDataset, DenseDataset, int]:
    """Training and validation images, of a trial both from the training images, and the steps to train."""
    from bench.data.loader import steps_per_epoch

    spec = cell.spec
    of_training = {"seed": spec.seed, "shuffled_labels": spec.shuffled_labels}
    augmented = of_training | {"augment": spec.recipe.augment}
    original = {"original_labels": spec.eval_size == "original"}
    training = cell.samples("train", spec.limit_train, **augmented)
    steps = spec.steps or spec.epochs * steps_per_epoch(len(training), spec.batch_size)
    if spec.trial is None:
        return training, cell.samples("val", spec.limit_val, **original), steps
    kept, held = held_out(training.names, spec.trial.holdout)
    training = cell.samples("train", names=kept, **augmented)
    # What is left of a control is a control too.
    return (
        training,
        cell.samples("train", names=held, **original, **of_training),
        max(1, round(steps * spec.trial.length)),
    )


def _train_and_evaluate(cell: _Cell, record: Record, emit: Emit) -> None:
    import torch

    from bench.train.evaluation import evaluate
    from bench.train.loop import Trainer, train
    from bench.train.weights import save_trained

    job, spec = cell.job, cell.spec
    recipe = spec.recipe.with_rate(job.tuned.rate) if spec.recipe.tune else spec.recipe
    train_set, val_set, total_steps = _split(cell)
    emit("phase", name="train")
    job.trained_path.unlink(missing_ok=True)  # of an earlier run of the cell
    accelerator = cell.accelerator()
    trainer = Trainer(cell.model(), recipe, spec.batch_size, total_steps, accelerator)
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
        record.provenance.code,
    )
    record.provenance.earlier_commits = [c for c in progress.commits if c != record.provenance.commit]
    record.provenance.earlier_code = [c for c in progress.codes if c != record.provenance.code]
    record.history, record.loader_wait, record.cosines = progress.history, progress.loader_wait, progress.cosines
    record.preparation = progress.preparation

    def watched(batches: DataLoader) -> Iterator[dict[str, Any]]:
        for step, batch in enumerate(batches, 1):
            yield batch
            emit("step", step=step, total=len(batches))

    record.edge_tolerance = cell.card.edge_tolerance if "edge" in cell.channels else None
    with processes.pool(job.workers if "edge" in cell.channels else 0) as pool:
        if spec.trial is None:
            emit("phase", name="constant predictions")
            record.floor, record.floor_map = _floors(cell, train_set, val_set, watched, pool)
        emit("phase", name="evaluate")
        values, per_class = evaluate(
            trainer.model,
            val_set,
            cell.channels,
            spec.batch_size,
            job.workers,
            accelerator,
            lambda step, total: emit("step", step=step, total=total),
            pool,
        )
    record.metrics = _finite(values)
    record.per_class = {
        task: dict(zip(cell.card.tasks[task].classes, values, strict=True)) for task, values in per_class.items()
    }
    if job.keep_weights:
        record.trained_sha256 = save_trained(trainer.plain_model, job.trained_path, spec.image_size)


def _floors(
    cell: _Cell,
    train_set: DenseDataset,
    val_set: DenseDataset,
    watched: Callable[[DataLoader], Iterator[dict[str, Any]]],
    pool: Executor | None,
) -> tuple[Figures, Figures]:
    """Metrics of the best constant prediction and of the best one a place, fitted on training images.

    No method has a part in them: they are kept in the cache folder for the other cells on the same data.
    """
    from bench.data.loader import validation_batches
    from bench.data.subset import evenly_spaced
    from bench.train.floor import best_constants, best_maps, better, score_floors, sum_labels, without_foreground

    spec, job = cell.spec, cell.job
    made = [spec.data_fingerprint, spec.image_size, spec.eval_size, FLOOR_SAMPLES, code.of("bench.train.floor")]
    digest = hashlib.sha256(json.dumps(made).encode()).hexdigest()[:24]
    kept = derived.folder() / "floors" / f"{digest}.json"
    with suppress(OSError, ValueError):
        constant, place = json.loads(kept.read_text(encoding="utf-8"))
        return constant, place
    fit_set = cell.samples("train", names=evenly_spaced(train_set.names, FLOOR_SAMPLES))
    fit, score = (validation_batches(d, spec.batch_size, job.workers, pin=False) for d in (fit_set, val_set))
    sums = sum_labels(watched(fit), cell.channels)
    constants = best_constants(sums)
    floors = (constants, without_foreground(constants), best_maps(sums))
    tolerance = cell.card.edge_tolerance
    everywhere, nowhere, places = score_floors(floors, watched(score), cell.channels, tolerance, pool)
    found = _finite(better(everywhere, nowhere)), _finite(places)
    with suppress(BenchError):
        write_atomically(kept, json.dumps(found))
    return found


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


def _finite(values: Mapping[str, Mapping[str, float]]) -> Figures:
    return {t: {k: v if math.isfinite(v) else None for k, v in figures.items()} for t, figures in values.items()}


def blank_record(job: Job) -> Record:
    """A record that says what was to be run and where, before it has run."""
    about = provenance.describe(job.spec.device, job.device_name)
    about.data_fingerprint = job.spec.data_fingerprint
    about.data_contents = job.data_contents
    about.code = code.fingerprint(job.spec.method)
    return Record(status="interrupted", spec=job.spec, method=method_info(job.spec.method), provenance=about)


def run_in_process(job: Job, told: Connection) -> None:
    """The cell with its record, in the process that it has to itself. Progress is sent through `told`, an event a dict;
    the last one says that the record is written."""

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
    with suppress(OSError):
        told.send({"event": "ended"})
