"""The two archives called NYUD_MT, .npy arrays and .mat with images, read by one card and told apart by looking."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from bench.data import card as cards
from bench.data.loader import DenseDataset

CARD = cards.load("nyud_v2")
SIZE = (24, 32)


def write(root, name, arrays, variant):
    Image.fromarray(arrays["image"]).save(root / f"images/{name}.jpg")
    if variant == "arrays":
        Image.fromarray(arrays["segmentation"]).save(root / f"segmentation/{name}.png")
        for task in ("depth", "normals", "edge"):
            np.save(root / f"{task}/{name}.npy", arrays[task])
        return
    savemat(root / f"segmentation/{name}.mat", {"segmentation": arrays["segmentation"]})
    savemat(root / f"depth/{name}.mat", {"depth": arrays["depth"]})
    coded = np.round((arrays["normals"] + 1) * 255 / 2).astype(np.uint8)
    Image.fromarray(coded).save(root / f"normals/{name}.jpg", quality=100, subsampling=0)
    Image.fromarray((arrays["edge"] * 255).astype(np.uint8)).save(root / f"edge/{name}.png")


@pytest.fixture
def folder(tmp_path):
    """(variant of each image) -> a folder with the same two scenes in it."""

    def make(*variants):
        root = tmp_path / "-".join(variants)
        for part in ("images", "segmentation", "depth", "normals", "edge", "gt_sets"):
            (root / part).mkdir(parents=True)
        generator = np.random.default_rng(0)
        for i, variant in enumerate(variants):
            tilt = np.array([0.6 * (-1) ** i, 0.0, 0.8], np.float32)
            arrays = {
                "image": np.full((*SIZE, 3), 90, np.uint8),
                "segmentation": generator.integers(0, 41, SIZE).astype(np.uint8),
                "depth": generator.uniform(0.5, 10, SIZE).astype(np.float32),
                "normals": np.broadcast_to(tilt, (*SIZE, 3)).copy(),
                "edge": (generator.random(SIZE) > 0.9).astype(np.float32),
            }
            arrays["depth"][:, :3] = 0
            write(root, str(i), arrays, variant)
        for split in ("train", "val"):
            (root / f"gt_sets/{split}.txt").write_text("\n".join(map(str, range(len(variants)))))
        return DenseDataset(CARD, "train", tuple(CARD.tasks), SIZE, root)

    return make


def test_both_variants_hold_the_same_labels(folder):
    arrays, files = folder("arrays", "arrays"), folder("files", "files")
    for i in range(2):
        one, other = arrays[i], files[i]
        assert one.keys() == other.keys()
        for task in ("semseg", "depth", "edge"):
            torch.testing.assert_close(one[task], other[task])
        torch.testing.assert_close(one["normals"], other["normals"], rtol=0, atol=0.02)
        assert (one["depth"][:, :3] == 0).all() and (one["semseg"] == 255).any()


def test_each_image_is_looked_up_by_itself(folder):
    """Half an archive of one kind, half of the other."""
    mixed, arrays = folder("arrays", "files"), folder("arrays", "arrays")
    for i in range(2):
        torch.testing.assert_close(mixed[i]["depth"], arrays[i]["depth"])
