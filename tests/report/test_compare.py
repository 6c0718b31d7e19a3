"""`bench compare`: what counts as worse, what is noise, and the exit code."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from bench.cli import app
from bench.record import Memory, Parameters, Time
from bench.report import compare
from tests.report.records import make


def parameters(trainable):
    counts = dict.fromkeys(("adaptation", "backbone", "decoder", "shared", "per_task"), 0)
    return Parameters(total=2 * trainable, trainable=trainable, **counts)


def time(*samples):
    return Time(device="cpu", warmup=1, samples=list(samples), batch_size=8)


def verdicts(tmp_path, **thresholds):
    found = compare.changes(tmp_path / "a", tmp_path / "b", compare.Thresholds(**thresholds))
    return {change.figure: change.verdict for change in found}


def both(tmp_path, before, after, **common):
    make(tmp_path / "a", **common | before)
    make(tmp_path / "b", **common | after)


def test_the_same_is_the_same(tmp_path):
    both(tmp_path, {}, {})
    assert set(verdicts(tmp_path).values()) == {"same"}
    assert CliRunner().invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "b")]).exit_code == 0


@pytest.mark.parametrize(
    ("before", "after", "figure", "verdict"),
    [
        ({"parameters": parameters(100)}, {"parameters": parameters(101)}, "trainable parameters", "worse"),
        ({"figures": {"semseg": 50.0}}, {"figures": {"semseg": 48.9}}, "SemSeg mIoU", "worse"),
        ({"figures": {"semseg": 50.0}}, {"figures": {"semseg": 49.1}}, "SemSeg mIoU", "same"),
        ({"figures": {"normals": 20.0}}, {"figures": {"normals": 20.5}}, "Normals mean error", "worse"),
        ({"figures": {"normals": 20.0}}, {"figures": {"normals": 19.5}}, "Normals mean error", "better"),
        ({"time": time(*[1.0] * 9)}, {"time": time(*[1.2] * 9)}, "seconds a batch", "worse"),
        ({"time": time(*[1.0] * 9)}, {"time": time(*[1.05] * 9)}, "seconds a batch", "same"),
        # Medians 1.0 and 1.2, but samples all over the place.
        ({"time": time(0.5, 1.0, 2.0)}, {"time": time(0.4, 1.2, 2.4)}, "seconds a batch", "noise"),
        ({"memory": Memory(device="cpu", process_peak=100)}, {"memory": Memory(device="cpu", process_peak=104)},
         "process peak, bytes", "same"),
        ({"memory": Memory(device="cpu", process_peak=100)}, {"memory": Memory(device="cpu", process_peak=106)},
         "process peak, bytes", "worse"),
        ({}, {"status": "out_of_memory", "metrics": {}}, "status", "worse"),
        ({}, {"memory": None}, "process peak, bytes", "worse"),
        ({"figures": {"semseg": 50.0}}, {"metrics": {"semseg": {"mIoU": None}}, "figures": {"semseg": 1.0}},
         "SemSeg mIoU", "worse"),
        ({"status": "failed", "metrics": {}}, {}, "status", "better"),
    ],
)  # fmt: skip
def test_what_counts(tmp_path, before, after, figure, verdict):
    both(tmp_path, before, after)
    assert verdicts(tmp_path)[figure] == verdict
    code = CliRunner().invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "b")]).exit_code
    assert code == (1 if verdict == "worse" else 0)


@pytest.mark.parametrize(("old", "verdict"), [(0, "worse"), (1, "better")])
def test_a_metric_that_only_one_side_has_is_not_compared(tmp_path, old, verdict):
    """One side is from before odsF was measured: edges are compared by what both have."""
    sides = [{"ods_f": 40.0, "max_f": 10.0}] * 2
    sides[old] = {"max_f": 20.0}
    both(tmp_path, *({"metrics": {"edge": figures}} for figures in sides), figures={"edge": 1.0})
    assert {figure: told for figure, told in verdicts(tmp_path).items() if "Edge" in figure} == {
        "Edge max F, pixelwise": verdict
    }


def test_a_gpus_memory_is_held_to_two_percent(tmp_path):
    peak = {"device": "cuda", "peak_reserved": 1}
    both(tmp_path, {"memory": Memory(peak_allocated=100, **peak)}, {"memory": Memory(peak_allocated=103, **peak)},
         device="nvidia-h200")  # fmt: skip
    assert verdicts(tmp_path)["peak allocated, bytes"] == "worse"
    assert verdicts(tmp_path, memory=0.05)["peak allocated, bytes"] == "same"


@pytest.mark.parametrize(("load", "verdict"), [(4.5, "worse"), (5.5, "noise"), (None, "worse")])
def test_times_of_a_busy_machine_are_no_reason_to_fail(tmp_path, load, verdict):
    """A report marks them, so a gate does not judge by them; four cores, and one cell that may just have ended."""
    both(tmp_path, {"time": time(*[1.0] * 9)}, {"time": time(*[1.5] * 9)})
    (path,) = (tmp_path / "b").rglob("*.json")
    record = json.loads(path.read_text())
    record["provenance"]["load_before"] = load
    path.write_text(json.dumps(record))
    assert verdicts(tmp_path)["seconds a batch"] == verdict


def test_seeds_say_what_is_noise(tmp_path):
    for seed, (was, now) in enumerate(((50.0, 45.0), (40.0, 50.0), (60.0, 46.0))):
        both(tmp_path, {"figures": {"semseg": was}}, {"figures": {"semseg": now}}, seed=seed)
    assert verdicts(tmp_path)["SemSeg mIoU"] == "noise"  # 50 -> 47, with standard errors of 5.8 and 1.5


def test_the_same_seeds_are_compared_in_pairs(tmp_path):
    """Each seed lost a tenth: far less than the seeds differ, and no noise."""
    for seed, was in enumerate((40.0, 50.0, 60.0)):
        both(tmp_path, {"figures": {"semseg": was}}, {"figures": {"semseg": 0.9 * was}}, seed=seed)
    assert verdicts(tmp_path)["SemSeg mIoU"] == "worse"


@pytest.mark.parametrize("how", ["diverged", "gone"])
def test_a_seed_that_was_good_and_is_not_is_worse(tmp_path, how):
    for seed in range(3):
        make(tmp_path / "a", seed=seed)
        if how == "diverged":
            make(tmp_path / "b", seed=seed, **({"status": "diverged", "metrics": {}} if seed else {}))
    if how == "gone":
        make(tmp_path / "b", seed=0)
    found = verdicts(tmp_path)
    assert found["seed 1"] == found["seed 2"] == "worse" and "seed 0" not in found


def test_settings_are_cells_of_their_own(tmp_path):
    for batch in (4, 8):
        both(tmp_path, {}, {"figures": {"semseg": 10.0 if batch == 4 else 50.0, "normals": 20.0}}, batch_size=batch)
    found = compare.changes(tmp_path / "a", tmp_path / "b", compare.Thresholds())
    assert len({change.cell for change in found}) == 2
    assert [c.verdict for c in found if c.figure == "SemSeg mIoU"].count("worse") == 1


def test_figures_of_another_machine_are_not_compared(tmp_path):
    both(tmp_path, {"time": time(1.0)}, {"time": time(9.0), "device_name": "Other CPU"})
    found = verdicts(tmp_path)
    assert found["memory, time"] == "other device" and "seconds a batch" not in found


def test_a_cell_that_is_gone_fails_and_a_new_one_does_not(tmp_path):
    make(tmp_path / "a", "ours")
    make(tmp_path / "b", "ours")
    make(tmp_path / "b", "mtlora")
    run = CliRunner().invoke
    assert run(app, ["compare", str(tmp_path / "a"), str(tmp_path / "b")]).exit_code == 0
    gone = run(app, ["compare", str(tmp_path / "b"), str(tmp_path / "a"), "--json"])
    assert gone.exit_code == 1 and [c["cell"][:6] for c in json.loads(gone.stdout) if c["verdict"] == "gone"] == [
        "mtlora"
    ]
    assert run(app, ["compare", str(tmp_path / "none"), str(tmp_path / "a")]).exit_code == 2


def test_what_became_of_a_cell_that_is_gone_is_told_where_one_setting_changed(tmp_path):
    make(tmp_path / "a", "ours", data_fingerprint="0ld")
    make(tmp_path / "a", "mtlora", batch_size=4)
    make(tmp_path / "b", "ours", data_fingerprint="new")
    make(tmp_path / "b", "mtlora", batch_size=8, precision="bf16")
    found = compare.changes(tmp_path / "a", tmp_path / "b", compare.Thresholds())
    gone = {change.cell.partition(" ")[0]: change.why for change in found if change.verdict == "gone"}
    missing = f"no record of it in {tmp_path / 'b'}"
    assert gone == {"ours": f"{missing}; there is one with data_fingerprint new, not 0ld", "mtlora": missing}


@pytest.mark.parametrize("side", ["a", "b"])
def test_an_unreadable_record_does_not_pass(tmp_path, side):
    """What it held nobody can compare: a gate that let it through would be open."""
    both(tmp_path, {}, {})
    path = next((tmp_path / side).rglob("*.json"))
    path.with_name("half.json").write_text(path.read_text()[:300])
    done = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert done.exit_code == 1 and "half.json" in done.output and "1 unreadable" in done.output


def test_figures_are_shown_in_the_units_of_the_tables(tmp_path):
    mib = {"memory": Memory(device="cpu", process_peak=2**31), "parameters": parameters(2_362_108)}
    both(tmp_path, mib, mib)
    done = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--all"])
    assert "2.000 GiB" in done.output and "2.3621 M" in done.output
