"""Limited splits: always the same images, and every class as evenly as the images allow."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import yaml
from PIL import Image

from bench.data import card as cards
from bench.data import derived, subset

NAMES = [f"i{i}" for i in range(200)]


def long_tail(seed=0):
    """Class c occurs in about every 2^c-th image, class 0 in all of them."""
    generator = np.random.default_rng(seed)
    return (generator.uniform(size=(len(NAMES), 6)) < 0.5 ** np.arange(6)).astype(np.uint8)


def counts(presence, chosen):
    return presence[[NAMES.index(name) for name in chosen]].sum(0)


@pytest.mark.parametrize("limit", [1, 6, 20, 60, 199])
def test_the_least_held_class_is_always_next(limit):
    """Against the definition: before each choice, no class that was still to be had was held less often than the one
    that the choice added to."""
    presence = long_tail()
    chosen = subset.balanced(NAMES, presence, limit)
    assert len(set(chosen)) == limit
    held = np.zeros(6, int)
    left = set(NAMES)
    for name in chosen:
        to_be_had = presence[[NAMES.index(n) for n in left]].any(0)
        least = held[to_be_had].min()
        assert (held[presence[NAMES.index(name)].astype(bool)] == least).any()
        held += presence[NAMES.index(name)]
        left.remove(name)


def test_rare_classes_come_more_often_than_by_chance():
    presence = long_tail()
    rare = presence.sum(0)[5]
    even = counts(presence, subset.evenly_spaced(NAMES, 24))
    fair = counts(presence, subset.balanced(NAMES, presence, 24))
    assert fair[5] == min(rare, fair[5]) and fair[1:].min() >= 4 > even[5]


def test_a_larger_limit_only_adds_images():
    presence = long_tail()
    for small, large in itertools.pairwise((1, 2, 5, 30, 100, 200)):
        assert set(subset.balanced(NAMES, presence, small)) <= set(subset.balanced(NAMES, presence, large))


def test_images_without_any_class_come_last():
    presence = np.zeros((len(NAMES), 3), np.uint8)
    presence[5:10, 1] = 1
    assert set(subset.balanced(NAMES, presence, 5)) == set(NAMES[5:10])
    assert len(set(subset.balanced(NAMES, presence, 12))) == 12


def test_evenly_spaced_names():
    chosen = [NAMES.index(name) for name in subset.evenly_spaced(NAMES, 7)]
    assert {b - a for a, b in itertools.pairwise(chosen)} <= {28, 29} and chosen[0] == 0 and len(chosen) == 7
    assert subset.evenly_spaced(NAMES, 200) == subset.evenly_spaced(NAMES, 999) == NAMES


CARD = {
    "name": "own", "title": "Own", "image_size": [32, 32], "image": "{id}.png",
    "splits": {"train": "ids.txt", "val": "ids.txt"},
    "tasks": {"depth": {"path": "{id}-depth.npy"}, "semseg": {"path": "{id}-seg.png", "classes": ["a", "b", "c"]}},
}  # fmt: skip


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Thirty images of class a; 3 and 17 also hold b, 20 also c."""
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "own.yaml").write_text(yaml.safe_dump(CARD))
    (folder / "ids.txt").write_text(" ".join(map(str, range(30))))
    for i in range(30):
        label = np.zeros((8, 8), np.uint8)
        label[0, 0] = 255
        label[4, 4] = {3: 1, 17: 1, 20: 2}.get(i, 0)
        Image.fromarray(label).save(folder / f"{i}-seg.png")
    return folder


def pick(root, limit, tasks=("depth", "semseg")):
    return subset.ids(cards.load(str(root / "own.yaml")), "train", root, limit, tasks)


def test_labels_decide_and_are_read_once(root, monkeypatch):
    chosen = pick(root, 2)
    assert "20" in chosen and set(chosen) & {"3", "17"} and chosen == sorted(chosen, key=int)
    monkeypatch.setattr(subset.decode, "read_label", None)  # a second reading would fail
    assert pick(root, 2) == chosen and set(pick(root, 3)) == {"3", "17", "20"} | set(pick(root, 3))
    assert len(list(derived.folder().rglob("*.png"))) == 1


def test_a_changed_label_is_read_again(root):
    pick(root, 2)
    (root / "20-seg.png").unlink()
    Image.fromarray(np.full((8, 8), 2, np.uint8)).save(root / "8-seg.png")
    assert "8" in pick(root, 2)


def test_another_list_has_another_table(root):
    """With one label missing, the list with that id and the list without it read the same files."""
    (root / "5-seg.png").unlink()
    card = cards.load(str(root / "own.yaml"))

    def chosen(without):
        return subset.ids(card, "train", root, 3, ("semseg",), without)

    assert chosen([]) and "20" in chosen(["5"]) and "20" in chosen(["5", "6"])
    (root / "ids.txt").write_text(" ".join(str(i) for i in range(30) if i != 5))
    assert chosen([]) == chosen(["5"])


def test_an_unreadable_label_is_not_chosen_before_the_others(root):
    (root / "20-seg.png").write_bytes(b"")
    assert "20" not in pick(root, 3)
    assert len(pick(root, 29)) == 29


def test_without_classes_and_in_scenes_evenly_spaced(root):
    assert pick(root, 3, tasks=("depth",)) == ["0", "10", "20"]
    scenes = cards.load("scenes")
    val = cards.ids(scenes, "val", None)
    assert subset.ids(scenes, "val", None, 10, ("semseg",)) == subset.evenly_spaced(val, 10)


@pytest.mark.parametrize("limit", [30, 31, None])
def test_a_limit_that_does_not_bind_is_none(root, limit):
    assert pick(root, limit) == [str(i) for i in range(30)]
