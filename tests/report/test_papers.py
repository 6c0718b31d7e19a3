"""Tables of the papers by name, LaTeX and JSON, seeds' statistics, and records that do not belong together."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess

import pandas as pd
import pytest
from rich.console import Console
from scipy import stats
from typer.testing import CliRunner

from bench.cli import app
from bench.errors import BenchError
from bench.recipe import Optimizer
from bench.report import latex, papers, published, render, tables
from bench.report.groups import collect, groups, mixtures
from bench.report.sheets import Cell, Line, Sheet
from tests.report.records import ROWS, make, measured, only, recipe, report

FOUR = {"semseg": 70.0, "human_parts": 60.0, "saliency": 65.0, "normals": 16.0}
SMALL = "swin_small_patch4_window7_224.ms_in1k"


def frame_of(name, folder):
    (bundle,) = papers.bundles(groups(collect(folder)[0]))
    return papers.frame(papers.TABLES[name], bundle)


@pytest.mark.parametrize("name", papers.TABLES)
def test_every_table_has_the_papers_rows_in_their_order_whatever_was_run(tmp_path, name):
    make(tmp_path, "ours", FOUR)
    table = papers.TABLES[name]
    rows = frame_of(name, tmp_path)
    if name != "vmt/1":
        assert rows["row"].tolist() == published.table(table.number, table.source)["row"].tolist()
    assert set(rows["status"]) <= {"ok", "not run"} and len(rows)


def test_measured_figures_stand_beside_the_printed_ones_of_their_row(tmp_path):
    make(tmp_path, "single_task_full", FOUR)
    make(tmp_path, "ours", FOUR | {"semseg": 77.0})
    rows = frame_of("bdta/1", tmp_path).set_index("row")
    ours = rows.loc["Ours"]
    assert (ours["semseg, measured"], ours["semseg, published"]) == (77.0, 74.14)
    assert ours["delta_m, measured"] == pytest.approx(100 * (7 / 70) / 4) and ours["delta_m, published"] == 8.70
    assert ours["tp_m, measured"] == pytest.approx(2.362108)
    assert rows.loc["MTLoRA", "status"] == "not run" and pd.isna(rows.loc["MTLoRA", "semseg, measured"])
    # The VMT paper calls the same row by its own name, and LoRA "Multiple LoRA".
    make(tmp_path, "lora", FOUR)
    other = frame_of("vmt/2", tmp_path).set_index("row")
    assert other.loc["Single-task Full Fine-tuning", "semseg, measured"] == 70.0
    assert other.loc["Multiple LoRA", "semseg, measured"] == 70.0 and other.loc["Shared LoRA", "status"] == "not run"


def test_backbones_share_a_paper_table_and_other_settings_do_not(tmp_path):
    make(tmp_path, "ours", FOUR, device="nvidia-h200")
    make(tmp_path, "ours", FOUR, device="nvidia-h200", backbone=SMALL)
    make(tmp_path, "ours", FOUR, device="nvidia-h200", batch_size=4)
    first, second = sorted(papers.bundles(groups(collect(tmp_path)[0])), key=len, reverse=True)
    assert [len(first), len(second)] == [2, 1]
    rows = papers.frame(papers.TABLES["bdta/2"], first).set_index(["backbone", "row"])
    assert rows.loc[("swin_small", "Ours"), "memory_gb, measured"] == 3.0
    assert rows.loc[("swin_base", "Ours"), "status"] == "not run"
    shown = report_table("bdta/2", tmp_path)
    assert "No single-task row is printed for swin_small, swin_base" in " ".join(shown.split())
    assert shown.count("Table 2, rerun") == 2 and "bench run --suite table2" in shown


def report_table(name, folder, width=120):
    console = Console(file=io.StringIO(), width=width)
    papers.report(name, folder, None, console, as_json=False)
    return console.file.getvalue()


def test_best_and_second_best_measured_figures_are_marked_and_printed_ones_never(tmp_path):
    for method, value in (("ours", 77.0), ("mtlora", 72.0), ("lora", 60.0)):
        make(tmp_path, method, FOUR | {"semseg": value, "normals": value / 4})
    (bundle,) = papers.bundles(groups(collect(tmp_path)[0]))
    table = papers.TABLES["bdta/1"]
    laid_out = papers.sheet(table, papers.frame(table, bundle), bundle)
    cells = {line.cells[0].text.partition(" (")[0]: line.cells for line in laid_out.lines}
    marks = {name: [(c.bold, c.second) for c in cells[name][1:5]] for name in ("Ours", "MTLoRA", "LoRA", "TADFormer")}
    assert marks["Ours"][0] == (True, False) and marks["MTLoRA"][0] == (False, True)
    assert marks["LoRA"][0] == (False, False) and marks["LoRA"][3] == (True, False)  # normals: lower is better
    assert not any(bold or second for bold, second in marks["TADFormer"])
    assert any("one seed" in note for note in laid_out.notes)


def test_a_failed_row_and_a_missing_baseline_say_so(tmp_path):
    make(tmp_path, "mtlora", FOUR, status="out_of_memory", metrics={})
    make(tmp_path, "ours", FOUR)
    shown = " ".join(report_table("bdta/1", tmp_path).split())
    assert "out of memory" in shown and "no single-task baseline" in shown
    assert "NOT COMPARABLE: measured on scenes, printed for PASCAL-Context's four tasks" in shown


def test_a_table_nobody_ran_says_how_to(tmp_path):
    make(tmp_path, "mine", FOUR, title="Mine")
    with pytest.raises(BenchError, match="measures a row of bdta/4; make some with: bench run --suite table4"):
        report_table("bdta/4", tmp_path)
    with pytest.raises(BenchError, match="unknown table 'bdta/9'.*bdta/1, bdta/2"):
        report_table("bdta/9", tmp_path)


def test_intervals_and_paired_p_as_scipy_has_them(tmp_path):
    scores = {"ours": (50.0, 52.0, 51.0), "mtlora": (49.0, 50.5, 49.0), "lora": (40.0, 41.0, 43.0)}
    make(tmp_path, "single_task_full", {"semseg": 45.0, "normals": 20.0})
    for method, values in scores.items():
        for seed, value in enumerate(values):
            make(tmp_path, method, {"semseg": value, "normals": 20.0}, seed=seed)
    rows = measured(tables.accuracy_table(only(tmp_path)))
    for method, values in scores.items():
        low, high = stats.t.interval(0.95, 2, sum(values) / 3, stats.sem(values))
        assert rows.loc[ROWS[method], "SemSeg mIoU (%) ↑, ±95 %"] == pytest.approx((high - low) / 2)
    against_second = stats.ttest_rel(scores["ours"], scores["mtlora"]).pvalue
    against_best = stats.ttest_rel(scores["lora"], scores["ours"]).pvalue
    assert rows.loc["Ours", tables.P_VALUE] == pytest.approx(against_second)
    assert rows.loc["MTLoRA", tables.P_VALUE] == pytest.approx(against_second)
    assert rows.loc["LoRA", tables.P_VALUE] == pytest.approx(against_best)
    assert pd.isna(rows.loc["Single-task full fine-tuning", tables.P_VALUE])  # a lone seed
    shown = report(tmp_path, width=200)
    assert f"{against_second:.3f}" in shown and "uncorrected" in " ".join(shown.split())


def test_equal_seeds_have_no_p(tmp_path):
    assert pd.isna(tables.paired_p({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.0, 1: 1.0, 2: 2.0}))
    assert pd.isna(tables.paired_p({0: 1.0, 1: 2.0}, {0: 0.0, 1: 1.5}))
    assert pd.isna(tables.half_width(pd.Series([1.0])))


def test_second_best_is_underlined_only_where_it_leaves_another_behind(tmp_path):
    for method, value in (("ours", 50.0), ("mtlora", 49.0), ("lora", 40.0)):
        make(tmp_path, method, {"semseg": value})
    report(tmp_path)
    written = (tmp_path / "report" / "report.md").read_text()
    assert "**50.00**" in written and "<ins>49.00</ins>" in written and "<ins>40.00" not in written


def test_why_records_are_apart_and_how_they_can_be_mixed(tmp_path):
    make(tmp_path, "ours", FOUR)
    make(tmp_path, "mtlora", FOUR, batch_size=4, recipe=recipe(optimizer=Optimizer(name="adamw", lr=1e-3)))
    shown = " ".join(report(tmp_path).split())
    assert "Apart from group 1" in shown and "batch_size" in shown and "recipe.optimizer.lr" in shown
    rows = mixed_rows(tmp_path)
    assert any("batch_size 4" in label for label in rows.index) and any("batch_size 8" in label for label in rows.index)
    shown = " ".join(report(tmp_path, mix=True).split())
    assert "MIXED, NOT COMPARABLE: rows differ in batch_size" in shown


def mixed_rows(folder):
    """Rows of the first table that --mix makes, without the papers'."""
    (mixture,) = mixtures(groups(collect(folder)[0]))
    _, _, table, _ = render._mixed_sheets(mixture, None)[0]
    return measured(table)


def test_one_method_in_two_settings_is_two_rows_when_mixed(tmp_path):
    make(tmp_path, "ours", FOUR)
    make(tmp_path, "ours", FOUR | {"semseg": 60.0}, batch_size=4)
    assert sorted(mixed_rows(tmp_path)["SemSeg mIoU (%) ↑"]) == [60.0, 70.0]


def test_mixed_rows_keep_their_own_baseline_backbone_and_weights(tmp_path):
    for batch, base in ((8, 70.0), (4, 35.0)):
        make(tmp_path, "single_task_full", FOUR | {"semseg": base}, batch_size=batch)
        make(tmp_path, "ours", FOUR | {"semseg": 70.0}, batch_size=batch)
    make(tmp_path, "ours", FOUR, weights="random", steps=0, epochs=None)
    rows = mixed_rows(tmp_path)
    delta = {label: row["Delta-m (%)"] for label, row in rows.iterrows() if label.startswith("Ours")}
    assert sorted(value for value in delta.values() if pd.notna(value)) == pytest.approx([0.0, 25.0])
    assert not any("random" in source for source in rows["Source"])  # what was not trained has no accuracy
    shown = report(tmp_path, mix=True, width=200)
    assert "weights_used random" in shown and "weights_used timm" in shown


def test_mixing_what_belongs_together_changes_nothing(tmp_path):
    make(tmp_path, "ours", FOUR)
    make(tmp_path, "mtlora", FOUR)
    (alone,) = groups(collect(tmp_path)[0])
    (mixture,) = mixtures([alone])
    assert (mixture.title, mixture.marks) == (alone.title, alone.marks)
    _, _, table, _ = render._mixed_sheets(mixture, None)[0]
    pd.testing.assert_frame_equal(table, tables.accuracy_table(alone))


def test_random_weights_are_no_row_of_the_papers_pretrained_ones(tmp_path):
    make(tmp_path, "ours", FOUR | {"semseg": 11.0}, weights="random")
    make(tmp_path, "ours", FOUR | {"semseg": 77.0})
    apart = papers.bundles(groups(collect(tmp_path)[0]))
    found = [papers.frame(papers.TABLES["bdta/1"], b).set_index("row").loc["Ours", "semseg, measured"] for b in apart]
    assert sorted(found) == [11.0, 77.0]


def test_delta_m_is_paired_with_the_baseline_of_the_same_seed(tmp_path):
    """Baseline and method rise and fall together: the interval is that of the differences alone."""
    for seed, (base, value) in enumerate(((50.0, 55.0), (40.0, 44.8), (60.0, 66.0))):
        make(tmp_path, "single_task_full", {"semseg": base}, seed=seed)
        make(tmp_path, "ours", {"semseg": value}, seed=seed)
    rows = measured(tables.accuracy_table(only(tmp_path)))
    gains = [10.0, 12.0, 10.0]
    low, high = stats.t.interval(0.95, 2, sum(gains) / 3, stats.sem(gains))
    assert rows.loc["Ours", "Delta-m (%), ±95 %"] == pytest.approx((high - low) / 2)
    assert pd.isna(rows.loc["Single-task full fine-tuning", "Delta-m (%), ±95 %"])
    assert rows.loc["Ours", tables.P_VALUE] == pytest.approx(stats.ttest_1samp(gains, 0).pvalue)
    make(tmp_path, "ours", {"semseg": 58.0}, seed=3)  # which the baseline has not: more is known of the mean alone
    more = measured(tables.accuracy_table(only(tmp_path))).loc["Ours"]
    assert more["Delta-m (%)"] == pytest.approx(100 * ((55 + 44.8 + 66 + 58) / 4 / 50 - 1))
    assert more["Delta-m (%), ±95 %"] == pytest.approx((high - low) / 2)


def test_json_is_the_tables_and_nothing_else(tmp_path):
    make(tmp_path, "ours", FOUR)
    for arguments in ([], ["--table", "bdta/1"]):
        done = CliRunner().invoke(app, ["report", str(tmp_path), "--json", *arguments])
        data = json.loads(done.stdout)["tables"]
        assert done.exit_code == 0 and data[0]["rows"]
    assert (
        CliRunner().invoke(app, ["report", str(tmp_path)]).output.count("unreadable") == 0
    )  # its own JSON is no record


ODD = Sheet(
    ["Method", "Δm %\u00a0↑"],
    [
        Line("multi-task PEFT", False, [Cell("a_b & 50 % {#} [r=2|4] ~ ^ \\ <γ>"), Cell("1.00", "±0.5", bold=True)]),
        Line("", True, [Cell("Ours †(a)"), Cell("2.00", second=True)]),
    ],
    [],
)


def test_latex_is_balanced_and_has_as_many_cells_as_columns():
    text = latex.table(ODD, "50 % of a_b", "one", ["note # 1"])
    bare = re.sub(r"\\[{}&%$#_\\]", "", text)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
    rows = [line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert all(re.sub(r"\\&", "", row).count("&") == 1 for row in rows) and len(rows) == 3
    assert r"\textbf{1.00} $\pm$0.5" in text and r"\underline{2.00}" in text
    assert [text.count(rf"\{e}{{{n}}}") for n in ("table*", "tabular") for e in ("begin", "end")] == [1, 1, 1, 1]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex")
def test_latex_compiles_as_it_is(tmp_path):
    make(tmp_path, "ours[r=2|4]", FOUR)
    make(tmp_path, "mtlora", FOUR, status="failed", metrics={})
    render.report(tmp_path, None, None, Console(file=io.StringIO()))
    (tmp_path / "odd.tex").write_text(latex.document([latex.table(ODD, "a_b", "odd", ["†"])]))
    for file in (tmp_path / "report" / "report.tex", tmp_path / "odd.tex"):
        done = subprocess.run(
            ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", file.name], cwd=file.parent, capture_output=True
        )
        assert done.returncode == 0, done.stdout[-600:]
