"""Records on disk: written whole or not at all, read back as they were, and refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bench import recipe as recipes
from bench import record as records
from bench.errors import BenchError
from bench.record import SCHEMA, Failure, Found, Memory, MethodInfo, Parameters, Provenance, Record, Time, Weights
from bench.spec import RunSpec


@pytest.fixture
def record():
    """A record with every part."""
    spec = RunSpec(
        method="bdta_mote[r=2]", backbone="swin_tiny", dataset="scenes", data_fingerprint="abc", tasks=("depth",),
        protocol="published", decoder=None, recipe_name="smoke", recipe=recipes.load("smoke"), image_size=(32, 64),
        batch_size=2, epochs=None, steps=2, precision="fp32", weights="random", device="cpu", seed=3,
    )  # fmt: skip
    return Record(
        status="ok",
        spec=spec,
        method=MethodInfo(name="bdta_mote", title="Ours", family="multi-task PEFT", options={"r": 2}),
        failure=Failure(kind="Example", message="an é and a\nline break"),
        provenance=Provenance(
            device="cpu", device_name="Some CPU", cores=2, memory_gib=7.5, platform="Linux", python="3.12",
            packages={"torch": "2"}, weights=Weights(source="random"),
        ),
        parameters=Parameters(total=9, trainable=5, adaptation=2, backbone=0, decoder=3, shared=1, per_task=4),
        memory=Memory(device="cpu", process_peak=2**33),
        time=Time(device="cpu", warmup=1, samples=[0.5, 0.1, 0.3], batch_size=2),
        metrics={"depth": {"rmse": 1.25, "abs_rel": None}},
        history=[{"step": 1, "loss": 0.1 + 0.2}],
    )  # fmt: skip


def test_a_record_is_read_back_as_it_was_written(record, tmp_path):
    path = record.write(tmp_path)
    assert records.read(path) == record


def test_a_record_lies_where_its_spec_says(record, tmp_path):
    path = record.write(tmp_path)
    folder = tmp_path / "cpu" / "scenes" / "swin_tiny" / "bdta_mote[r=2]"
    assert path == folder / f"{record.spec.hash}-s3.json"
    assert list(folder.iterdir()) == [path]


def test_a_person_can_read_it(record, tmp_path):
    text = record.write(tmp_path).read_text(encoding="utf-8")
    assert "é" in text and text.endswith("}\n")
    assert '"schema": 1,' in text.splitlines()[1]


def test_writing_again_replaces_the_whole_file(record, tmp_path):
    record.write(tmp_path)
    shorter = record.model_copy(update={"status": "failed", "history": [], "metrics": {}, "memory": None})
    assert records.read(shorter.write(tmp_path)) == shorter


def test_the_file_appears_only_when_it_is_complete(record, tmp_path, monkeypatch):
    seen = []

    def replace(source, target):
        seen.append((os.path.exists(target), records.read(target.parent / source)))
        os.rename(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    record.write(tmp_path)
    assert seen == [(False, record)]


def test_a_write_that_fails_leaves_the_old_record_and_nothing_else(record, tmp_path, monkeypatch):
    path = record.write(tmp_path)

    def no_space(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", no_space)
    with pytest.raises(BenchError, match="No space left on device") as error:
        record.model_copy(update={"status": "failed"}).write(tmp_path)
    assert str(path) in str(error.value)
    assert records.read(path).status == "ok"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_one_line(record, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BenchError, match="cannot write .*choose another folder"):
        record.write(tmp_path / "file" / "runs")


@pytest.mark.parametrize("keep", [0, 1, 100, -3])
def test_half_a_record_is_refused_by_path(record, tmp_path, keep):
    path = record.write(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BenchError, match="no JSON, or half of it") as error:
        records.read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_binary_file_is_refused(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BenchError, match="no JSON, or half of it"):
        records.read(tmp_path / "a.json")


@pytest.mark.parametrize("content", [[], {}, "text", 7, {"name": "package"}, {"schema": "http://json-schema.org/"}])
def test_foreign_json_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(BenchError, match="not a bench record"):
        records.read(tmp_path / "a.json")


def test_a_newer_schema_asks_for_an_update(record, tmp_path):
    path = record.write(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": SCHEMA + 1, "new": "part"}))
    with pytest.raises(BenchError, match=f"schema {SCHEMA + 1}, newer than .*update bench"):
        records.read(path)


@pytest.mark.parametrize("changes", [{"status": "fine"}, {"spec": {}}, {"surprise": 1}, {"time": {"samples": []}}])
def test_an_invalid_record_says_which_key(record, tmp_path, changes):
    path = record.write(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(BenchError, match=f"not a valid record: {next(iter(changes))}") as error:
        records.read(path)
    assert "\n" not in str(error.value)


def test_a_missing_record_is_one_line(tmp_path):
    with pytest.raises(BenchError, match="cannot read .*No such file"):
        records.read(tmp_path / "a.json")


def test_scan_yields_what_it_can_read_and_a_line_for_the_rest(record, tmp_path):
    good = record.write(tmp_path)
    (good.parent / "z.json").write_text("{")
    found, problem = list(records.scan(tmp_path))
    assert found == Found(good, record)
    assert isinstance(problem, BenchError) and "z.json" in str(problem)


@pytest.mark.parametrize("samples, median", [([3.0], 3.0), ([9.0, 1.0, 2.0], 2.0), ([4.0, 1.0, 2.0, 9.0], 3.0)])
def test_the_median_of_the_samples(samples, median):
    assert Time(device="cpu", warmup=0, samples=samples, batch_size=1).median == median


@pytest.mark.parametrize("damage", ["task", "nested", "pipe"])
def test_one_odd_file_costs_no_other_record(record, tmp_path, damage):
    good, path = record.write(tmp_path), tmp_path / "odd.json"
    if damage == "task":
        tree = json.loads(good.read_text())
        tree["spec"]["tasks"] = ["depth", "flow"]
        path.write_text(json.dumps(tree))
    elif damage == "nested":
        path.write_text("[" * 100_000)
    else:
        os.mkfifo(path)
    first, second = sorted(records.scan(tmp_path), key=lambda found: isinstance(found, BenchError))
    assert first.record == record and "odd.json" in str(second) and "\n" not in str(second)
