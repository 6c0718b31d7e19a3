"""Tables on the terminal, in Markdown and in CSV files."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.files import write_atomically
from bench.one_line import say
from bench.record import REPORT
from bench.report import latex, published, tables
from bench.report.groups import Group, Mixture, collect, differences, groups, mixtures
from bench.report.sheets import MISSING, Cell, Line, Sheet, accuracy_sheet, efficiency_sheet, rates_sheet

LABEL_WIDTH = (14, 30)  # characters of the method column: at least, and what is granted before figures are stacked


def rich_tables(sheet: Sheet, width: int) -> list[Table]:
    """For the terminal: families as headings, printed rows last, dim and in a section of their own.

    Where `width` characters do not hold it, second figures go below the first ones; where that is not enough either,
    the columns are dealt to several tables, the method column in each.
    """
    longest = max(len(line.cells[0].text) for line in sheet.lines)
    least, granted = (min(bound, longest) for bound in LABEL_WIDTH)
    inline = _widths(sheet, " ")
    if granted + sum(inline) + 2 * len(inline) <= width:
        return [_rich_table(sheet, range(len(inline)), " ")]
    chunks: list[list[int]] = [[]]
    used = least
    for column, needed in enumerate(_widths(sheet, "\n")):
        if chunks[-1] and used + needed + 2 > width:
            chunks.append([])
            used = least
        chunks[-1].append(column)
        used += needed + 2  # the gap between two columns
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
        texts = [
            Text(_joined(cell, between), style="bold" if cell.bold else "underline" if cell.second else "")
            for cell in cells
        ]
        table.add_row(*texts, style="dim" if line.printed else "")
    return table


def markdown_table(sheet: Sheet) -> str:
    """A GitHub table: the best values bold, the second best underlined, printed rows in italics."""
    head = [sheet.headers[0], "Family", *sheet.headers[1:]]
    rows = [head, ["---", "---", *["---:"] * len(sheet.headers[1:])]]
    for line in sheet.lines:
        texts = [_escaped(_joined(cell, " ")) for cell in line.cells]
        if line.printed:
            texts = [text if text == MISSING else f"*{text}*" for text in texts]
        marks = {(True, False): "**{}**", (False, True): "<ins>{}</ins>"}
        texts = [
            marks.get((cell.bold, cell.second), "{}").format(text) for text, cell in zip(texts, line.cells, strict=True)
        ]
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


def report(
    folder: Path,
    out: Path | None,
    reference: str | None,
    console: Console,
    mix: bool = False,
    any_device: bool = False,
) -> None:
    """Print both tables of every group of records under `folder`; write report.md, report.tex, report.json and a CSV
    file a table.

    `out` is folder/report where None; with `mix` records that do not belong together share a table, each row saying how
    it differs; with `any_device` there is accuracy alone, of all devices together. Raises BenchError where there is no
    record, or none of `reference`.
    """
    found, problems = collect(folder)
    apart = groups(found, any_device)
    if reference is not None:
        tables.check_reference(apart, reference)
    all_groups = mixtures(apart) if mix else apart
    out = folder / "report" if out is None else out
    parts = ["# Report", f"{len(found)} records in {len(all_groups)} groups. Only records of one group are comparable."]
    files: dict[str, str] = {}
    latex_tables, data = [], []
    for number, group in enumerate(all_groups, 1):
        say(console, f"\nGroup {number} of {len(all_groups)}: {group.title}", "bold")
        parts.append(f"## Group {number}: {_escaped(group.title)}")
        why = "" if mix else _apart(all_groups[: number - 1], group)
        if why:
            say(console, why, "dim")
            parts.append(_escaped(why))
        for mark in group.marks:
            say(console, f"! {mark}", "bold red")
            parts.append(f"> **{_escaped(mark)}**")
        said: set[str] = set()
        for name, caption, table, sheet in (_mixed_sheets if mix else _sheets)(group, reference):
            say(console, f"\n{caption}", "bold")
            for part in rich_tables(sheet, console.width):
                console.print(part)
            # What Table 1 says in general holds for Table 2; letters are each table's own.
            notes = [note for note in sheet.notes if note.startswith("(") or note not in said]
            said.update(notes)
            for note in notes:
                say(console, note, "dim")
            parts += [f"### {_escaped(caption)}", markdown_table(sheet), _bullets(notes)]
            marks = "; ".join(group.marks)
            latex_tables.append(
                latex.table(  # LaTeX numbers tables itself
                    sheet,
                    f"{re.sub('^Table [0-9]. ', '', caption)}. {group.title}",
                    f"{name}-{number}",
                    [*group.marks, *notes],
                )  # fmt: skip
            )
            rows = json.loads(table.to_json(orient="records", force_ascii=False))
            data.append({"table": name, "caption": caption, "setting": group.title, "marks": group.marks, "rows": rows})
            files[f"{name}-{group.slug}.csv"] = table.assign(Setting=group.title, Marks=marks).to_csv(index=False)
    if problems:
        title = f"{len(problems)} unreadable {'file' if len(problems) == 1 else 'files'} left out"
        parts += [f"## {title}", _bullets(problems)]
        say(console, f"\n{title}:", "bold yellow")
        for problem in problems:
            say(console, f"  {problem}")
    files["report.tex"] = latex.document(latex_tables)
    written = sorted(name for name in files if name.endswith(".csv"))
    content = {"tables": data, "unreadable": problems, "files": written}
    files[REPORT] = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    files["report.md"] = "\n\n".join(parts) + "\n"
    for stale in _tables_of(out / REPORT) - set(files):
        (out / stale).unlink(missing_ok=True)  # of records that are no longer there
    for name, text in files.items():
        write_atomically(out / name, text)
    say(console, f"\nwrote report.md, report.tex, report.json and {len(files) - 3} CSV tables to {out}")


def _tables_of(report: Path) -> set[str]:
    """The tables that an earlier report wrote beside it, by its own account."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        named = json.loads(report.read_text(encoding="utf-8"))["files"]
        return {Path(name).name for name in named if name.endswith(".csv") and (report.parent / name).is_file()}
    return set()


def page(folder: Path, out: Path, reference: str | None, gallery: Sequence[Path], console: Console) -> None:
    """Write out/report.html. Raises BenchError as `report` does, and for a picture that is none."""
    from bench.report import page

    found, problems = collect(folder)
    all_groups = groups(found)
    if reference is not None:
        tables.check_reference(all_groups, reference)
    page.write(all_groups, problems, reference, gallery, out / "report.html")
    for problem in problems:
        say(console, f"left out: {problem}", "yellow")
    say(console, f"wrote {out / 'report.html'}")


def _apart(earlier: Sequence[Group], group: Group) -> str:
    """Why the group is no part of the most similar one before it."""
    if not earlier:
        return ""
    number, reasons = min(
        ((n, differences(group, other)) for n, other in enumerate(earlier, 1)), key=lambda found: len(found[1])
    )
    more = f" and {len(reasons) - 4} more" if len(reasons) > 4 else ""
    return f"Apart from group {number}: {'; '.join(reasons[:4])}{more}. --mix puts them into one table, marked."


def _sheets(group: Group, reference: str | None) -> list[tuple[str, str, pd.DataFrame, Sheet]]:
    """(file name, caption, table, sheet) of the group's tables; a group that was not trained has no accuracy."""
    against = _against(group, reference)
    suffix = f" (Δm {against})" if reference is not None else ""
    made: list[tuple[str, str, pd.DataFrame, Sheet]] = []
    if group.trained:
        table = tables.accuracy_table(group, reference)
        made.append(("table1", f"Table 1. Accuracy{suffix}", table, accuracy_sheet(group, table, against)))
    if not group.any_device:
        table = tables.efficiency_table(group, reference)
        made.append(("table2", f"Table 2. Efficiency{suffix}", table, efficiency_sheet(group, table, against)))
    tuned = tables.rates_table(group)
    if tuned is not None:
        made.append(("rates", "Learning rates", tuned, rates_sheet(group, tuned)))
    return made


def _mixed_sheets(mixture: Mixture, reference: str | None) -> list[tuple[str, str, pd.DataFrame, Sheet]]:
    """The tables of a mixture's groups, one below the other; each row says what is its group's own."""
    frames: dict[str, list[tuple[str, Group, pd.DataFrame]]] = {}
    for group, label in zip(mixture.groups, mixture.labels, strict=True):
        for name, caption, table, _ in _sheets(group, reference):
            if name == "rates" and len(mixture.groups) > 1:  # they belong to one setting
                continue
            if label:
                table = table[table[tables.STATUS] != "published"]
                table = table.assign(**{tables.METHOD: table[tables.METHOD] + f" · {label}"})
            frames.setdefault(name, []).append((caption, group, table))
    made = []
    for name, parts in sorted(frames.items()):
        caption, group, _ = parts[0]
        table = pd.concat([part for *_, part in parts], ignore_index=True)
        against = _against(group, reference)
        if len(parts) > 1 and reference is None:
            against = f"against {tables.BASELINE} of the same setting, where it was run"
        group = replace(group, found=tuple(item for each in mixture.groups for item in each.found))  # for the notes
        if name == "rates":
            sheet = rates_sheet(group, table)
        else:
            sheet = (accuracy_sheet if name == "table1" else efficiency_sheet)(group, table, against)
        if len(parts) > 1:  # rows that are not comparable have no best
            sheet = replace(sheet, lines=[_unranked(line) for line in sheet.lines])
        made.append((name, caption, table, sheet))
    return made


def _unranked(line: Line) -> Line:
    return replace(line, cells=[replace(cell, bold=False, second=False) for cell in line.cells])


def _against(group: Group, reference: str | None) -> str:
    """What Delta-m is taken against, in words."""
    base = tables.baseline(group, reference)
    if reference is not None and not reference.startswith(tables.BASELINE):
        return f"against {base.title}, NOT the single-task baseline"
    if base.figures is None and group.trained:
        if not base.note.startswith(tables.NO_BASELINE):
            return base.note
        return f"{base.note} in this setting; run the method {tables.BASELINE}, or choose another with --reference"
    return f"against {base.title}"
