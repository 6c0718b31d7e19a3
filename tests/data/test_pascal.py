"""PASCAL_MT's layout and encodings, rule by rule, on a small folder of its true form.

Palette PNGs, nested .mat structures, odd sizes, images without a person.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from bench.data import card as cards
from bench.data import decode, derived
from bench.data.loader import DenseDataset
from bench.errors import BenchError

CARD = cards.load("pascal_context")
SIZES = {f"2008_{i:06d}": (37 + 3 * i, 61 - 2 * i) for i in range(16)}  # (height, width)
FIRST, SECOND, THIRD, *_ = SIZES


def structs(records, fields):
    """MATLAB's (1, n) structure array, or its empty matrix."""
    if not records:
        return np.zeros((0, 0))
    out = np.empty((1, len(records)), dtype=[(field, object) for field in fields])
    for i, record in enumerate(records):
        for field in fields:
            out[0, i][field] = record[field]
    return out


def thing(shape, number, parts=(), name="person"):
    """One object of an annotation; parts are (name, rows, columns) boxes."""
    masks = []
    for part, rows, columns in parts:
        mask = np.zeros(shape, np.uint8)
        mask[rows, columns] = 1
        masks.append({"part_name": part, "mask": mask})
    whole = np.ones(shape, np.uint8)
    return {"class": name, "class_ind": number, "mask": whole, "parts": structs(masks, ("part_name", "mask"))}


def save_annotation(path, objects):
    fields = ("class", "class_ind", "mask", "parts")
    anno = structs([{"imname": path.stem, "objects": structs(objects, fields)}], ("imname", "objects"))
    savemat(path, {"anno": anno}, do_compression=True)


def save_palette(path, indices):
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette([value for i in range(256) for value in (i, 255 - i, 7 * i % 256)])
    image.save(path)


def box(top, bottom, left, right):
    return slice(top, bottom), slice(left, right)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "PASCAL_MT"
    for folder in (
        "JPEGImages", "ImageSets/Context", "semseg/VOC12", "semseg/pascal-context", "human_parts", "sal_distill",
        "normals_distill", "pascal-context/trainval",
    ):  # fmt: skip
        (root / folder).mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i, (name, (h, w)) in enumerate(SIZES.items()):
        Image.fromarray(generator.integers(0, 256, (h, w, 3), np.uint8)).save(root / f"JPEGImages/{name}.jpg")
        classes = generator.integers(0, 21, (h, w))
        classes[0] = 255
        save_palette(root / f"semseg/pascal-context/{name}.png", (classes + 1) % 21)
        if i != 1:
            save_palette(root / f"semseg/VOC12/{name}.png", classes)
        person = thing((h, w), 15, [("head", *box(0, 9, 0, 9)), ("torso", *box(9, 20, 0, 9))])
        save_annotation(root / f"human_parts/{name}.mat", [person] if i % 2 == 0 else [thing((h, w), 3, name="bird")])
        soft = generator.integers(0, 256, (h, w), np.uint8)
        Image.fromarray(soft).save(root / f"sal_distill/{name}.png")
        Image.fromarray(generator.integers(0, 256, (h, w, 3), np.uint8)).save(root / f"normals_distill/{name}.png")
        label_map = np.where(np.arange(w) < w // 2, 3, 5)[None].repeat(h, 0)  # 3 is trusted, 5 is not
        savemat(root / f"pascal-context/trainval/{name}.mat", {"LabelMap": label_map.astype(np.uint16)})
    names = list(SIZES)
    (root / "ImageSets/Context/train.txt").write_text("\n".join(names[:10]) + "\n")
    (root / "ImageSets/Context/val.txt").write_text("\n".join(names[10:]) + "\n")
    return root


def label(root, task, name):
    path = cards.locate(root, CARD.tasks[task].path, name)
    return decode.read_label(task, CARD.tasks[task], path, root, name, SIZES[name])


def test_the_card_knows_the_published_label_spaces():
    assert len(CARD.tasks["semseg"].classes) == len(CARD.tasks["semseg"].colours) == 21
    assert CARD.channels(CARD.default_tasks) == {"semseg": 21, "human_parts": 7, "saliency": 1, "normals": 3}
    assert len(CARD.tasks["human_parts"].parts) == 6
    assert len({part for parts in CARD.tasks["human_parts"].parts.values() for part in parts}) == 10 + 2 + 2 + 4 + 2 + 4
    values = CARD.tasks["normals"].keep.values
    assert len(values) == len(set(values)) == 170 and min(values) == 3 and max(values) == 457


def test_semseg_is_of_voc_where_that_has_it_else_of_context(root):
    for name in (FIRST, SECOND):
        folder = "VOC12" if name == FIRST else "pascal-context"
        expected = np.array(Image.open(root / f"semseg/{folder}/{name}.png"))
        np.testing.assert_array_equal(label(root, "semseg", name), expected)
    assert (label(root, "semseg", FIRST)[0] == 255).all()


@pytest.mark.parametrize(
    ("part", "expected"),
    [("hair", 1), ("lebrow", 1), ("nose", 1), ("neck", 2), ("ruarm", 3), ("lhand", 4), ("luleg", 5), ("rfoot", 6)],
)
def test_parts_are_merged_to_seven_classes(root, part, expected):
    path = root / f"human_parts/{FIRST}.mat"
    save_annotation(path, [thing(SIZES[FIRST], 15, [(part, *box(3, 7, 5, 8))])])
    labels = label(root, "human_parts", FIRST)
    assert (labels[3:7, 5:8] == expected).all() and (labels != 0).sum() == 12


def test_parts_are_painted_in_order_over_all_persons(root):
    """Later parts over earlier ones; persons without parts and other objects leave nothing."""
    shape = SIZES[FIRST]
    objects = [
        thing(shape, 3, [("head", *box(0, 30, 0, 30))], name="bird"),
        thing(shape, 15, [("torso", *box(0, 10, 0, 10)), ("head", *box(5, 15, 0, 10))]),
        thing(shape, 15),
        thing(shape, 15, [("lfoot", *box(14, 20, 5, 15))]),
    ]
    save_annotation(root / f"human_parts/{FIRST}.mat", objects)
    expected = np.zeros(shape, np.uint8)
    expected[0:10, 0:10], expected[5:15, 0:10], expected[14:20, 5:15] = 2, 1, 6
    np.testing.assert_array_equal(label(root, "human_parts", FIRST), expected)


@pytest.mark.parametrize("objects", [[], [(3, "bird")], [(15, "person")]], ids=["nothing", "a bird", "no parts"])
def test_an_image_without_parts_is_ignored_whole(root, objects):
    path = root / f"human_parts/{THIRD}.mat"
    save_annotation(path, [thing(SIZES[THIRD], number, name=name) for number, name in objects])
    for _ in range(2):  # derived, and from the cache
        labels = label(root, "human_parts", THIRD)
        assert labels.shape == SIZES[THIRD] and (labels == 255).all()


def test_saliency_is_what_exceeds_half(root):
    soft = np.array([[0, 1, 126, 127, 128, 255]], np.uint8)
    Image.fromarray(soft).save(root / f"sal_distill/{FIRST}.png")
    np.testing.assert_array_equal(label(root, "saliency", FIRST), [[0, 0, 0, 0, 1, 1]])
    # A map that is dark throughout is a map without anything salient.
    Image.fromarray(np.full((2, 2), 90, np.uint8)).save(root / f"sal_distill/{FIRST}.png")
    np.testing.assert_array_equal(label(root, "saliency", FIRST), np.zeros((2, 2)))


def test_normals_are_kept_in_trusted_classes(root):
    raw = np.array(Image.open(root / f"normals_distill/{FIRST}.png")).astype(np.float64)
    vectors = 2 * raw / 255 - 1
    expected = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    expected[:, SIZES[FIRST][1] // 2 :] = 0
    normals = label(root, "normals", FIRST)
    strong = np.linalg.norm(vectors, axis=-1) > 0.1
    np.testing.assert_allclose(normals[strong], expected[strong], atol=1e-5)
    assert not normals[:, SIZES[FIRST][1] // 2 :].any() and normals[:, : SIZES[FIRST][1] // 2].any()


def test_edges_are_thinned_class_boundaries(root):
    """Two halves: the Laplacian marks the columns on both sides, thinning leaves one."""
    edges = label(root, "edge", FIRST)
    middle = SIZES[FIRST][1] // 2
    assert set(np.flatnonzero(edges.any(0))) <= {middle - 1, middle}
    assert (edges.sum(1)[1:-1] == 1).all() and edges.max() == 1


def test_laplacian_by_hand():
    """A lone pixel of another class: it and its four neighbours."""
    classes = np.zeros((7, 7), int)
    classes[3, 3] = 9
    marked = np.zeros((7, 7), bool)
    for row in range(7):
        for column in range(7):
            around = [
                classes[abs(r) if r < 7 else 12 - r, abs(c) if c < 7 else 12 - c]
                for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
            ]
            marked[row, column] = sum(around) != 4 * classes[row, column]
    assert marked.sum() == 5
    edges = decode.boundaries(classes).astype(bool)
    assert edges.any() and not (edges & ~marked).any()


def tree(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_the_users_folder_is_left_as_it_is_and_the_cache_follows_it(root, monkeypatch):
    before = tree(root)
    dataset = DenseDataset(CARD, "train", tuple(CARD.tasks), (48, 56), root)
    first = dataset[0]
    assert tree(root) == before
    assert len(list(derived.folder().rglob("*.png"))) == 2  # parts and edges of one image

    reads = []
    real = decode._read_mat
    monkeypatch.setattr(decode, "_read_mat", lambda path, key: reads.append(path.parent.name) or real(path, key))
    again = dataset[0]
    assert reads == ["trainval"]  # the mask of the normals; parts and edges came from the cache
    assert all(torch.equal(first[key], again[key]) for key in first)

    save_annotation(root / f"human_parts/{FIRST}.mat", [thing(SIZES[FIRST], 15, [("lfoot", *box(0, 30, 0, 30))])])
    changed = dataset[0]
    assert "human_parts" in reads and (changed["human_parts"] == 6).any()


def test_samples_of_the_whole_folder(root):
    for split, count in (("train", 10), ("val", 6)):
        dataset = DenseDataset(CARD, split, tuple(CARD.tasks), (48, 56), root)
        assert len(dataset) == count
        for i in range(count):
            sample = dataset[i]
            assert {k: tuple(v.shape) for k, v in sample.items()} == {
                "image": (3, 48, 56), "semseg": (48, 56), "human_parts": (48, 56), "saliency": (48, 56),
                "normals": (3, 48, 56), "edge": (48, 56),
            }  # fmt: skip
            parts = set(sample["human_parts"].unique().tolist())
            assert parts == ({0, 1, 2} if dataset.names[i][-1] in "02468" else {255})


def test_only_the_files_of_the_tasks_in_use_are_needed(root):
    for folder in ("human_parts", "sal_distill"):
        for path in (root / folder).iterdir():
            path.unlink()
    assert len(DenseDataset(CARD, "train", ("semseg", "normals"), (48, 56), root)) == 10
    with pytest.raises(BenchError, match=r"missing .*human_parts/2008_000000.mat and 9 more files"):
        DenseDataset(CARD, "train", ("semseg", "human_parts"), (48, 56), root)
    (root / f"pascal-context/trainval/{FIRST}.mat").unlink()
    with pytest.raises(BenchError, match=rf"missing .*pascal-context/trainval/{FIRST}.mat"):
        DenseDataset(CARD, "train", ("semseg", "normals"), (48, 56), root)


def without_anno(path):
    savemat(path, {"something": np.zeros(3)})


def unknown_part(path):
    save_annotation(path, [thing(SIZES[FIRST], 15, [("tail", *box(0, 3, 0, 3))])])


def another_structure(path):
    savemat(path, {"anno": np.zeros((2, 2))})


BROKEN = {
    "no anno": (without_anno, r"has no variable 'anno'; it holds something"),
    "part": (unknown_part, r"the card gives no class to the part 'tail'"),
    "structure": (another_structure, r"is not a PASCAL-Part annotation"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:150]), r"cannot read MATLAB file"),
    "empty": (lambda path: path.write_bytes(b""), r"cannot read MATLAB file"),
    "text": (lambda path: path.write_text("not a matlab file at all " * 20), r"cannot read MATLAB file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_annotations_are_named_in_one_line(root, name):
    spoil, message = BROKEN[name]
    path = root / f"human_parts/{FIRST}.mat"
    spoil(path)
    with pytest.raises(BenchError, match=message) as caught:
        label(root, "human_parts", FIRST)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_named_in_one_line(root, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BenchError, match=r"cannot cache .*; choose another folder with BENCH_CACHE") as caught:
        label(root, "edge", FIRST)
    assert "\n" not in str(caught.value)


def test_a_spoilt_cache_is_derived_anew(root):
    expected = label(root, "edge", FIRST)
    (path,) = derived.folder().rglob("*.png")
    path.write_bytes(b"spoilt")
    np.testing.assert_array_equal(label(root, "edge", FIRST), expected)
