"""Batches: the same wherever the stream starts and however many processes make them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from bench import run
from bench.data import card as cards
from bench.data.card import Card
from bench.data.loader import DenseDataset, ShuffledBatches, steps_per_epoch, training_batches, validation_batches
from bench.errors import BenchError
from bench.recipe import Augment

TASKS = ("semseg", "depth", "normals")
STRONG = Augment(hflip=0.5, rotate=20, scale=(0.75, 1.25))
FILES = Card(
    name="own",
    title="Own",
    image_size=(32, 32),
    image="{id}.png",
    splits={"train": "train.txt", "val": "val.txt"},
    tasks={"saliency": {"path": "{id}-mask.png"}},
)


def scenes(split="train", limit=7, augment=STRONG, seed=0):
    return DenseDataset(cards.load("scenes"), split, TASKS, (32, 48), limit=limit, augment=augment, seed=seed)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def folder(tmp_path):
    """Three images of 40 x 36 pixels, and their masks."""
    noise = np.random.default_rng(0).integers(0, 255, (3, 36, 40, 3), dtype=np.uint8)
    for name, pixels in zip("abc", noise, strict=True):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        Image.fromarray((pixels[..., 0] > 127).astype(np.uint8)).save(tmp_path / f"{name}-mask.png")
    (tmp_path / "train.txt").write_text("a b c")
    (tmp_path / "val.txt").write_text("c")
    return tmp_path


@pytest.mark.parametrize("samples, batch_size, expected", [(8, 4, 2), (9, 4, 2), (3, 4, 1), (4, 4, 1), (1, 1, 1)])
def test_an_epoch_has_whole_batches_but_at_least_one(samples, batch_size, expected):
    assert steps_per_epoch(samples, batch_size) == expected


def test_every_epoch_is_a_permutation_and_none_is_like_the_other():
    batches = list(ShuffledBatches(samples=12, batch_size=4, start=0, stop=9, seed=0))
    epochs = [[key for batch in batches[3 * e : 3 * e + 3] for key in batch] for e in range(3)]
    for number, keys in enumerate(epochs):
        assert {epoch for epoch, _ in keys} == {number}
        assert sorted(index for _, index in keys) == list(range(12))
    assert len({tuple(index for _, index in keys) for keys in epochs}) == 3


def test_an_epoch_that_does_not_divide_draws_no_image_twice():
    for batch_size in (3, 4, 5):
        batches = list(ShuffledBatches(samples=7, batch_size=batch_size, start=0, stop=7 // batch_size, seed=0))
        indices = [index for batch in batches for _, index in batch]
        assert all(len(batch) == batch_size for batch in batches)
        assert len(set(indices)) == len(indices)


@pytest.mark.parametrize("start", [0, 1, 2, 3, 5, 8])
def test_batch_s_is_the_same_wherever_the_stream_starts(start):
    whole = list(ShuffledBatches(samples=7, batch_size=3, start=0, stop=9, seed=5))
    late = ShuffledBatches(samples=7, batch_size=3, start=start, stop=9, seed=5)
    assert list(late) == whole[start:]
    assert len(late) == 9 - start


def test_another_seed_is_another_order():
    orders = {str(list(ShuffledBatches(samples=20, batch_size=4, start=0, stop=5, seed=seed))) for seed in range(5)}
    assert len(orders) == 5


def test_a_set_smaller_than_a_batch_is_one_smaller_batch():
    batches = list(training_batches(scenes(limit=3), 8, 0, 2, workers=0, pin=False))
    assert [batch["image"].shape for batch in batches] == [(3, 3, 32, 48)] * 2


def test_worker_processes_change_nothing():
    none = list(training_batches(scenes(), 2, 0, 5, workers=0, pin=False))
    two = list(training_batches(scenes(), 2, 0, 5, workers=2, pin=False))
    assert len(none) == len(two) == 5
    assert all(same(a, b) for a, b in zip(none, two, strict=True))


def test_a_stream_that_starts_late_has_the_same_pixels():
    whole = list(training_batches(scenes(), 2, 0, 5, workers=0, pin=False))
    late = list(training_batches(scenes(), 2, 3, 5, workers=0, pin=False))
    assert all(same(a, b) for a, b in zip(whole[3:], late, strict=True))


def test_augmentation_differs_by_epoch_and_by_seed():
    data = scenes()
    assert not torch.equal(data[0, 1]["image"], data[1, 1]["image"])
    assert not torch.equal(data[0, 1]["image"], scenes(seed=1)[0, 1]["image"])
    assert same(data[0, 1], scenes()[0, 1])


def test_validation_is_in_order_whole_and_without_augmentation():
    data = scenes("val", limit=5, augment=None)
    batches = list(validation_batches(data, 2, workers=0, pin=False))
    assert [len(batch["image"]) for batch in batches] == [2, 2, 1]
    images = torch.cat([batch["image"] for batch in batches])
    assert torch.equal(images, torch.stack([data[i]["image"] for i in range(5)]))


def test_training_and_validation_scenes_are_different_pictures():
    train, val = scenes(limit=4, augment=None), scenes("val", limit=4, augment=None)
    for i in range(4):
        assert not any(torch.equal(train[i]["image"], val[j]["image"]) for j in range(4))


def test_files_come_at_the_wanted_size(folder):
    sample = DenseDataset(FILES, "train", ("saliency",), (64, 32), folder)[0]
    assert sample["image"].shape == (3, 64, 32) and sample["saliency"].shape == (64, 32)


def test_a_label_of_another_size_is_refused_by_path(folder):
    Image.new("L", (40, 35)).save(folder / "b-mask.png")
    data = DenseDataset(FILES, "train", ("saliency",), (32, 32), folder)
    with pytest.raises(BenchError, match=r"label is \(35, 40\), its image \(36, 40\)") as error:
        data[1]
    assert str(folder / "b-mask.png") in str(error.value)


def test_a_missing_file_is_refused_before_anything_is_read(folder):
    (folder / "c.png").unlink()
    with pytest.raises(BenchError, match=r"missing .*c\.png"):
        DenseDataset(FILES, "train", ("saliency",), (32, 32), folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_in_one_line_from_a_worker_process_too(folder, workers):
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:200])
    data = DenseDataset(FILES, "train", ("saliency",), (32, 32), folder)
    with pytest.raises(BenchError) as error:
        list(training_batches(data, 3, 0, 1, workers, pin=False))
    status, failure = run.classify(error.value)
    assert status == "failed"
    assert failure.message.startswith("cannot decode image") and str(folder / "b.png") in failure.message
    assert "\n" not in failure.message


def test_shuffled_labels_are_those_of_another_image_and_the_same_in_every_epoch():
    plain, shuffled = (
        DenseDataset(cards.load("scenes"), "train", TASKS, (32, 48), limit=7, augment=Augment(hflip=0), seed=3,
                     shuffled_labels=flag)
        for flag in (False, True)
    )  # fmt: skip
    assert sorted(shuffled.label_of) == list(range(7)) and all(i != j for i, j in enumerate(shuffled.label_of))
    for index, other in enumerate(shuffled.label_of):
        for epoch in (0, 1):
            found = shuffled[epoch, index]
            assert torch.equal(found["image"], plain[epoch, index]["image"])
            assert all(torch.equal(found[task], plain[epoch, other][task]) for task in TASKS)


def test_shuffled_labels_of_an_image_of_another_size_are_fitted_to_it(folder):
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(folder / "a.png")
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(folder / "a-mask.png")
    crop = Augment(hflip=0, crop_scale=(1.0, 1.0))
    shuffled = DenseDataset(FILES, "train", ("saliency",), (16, 16), folder, augment=crop, shuffled_labels=True)
    for index in range(3):
        assert shuffled[0, index]["saliency"].shape == shuffled[0, index]["image"].shape[1:] == (16, 16)


def test_shuffled_labels_differ_by_seed_and_not_otherwise():
    def order(seed):
        return DenseDataset(cards.load("scenes"), "train", TASKS, (32, 48), limit=9, seed=seed, shuffled_labels=True)

    assert order(0).label_of == order(0).label_of != order(1).label_of
