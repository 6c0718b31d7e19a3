"""Procedural scenes with exact labels for semantics, human parts, saliency, normals, depth and edges.

A scene is a floor, a back wall, sometimes a side wall, and two to five objects of the PASCAL VOC classes
under one directional light.  Objects are unions of analytic primitives, intersected exactly with the ray of
every pixel centre: labels come from the intersections, never from the shaded image.

Frames, in metres.  Camera: x right, y down, z forward, the camera at the origin; the ray of a pixel is
(x, y, 1), hence the ray parameter t of a hit *is* its planar depth.  World: the same without the pitch.
Room: along the back wall, down, into it.  Model, for recipes: x ahead, y up from the floor, z aside.
"""

from __future__ import annotations

from functools import lru_cache
from math import cos, pi, radians, sin
from typing import NamedTuple

import numpy as np

from bench.data.scene_models import (
    CLASSES,
    FRONTAL,
    IGNORE,
    MATERIALS,
    MODELS,
    PALETTES,
    PATTERNS,
    PERSON,
    RADII,
    ROOM,
    SCALES,
    B,
    C,
    E,
    F,
    Solids,
    figure,
)

VERSION = 1  # part of data fingerprints: raise it whenever a pixel of any output changes
GROUND, WALL, SIDE, PLANES = range(4)  # surface ids of the planes; those of primitives count on from PLANES


class _Scene(NamedTuple):
    """Everything random but pixel noise; S = PLANES + n surfaces."""

    room: np.ndarray  # (3, 3) rotation from the camera frame to the room frame
    distance: np.ndarray  # (3,) of the planes from the camera, along axes 1, 2, 0 of the room
    solids: Solids  # the n primitives of all objects, in the camera frame
    label: np.ndarray  # (S,) class
    region: np.ndarray  # (S,) id of a plane, or 8 * (1 + object) + human part
    shadows: np.ndarray  # (objects, 3) centre (along, into) in the room frame, radius
    rgb: np.ndarray  # (3, S) albedo, in grey levels at full exposure
    cells: np.ndarray  # (3, S) texture cells per metre
    phase: np.ndarray  # (3, S) texture offset
    pattern: np.ndarray  # (2, S) darkening, kind of cells
    light: np.ndarray  # (3,) direction towards the light, camera frame
    ambient: float
    noise: float  # amplitude in grey levels


def _place(
    rng: np.random.Generator, labels: list[int], distance: np.ndarray, room: np.ndarray
) -> list[tuple[int, float, float, float, float]]:
    """Sizes and floor positions in view, clear of walls and each other: label, size, x, z, radius."""
    placed: list[tuple[int, float, float, float, float]] = []
    for label in labels:
        spots = []
        for u in rng.random((12, 3)).tolist():
            size = SCALES[label] * (0.85 + 0.3 * u[0])
            radius = RADII[label] * size
            z = 2.2 + 0.6 * radius + (3.1 - 0.4 * radius) * u[1]
            x = 0.84 * (u[2] - 0.5) * z
            along, _, into = room @ (x, 0.0, z)
            gaps = [np.hypot(x - x2, z - z2) - radius - radius2 for _, _, x2, z2, radius2 in placed]
            to_side = abs(distance[SIDE]) - np.sign(distance[SIDE]) * along
            gap = min(distance[WALL] - into - radius, to_side - radius, *gaps)
            spots.append((gap, (label, size, x, z, radius)))
            if gap > 0:
                break
        if gap > 0 or len(placed) < 2:  # no room for the object, no object, but for the first two
            placed.append(max(spots)[1])
    return placed


def _compose(rng: np.random.Generator) -> _Scene:
    """Draw a scene; nothing here depends on the image size."""
    u = rng.random(12)
    height, pitch, yaw = 1.25 + 0.6 * u[0], radians(5 + 9 * u[1]), radians(24 * u[2] - 12)
    # Rotations from the world frame.
    camera = np.array([[1, 0, 0], [0, cos(pitch), -sin(pitch)], [0, sin(pitch), cos(pitch)]])
    room = np.array([[cos(yaw), 0, -sin(yaw)], [0, 1, 0], [sin(yaw), 0, cos(yaw)]])
    side = (2.2 + 1.6 * u[4] if u[5] < 0.45 else np.inf) * (1 if u[6] < 0.5 else -1)
    distance = np.array([height, 6.2 + 2.8 * u[3], side])

    labels = rng.integers(1, len(CLASSES) - 1, 2 + int(4 * u[7]))
    labels += labels >= PERSON  # all classes alike but persons, who have a rate of their own
    labels[: 1 + int(2.4 * u[9] ** 2) if u[8] < 0.57 else 0] = PERSON
    objects = _place(rng, labels.tolist(), distance, room)

    materials, solids = list(ROOM), []
    slots, label, region = [np.arange(PLANES)], [np.zeros(PLANES, int)], [np.arange(PLANES)]
    for number, (name, size, x, z, _) in enumerate(objects):
        model = figure(rng) if name == PERSON else MODELS[name]
        v, count = rng.random(4), len(model.kind)
        turn = -pi / 2 + 2.2 * (v[0] - 0.5) if CLASSES[name] in FRONTAL else 2 * pi * v[0]
        stretch = size * (0.9 + 0.2 * v[1:])
        upright = np.array([[cos(turn), 0, -sin(turn)], [0, -1, 0], [sin(turn), 0, cos(turn)]])
        pose = camera @ upright * stretch
        axes = pose @ model.axes * (0.97 + 0.06 * rng.random((count, 1, 3)))
        solids.append(model._replace(centre=model.centre @ pose.T + camera @ (x, height, z), axes=axes))
        slots.append(len(materials) + model.slot)
        materials += MATERIALS[name]
        label.append(np.full(count, name))
        region.append(8 * (number + 1) + model.part)

    r = rng.random((10, len(materials)))
    choices = [
        [options[int(k * len(options))] for options, k in zip(slot, ks, strict=True)]
        for slot, ks in zip(materials, r[:2].T, strict=True)
    ]
    palette = np.array([PALETTES[name] for name, _ in choices]).T
    pattern = np.array([PATTERNS[name] for _, name in choices]).T
    hue, saturation, value = palette[::2] + (palette[1::2] - palette[::2]) * r[2:5]
    k = (np.array([[5], [3], [1]]) + 6 * hue) % 6
    rgb = value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)
    pattern[:3] *= 0.75 + 0.55 * r[5]
    pattern[3] *= 0.5 + 0.5 * r[6]
    pattern[:4, :PLANES] *= ((0.4,), (0.4,), (0.4,), (0.6,))  # large and far: coarser, fainter
    surface, w = np.concatenate(slots), rng.random(6)
    exposure = (1 + 0.4 * w[0]) * (0.92 + 0.16 * w[1:4]) * 255

    azimuth, elevation = 3.6 * (u[10] - 0.5), 0.45 + 0.85 * u[11]
    light = np.array([sin(azimuth) * cos(elevation), -sin(elevation), -cos(azimuth) * cos(elevation)])
    footprint = np.array([(x, 0, z, radius) for _, _, x, z, radius in objects])
    # Shadows lean away from the light.
    shadow = (footprint[:, :3] - 0.25 * footprint[:, 3:] * light / sin(elevation)) @ room.T
    return _Scene(
        room=room @ camera.T,
        distance=distance,
        solids=Solids(*map(np.concatenate, zip(*solids, strict=True))),
        label=np.concatenate(label),
        region=np.concatenate(region),
        shadows=np.stack([shadow[:, 0], shadow[:, 2], 0.9 * footprint[:, 3]], 1),
        rgb=(rgb * exposure[:, None])[:, surface],
        cells=pattern[:3, surface],
        phase=r[7:, surface],
        pattern=pattern[3:, surface],
        light=camera @ light,
        ambient=0.35 + 0.2 * w[4],
        noise=3 + 9 * w[5],
    )


def intrinsics(size: tuple[int, int]) -> tuple[float, float, float]:
    """Focal length and principal point (f, cx, cy) in pixels for an image of (H, W).

    The centre of pixel (row, col) is seen along the ray ((col + 0.5 - cx) / f, (row + 0.5 - cy) / f, 1).
    Square images see 53 degrees; at other aspect ratios the longer side sees more and the shorter less.
    """
    return float(np.sqrt(size[0] * size[1])), size[1] / 2, size[0] / 2


@lru_cache(maxsize=8)
def _rays(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ray coordinates x (W,) and y (H,), and all rays (3, H * W)."""
    f, cx, cy = intrinsics(size)
    x, y = (np.arange(size[1]) + 0.5 - cx) / f, (np.arange(size[0]) + 0.5 - cy) / f
    return x, y, np.stack([np.tile(x, size[0]), np.repeat(y, size[1]), np.ones(size[0] * size[1])])


def _windows(solids: Solids, size: tuple[int, int]) -> list[list[int]]:
    """Per primitive the rows and columns r0:r1, c0:c1 that its bounding cuboid covers."""
    f, cx, cy = intrinsics(size)
    girth = np.where(solids.kind == F, np.maximum(solids.shape, 1), 1)
    extent = np.stack([girth, np.where(solids.kind == C, 1 + solids.shape, 1), girth], 1)
    signs = np.indices((2, 2, 2)).reshape(3, 8).T * 2 - 1
    corners = signs * extent[:, None, :] @ solids.axes.transpose(0, 2, 1) + solids.centre[:, None, :]
    pixels = corners[:, :, 1::-1] / corners[:, :, 2:] * f + (cy, cx)
    bounds = np.stack([np.floor(pixels.min(1)), np.ceil(pixels.max(1))], 2).reshape(-1, 4)
    return np.clip(bounds, 0, np.repeat(size, 2)).astype(int).tolist()


def _trace(scene: _Scene, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Intersect all rays with all surfaces: depth (H, W) and surface id (H, W) of the nearest hits.

    Also the maps from the camera frame to the primitives' frames: local = inverse (n, 3, 3) @ p + o (n, 3).
    In double precision: whether a ray touches a thin limb depends on small differences of large numbers.
    """
    x, y, _ = _rays(size)
    # A plane's inverse depth is linear in the ray, so the nearest plane is that with the largest of these.
    nearness, surface = np.zeros(size), np.zeros(size, np.intp)
    for number, (mx, my, mz) in enumerate(scene.room[[1, 2, 0]] / scene.distance[:, None]):
        candidate = mx * x + (my * y + mz)[:, None]
        np.copyto(surface, number, where=candidate > nearness)
        np.maximum(nearness, candidate, out=nearness)
    depth = 1 / nearness

    kind, shape = scene.solids.kind, scene.solids.shape
    inverse = np.linalg.inv(scene.solids.axes)
    o = -(inverse @ scene.solids.centre[:, :, None])[:, :, 0]
    # Locally, balls, capsules' cylinders and frustums' sides are x^2 + z^2 + q y^2 - 2 m s y - m^2 = 0 (for a
    # frustum of radius m + s y, q = -s^2).  Along the ray d that reads A t^2 + 2 B t + c = 0, where A and
    # D = B^2 - A c are quadratic forms of d and B is linear: all are d^T S d for matrices S, as d_z = 1.
    m, s = np.where(kind == F, (1 + shape) / 2, 1), np.where(kind == F, (shape - 1) / 2, 0)
    q = np.stack([np.ones_like(m), np.where(kind == E, 1, -s * s), np.ones_like(m)], 1)
    gradient = q * o - np.stack([0 * m, m * s, 0 * m], 1)
    c = (gradient * o).sum(1) - m * s * o[:, 1] - m * m
    b = (gradient[:, None, :] @ inverse)[:, 0]
    a_form = inverse.transpose(0, 2, 1) * q[:, None, :] @ inverse
    d_form = b[:, :, None] * b[:, None, :] - c[:, None, None] * a_form
    ahead = np.array([0.0, 0.0, 1.0])
    forms = np.stack([a_form, d_form, b[:, :, None] * ahead, inverse[:, 1, :, None] * ahead], 1)
    forms[kind == B, :3] = inverse[kind == B][..., None] * ahead  # cubes: the local direction, not A, D, B
    symmetric = np.moveaxis(forms + forms.swapaxes(2, 3), (2, 3), (0, 1))[..., None]
    (xx, xy, xz), (_, yy, yz), (_, _, zz) = symmetric
    columns = np.stack([xx / 2 * x * x + xz * x + zz / 2, xy * x + yz, yy / 2 + 0 * x], 2)
    powers = np.stack([np.ones_like(y), y, y * y], 1)

    for i, (r0, r1, c0, c1) in enumerate(_windows(scene.solids, size)):
        if r0 >= r1 or c0 >= c1:
            continue
        t = _enter(kind[i], powers[r0:r1] @ columns[i, :, :, c0:c1], o[i], c[i], shape[i])
        nearer = t < depth[r0:r1, c0:c1]
        np.copyto(depth[r0:r1, c0:c1], t, where=nearer)
        np.copyto(surface[r0:r1, c0:c1], i + PLANES, where=nearer)
    return depth, surface, inverse, o


def _enter(kind: int, values: np.ndarray, o: np.ndarray, c: float, shape: float) -> np.ndarray:
    """Ray parameter at which each ray enters the primitive; NaN where it misses."""
    if kind == B:
        per_unit = 1 / values[:3]
        middle, half = -o[:, None, None] * per_unit, np.abs(per_unit)
        near, far = (middle - half).max(0), (middle + half).min(0)
        return np.where(near < far, near, np.nan)
    (a, d, b, dy), oy = values, o[1]
    t = -(b + np.sqrt(d)) / a  # the root at which the quadric is entered, whatever the sign of a
    if kind == C:
        # A union of unit balls along the axis: hit the one level with the cylinder's hit, else the end's.
        level = oy - np.clip(oy + t * dy, -shape, shape)
        a, b = a + dy * dy, b + level * dy
        return -(b + np.sqrt(b * b - a * (c + level * level))) / a
    if kind == F:
        # A convex body is entered where a bound is, within all others: the side, or else the facing cap.
        cap = (-np.sign(dy) - oy) / dy
        return np.where(np.abs(oy + t * dy) <= 1, t, np.where((a * cap + 2 * b) * cap + c <= 0, cap, np.nan))
    return t


def _attributes(
    scene: _Scene, points: np.ndarray, surface: np.ndarray, inverse: np.ndarray, o: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Unit normals and metric texture coordinates (local; the room's for planes), (3, H * W) float32."""
    texture = (scene.room @ points).astype(np.float32)
    facing = -scene.room[[1, 2, 0]].T * np.sign(scene.distance)
    normals = np.take(facing.astype(np.float32), np.minimum(surface, SIDE), 1)

    pixels = np.flatnonzero(surface >= PLANES)
    i = surface[pixels] - PLANES
    inverse, kind, shape = inverse[i], scene.solids.kind[i], scene.solids.shape[i]
    local = np.einsum("nij,jn->in", inverse, points[:, pixels]) + o.T[:, i]
    gradient = local.copy()  # of the function that is zero on the surface
    half = np.where(kind == C, shape, 0)
    gradient[1] -= np.clip(local[1], -half, half)
    cube, frustum = np.flatnonzero(kind == B), np.flatnonzero(kind == F)
    face = np.abs(local[:, cube])
    gradient[:, cube] = np.where(face == face.max(0), local[:, cube], 0)
    y, slope = local[1, frustum], (shape[frustum] - 1) / 2
    cap = np.abs(y) > 1 - 1e-9
    gradient[:, frustum] *= ~cap
    gradient[1, frustum] = np.where(cap, y, -slope * (1 + slope + slope * y))
    normal = np.einsum("nij,in->jn", inverse, gradient)
    normals[:, pixels] = normal / np.sqrt((normal * normal).sum(0))
    texture[:, pixels] = local * np.sqrt((scene.solids.axes**2).sum(1)).T[:, i]
    return normals, texture


def _shade(
    scene: _Scene, surface: np.ndarray, normals: np.ndarray, texture: np.ndarray, noise: np.ndarray
) -> np.ndarray:
    """Lambert shading of the patterned surfaces, with soft contact shadows on the floor: (3, H * W) uint8."""
    table = np.concatenate([scene.cells, scene.phase, scene.pattern, scene.rgb]).astype(np.float32)
    table = np.take(table, surface, 1)
    cell = np.floor(texture * table[:3] + table[3:6]).astype(np.int32)
    mixed = cell[0] * 73856093 ^ cell[1] * 19349663 ^ cell[2] * 83492791  # wraps around
    mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D
    other = np.where(table[7] > 0, mixed >> 16, cell[0] + cell[1] + cell[2]) & 1
    other, ambient = other.astype(np.float32), np.float32(scene.ambient)
    lambert = np.maximum(scene.light.astype(np.float32) @ normals, 0)
    brightness = (1 - table[6] * other) * (ambient + (1 - ambient) * lambert)
    floor = np.flatnonzero(surface == GROUND)
    along, into, shadow = texture[0, floor], texture[2, floor], np.float32(1)
    for x, z, radius in scene.shadows.astype(np.float32):
        shadow = shadow * (1 - np.float32(0.55) * np.exp(((along - x) ** 2 + (into - z) ** 2) / -(radius**2)))
    brightness[floor] *= shadow
    image = table[8:] * brightness + (noise - np.float32(127.5)) * np.float32(scene.noise / 127.5)
    return np.clip(image, 0, 255).astype(np.uint8)


def boundaries(ids: np.ndarray) -> np.ndarray:
    """uint8 (H, W), 1 where one of the 4 neighbours has another id: 2 pixels wide, symmetric under flips."""
    edge = np.zeros(ids.shape, np.uint8)
    across, down = ids[:, 1:] != ids[:, :-1], ids[1:] != ids[:-1]
    for half, change in ((edge[:, 1:], across), (edge[:, :-1], across), (edge[1:], down), (edge[:-1], down)):
        half |= change
    return edge


def _salient(instance: np.ndarray) -> np.ndarray:
    """Mark the most prominent object, and the second if it is at least half as prominent.

    Prominence is visible area * exp(-(r / 0.35)^2), where r is the distance of the visible centroid from the
    image's centre in units of the image's sides.
    """
    y, x = (np.linspace(-0.5, 0.5, side) for side in instance.shape)
    flat = instance.ravel()
    area = np.bincount(flat)
    row = np.bincount(flat, np.repeat(y, len(x))) / np.maximum(area, 1)
    col = np.bincount(flat, np.tile(x, len(y))) / np.maximum(area, 1)
    prominence = area * np.exp(-(row**2 + col**2) / 0.35**2)
    prominence[0] = 0  # floor and walls
    chosen = prominence >= max(0.5 * prominence.max(), 1e-9)
    chosen[np.argsort(prominence)[:-2]] = False
    return chosen[instance].astype(np.uint8)


def regions(seed: int, index: int, size: tuple[int, int] = (128, 128)) -> np.ndarray:
    """The id map (H, W) behind `edge`: 0 floor, 1 back wall, 2 side wall, 8 * (1 + object) + human part."""
    scene = _compose(np.random.default_rng([seed, index]))
    with np.errstate(invalid="ignore", divide="ignore"):
        return scene.region[_trace(scene, size)[1]].astype(np.uint8)


def render(seed: int, index: int, size: tuple[int, int] = (128, 128)) -> dict[str, np.ndarray]:
    """Render scene `index` of the endless data set `seed` at size (H, W), with sides from 32 to 512 pixels.

    The same arguments give the same bytes in any process and order; another size shows the same scene.

    image        uint8 (H, W, 3), RGB
    semseg       uint8 (H, W), index into CLASSES
    human_parts  uint8 (H, W), index into PARTS; IGNORE everywhere if no person is visible
    saliency     uint8 (H, W), 1 on the one or two most prominent objects (large and central), else 0
    normals      float32 (H, W, 3), unit, camera frame (x right, y down, z forward), facing the camera
    depth        float32 (H, W), metres along the optical axis (planar depth, not the ray's length)
    edge         uint8 (H, W), 1 at boundaries between objects, human parts, floor and walls; see `boundaries`
    """
    rng = np.random.default_rng([seed, index])
    scene, rays = _compose(rng), _rays(size)[2]
    with np.errstate(invalid="ignore", divide="ignore"):  # a miss is NaN, a ray parallel to a face infinite
        depth, surface, inverse, o = _trace(scene, size)
    flat, noise = surface.ravel(), rng.integers(0, 256, rays.shape, np.uint8)
    normals, texture = _attributes(scene, rays * depth.ravel(), flat, inverse, o)
    image, region = _shade(scene, flat, normals, texture, noise), scene.region[surface]
    parts = np.where(region >= 8, region & 7, 0).astype(np.uint8)
    return {
        "image": np.ascontiguousarray(image.T).reshape(*size, 3),
        "semseg": scene.label[surface].astype(np.uint8),
        "human_parts": parts if parts.any() else np.full(size, IGNORE, np.uint8),
        "saliency": _salient(region >> 3),
        "normals": np.ascontiguousarray(normals.T).reshape(*size, 3),
        "depth": depth.astype(np.float32),
        "edge": boundaries(region),
    }
