"""A table laid out as text, once for the terminal and Markdown alike; bench.report.render only sets it."""

from __future__ import annotations

import functools
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from bench.record import Record
from bench.report import published, tables
from bench.report.groups import Group
from bench.tasks import TASKS

MISSING = "–"
SPACE = "\u00a0"  # never broken: keeps an arrow beside its unit
RANDOM = "random weights"


@dataclass(frozen=True)
class Cell:
    text: str
    under: str = ""  # a second figure: spread, reserved memory, p90
    bold: bool = False  # the best of its column
    second: bool = False  # the second best


@dataclass(frozen=True)
class Line:
    family: str
    printed: bool  # a row of a paper
    cells: list[Cell]


@dataclass(frozen=True)
class Sheet:
    """A table as text; the method column comes first, in headers and lines alike."""

    headers: list[str]
    lines: list[Line]
    notes: list[str]


@dataclass(frozen=True)
class View:
    """One shown column: which figure, how it is written, which way is better (0: no best value is marked).

    `under` is the column of the second figure; `printed` that of a paper's figure, shown with its own mark.
    """

    header: str
    key: str
    write: Callable[[float], str]
    better: int = 0
    under: str = ""
    write_under: Callable[[float], str] = str
    printed: str = ""
    write_printed: Callable[[float], str] = str


@dataclass
class Letters:
    """Notes under a table, lettered in the order in which cells first refer to them."""

    texts: list[str] = field(default_factory=list)

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        index = self.texts.index(text)
        return string.ascii_lowercase[index] if index < 26 else str(index)


def one(value: float) -> str:
    return f"{value:.1f}"


def two(value: float) -> str:
    return f"{value:.2f}"


def three(value: float) -> str:
    return f"{value:.3f}"


def signed(value: float) -> str:
    return f"{value:+.2f}" if abs(value) >= 0.005 else "0.00"


def accuracy_sheet(group: Group, table: pd.DataFrame, against: str) -> Sheet:
    views = []
    for task in group.spec.tasks:
        metric = group.headlines[task]
        arrow = "↑" if metric.higher_is_better else "↓"
        write = two if metric.unit in ("%", "deg") else three
        column, header = tables.headline(group, task), f"{TASKS[task].title} {metric.title} {metric.unit}{SPACE}{arrow}"
        # Nothing is marked best where the weights are random: those figures rank nothing.
        better = 0 if group.random else 1 if metric.higher_is_better else -1
        plus_minus = functools.partial(lambda write, value: f"±{write(value)}", write)
        views.append(View(header, column, write, better, tables.interval(column), plus_minus))
    views += [
        replace(_delta(), better=0) if group.random else _delta(),
        View("p paired", tables.P_VALUE, lambda p: "<0.001" if p < 0.001 else f"{p:.3f}"),
        View(f"#TP M{SPACE}↓", tables.TP, two, -1),
        View("publ. #TP M", tables.TP_PRINTED, two),
        _seeds(),
    ]
    return _sheet(table, views, [*_notes(group, table, against), *_normals(group, table)])


def efficiency_sheet(group: Group, table: pd.DataFrame, against: str) -> Sheet:
    cpu = group.spec.device_kind == "cpu"
    split = View("adapt. +backb. +decoder", "", str)
    memory = View(
        f"process memory GiB, CPU{SPACE}↓" if cpu else f"memory GiB (reserved){SPACE}↓",
        tables.CPU_PROCESS if cpu else tables.CUDA_ALLOCATED, two, -1, "" if cpu else tables.CUDA_RESERVED,
        lambda v: f"({v:.2f})", tables.MEMORY_PRINTED, lambda v: f"{v:.2f} GB{published.MARK}",
    )  # fmt: skip
    time = View(
        f"{'CPU ' if cpu else ''}time s/batch (p90){SPACE}↓",
        tables.CPU_MEDIAN if cpu else tables.CUDA_MEDIAN, three, -1, tables.CPU_P90 if cpu else tables.CUDA_P90,
        lambda v: f"({v:.3f})", tables.TIME_PRINTED, lambda v: f"{v:.3f}{published.MARK}",
    )  # fmt: skip
    views = [View(f"#TP M{SPACE}↓", tables.TP, two, -1), split, View("publ. #TP M", tables.TP_PRINTED, two)]
    measures = dict.fromkeys((m.steps, m.warmup) for item in group.found for m in [item.record.spec.recipe.measure])
    told = " or ".join(
        f"{steps} {'step' if steps == 1 else 'steps'} a seed, after {w} of warm-up" for steps, w in measures
    )
    notes = [
        "Memory: the largest peak over seeds of full training steps, in GiB (2^30 bytes). Time: median and 90th "
        f"percentile (of {tables.ENOUGH} or more) of {told}."
    ]
    if cpu:
        notes.append("CPU memory is the whole process's and CPU time depends on the cores: neither stands for a GPU's.")
    if any(item.record.method.name == tables.BASELINE for item in group.found):
        notes.append("Single-task memory and time are of all its models, trained side by side in one process.")
    if tables.MEMORY_PRINTED in table:
        notes.append(
            f"{published.MARK} published memory and time are of the authors' GPU, which the paper does not name; it "
            'prints "GB" without saying whether 1e9 or 2^30 bytes.'
        )
    if tables.MACS in table:
        notes.append(
            "GMAC: multiply-adds of one image's training forward (matrix products, convolutions, attention), counted "
            "and not timed; passes: how often an image goes through a backbone."
        )
    work = [View(f"GMAC (passes){SPACE}↓", tables.MACS, one, -1, tables.PASSES, lambda n: f"({n:.0f})")]
    views = [*views, *work, memory, time, _delta(), _seeds()]
    return _sheet(table, views, [*_notes(group, table, against), *notes])


def rates_sheet(group: Group, table: pd.DataFrame) -> Sheet:
    tuning = group.spec.recipe.tune
    views = [View("chosen", tables.RATE, lambda rate: f"{rate:g}")]
    tried = {each.rate for item in group.found if item.record.tuned for each in item.record.tuned.tried}
    for rate in sorted(tried):
        views.append(View(tables.rate_column(rate), tables.rate_column(rate), signed))
    more = ", some whose best was at the edge others beyond it," if tried > set(tuning.rates) else ""
    notes = [
        f"Each method tried the same {len(tuning.rates)} learning rates{more} for {tuning.length:.0%} of the steps on "
        f"{1 - tuning.holdout:.0%} of the training images. Figures: change of the tasks' metrics in percent against "
        "the chosen rate (geometric mean; negative is worse) on the other training images. The validation split was "
        "not looked at."
    ]
    factor = group.spec.recipe.optimizer.backbone_factor
    if factor != 1 and any(_trained_whole(item.record) for item in group.found):
        notes.append(
            f"A backbone that is trained whole learns at {factor:g} of the rate, unless its row says otherwise."
        )
    factor = group.spec.recipe.optimizer.adaptation_factor
    if factor != 1:
        notes.append(f"What a method adds outside the decoder, or unfreezes, learns at {factor:g} of the rate.")
    return _sheet(table, views, notes)


def _trained_whole(record: Record) -> bool:
    return record.method.family == "fine-tuning" and bool(record.parameters and record.parameters.backbone)


def _delta() -> View:
    return View(f"Δm %{SPACE}↑", tables.DELTA, signed, 1, tables.interval(tables.DELTA), lambda v: f"±{v:.2f}")


def _seeds() -> View:
    return View("seeds", tables.SEEDS, lambda n: str(int(n)))


def _sheet(table: pd.DataFrame, views: Sequence[View], notes: Sequence[str]) -> Sheet:
    """Lay a table out; columns that it does not have are left out."""
    views = [view for view in views if view.key in table or not view.key]
    letters = Letters()
    rows = table.to_dict("records")
    best = {view.key: _best_two(rows, view) for view in views if view.better}
    lines = [
        Line(row[tables.FAMILY], row[tables.STATUS] == "published", [
            Cell(_label(row, letters)), *(_cell(row, view, best.get(view.key, ()), letters) for view in views),
        ])
        for row in rows
    ]  # fmt: skip
    lettered = [f"({letters.mark(text)}) {text}" for text in letters.texts]
    return Sheet(["Method", *(view.header for view in views)], lines, [*lettered, *notes])


def _best_two(rows: Sequence[Mapping[str, Any]], view: View) -> tuple[str, ...]:
    """The best and the second best figure as written, among the good measured rows; the second only where it leaves a
    third behind, nothing where there are fewer than two to compare."""
    values = [row[view.key] for row in rows if row[tables.STATUS] == "ok" and pd.notna(row[view.key])]
    written = list(dict.fromkeys(view.write(value) for value in sorted(values, reverse=view.better > 0)))
    return tuple(written[: 2 if len(written) > 2 else 1]) if len(values) > 1 else ()


def _label(row: Mapping[str, Any], letters: Letters) -> str:
    if row[tables.STATUS] == "published":
        return f"{row[tables.METHOD]} {published.MARK}({letters.mark(row[tables.SOURCE])})"
    words = [RANDOM] if RANDOM in row[tables.SOURCE] else []
    if row[tables.STATUS] not in ("ok", "floor"):
        words.append(row[tables.STATUS].upper())
    label = " · ".join([row[tables.METHOD], *words])
    return f"{label} ({letters.mark(row[tables.NOTE])})" if row[tables.NOTE] else label


def _cell(row: Mapping[str, Any], view: View, best: Sequence[str], letters: Letters) -> Cell:
    if not view.key:
        parts = [row[name] for name in (tables.TP_ADAPTATION, tables.TP_BACKBONE, tables.TP_DECODER)]
        return Cell(MISSING if any(map(pd.isna, parts)) else "+".join(two(part) if part else "0" for part in parts))
    if row[tables.STATUS] == "published" and view.printed in row:
        return Cell(view.write_printed(row[view.printed]))
    value = row[view.key]
    if pd.isna(value):
        reason = row[tables.DELTA_NOTE] if view.key == tables.DELTA else ""
        return Cell(f"{MISSING} ({letters.mark(reason)})" if reason else MISSING)
    text = view.write(value)
    second = row.get(view.under)
    under = view.write_under(second) if second is not None and pd.notna(second) else ""
    good = row[tables.STATUS] == "ok"
    return Cell(text, under, bold=good and text in best[:1], second=good and text in best[1:])


def _notes(group: Group, table: pd.DataFrame, against: str) -> list[str]:
    """What both tables need to be read rightly."""
    notes = [f"Δm: mean over tasks of the relative gain (equation 13); {against}."] if group.trained else []
    if group.spec.protocol == "published" and group.spec.decoder is None:
        notes.append("Protocol published: each method has its own paper's decoder; `equal` ranks the methods alone.")
        names = dict.fromkeys(item.record.spec.backbone.split(".")[0] for item in group.found)
        if new := [name for name in names if not published.has_backbone(name)]:
            notes.append(
                f"No published table has {', '.join(new)}: what the papers do on their backbones is carried over."
            )
    tuned = [record for records in group.methods() for record in records if record.tuned]
    if tuned:
        edge = dict.fromkeys(record.method.title for record in tuned if tables.at_edge(record.tuned))
        alike = "" if len({record.spec.recipe.tune.extend for record in tuned}) > 1 else "alike, "
        beyond = f" At the edge of what was tried, so a better one may lie beyond: {', '.join(edge)}." if edge else ""
        notes.append(
            f"Learning rates were tuned {alike}once for all seeds: the choice is in no interval and in no p.{beyond}"
        )
    seeds = table[tables.SEEDS].dropna()
    if (seeds > 1).any():
        notes.append(
            "Figures are means over the seeds, and Δm is against the baseline's mean over all of its; ± is half of the "
            "mean's 95 % confidence interval (Student's t). Of Δm it is over the seeds that the baseline has too, each "
            "against the baseline's run of that seed; where those are fewer than two, the baseline's own noise is not "
            "in it."
        )
    if tables.P_VALUE in table:
        notes.append("p: two-sided paired t-test over seeds of Δm against the best other row with three; uncorrected.")
    if (seeds == 1).any():
        notes.append("Rows with 1 seed are a single run: nothing is known of their spread.")
    if (table[tables.STATUS] == "published").any():
        has_delta = table.loc[table[tables.STATUS] == "published", tables.DELTA].notna().any()
        other = "" if published.same_dataset(group.spec.dataset) else f"; not comparable with {group.spec.dataset}"
        notes.append(
            f"{published.MARK} published rows are on PASCAL-Context{other}"
            + ("; their Δm is against the paper's single-task row, over its four tasks." if has_delta else ".")
        )
    if tables.TP_PRINTED in table:
        notes.append(
            "publ. #TP: as the paper prints it, for PASCAL-Context's four tasks and class counts; its rows do not "
            "share one decoder."
        )
    return notes


def _normals(group: Group, table: pd.DataFrame) -> list[str]:
    if "normals" not in group.spec.tasks or not (table[tables.STATUS] == "published").any():
        return []
    return [
        f'{published.MARK} The paper heads normals "RMSE"; the code of the methods it compares with computes the mean '
        "angular error under that name, so it stands under mean error here."
    ]
