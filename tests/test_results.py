"""The figures in results/README.md are those of the records beside it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.cli import app

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "results" / "README.md"
UNNAMED = ("Family", "p")  # columns of the report that the page leaves out
REPORTS = shutil.ignore_patterns("report*")  # of an earlier run


@pytest.fixture(scope="module")
def page():
    return PAGE.read_text(encoding="utf-8")


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def tables(text):
    """Every table of accuracies: a list of columns, then the rows."""
    for block in re.findall(r"^(\| Method \|.*\n(?:\|.*\n)+)", text, re.MULTILINE):
        columns, _, *rows = map(cells, block.splitlines())
        yield columns, rows


def in_page_order(columns, rows):
    kept = [index for index, name in enumerate(columns) if name.split(" ")[0] not in UNNAMED]
    return [columns[index] for index in kept], [[row[index] for index in kept] for row in rows]


def test_rows_of_the_tables_are_those_of_the_report(page, tmp_path):
    records = shutil.copytree(ROOT / "results" / "measured", tmp_path, ignore=REPORTS, dirs_exist_ok=True)
    run = CliRunner().invoke(app, ["report", str(records), "--any-device"])
    assert run.exit_code == 0, run.output
    report = (records / "report-any-device" / "report.md").read_text(encoding="utf-8")
    printed = [in_page_order(*table) for table in tables(report)]
    shown = list(tables(page))
    assert len(shown) == 2
    assert all(table in printed for table in shown)


def script(page, kind, capsys, monkeypatch):
    """What the page's script prints for a backbone: {name: values} of its tables."""
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(ROOT)
    found = {}
    exec(compile(code.replace('kind = "vit"', f'kind = "{kind}"'), str(PAGE), "exec"), found)
    capsys.readouterr()
    return found


def number(text):
    return float(text.replace("−", "-").split(" ")[0])


@pytest.mark.parametrize("kind", ["vit", "tf_"])
def test_differences_are_those_of_the_script(page, kind, capsys, monkeypatch):
    found = script(page, kind, capsys, monkeypatch)
    difference, half_width = found["difference"], found["half_width"]
    rows = re.findall(r"^\| ours − decoder-only \|(.*)\|$", page, re.MULTILINE)
    assert len(rows) == 2
    shown = dict(zip(("semseg", "depth", "normals", "edge"), cells(rows[kind == "tf_"]), strict=True))
    for task, cell in shown.items():
        mean, spread = (number(part) for part in cell.split(" ±"))
        digits = len(cell.split(" ")[0].partition(".")[2])
        assert mean == pytest.approx(difference.loc[task].mean(), abs=0.51 * 10**-digits)
        assert spread == pytest.approx(half_width(difference.loc[task]), abs=0.51 * 10**-digits)


def test_changes_in_percent_are_those_of_the_script(page, capsys, monkeypatch):
    found = script(page, "vit", capsys, monkeypatch)
    means, reference = found["means"], found["reference"]
    percent = (100 * (means / reference - 1) * found["signs"]).round(1).drop(reference.name)
    expected = {
        method: tuple(row) for method, row in zip(percent.index, percent[list(found["tasks"])].to_numpy(), strict=True)
    }
    rows = re.findall(r"^\| ([\w\[\]=,]+) \|((?: [+−][\d.]+ \|){4})$", page, re.MULTILINE)
    assert {method: tuple(map(number, cells(row))) for method, row in rows} == expected
