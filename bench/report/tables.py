"""The figures of Tables 1 and 2 of a group of records. Pure pandas, no printing.

Number columns stay numeric: a figure that is missing is NaN, and a column beside it says why.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from bench.errors import BenchError, did_you_mean
from bench.record import Record
from bench.report import published
from bench.report.groups import Group
from bench.spec import Tuned
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
PASSES, MACS = "backbone passes an image", "forward (GMAC an image)"
P_VALUE = "p, paired over seeds, against the best other"
RATE, RATE_AT_EDGE = "learning rate", "at the edge of the rates tried"
MEMORY_PRINTED, TIME_PRINTED = "published memory (GB, as printed)", "published time (s/batch)"

BASELINE = "single_task_full"
NO_BASELINE = "no single-task baseline"
GIB = 2**30
HOST_BOUND = "the GPU waits for the host: its time is Python's, a larger batch or another processor changes it"
ENOUGH = 5  # samples for a 90th percentile: of fewer it is hardly another figure than the largest


def headline(group: Group, task: str) -> str:
    """Column name of a task's headline figure: name, unit and direction, e.g. 'Normals mean error (deg) ↓'."""
    metric = group.headlines[task]
    unit = f" ({metric.unit})" if metric.unit else ""
    return f"{TASKS[task].title} {metric.title}{unit} {'↑' if metric.higher_is_better else '↓'}"


def interval(column: str) -> str:
    """Column name of the half width of another column's 95 % confidence interval over seeds (Student's t)."""
    return f"{column}, ±95 %"


def half_width(values: pd.Series) -> float:
    """Of the 95 % confidence interval of the mean; NaN for fewer than two values."""
    values = values.dropna()
    if len(values) < 2:
        return float("nan")
    from scipy.special import stdtrit

    return float(stdtrit(len(values) - 1, 0.975) * values.std() / len(values) ** 0.5)


def paired_p(ours: Mapping[int, float], theirs: Mapping[int, float]) -> float:
    """Two-sided p of the paired t-test over the seeds that both have; NaN for fewer than three of them."""
    shared = sorted(set(ours) & set(theirs))
    differences = pd.Series([ours[seed] - theirs[seed] for seed in shared], dtype=float).dropna()
    if len(differences) < 3 or differences.std() == 0:
        return float("nan")
    from scipy.special import stdtr

    t = differences.mean() / (differences.std() / len(differences) ** 0.5)
    return float(2 * stdtr(len(differences) - 1, -abs(t)))


@dataclass(frozen=True)
class Baseline:
    """What Delta-m is taken against: task -> headline figure, mean over seeds; or None, and `note` says why."""

    title: str
    figures: Mapping[str, float] | None
    note: str = ""
    by_seed: Mapping[int, Mapping[str, float]] = field(default_factory=dict)


def has_reference(group: Group, reference: str) -> bool:
    return any(
        reference in (record.spec.method, record.method.name, *record.method.aliases)
        for (record, *_) in group.methods()
    )


def baseline(group: Group, reference: str | None = None) -> Baseline:
    """The single-task baseline of the same group, or `reference` (a method expression or name) in its place.

    Where the group has several single-task baselines and none is asked for there is none: which of them it is decides
    every Delta-m. Raises BenchError where a reference name stands for several methods of the group.
    """
    wanted = reference or BASELINE
    missing = NO_BASELINE if reference is None else f"no {reference} here"
    named = [records for records in group.methods() if wanted in (records[0].method.name, *records[0].method.aliases)]
    exact = [records for records in group.methods() if records[0].spec.method == wanted]
    chosen = (exact or named) if reference else named
    if len(chosen) > 1:
        several = ", ".join(records[0].spec.method for records in chosen)
        if reference is None:
            return Baseline(wanted, None, f"several single-task baselines, {several}: choose one with --reference")
        raise BenchError(f"{wanted!r} stands for several methods: {several}; choose one with --reference")
    title = chosen[0][0].method.title if chosen else wanted
    if not group.trained:
        return Baseline(title, None, "efficiency only, not trained")
    if not chosen:
        return Baseline(title, None, missing)
    figures = _figures(group, chosen[0])
    if figures.isna().all(axis=None):
        return Baseline(title, None, f"{missing}: its status is {_status(chosen[0])}")
    return Baseline(title, figures.mean().to_dict(), by_seed=figures.to_dict("index"))


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


def accuracy_table(group: Group, reference: str | None = None) -> pd.DataFrame:
    """Table 1: the best constant prediction, one row a method (mean over its seeds), and the papers' rows of the same
    methods and backbone.

    `reference` takes the place of the single-task baseline in Delta-m, which is missing where the group does not hold
    it. Raises BenchError for a name that stands for several methods.
    """
    against = baseline(group, reference)
    rows = floors(group)
    measured = [measured_row(group, records, against) for records in group.methods()]
    by_seed = [_deltas_by_seed(group, records, against) for records in group.methods()]
    for index, row in enumerate(measured):
        # Among those with seeds enough to be compared with.
        others = [i for i, row in enumerate(measured) if i != index and len(by_seed[i]) > 2 and pd.notna(row[DELTA])]
        best = max(others, key=lambda i: measured[i][DELTA], default=None)
        row[P_VALUE] = float("nan") if best is None else paired_p(by_seed[index], by_seed[best])
    rows += measured
    families = {records[0].method.published_row: records[0].method.family for records in group.methods()}
    for printed in published.accuracy_rows(set(families), group.spec.backbone).to_dict("records"):
        metrics = {headline(group, task): printed[task] for task in group.spec.tasks if task in published.TASKS}
        rows.append(_printed(group, printed, families, reference) | metrics)
    columns = [
        column for task in group.spec.tasks for column in (headline(group, task), interval(headline(group, task)))
    ]
    return _frame(rows, [METHOD, FAMILY, *columns, DELTA, interval(DELTA), DELTA_NOTE, P_VALUE, TP, TP_PRINTED])


def measured_row(group: Group, records: Sequence[Record], against: Baseline) -> dict[str, Any]:
    """What a method's records say of accuracy and parameters: means over seeds and their 95 % intervals."""
    figures = _figures(group, records)
    deltas = pd.Series(_deltas_by_seed(group, records, against), dtype=float)
    if (deltas == 0).all():  # the baseline itself
        deltas = deltas[:1]
    row = _common(group, records) | _delta_cells(figures, against) | {interval(DELTA): half_width(deltas)}
    for task in group.spec.tasks:
        row |= {headline(group, task): figures[task].mean(), interval(headline(group, task)): half_width(figures[task])}
    still = sorted({task for record in records if record.status == "ok" for task in not_fallen(record)})
    told = f"the training loss did not fall in {', '.join(TASKS[task].title for task in still)}" if still else ""
    unseeing = _no_better_than_without_the_image(group, figures.mean())
    notes = [row[NOTE], told, unseeing, hinge(figures.mean().to_dict(), against)]
    return row | _parameters(group, records) | {NOTE: "; ".join(filter(None, notes))}


def hinge(figures: Mapping[str, float], against: Baseline, least: float = 0.5) -> str:
    """The task, if there is one, without which Delta-m has the other sign (both at least `least` percent): then the row
    is better or worse than the baseline by that task alone, which may say more of the baseline. Else nothing."""
    value, _ = _delta(figures, against)
    if len(figures) < 3 or pd.isna(value):
        return ""
    for task in figures:
        rest = {other: figure for other, figure in figures.items() if other != task}
        without = delta_m(rest, {other: against.figures[other] for other in rest})
        if without * value < 0 and min(abs(without), abs(value)) >= least:
            return f"without {TASKS[task].title} its Δm would be {without:+.2f}"
    return ""


def not_fallen(record: Record, least: int = 20) -> list[str]:
    """Tasks whose mean training loss over the last tenth of the logged steps is no lower than over the first tenth:
    nothing was learnt of them, or it was lost again. Empty where fewer than `least` steps were logged."""
    history = record.history
    if len(history) < least:
        return []
    part = len(history) // 10

    def mean(entries: Sequence[Mapping[str, float]], task: str) -> float:
        return sum(entry[f"loss/{task}"] for entry in entries) / len(entries)

    return [task for task in record.spec.tasks if mean(history[-part:], task) >= mean(history[:part], task)]


def _deltas_by_seed(group: Group, records: Sequence[Record], against: Baseline) -> dict[int, float]:
    """Each seed's Delta-m against the baseline's run of that seed, for the seeds that both have, so that what they
    share and the baseline's own noise are in the differences. Where those are fewer than two: every seed's against the
    baseline's mean."""
    figures = _figures(group, records)
    shared = [seed for seed in figures.index if seed in against.by_seed]
    found = {}
    for seed, row in zip(figures.index, figures.to_dict("records"), strict=True):
        if len(shared) < 2:
            found[seed] = _delta(row, against)[0]
        elif seed in shared:
            found[seed] = _delta(row, Baseline(against.title, against.by_seed[seed]))[0]
    return found


def floors(group: Group) -> list[dict[str, Any]]:
    """The best predictions on this data that do not look at the image: the best constant, and the best one a pixel. A
    method that does not beat them has learnt nothing of the images."""
    rows = []
    for name, title in (("floor", "Constant prediction"), ("floor_map", "Constant per pixel")):
        found = [floor for item in group.found if (floor := getattr(item.record, name))]
        keys = {task: metric.key for task, metric in group.headlines.items()}
        whole = (floor for floor in found if all(key in floor.get(task, {}) for task, key in keys.items()))
        floor = next(whole, next(iter(found), None))
        if floor:
            metrics = {headline(group, t): floor.get(t, {}).get(group.headlines[t].key) for t in group.spec.tasks}
            about = {METHOD: title, FAMILY: "floor", STATUS: "floor", SOURCE: "measured", TP: 0.0}
            rows.append(about | metrics)
    return rows


def _no_better_than_without_the_image(group: Group, figures: pd.Series) -> str:
    """The tasks in which a method does not beat the better of the two floors, in words; else nothing."""
    told = []
    for task, metric in group.headlines.items():
        known = [floor[headline(group, task)] for floor in floors(group)]
        sign = 1 if metric.higher_is_better else -1
        best = max((sign * value for value in known if value is not None), default=-math.inf)
        if sign * figures[task] <= best:
            told.append(TASKS[task].title)
    return f"no better than a prediction without the image in {', '.join(told)}" if told else ""


def rate_column(rate: float) -> str:
    return f"lr {rate:g}"


def at_edge(tuned: Tuned) -> bool:
    """Whether the smallest or the largest of the rates was chosen: a better one may lie beyond."""
    rates = [each.rate for each in tuned.tried]
    return tuned.rate in (min(rates), max(rates))


def rates_table(group: Group) -> pd.DataFrame | None:
    """Learning rates that each method has tried: the one it was trained with, and the change of all figures
    in percent at each of the others (geometric mean, on held-out training images). None where nothing was tuned.
    """
    rows = []
    for records in group.methods():
        tuned = next((record.tuned for record in _counted(records) if record.tuned), None)
        if tuned is None:
            continue
        best = max((each.score for each in tuned.tried if each.score is not None), default=float("nan"))
        lost = {
            rate_column(each.rate): float("nan") if each.score is None else 100 * math.expm1(each.score - best)
            for each in tuned.tried
        }
        row = _common(group, records) | lost | {RATE: tuned.rate, RATE_AT_EDGE: at_edge(tuned)}
        failed = [f"{each.rate:g}: {each.status.replace('_', ' ')}" for each in tuned.tried if each.status != "ok"]
        scoreless = [f"{each.rate:g}: no score" for each in tuned.tried if each.status == "ok" and each.score is None]
        rows.append(row | {NOTE: "; ".join(filter(None, [row[NOTE], *failed, *scoreless]))})
    return pd.DataFrame(rows) if rows else None


def efficiency_table(group: Group, reference: str | None = None) -> pd.DataFrame:
    """Table 2: trainable parameters in millions, memory in GiB, seconds a batch, Delta-m; then the papers' rows.

    Memory is the largest peak over seeds, time is over the samples of all seeds together. Figures of a CPU stand in
    other columns than those of a GPU, and printed ones in columns of their own: the paper's "GB" may not be GiB.
    """
    against = baseline(group, reference)
    rows = [
        _common(group, records)
        | _parameters(group, records)
        | cost_row(group, records)
        | _delta_cells(_figures(group, records), against)
        for records in group.methods()
    ]
    for row, records in zip(rows, group.methods(), strict=True):
        row[NOTE] = "; ".join(filter(None, [row[NOTE], of_host(records)]))
    families = {records[0].method.published_row: records[0].method.family for records in group.methods()}
    for printed in published.efficiency_rows(set(families), group.spec.backbone).to_dict("records"):
        cost = {MEMORY_PRINTED: printed["memory_gb"], TIME_PRINTED: printed["seconds_per_batch"]}
        rows.append(_printed(group, printed, families, reference) | cost)
    columns = (PASSES, MACS, *_footprint(group, []), MEMORY_PRINTED, TIME_PRINTED)
    return _frame(rows, [METHOD, FAMILY, TP, *_SPLIT, TP_PRINTED, *columns, DELTA, DELTA_NOTE])


_SPLIT = {TP_ADAPTATION: "adaptation", TP_BACKBONE: "backbone", TP_DECODER: "decoder"}


def _frame(rows: list[dict[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """A table with the columns in order; those about printed figures and seeds only where something is in them."""
    frame = pd.DataFrame(rows, columns=[*columns, SEEDS, STATUS, NOTE, SOURCE, RECORDS])
    frame[[DELTA_NOTE, NOTE, RECORDS]] = frame[[DELTA_NOTE, NOTE, RECORDS]].fillna("")
    frame[SEEDS] = frame[SEEDS].astype("Int64")  # <NA> for printed rows, which do not say
    about = (TP_PRINTED, MEMORY_PRINTED, TIME_PRINTED, P_VALUE, PASSES, MACS)
    optional = [c for c in frame if c in about or c.endswith(interval(""))]
    return frame.drop(columns=[column for column in optional if frame[column].isna().all()])


def _counted(records: Sequence[Record]) -> list[Record]:
    """The seeds that figures are taken from: the good ones, or all where none is good."""
    return [record for record in records if record.status == "ok"] or list(records)


def _figures(group: Group, records: Sequence[Record]) -> pd.DataFrame:
    """One row a good seed (one of NaN where there is none), by seed, one column a task: the headline figures."""
    good = [record for record in records if record.status == "ok"]
    keys = {task: group.headlines[task].key for task in group.spec.tasks}
    rows = [{task: r.metrics.get(task, {}).get(key) for task, key in keys.items()} for r in good] or [{}]
    seeds = [record.spec.seed for record in good] or [records[0].spec.seed]
    return pd.DataFrame(rows, index=seeds, columns=list(group.spec.tasks), dtype=float)


def _status(records: Sequence[Record]) -> str:
    return ", ".join(sorted({record.status for record in _counted(records)})).replace("_", " ")


def _common(group: Group, records: Sequence[Record]) -> dict[str, Any]:
    first = records[0].method
    clash = sum(others[0].method.title == first.title for others in group.methods()) > 1
    title = f"{first.title} ({records[0].spec.method})" if clash else first.title
    failed = [record for record in records if record.status != "ok"]
    counted = [record for record in records if record.status == "ok"]
    prefix = f"{len(failed)} of {len(records)} seeds " if counted else ""
    return {
        METHOD: title,
        FAMILY: first.family,
        SEEDS: len(counted),
        STATUS: _status(records),
        NOTE: prefix + "; ".join(dict.fromkeys(_why(record) for record in failed)) if failed else "",
        SOURCE: f"measured on {' and '.join(sorted({record.spec.device_kind for record in records}))}"
        + ("; random weights" if group.random else ""),
        RECORDS: " ".join(sorted(record.spec.relative_path().stem for record in records)),
    }


def _why(record: Record) -> str:
    """Status and the first line of the error, at most some 100 characters."""
    status = record.status.replace("_", " ")
    if record.failure is None:
        return status
    message = next(iter(record.failure.message.strip().splitlines()), "").removeprefix(f"{status}; ")
    told = record.status != "failed" or record.failure.kind in ("BenchError", "MethodError")
    kind = "" if told else f"{record.failure.kind}: "  # elsewhere the status or the message says it already
    return textwrap.shorten(f"{status}: {kind}{message}", 120, placeholder=" …").rstrip(": ")


def _delta_cells(figures: pd.DataFrame, against: Baseline) -> dict[str, Any]:
    value, note = _delta(figures.mean().to_dict(), against)
    return {DELTA: value, DELTA_NOTE: note}


def _parameters(group: Group, records: Sequence[Record]) -> dict[str, float]:
    """Millions of trainable parameters; beside them the printed count, where it is of the same decoder and backbone."""
    known = next((record.parameters for record in _counted(records) if record.parameters), None)
    same_tasks = set(group.spec.tasks) == set(published.TASKS)
    comparable = group.spec.protocol == "published" and group.spec.decoder is None and same_tasks
    row = records[0].method.published_row if comparable else None
    counts = {column: getattr(known, name) / 1e6 for column, name in _SPLIT.items()} if known else {}
    return counts | {
        TP: known.trainable / 1e6 if known else float("nan"),
        TP_PRINTED: published.parameters(row, group.spec.backbone),
    }


def of_host(records: Sequence[Record]) -> str:
    """HOST_BOUND where that is so of a method's records, else nothing."""
    return HOST_BOUND if any(record.time and record.time.host_bound for record in _counted(records)) else ""


def cost_row(group: Group, records: Sequence[Record]) -> dict[str, float]:
    """Work, memory and time of a method's records."""
    return _work(_counted(records)) | _footprint(group, _counted(records))


def _work(records: Sequence[Record]) -> dict[str, float]:
    """Passes of the backbone, and multiply-adds of the training forward by torch's formulas, for one image."""
    passes = next((r.parameters.passes for r in records if r.parameters and r.parameters.passes), float("nan"))
    forward = next((r for r in records if r.estimate and r.estimate.forward), None)
    macs = forward.estimate.forward / 2 / forward.spec.batch_size / 1e9 if forward else float("nan")
    return {PASSES: passes, MACS: macs}


def _footprint(group: Group, records: Sequence[Record]) -> dict[str, float]:
    """Peak memory in GiB and seconds a batch: median, and 90th percentile (linear interpolation) of ENOUGH."""
    samples = pd.Series([s for record in records if record.time for s in record.time.samples], dtype=float)
    memory = [record.memory for record in records if record.memory]

    def peak(name: str) -> float:
        return pd.Series([getattr(m, name) for m in memory], dtype=float).max() / GIB

    p90 = samples.quantile(0.9) if len(samples) >= ENOUGH else float("nan")
    if group.spec.device_kind == "cpu":
        return {CPU_PROCESS: peak("process_peak"), CPU_MEDIAN: samples.median(), CPU_P90: p90}
    return {
        CUDA_ALLOCATED: peak("peak_allocated"), CUDA_RESERVED: peak("peak_reserved"),
        CUDA_MEDIAN: samples.median(), CUDA_P90: p90,
    }  # fmt: skip


def _printed(
    group: Group, printed: Mapping[str, Any], families: Mapping[str | None, str], reference: str | None
) -> dict[str, Any]:
    """What a row of the papers has in both tables. Its Delta-m is against the paper's single-task row: under another
    reference it has none."""
    return {
        METHOD: printed["row"],
        FAMILY: families[printed["row"]],
        TP: printed["tp_m"],
        DELTA: printed["delta_m"] if reference is None else float("nan"),
        DELTA_NOTE: "" if reference is None else "printed against the single-task baseline alone",
        STATUS: "published",
        SOURCE: published.source(printed, group.spec.dataset),
    }
