"""`bench evaluate`: a trained cell scored again: on another machine, by today's code, or on labels of original size."""

from __future__ import annotations

import itertools
import json
import math
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from bench import processes
from bench.data import card as cards
from bench.data import check, subset, verify
from bench.data.loader import DenseDataset
from bench.device import Device
from bench.errors import BenchError
from bench.failure import classify
from bench.files import write_atomically
from bench.measure import code, cuda, provenance
from bench.one_line import say
from bench.report.sheets import MISSING
from bench.spec import EvalSize, Precision
from bench.tasks import TASKS
from bench.train import evaluation
from bench.verbs.trained import Trained

SAME = 1e-4  # relative difference up to which rounding explains it


@dataclass(frozen=True)
class Scores:
    """`metrics`: task -> metric key -> value; `per_class`: task -> class -> IoU; `differs`: in what this evaluation is
    another than that of the record."""

    metrics: dict[str, dict[str, float | None]]
    per_class: dict[str, dict[str, float | None]]
    images: int
    differs: tuple[str, ...]


def score(
    trained: Trained,
    root: Path | None,
    place: Device,
    eval_size: EvalSize | None,
    limit: int | None,
    batch_size: int | None,
    workers: int,
    console: Console,
) -> Scores:
    """The metrics that `bench run` would have written; where an argument is None, as the record's run had it.

    Raises BenchError for missing or unreadable data, for predictions that are not finite and for want of memory.
    """
    spec, card = trained.record.spec, trained.card
    chosen, most = eval_size or spec.eval_size, subset.binding(card, "val", root, limit or spec.limit_val)
    precision = spec.precision if place.name or spec.precision == "bf16" else "fp32"
    cuda.set_up(precision)
    if place.name:
        torch.cuda.set_device(place.index)
    accelerator = cuda.accelerator(precision, bool(place.name))
    samples = DenseDataset(
        card,
        "val",
        spec.tasks,
        spec.image_size,
        root,
        most,
        original_labels=chosen == "original",
        skipped=spec.skipped,
    )
    # First, since it may have to read all images.
    differs = tuple(_differences(trained, root, place, chosen, most, batch_size or spec.batch_size, precision, console))
    model = accelerator.prepare_model(trained.model, evaluation_mode=True)
    try:
        with (
            processes.pool(workers if "edge" in spec.tasks else 0) as pool,
            Progress(console=console, transient=True) as progress,
        ):
            bar = progress.add_task(f"{len(samples)} images")
            values, per_class = evaluation.evaluate(
                model,
                samples,
                card.channels(spec.tasks),
                batch_size or spec.batch_size,
                workers,
                accelerator,
                lambda step, total: progress.update(bar, completed=step, total=total),
                pool,
            )
    except Exception as error:
        status, failure = classify(error)
        if status == "failed" and not isinstance(error, (BenchError, BrokenProcessPool)):
            raise
        advice = "; a smaller --batch-size needs less" if status == "out_of_memory" else ""
        raise BenchError(f"{failure.message}{advice}") from error
    classes = {task: card.tasks[task].classes for task in per_class}
    return Scores(
        {t: {key: v if math.isfinite(v) else None for key, v in figures.items()} for t, figures in values.items()},
        {task: dict(zip(classes[task], found, strict=True)) for task, found in per_class.items()},
        len(samples),
        differs,
    )


def _differences(
    trained: Trained,
    root: Path | None,
    place: Device,
    eval_size: EvalSize,
    limit: int | None,
    batch_size: int,
    precision: Precision,
    console: Console,
) -> list[str]:
    spec, seen, now = trained.record.spec, trained.record.provenance, provenance.describe(place.slug, place.name)
    found = []
    if eval_size != spec.eval_size:
        found.append(f"at {eval_size} size, not {spec.eval_size}")
    if limit != spec.limit_val:
        found.append(f"at most {limit or 'all'} images, not {spec.limit_val or 'all'}")
    if batch_size != spec.batch_size:
        found.append(f"in batches of {batch_size}, not {spec.batch_size}")
    found += _other_data(trained, root, console)
    if precision != spec.precision:
        found.append(f"{precision}, not {spec.precision}")
    if seen is None or now.device_name != seen.device_name:
        found.append(f"on {now.device_name}, not {seen.device_name if seen else spec.device}")
    packages = seen.packages if seen else {}
    found += [
        f"with {name} {now.packages.get(name, 'missing')}, not {version}"
        for name, version in packages.items()
        if now.packages.get(name) != version
    ]
    if seen is None or seen.code != code.fingerprint(spec.method):
        found.append(f"by other code{f' than that of commit {seen.commit[:8]}' if seen and seen.commit else ''}")
    return found


def _other_data(trained: Trained, root: Path | None, console: Console) -> list[str]:
    """What of the data is not the record's, or cannot be told: training images count too, and may not be here."""
    spec, card = trained.record.spec, trained.card
    known = trained.record.provenance.data_contents if trained.record.provenance else {}
    names: dict[str, list[str]] = {}
    found = []
    for split, limit in (("train", spec.limit_train), ("val", spec.limit_val)):
        try:
            names[split] = subset.ids(card, split, root, limit, spec.tasks, spec.skipped)
        except BenchError as error:
            found.append(f"perhaps the {split} data, of which a part is not here: {error}")
    seen = verify.Seen({}, {})
    if card.source == "files":
        folder, everything = cards.require_root(card, root), list(dict.fromkeys(itertools.chain(*names.values())))
        seen = verify.examine(card, folder, everything, spec.tasks, provenance.usable_cores(), partial(say, console))
        for split, chosen in names.items():
            bad = [seen.bad[name] for name in chosen if name in seen.bad]
            now = check.digits(seen.contents[name] for name in chosen)
            if bad:
                found.append(f"perhaps the {split} data, of which a part is not here: {bad[0]}")
            elif known.get(split, now) != now:
                found.append(f"other files or ids of {split} (contents {now}, not {known[split]})")
    if found:
        return found
    if cards.fingerprint(card, names["train"], names["val"], spec.tasks, seen.contents) == spec.data_fingerprint:
        return []
    if known:
        return ["the card is not that of the record, or ids are others with the same files"]
    return ["the card or the files are not those of the record, or it is from before their contents were compared"]


def write(trained: Trained, scores: Scores, place: Device, out: Path | None, console: Console) -> None:
    """Print the figures beside the record's, and write them to `out` where one is given."""
    table = Table("task", "metric", *(Column(name, justify="right") for name in ("record", "now", "relative change")))
    moved = False
    for task, figures in scores.metrics.items():
        for metric in TASKS[task].metrics:
            before, now = trained.record.metrics.get(task, {}).get(metric.key), figures.get(metric.key)
            known = before is not None and now is not None
            same = before == now or (known and math.isclose(before, now, rel_tol=SAME))
            moved |= not same and metric.key in trained.record.metrics.get(task, {})
            change = "same" if same and known else f"{now / before - 1:+.2%}" if known and before else MISSING
            unit = f" {metric.unit}".rstrip()
            told = (MISSING if value is None else f"{value:.4g}{unit}" for value in (before, now))
            table.add_row(TASKS[task].title, metric.title, *told, change)
    console.print(table)
    spec = trained.record.spec
    say(console, f"{spec.method} on {spec.dataset}, seed {spec.seed}: {scores.images} images")
    for line in scores.differs:
        say(console, f"not as in the record: {line}")
    if moved and not scores.differs:
        say(console, "warning: nothing but the figures differs from the record's run", "yellow")
    if out is not None:
        about = provenance.describe(place.slug, place.name)
        about.code = code.fingerprint(spec.method)
        content = {
            "record": str(trained.path),
            "trained_sha256": trained.record.trained_sha256,
            "card": trained.card.name,
            "images": scores.images,
            "differs": list(scores.differs),
            "metrics": scores.metrics,
            "per_class": scores.per_class,
            "provenance": about.model_dump(mode="json", exclude_defaults=True),
        }
        write_atomically(out, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        say(console, f"wrote {out}")
