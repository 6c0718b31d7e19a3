"""Records as one table."""

import json
from pathlib import Path

import pandas as pd
import pytest

from bench.errors import BenchError
from bench.record import Failure
from bench.report import frame
from bench.spec import Trial
from tests.report.records import make


def at(record: dict, path: str):
    """What the JSON file has at a path; keys may have dots of their own."""
    if path in record:
        return record[path]
    heads = [key for key in record if path.startswith(f"{key}.")]
    if not heads or record[heads[0]] is None:
        return None
    return at(record[heads[0]], path.removeprefix(f"{heads[0]}."))


def test_a_row_has_what_its_file_has(tmp_path):
    made = make(tmp_path, "mtlora", {"semseg": 50.0, "normals": 20.0}, seed=1)
    table = frame.read(tmp_path)
    assert len(table) == 1
    row, written = table.iloc[0], json.loads(made.read_text())
    written["schema_version"] = written.pop("schema")
    for column in set(table) - {"record", "path", "time.median", "time.host_bound"}:
        value = json.loads(json.dumps(row[column], default=lambda n: n.item()))
        assert value == at(written, column), column
    assert (row["record"], Path(row["path"])) == (made.stem, made)
    assert row["time.median"] == 5.5 and not row["time.host_bound"]  # of 10, 9, ... 1
    assert row["metrics.normals.mean_error"] == 20 and row["spec.seed"] == 1


def test_a_failure_is_a_row_with_the_same_columns(tmp_path):
    make(tmp_path / "good")
    bad = make(
        tmp_path / "bad", status="out_of_memory", failure=Failure(kind="OutOfMemoryError", message="no room"),
        time=None, memory=None, parameters=None, provenance=None, metrics={},
    )  # fmt: skip
    good, failed = (frame.read(tmp_path / name) for name in ("good", "bad"))
    assert set(good) - set(failed) == {"metrics.semseg.mIoU", "metrics.normals.mean_error"}
    assert list(failed) == [column for column in good if column in failed]
    row = failed.iloc[0]
    assert (row["status"], row["failure.message"], row["record"]) == ("out_of_memory", "no room", bad.stem)
    assert row[["time.median", "parameters.trainable", "provenance.device_name"]].isna().all()
    both = frame.read(tmp_path).set_index("status")
    assert both["metrics.semseg.mIoU"].to_dict() == pytest.approx(
        {"ok": 50, "out_of_memory": float("nan")}, nan_ok=True
    )


def test_trials_are_no_rows_and_what_is_no_record_is_warned_of(tmp_path):
    make(tmp_path)
    make(tmp_path, trial=Trial(length=0.25, holdout=0.2))
    (tmp_path / "half.json").write_text('{"schema": 1, ')
    with pytest.warns(UserWarning, match="half.json is no JSON"):
        table = frame.read(str(tmp_path))
    assert len(table) == 1 and pd.isna(table["spec.trial.length"].iloc[0])
    with pytest.raises(BenchError, match="no folder"):
        frame.read(tmp_path / "elsewhere")
