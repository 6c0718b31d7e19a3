"""`bench data check`: what it counts, and what it calls bad."""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from bench.cli import app
from bench.data import card as cards
from bench.data import verify
from bench.data.check import Summary, inspect
from bench.errors import BenchError

CARD = {
    "name": "own",
    "title": "My own data",
    "image_size": [32, 32],
    "image": "{id}.jpg",
    "splits": {"train": "train.txt", "val": "val.txt"},
    "tasks": {
        "semseg": {"path": "{id}-seg.png", "classes": ["floor", "wall", "lamp"]},
        "depth": {"path": "{id}-depth.npy"},
    },
}


@pytest.fixture
def own(tmp_path):
    """Three training images and a validation image of 6x8: floor, a column of wall, a column without a label."""
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(CARD))
    (tmp_path / "train.txt").write_text("a b c")
    (tmp_path / "val.txt").write_text("d")
    for name in "abcd":
        Image.new("RGB", (8, 6)).save(tmp_path / f"{name}.jpg")
        classes = np.zeros((6, 8), np.uint8)
        classes[:, 0], classes[:, 1] = 1, 255
        Image.fromarray(classes).save(tmp_path / f"{name}-seg.png")
        np.save(tmp_path / f"{name}-depth.npy", np.full((6, 8), 2.0 if name != "b" else 0.0))
    return tmp_path


def run(own, *arguments):
    options = ("--data-root", str(own), "--workers", "1")
    return CliRunner().invoke(
        app, ["data", "check", str(own / "own.yaml"), *options, *arguments], env={"COLUMNS": "200"}
    )


def test_counts_by_hand(own):
    card = cards.load(str(own / "own.yaml"))
    summary = Summary()
    for name in "abc":
        summary.add(inspect(card, own, name, ("semseg", "depth")))
    assert (summary.images, summary.pixels, dict(summary.sizes)) == (3, 3 * 48, {(6, 8): 3})
    assert summary.labelled == {"semseg": 3 * 42, "depth": 2 * 48}
    assert summary.unlabelled_images == {"semseg": 0, "depth": 1}
    assert summary.classes == {"semseg": {0: 3 * 36, 1: 3 * 6}}
    assert not summary.problems


def test_labels_of_an_unreadable_image_are_in_no_share(own):
    card = cards.load(str(own / "own.yaml"))
    (own / card.image.format(id="a")).write_bytes(b"")
    summary = Summary()
    for name in "ab":
        summary.add(inspect(card, own, name, ("semseg",)))
    assert (summary.pixels, summary.labelled) == (48, {"semseg": 42}) and len(summary.problems) == 1


def test_a_good_folder(own):
    done = run(own)
    assert done.exit_code == 0 and "all files are readable and fit the card" in done.output
    assert "train: 3 images, 6x8 (3)" in done.output and "val: 1 images" in done.output
    assert "floor 85.7 %, wall 14.3 %; 1 of 3 classes never: lamp" in done.output


def test_contents_are_the_files_bytes(own, tmp_path):
    """Every file of a sample counts, of the chosen tasks alone; its time and place do not."""
    card = cards.load(str(own / "own.yaml"))

    def contents(folder, tasks=("semseg", "depth")):
        return inspect(card, folder, "a", tasks).contents

    before = contents(own)
    files = [(own / f"a{end}").read_bytes() for end in (".jpg", "-seg.png", "-depth.npy")]
    parts = b"".join(hashlib.sha256(file).digest() for file in files)
    assert before == hashlib.sha256(parts).hexdigest()[:32]
    elsewhere = shutil.copytree(own, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("elsewhere"))
    assert contents(elsewhere) == before
    for end, data in zip((".jpg", "-seg.png", "-depth.npy"), files, strict=True):
        (elsewhere / f"a{end}").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert contents(elsewhere) != before
        (elsewhere / f"a{end}").write_bytes(data)
    (elsewhere / "a-depth.npy").unlink()
    assert contents(elsewhere) == "" and contents(elsewhere, ("semseg",)) == contents(own, ("semseg",)) != before


def test_a_read_error_that_passes_is_a_problem_all_the_same(own, monkeypatch):
    """Else the digest of the other files would stand for all of them from then on."""
    card = cards.load(str(own / "own.yaml"))
    opened = Path.open

    def fail(path, *args):
        monkeypatch.setattr(Path, "open", opened)
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "open", fail)
    found = inspect(card, own, "a", ("semseg",))
    assert found.problems == [f"{own / 'a.jpg'}: Input/output error"] and found.labelled == {"semseg": 42}
    assert not inspect(card, own, "a", ("semseg",)).problems


def test_two_copies_are_compared_by_their_digits(own):
    def digits():
        return re.findall("contents ([0-9a-f]{16}):", run(own).output)

    train, val = digits()
    np.save(own / "d-depth.npy", np.full((6, 8), 3.0))
    assert digits()[0] == train and digits()[1] != val
    (own / "d-depth.npy").unlink()
    assert digits() == [train]
    np.save(own / "d-depth.npy", np.full((6, 8), 3.0))
    (own / "train.txt").write_text("a c b")
    assert digits()[0] != train


def test_what_bench_run_refuses_is_refused(own):
    card = yaml.safe_load((own / "own.yaml").read_text())
    (own / "own.yaml").write_text(yaml.safe_dump(card | {"name": "nyud_v2"}))
    done = run(own)
    assert done.exit_code == 2 and "'nyud_v2' is the name of a built-in card" in done.stderr


def damage(own, name):
    path = own / name
    if name == "b.jpg":
        path.write_bytes(path.read_bytes()[:120])
    elif name == "b-seg.png":
        path.write_bytes(b"")
    elif name == "c-seg.png":
        Image.fromarray(np.full((6, 8), 7, np.uint8)).save(path)
    elif name == "a-depth.npy":
        np.save(path, np.ones((5, 8)))
    else:
        path.unlink()
    return path


BAD = {
    "b.jpg": "cannot decode image",
    "b-seg.png": "cannot decode image",
    "c-seg.png": "label value 7 is outside 0..2",
    "a-depth.npy": "label is (5, 8), its image (6, 8)",
    "d-depth.npy": "missing file",
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_bad_is_named(own, name):
    path = damage(own, name)
    done = run(own)
    assert done.exit_code == 1 and "training would stop here; --skip-bad does without such images" in done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("bad ")]
    assert str(path) in line and BAD[name] in line


def test_all_that_is_bad_is_named_and_files_of_other_tasks_are_not_read(own):
    for name in BAD:
        damage(own, name)
    assert sum(line.startswith("bad ") for line in run(own).output.splitlines()) == len(BAD)
    lines = [line for line in run(own, "--tasks", "depth").output.splitlines() if line.startswith("bad ")]
    assert len(lines) == 3 and not any("seg" in line for line in lines)


def test_an_image_in_both_splits_is_told(own):
    (own / "val.txt").write_text("a d")
    assert "in both splits: 1 of the images, e.g. a" in run(own).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("data", "check", "scenes"), "is rendered by bench itself: there are no files to check"),
        (("data", "check", "nyud_v3"), "unknown dataset 'nyud_v3' (did you mean 'nyud_v2'?)"),
        (("data", "check", "nyud_v2"), "say where with --data-root FOLDER"),
        (("data", "check", "nyud_v2", "--data-root", "nowhere"), "no such data folder: nowhere"),
    ],
)
def test_errors_are_one_line(arguments, message):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and message in done.output and "Traceback" not in done.output


def test_what_was_read_is_read_again_when_the_card_changes(own, monkeypatch):
    """What an earlier card let pass, this one may not."""
    monkeypatch.setenv("BENCH_CACHE", str(own / "cache"))
    card = cards.load(str(own / "own.yaml"))
    assert not verify.examine(card, own, "abc", ("semseg",), 1, print).bad
    content = yaml.safe_load((own / "own.yaml").read_text())
    content["tasks"]["semseg"]["ignore"] = [9]
    (own / "own.yaml").write_text(yaml.safe_dump(content))
    found = verify.examine(cards.load(str(own / "own.yaml")), own, "abc", ("semseg",), 1, print)
    assert list(found.bad) == ["a", "b", "c"] and "label value 255" in found.bad["a"]


def test_half_of_what_was_kept_is_read_anew(own, monkeypatch):
    monkeypatch.setenv("BENCH_CACHE", str(own / "cache"))
    card = cards.load(str(own / "own.yaml"))
    first = verify.examine(card, own, "abc", ("semseg",), 1, print)
    (kept,) = (own / "cache" / "read").iterdir()
    kept.write_text(kept.read_text()[:-9])
    assert verify.examine(card, own, "abc", ("semseg",), 1, print) == first


def test_many_images_are_read_in_processes_with_the_same_result(own, monkeypatch):
    card, told = cards.load(str(own / "own.yaml")), []
    few = verify.examine(card, own, "dabc", ("semseg",), 2, told.append)
    assert not told and list(few.contents) == list("dabc")
    monkeypatch.setattr(verify, "FEW", 3)
    monkeypatch.setenv("BENCH_CACHE", str(own / "cache"))
    assert verify.examine(card, own, "dabc", ("semseg",), 2, told.append) == few and len(told) == 1
    (own / "c-seg.png").write_bytes(b"")
    assert list(verify.examine(card, own, "dabc", ("semseg",), 2, told.append).bad) == ["c"]


def test_without_a_cache_folder_no_image_is_to_blame(own, monkeypatch):
    """With --skip-bad every image would be left out."""
    content = CARD | {"tasks": {"edge": {"path": "{id}-seg.png", "rule": "boundaries"}}}
    (own / "own.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setenv("BENCH_CACHE", str(own / "train.txt"))
    with pytest.raises(BenchError, match="cannot cache"):
        verify.examine(cards.load(str(own / "own.yaml")), own, "abc", ("edge",), 1, print)


def test_the_first_image_is_in_the_digits_too(own):
    def digits():
        return re.findall("contents ([0-9a-f]{16}):", run(own).output)

    train, val = digits()
    np.save(own / "a-depth.npy", np.full((6, 8), 3.0))
    assert digits()[0] != train and digits()[1] == val


def test_depths_are_of_labelled_pixels(own):
    np.save(own / "a-depth.npy", np.tile([0.0, 2, 2, 3, 3, 3, 4, 9], (6, 1)))
    assert inspect(cards.load(str(own / "own.yaml")), own, "a", ("depth",)).depths == (2, 3, 9)
