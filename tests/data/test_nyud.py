"""Real photographs: NYU-Depth v2 as the card describes it, where a copy is at hand."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from bench.cli import app
from bench.data import card as cards
from bench.data.loader import DenseDataset
from bench.record import scan
from bench.resources import ROOT

SCRIPT = ROOT.parent / "shared" / "tools" / "prepare_nyud.py"
TASKS = ("semseg", "depth", "normals", "edge")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three training and three validation images in the usual folders."""
    if not SCRIPT.is_file():
        pytest.skip("NYU-Depth v2 is not at hand: it is needed beside the repository, under ../shared")
    folder = tmp_path_factory.mktemp("nyud")
    subprocess.run([sys.executable, SCRIPT, folder, "--limit", "3", "--workers", "1"], check=True)
    return folder


@pytest.fixture(scope="module", params=["train", "val"])
def samples(root, request):
    """Every sample of a split at the size of its files."""
    data = DenseDataset(cards.load("nyud_v2"), request.param, TASKS, (240, 320), root)
    assert len(data) == 3
    return [data[i] for i in range(3)]


def test_shapes_and_types(samples):
    for sample in samples:
        assert set(sample) == {"image", *TASKS}
        assert sample["image"].shape == sample["normals"].shape == (3, 240, 320)
        assert all(sample[task].shape == (240, 320) for task in ("semseg", "depth", "edge"))
        assert 0 <= sample["image"].min() < 0.2 and 0.8 < sample["image"].max() <= 1


def test_classes_are_0_to_39_or_ignored(samples):
    values = torch.cat([sample["semseg"].unique() for sample in samples])
    assert ((values < 40) | (values == 255)).all() and (values >= 0).all()
    assert 0 in values  # a wall
    for sample in samples:
        assert (sample["semseg"] != 255).float().mean() > 0.5 and len(sample["semseg"].unique()) > 4


def test_depth_is_in_metres_of_a_room(samples):
    for sample in samples:
        depth = sample["depth"][sample["depth"] > 0]
        assert len(depth) > 0.9 * 240 * 320
        assert 0.5 <= depth.min() and depth.max() <= 10.1
        assert depth.max() > 1.5 * depth.min()


def test_normals_are_unit_and_face_the_camera(samples):
    for sample in samples:
        length = sample["normals"].norm(dim=0)
        assert ((length - 1).abs().lt(1e-4) | length.eq(0)).all()
        assert (length > 0).float().mean() > 0.9
        assert (sample["normals"][2] < 0).float().mean() > 0.9


def test_floors_face_up(root):
    """y points down in the camera frame, and the floor is the second of the 40 classes."""
    card, up = cards.load("nyud_v2"), []
    assert card.tasks["semseg"].classes[1] == "floor"
    for split in ("train", "val"):
        data = DenseDataset(card, split, TASKS, (240, 320), root)
        up += [-sample["normals"][1][sample["semseg"] == 1] for sample in (data[i] for i in range(3))]
    assert len(torch.cat(up)) > 1000 and torch.cat(up).median() > 0.7


def test_edges_lie_on_the_borders_of_labels(samples):
    for sample in samples:
        assert set(sample["edge"].unique().tolist()) == {0, 1}
        assert 0.005 < sample["edge"].mean() < 0.3
        labels = sample["semseg"]
        border = torch.zeros_like(labels, dtype=torch.bool)
        border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
        border[1:] |= labels[1:] != labels[:-1]
        assert torch.equal(sample["edge"].bool(), border)


def test_a_cell_runs_on_it(root, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = {
        "methods": "decoder_only", "backbone": "tf_efficientnet_lite0", "weights": "random", "recipe": "smoke",
        "dataset": "nyud_v2", "data-root": root, "image-size": "64x96", "device": "cpu", "out": tmp_path / "runs",
    }  # fmt: skip
    result = CliRunner().invoke(
        app, ["run", *(str(part) for key, value in options.items() for part in (f"--{key}", value))]
    )
    assert result.exit_code == 0, result.output
    (found,) = scan(tmp_path / "runs")
    metrics = found.record.metrics
    assert set(metrics) == set(TASKS) and len(found.record.per_class["semseg"]) == 40
    assert 0 <= metrics["semseg"]["mIoU"] <= 100 and 0 < metrics["depth"]["rmse"] < 10
    assert 0 < metrics["normals"]["mean_error"] < 180
    assert (found.record.spec.dataset, found.record.spec.image_size) == ("nyud_v2", (64, 96))
