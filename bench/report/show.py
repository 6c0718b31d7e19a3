"""`bench show`: one record in full."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from bench.errors import BenchError
from bench.one_line import say
from bench.record import Record, read
from bench.report.groups import weights_of
from bench.report.sheets import MISSING
from bench.report.tables import GIB, HOST_BOUND
from bench.spec import SETTLED, Tried
from bench.tasks import TASKS

ESTIMATED = {"peak", "weights", "phases", "evaluation"}


def show(name: str, folder: Path, console: Console) -> None:
    """Print one record: `name` is a JSON file, or the beginning of a record's hash under `folder`."""
    path = resolve(name, folder)
    record = read(path)
    for title, pairs in _sections(record).items():
        if pairs:
            say(console, f"\n{title}", "bold")
            grid = Table.grid("", Column(overflow="fold"), padding=(0, 2))
            for key, value in pairs.items():
                grid.add_row(Text(key), Text(str(value)))
            console.print(grid)
    say(console, f"\n{path}", "dim")


def resolve(name: str, folder: Path) -> Path:
    """A record's file by itself or by the beginning of its hash. Raises BenchError where that is none, or several."""
    if Path(name).is_file():
        return Path(name)
    if name.endswith(".json") or "/" in name:
        raise BenchError(f"no such file: {name}; give a record's JSON file or the beginning of its hash")
    digits, seed = re.fullmatch(r"(.*?)(-s\d+)?", name).groups()
    paths = [path for path in sorted(folder.rglob("*.json")) if digits and path.stem.startswith(digits)]
    paths = [path for path in paths if path.stem.endswith(seed or "")]
    if not paths:
        where = (
            "`bench run` and the report's CSV files name them; if it lies in another folder, name that with --folder "
            "(`bench show`: after the hash)"
        )
        raise BenchError(f"no record whose hash begins with {name!r} in {folder}; {where}")
    if len(paths) > 1:
        several = ", ".join(str(path.relative_to(folder)) for path in paths[:5])
        raise BenchError(
            f"{name!r} stands for {len(paths)} records, among them {several}; give more of it, e.g. {paths[0].stem}"
        )
    return paths[0]


def _sections(record: Record) -> dict[str, dict[str, Any]]:
    """Title -> what to print. Sizes in GiB, times in seconds, counts in full."""
    random = {"RANDOM WEIGHTS": "nothing was pretrained"} if weights_of(record) == "random" else {}
    metrics = {}
    for task, values in record.metrics.items():
        by_key = {metric.key: metric for metric in TASKS[task].metrics} if task in TASKS else {}
        for key, value in values.items():
            unit = f" {by_key[key].unit}".rstrip() if key in by_key else ""
            metrics[f"{TASKS[task].title if task in TASKS else task} {key}"] = (
                MISSING if value is None else f"{value:.4g}{unit}"
            )
    if record.edge_tolerance is not None:
        metrics["odsF counts edges within"] = f"{100 * record.edge_tolerance:g} % of the diagonal"
    parameters = record.parameters.model_dump(exclude_none=True) if record.parameters else {}
    time = record.time
    seconds = pd.Series(time.samples if time else [], dtype=float)
    return {
        record.method.title: {
            "status": record.status.replace("_", " "), "family": record.method.family, **random, **_of_trial(record),
        },
        "Options": _flat(record.method.options),
        "Failure": _flat(record.failure.model_dump()) if record.failure else {},
        "Cell": _flat(record.spec.model_dump(exclude={"recipe"})),
        # What the cell itself settles stands there: a recipe's own length and limits did not apply.
        "Recipe": _flat(record.spec.recipe.model_dump(exclude=SETTLED)),
        "Run on": _flat(record.provenance.model_dump()) if record.provenance else {},
        "Parameters": {k: f"{v:,}" for k, v in parameters.items()},
        "Memory, GiB": {
            key: value if isinstance(value, str) else f"{value / GIB:.3f}"
            for key, value in _flat(record.memory.model_dump() if record.memory else {}).items()
        },
        "Estimated for a CUDA GPU, GiB": {
            key: f"{value / GIB:.3f}"
            for key, value in _flat(record.estimate.model_dump(include=ESTIMATED)).items()
        } if record.estimate and record.estimate.peak else {},
        "Operations, 1e9 a step": {
            "forward": f"{record.estimate.forward / 1e9:.1f}", "backward": f"{record.estimate.backward / 1e9:.1f}",
        } if record.estimate and record.estimate.peak else {},
        "Time, s/batch": {
            "device": time.device, "median": f"{seconds.median():.4f}", "p90": f"{seconds.quantile(0.9):.4f}",
            **{phase: f"{pd.Series(samples).median():.4f}" for phase, samples in time.phases.items()},
            **({"frozen backbone alone": f"{pd.Series(time.floor).median():.4f}"} if time.floor else {}),
            **_achieved(record),
            **({"queued after the last step": f"{time.queued:.4f}"} if time.queued is not None else {}),
            **({"HOST-BOUND": HOST_BOUND} if time.host_bound else {}),
            "steps": f"{len(seconds)} after {time.warmup} of warm-up", "batch size": time.batch_size,
        } if time else {},
        "Learning rate": {
            "trained with": record.tuned.rate or "none",
            **{f"trial of {each.rate:g}": _trial(each) for each in record.tuned.tried},
        } if record.tuned else {},
        "Found before training": {
            key: json.dumps(_rounded(value)) if isinstance(value, (list, dict)) else value
            for key, value in record.preparation.items()
        },
        "Metrics": metrics,
    }  # fmt: skip


def _of_trial(record: Record) -> dict[str, str]:
    spec = record.spec
    if spec.trial is None:
        return {}
    told = f"learning rate {spec.recipe.optimizer.lr:g}, {spec.trial.length:g} of the run's steps"
    return {"TRIAL": f"{told}; scored on held-out training images, {spec.trial.holdout:g} of them"}


NO_SCORE = "no score: a task's figure is missing, or zero in an older record"


def _trial(tried: Tried) -> str:
    """Score and headline figures on held-out training images."""
    if tried.score is None:
        return tried.status.replace("_", " ") if tried.status != "ok" else NO_SCORE
    figures = ", ".join(
        f"{TASKS[task].title} {tried.metrics.get(task, '')} {value:.4g}".replace("  ", " ")
        for task, value in tried.figures.items()
    )
    return f"score {tried.score:.4f} on held-out training images ({figures})"


def _achieved(record: Record) -> dict[str, str]:
    """Operations a second of a step, as a share of what a large matrix product reaches on the same device."""
    time, operations = record.time, record.estimate
    if not time or not time.matmul_rate or not operations or operations.forward is None:
        return {}
    share = (operations.forward + operations.backward) / time.median / time.matmul_rate
    return {"rate": f"{share:.0%} of a large matrix product's {time.matmul_rate / 1e12:.3g} TFLOP/s"}


def _rounded(value: Any) -> Any:
    """Nested lists with their fractions to three places."""
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 3) if isinstance(value, float) else value


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as lines: what is empty is left out, what is nested gets dotted names, sequences their commas."""
    lines: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            lines |= {f"{key}.{inner}": v for inner, v in _flat(value).items()}
        elif value not in ("", None):
            lines[key] = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    return lines
