"""Reports: what may stand in one table, hand-calculated figures, and the marks that must not get lost."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from bench import resources, tasks
from bench.cli import app
from bench.errors import BenchError
from bench.record import Failure, Time
from bench.report import papers, published, render, show, tables
from bench.report.groups import collect, differences
from bench.spec import Tried, Tuned
from methods.registry import all_methods
from tests.report.records import ROWS, groups, make, measured, only, printed, recipe, report

# ---------------------------------------------------------------- published tables


def test_published_spot_checks():
    first = published.table(1).set_index("row")
    assert len(first) == 18
    assert first.loc["Ours", ["semseg", "human_parts", "saliency", "normals"]].tolist() == [74.14, 61.75, 65.69, 14.48]
    assert first.loc["VPT-deep", "delta_m"] == -10.85 and first.loc["HyperFormer", "tp_m"] == 75.32
    assert first.loc["MTLoRA", "decoder"] == "hrnet" and first.loc["LoRA", "decoder"] == "segformer"
    second = published.table(2).set_index(["backbone", "row"])
    assert second.loc[("swin_base", "DiTask"), ["tp_m", "memory_gb", "seconds_per_batch"]].tolist() == [
        5.08,
        24.18,
        0.826,
    ]
    assert second.loc[("swin_small", "Ours"), "memory_gb"] == 10.03
    assert second["semseg"].isna().all() and (second["family"] == "").all()
    third = published.table(3).set_index(["pretraining", "row"])
    assert third.loc[("ImageNet-22k", "Ours"), "delta_m"] == 10.22
    assert published.table(4).set_index("row").loc["Ours, BDTA only", "tp_m"] == 1.96
    assert published.table(5).set_index("row").loc["Ours, T2G only", "normals"] == 14.42
    assert len(published.table(2, "VMT")) == 18 and len(published.table(3, "VMT")) == 9
    assert published.table(2, "VMT").set_index("row").loc["Shared LoRA", "tp_m"] == 2.68


def test_published_metrics_give_the_printed_delta_m():
    """A slip of the typist's would show here; the exceptions are the papers' own."""
    rows = published.load()
    reference = rows.loc[0, list(published.TASKS)].to_dict()
    off = {}
    for row in rows[rows["semseg"].notna()].to_dict("records"):
        value = tasks.delta_m({task: row[task] for task in published.TASKS}, reference)
        if abs(value - row["delta_m"]) > 0.15:
            off[row["source"].partition(",")[0], row["table"], row["row"]] = round(value, 2)
    assert off == {
        ("BDTA+MoTE", 5, "Ours"): 7.84,
        ("VMT-Adapter", 2, "Shared Relative bias"): -7.08,
        ("VMT-Adapter", 2, "Shared Adapter"): -1.83,
        ("VMT-Adapter", 3, "VMT-Adapter rho=8"): 2.79,
        ("VMT-Adapter", 3, "VMT-Adapter-Lite m=6"): 0.4,
    }


def test_rows_that_methods_stand_for_are_printed_ones():
    printed = set(published.load()["row"])
    without = {"mtlora_plus", "progressive"}  # in none of these papers' tables
    rows = {method.name: method.rows(method.options()) for method in all_methods().values()}
    assert {name for name, row in rows.items() if row not in printed} == without


def test_missing_published_folder_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "folder", lambda kind: tmp_path / "nowhere")
    with pytest.raises(BenchError, match="no published tables in .*nowhere"):
        published.load()


def test_backbones_and_datasets_by_their_papers_names():
    assert published.short_backbone("swin_small_patch4_window7_224.ms_in22k") == "swin_small"
    assert published.short_backbone("swinv2_tiny_window8_256") == "swinv2_tiny_window8_256"
    assert published.pretraining("swin_tiny_patch4_window7_224.ms_in22k") == "ImageNet-22k"
    assert published.same_dataset("pascal_context") and not published.same_dataset("scenes")


# ---------------------------------------------------------------- Delta-m


def test_delta_m_by_hand_with_a_lower_is_better_task(tmp_path):
    make(tmp_path, "single_task_full", {"semseg": 40.0, "normals": 20.0})
    make(tmp_path, "ours", {"semseg": 50.0, "normals": 15.0})  # +25 % and, lower being better, +25 %
    make(tmp_path, "mtlora", {"semseg": 44.0, "normals": 24.0})  # +10 % and -20 %
    table = measured(tables.accuracy_table(only(tmp_path)))
    assert table["Delta-m (%)"].to_dict() == pytest.approx(
        {"Single-task full fine-tuning": 0.0, "Ours": 25.0, "MTLoRA": -5.0}
    )
    assert measured(tables.efficiency_table(only(tmp_path)))["Delta-m (%)"]["Ours"] == pytest.approx(25.0)


def test_delta_m_of_the_published_mtlora_row(tmp_path):
    rows = published.table(1).set_index("row")[list(published.TASKS)]
    for method in ("single_task_full", "mtlora"):
        make(tmp_path, method, rows.loc[ROWS[method]].to_dict(), dataset="pascal_context")
    value = measured(tables.accuracy_table(only(tmp_path)))["Delta-m (%)"]["MTLoRA"]
    assert 2.54 <= value <= 2.55


def test_delta_m_is_against_the_mean_of_the_baseline_seeds(tmp_path):
    make(tmp_path, "single_task_full", {"semseg": 30.0}, seed=0)
    make(tmp_path, "single_task_full", {"semseg": 50.0}, seed=1)
    make(tmp_path, "ours", {"semseg": 50.0}, seed=0)
    make(tmp_path, "ours", {"semseg": 54.0}, seed=1)
    row = measured(tables.accuracy_table(only(tmp_path))).loc["Ours"]
    assert row["SemSeg mIoU (%) ↑"] == 52.0 and row["Seeds"] == 2
    assert row["SemSeg mIoU (%) ↑, ±95 %"] == pytest.approx(12.706205 * 8**0.5 / 2**0.5)
    assert row["Delta-m (%)"] == pytest.approx(30.0)
    gains = pd.Series([100 * 20 / 30, 100 * 4 / 50])  # seed by seed
    assert row["Delta-m (%), ±95 %"] == pytest.approx(12.706205 * gains.std() / 2**0.5)


def test_missing_baseline_is_said_and_stays_numeric(tmp_path):
    make(tmp_path, "ours")
    table = tables.accuracy_table(only(tmp_path))
    assert pd.api.types.is_float_dtype(table["Delta-m (%)"])
    assert measured(table).loc["Ours", "Delta-m note"] == "no single-task baseline"
    assert "– (a)" in report(tmp_path) and "(a) no single-task baseline" in report(tmp_path)


def test_a_failed_baseline_is_no_baseline(tmp_path):
    make(tmp_path, "ours")
    make(tmp_path, "single_task_full", status="diverged", metrics={})
    note = measured(tables.accuracy_table(only(tmp_path))).loc["Ours", "Delta-m note"]
    assert note == "no single-task baseline: its status is diverged"


def test_a_zero_baseline_figure_is_missing_not_infinite(tmp_path):
    make(tmp_path, "single_task_full", {"semseg": 0.0})
    make(tmp_path, "ours", {"semseg": 50.0})
    row = measured(tables.accuracy_table(only(tmp_path))).loc["Ours"]
    assert pd.isna(row["Delta-m (%)"]) and "zero" in row["Delta-m note"]


def test_another_reference_is_marked(tmp_path):
    make(tmp_path, "mtlora", {"semseg": 40.0})
    make(tmp_path, "ours", {"semseg": 50.0})
    assert measured(tables.accuracy_table(only(tmp_path), "mtlora"))["Delta-m (%)"]["Ours"] == pytest.approx(25.0)
    mark = "against MTLoRA, NOT the single-task baseline"
    assert mark in report(tmp_path, "mtlora") and mark in (tmp_path / "report/report.md").read_text()
    assert "NOT the single-task" not in report(tmp_path)


def test_of_several_single_task_baselines_none_is_taken_unasked(tmp_path):
    make(tmp_path, "single_task_full", {"semseg": 50.0})
    make(tmp_path, "single_task_full[backbone_factor=0.1]", {"semseg": 40.0})
    make(tmp_path, "ours", {"semseg": 55.0})
    row = measured(tables.accuracy_table(only(tmp_path))).loc["Ours"]
    assert pd.isna(row["Delta-m (%)"]) and "several single-task baselines" in row["Delta-m note"]
    assert "choose one with --reference" in " ".join(report(tmp_path).split())
    for reference, gain in (("single_task_full", 10.0), ("single_task_full[backbone_factor=0.1]", 37.5)):
        row = measured(tables.accuracy_table(only(tmp_path), reference)).loc["Ours"]
        assert row["Delta-m (%)"] == pytest.approx(gain)
        assert "NOT the single-task" not in report(tmp_path, reference)


def test_unknown_or_ambiguous_reference_names_the_candidates(tmp_path):
    make(tmp_path, "ours[r=2]")
    make(tmp_path, "ours[r=8]")
    with pytest.raises(BenchError, match=r"no record of 'mtlora'.*ours\[r=2\], ours\[r=8\]"):
        tables.check_reference([only(tmp_path)], "mtlora")
    with pytest.raises(BenchError, match=r"no record of 'mtlora'"):
        report(tmp_path, "mtlora")
    with pytest.raises(BenchError, match=r"several methods: ours\[r=2\], ours\[r=8\]"):
        tables.accuracy_table(only(tmp_path), "ours")
    assert measured(tables.accuracy_table(only(tmp_path), "ours[r=2]"))["Delta-m (%)"].tolist() == [0.0, 0.0]


def test_a_reference_of_one_group_does_not_fall_back_to_the_baseline_in_another(tmp_path):
    make(tmp_path, "mtlora")
    for method in ("ours", "single_task_full"):
        make(tmp_path, method, precision="bf16")
    assert "no mtlora here" in report(tmp_path, "mtlora")


# ---------------------------------------------------------------- groups


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "bf16"}, {"dataset": "other"}, {"data_fingerprint": "0"}, {"backbone": "vit_tiny"},
        {"protocol": "equal"}, {"decoder": "hrnet"}, {"recipe": recipe(clip_norm=1.0)}, {"image_size": (64, 64)},
        {"batch_size": 4}, {"epochs": 11}, {"steps": 0, "epochs": None}, {"weights": "random"}, {"limit_train": 9},
        {"limit_val": 3}, {"device": "nvidia-h200"}, {"device_name": "Another CPU"}, {"figures": {"semseg": 1.0}},
    ],
)  # fmt: skip
def test_what_differs_never_shares_a_table(tmp_path, change):
    make(tmp_path, "ours")
    make(tmp_path, "mtlora", **change)
    split = groups(tmp_path)
    assert [len(group.found) for group in split] == [1, 1]
    assert split[0].title != split[1].title and split[0].slug != split[1].slug
    assert {len(measured(tables.efficiency_table(group))) for group in split} == {1}


def test_a_table_of_data_that_were_corrected_since_says_so(tmp_path):
    """The older of two that differ in their data alone, and one without a date; not what differs in more."""

    def run(day, **changes):
        path = make(tmp_path, **changes)
        content = json.loads(path.read_text())
        content["provenance"]["started"] = day and f"2026-11-{day}T10:00:00+00:00"
        path.write_text(json.dumps(content))

    run("02", data_fingerprint="0ld")
    run("03", data_fingerprint="0ld", method="mtlora")
    run("05", data_fingerprint="new")
    run("01", data_fingerprint="new", method="mtlora")
    run("09", data_fingerprint="other", batch_size=4)
    run("", data_fingerprint="undated")
    run("08", data_fingerprint="failed", status="failed")  # nothing was measured on these
    told = {g.spec.data_fingerprint: [mark for mark in g.marks if "OLDER" in mark] for g in groups(tmp_path)}
    mark = ["OLDER DATA: the same settings were run later on data new"]
    assert told == {"0ld": mark, "new": [], "other": [], "undated": mark, "failed": mark}


def edges(out, method, figures, **changes):
    return make(
        out, method, {"semseg": 50.0, "edge": 1.0}, metrics={"semseg": {"mIoU": 50.0}, "edge": figures}, **changes
    )


def test_a_metric_that_older_records_lack(tmp_path):
    """odsF where all have it; else what all have, by its own name, in every row and in Delta-m alike."""
    both = {"ods_f": 40.0, "max_f": 20.0}
    edges(tmp_path / "new", "ours", both, floor={"edge": {"ods_f": 4.0, "max_f": 2.0}})
    edges(tmp_path / "new", "single_task_full", {"ods_f": 50.0, "max_f": 16.0})
    table = measured(tables.accuracy_table(only(tmp_path / "new")))
    assert table["Edge odsF (%) ↑"].tolist() == [4.0, 50.0, 40.0]
    assert table[tables.DELTA].tolist()[1:] == pytest.approx([0, -10])
    assert not any("odsF" in mark for mark in only(tmp_path / "new").marks)

    for folder, marked in (("mixed", True), ("old", False)):
        floor = {"edge": {"ods_f": 4.0, "max_f": 2.0} if marked else {"max_f": 2.0}}
        edges(tmp_path / folder, "ours", both if marked else {"max_f": 20.0}, floor=floor)
        edges(tmp_path / folder, "single_task_full", {"max_f": 16.0})
        edges(tmp_path / folder, "mtlora", {}, status="failed", failure=Failure(kind="Error", message="died"))
        group = only(tmp_path / folder)
        table = measured(tables.accuracy_table(group))
        assert "Edge odsF (%) ↑" not in table
        column = table["Edge max F, pixelwise (%) ↑"]
        assert column.dropna().tolist() == [2.0, 16.0, 20.0] and table[tables.DELTA].max() == pytest.approx(12.5)
        told = ["Edge is told by max F, pixelwise: 1 of 2 records have no odsF"] if marked else []
        assert [mark for mark in group.marks if "odsF" in mark] == told
        assert CliRunner().invoke(app, ["report", str(tmp_path / folder), "--html"]).exit_code == 0
        text = (tmp_path / folder / "report" / "report.html").read_text()
        assert "Edge max F, pixelwise % " in text and "Edge odsF % " not in text


def test_mixed_groups_tell_a_task_by_one_metric(tmp_path):
    """A new group beside an older one: max F in all rows and in each Delta-m, and a mark that says so."""
    for size, figures in (
        (64, [{"ods_f": 40.0, "max_f": 20.0}, {"max_f": 16.0}]),
        (96, [{"ods_f": 40.0, "max_f": 24.0}] * 2),
    ):
        for method, each in zip(("ours", "single_task_full"), figures, strict=True):
            edges(tmp_path, method, each, image_size=(size, size), floor={"edge": {**each, "max_f": 2.0}})
    shown = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["report", str(tmp_path), "--mix"]).output
    told = "Edge is told by max F, pixelwise: 1 of 4 records have no odsF"
    assert told in shown and all(told in line for line in shown.splitlines() if "odsF" in line)
    for row, figures in (("ours · .*64", "20.00"), ("ours · .*96", "24.00"), ("Single-task .*96", "24.00")):
        assert re.search(f"{row}.* {figures} ", shown, re.I), (row, shown)
    apart = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["report", str(tmp_path)]).output
    assert "Edge is told by max F, pixelwise: 1 of 2 records have no odsF" in apart and told not in apart


def test_backbones_side_by_side_tell_a_task_by_one_metric(tmp_path):
    edges(tmp_path, "ours", {"max_f": 20.0})
    edges(tmp_path, "ours", {"ods_f": 40.0, "max_f": 24.0}, backbone="resnet18.a1_in1k")
    apart = groups(tmp_path)
    assert {group.headlines["edge"].key for group in apart} == {"max_f", "ods_f"}
    (bundle,) = papers.bundles(apart)
    assert [group.headlines["edge"].key for group in bundle] == ["max_f", "max_f"]


def test_a_floor_that_has_the_metric_is_taken(tmp_path):
    """An older record's floor, of a run that came to nothing else, has none of odsF."""
    edges(tmp_path, "bitfit", {}, status="failed", failure=Failure(kind="Error", message="died"),
          floor={"edge": {"max_f": 2.0}, "semseg": {"mIoU": 1.0}})  # fmt: skip
    edges(tmp_path, "ours", {"ods_f": 40.0}, floor={"edge": {"ods_f": 4.0}, "semseg": {"mIoU": 1.0}})
    assert measured(tables.accuracy_table(only(tmp_path)))["Edge odsF (%) ↑"].dropna().tolist() == [4.0, 40.0]


def test_a_metric_takes_another_ones_place_where_all_records_have_it_and_it_has_the_same_direction():
    def chosen(task, *figures):
        return tasks.headline(task, figures).key

    assert chosen("normals", {"within_30": 50.0}) == chosen("normals") == "mean_error"  # lower is better, within_30 not
    assert chosen("normals", {"rmse": 30.0, "within_30": 50.0}) == "rmse"
    assert chosen("edge", {"max_f": 1.0}, {"ods_f": 2.0, "max_f": 1.0}, {}) == "max_f"
    assert chosen("edge", {"ods_f": None, "max_f": 1.0}) == "ods_f"  # measured, and came to nothing
    assert chosen("edge", {"max_f": 1.0}, {"ods_f": 1.0}) == "ods_f"  # none is common to both


def test_names_of_a_recipe_do_not_split(tmp_path):
    make(tmp_path, "ours")
    make(tmp_path, "mtlora", recipe=recipe(title="The same in other words"), recipe_name="mine")
    assert "recipe mine = quick" in only(tmp_path).title


def test_a_cell_that_died_early_joins_its_group_unless_two_fit(tmp_path):
    make(tmp_path, "ours")
    make(tmp_path, "mtlora", status="failed", provenance=None, parameters=None, metrics={})
    assert len(only(tmp_path).found) == 2
    make(tmp_path, "lora", device_name="Another CPU")
    assert sorted(len(group.found) for group in groups(tmp_path)) == [1, 1, 1]


def test_accuracy_of_several_devices_in_one_table(tmp_path):
    """With --any-device, seeds and baseline of all of them together; what is of one device stays out."""
    make(tmp_path, "single_task_full", {"semseg": 50.0, "normals": 20.0}, device_name="Some CPU")
    make(tmp_path, "ours", {"semseg": 54.0, "normals": 20.0}, device_name="Another CPU")
    make(tmp_path, "ours", {"semseg": 56.0, "normals": 20.0}, seed=1, device="nvidia-h200")
    make(tmp_path, "ours", steps=0, epochs=None)
    assert sorted(len(group.found) for group in groups(tmp_path)) == [1, 1, 1, 1]
    (group,) = groups(tmp_path, any_device=True)
    row = measured(tables.accuracy_table(group)).loc["Ours"]
    assert row["SemSeg mIoU (%) ↑"] == 55 and row["Seeds"] == 2 and row["Delta-m (%)"] == pytest.approx(5)
    assert row["Source"] == "measured on cpu and cuda"
    assert group.marks[0].startswith("rows ran on 3 devices") and "NVIDIA H200" in group.title
    shown = report(tmp_path, any_device=True)
    assert "Table 1" in shown and "Table 2" not in shown and "s/batch" not in shown and "Group 1 of 1" in shown
    assert not list((tmp_path / "report").glob("table2-*.csv"))


def test_what_else_differs_stays_apart_on_any_device(tmp_path):
    make(tmp_path, "ours", device_name="Some CPU")
    make(tmp_path, "mtlora", device_name="Another CPU", precision="bf16")
    make(tmp_path, "lora", device_name="A third CPU", weights="random")
    assert [len(group.found) for group in groups(tmp_path, any_device=True)] == [1, 1, 1]


def test_any_device_needs_something_trained(tmp_path):
    make(tmp_path, "ours", steps=0, epochs=None)
    done = CliRunner().invoke(app, ["report", str(tmp_path), "--any-device"])
    assert done.exit_code == 2 and "no record was trained" in " ".join(done.output.split())
    for option in ("--mix", "--html"):
        done = CliRunner().invoke(app, ["report", str(tmp_path), "--any-device", option])
        assert done.exit_code == 2 and "leave --mix and --html out" in " ".join(done.output.split())


def test_a_cell_found_twice_counts_once(tmp_path):
    make(tmp_path / "a", "ours", {"semseg": 50.0})
    make(tmp_path / "b", "ours", {}, tasks=("semseg",), status="interrupted")
    group = only(tmp_path)
    assert measured(tables.accuracy_table(group)).loc["Ours", ["Seeds", "Status"]].tolist() == [1, "ok"]
    assert group.marks == ("2 records of ours, seed 0: the latest good one counts",)


def test_rows_are_ordered_by_family_and_title(tmp_path):
    for method in ("ours", "mtlora", "lora", "single_task_full"):
        make(tmp_path, method)
    table = tables.accuracy_table(only(tmp_path))
    assert list(measured(table).index) == ["Single-task full fine-tuning", "LoRA", "MTLoRA", "Ours"]
    assert table["Status"].tolist() == ["ok"] * 4 + ["published"] * (len(table) - 4)


# ---------------------------------------------------------------- figures and marks


def test_time_memory_and_parameters_by_hand(tmp_path):
    make(tmp_path, "ours", device="nvidia-h200")
    row = measured(tables.efficiency_table(only(tmp_path))).loc["Ours"]
    assert row["time, median (s/batch)"] == 5.5  # of 1 ... 10
    assert row["time, p90 (s/batch)"] == pytest.approx(9.1)
    assert row["memory, peak allocated (GiB)"] == 3 and row["memory, peak reserved (GiB)"] == 4
    assert row[["#TP (M)", "adaptation (M)", "backbone (M)", "decoder (M)"]].tolist() == [
        2.362108,
        2.194076,
        0,
        0.168032,
    ]


def test_cpu_figures_stand_under_other_headers(tmp_path):
    make(tmp_path, "ours")
    table = tables.efficiency_table(only(tmp_path))
    assert measured(table).loc["Ours", "process memory (GiB, CPU)"] == 5
    assert measured(table).loc["Ours", "CPU time, median (s/batch)"] == 5.5
    assert not any(column.startswith(("memory", "time")) for column in table)
    assert "Source" in table and measured(table).loc["Ours", "Source"] == "measured on cpu"


def test_failed_cells_are_rows_with_the_figures_that_exist(tmp_path):
    make(tmp_path, "ours")
    failure = Failure(kind="OutOfMemoryError", message="CUDA out of memory.\nlong story", traceback="...")
    make(tmp_path, "mtlora", status="out_of_memory", failure=failure, metrics={}, memory=None, time=None)
    row = measured(tables.accuracy_table(only(tmp_path))).loc["MTLoRA"]
    assert (row["Status"], row["Note"], row["Seeds"]) == ("out of memory", "out of memory: CUDA out of memory.", 0)
    assert pd.isna(row["SemSeg mIoU (%) ↑"]) and row["#TP (M)"] == 2.362108
    shown = report(tmp_path, width=140)
    assert "MTLoRA · OUT OF MEMORY (" in shown and "long story" not in shown


def test_a_failed_seed_is_told_and_not_averaged(tmp_path):
    make(tmp_path, "ours", {"semseg": 50.0}, seed=0)
    make(tmp_path, "ours", {"semseg": 0.0}, seed=1, status="diverged")
    row = measured(tables.accuracy_table(only(tmp_path))).loc["Ours"]
    assert (row["SemSeg mIoU (%) ↑"], row["Seeds"], row["Note"]) == (50.0, 1, "1 of 2 seeds diverged")


@pytest.mark.parametrize(
    ("depth", "told"),
    # Semantic segmentation and normals are 2 % worse; Δm is the mean of that, twice, and the gain in depth.
    [
        (0.9, "without Depth its Δm would be -2.00"),  # +10 %: +2.00
        (0.96, ""),  # +4 %: 0.00
        (1.0, ""),  # worse in all: -1.33
    ],
)
def test_a_delta_m_that_hinges_on_one_task_is_told(tmp_path, depth, told):
    make(tmp_path, "single_task_full", {"semseg": 50.0, "normals": 20.0, "depth": 1.0})
    make(tmp_path, "ours", {"semseg": 49.0, "normals": 20.4, "depth": depth})
    notes = measured(tables.accuracy_table(only(tmp_path)))["Note"]
    assert dict(notes) == {"Single-task full fine-tuning": "", "Ours": told}


def test_what_is_no_better_than_a_prediction_without_the_image_is_told(tmp_path):
    """Of the two such predictions the better one counts, task by task; of several seeds the mean."""
    without = {
        "floor": {"semseg": {"mIoU": 4.0}, "normals": {"mean_error": 30.0}},
        "floor_map": {"semseg": {"mIoU": 3.0}, "normals": {"mean_error": 20.0}},
    }
    make(tmp_path, "both", {"semseg": 4.0, "normals": 25.0}, **without)
    make(tmp_path, "one", {"semseg": 4.5, "normals": 20.0}, **without)
    make(tmp_path, "seeds", {"semseg": 3.5, "normals": 19.0}, **without)
    make(tmp_path, "seeds", {"semseg": 4.7, "normals": 19.0}, seed=1, **without)
    make(tmp_path, "none", {"semseg": 4.1, "normals": 19.9}, **without)
    make(tmp_path, "died", {"semseg": 1.0, "normals": 90.0}, metrics={}, status="failed")
    notes = measured(tables.accuracy_table(only(tmp_path)))["Note"]
    told = "no better than a prediction without the image in "
    assert dict(notes[2:]) == {
        "both": f"{told}SemSeg, Normals", "one": f"{told}Normals", "seeds": "", "none": "", "died": notes["died"],
    }  # fmt: skip
    assert told not in notes["died"]


def test_a_training_loss_that_did_not_fall_is_told(tmp_path):
    def history(semseg):
        return [{"step": i + 1, "loss/semseg": value, "loss/normals": 1 - i / 100} for i, value in enumerate(semseg)]

    # The first tenth (two steps) has mean 3: a last tenth of mean 2.9 has fallen, one of 3 has not.
    between = [9.0] * 16
    make(tmp_path, "fell", history=history([2.0, 4.0, *between, 3.8, 2.0]))
    make(tmp_path, "stayed", history=history([2.0, 4.0, *between, 4.0, 2.0]))
    make(tmp_path, "stayed", seed=1, history=history([2.0, 4.0, *between, 3.8, 2.0]))
    make(tmp_path, "short", history=history([2.0, 4.0, 9.0]))
    notes = tables.accuracy_table(only(tmp_path)).set_index("Method")["Note"]
    assert dict(notes) == {"fell": "", "short": "", "stayed": "the training loss did not fall in SemSeg"}


@pytest.mark.parametrize("width", [80, 100, 140])
def test_random_weights_are_marked_everywhere(tmp_path, width):
    make(tmp_path, "ours", weights="random")
    shown = report(tmp_path, width=width)
    assert "! RANDOM BACKBONE WEIGHTS" in shown and "Ours · random weights" in " ".join(shown.split())
    written = (tmp_path / "report/report.md").read_text()
    assert "> **RANDOM BACKBONE WEIGHTS" in written and "| Ours · random weights |" in written
    for path in (tmp_path / "report").glob("*.csv"):
        own = measured(pd.read_csv(path)).iloc[0]
        assert own["Source"] == "measured on cpu; random weights" and own["Marks"].startswith("RANDOM BACKBONE WEIGHTS")


def test_random_weights_by_the_runs_own_account(tmp_path):
    """The spec asked for timm weights, the run says that it had none."""
    path = make(tmp_path, "ours")
    path.write_text(path.read_text().replace('"source": "timm"', '"source": "random"'))
    assert only(tmp_path).random


def test_published_rows_only_of_measured_methods_and_marked(tmp_path):
    make(tmp_path, "ours", {"semseg": 1.0, "depth": 2.0})
    accuracy, efficiency = tables.accuracy_table(only(tmp_path)), tables.efficiency_table(only(tmp_path))
    for number, table in ((1, accuracy), (2, efficiency)):
        source = (
            f"published: BDTA+MoTE, AAAI 2026, Table {number}, PASCAL-Context, ImageNet-1k; not comparable with scenes"
        )
        assert printed(table)["Source"].to_dict() == {"Ours": source}
    row = printed(accuracy).loc["Ours"]
    assert row["SemSeg mIoU (%) ↑"] == 74.14 and pd.isna(row["Depth RMSE (m) ↓"])
    row = printed(efficiency).loc["Ours"]
    assert row["published memory (GB, as printed)"] == 9.92 and pd.isna(row["process memory (GiB, CPU)"])
    shown = report(tmp_path)
    assert "Ours †(" in shown and "published rows are on PASCAL-Context; not comparable with scenes" in " ".join(
        shown.split()
    )
    assert "9.92 GB†" in shown


def test_published_rows_follow_backbone_and_pretraining(tmp_path):
    make(tmp_path / "22k", "ours", backbone="swin_tiny_patch4_window7_224.ms_in22k")
    assert printed(tables.accuracy_table(only(tmp_path / "22k"))).loc["Ours", "SemSeg mIoU (%) ↑"] == 76.19
    # Table 2 has no row of 22k: memory and time hold for it too, Delta-m does not.
    row = printed(tables.efficiency_table(only(tmp_path / "22k"))).loc["Ours"]
    assert row["published memory (GB, as printed)"] == 9.92 and pd.isna(row["Delta-m (%)"])
    make(tmp_path / "1k", "ours")
    assert printed(tables.efficiency_table(only(tmp_path / "1k"))).loc["Ours", "Delta-m (%)"] == 8.7
    make(tmp_path / "base", "ours", backbone="swin_base_patch4_window7_224.ms_in1k")
    assert printed(tables.accuracy_table(only(tmp_path / "base"))).empty
    assert printed(tables.efficiency_table(only(tmp_path / "base"))).loc["Ours", "#TP (M)"] == 4.13
    make(tmp_path / "vit", "ours", backbone="vit_small_patch16_224")
    assert printed(tables.efficiency_table(only(tmp_path / "vit"))).empty
    assert "published #TP (M)" not in tables.efficiency_table(only(tmp_path / "vit"))


def test_published_parameters_stand_beside_measured_ones_of_that_protocol_and_those_tasks_only(tmp_path):
    theirs = {"figures": dict.fromkeys(published.TASKS, 50.0), "tasks": published.TASKS}
    make(tmp_path / "published", "ours", **theirs)
    assert measured(tables.accuracy_table(only(tmp_path / "published"))).loc["Ours", "published #TP (M)"] == 2.36
    others = {
        "equal": theirs | {"protocol": "equal"}, "override": theirs | {"decoder": "hrnet"}, "two tasks": {},
    }  # fmt: skip
    for name, change in others.items():
        make(tmp_path / name, "ours", **change)
        assert "published #TP (M)" not in tables.accuracy_table(only(tmp_path / name))


def test_normals_are_told_apart_from_the_papers_heading(tmp_path):
    make(tmp_path, "ours")
    assert "mean angular error" in " ".join(report(tmp_path).split())
    assert "Normals mean error (deg) ↓" in tables.accuracy_table(only(tmp_path))


def test_best_value_is_bold_among_good_measured_rows(tmp_path):
    make(tmp_path, "ours", {"semseg": 50.0, "normals": 15.0})
    report(tmp_path)
    assert "**50.00**" not in (tmp_path / "report/report.md").read_text()  # one row is no contest
    make(tmp_path, "mtlora", {"semseg": 40.0, "normals": 14.0})
    make(tmp_path, "lora", {"semseg": 99.0, "normals": 1.0}, status="interrupted")
    report(tmp_path)
    written = (tmp_path / "report/report.md").read_text()
    assert (
        "**50.00**" in written and "**14.00**" in written and "**40.00**" not in written and "**15.00**" not in written
    )
    assert "**74.14" not in written and "*74.14*" in written


# ---------------------------------------------------------------- files and the terminal


def test_unreadable_files_are_reported_and_skipped(tmp_path):
    path = make(tmp_path, "ours")
    whole = path.read_text()
    path.with_name("half.json").write_text(whole[: len(whole) // 2])
    path.with_name("newer.json").write_text(whole.replace('"schema": 1', '"schema": 99', 1))
    path.with_name("foreign.json").write_text("[1, 2]")
    found, problems = collect(tmp_path)
    assert len(found) == 1 and len(problems) == 3 and not any("\n" in problem for problem in problems)
    shown = " ".join(report(tmp_path).split())
    assert (
        "3 unreadable files left out" in shown
        and "has schema 99, newer" in shown
        and "half.json is no JSON, or half of it" in shown
    )


def test_no_folder_and_no_record_say_what_makes_one(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(BenchError, match="bench run --methods ours,mtlora --backbone swin_tiny"):
            collect(folder)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(BenchError, match="1 unreadable, the first: .*bad.json"):
        collect(tmp_path)


def test_files_are_written_per_group_and_twice_the_same(tmp_path):
    make(tmp_path, "ours")
    make(tmp_path, "mtlora", steps=0, epochs=None)
    report(tmp_path)
    before = {path.name: path.read_text() for path in (tmp_path / "report").iterdir()}
    assert sorted(name.partition("-")[0] for name in before) == [
        "report.json",
        "report.md",
        "report.tex",
        "table1",
        "table2",
        "table2",
    ]
    report(tmp_path)
    assert before == {path.name: path.read_text() for path in (tmp_path / "report").iterdir()}
    assert "efficiency only, not trained" in before["report.md"]


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_tables_fit_the_terminal(tmp_path, width):
    figures = dict.fromkeys(tasks.TASKS, 12.34)
    for seed in (0, 1):
        make(tmp_path, "ours", figures, seed=seed)
        make(tmp_path, "single_task_full", figures, seed=seed)
    shown = report(tmp_path, width=width)
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown and "12.34" in shown and "seeds" in shown
    assert "fine-tuning" in shown.replace("\nfine-tuning\n", "")  # a word of the method's name is never broken


def test_markdown_survives_pipes_and_brackets(tmp_path):
    make(tmp_path, "ours[r=2]", title="A|B [r=2]")
    shown = report(tmp_path, "ours[r=2]")  # brackets are no markup, in a cell or in a caption
    assert "\nA|B [r=2]" in shown and "against A|B [r=2]" in shown
    rows = [r for r in (tmp_path / "report/report.md").read_text().splitlines() if r.startswith("|")]
    assert any("A\\|B [r=2]" in row for row in rows)
    assert len({row.replace("\\|", "").count("|") for row in rows[:3]}) == 1


def test_show_by_path_and_by_prefix(tmp_path):
    path = make(tmp_path, "ours", weights="random")
    for name in (str(path), path.stem[:6]):
        console = Console(file=io.StringIO(), width=100)
        show.show(name, tmp_path, console)
        shown = console.file.getvalue()
        for text in ("RANDOM WEIGHTS", "2,362,108", "50 %", "20 deg", "3.000", "5.5000", "9.1000", "multi-task PEFT"):
            assert text in shown


def test_show_names_the_metric_and_the_tolerance(tmp_path):
    """Also of the trials; a record from before they were kept has neither."""
    tried = Tried(rate=1e-3, status="ok", score=0.5, figures={"edge": 41.5})
    for metrics, tolerance in (({}, None), ({"edge": "ods_f"}, 0.011)):
        now = Tuned(rate=1e-3, tried=(tried.model_copy(update={"metrics": metrics}),))
        path = make(tmp_path / str(tolerance), "ours", {"edge": 1.0}, metrics={"edge": {"ods_f": 40.0}},
                    tuned=now, edge_tolerance=tolerance)  # fmt: skip
        console = Console(file=io.StringIO(), width=200)
        show.show(str(path), tmp_path, console)
        shown = console.file.getvalue()
        assert ("(Edge ods_f 41.5)" if metrics else "(Edge 41.5)") in shown
        assert ("odsF counts edges within  1.1 % of the diagonal" in shown) == bool(tolerance)
        title = only(tmp_path / str(tolerance)).title
        assert ("odsF within 1.1 % of the diagonal" in title) == bool(tolerance)


def test_a_figure_that_nothing_was_valid_for_is_a_dash(tmp_path):
    path = make(tmp_path, "ours", metrics={"semseg": {"mIoU": 50.0}, "normals": {"mean_error": None}})
    make(tmp_path, "single_task_full")
    row = measured(tables.accuracy_table(only(tmp_path))).loc["Ours"]
    assert pd.isna(row["Normals mean error (deg) ↓"]) and row["Delta-m note"] == "a task has no figure"
    console = Console(file=io.StringIO(), width=100)
    show.show(str(path), tmp_path, console)
    assert "Normals mean_error  –" in console.file.getvalue()


def test_show_says_that_a_record_is_a_trials(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    show.show(str(make(tmp_path, "ours", trial={"length": 0.25, "holdout": 0.2})), tmp_path, console)
    told = "learning rate 0.0004, 0.25 of the run's steps; scored on held-out training images, 0.2 of them"
    (line,) = [line for line in console.file.getvalue().splitlines() if line.startswith("TRIAL")]
    assert told in line


@pytest.mark.parametrize(
    ("size", "eval_size", "told"),
    [
        ((64, 64), "network", "odsF within 0.75 % of the diagonal, 0.7 pixels (NO TOLERANCE: less than one)"),
        ((300, 400), "network", "odsF within 0.75 % of the diagonal, 3.8 pixels · "),
        ((64, 64), "original", "odsF within 0.75 % of the diagonal · "),
    ],
)
def test_a_title_says_how_near_an_edge_has_to_be(tmp_path, size, eval_size, told):
    changes = {"image_size": size, "eval_size": eval_size, "edge_tolerance": 0.0075}
    make(tmp_path, "ours", {"edge": 1.0}, metrics={"edge": {"ods_f": 40.0, "max_f": 20.0}}, **changes)
    assert told in only(tmp_path).title
    make(tmp_path, "mtlora", {"edge": 1.0}, metrics={"edge": {"max_f": 20.0}}, **changes)
    assert "odsF" not in only(tmp_path).title  # which no longer tells the task


def test_show_refuses_unknown_and_ambiguous_names(tmp_path):
    stem = make(tmp_path, "ours", seed=0).stem
    make(tmp_path, "ours", seed=1)
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(BenchError, match=f"stands for 2 records.*e.g. {stem}"):
        show.show(stem[:6], tmp_path, console)
    show.show(f"{stem[:6]}-s1", tmp_path, console)
    assert f"{stem[:-1]}1.json" in console.file.getvalue()
    with pytest.raises(BenchError, match="no record whose hash begins with"):
        show.show(f"{stem[:6]}-s2", tmp_path, console)
    with pytest.raises(BenchError, match="no record whose hash begins with 'zz'"):
        show.show("zz", tmp_path, console)
    with pytest.raises(BenchError, match="no such file"):
        show.show("no/where.json", tmp_path, console)
    show.show(stem, tmp_path, console)


def test_report_imports_no_torch():
    code = "import sys, bench.report.render; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=resources.ROOT, check=False).returncode == 0


def test_no_pandas_warning(tmp_path):
    make(tmp_path, "ours")
    make(tmp_path, "mtlora", status="failed", provenance=None, parameters=None, memory=None, time=None, metrics={})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report(tmp_path)


def test_a_thousand_records_are_quick(tmp_path):
    for seed in range(250):
        for method in ("ours", "mtlora", "lora", "single_task_full"):
            make(tmp_path, method, seed=seed)
    start = time.process_time()  # whatever else the machine does meanwhile
    report(tmp_path)
    assert time.process_time() - start < 5  # half a second as a rule


def test_tables_of_records_that_are_gone_do_not_stay(tmp_path):
    """Nor does anything go that no report wrote, whatever its name."""
    out = tmp_path / "report"

    def written():
        render.report(tmp_path, None, None, Console(file=io.StringIO()))
        return {path.name for path in out.glob("*.csv")}

    make(tmp_path)
    other = make(tmp_path, batch_size=4)
    both = written()
    own = {"table1-mine.csv", "rates-2024.csv"}
    for name in own:
        (out / name).write_text("")
    other.unlink()
    assert len(both) == 4 and len(written() - own) == 2 and own <= written() < both | own
    (out / "report.json").write_text("{")  # whatever became of it
    assert own <= written()


def test_printed_delta_m_does_not_stand_under_another_reference(tmp_path):
    make(tmp_path, "ours", {"semseg": 50.0, "normals": 20.0})
    make(tmp_path, "mtlora", {"semseg": 40.0, "normals": 20.0})
    group = only(tmp_path)
    assert printed(tables.accuracy_table(group)).loc["Ours", "Delta-m (%)"] == 8.7
    for table in (tables.accuracy_table(group, "mtlora"), tables.efficiency_table(group, "mtlora")):
        assert printed(table)["Delta-m (%)"].isna().all()
    assert "printed against the single-task baseline alone" in report(tmp_path, "mtlora")


def test_a_row_whose_time_is_the_hosts_says_so(tmp_path):
    times = {"ours": 0.01, "mtlora": 2.0, "lora": None}  # seconds queued; a step takes 5.5
    for method, queued in times.items():
        samples = [float(n) for n in range(10, 0, -1)]
        time = Time(device="cuda", warmup=3, samples=samples, batch_size=8, queued=queued)
        path = make(tmp_path, method, device="nvidia-h200", time=time)
        shown = Console(file=io.StringIO(), width=200)
        show.show(str(path), tmp_path, shown)
        assert ("HOST-BOUND" in shown.file.getvalue()) == (method == "ours")
    notes = measured(tables.efficiency_table(only(tmp_path)))["Note"]
    assert {title for title, note in notes.items() if "the GPU waits for the host" in note} == {"Ours"}
    assert not measured(tables.accuracy_table(only(tmp_path)))["Note"].any()
    for needed in ("plotly", "itables"):
        pytest.importorskip(needed)
    render.page(tmp_path, tmp_path, None, [], Console(quiet=True))
    assert (tmp_path / "report.html").read_text().count("the GPU waits for the host") == 1


@pytest.mark.parametrize(("samples", "p90"), [(4, None), (5, 4.6)])
def test_few_samples_have_no_percentile(tmp_path, samples, p90):
    make(tmp_path, "ours", time=Time(device="cpu", warmup=1, samples=range(1, samples + 1), batch_size=8))
    row = measured(tables.efficiency_table(only(tmp_path))).loc["Ours"]
    assert row["CPU time, median (s/batch)"] == (samples + 1) / 2
    assert row["CPU time, p90 (s/batch)"] == pytest.approx(p90 or float("nan"), nan_ok=True)


@pytest.mark.parametrize(
    ("device", "threads", "mark"),
    [
        ("cpu", (1, 2, 1), ["time measured with different numbers of threads: 1 in lora, ours; 2 in mtlora"]),
        ("cpu", (2, 2, 2), []),
        ("nvidia-h200", (1, 2, 1), []),
    ],
)
def test_times_of_different_numbers_of_threads_are_marked(tmp_path, device, threads, mark):
    for method, number in zip(("ours", "mtlora", "lora"), threads, strict=True):
        path = make(tmp_path, method, device=device)
        record = json.loads(path.read_text())
        record["provenance"]["threads"] = number
        path.write_text(json.dumps(record))
    assert [mark for mark in only(tmp_path).marks if "threads" in mark] == mark


@pytest.mark.parametrize(
    ("backbone", "carried"),
    [("swin_tiny_patch4_window7_224.ms_in1k", False), ("vit_small_patch14_dinov2.lvd142m", True)],
)
def test_the_papers_protocol_on_a_backbone_that_they_have_not(tmp_path, backbone, carried):
    make(tmp_path, "ours", backbone=backbone)
    said = "No published table has vit_small_patch14_dinov2: what the papers do"
    assert (said in " ".join(report(tmp_path).split())) == carried
    make(tmp_path, "mtlora", backbone="pvt_v2_b0")
    mixed = " ".join(report(tmp_path, mix=True).split())
    assert re.search(r"No published table has pvt_v2_b0(, vit\S+)?: what", mixed)


def test_the_busy_row_is_named(tmp_path):
    for method, load in (("ours", 9.5), ("mtlora", 0.1)):
        path = make(tmp_path, method)
        record = json.loads(path.read_text())
        record["provenance"]["load_before"] = load
        path.write_text(json.dumps(record))
    shown = " ".join(report(tmp_path).split())
    assert "time measured on a busy machine: ours (load 9.5 on 4 cores)" in shown and "mtlora (load" not in shown


def test_mixed_rows_have_no_best_and_say_that_commits_differ(tmp_path):
    for batch, commit in ((8, "a" * 40), (4, "b" * 40)):
        path = make(tmp_path, "ours", {"semseg": 50.0 + batch}, batch_size=batch)
        record = json.loads(path.read_text())
        record["provenance"]["commit"] = commit
        record["provenance"]["earlier_commits"] = ["c" * 40]
        path.write_text(json.dumps(record))
        make(tmp_path, "single_task_full", {"semseg": 40.0 + batch}, batch_size=batch)
    shown = report(tmp_path, mix=True, width=200)
    assert "rows come from different commits: aaaaaaaaaa, bbbbbbbbbb, cccccccccc" in shown
    assert "Single-task memory and time are of all its models" in shown
    assert "**" not in (tmp_path / "report" / "report.md").read_text().partition("### Table 1")[2]


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ({"ours[r=2]": ("a", ()), "ours[r=8]": ("b", ())}, ["rows or seeds of ours come from different code"]),
        ({"ours[r=2]": ("a", ()), "mtlora": ("b", ())}, []),  # methods have files of their own
        ({"ours[r=2]": ("a", ()), "ours[r=8]": (None, ())}, []),  # from before there were fingerprints
        (
            {"ours": ("a", ("b",)), "mtlora": ("c", ())},
            [
                "rows or seeds of ours come from different code",
                "in part by other code, before an interrupt: ours (seed 0)",
            ],
        ),
    ],
)
def test_rows_of_one_method_by_different_code_are_marked(tmp_path, codes, expected):
    for method, (code, earlier) in codes.items():
        path = make(tmp_path, method)
        record = json.loads(path.read_text())
        record["provenance"] |= {"code": code, "earlier_code": earlier}
        path.write_text(json.dumps(record))
    shown = " ".join(report(tmp_path, width=200).split())
    assert all(mark in shown for mark in expected)
    assert ("different code" in shown) == bool(expected)


def test_a_batch_larger_than_the_limited_set_is_in_the_title(tmp_path):
    make(tmp_path / "small", limit_train=4)
    assert "batch 8 (trained on all 4 images at once)" in only(tmp_path / "small").title
    make(tmp_path / "large", limit_train=8)
    assert "batch 8 · " in only(tmp_path / "large").title


def test_latex_numbers_tables_itself_and_has_true_minus_signs(tmp_path):
    make(tmp_path, "single_task_full", {"semseg": 50.0})
    make(tmp_path, "ours", {"semseg": 40.0})
    report(tmp_path)
    text = (tmp_path / "report" / "report.tex").read_text()
    assert "\\caption{Accuracy" in text and "Table 1. Accuracy" not in text and "$-$20.00" in text


def test_what_keeps_groups_apart_in_words():
    one = SimpleNamespace(key={"size": [96, 128], "recipe": {"augment": {"scales": []}}, "steps": None})
    other = SimpleNamespace(key={"size": [96, 96], "recipe": {"augment": {"scales": [1.0, 1.5]}}, "steps": 7})
    told = ["size 96x128, not 96x96", "recipe.augment.scales none, not 1.0, 1.5", "steps none, not 7"]
    assert differences(one, other) == told and differences(one, one) == []


def test_a_run_that_failed_has_no_say_in_the_metric(tmp_path):
    edges(tmp_path, "ours", {"ods_f": 40.0, "max_f": 20.0})
    edges(tmp_path, "mtlora", {"max_f": 16.0}, status="failed", failure=Failure(kind="Error", message="disk full"))
    group = only(tmp_path)
    assert group.headlines["edge"].key == "ods_f" and not any("odsF" in mark for mark in group.marks)
