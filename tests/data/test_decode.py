"""Label formats in closed form, and errors that name the file."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from bench.data import decode
from bench.data.card import TaskCard
from bench.errors import BenchError

PLAIN = TaskCard()
THREE = TaskCard(classes=("a", "b", "c"))


def png(path, array):
    Image.fromarray(array).save(path)
    return path


def npy(path, array):
    np.save(path, array)
    return path


def test_an_image_is_rgb_whatever_it_is_stored_as(tmp_path):
    grey = decode.read_image(png(tmp_path / "grey.png", np.full((4, 6), 77, np.uint8)))
    assert grey.shape == (4, 6, 3) and grey.dtype == np.uint8 and (grey == 77).all()
    clear = np.full((4, 6, 4), 77, np.uint8)
    assert decode.read_image(png(tmp_path / "clear.png", clear)).shape == (4, 6, 3)


def test_a_palette_pngs_labels_are_its_indices_not_its_colours(tmp_path):
    indices = np.array([[0, 1], [2, 255]], np.uint8)
    image = Image.fromarray(indices).convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette([value for i in range(256) for value in (255 - i, 3 * i % 256, 90)])
    image.save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "P"
    np.testing.assert_array_equal(decode.read_label("semseg", THREE, tmp_path / "a.png"), indices)


@pytest.mark.parametrize("store", [lambda p, a: png(p / "a.png", a), lambda p, a: npy(p / "a.npy", a)])
def test_classes_ignore_then_subtract(tmp_path, store):
    card = TaskCard(classes=("a", "b", "c"), ignore=(0, 9), subtract=1)
    path = store(tmp_path, np.array([[0, 1, 2], [3, 9, 1]], np.uint8))
    expected = [[255, 0, 1], [2, 255, 0]]
    np.testing.assert_array_equal(decode.read_label("semseg", card, path), expected)


def test_negative_raw_labels_may_be_ignored(tmp_path):
    path = npy(tmp_path / "a.npy", np.array([[-1, 0, 2]], np.int64))
    card = TaskCard(classes=("a", "b", "c"), ignore=(-1,))
    np.testing.assert_array_equal(decode.read_label("human_parts", card, path), [[255, 0, 2]])


def test_sixteen_bit_labels_do_not_wrap(tmp_path):
    card = TaskCard(classes=("a", "b", "c"), ignore=(65535,), subtract=1000)
    path = png(tmp_path / "a.png", np.array([[1000, 1002, 65535]], np.uint16))
    np.testing.assert_array_equal(decode.read_label("semseg", card, path), [[0, 2, 255]])


@pytest.mark.parametrize("value", [3, 254])
def test_a_class_out_of_range_is_refused(tmp_path, value):
    path = png(tmp_path / "a.png", np.array([[0, value]], np.uint8))
    with pytest.raises(BenchError, match=rf"label value {value} is outside 0\.\.2") as error:
        decode.read_label("semseg", THREE, path)
    assert str(path) in str(error.value)


def test_a_class_below_the_first_is_refused(tmp_path):
    path = png(tmp_path / "a.png", np.array([[0, 1]], np.uint8))
    with pytest.raises(BenchError, match="label value 0 is outside 1..3"):
        decode.read_label("semseg", TaskCard(classes=("a", "b", "c"), subtract=1), path)


def test_classes_are_whole_numbers(tmp_path):
    with pytest.raises(BenchError, match="must be integers"):
        decode.read_label("semseg", THREE, npy(tmp_path / "a.npy", np.array([[0.0, 1.0]])))


@pytest.mark.parametrize("task", ["saliency", "edge"])
@pytest.mark.parametrize(
    "raw, expected",
    [
        (np.array([[0, 1, 1]], np.uint8), [[0, 1, 1]]),
        (np.array([[0, 255, 255]], np.uint8), [[0, 1, 1]]),
        (np.array([[0, 127, 128]], np.uint8), [[0, 0, 1]]),
        (np.array([[0, 0, 0]], np.uint8), [[0, 0, 0]]),
        (np.array([[False, True, True]]), [[0, 1, 1]]),
        (np.array([[0.0, 0.4, 1.0]], np.float32), [[0, 0, 1]]),
    ],
)
def test_masks_are_zero_and_one(tmp_path, task, raw, expected):
    np.testing.assert_array_equal(decode.read_label(task, PLAIN, npy(tmp_path / "a.npy", raw)), expected)


def test_a_one_bit_png_is_a_mask(tmp_path):
    Image.fromarray(np.array([[0, 255, 255, 0]], np.uint8)).convert("1").save(tmp_path / "a.png")
    np.testing.assert_array_equal(decode.read_label("edge", PLAIN, tmp_path / "a.png"), [[0, 1, 1, 0]])


def test_a_mask_of_0_and_1_with_255_for_unlabelled_keeps_its_ones(tmp_path):
    path = png(tmp_path / "a.png", np.array([[0, 1, 255]], np.uint8))
    np.testing.assert_array_equal(decode.read_label("saliency", TaskCard(ignore=(255,)), path), [[0, 1, 255]])


@pytest.mark.parametrize("raw", [[[0.0, np.inf]], [[0.0, np.nan]], [[-1.0, 1.0]], [[0, 300]]])
def test_what_is_no_mask_is_refused(tmp_path, raw):
    path = npy(tmp_path / "a.npy", np.array(raw))
    with pytest.raises(BenchError, match="expected a mask") as error:
        decode.read_label("edge", PLAIN, path)
    assert str(path) in str(error.value)


def test_depth_is_scaled_to_metres_and_invalid_is_zero(tmp_path):
    raw = np.array([[1.0, 2.5, 0.0, -3.0, np.nan, np.inf]], np.float32)
    depth = decode.read_label("depth", TaskCard(scale=2.0), npy(tmp_path / "a.npy", raw))
    assert depth.dtype == np.float32
    np.testing.assert_array_equal(depth, [[2, 5, 0, 0, 0, 0]])


def test_depth_in_a_sixteen_bit_png_is_millimetres_with_a_scale(tmp_path):
    path = png(tmp_path / "a.png", np.array([[0, 1000, 40000]], np.uint16))
    np.testing.assert_allclose(decode.read_label("depth", TaskCard(scale=0.001), path), [[0, 1, 40]], rtol=1e-6)


def test_normals_from_an_array_are_renormalised_and_invalid_ones_are_zero(tmp_path):
    raw = np.array([[[0, 0, -2], [3, 0, 4], [0, 0, 0], [np.nan, 0, 1]]], np.float32)
    normals = decode.read_label("normals", PLAIN, npy(tmp_path / "a.npy", raw))
    np.testing.assert_allclose(normals, [[[0, 0, -1], [0.6, 0, 0.8], [0, 0, 0], [0, 0, 0]]], atol=1e-6)


def test_normals_from_a_png_span_minus_one_to_one_and_black_has_none(tmp_path):
    raw = np.array([[[255, 128, 128], [128, 0, 128], [128, 128, 0], [0, 0, 0]]], np.uint8)
    normals = decode.read_label("normals", PLAIN, png(tmp_path / "a.png", raw))
    np.testing.assert_allclose(normals, [[[1, 0, 0], [0, -1, 0], [0, 0, -1], [0, 0, 0]]], atol=0.006)
    np.testing.assert_allclose(np.linalg.norm(normals[0, :3], axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6), (4, 6, 2)])
def test_normals_have_three_components_last(tmp_path, shape):
    path = npy(tmp_path / "a.npy", np.ones(shape, np.float32))
    with pytest.raises(BenchError, match="expected normals of shape") as error:
        decode.read_label("normals", PLAIN, path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("task", ["semseg", "saliency", "depth"])
def test_other_labels_have_one_channel(tmp_path, task):
    path = png(tmp_path / "a.png", np.zeros((4, 6, 3), np.uint8))
    with pytest.raises(BenchError, match="expected one channel") as error:
        decode.read_label(task, THREE, path)
    assert str(path) in str(error.value)


def whole(path):
    """The bytes of a good file with this suffix."""
    if path.suffix == ".npy":
        np.save(path, np.zeros((40, 40), np.uint8))
    else:
        noise = np.random.default_rng(0).integers(0, 255, (40, 40), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".npy", ".png", ".jpg"])
@pytest.mark.parametrize("broken", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"not this format" * 9])
def test_broken_files_are_refused_by_name_in_one_line(tmp_path, suffix, broken):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(broken(whole(path)))
    for read in (decode.read_image, lambda p: decode.read_label("saliency", PLAIN, p)):
        if suffix == ".npy" and read is decode.read_image:
            continue
        with pytest.raises(BenchError) as error:
            read(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".npy", ".mat", ".png", ".jpg"])
def test_a_missing_file_is_named(tmp_path, suffix):
    with pytest.raises(BenchError, match="missing file") as error:
        decode.read_label("depth", TaskCard(key="depth"), tmp_path / f"a{suffix}")
    assert str(tmp_path / f"a{suffix}") in str(error.value)


def test_a_pickle_is_never_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "b.npy").write_bytes(b"no array at all")
    for name in "ab":
        with pytest.raises(BenchError, match="cannot read array") as error:
            decode.read_label("depth", PLAIN, tmp_path / f"{name}.npy")
        assert "allow_pickle" not in str(error.value)  # numpy's advice to load it all the same


@pytest.mark.parametrize("values", [np.arange(24, dtype=np.uint16) * 900, np.full(24, 0.5, np.float32)])
def test_an_image_of_more_than_eight_bits_is_refused_and_not_cut_off(tmp_path, values):
    path = png(tmp_path / "a.tif", values.reshape(4, 6))
    with pytest.raises(BenchError, match="values are wider than 8 bits") as error:
        decode.read_image(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", [np.int64, np.uint16, np.int8])
def test_normals_in_whole_numbers_are_colours_of_eight_bits_alone(tmp_path, kind):
    with pytest.raises(BenchError, match=f"not {np.dtype(kind)}"):
        decode.read_label("normals", PLAIN, npy(tmp_path / "a.npy", np.full((4, 6, 3), 128).astype(kind)))
    vectors = npy(tmp_path / "b.npy", np.array([[[0, 0, -1]]], np.int8))  # as MATLAB stores them
    np.testing.assert_array_equal(decode.read_label("normals", PLAIN, vectors), [[[0, 0, -1]]])


@pytest.mark.parametrize("task", ["semseg", "saliency", "depth", "normals", "edge"])
@pytest.mark.parametrize("kind", ["<U3", "M8[s]", np.complex64])
def test_labels_are_real_numbers(tmp_path, task, kind):
    raw = np.zeros((4, 6, 3) if task == "normals" else (4, 6), kind)
    with pytest.raises(BenchError, match="expected real numbers"):
        decode.read_label(task, THREE, npy(tmp_path / "a.npy", raw))


def test_a_class_map_for_boundaries_too(tmp_path):
    path = npy(tmp_path / "a.npy", np.zeros((4, 6), "<U1"))
    with pytest.raises(BenchError, match="expected real numbers"):
        decode.read_label("edge", TaskCard(rule="boundaries"), path)


def test_several_arrays_under_the_name_of_one_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", np.ones((4, 6)), np.ones((4, 6)))
    path = (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(BenchError, match="several arrays"):
        decode.read_label("depth", PLAIN, path)
