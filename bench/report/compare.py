"""`bench compare A B`: two folders of records, cell by cell, and whether B is worse than A; a gate for CI.

A figure is worse when it is so by more than a threshold and, where there are samples, by more than their noise.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.record import Record
from bench.report.groups import collect, settings_apart
from bench.tasks import TASKS, headline

Verdict = Literal["worse", "better", "same", "noise", "new", "gone", "unreadable", "other device"]
BAD = ("worse", "gone", "unreadable")  # what a gate does not let through


@dataclass(frozen=True)
class Thresholds:
    """Relative changes that count, as fractions. Parameters may not change at all."""

    memory: float = 0.02
    time: float = 0.10
    metric: float = 0.02


@dataclass(frozen=True)
class Change:
    """One figure of one cell in both folders; `change` is relative, above zero where B's figure is the larger."""

    cell: str
    figure: str
    a: float | None
    b: float | None
    change: float | None
    verdict: Verdict
    why: str = ""


Cells = dict[tuple[str, str], list[Record]]  # (hash, what it is) -> its seeds


def cells(folder: Path) -> tuple[Cells, list[Change]]:
    """The records of a folder, and what is said of files that could not be read: what they held nobody can compare."""
    found: Cells = {}
    readable, problems = collect(folder)
    for item in readable:
        spec = item.record.spec
        length = f"{spec.epochs} epochs" if spec.steps is None else f"{spec.steps} steps"
        size = f"{'x'.join(map(str, spec.image_size))}, batch {spec.batch_size}"
        about = (spec.dataset, spec.protocol, size, length, spec.precision, spec.device)
        parts = (spec.method, spec.backbone, *about, spec.hash)
        name = " · ".join(parts)
        found.setdefault((spec.hash, name), []).append(item.record)
    return found, [Change(str(folder), "record", None, None, None, "unreadable", problem) for problem in problems]


def changes(a: Path, b: Path, thresholds: Thresholds) -> list[Change]:
    """Every figure that both folders have, and every cell that one of them lacks. Raises BenchError for a folder
    without records."""
    (before, unreadable), (after, more) = cells(a), cells(b)
    found = [*unreadable, *more]
    for cell in dict.fromkeys([*before, *after]):
        name = cell[1]
        if cell not in after:
            others = [after[other][0] for other in after if other not in before]
            found.append(Change(name, "record", None, None, None, "gone", _why_gone(before[cell][0], others, b)))
        elif cell not in before:
            found.append(Change(name, "record", None, None, None, "new"))
        else:
            found += _compare(name, before[cell], after[cell], thresholds)
    return found


def _why_gone(record: Record, others: Sequence[Record], folder: Path) -> str:
    """Among cells that are new, the one that is nearest to it may be what became of it: on other data, say."""
    alike = [
        other
        for other in others
        if (other.spec.method, other.spec.backbone) == (record.spec.method, record.spec.backbone)
    ]
    apart = min((settings_apart(other.spec.setting(), record.spec.setting()) for other in alike), key=len, default=[])
    return f"no record of it in {folder}" + (f"; there is one with {apart[0]}" if len(apart) == 1 else "")


def _compare(name: str, before: Sequence[Record], after: Sequence[Record], thresholds: Thresholds) -> Iterator[Change]:
    good = [[record for record in records if record.status == "ok"] for records in (before, after)]
    if not all(good):
        statuses = [sorted({record.status for record in records}) for records in (before, after)]
        was, now = (", ".join(each).replace("_", " ") for each in statuses)
        verdict: Verdict = "worse" if good[0] else "better" if good[1] else "same"
        yield Change(name, "status", None, None, None, verdict, f"{was} -> {now}")
        return
    one, other = good
    yield from _seeds(name, before, after)
    counts = [next((r.parameters.trainable for r in records if r.parameters), None) for records in (one, other)]
    yield from _exact(name, "trainable parameters", *counts)
    shared = {r.spec.seed for r in one} & {r.spec.seed for r in other}
    if shared:  # the same seeds on both sides: what they share is no difference
        one, other = ([r for r in records if r.spec.seed in shared] for records in (one, other))
    devices = [{r.provenance.device_name for r in records if r.provenance} for records in (one, other)]
    if devices[0] != devices[1]:
        names = [", ".join(sorted(each)) for each in devices]
        yield Change(name, "memory, time", None, None, None, "other device", f"{names[0]} -> {names[1]}")
    else:
        yield from _memory(name, one, other, thresholds)
        yield from _time(name, one, other, thresholds)
    yield from _metrics(name, one, other, thresholds)


def _exact(name: str, figure: str, a: int | None, b: int | None) -> Iterator[Change]:
    if a is not None and b is not None:
        verdict: Verdict = "same" if a == b else "worse" if b > a else "better"
        yield Change(name, figure, a, b, b / a - 1 if a else None, verdict)


def _seeds(name: str, before: Sequence[Record], after: Sequence[Record]) -> Iterator[Change]:
    """Seeds that were good and are not any more, or are not there."""
    now = {record.spec.seed: record.status for record in after}
    for record in before:
        status = now.get(record.spec.seed)
        if record.status == "ok" and status != "ok":
            told = status.replace("_", " ") if status else "gone"
            yield Change(name, f"seed {record.spec.seed}", None, None, None, "worse", f"ok -> {told}")


def _lost(name: str, figure: str, a: bool, b: bool) -> Iterator[Change]:
    """A figure that was there and is not any more."""
    if a and not b:
        yield Change(name, figure, None, None, None, "worse", "no figure any more")


def _memory(name: str, one: Sequence[Record], other: Sequence[Record], thresholds: Thresholds) -> Iterator[Change]:
    cuda = one[0].spec.device_kind == "cuda"
    figure = f"{'peak allocated' if cuda else 'process peak'}, bytes"

    def peak(records: Sequence[Record]) -> int | None:
        memories = [record.memory for record in records if record.memory]
        return max(filter(None, (m.peak_allocated if cuda else m.process_peak for m in memories)), default=None)

    before, after = peak(one), peak(other)
    yield from _lost(name, figure, before is not None, after is not None)
    if before is not None and after is not None:
        # A CPU's resident peak holds imports and caches; it moves by some percent by itself.
        threshold = thresholds.memory if cuda else max(thresholds.memory, 0.05)
        yield _relative(name, figure, before, after, threshold, noise=0.0, higher_is_better=False)


def _time(name: str, one: Sequence[Record], other: Sequence[Record], thresholds: Thresholds) -> Iterator[Change]:
    samples = [[s for r in records if r.time for s in r.time.samples] for records in (one, other)]
    yield from _lost(name, "seconds a batch", bool(samples[0]), bool(samples[1]))
    if all(samples):
        medians = [statistics.median(each) for each in samples]
        found = _relative(name, "seconds a batch", *medians, thresholds.time, _noise_of_medians(*samples), False)
        if found.verdict != "same" and any(r.provenance and r.provenance.busy for r in (*one, *other)):
            found = replace(found, verdict="noise", why="measured on a busy machine")
        yield found


def _noise_of_medians(a: Sequence[float], b: Sequence[float]) -> float:
    """Two standard errors of the difference of two medians, by the spread of the middle half of each."""

    def error(samples: Sequence[float]) -> float:
        if len(samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(samples, n=4)
        return 1.2533 * (high - low) / 1.349 / len(samples) ** 0.5

    return 2 * (error(a) ** 2 + error(b) ** 2) ** 0.5


def _metrics(name: str, one: Sequence[Record], other: Sequence[Record], thresholds: Thresholds) -> Iterator[Change]:
    for task in one[0].spec.tasks:
        metric = headline(task, (r.metrics.get(task, {}) for r in (*one, *other) if r.status == "ok"))
        found = [
            {r.spec.seed: v for r in records if (v := r.metrics.get(task, {}).get(metric.key)) is not None}
            for records in (one, other)
        ]
        figure = f"{TASKS[task].title} {metric.title}"
        yield from _lost(name, figure, bool(found[0]), bool(found[1]))
        if all(found):
            means = [statistics.fmean(each.values()) for each in found]
            noise = 2 * _error(*found)
            yield _relative(name, figure, *means, thresholds.metric, noise, metric.higher_is_better)


def _error(one: Mapping[int, float], other: Mapping[int, float]) -> float:
    """Standard error of the difference of the means: over pairs of the same seed where there are two or more."""
    shared = sorted(set(one) & set(other))
    if len(shared) > 1:
        return (statistics.variance([other[seed] - one[seed] for seed in shared]) / len(shared)) ** 0.5
    spread = [statistics.variance(v.values()) / len(v) if len(v) > 1 else 0.0 for v in (one, other)]
    return sum(spread) ** 0.5


def _relative(
    name: str, figure: str, a: float, b: float, threshold: float, noise: float, higher_is_better: bool
) -> Change:
    change = b / a - 1 if a else (0.0 if b == a else float("inf"))
    if abs(change) <= threshold:
        return Change(name, figure, a, b, change, "same")
    if abs(b - a) <= noise:
        return Change(name, figure, a, b, change, "noise", "within two standard errors")
    verdict: Verdict = "better" if (b > a) == higher_is_better else "worse"
    return Change(name, figure, a, b, change, verdict)


def show(found: Sequence[Change], everything: bool, console: Console) -> None:
    shown = [c for c in found if everything or c.verdict not in ("same", "noise")]
    for cell in dict.fromkeys(c.cell for c in shown):
        table = Table(title=escape(cell), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in ("figure", "A", "B", "change", "verdict"):
            table.add_column(column, justify="right" if column in ("A", "B", "change") else "left", overflow="fold")
        for c in shown:
            if c.cell == cell:
                figures = [_written(c.figure, value) for value in (c.a, c.b)]
                moved = "–" if c.change is None else f"{c.change:+.1%}"
                style = {"worse": "red", "better": "green"}.get(c.verdict, "")
                verdict = escape(f"{c.verdict}{f': {c.why}' if c.why else ''}")
                table.add_row(
                    escape(c.figure.removesuffix(", bytes")),
                    *figures,
                    moved,
                    f"[{style}]{verdict}[/]" if style else verdict,
                )
        console.print(table)
    tally = ", ".join(
        f"{sum(c.verdict == v for c in found)} {v}" for v in get_args(Verdict) if any(c.verdict == v for c in found)
    )
    console.print(f"{len({c.cell for c in found})} cells; figures: {tally}")


def _written(figure: str, value: float | None) -> str:
    """In the units of the tables."""
    if value is None:
        return "–"
    if figure.endswith(", bytes"):
        return f"{value / 2**30:.3f} GiB"
    return f"{value / 1e6:.4f} M" if figure == "trainable parameters" else f"{value:.4g}"


def as_json(found: Sequence[Change]) -> str:
    return json.dumps([asdict(c) for c in found], indent=1)
