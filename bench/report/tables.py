"""Records into tables: which records may be compared, and the figures of Tables 1 and 2. Pure pandas, no printing.

Number columns stay numeric: a figure that is missing is NaN, and a column beside it says why.
"""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from bench.errors import BenchError, did_you_mean
from bench.record import Found, Record, scan
from bench.report import published
from bench.spec import RunSpec
from bench.tasks import TASKS, delta_m

METHOD, FAMILY, SEEDS, STATUS, NOTE, SOURCE = "Method", "Family", "Seeds", "Status", "Note", "Source"
RECORDS = "Records"  # file names less .json, as `bench show` takes them
TP, TP_ADAPTATION, TP_BACKBONE, TP_DECODER = "#TP (M)", "adaptation (M)", "backbone (M)", "decoder (M)"
TP_PRINTED = "published #TP (M)"
DELTA, DELTA_NOTE = "Delta-m (%)", "Delta-m note"
CUDA_ALLOCATED, CUDA_RESERVED = "memory, peak allocated (GiB)", "memory, peak reserved (GiB)"
CUDA_MEDIAN, CUDA_P90 = "time, median (s/batch)", "time, p90 (s/batch)"
CPU_PROCESS, CPU_MEDIAN, CPU_P90 = (
    "process memory (GiB, CPU)",
    "CPU time, median (s/batch)",
    "CPU time, p90 (s/batch)",
)
MEMORY_PRINTED, TIME_PRINTED = "published memory (GB, as printed)", "published time (s/batch)"

FAMILIES = ("fine-tuning", "single-task PEFT", "multi-task PEFT")
BASELINE = "single_task_full"
NO_BASELINE = "no single-task baseline"
GIB = 2**30


def headline(task: str) -> str:
    """Column name of a task's headline figure: name, unit and direction, e.g. 'Normals mean error (deg) ↓'."""
    metric = TASKS[task].headline
    unit = f" ({metric.unit})" if metric.unit else ""
    return f"{TASKS[task].title} {metric.title}{unit} {'↑' if metric.higher_is_better else '↓'}"


def spread(column: str) -> str:
    """Column name of the sample standard deviation over seeds of another column."""
    return f"{column}, std"


# ---------------------------------------------------------------- records and the groups that may be compared


def collect(folder: Path) -> tuple[list[Found], list[str]]:
    """Every record under a folder, and a line for each JSON file that could not be read as one.

    Raises BenchError where there is no folder or no record.
    """
    advice = "make some with: bench run --methods ours,mtlora --backbone swin_tiny"
    if not folder.is_dir():
        raise BenchError(f"no folder {folder}; {advice}")
    everything = list(scan(folder))
    found = [item for item in everything if isinstance(item, Found)]
    problems = [" ".join(str(item).split()) for item in everything if isinstance(item, BenchError)]
    if not found:
        unreadable = f" ({len(problems)} unreadable, the first: {problems[0]})" if problems else ""
        raise BenchError(f"no record in {folder}{unreadable}; {advice}")
    return found, problems


@dataclass(frozen=True)
class Group:
    """Records that may stand in one table: equal in everything but method and seed.

    `key` is what they have in common, `title` the same for people, `marks` the warnings that go with every table.
    """

    key: Mapping[str, Any]
    title: str
    slug: str
    marks: tuple[str, ...]
    found: tuple[Found, ...]

    @property
    def spec(self) -> RunSpec:
        """The first record's; method and seed are its own, the rest is common to all."""
        return self.found[0].record.spec

    @property
    def random(self) -> bool:
        return self.key["weights_used"] == "random"

    @property
    def trained(self) -> bool:
        return self.spec.steps != 0

    def methods(self) -> list[list[Record]]:
        """The records of each method (its seeds), by family and then title."""
        by_method: dict[str, list[Record]] = {}
        for item in self.found:
            by_method.setdefault(item.record.spec.method, []).append(item.record)
        return sorted(by_method.values(), key=lambda records: _order(records[0]))


def _order(record: Record) -> tuple[int, str, str]:
    family = record.method.family
    rank = FAMILIES.index(family) if family in FAMILIES else len(FAMILIES)
    return rank, record.method.title.lower(), record.spec.method


def groups(found: Iterable[Found]) -> list[Group]:
    """Split records into those that may be compared, ordered by title."""
    buckets: dict[str, list[Found]] = {}
    for item in found:
        buckets.setdefault(json.dumps(_setting(item.record.spec), sort_keys=True), []).append(item)
    made = [
        _group(setting, place, members)
        for setting, items in buckets.items()
        for place, members in _by_place(items).items()
    ]
    # Settings may differ in what no title spells out (an option of the recipe, say): then the slug tells them apart.
    titles = Counter(group.title for group in made)
    named = [
        replace(group, title=f"{group.title} · setting {group.slug[-6:]}") if titles[group.title] > 1 else group
        for group in made
    ]
    return sorted(named, key=lambda group: group.title)


def _setting(spec: RunSpec) -> dict[str, Any]:
    """What the spec says of the comparison. A recipe counts by its content: its names and prose decide nothing."""
    setting = spec.model_dump(mode="json", exclude={"method", "seed", "recipe_name"})
    setting["recipe"] = {key: value for key, value in setting["recipe"].items() if key not in ("title", "source")}
    return setting


Place = tuple[str | None, str | None]  # device and weights as found by the run itself; None where it died before


def _place(record: Record) -> Place:
    seen = record.provenance
    if seen is None:
        return None, None
    cores = f", {seen.cores} cores" if seen.device == "cpu" else ""
    return f"{seen.device} ({seen.device_name}{cores})", weights_of(record) if seen.weights else None


def weights_of(record: Record) -> str:
    """The weights that the run used, by its own account; by its spec's where it died before it loaded any."""
    used = record.provenance and record.provenance.weights
    return f"{used.source} {used.sha256[:12]}".strip() if used else record.spec.weights


def _by_place(items: Sequence[Found]) -> dict[Place, list[Found]]:
    """Split by device and weights. A cell that died before it knew them joins the one place it can belong to."""
    complete = {place for place in map(_place, (item.record for item in items)) if None not in place}
    places: dict[Place, list[Found]] = {}
    for item in items:
        mine = _place(item.record)
        fitting = [p for p in complete if all(a in (None, b) for a, b in zip(mine, p, strict=True))]
        places.setdefault(fitting[0] if len(fitting) == 1 else mine, []).append(item)
    return places


def _group(setting: str, place: Place, members: Sequence[Found]) -> Group:
    spec = members[0].record.spec
    device, weights = place[0] or spec.device, place[1] or spec.weights
    key = json.loads(setting) | {"device_used": device, "weights_used": weights}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:6]
    short = published.short_backbone(spec.backbone)
    kept, marks = _one_each(members)
    if weights == "random":
        marks.insert(0, "RANDOM BACKBONE WEIGHTS, nothing was pretrained: accuracy and Delta-m do not rank the methods")
    return Group(
        key=key,
        title=_title(members, device, weights),
        slug=re.sub(r"[^\w-]", "_", f"{spec.dataset}-{short}-{spec.protocol}-{digest}"),
        marks=(*marks, *_drift(kept)),
        found=tuple(kept),
    )


def _title(members: Sequence[Found], device: str, weights: str) -> str:
    spec = members[0].record.spec
    length = f"{spec.epochs} epochs" if spec.steps is None else f"{spec.steps} steps" if spec.steps else "not trained"
    return " · ".join(filter(None, (
        spec.dataset,
        f"data {spec.data_fingerprint[:8]}" if spec.data_fingerprint else "",
        ", ".join(spec.tasks),
        spec.backbone,
        f"protocol {spec.protocol}",
        f"decoder {spec.decoder}" if spec.decoder else "",
        f"recipe {' = '.join(sorted({item.record.spec.recipe_name for item in members}))}",
        length,
        f"train limited to {spec.limit_train}" if spec.limit_train else "",
        f"val limited to {spec.limit_val}" if spec.limit_val else "",
        f"{spec.image_size[0]}x{spec.image_size[1]}",
        f"batch {spec.batch_size}",
        spec.precision,
        "RANDOM backbone weights" if weights == "random" else f"{weights} weights",
        device,
    )))  # fmt: skip


def _one_each(members: Sequence[Found]) -> tuple[list[Found], list[str]]:
    """One record a method and seed: a cell found twice (merged folders) counts once, the latest good run of it."""
    cells: dict[tuple[str, int], list[Found]] = {}
    for item in members:
        cells.setdefault((item.record.spec.method, item.record.spec.seed), []).append(item)

    def rank(item: Found) -> tuple[bool, str]:
        seen = item.record.provenance
        return item.record.status == "ok", seen.started if seen else ""

    twice = {cell: len(copies) for cell, copies in cells.items() if len(copies) > 1}
    marks = [f"{n} records of {method}, seed {seed}: the latest good one counts" for (method, seed), n in twice.items()]
    return [max(copies, key=rank) for copies in cells.values()], marks


def _drift(found: Sequence[Found]) -> list[str]:
    """Warnings for records that ran on different software; that alone does not keep them apart."""
    seen = [item.record.provenance for item in found if item.record.provenance]
    torch = sorted({p.packages["torch"] for p in seen if "torch" in p.packages})
    commits = sorted({p.commit[:10] for p in seen if p.commit})
    return [
        *([f"rows ran on different torch versions: {', '.join(torch)}"] if len(torch) > 1 else []),
        *([f"rows come from different commits: {', '.join(commits)}"] if len(commits) > 1 else []),
        *(["some rows come from a working tree with uncommitted changes"] if any(p.dirty for p in seen) else []),
    ]


# ---------------------------------------------------------------- Delta-m


@dataclass(frozen=True)
class Baseline:
    """What Delta-m is taken against: task -> headline figure, mean over seeds; or None, and `note` says why."""

    title: str
    figures: Mapping[str, float] | None
    note: str = ""


def has_reference(group: Group, reference: str) -> bool:
    return any(reference in (record.spec.method, record.method.name) for (record, *_) in group.methods())


def baseline(group: Group, reference: str | None = None) -> Baseline:
    """The single-task baseline of the same group, or `reference` (a method expression or name) in its place.

    Raises BenchError where a reference name stands for several methods of the group.
    """
    wanted = reference or BASELINE
    missing = NO_BASELINE if reference is None else f"no {reference} here"
    named = [records for records in group.methods() if records[0].method.name == wanted]
    exact = [records for records in group.methods() if records[0].spec.method == wanted]
    chosen = exact or named
    if len(chosen) > 1:
        several = ", ".join(records[0].spec.method for records in chosen)
        raise BenchError(f"{wanted!r} stands for several methods: {several}; choose one with --reference")
    title = chosen[0][0].method.title if chosen else wanted
    if not group.trained:
        return Baseline(title, None, "efficiency only, not trained")
    if not chosen:
        return Baseline(title, None, missing)
    figures = _figures(group, chosen[0])
    if figures.isna().all(axis=None):
        return Baseline(title, None, f"{missing}: its status is {_status(chosen[0])}")
    return Baseline(title, figures.mean().to_dict())


def check_reference(all_groups: Iterable[Group], reference: str) -> None:
    """Raise BenchError, naming the candidates, unless some group holds the reference."""
    all_groups = list(all_groups)
    if not any(has_reference(group, reference) for group in all_groups):
        known = sorted({record.spec.method for group in all_groups for (record, *_) in group.methods()})
        raise BenchError(f"no record of {reference!r}{did_you_mean(reference, known)}; one of: {', '.join(known)}")


def _delta(figures: Mapping[str, float], against: Baseline) -> tuple[float, str]:
    """Delta-m in percent, or NaN and why."""
    if against.figures is None:
        return float("nan"), against.note
    if any(pd.isna(value) for value in (*figures.values(), *against.figures.values())):
        return float("nan"), "a task has no figure"
    try:
        return delta_m(figures, against.figures), ""
    except ValueError as error:
        return float("nan"), str(error)


# ---------------------------------------------------------------- the two tables


def accuracy_table(group: Group, reference: str | None = None, *, strict: bool = True) -> pd.DataFrame:
    """Table 1: one row a method (mean over its seeds), then the papers' rows of the same methods and backbone.

    `reference` takes the place of the single-task baseline in Delta-m. Raises BenchError where the group does not
    hold it, unless not `strict`: then Delta-m is missing.
    """
    against = _checked(group, reference, strict)
    rows = []
    for records in group.methods():
        figures = _figures(group, records)
        deltas = [_delta(seed, against)[0] for seed in figures.to_dict("records")]
        row = _common(group, records) | _delta_cells(figures, against) | {spread(DELTA): pd.Series(deltas).std()}
        for task in group.spec.tasks:
            row |= {headline(task): figures[task].mean(), spread(headline(task)): figures[task].std()}
        rows.append(row | _parameters(group, records))
    families = {records[0].method.published_row: records[0].method.family for records in group.methods()}
    for printed in published.accuracy_rows(set(families), group.spec.backbone).to_dict("records"):
        metrics = {headline(task): printed[task] for task in group.spec.tasks if task in published.TASKS}
        rows.append(_printed(group, printed, families) | metrics)
    columns = [column for task in group.spec.tasks for column in (headline(task), spread(headline(task)))]
    return _frame(rows, [METHOD, FAMILY, *columns, DELTA, spread(DELTA), DELTA_NOTE, TP, TP_PRINTED])


def efficiency_table(group: Group, reference: str | None = None, *, strict: bool = True) -> pd.DataFrame:
    """Table 2: trainable parameters in millions, memory in GiB, seconds a batch, Delta-m; then the papers' rows.

    Memory is the largest peak over seeds, time is over the samples of all seeds together. Figures of a CPU stand in
    other columns than those of a GPU, and printed ones in columns of their own: the paper's "GB" may not be GiB.
    """
    against = _checked(group, reference, strict)
    rows = [
        _common(group, records)
        | _parameters(group, records)
        | _footprint(group, _counted(records))
        | _delta_cells(_figures(group, records), against)
        for records in group.methods()
    ]
    families = {records[0].method.published_row: records[0].method.family for records in group.methods()}
    for printed in published.efficiency_rows(set(families), group.spec.backbone).to_dict("records"):
        cost = {MEMORY_PRINTED: printed["memory_gb"], TIME_PRINTED: printed["seconds_per_batch"]}
        rows.append(_printed(group, printed, families) | cost)
    columns = (*_footprint(group, []), MEMORY_PRINTED, TIME_PRINTED)
    return _frame(rows, [METHOD, FAMILY, TP, *_SPLIT, TP_PRINTED, *columns, DELTA, DELTA_NOTE])


_SPLIT = {TP_ADAPTATION: "adaptation", TP_BACKBONE: "backbone", TP_DECODER: "decoder"}


def _checked(group: Group, reference: str | None, strict: bool) -> Baseline:
    if reference is not None and strict:
        check_reference([group], reference)
    return baseline(group, reference)


def _frame(rows: list[dict[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """A table with the columns in order; those about printed figures and spread only where something is in them."""
    frame = pd.DataFrame(rows, columns=[*columns, SEEDS, STATUS, NOTE, SOURCE, RECORDS])
    frame[[DELTA_NOTE, NOTE, RECORDS]] = frame[[DELTA_NOTE, NOTE, RECORDS]].fillna("")
    frame[SEEDS] = frame[SEEDS].astype("Int64")  # <NA> for printed rows, which do not say
    optional = [c for c in frame if c in (TP_PRINTED, MEMORY_PRINTED, TIME_PRINTED) or c.endswith(spread(""))]
    return frame.drop(columns=[column for column in optional if frame[column].isna().all()])


def _counted(records: Sequence[Record]) -> list[Record]:
    """The seeds that figures are taken from: the good ones, or all where none is good."""
    return [record for record in records if record.status == "ok"] or list(records)


def _figures(group: Group, records: Sequence[Record]) -> pd.DataFrame:
    """One row a good seed (one of NaN where there is none), one column a task: the headline figures."""
    good = [record for record in records if record.status == "ok"]
    rows = [{t: r.metrics.get(t, {}).get(TASKS[t].headline.key) for t in group.spec.tasks} for r in good] or [{}]
    return pd.DataFrame(rows, columns=list(group.spec.tasks), dtype=float)


def _status(records: Sequence[Record]) -> str:
    return ", ".join(sorted({record.status for record in _counted(records)})).replace("_", " ")


def _common(group: Group, records: Sequence[Record]) -> dict[str, Any]:
    first = records[0].method
    clash = sum(others[0].method.title == first.title for others in group.methods()) > 1
    failed = [record for record in records if record.status != "ok"]
    counted = [record for record in records if record.status == "ok"]
    prefix = f"{len(failed)} of {len(records)} seeds " if counted else ""
    return {
        METHOD: f"{first.title} ({records[0].spec.method})" if clash else first.title,
        FAMILY: first.family,
        SEEDS: len(counted),
        STATUS: _status(records),
        NOTE: prefix + "; ".join(dict.fromkeys(_why(record) for record in failed)) if failed else "",
        SOURCE: f"measured on {group.spec.device_kind}" + ("; random weights" if group.random else ""),
        RECORDS: " ".join(sorted(record.spec.relative_path().stem for record in records)),
    }


def _why(record: Record) -> str:
    """Status and the first line of the error, at most some 100 characters."""
    status = record.status.replace("_", " ")
    if record.failure is None:
        return status
    message = next(iter(record.failure.message.strip().splitlines()), "")
    kind = f"{record.failure.kind}: " if record.status == "failed" else ""  # else the status says it already
    return textwrap.shorten(f"{status}: {kind}{message}", 120, placeholder=" …").rstrip(": ")


def _delta_cells(figures: pd.DataFrame, against: Baseline) -> dict[str, Any]:
    value, note = _delta(figures.mean().to_dict(), against)
    return {DELTA: value, DELTA_NOTE: note}


def _parameters(group: Group, records: Sequence[Record]) -> dict[str, float]:
    """Millions of trainable parameters; beside them the printed count, where it is of the same decoder and backbone."""
    known = next((record.parameters for record in _counted(records) if record.parameters), None)
    comparable = group.spec.protocol == "published" and group.spec.decoder is None
    row = records[0].method.published_row if comparable else None
    counts = {column: getattr(known, name) / 1e6 for column, name in _SPLIT.items()} if known else {}
    return counts | {
        TP: known.trainable / 1e6 if known else float("nan"),
        TP_PRINTED: published.parameters(row, group.spec.backbone),
    }


def _footprint(group: Group, records: Sequence[Record]) -> dict[str, float]:
    """Peak memory in GiB and seconds a batch (median and 90th percentile, linear interpolation)."""
    samples = pd.Series([s for record in records if record.time for s in record.time.samples], dtype=float)
    memory = [record.memory for record in records if record.memory]

    def peak(name: str) -> float:
        return pd.Series([getattr(m, name) for m in memory], dtype=float).max() / GIB

    if group.spec.device_kind == "cpu":
        return {CPU_PROCESS: peak("process_peak"), CPU_MEDIAN: samples.median(), CPU_P90: samples.quantile(0.9)}
    return {
        CUDA_ALLOCATED: peak("peak_allocated"), CUDA_RESERVED: peak("peak_reserved"),
        CUDA_MEDIAN: samples.median(), CUDA_P90: samples.quantile(0.9),
    }  # fmt: skip


def _printed(group: Group, printed: Mapping[str, Any], families: Mapping[str | None, str]) -> dict[str, Any]:
    """What a row of the papers has in both tables."""
    return {
        METHOD: printed["row"],
        FAMILY: families[printed["row"]],
        TP: printed["tp_m"],
        DELTA: printed["delta_m"],
        STATUS: "published",
        SOURCE: published.source(printed, group.spec.dataset),
    }
