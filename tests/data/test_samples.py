"""Cached samples are the samples, and follow their files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from bench.data import card as cards
from bench.data import derived
from bench.data.loader import DenseDataset, training_batches
from bench.errors import BenchError
from bench.recipe import Augment

CARD = {
    "name": "own", "title": "Own", "image_size": [32, 32], "image": "{id}.png",
    "splits": {"train": "ids.txt", "val": "ids.txt"},
    "tasks": {
        "semseg": {"path": "{id}-seg.png", "classes": ["a", "b", "c"]},
        "depth": {"path": "{id}-depth.npy"},
        "normals": {"path": "{id}-normals.npy"},
    },
}  # fmt: skip


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "own.yaml").write_text(yaml.safe_dump(CARD))
    (folder / "ids.txt").write_text("x y z")
    generator = np.random.default_rng(0)
    for name, size in zip("xyz", ((30, 47), (64, 21), (40, 40)), strict=True):
        Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{name}.png")
        Image.fromarray(generator.integers(0, 3, size).astype(np.uint8)).save(folder / f"{name}-seg.png")
        np.save(folder / f"{name}-depth.npy", generator.uniform(1, 5, size))
        np.save(folder / f"{name}-normals.npy", generator.normal(size=(*size, 3)))
    return folder


def data(root, cache, **how):
    card = cards.load(str(root / "own.yaml"))
    return DenseDataset(card, "train", tuple(card.tasks), (32, 36), root, cache=cache, **how)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("cache", ["ram", "disk"])
@pytest.mark.parametrize(
    "augment", [None, Augment(rotate=20, scale=(0.75, 1.25), photometric=True), Augment(crop_scale=(0.5, 2.0))]
)
def test_the_same_samples_read_once(root, monkeypatch, cache, augment):
    plain, cached = data(root, "none", augment=augment), data(root, cache, augment=augment)
    reads = []
    real = DenseDataset._read
    monkeypatch.setattr(DenseDataset, "_read", lambda self, name: reads.append((self, name)) or real(self, name))
    for epoch in range(3):
        for index in range(3):
            assert same(cached[epoch, index], plain[epoch, index])
    assert [name for owner, name in reads if owner is cached] == ["x", "y", "z"]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_with_loader_processes(root, workers):
    augment = Augment(rotate=20)
    plain, cached = (
        list(training_batches(data(root, cache, augment=augment), 2, 0, 4, workers, pin=False))
        for cache in ("none", "disk")
    )
    assert len(plain) == 4 and all(same(a, b) for a, b in zip(plain, cached, strict=True))


def test_labels_of_original_size_are_kept_so(root):
    for index, size in enumerate(((30, 47), (64, 21), (40, 40))):
        first, again = (data(root, "disk", original_labels=True)[index] for _ in range(2))
        assert same(first, again) and again["image"].shape[-2:] == (32, 36) and again["depth"].shape == size
        assert data(root, "disk")[index]["depth"].shape == (32, 36)


def test_another_size_is_another_sample(root):
    card = cards.load(str(root / "own.yaml"))
    for size in ((32, 36), (20, 24), (32, 36)):
        assert DenseDataset(card, "train", ("depth",), size, root, cache="disk")[0]["image"].shape[-2:] == size


def test_a_changed_file_is_read_again(root):
    before = data(root, "disk")[0]
    np.save(root / "x-depth.npy", np.full((30, 47), 9.0))
    after = data(root, "disk")[0]
    assert not torch.equal(before["depth"], after["depth"]) and (after["depth"] == 9).all()
    assert torch.equal(before["semseg"], after["semseg"])


def test_other_tasks_are_other_samples(root):
    data(root, "disk")[0]
    card = cards.load(str(root / "own.yaml"))
    assert set(DenseDataset(card, "train", ("depth",), (32, 36), root, cache="disk")[0]) == {"image", "depth"}


def test_scenes_are_rendered_at_their_size(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path))
    card = cards.load("scenes")
    for size in ((32, 32), (48, 32), (32, 32)):
        plain, cached = (DenseDataset(card, "val", ("semseg",), size, limit=2, cache=c) for c in ("none", "disk"))
        assert same(cached[1], plain[1])
    assert len(list(derived.folder().rglob("*.safetensors"))) == 2


def test_a_spoilt_file_is_read_anew_and_a_full_disk_is_one_line(root, tmp_path, monkeypatch):
    expected = data(root, "disk")[0]
    (path,) = derived.folder().rglob("*.safetensors")
    path.write_bytes(b"spoilt")
    assert same(data(root, "disk")[0], expected)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BenchError, match=r"cannot cache .*; choose another folder with BENCH_CACHE") as caught:
        data(root, "disk")[0]
    assert "\n" not in str(caught.value)
