"""The renderer's labels are checked against definitions and geometry that do not share its code."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from bench.data import scene_models, scenes
from bench.data.scene_models import CLASSES, IGNORE, PARTS, PERSON
from bench.data.scenes import intrinsics, regions, render

ROOT = Path(__file__).resolve().parents[2]
SCENES = range(24)
KEYS = {"image", "semseg", "human_parts", "saliency", "normals", "depth", "edge"}


@lru_cache(maxsize=64)
def scene(index: int) -> dict[str, np.ndarray]:
    return render(0, index)


def digest(sample: dict[str, np.ndarray]) -> str:
    parts = (key.encode() + sample[key].tobytes() for key in sorted(sample))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def rays(size: tuple[int, int]) -> np.ndarray:
    f, cx, cy = intrinsics(size)
    row, col = np.mgrid[: size[0], : size[1]]
    return np.stack([(col + 0.5 - cx) / f, (row + 0.5 - cy) / f, np.ones(size)], -1)


def interior(ids: np.ndarray) -> np.ndarray:
    """Pixels whose whole 3 x 3 neighbourhood has their id; never those at the border."""
    inside = np.zeros(ids.shape, bool)
    h, w = ids.shape
    inside[1:-1, 1:-1] = True
    for dr in (0, 1, 2):
        for dc in (0, 1, 2):
            inside[1:-1, 1:-1] &= ids[dr : h - 2 + dr, dc : w - 2 + dc] == ids[1:-1, 1:-1]
    return inside


def test_label_spaces():
    assert len(CLASSES) == 21 and CLASSES[0] == "background" and CLASSES[15] == "person" and PERSON == 15
    assert CLASSES[1:] == tuple(sorted(CLASSES[1:]))  # the VOC order is alphabetical
    assert len(PARTS) == 7 and set(scene_models.RECIPES) == set(CLASSES) - {"background", "person"}


def test_field_of_view():
    assert intrinsics((128, 128)) == (128, 64, 64)
    assert intrinsics((64, 256)) == (128, 128, 32)


def test_images_are_exposed_and_noisy():
    for index in SCENES:
        image = scene(index)["image"].astype(int)
        assert 30 < image.mean() < 225 and image.std() > 10
        assert np.mean(np.diff(image, axis=1) != 0) > 0.6, "flat surfaces are noisy, too"
    assert np.ptp([scene(index)["image"].mean() for index in SCENES]) > 40


def test_same_bytes_in_any_order():
    forward = [digest(render(3, i)) for i in range(6)]
    backward = [digest(render(3, i)) for i in reversed(range(6))]
    assert forward == backward[::-1]
    assert len(set(forward)) == 6, "scenes must differ"
    assert digest(render(4, 0)) != forward[0], "seeds must differ"


def test_same_bytes_in_another_process():
    code = (
        "import hashlib; from bench.data.scenes import render; s = render(7, 5, (48, 80));"
        "print(hashlib.sha256(b''.join(k.encode() + s[k].tobytes() for k in sorted(s))).hexdigest())"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "99"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest(render(7, 5, (48, 80)))


@pytest.mark.parametrize("size", [(128, 128), (32, 32), (48, 96), (97, 65), (512, 256)])
def test_shapes_types_and_ranges(size):
    sample = render(1, 2, size)
    assert set(sample) == KEYS
    for key, array in sample.items():
        assert array.shape == ((*size, 3) if key in ("image", "normals") else size), key
        assert array.dtype == (np.float32 if key in ("normals", "depth") else np.uint8), key
        assert array.flags.c_contiguous, key
    assert sample["semseg"].max() < len(CLASSES)
    assert set(np.unique(sample["human_parts"])) <= {*range(len(PARTS)), IGNORE}
    assert set(np.unique(sample["saliency"])) == {0, 1} and set(np.unique(sample["edge"])) == {0, 1}
    assert 0.5 < sample["depth"].min() and sample["depth"].max() < 13
    assert len(np.unique(sample["semseg"])) > 1, "no object in view"


def test_another_size_shows_the_same_scene():
    agreement = {"semseg": [], "human_parts": [], "saliency": []}
    for index in SCENES:
        small, large = render(0, index, (64, 64)), scene(index)
        for key, values in agreement.items():
            values.append(np.mean(small[key] == large[key][::2, ::2]))
        apart = np.abs(small["depth"] - large["depth"][::2, ::2]) / small["depth"]
        assert np.median(apart) < 0.01
        means = small["image"].mean((0, 1)), large["image"].mean((0, 1))
        assert np.abs(means[0] - means[1]).max() < 3, "texture and light must not depend on the size"
    assert min(agreement["semseg"]) > 0.9 and min(agreement["human_parts"]) > 0.9
    assert np.mean(agreement["saliency"]) > 0.95  # a tie may fall either way


@pytest.mark.parametrize("size", [(128, 128), (40, 120)])
def test_normals_are_unit_and_face_the_camera(size):
    view = rays(size)
    view /= np.linalg.norm(view, axis=-1, keepdims=True)
    for index in SCENES:
        normals = render(2, index, size)["normals"].astype(float)
        assert np.abs(np.linalg.norm(normals, axis=-1) - 1).max() < 1e-5
        assert (normals * view).sum(-1).max() < 0


def test_normals_are_those_of_the_depth_map():
    flat, curved = [], []
    size = (256, 256)
    for index in range(10):
        sample, ids = render(0, index, size), regions(0, index, size)
        points = rays(size) * sample["depth"][..., None]
        across, down = np.zeros_like(points), np.zeros_like(points)
        across[:, 1:-1] = points[:, 2:] - points[:, :-2]
        down[1:-1] = points[2:] - points[:-2]
        normal = np.cross(down, across)  # y x x = -z: towards the camera
        normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-12)
        angle = np.degrees(np.arccos(np.clip((normal * sample["normals"]).sum(-1), -1, 1)))
        flat.append(angle[interior(ids) & (ids < 8)])
        curved.append(angle[interior(ids) & (ids >= 8)])
    flat, curved = np.concatenate(flat), np.concatenate(curved)
    assert np.quantile(flat, 0.99) < 0.2
    assert np.median(curved) < 1
    assert np.quantile(curved, 0.75) < 8  # the rest straddles creases between an object's primitives


def test_planes_have_their_closed_form_depth():
    heights, side_walls = [], 0
    for index in SCENES:
        sample, ids = scene(index), regions(0, index)
        normals = []
        for plane in range(3):
            on = ids == plane
            if on.sum() < 20:
                continue
            normal = sample["normals"][on].astype(float)
            assert np.ptp(normal, axis=0).max() == 0
            normals.append(normal[0])
            slope = -(rays(on.shape)[on] @ normal[0])
            distance = np.median(sample["depth"][on] * slope)
            np.testing.assert_allclose(sample["depth"][on], distance / slope, rtol=1e-5)
            if plane == 0:
                heights.append(distance)
                assert abs(normal[0][0]) < 1e-6 and normal[0][1] < -0.9, "the floor is level and below"
        gram = np.array(normals) @ np.array(normals).T
        assert np.abs(gram - np.eye(len(normals))).max() < 1e-5, "floor and walls are perpendicular"
        side_walls += len(normals) == 3
    assert 1.2 < min(heights) and max(heights) < 1.9 and np.ptp(heights) > 0.1
    assert 0 < side_walls < len(SCENES)


def inside(kind: np.ndarray, shape: np.ndarray, local: np.ndarray) -> np.ndarray:
    """Which of the points local (n, k, 3), in the local frames of n primitives, lie inside of them."""
    x, y, z = np.moveaxis(local, -1, 0)
    kind, shape = kind[:, None], shape[:, None]
    ball = x**2 + y**2 + z**2 < 1
    capsule = x**2 + z**2 + np.maximum(np.abs(y) - shape, 0) ** 2 < 1
    cube = np.abs(local).max(-1) < 1
    radius = (1 - y) / 2 + shape * (1 + y) / 2
    frustum = (np.abs(y) < 1) & (x**2 + z**2 < radius**2)
    return np.choose(kind, [ball, capsule, cube, frustum])


def test_a_ray_ends_at_the_first_point_inside_a_primitive():
    rng = np.random.default_rng(0)
    kinds = set()
    for index in range(6):
        sample = scene(index)
        solids = scenes._compose(np.random.default_rng([0, index])).solids
        kinds |= set(solids.kind.tolist())
        inverse = np.linalg.inv(solids.axes)

        def occupied(points, solids=solids, inverse=inverse):
            local = (points[None] - solids.centre[:, None]) @ inverse.transpose(0, 2, 1)
            return inside(solids.kind, solids.shape, local).any(0)

        view, depth = rays((128, 128)).reshape(-1, 3), sample["depth"].ravel()
        on = sample["semseg"].ravel() > 0
        hit = rng.choice(np.flatnonzero(on), 300)
        assert occupied(view[hit] * (depth[hit] + 3e-4)[:, None]).mean() > 0.98  # misses graze a silhouette
        pixels = np.concatenate([hit, rng.choice(np.flatnonzero(~on), 300)])
        for fraction in np.linspace(0.1, 1, 60):
            before = view[pixels] * (fraction * (depth[pixels] - 1e-5))[:, None]
            assert not occupied(before).any()
    assert kinds == {0, 1, 2, 3}


def test_parts_are_on_persons_only():
    with_person, parts_seen = 0, set()
    for index in range(60):
        sample = render(0, index, (64, 64))
        person, parts = sample["semseg"] == PERSON, sample["human_parts"]
        if person.any():
            assert np.array_equal(parts > 0, person) and parts.max() < len(PARTS)
            with_person += 1
            parts_seen |= set(np.unique(parts))
        else:
            assert (parts == IGNORE).all()
    assert 0.4 < with_person / 60 < 0.75
    assert parts_seen == set(range(len(PARTS)))


def test_saliency_picks_whole_prominent_objects():
    all_salient, counts = 0, []
    for index in SCENES:
        salient, semseg = scene(index)["saliency"] > 0, scene(index)["semseg"]
        instance = regions(0, index) // 8
        chosen = set(np.unique(instance[salient]))
        counts.append(len(chosen))
        assert 0 not in chosen and np.array_equal(salient, np.isin(instance, list(chosen)))
        area = np.bincount(instance.ravel())
        area[0] = 0
        at = np.stack(np.nonzero(instance == area.argmax())).mean(1) / 128 - 0.5
        if np.abs(at).max() < 0.1 and area.max() > 1.5 * np.sort(area)[-2]:
            assert area.argmax() in chosen, "an object both largest and central must be salient"
        all_salient += np.array_equal(salient, semseg > 0)
    assert set(counts) == {1, 2}
    assert all_salient < len(SCENES) / 2


def test_edges_are_where_a_neighbour_differs():
    share = []
    for index in SCENES:
        sample, ids = scene(index), regions(0, index)
        padded = np.pad(ids, 1, mode="edge")
        neighbours = [padded[1:-1, 2:], padded[1:-1, :-2], padded[2:, 1:-1], padded[:-2, 1:-1]]
        assert np.array_equal(sample["edge"] == 1, np.any([n != ids for n in neighbours], axis=0))
        for key in ("semseg", "human_parts", "saliency"):
            changes = sample[key][:, 1:] != sample[key][:, :-1]
            assert sample["edge"][:, 1:][changes].all() and sample["edge"][:, :-1][changes].all(), key
        share.append(sample["edge"].mean())
        grey = sample["image"].astype(float).mean(-1)
        slope = np.abs(np.diff(grey, axis=1))
        on = (sample["edge"][:, 1:] & sample["edge"][:, :-1]) > 0
        assert slope[on].mean() > 1.1 * slope[~on].mean(), "edges must show in the image"
    assert 0.03 < np.mean(share) < 0.12


def test_every_class_occurs_at_a_visible_size():
    images, sizes = np.zeros(len(CLASSES)), []
    for index in range(150):
        count = np.bincount(render(0, index, (32, 32))["semseg"].ravel(), minlength=len(CLASSES))
        images += count > 0
        sizes += (count[1:][count[1:] > 0] / 1024).tolist()
    assert images[1:].min() >= 5
    assert 0.02 < np.median(sizes) < 0.15


def test_primitives_are_those_of_the_recipes():
    bottle = scene_models.MODELS[CLASSES.index("bottle")]
    assert np.allclose(bottle.centre[0], (0, 0.32, 0))
    assert np.allclose(np.abs(bottle.axes[0]), np.diag([0.21, 0.32, 0.21]))
    chair = scene_models.MODELS[CLASSES.index("chair")]
    assert len(chair.kind) == 6 and np.allclose(chair.centre[:, 2].sum(), 0)  # two pairs of legs, mirrored
    for model in scene_models.MODELS.values():
        gram = model.axes.transpose(0, 2, 1) @ model.axes
        assert np.allclose(gram, gram * np.eye(3), atol=1e-9), "axes are orthogonal in the model frame"
