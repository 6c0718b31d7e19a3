"""`bench report --table bdta/1`: a table of a paper row by row, what is measured of it beside what is printed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape

from bench.errors import BenchError, did_you_mean
from bench.files import write_atomically
from bench.one_line import errors, say
from bench.record import Record
from bench.report import latex, published, render, tables
from bench.report.groups import Group, by_one_metric, collect, groups
from bench.report.sheets import MISSING, Cell, Letters, Line, Sheet, signed, three, two
from bench.suite import load_suite
from bench.tasks import TASKS

ROW, BACKBONE, PRETRAINING, HEADING, MEASURED, PRINTED = (
    "row", "backbone", "pretraining", "heading", "measured", "published"
)  # fmt: skip
NOT_RUN = "not run"
ACCURACY = (*published.TASKS, "delta_m", "tp_m")


@dataclass(frozen=True)
class PaperTable:
    """`columns` are those of results/published; `heading` the column that the paper's rows are grouped by."""

    source: str
    number: int
    suite: str
    columns: tuple[str, ...]
    heading: str = "family"


TABLES: Mapping[str, PaperTable] = {
    "bdta/1": PaperTable("BDTA+MoTE", 1, "table1", ACCURACY),
    "bdta/2": PaperTable(
        "BDTA+MoTE", 2, "table2", ("tp_m", "memory_gb", "seconds_per_batch", "delta_m"), heading="backbone"
    ),
    "bdta/3": PaperTable("BDTA+MoTE", 3, "table3", ACCURACY, heading="pretraining"),
    "bdta/4": PaperTable("BDTA+MoTE", 4, "table4", ACCURACY),
    "bdta/5": PaperTable("BDTA+MoTE", 5, "table5", ACCURACY),
    "vmt/1": PaperTable("VMT-Adapter", 1, "vmt_table1", ("encoder_m", "passes")),
    "vmt/2": PaperTable("VMT-Adapter", 2, "vmt_table2", ("encoder_m", *ACCURACY)),
    "vmt/3": PaperTable("VMT-Adapter", 3, "vmt_table3", ("encoder_m", *ACCURACY)),
}

HIGHER_IS_BETTER = {task: TASKS[task].headline.higher_is_better for task in published.TASKS} | {"delta_m": True}

# column -> heading and how it is written
COLUMNS = {
    **{task: (f"{TASKS[task].title} {TASKS[task].headline.title} {TASKS[task].headline.unit}", two) for task in TASKS},
    "delta_m": ("Δm %", signed),
    "tp_m": ("#TP M", two),
    "encoder_m": ("encoder M", two),
    "passes": ("passes", lambda n: f"{n:.0f}"),
    "memory_gb": ("memory GiB (GB)", two),
    "seconds_per_batch": ("time s/batch", three),
}


def frame(table: PaperTable, bundle: Sequence[Group]) -> pd.DataFrame:
    """A row a printed row: `X, published` and `X, measured` for every column, why a measured figure is missing, seeds
    and records. `bundle` are groups that differ in backbone and weights alone."""
    rows = []
    for printed in _printed(table):
        row: dict[str, Any] = {
            ROW: printed["row"], BACKBONE: printed["backbone"], PRETRAINING: printed["pretraining"],
            HEADING: printed[table.heading],
        }  # fmt: skip
        row |= {f"{column}, {PRINTED}": printed.get(column, "") for column in table.columns}
        found = _match(printed, bundle)
        row |= _measured(table, *found) if found else {"status": NOT_RUN, "note": ""}
        rows.append(row)
    return pd.DataFrame(rows)


def _printed(table: PaperTable) -> list[dict[str, Any]]:
    if table.number == 1 and table.source == "VMT-Adapter":  # formulas, not figures
        rows = published.formulas().to_dict("records")
        return [
            {
                "row": row["row"], "backbone": "swin_tiny", "pretraining": "", "family": "",
                "encoder_m": row["parameters"], "passes": row["efficiency"],
            }
            for row in rows
        ]  # fmt: skip
    return published.table(table.number, table.source).to_dict("records")


def _match(printed: Mapping[str, Any], bundle: Sequence[Group]) -> tuple[Group, list[Record]] | None:
    """The group and the records that measure a printed row."""
    for group in bundle:
        name = group.spec.backbone
        if published.short_backbone(name) != printed["backbone"]:
            continue
        if printed["pretraining"] and published.pretraining(name) != printed["pretraining"]:
            continue
        for records in group.methods():
            row = records[0].method.published_row
            if row is not None and published.canonical(row) == published.canonical(printed["row"]):
                return group, records
    return None


def _measured(table: PaperTable, group: Group, records: list[Record]) -> dict[str, Any]:
    accuracy = tables.measured_row(group, records, tables.baseline(group))
    cost = tables.cost_row(group, records)
    cpu = group.spec.device_kind == "cpu"
    headlines = {task: tables.headline(group, task) for task in published.TASKS if task in group.spec.tasks}
    values = {
        **{task: accuracy[headlines[task]] if task in headlines else None for task in published.TASKS},
        "delta_m": accuracy[tables.DELTA],
        "tp_m": accuracy.get(tables.TP),
        "encoder_m": accuracy.get(tables.TP, float("nan")) - accuracy.get(tables.TP_DECODER, float("nan")),
        "passes": cost[tables.PASSES],
        "memory_gb": cost[tables.CPU_PROCESS if cpu else tables.CUDA_ALLOCATED],
        "seconds_per_batch": cost[tables.CPU_MEDIAN if cpu else tables.CUDA_MEDIAN],
    }
    intervals = {task: accuracy[tables.interval(column)] for task, column in headlines.items()}
    intervals["delta_m"] = accuracy[tables.interval(tables.DELTA)]
    out: dict[str, Any] = {f"{column}, {MEASURED}": values[column] for column in table.columns}
    out |= {f"{column}, ±95 %": intervals[column] for column in table.columns if column in intervals}
    reasons = [
        accuracy[tables.NOTE],
        accuracy[tables.DELTA_NOTE] if "delta_m" in table.columns else "",
        tables.of_host(records) if "seconds_per_batch" in table.columns else "",
    ]
    return out | {
        "status": accuracy[tables.STATUS], "note": "; ".join(filter(None, reasons)), "seeds": accuracy[tables.SEEDS],
        "records": accuracy[tables.RECORDS],
    }  # fmt: skip


def bundles(all_groups: Sequence[Group]) -> list[list[Group]]:
    """Groups that differ in backbone and its weights alone: the paper's tables put those side by side."""
    apart = ("backbone", "weights", "weights_used")
    made: dict[str, list[Group]] = {}
    for group in all_groups:
        common = {key: value for key, value in group.key.items() if key not in apart} | {"random": group.random}
        made.setdefault(json.dumps(common, sort_keys=True), []).append(group)
    return [by_one_metric(bundle) for bundle in made.values()]


def sheet(table: PaperTable, rows: pd.DataFrame, bundle: Sequence[Group]) -> Sheet:
    letters = Letters()
    lines = []
    ranked = {column: _ranked(rows, column) for column in table.columns} if not bundle[0].random else {}
    for row in rows.to_dict("records"):
        label = row[ROW]
        if row["note"]:
            label = f"{label} ({letters.mark(row['note'])})"
        lines.append(
            Line(row[HEADING], False, [Cell(label), *(_cell(row, column, ranked) for column in table.columns)])
        )
    spec = bundle[0].spec
    where = [f"Upper figures are measured here; those marked {published.MARK} are printed in {_source(table)}."]
    if "seeds" in rows and (rows["seeds"] == 1).any():
        where.append("Measured rows without ± are of one seed: nothing is known of their spread.")
    other = [f"on {spec.dataset}"] if not published.same_dataset(spec.dataset) else []
    other += [f"with the tasks {', '.join(spec.tasks)}"] if set(spec.tasks) != set(published.TASKS) else []
    other += [f"under protocol {spec.protocol}"] if spec.protocol != "published" or spec.decoder else []
    if other and "passes" not in table.columns:
        where.append(
            f"NOT COMPARABLE: measured {', '.join(other)}, printed for PASCAL-Context's four tasks and each paper's "
            "own decoder."
        )
    if spec.device_kind == "cpu" and "memory_gb" in table.columns:
        where.append("Memory and time are of a CPU and the whole process: no stand-in for a GPU's.")
    if "memory_gb" in table.columns:
        where.append('Memory: measured in GiB (2^30 bytes); the paper prints "GB" without saying which.')
    unknown = _without_reference(rows) if "delta_m" in table.columns else []
    if unknown:
        where.append(
            f"No single-task row is printed for {', '.join(unknown)}: against what {published.MARK} Δm is taken there "
            "is not known."
        )
    headers = ["Method", *(COLUMNS[column][0] for column in table.columns)]
    return Sheet(headers, lines, [*(f"({letters.mark(text)}) {text}" for text in letters.texts), *where])


def _without_reference(rows: pd.DataFrame) -> list[str]:
    """Backbones with a printed Delta-m and no printed single-task row, in any table."""
    every = published.load()
    known = {r["backbone"] for r in every.to_dict("records") if published.canonical(r["row"]) == published.BASELINE}
    return [b for b in rows[BACKBONE].drop_duplicates() if b not in known]


def _ranked(rows: pd.DataFrame, column: str) -> dict[str, list[str]]:
    """Backbone -> the best and second best measured figure as written, where they leave another behind."""
    found = {}
    for backbone, own in rows.groupby(BACKBONE, sort=False):
        values = pd.to_numeric(own.get(f"{column}, {MEASURED}", pd.Series(dtype=float)), errors="coerce").dropna()
        ordered = sorted(values, reverse=HIGHER_IS_BETTER.get(column, False))
        written = list(dict.fromkeys(COLUMNS[column][1](value) for value in ordered))
        found[backbone] = written[: 2 if len(written) > 2 else 1] if len(written) > 1 else []
    return found


def _cell(row: Mapping[str, Any], column: str, ranked: Mapping[str, Mapping[str, list[str]]]) -> Cell:
    write = COLUMNS[column][1]
    value, printed = row.get(f"{column}, {MEASURED}"), row[f"{column}, {PRINTED}"]
    figure = printed if isinstance(printed, str) else "" if pd.isna(printed) else write(printed)
    best = ranked.get(column, {}).get(row[BACKBONE], [])
    place = -1
    if value is None or pd.isna(value):
        text = MISSING if row["status"] == "ok" else row["status"]
    else:
        text = write(value)
        place = best.index(text) if text in best and row["status"] == "ok" else -1
        half = row.get(f"{column}, ±95 %")
        text = f"{text} ±{two(half)}" if half is not None and pd.notna(half) else text
    return Cell(text, f"{figure}{published.MARK}" if figure else "", bold=place == 0, second=place == 1)


def _source(table: PaperTable) -> str:
    rows = published.load()
    source = next(s for s in rows["source"] if s.startswith(table.source))
    return f"{source}, Table {table.number}"


def report(name: str, folder: Path, out: Path | None, console: Console, as_json: bool) -> None:
    """Print the named table, once for each set of comparable records; write it as markdown, LaTeX and CSV.

    Raises BenchError for an unknown name, and where no record measures any of its rows.
    """
    if name not in TABLES:
        raise BenchError(f"unknown table {name!r}{did_you_mean(name, TABLES)}; one of: {', '.join(TABLES)}")
    table = TABLES[name]
    again = f"bench run --suite {table.suite}"
    if load_suite(table.suite).settings.steps != 0:  # else it measures efficiency, on no data
        again += " --dataset pascal_context --data-root PASCAL_MT --recipe bdta"
    made = []
    found, problems = collect(folder)
    for problem in problems:
        errors.print(f"left out: {escape(problem)}")
    for bundle in bundles(groups(found)):
        rows = frame(table, bundle)
        if (rows["status"] != NOT_RUN).any():
            made.append((bundle, rows, sheet(table, rows, bundle)))
    if not made:
        raise BenchError(f"no record in {folder} measures a row of {name}; make some with: {again}")
    parts, latex_tables, data, files = [], [], [], {}
    for number, (bundle, rows, laid_out) in enumerate(made, 1):
        caption = f"{_source(table)}, rerun: {setting_of(bundle)}"
        marks = list(dict.fromkeys(mark for group in bundle for mark in group.marks))
        missing = rows["status"].eq(NOT_RUN).sum()
        notes = [*laid_out.notes, *([f"{missing} rows not run; {again}"] if missing else [])]
        if not as_json:
            say(console, f"\n{caption}", "bold")
            for mark in marks:
                say(console, f"! {mark}", "bold red")
            for part in render.rich_tables(laid_out, console.width):
                console.print(part)
            for note in notes:
                say(console, note, "dim")
        parts += [f"## {caption}", *marks, render.markdown_table(laid_out), "\n".join(f"- {note}" for note in notes)]
        latex_tables.append(latex.table(laid_out, caption, f"{name.replace('/', '-')}-{number}", [*marks, *notes]))
        data.append(
            {"table": name, "caption": caption, "marks": marks, "rows": json.loads(rows.to_json(orient="records"))}
        )
        files[f"{name.replace('/', '-')}-{number}.csv"] = rows.to_csv(index=False)
    out = folder / "report" if out is None else out
    stem = name.replace("/", "-")
    files |= {f"{stem}.md": "\n\n".join(parts) + "\n", f"{stem}.tex": latex.document(latex_tables)}
    for file, text in files.items():
        write_atomically(out / file, text)
    if as_json:
        print(json.dumps({"tables": data}, indent=1, ensure_ascii=False))
    else:
        say(console, f"\nwrote {', '.join(files)} to {out}")


def setting_of(bundle: Sequence[Group]) -> str:
    """What the bundle's groups have in common, from their titles."""
    first, *others = (group.title.split(" · ") for group in bundle)
    return " · ".join(part for part in first if all(part in other for other in others))
