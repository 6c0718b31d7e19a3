"""`bench evaluate`: the figures of a run once more, and what it says where they cannot be the same."""

from __future__ import annotations

import json
import re
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file

from bench import record as records
from bench.data import card as cards
from bench.data import check, subset
from bench.data.loader import DenseDataset, validation_batches
from bench.data.verify import examine
from bench.spec import trained_weights
from bench.train.floor import best_maps, score_floors, sum_labels
from bench.train.weights import digest
from tests.test_sweep import asked, bench, one_thread  # noqa: F401  a fixture for the module

SIZE = 32


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A cell on six images of files, whose labels are larger than the network's input."""
    folder = tmp_path_factory.mktemp("evaluate")
    tasks = {
        "semseg": {"path": "{id}-seg.png", "classes": ["a", "b", "c"]},
        "depth": {"path": "{id}-depth.npy"},
        "edge": {"path": "{id}-edge.png", "tolerance": 0.05},
    }
    card = {
        "name": "small", "title": "Small", "image_size": SIZE, "image": "{id}.png",
        "splits": {"train": "train.txt", "val": "val.txt"}, "tasks": tasks,
    }  # fmt: skip
    (folder / "small.yaml").write_text(yaml.safe_dump(card))
    (folder / "train.txt").write_text("a b c")
    (folder / "val.txt").write_text("d e f")
    generator = np.random.default_rng(0)
    for name in "abcdef":
        seg = np.repeat(np.repeat(generator.integers(0, 3, (4, 6)), 12, 0), 12, 1).astype(np.uint8)
        Image.fromarray(generator.integers(0, 256, (48, 72, 3), np.uint8)).save(folder / f"{name}.png")
        Image.fromarray(seg).save(folder / f"{name}-seg.png")
        Image.fromarray((seg != np.roll(seg, 1, 1)).astype(np.uint8)).save(folder / f"{name}-edge.png")
        np.save(folder / f"{name}-depth.npy", generator.uniform(1, 5, (48, 72)))
    card = ("--dataset", folder / "small.yaml", "--data-root", folder)
    steps = {"steps": 3, "limit_train": 3, "loss_weights": {"semseg": 1, "depth": 1, "edge": 1}}
    args = asked(folder, **steps)
    done = bench(*args, *card, "--tasks", "semseg,depth,edge", "--out", folder / "runs", "--limit-val", 3)
    assert done.exit_code == 0, done.output
    (found,) = records.scan(folder / "runs")
    return folder, found.path, found.record, card


def evaluated(trained, *args):
    folder, path, _, card = trained
    out = folder / "scores.json"
    out.unlink(missing_ok=True)
    done = bench("evaluate", "--record", path, *card, "--device", "cpu", "--out", out, *args)
    assert done.exit_code == 0, done.output
    return done.output, json.loads(out.read_text())


def test_the_same_figures_as_the_run(trained):
    output, scores = evaluated(trained)
    record = trained[2]
    for task, figures in record.metrics.items():
        assert scores["metrics"][task] == pytest.approx(figures, rel=1e-6), task
    assert scores["per_class"]["semseg"] == pytest.approx(record.per_class["semseg"])
    assert scores["differs"] == [] and scores["images"] == 3
    assert scores["trained_sha256"] == record.trained_sha256
    assert scores["provenance"]["device"] == "cpu"
    assert "not as in the record" not in output and "warning" not in output and "same" in output
    assert "decoder_only on small, seed 0: 3 images" in output


def test_the_same_figures_with_other_processes(trained):
    """Which load images, and score edges."""
    metrics = evaluated(trained, "--workers", 2)[1]["metrics"]
    assert metrics["edge"]["ods_f"] > 0 and metrics == evaluated(trained)[1]["metrics"]


def test_edges_are_scored_with_the_cards_tolerance(trained, tmp_path):
    """By the run, its predictions without an image, and here."""
    folder, path, record, _ = trained
    assert record.edge_tolerance == 0.05
    card = yaml.safe_load((folder / "small.yaml").read_text())
    scores = {}
    for tolerance in (0.001, 0.05, 0.1):
        card["tasks"]["edge"]["tolerance"] = tolerance
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(card))
        (tmp_path / "out.json").unlink(missing_ok=True)
        again = ("--dataset", tmp_path / "small.yaml", "--data-root", folder, "--out", tmp_path / "out.json")
        assert bench("evaluate", "--record", path, "--device", "cpu", *again).exit_code == 0
        scores[tolerance] = json.loads((tmp_path / "out.json").read_text())["metrics"]["edge"]["ods_f"]
    assert scores[0.001] < scores[0.05] == record.metrics["edge"]["ods_f"] <= scores[0.1]

    loaded = cards.load(str(folder / "small.yaml"))
    train, val = (DenseDataset(loaded, split, ("edge",), (SIZE, SIZE), folder) for split in ("train", "val"))
    maps = best_maps(sum_labels(validation_batches(train, 1, 0, pin=False), {"edge": 1}))
    of = {t: score_floors([maps], validation_batches(val, 1, 0, pin=False), {"edge": 1}, t)[0] for t in (0.001, 0.05)}
    assert of[0.001]["edge"]["ods_f"] < of[0.05]["edge"]["ods_f"] == pytest.approx(record.floor_map["edge"]["ods_f"])


def test_what_is_asked_otherwise_is_said_and_done(trained):
    output, scores = evaluated(trained, "--eval-size", "original", "--limit-val", 2, "--batch-size", 1)
    assert scores["images"] == 2
    said = ["at original size, not network", "at most 2 images, not all", "in batches of 1, not 2"]
    assert scores["differs"] == said
    assert "not as in the record: at original size, not network" in output
    assert "warning" not in output
    # Of the same images, at the network's size.
    small = evaluated(trained, "--limit-val", 2, "--batch-size", 1)[1]["metrics"]["depth"]
    assert small["rmse"] != scores["metrics"]["depth"]["rmse"] == pytest.approx(small["rmse"], rel=0.2)


def test_images_that_the_run_skipped_are_skipped(trained, tmp_path):
    args = altered(trained, tmp_path, lambda content: content["spec"].update(skipped=["e"]))
    done = bench(*args)
    assert done.exit_code == 0 and "seed 0: 2 images" in done.output, done.output


def test_other_data_under_the_same_name_is_told(trained, tmp_path):
    folder, path, record, _ = trained
    for file in folder.iterdir():
        if file.suffix in (".png", ".npy", ".txt", ".yaml"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    np.save(tmp_path / "d-depth.npy", np.full((48, 72), 2.5, np.float32))
    args = ("evaluate", "--record", path, "--dataset", tmp_path / "small.yaml", "--data-root", tmp_path)
    for limit in (2, 3, 4):
        done = bench(*args, "--device", "cpu", "--limit-val", limit)
        assert done.exit_code == 0 and "not as in the record: other files or ids of val (contents" in done.output
        assert "other files or ids of train" not in done.output
        assert ("at most" in done.output) == (limit == 2)
    (tmp_path / "a.png").unlink()  # of the training images
    done = bench(*args, "--device", "cpu")
    assert done.exit_code == 0 and "perhaps the train data, of which a part is not here" in done.output
    assert "other files or ids of val (contents" in done.output
    (tmp_path / "train.txt").unlink()
    done = bench(*args, "--device", "cpu")
    assert done.exit_code == 0 and "perhaps the train data, of which a part is not here" in done.output
    assert "other files or ids of val (contents" in done.output


def test_a_changed_file_of_the_same_size_is_told(trained):
    folder, path, record, card = trained
    label = folder / "e-depth.npy"
    before = label.read_bytes()
    try:
        for factor, told in ((2, True), (1, False)):
            label.write_bytes(before)
            np.save(label, np.load(label) * np.float32(factor))
            assert label.stat().st_size == len(before)
            done = bench("evaluate", "--record", path, *card, "--device", "cpu")
            assert done.exit_code == 0
            assert ("not as in the record: other files or ids of val (contents" in done.output) == told
            assert "warning: nothing but the figures differs" not in done.output
    finally:
        label.write_bytes(before)


def altered(trained, folder, change):
    """The arguments for a copy of the record that `change` was done to."""
    _, path, _, card = trained
    content = json.loads(path.read_text())
    change(content)
    copy = folder / path.name
    copy.write_text(json.dumps(content))
    trained_weights(copy).write_bytes(trained_weights(path).read_bytes())
    return "evaluate", "--record", copy, *card, "--device", "cpu"


def test_another_machine_and_other_packages_are_told(trained, tmp_path):
    def change(content):
        content["provenance"] |= {"device_name": "Another CPU", "code": "0" * 16, "commit": "abcdef0123"}
        content["provenance"]["packages"]["torch"] = "1.0"
        content["metrics"]["depth"]["rmse"] *= 1.1
        content["spec"]["precision"] = "tf32"

    done = bench(*altered(trained, tmp_path, change))
    assert done.exit_code == 0 and "warning" not in done.output
    for line in (r"on .*, not Another CPU", r"with torch .*, not 1\.0", r"by other code than that of commit abcdef01",
                 r"fp32, not tf32"):  # fmt: skip
        assert re.search(f"not as in the record: {line}", done.output), line


def test_what_cannot_be_scored_is_one_line(trained, tmp_path):
    """A worker's traceback, and predictions that are not finite."""
    folder, path, _, _ = trained
    for file in folder.iterdir():
        if file.suffix in (".png", ".npy", ".txt", ".yaml"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "e-depth.npy").write_bytes(b"no array")
    args = ("evaluate", "--record", path, "--dataset", tmp_path / "small.yaml", "--data-root", tmp_path)
    for workers in (0, 2):
        done = bench(*args, "--device", "cpu", "--workers", workers)
        assert done.exit_code == 2 and "e-depth.npy" in done.output
        assert len(done.output.strip().splitlines()) == 1, done.output

    weights = load_file(trained_weights(path))
    broken = {name: tensor * float("nan") if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    args = altered(trained, tmp_path, lambda content: None)
    copy = args[2]
    save_file(broken, trained_weights(copy))
    content = json.loads(copy.read_text()) | {"trained_sha256": digest(trained_weights(copy))}
    copy.write_text(json.dumps(content))
    done = bench(*args)
    assert done.exit_code == 2 and "not finite" in done.output
    assert len(done.output.strip().splitlines()) == 1, done.output


def test_a_killed_scoring_process_is_one_line(trained, monkeypatch):
    def killed(*args):
        raise BrokenProcessPool("A process in the process pool was terminated abruptly")

    monkeypatch.setattr("bench.train.evaluation.evaluate", killed)
    done = bench("evaluate", "--record", trained[1], *trained[3], "--device", "cpu")
    assert done.exit_code == 2 and "a process that scores edges was killed" in done.output
    assert len(done.output.strip().splitlines()) == 1, done.output


def test_figures_that_moved_for_no_reason_are_a_warning(trained, tmp_path):
    """The record was edited, say; and a metric that it does not have is a dash."""

    def change(content):
        content["metrics"]["depth"]["rmse"] *= 1.1
        del content["metrics"]["edge"]["ods_f"]

    done = bench(*altered(trained, tmp_path, change))
    assert done.exit_code == 0 and "warning: nothing but the figures differs" in done.output
    (line,) = [line for line in done.output.splitlines() if "RMSE" in line]
    assert "-9.09%" in line
    (line,) = [line for line in done.output.splitlines() if "odsF" in line]
    assert line.count("–") == 2


def test_a_metric_that_the_record_does_not_have_is_no_warning(trained, tmp_path):
    done = bench(*altered(trained, tmp_path, lambda content: content["metrics"]["edge"].pop("ods_f")))
    assert done.exit_code == 0 and "warning" not in done.output


@pytest.mark.parametrize("before", [0, None])
def test_a_figure_that_came_of_nothing_is_a_warning(trained, tmp_path, before):
    done = bench(*altered(trained, tmp_path, lambda content: content["metrics"]["edge"].update(ods_f=before)))
    assert done.exit_code == 0 and "warning: nothing but the figures differs" in done.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--eval-size", "orignal"), "did you mean 'original'"),
        (("--data-root", "/no/such/folder"), "no such data folder"),
        (("--device", "cuda:7"), "use --device cpu"),
        (("--out", "."), "is there already"),
    ],
)
def test_bad_input_is_one_line(trained, args, message):
    _, path, _, card = trained
    done = bench("evaluate", "--record", path, *card, *args)
    assert done.exit_code == 2 and message in done.output and "Traceback" not in done.output, done.output
    assert len(done.output.strip().splitlines()) == 1


def settled(trained, tmp_path, **spec):
    """`altered` for a record whose run was asked for this, on the data that it had then."""
    folder, _, record, _ = trained
    card, tasks = cards.load(str(folder / "small.yaml")), record.spec.tasks
    names = {
        split: subset.ids(card, split, folder, spec.get(f"limit_{split}"), tasks, spec.get("skipped", ()))
        for split in ("train", "val")
    }
    contents = examine(card, folder, sum(names.values(), []), tasks, 1, print).contents
    spec["data_fingerprint"] = cards.fingerprint(card, *names.values(), tasks, contents)
    digits = {split: check.digits(contents[name] for name in chosen) for split, chosen in names.items()}

    def change(content):
        content["spec"].update(spec)
        content["provenance"]["data_contents"] = digits

    return altered(trained, tmp_path, change)


@pytest.mark.parametrize(
    ("spec", "images"),
    [
        ({"limit_train": 1, "limit_val": 2}, 2),
        ({"eval_size": "original"}, 3),
        ({"skipped": ["e"]}, 2),
        ({"skipped": ["a"]}, 3),
    ],
)
def test_what_the_run_was_asked_for_is_done_and_no_difference(trained, tmp_path, spec, images):
    done = bench(*settled(trained, tmp_path, **spec))
    assert done.exit_code == 0 and f"seed 0: {images} images" in done.output, done.output
    assert "not as in the record" not in done.output


def test_want_of_memory_is_one_line_with_what_helps(trained, monkeypatch):
    def full(*args):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("bench.train.evaluation.evaluate", full)
    done = bench("evaluate", "--record", trained[1], *trained[3], "--device", "cpu")
    assert done.exit_code == 2 and "a smaller --batch-size needs less" in done.output
    assert len(done.output.strip().splitlines()) == 1, done.output


@pytest.mark.parametrize(("factor", "told"), [(1 + 1e-5, False), (1 + 1e-3, True)])
def test_rounding_is_no_warning_and_a_tenth_of_a_percent_is(trained, tmp_path, factor, told):
    def change(content):
        content["metrics"]["depth"]["rmse"] *= factor

    done = bench(*altered(trained, tmp_path, change))
    assert done.exit_code == 0 and ("warning: nothing but the figures differs" in done.output) == told


@pytest.mark.parametrize("skipped", ["a", "e"])
def test_a_skipped_image_does_not_lift_the_limit(trained, tmp_path, skipped):
    done = bench(*settled(trained, tmp_path, limit_val=2, skipped=[skipped]))
    assert done.exit_code == 0 and "seed 0: 2 images" in done.output, done.output
    assert "not as in the record" not in done.output, done.output


def test_a_record_in_bf16_is_scored_in_bf16(trained, tmp_path):
    """On a CPU too, which has it."""
    args = altered(trained, tmp_path, lambda content: content["spec"].update(precision="bf16"))
    AcceleratorState._reset_state()
    done = bench(*args, "--out", tmp_path / "scores.json")
    AcceleratorState._reset_state()
    assert done.exit_code == 0 and "not as in the record" not in done.output, done.output
    before, now = trained[2].metrics["depth"], json.loads((tmp_path / "scores.json").read_text())["metrics"]["depth"]
    assert now != before and now == pytest.approx(before, rel=0.05)
