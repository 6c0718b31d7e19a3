"""Tables on the terminal, in Markdown and in CSV files; and one record, readably.

A table is first laid out as text (`Sheet`), once for the terminal and Markdown alike; the writers only set it.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from bench.errors import BenchError
from bench.record import Record, read, write_atomically
from bench.report import published, tables
from bench.report.tables import Group
from bench.tasks import TASKS

MISSING = "–"
SPACE = "\u00a0"  # never broken: keeps an arrow beside its unit
RANDOM = "random weights"
LABEL_WIDTH = (14, 30)  # characters of the method column: at least, and what is granted before figures are stacked


@dataclass(frozen=True)
class Cell:
    text: str
    under: str = ""  # a second figure: spread, reserved memory, p90
    bold: bool = False


@dataclass(frozen=True)
class Line:
    family: str
    printed: bool  # a row of a paper
    cells: list[Cell]


@dataclass(frozen=True)
class Sheet:
    """A table as text. `headers` has one more entry than a line has cells: the method column comes first."""

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


def two(value: float) -> str:
    return f"{value:.2f}"


def three(value: float) -> str:
    return f"{value:.3f}"


def signed(value: float) -> str:
    return f"{value:+.2f}" if abs(value) >= 0.005 else "0.00"


# ---------------------------------------------------------------- layout


def accuracy_sheet(group: Group, table: pd.DataFrame, against: str) -> Sheet:
    views = []
    for task in group.spec.tasks:
        metric = TASKS[task].headline
        arrow = "↑" if metric.higher_is_better else "↓"
        write = two if metric.unit in ("%", "deg") else three
        column, header = tables.headline(task), f"{TASKS[task].title} {metric.title} {metric.unit}{SPACE}{arrow}"
        better = 1 if metric.higher_is_better else -1
        plus_minus = functools.partial(lambda write, value: f"±{write(value)}", write)
        views.append(View(header, column, write, better, tables.spread(column), plus_minus))
    views += [
        _delta(),
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
    notes = [
        "Memory: the largest peak over seeds of full training steps, in GiB (2^30 bytes). Time: median and 90th "
        "percentile of the steps after the warm-up."
    ]
    if cpu:
        notes.append("CPU memory is the whole process's and CPU time depends on the cores: neither stands for a GPU's.")
    if tables.MEMORY_PRINTED in table:
        notes.append(
            f"{published.MARK} published memory and time are of the authors' GPU, which the paper does not name; it "
            'prints "GB" without saying whether 1e9 or 2^30 bytes.'
        )
    return _sheet(table, [*views, memory, time, _delta(), _seeds()], [*_notes(group, table, against), *notes])


def _delta() -> View:
    return View(f"Δm %{SPACE}↑", tables.DELTA, signed, 1, tables.spread(tables.DELTA), lambda v: f"±{v:.2f}")


def _seeds() -> View:
    return View("seeds", tables.SEEDS, lambda n: str(int(n)))


def _sheet(table: pd.DataFrame, views: Sequence[View], notes: Sequence[str]) -> Sheet:
    """Lay a table out; columns that it does not have are left out."""
    views = [view for view in views if view.key in table or not view.key]
    letters = Letters()
    rows = table.to_dict("records")
    best = {view.key: _best(rows, view) for view in views if view.better}
    lines = [
        Line(row[tables.FAMILY], row[tables.STATUS] == "published", [
            Cell(_label(row, letters)), *(_cell(row, view, best.get(view.key), letters) for view in views),
        ])
        for row in rows
    ]  # fmt: skip
    lettered = [f"({letters.mark(text)}) {text}" for text in letters.texts]
    return Sheet(["Method", *(view.header for view in views)], lines, [*lettered, *notes])


def _best(rows: Sequence[Mapping[str, Any]], view: View) -> str | None:
    """The best figure as written, among the good measured rows; None where there are fewer than two to compare."""
    values = [row[view.key] for row in rows if row[tables.STATUS] == "ok" and pd.notna(row[view.key])]
    return view.write((max if view.better > 0 else min)(values)) if len(values) > 1 else None


def _label(row: Mapping[str, Any], letters: Letters) -> str:
    if row[tables.STATUS] == "published":
        return f"{row[tables.METHOD]} {published.MARK}({letters.mark(row[tables.SOURCE])})"
    words = [RANDOM] if RANDOM in row[tables.SOURCE] else []
    if row[tables.STATUS] != "ok":
        words.append(row[tables.STATUS].upper())
    label = " · ".join([row[tables.METHOD], *words])
    return f"{label} ({letters.mark(row[tables.NOTE])})" if row[tables.NOTE] else label


def _cell(row: Mapping[str, Any], view: View, best: str | None, letters: Letters) -> Cell:
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
    return Cell(text, under, bold=text == best and row[tables.STATUS] == "ok")


def _notes(group: Group, table: pd.DataFrame, against: str) -> list[str]:
    """What both tables need to be read rightly."""
    notes = [f"Δm: mean over tasks of the relative gain (equation 13); {against}."] if group.trained else []
    if group.spec.protocol == "published" and group.spec.decoder is None:
        notes.append("Protocol published: each method has its own paper's decoder; `equal` ranks the methods alone.")
    seeds = table[tables.SEEDS].dropna()
    if (seeds > 1).any():
        notes.append("Figures are means over the seeds; ± is the sample standard deviation.")
    if (seeds == 1).any():
        notes.append("Rows with 1 seed are a single run: nothing is known of their spread.")
    if (table[tables.STATUS] == "published").any():
        other = "" if published.same_dataset(group.spec.dataset) else f"; not comparable with {group.spec.dataset}"
        notes.append(
            f"{published.MARK} published rows are on PASCAL-Context{other}; their Δm is against the paper's "
            "single-task row, over its four tasks."
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


# ---------------------------------------------------------------- writers


def rich_tables(sheet: Sheet, width: int) -> list[Table]:
    """For the terminal: families as headings, printed rows last, dim and in a section of their own.

    Where `width` characters do not hold it, second figures go below the first ones; where that is not enough either,
    the columns are dealt to several tables, the method column in each.
    """
    longest = max(len(line.cells[0].text) for line in sheet.lines)
    least, granted = (min(bound, longest) for bound in LABEL_WIDTH)
    inline = _widths(sheet, " ")
    if granted + sum(inline) + len(inline) <= width:
        return [_rich_table(sheet, range(len(inline)), " ")]
    chunks: list[list[int]] = [[]]
    used = least
    for column, needed in enumerate(_widths(sheet, "\n")):
        if chunks[-1] and used + needed + 1 > width:
            chunks.append([])
            used = least
        chunks[-1].append(column)
        used += needed + 1
    return [_rich_table(sheet, chunk, "\n") for chunk in chunks]


def _widths(sheet: Sheet, between: str) -> list[int]:
    """Characters that each column but the first needs; headers are broken at every space."""
    return [
        max(map(len, [*header.split(" "), *(part for line in sheet.lines for part in _parts(line.cells[i], between))]))
        for i, header in enumerate(sheet.headers[1:], 1)
    ]


def _parts(cell: Cell, between: str) -> list[str]:
    return _joined(cell, between).split("\n")


def _rich_table(sheet: Sheet, columns: Sequence[int], between: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    headers = [header.split(" ") for header in (sheet.headers[1 + column] for column in columns)]
    height = max(map(len, headers))
    table.add_column(Text("\n" * (height - 1) + sheet.headers[0]), overflow="fold")
    for words in headers:
        table.add_column(Text("\n" * (height - len(words)) + "\n".join(words)), justify="right", no_wrap=True)
    heading = None
    for line in sheet.lines:
        title = f"published {published.MARK}" if line.printed else line.family
        if title != heading:
            table.add_section()
            table.add_row(Text(title, style="italic"))
            heading = title
        cells = [line.cells[0], *(line.cells[1 + column] for column in columns)]
        texts = [Text(_joined(cell, between), style="bold" if cell.bold else "") for cell in cells]
        table.add_row(*texts, style="dim" if line.printed else "")
    return table


def markdown_table(sheet: Sheet) -> str:
    """A GitHub table: the best values bold, printed rows in italics."""
    head = [sheet.headers[0], "Family", *sheet.headers[1:]]
    rows = [head, ["---", "---", *["---:"] * len(sheet.headers[1:])]]
    for line in sheet.lines:
        texts = [_escaped(_joined(cell, " ")) for cell in line.cells]
        if line.printed:
            texts = [text if text == MISSING else f"*{text}*" for text in texts]
        texts = [f"**{text}**" if cell.bold else text for text, cell in zip(texts, line.cells, strict=True)]
        rows.append([texts[0], line.family, *texts[1:]])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _joined(cell: Cell, between: str) -> str:
    return f"{cell.text}{between}{cell.under}" if cell.under else cell.text


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, in a table cell or outside."""
    for character in "\\|*<":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def _bullets(texts: Sequence[str]) -> str:
    return "\n".join(f"- {_escaped(text)}" for text in texts)


# ---------------------------------------------------------------- the report


def report(folder: Path, out: Path | None, reference: str | None, console: Console) -> None:
    """Print both tables of every group of records under `folder`; write report.md and a CSV file a table.

    `out` is folder/report where None. Raises BenchError where there is no record, or none of `reference`.
    """
    found, problems = tables.collect(folder)
    all_groups = tables.groups(found)
    if reference is not None:
        tables.check_reference(all_groups, reference)
    out = folder / "report" if out is None else out
    parts = ["# Report", f"{len(found)} records in {len(all_groups)} groups. Only records of one group are comparable."]
    files: dict[str, str] = {}
    for number, group in enumerate(all_groups, 1):
        _say(console, f"\nGroup {number} of {len(all_groups)}: {group.title}", "bold")
        parts.append(f"## Group {number}: {_escaped(group.title)}")
        for mark in group.marks:
            _say(console, f"! {mark}", "bold red")
            parts.append(f"> **{_escaped(mark)}**")
        said: set[str] = set()
        for name, caption, table, sheet in _sheets(group, reference):
            _say(console, f"\n{caption}", "bold")
            for part in rich_tables(sheet, console.width):
                console.print(part)
            # What Table 1 says in general holds for Table 2; letters are each table's own.
            notes = [note for note in sheet.notes if note.startswith("(") or note not in said]
            said.update(notes)
            for note in notes:
                _say(console, note, "dim")
            parts += [f"### {_escaped(caption)}", markdown_table(sheet), _bullets(notes)]
            marks = "; ".join(group.marks)
            files[f"{name}-{group.slug}.csv"] = table.assign(Setting=group.title, Marks=marks).to_csv(index=False)
    if problems:
        title = f"{len(problems)} unreadable {'file' if len(problems) == 1 else 'files'} left out"
        parts += [f"## {title}", _bullets(problems)]
        _say(console, f"\n{title}:", "bold yellow")
        for problem in problems:
            _say(console, f"  {problem}")
    files["report.md"] = "\n\n".join(parts) + "\n"
    for name, text in files.items():
        write_atomically(out / name, text)
    _say(console, f"\nwrote report.md and {len(files) - 1} CSV tables to {out}")


def _sheets(group: Group, reference: str | None) -> list[tuple[str, str, pd.DataFrame, Sheet]]:
    """(file name, caption, table, sheet) of the group's tables; a group that was not trained has no accuracy."""
    against = _against(group, reference)
    suffix = f" (Δm {against})" if reference is not None else ""
    made: list[tuple[str, str, pd.DataFrame, Sheet]] = []
    if group.trained:
        table = tables.accuracy_table(group, reference, strict=False)
        made.append(("table1", f"Table 1. Accuracy{suffix}", table, accuracy_sheet(group, table, against)))
    table = tables.efficiency_table(group, reference, strict=False)
    made.append(("table2", f"Table 2. Efficiency{suffix}", table, efficiency_sheet(group, table, against)))
    return made


def _against(group: Group, reference: str | None) -> str:
    """What Delta-m is taken against, in words."""
    base = tables.baseline(group, reference)
    if reference is not None:
        return f"against {base.title}, NOT the single-task baseline"
    if base.figures is None and group.trained:
        return f"{base.note} in this setting; run the method {tables.BASELINE}, or choose another with --reference"
    return f"against {base.title}"


def _say(console: Console, text: str, style: str = "") -> None:
    """Print plain text: a method expression's [brackets] are no markup."""
    console.print(Text(text, style=style), highlight=False)


# ---------------------------------------------------------------- one record


def show(name: str, folder: Path, console: Console) -> None:
    """Print one record: `name` is a JSON file, or the beginning of a record's hash under `folder`."""
    path = _resolve(name, folder)
    record = read(path)
    for title, pairs in _sections(record).items():
        if pairs:
            _say(console, f"\n{title}", "bold")
            grid = Table.grid("", Column(overflow="fold"), padding=(0, 2))
            for key, value in pairs.items():
                grid.add_row(Text(key), Text(str(value)))
            console.print(grid)
    _say(console, f"\n{path}", "dim")


def _resolve(name: str, folder: Path) -> Path:
    if Path(name).is_file():
        return Path(name)
    if name.endswith(".json") or "/" in name:
        raise BenchError(f"no such file: {name}; give a record's JSON file or the beginning of its hash")
    paths = [path for path in sorted(folder.rglob("*.json")) if name and path.stem.startswith(name)]
    if not paths:
        raise BenchError(f"no record whose hash begins with {name!r} in {folder}; the report's CSV files list them")
    if len(paths) > 1:
        several = ", ".join(str(path.relative_to(folder)) for path in paths[:5])
        raise BenchError(f"{name!r} stands for {len(paths)} records, among them {several}; give more of the name")
    return paths[0]


def _sections(record: Record) -> dict[str, dict[str, Any]]:
    """Title -> what to print. Sizes in GiB, times in seconds, counts in full."""
    random = {"RANDOM WEIGHTS": "nothing was pretrained"} if tables.weights_of(record) == "random" else {}
    metrics = {}
    for task, values in record.metrics.items():
        by_key = {metric.key: metric for metric in TASKS[task].metrics} if task in TASKS else {}
        for key, value in values.items():
            unit = f" {by_key[key].unit}".rstrip() if key in by_key else ""
            metrics[f"{TASKS[task].title if task in TASKS else task} {key}"] = (
                MISSING if value is None else f"{value:.4g}{unit}"
            )
    time = record.time
    seconds = pd.Series(time.samples if time else [], dtype=float)
    return {
        record.method.title: {"status": record.status.replace("_", " "), "family": record.method.family} | random,
        "Failure": _flat(record.failure.model_dump()) if record.failure else {},
        "Cell": _flat(record.spec.model_dump(exclude={"recipe"})),
        "Recipe": _flat(record.spec.recipe.model_dump()),
        "Run on": _flat(record.provenance.model_dump()) if record.provenance else {},
        "Parameters": {k: f"{v:,}" for k, v in record.parameters.model_dump().items()} if record.parameters else {},
        "Memory, GiB": {
            key: value if isinstance(value, str) else f"{value / tables.GIB:.3f}"
            for key, value in (record.memory.model_dump() if record.memory else {}).items()
            if value is not None
        },
        "Time, s/batch": {
            "device": time.device, "median": f"{seconds.median():.4f}", "p90": f"{seconds.quantile(0.9):.4f}",
            "steps": f"{len(seconds)} after {time.warmup} of warm-up", "batch size": time.batch_size,
        } if time else {},
        "Metrics": metrics,
    }  # fmt: skip


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as lines: what is empty is left out, what is nested gets dotted names, sequences their commas."""
    lines: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            lines |= {f"{key}.{inner}": v for inner, v in _flat(value).items()}
        elif value not in ("", None):
            lines[key] = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    return lines
