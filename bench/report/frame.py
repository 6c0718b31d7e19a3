"""The records of a folder as one pandas table, for questions that no report answers."""

from __future__ import annotations

import typing
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel

from bench.record import Record
from bench.report.groups import collect, flat

# What has no place in a cell, or is a text to read: the records have it.
LEFT_OUT = {
    "history", "per_class", "cosines", "preparation", "failure.traceback", "time.samples", "time.phases", "time.floor",
    "estimate.holders", "tuned.tried", "spec.recipe.title", "spec.recipe.source", "provenance.packages",
    "provenance.gpu_before", "provenance.gpu_after",
}  # fmt: skip


def read(folder: Path | str) -> pd.DataFrame:
    """A row a record, in the order of their files; not the trials of learning rates. A file that is none is warned of.

    The columns are the records' fields by their path, in the records' units (bytes, seconds, parameters):
    `spec.method`, `spec.seed`, `parameters.trainable`, `memory.peak_allocated`, `metrics.semseg.mIoU`,
    `provenance.device_name`; `bench/record.py` and `bench/spec.py` describe each. Beside them `time.median` and
    `time.host_bound`, `record` (what `bench show` takes) and `path`. Nothing is averaged, and nothing keeps apart what
    does not compare: that is for whoever asks, by `spec` and `provenance`.

    Raises BenchError where there is no folder or no record.
    """
    found, problems = collect(Path(folder))
    for problem in problems:
        warnings.warn(f"left out: {problem}", stacklevel=2)
    rows = []
    for item in found:
        row = {"record": item.path.stem, "path": str(item.path), **dict(_fields(Record, item.record))}
        time = item.record.time
        rows.append(row | {f"time.{name}": getattr(time, name, None) for name in ("median", "host_bound")})
    return pd.DataFrame(rows)


def _fields(kind: type[BaseModel], model: BaseModel | None, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Paths and values; of a part that a record lacks too, so that every table has the same columns."""
    for name, field in kind.model_fields.items():
        path, value = f"{prefix}{name}", getattr(model, name, None)
        if path in LEFT_OUT:
            continue
        parts = [part for part in (field.annotation, *typing.get_args(field.annotation)) if isinstance(part, type)]
        part = next((part for part in parts if issubclass(part, BaseModel)), None)
        if part is not None:
            yield from _fields(part, value, f"{path}.")
        elif isinstance(value, dict):
            yield from flat(value, f"{path}.").items()
        elif typing.get_origin(field.annotation) is not dict:
            yield path, value
