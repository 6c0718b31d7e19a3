"""Geometry on analytic scenes: where a pixel goes is known in closed form, for the image and for every label."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.data import transforms
from bench.recipe import Augment

HEIGHT, WIDTH = SIZE = 48, 64
LABELS = ("semseg", "human_parts", "saliency", "edge", "depth", "normals")
IGNORED = {"image": 0, "semseg": 255, "human_parts": 255, "saliency": 255, "edge": 255, "depth": 0, "normals": 0}


def ramps(height=HEIGHT, width=WIDTH):
    """Red and depth say a pixel's column, green and the classes its row."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return {
        "image": torch.stack([columns / width, rows / height, torch.ones(height, width)]).float(),
        "semseg": rows.clone(),
        "human_parts": rows.clone(),
        "saliency": (columns % 2).float(),
        "edge": (rows % 2).float(),
        "depth": columns.float() + 1,
        "normals": torch.tensor([0.6, 0.0, -0.8]).view(3, 1, 1).expand(3, height, width).clone(),
    }


def blob(x, y, size=65):
    """A soft spot in the image and a disc in the labels, (x, y) pixels from the centre."""
    ys, xs = torch.meshgrid(*2 * [torch.arange(size) - (size - 1) / 2], indexing="ij")
    square = (xs - x) ** 2 + (ys - y) ** 2
    disc = square < 4.5**2
    return {
        "image": torch.exp(-square / 8).expand(3, -1, -1).clone(),
        "semseg": disc.long(),
        "depth": 1.0 + disc,
        "normals": F.normalize(torch.stack([0.8 * disc, 0 * square, -torch.ones(size, size)]), dim=0),
    }


def centroid(weight):
    ys, xs = torch.meshgrid(*[torch.arange(side) - (side - 1) / 2 for side in weight.shape], indexing="ij")
    return torch.stack([(weight * xs).sum(), (weight * ys).sum()]) / weight.sum()


def test_packed_and_unpacked_samples_have_the_documented_types():
    shape = (4, 6)
    arrays = {"image": np.full((*shape, 3), 255, np.uint8), "normals": np.zeros((*shape, 3), np.float32)}
    arrays |= {name: np.full(shape, 255, np.uint8) for name in ("semseg", "human_parts", "saliency", "edge")}
    arrays["depth"] = np.ones(shape, np.float32)
    packed = transforms.pack(arrays)
    assert {name for name, x in packed.items() if x.dtype == torch.uint8} == set(LABELS) - {"depth", "normals"} | {
        "image"
    }
    sample = transforms.unpack(packed)
    assert sample["image"].shape == sample["normals"].shape == (3, *shape)
    assert sample["image"].dtype == torch.float32 and sample["image"].max() == 1
    assert {name for name, x in sample.items() if x.dtype == torch.int64} == {"semseg", "human_parts"}
    assert sample["semseg"].unique().item() == sample["edge"].unique().item() == 255


def test_resizing_packed_or_unpacked_differs_by_rounding_alone():
    generator = torch.Generator().manual_seed(0)
    packed = {
        "image": torch.randint(0, 256, (3, 40, 60), generator=generator, dtype=torch.uint8),
        "semseg": torch.randint(0, 9, (40, 60), generator=generator, dtype=torch.uint8),
        "normals": F.normalize(torch.randn(3, 40, 60, generator=generator), dim=0),
    }
    for size in ((31, 33), (64, 80)):
        before = transforms.unpack(transforms.resize(packed, size))
        after = transforms.resize(transforms.unpack(packed), size)
        assert (before["image"] - after["image"]).abs().max() <= 1 / 255
        assert torch.equal(before["semseg"], after["semseg"]) and torch.equal(before["normals"], after["normals"])


@pytest.mark.parametrize("degrees, zoom", [(0, 1.5), (25, 1), (-40, 1.25), (90, 0.8)])
def test_a_squashed_picture_turns_as_it_would_have_turned_before(degrees, zoom):
    """Where each pixel came from, in closed form: out of the square, a turn in the frame, and back into the square."""
    height, width = 96, 160
    side = 80
    squashed = transforms.resize(ramps(height, width), (side, side))
    moved = transforms.rotate_and_zoom(squashed, degrees, zoom, frame=(height, width))
    ys, xs = torch.meshgrid(*2 * [(torch.arange(side) + 0.5) / side - 0.5], indexing="ij")
    angle = math.radians(degrees)
    x, y = xs * width, ys * height
    column = (math.cos(angle) * x + math.sin(angle) * y) / zoom + width / 2 - 0.5
    row = (-math.sin(angle) * x + math.cos(angle) * y) / zoom + height / 2 - 0.5
    rim = 4
    inside = (column > rim) & (column < width - 1 - rim) & (row > rim) & (row < height - 1 - rim)
    assert inside.float().mean() > 0.2
    assert (moved["image"][0] * width - column)[inside].abs().max() < 0.1
    assert (moved["image"][1] * height - row)[inside].abs().max() < 0.1
    # Nearest twice: half a pixel of the square (2 columns, 1.2 rows), and half a pixel of the frame.
    assert (moved["depth"] * zoom - 1 - column)[inside].abs().max() <= 0.5 * width / side + 0.5 + 1e-2
    assert (moved["semseg"] - row)[inside].abs().max() <= 0.5 * height / side + 0.5 + 1e-2


def test_zooms_may_be_listed():
    settings = Augment(hflip=0, scales=(1.0, 1.2, 1.5))
    seen = set()
    for seed in range(40):
        out = transforms.augment(ramps(), settings, torch.Generator().manual_seed(seed), SIZE)
        zoom = next(
            z for z in settings.scales if torch.equal(out["depth"], transforms.rotate_and_zoom(ramps(), 0, z)["depth"])
        )
        for name in LABELS:
            torch.testing.assert_close(out[name], transforms.rotate_and_zoom(ramps(), 0, zoom)[name], rtol=0, atol=1e-6)
        seen.add(zoom)
    assert seen == set(settings.scales)
    with pytest.raises(ValueError, match="not both"):
        Augment(scale=(0.5, 1), scales=(1.0, 2.0))


def test_hflip_twice_is_the_identity():
    sample = ramps()
    twice = transforms.hflip(transforms.hflip(sample))
    for name, x in sample.items():
        torch.testing.assert_close(twice[name], x, rtol=0, atol=0)


def test_hflip_mirrors_everything_and_turns_the_normals_x():
    sample, flipped = ramps(), transforms.hflip(ramps())
    for name in ("image", "semseg", "depth", "saliency"):
        torch.testing.assert_close(flipped[name][..., 0], sample[name][..., -1], rtol=0, atol=0)
    torch.testing.assert_close(flipped["normals"][:, 0, 0], torch.tensor([-0.6, 0.0, -0.8]))


@pytest.mark.parametrize("degrees, zoom", [(0, 1.5), (0, 0.7), (20, 1), (-35, 1.25), (90, 1), (170, 0.8)])
def test_rotate_and_zoom_keeps_image_and_labels_registered_to_half_a_pixel(degrees, zoom):
    moved = transforms.rotate_and_zoom(ramps(), degrees, zoom)
    column, row = moved["image"][0] * WIDTH, moved["image"][1] * HEIGHT
    inside = moved["image"][2] > 0.5  # the third channel was 1 everywhere
    # Nearest labels and bilinear colours of the same place differ by half a source pixel at most.
    assert inside.float().mean() > 0.3
    assert (moved["depth"] * zoom - 1 - column)[inside].abs().max() <= 0.5 + 1e-2
    assert (moved["semseg"] - row)[inside].abs().max() <= 0.5 + 1e-2
    assert torch.equal(moved["semseg"], moved["human_parts"])
    for name in ("semseg", "human_parts", "saliency", "edge", "depth"):
        assert torch.equal(moved[name] == IGNORED[name], ~inside), name


@pytest.mark.parametrize("degrees, zoom", [(30, 1.0), (-75, 0.8), (140, 1.25)])
def test_a_spot_goes_clockwise_and_outwards_with_the_zoom(degrees, zoom):
    x, y, angle = 12.0, -5.0, math.radians(degrees)
    moved = transforms.rotate_and_zoom(blob(x, y), degrees, zoom)
    # With y pointing down, (1, 0) turns clockwise towards (0, 1).
    expected = zoom * torch.tensor(
        [math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y]
    )
    torch.testing.assert_close(centroid(moved["image"][0]), expected, rtol=0, atol=0.1)
    torch.testing.assert_close(centroid((moved["semseg"] == 1).float()), expected, rtol=0, atol=0.5)
    torch.testing.assert_close(centroid((moved["depth"] * zoom > 1.5).float()), expected, rtol=0, atol=0.5)
    tilted = moved["normals"][:2].norm(dim=0) > 0.3
    torch.testing.assert_close(centroid(tilted.float()), expected, rtol=0, atol=0.5)


@pytest.mark.parametrize("quarters", [1, 2, 3, -1])
def test_quarter_turns_of_a_square_are_exact_and_clockwise(quarters):
    sample = {name: x for name, x in ramps(33, 33).items() if name != "normals"}
    moved = transforms.rotate_and_zoom(sample, 90 * quarters, 1.0)
    for name, x in sample.items():
        # torch.rot90 counts anticlockwise as seen with y down.
        torch.testing.assert_close(moved[name], torch.rot90(x, -quarters, (-2, -1)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("degrees", [0, 25, 90, -130])
def test_normals_turn_in_the_picture_plane(degrees):
    angle = math.radians(degrees)
    sample = ramps()
    sample["normals"] = torch.tensor([0.48, 0.36, -0.8]).view(3, 1, 1).expand(3, HEIGHT, WIDTH)
    moved = transforms.rotate_and_zoom(sample, degrees, 1.1)["normals"]
    expected = torch.tensor(
        [
            math.cos(angle) * 0.48 - math.sin(angle) * 0.36,
            math.sin(angle) * 0.48 + math.cos(angle) * 0.36,
            -0.8,
        ]
    )
    inside = moved.norm(dim=0) > 0.5
    assert inside.any()
    torch.testing.assert_close(moved[:, inside], expected[:, None].expand(3, int(inside.sum())), rtol=0, atol=1e-5)


def test_zooming_out_ignores_what_comes_from_outside():
    moved = transforms.rotate_and_zoom(ramps(), 0, 0.5)
    rows, columns = slice(HEIGHT // 4, -HEIGHT // 4), slice(WIDTH // 4, -WIDTH // 4)
    inside = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    inside[rows, columns] = True
    for name, value in IGNORED.items():
        assert (moved[name][..., ~inside] == value).all(), name
    assert (moved["semseg"][inside] < HEIGHT).all()
    assert (moved["depth"][inside] >= 2).all()  # divided by the zoom
    torch.testing.assert_close(moved["normals"][:, inside].norm(dim=0), torch.ones(int(inside.sum())))


def test_nearest_labels_make_no_new_values():
    moved = transforms.rotate_and_zoom(ramps(), 33, 0.9)
    assert set(moved["saliency"].unique().tolist()) <= {0, 1, 255}
    assert moved["semseg"].dtype == torch.int64


@pytest.mark.parametrize("size", [(96, 128), (24, 32), (36, 100), (61, 47)])
def test_resize_keeps_image_and_labels_registered_to_half_a_pixel(size):
    resized = transforms.resize(ramps(), size)
    rim = 3  # source pixels; at the rim an antialiasing kernel is cut off
    column, row = resized["image"][0] * WIDTH, resized["image"][1] * HEIGHT
    centre = (torch.arange(size[1]) + 0.5) * WIDTH / size[1] - 0.5
    inside = (column > rim) & (column < WIDTH - 1 - rim) & (row > rim) & (row < HEIGHT - 1 - rim)
    assert all(x.shape[-2:] == size for x in resized.values())
    assert (column - centre)[inside].abs().max() < 0.1  # an antialiasing kernel is sampled
    assert (resized["depth"] - 1 - column)[inside].abs().max() <= 0.5 + 0.1
    assert (resized["semseg"] - row)[inside].abs().max() <= 0.5 + 0.1
    assert set(resized["saliency"].unique().tolist()) <= {0, 1}


def test_resize_keeps_types_and_a_sample_that_has_the_size():
    sample = ramps()
    assert transforms.resize(sample, (HEIGHT, WIDTH))["image"] is sample["image"]
    assert {k: v.dtype for k, v in transforms.resize(sample, (20, 20)).items()} == {
        k: v.dtype for k, v in sample.items()
    }


def test_resized_normals_are_unit_or_ignored():
    sample = ramps()
    normals = sample["normals"]
    normals[:, :, WIDTH // 2 :] = torch.tensor([0.0, 0.6, -0.8]).view(3, 1, 1)
    normals[:, : HEIGHT // 2] = 0
    resized = transforms.resize(sample, (73, 91))["normals"]
    length = resized.norm(dim=0)
    assert ((length - 1).abs().lt(1e-5) | length.eq(0)).all()
    assert (length[:35] == 0).all() and (length[38:] > 0).all()
    torch.testing.assert_close(resized[:, 60, 10], torch.tensor([0.6, 0.0, -0.8]))
    torch.testing.assert_close(resized[:, 60, 80], torch.tensor([0.0, 0.6, -0.8]))


def test_augment_depends_on_the_generators_state_alone():
    settings = Augment(hflip=0.5, rotate=20, scale=(0.75, 1.25))
    first, again, other = (
        transforms.augment(ramps(), settings, torch.Generator().manual_seed(seed), SIZE) for seed in (1, 1, 2)
    )
    for name in first:
        torch.testing.assert_close(first[name], again[name], rtol=0, atol=0)
    assert not torch.equal(first["image"], other["image"])


@pytest.mark.parametrize("seed", range(4))
def test_augment_with_certain_outcomes(seed):
    generator = torch.Generator().manual_seed(seed)
    sample = ramps()
    same = transforms.augment(sample, Augment(hflip=0), generator, SIZE)
    flipped = transforms.augment(sample, Augment(hflip=1), generator, SIZE)
    nearer = transforms.augment(sample, Augment(hflip=0, scale=(2, 2)), generator, SIZE)
    for name in LABELS:
        torch.testing.assert_close(same[name], sample[name], rtol=0, atol=0)
        torch.testing.assert_close(flipped[name], transforms.hflip(sample)[name], rtol=0, atol=0)
        torch.testing.assert_close(nearer[name], transforms.rotate_and_zoom(sample, 0, 2)[name], rtol=0, atol=0)


def test_augment_draws_within_the_recipes_ranges(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        transforms, "rotate_and_zoom", lambda s, degrees, zoom, border, frame: drawn.append((degrees, zoom)) or s
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        transforms.augment(ramps(4, 4), Augment(rotate=20, scale=(0.75, 1.25)), generator, (4, 4))
    degrees, zooms = torch.tensor(drawn).T
    assert -20 <= degrees.min() < -17 and 17 < degrees.max() <= 20
    assert 0.75 <= zooms.min() < 0.8 and 1.2 < zooms.max() <= 1.25


def test_what_comes_from_outside_may_count_as_background():
    ignored, counted = (transforms.rotate_and_zoom(ramps(), 0, 0.5, border) for border in ("ignore", "background"))
    outside = ignored["image"][2] < 0.5
    for name in LABELS:
        same = ignored[name] == counted[name]
        assert same[..., ~outside].all(), name
        assert not counted[name][..., outside].any(), name
    assert (ignored["semseg"][outside] == 255).all()


# the TIT set-up


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.7, 2.0])
@pytest.mark.parametrize("top, left", [(0, 0), (7, 11)])
def test_rescaled_cut_outs_stay_registered_to_half_a_pixel(factor, top, left):
    moved = transforms.crop(transforms.rescale(ramps(), factor), top, left, (40, 56))
    assert all(x.shape[-2:] == (40, 56) for x in moved.values())
    column, row = moved["image"][0] * WIDTH, moved["image"][1] * HEIGHT
    inside = moved["image"][2] > 0.5
    assert (moved["depth"] * factor - 1 - column)[inside].abs().max() <= max(0.5, 0.5 / factor) + 1e-2
    assert (moved["semseg"] - row)[inside].abs().max() <= max(0.5, 0.5 / factor) + 1e-2
    # Where a pixel of the cut-out lies in the picture, in closed form (pixel centres; blurred only near the rim).
    ys, xs = torch.meshgrid(torch.arange(40), torch.arange(56), indexing="ij")
    wide, high = round(WIDTH * factor) / WIDTH, round(HEIGHT * factor) / HEIGHT  # sizes are whole pixels
    expected_x, expected_y = (xs + left + 0.5) / wide - 0.5, (ys + top + 0.5) / high - 0.5
    middle = inside & (expected_x > 3) & (expected_x < WIDTH - 4) & (expected_y > 3) & (expected_y < HEIGHT - 4)
    assert middle.any()
    torch.testing.assert_close(column[middle], expected_x[middle], rtol=0, atol=0.1)
    torch.testing.assert_close(row[middle], expected_y[middle], rtol=0, atol=0.1)


def test_a_cut_out_larger_than_the_picture_is_padded():
    moved = transforms.crop(ramps(), 0, 0, (60, 70))
    for name, value in IGNORED.items():
        assert (moved[name][..., HEIGHT:, :] == value).all() and (moved[name][..., WIDTH:] == value).all(), name
        torch.testing.assert_close(moved[name][..., :HEIGHT, :WIDTH], ramps()[name], rtol=0, atol=0)


def test_cut_outs_are_drawn_evenly_from_all_places():
    sample = {"image": torch.stack([ramps()["image"][0]] * 3)}
    generator = torch.Generator().manual_seed(0)
    places = []
    for _ in range(400):
        cut = transforms.random_crop(
            sample, (48, 60), 1.0, "ignore", lambda: torch.rand((), generator=generator).item()
        )
        places.append(round(cut["image"][0, 0, 0].item() * WIDTH))
    counts = np.bincount(places, minlength=5)
    assert len(counts) == 5 and counts.min() > 50


def test_cut_outs_of_one_class_are_drawn_again():
    """A quarter of the picture is mixed: with a limit, nearly all cut-outs show it."""
    labels = torch.zeros(20, 40, dtype=torch.long)
    labels[:, 30:] = torch.arange(10) % 2
    sample = {"image": torch.zeros(3, 20, 40), "semseg": labels}
    generator = torch.Generator().manual_seed(0)

    def mixed(limit):
        cuts = [
            transforms.random_crop(
                sample, (20, 10), limit, "ignore", lambda: torch.rand((), generator=generator).item()
            )
            for _ in range(100)
        ]
        return sum((cut["semseg"] == 1).float().mean().item() >= 0.25 for cut in cuts)

    assert mixed(1.0) < 40 and mixed(0.75) > 75


def test_photometric_distortion_stays_in_range_and_touches_the_image_alone():
    settings, sample = Augment(hflip=0, photometric=True), ramps()
    changed = [transforms.augment(sample, settings, torch.Generator().manual_seed(s), SIZE) for s in range(20)]
    assert all(0 <= out["image"].min() and out["image"].max() <= 1 for out in changed)
    assert sum(not torch.equal(out["image"], sample["image"]) for out in changed) > 14
    assert all(out[name] is sample[name] for out in changed for name in LABELS)


def test_brightness_moves_by_a_constant():
    draws = iter([0.1, 1.0, 0.9, 0.9, 0.9])
    grey = torch.full((3, 4, 4), 0.5)
    torch.testing.assert_close(transforms.photometric(grey, lambda: next(draws)), grey + 32 / 255)


def test_a_cropping_recipe_gives_the_training_size():
    settings = Augment(crop_scale=(0.5, 2.0), photometric=True, rotate=10)
    for seed in range(5):
        out = transforms.augment(ramps(), settings, torch.Generator().manual_seed(seed), (32, 40))
        assert all(x.shape[-2:] == (32, 40) for x in out.values())
