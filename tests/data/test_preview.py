"""`bench data preview`: colours by hand, the sheet's layout, and its errors."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from bench.cli import app
from bench.data import card as cards
from bench.data.loader import DenseDataset
from bench.data.preview import HEADER, MARGIN, draw, sheet

SCENES, PASCAL, NYUD = (cards.load(name) for name in ("scenes", "pascal_context", "nyud_v2"))


def test_classes_have_the_cards_colours_and_white_is_unlabelled():
    picture = draw("semseg", np.array([[0, 1, 15, 255]]), PASCAL)
    assert picture.tolist() == [[[0, 0, 0], [128, 0, 0], [192, 128, 128], [255, 255, 255]]]


@pytest.mark.parametrize("card", [SCENES, NYUD])
def test_classes_without_colours_get_different_ones(card):
    count = len(card.tasks["semseg"].classes)
    colours = draw("semseg", np.arange(count)[None], card)[0].astype(int)
    distances = np.abs(colours[:, None] - colours[None]).max(-1) + 1000 * np.eye(count, dtype=int)
    assert distances.min() > 8
    assert (colours.sum(1) == 0).tolist() == [name == "background" for name in card.tasks["semseg"].classes]


def test_masks_depth_and_normals():
    assert draw("edge", np.array([[0.0, 1.0, 255.0]]), SCENES)[0, :, 0].tolist() == [0, 255, 128]
    depth = draw("depth", np.array([[1.0, 3.0, 0.0]]), SCENES)[0]
    assert depth[0].tolist() == [68, 1, 84] and depth[1].tolist() == [253, 231, 37] and depth[2].tolist() == [255] * 3
    normals = np.array([[1.0, -1.0, 0.0, 0.0]])[None].repeat(3, 0) * np.array([1, 0, 0])[:, None, None]
    assert draw("normals", normals, SCENES)[0].tolist()[:3] == [[255, 128, 128], [0, 128, 128], [255, 255, 255]]


def test_the_sheet_holds_what_the_data_set_gives():
    data = DenseDataset(SCENES, "val", ("semseg", "depth"), (32, 48), limit=3)
    picture = np.array(sheet(data, [0, 2]))
    assert picture.shape == (HEADER + 2 * (32 + MARGIN + HEADER), 3 * (48 + MARGIN), 3)
    top = HEADER + 32 + MARGIN + HEADER
    sample = data[2]
    for column, name in enumerate(("image", "semseg", "depth")):
        left = column * (48 + MARGIN)
        expected = draw(name, sample[name].numpy(), SCENES)
        np.testing.assert_array_equal(picture[top : top + 32, left : left + 48], expected)


def test_the_verb_writes_a_picture_also_after_augmentation(tmp_path):
    arguments = ["data", "preview", "scenes", "--image-size", "32x40", "--count", "2", "--tasks", "semseg,normals"]
    pictures = []
    for name, extra in (("plain.png", []), ("again.png", []), ("tit.png", ["--augment", "tit"])):
        done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / name), *extra])
        assert done.exit_code == 0, done.output
        pictures.append(np.array(Image.open(tmp_path / name)))
    assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scenes", "--split", "test"], "unknown split 'test'"),
        (["scenes", "--augment", "tipp"], "unknown recipe 'tipp' (did you mean 'tit'?)"),
        (["nyud_v2"], "say where with --data-root FOLDER"),
        (["scenes", "--image-size", "32", "--count", "1", "--out", "sheet.nothing"], "cannot write sheet.nothing"),
    ],
)
def test_errors_are_one_line(arguments, message):
    done = CliRunner().invoke(app, ["data", "preview", *arguments])
    assert done.exit_code == 2 and message in " ".join(done.output.split()) and "Traceback" not in done.output
