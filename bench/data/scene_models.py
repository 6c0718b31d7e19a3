"""What stands in the rendered scenes: label names, materials, and every class as a union of analytic primitives."""

from __future__ import annotations

from math import cos, pi, sin
from typing import NamedTuple

import numpy as np

CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
PARTS = ("background", "head", "torso", "upper_arm", "lower_arm", "upper_leg", "lower_leg")
PERSON = CLASSES.index("person")
IGNORE = 255

# Primitive kinds, each a convex body around the y axis of its local frame:
# E  unit ball; C  capsule of radius 1 whose sphere centres are at y = +-shape; B  cube [-1, 1]^3;
# F  frustum |y| <= 1 with a radius of 1 at y = -1 and of `shape` at y = +1: cylinder, cone, pot.
E, C, B, F = range(4)

# HSV ranges: lowest and highest hue, saturation, value.  Classes share them on purpose.
PALETTES = {
    "vivid": (0.0, 1.0, 0.55, 0.95, 0.45, 0.95),
    "pale": (0.0, 1.0, 0.05, 0.3, 0.6, 0.95),
    "warm": (0.97, 1.14, 0.6, 0.95, 0.5, 0.9),
    "white": (0.05, 0.17, 0.0, 0.12, 0.8, 1.0),
    "grey": (0.5, 0.7, 0.0, 0.12, 0.3, 0.7),
    "dark": (0.5, 0.75, 0.0, 0.25, 0.06, 0.22),
    "brown": (0.04, 0.1, 0.4, 0.75, 0.22, 0.6),
    "tan": (0.07, 0.12, 0.25, 0.55, 0.6, 0.9),
    "green": (0.22, 0.42, 0.45, 0.9, 0.25, 0.7),
    "glass": (0.5, 0.62, 0.2, 0.5, 0.25, 0.75),
    "skin": (0.03, 0.08, 0.25, 0.6, 0.4, 0.95),
    "pink": (0.95, 1.03, 0.2, 0.4, 0.7, 0.9),
    "floor": (0.0, 0.7, 0.05, 0.5, 0.35, 0.9),
    "plaster": (0.0, 0.9, 0.02, 0.4, 0.5, 1.0),
}
# Cells per metre along the local axes, darkening of the other cells, which those are (0: odd, 1: random).
PATTERNS = {
    "plain": (0, 0, 0, 0, 0),
    "bands": (0, 11, 0, 0.6, 0),
    "bars": (6, 0, 0, 0.65, 0),
    "checks": (7, 7, 7, 0.5, 0),
    "speckle": (20, 20, 20, 0.3, 1),
    "patches": (4.5, 4.5, 4.5, 0.85, 1),
    "tufts": (12, 12, 12, 0.35, 1),
}
_ROOM_PATTERNS = "plain bars checks speckle patches tufts"
# A person's material slots: skin, hair, top, trousers, shoes.
_FIGURE = """skin / plain; dark brown tan grey / plain; vivid pale grey dark / plain bands bars checks;
             vivid dark grey brown / plain; dark white brown / plain"""
FRONTAL = ("chair", "sofa", "tvmonitor")  # never seen from behind

# Class: (scale, palettes / patterns to choose from for each material slot, primitives).  A primitive is its
# kind and slot, then in centimetres the ends a and b of its local y axis (a capsule's sphere centres) and its
# half width rx, optionally rz, and a frustum's `shape` in percent.  One off the plane z = 0 stands for a
# mirrored pair.  R is a tyre in that plane: x, y, radius, thickness.
RECIPES = {
    "aeroplane": (
        1.0,
        "white grey pale / plain bands; vivid / plain; dark glass / plain",
        """
        C0 -85 55 0 75 55 0 19, B0 10 52 10 -30 58 110 22 3, B1 -85 65 0 -105 115 0 17 3,
        B1 -85 60 0 -100 62 45 12 2, F1 -15 42 42 30 42 42 10, E2 50 66 0 92 62 0 10 13,
        C2 -10 5 22 -10 45 20 5, C2 60 5 0 60 45 0 5""",
    ),
    "bicycle": (
        1.25,
        "vivid white / plain; dark / plain; dark brown / plain",
        """
        R1 -50 37 33 4.5, R1 50 37 33 4.5, C0 -50 37 0 -15 80 0 4, C0 -15 80 0 35 78 0 4, C0 0 37 0 35 78 0 4,
        C0 -50 37 0 0 37 0 4, C0 0 37 0 -17 88 0 4, C0 50 37 0 32 98 0 4, C2 32 100 -28 32 100 28 4,
        E2 -36 92 0 2 92 0 6 10""",
    ),
    "bird": (
        1.0,
        "vivid brown grey white / plain tufts; warm tan / plain",
        """
        E0 -42 52 0 36 74 0 25 23, E0 38 80 0 38 114 0 17, F1 50 97 0 80 92 0 7 7 0,
        E0 -50 60 20 22 70 26 18 6, B0 -30 56 0 -80 44 0 3 14, C1 4 2 10 0 50 10 3""",
    ),
    "boat": (
        1.0,
        "vivid brown white / plain bands; white pale warm / plain bands; brown / plain",
        """
        F0 0 0 0 0 42 0 72 26 135, C2 5 30 0 5 175 0 3.5, F1 -5 55 0 2 165 0 55 3 0,
        B1 -50 40 0 -50 60 0 20 16""",
    ),
    "bottle": (
        1.2,
        "green brown glass / plain; white vivid / plain bands checks; warm dark / plain",
        """
        F0 0 0 0 0 64 0 21, F0 0 64 0 0 84 0 21 21 42, F0 0 82 0 0 110 0 8.8, F2 0 107 0 0 117 0 10,
        F1 0 17 0 0 50 0 22.5""",
    ),
    "bus": (
        0.85,
        "vivid warm white / plain; glass dark / bars; dark / plain",
        """
        B0 0 16 0 0 115 0 120 42, B1 0 62 0 0 98 0 124 45, B2 0 20 0 0 30 0 126 44, F2 -75 20 36 -75 20 47 20,
        F2 75 20 36 75 20 47 20""",
    ),
    "car": (
        0.9,
        "vivid warm grey white / plain; glass dark / plain; dark / plain",
        """
        B0 0 18 0 0 52 0 95 42, E0 60 50 0 110 30 0 20 42, E1 -10 15 0 -10 92 0 66 39,
        B0 -14 83 0 -14 90 0 36 27, F2 -60 22 36 -60 22 47 22, F2 60 22 36 60 22 47 22""",
    ),
    "cat": (
        1.15,
        "grey brown tan warm / bands; white pink / plain",
        """
        C0 -33 43 0 28 43 0 17 15, E0 47 45 0 47 81 0 17 19, F0 46 74 10 46 95 14 8 6 0,
        C0 -46 46 0 -76 72 0 5, C0 -76 72 0 -70 105 0 5, E1 62 50 0 62 62 0 7 9, C0 -30 6 9 -28 40 9 6,
        C0 30 6 9 28 40 9 6""",
    ),
    "chair": (
        1.1,
        "brown tan dark vivid / plain; vivid tan dark brown / plain checks",
        """
        B1 0 48 0 0 58 0 33 33, B0 -29 58 0 -40 130 0 4 32, C0 -28 5 27 -27 50 27 4.5,
        C0 28 5 27 27 50 27 4.5""",
    ),
    "cow": (
        0.9,
        "white tan / patches; pink tan / plain; white grey / plain",
        """
        C0 -52 80 0 48 80 0 31 29, C0 60 92 0 85 104 0 17, E0 74 108 0 120 90 0 16 16,
        E1 106 95 0 126 85 0 12 13, F2 88 114 10 90 136 24 5 5 20, E1 -35 38 0 -35 60 0 17,
        C0 -50 9 17 -48 75 17 9, C0 50 9 17 48 75 17 9, C2 -82 90 0 -92 45 0 3.5""",
    ),
    "diningtable": (
        1.0,
        "brown tan white / plain bars checks; brown tan dark / plain; white / plain",
        """
        B0 0 72 0 0 81 0 85 52, B1 74 0 42 74 72 42 5.5, B1 -74 0 42 -74 72 42 5.5,
        F2 30 81 0 30 86 0 20 20 130, F2 -30 81 0 -30 100 0 9 9 130""",
    ),
    "dog": (
        1.1,
        "brown tan grey white / plain plain patches; dark brown / plain",
        """
        C0 -38 58 0 35 60 0 19 17, C0 42 66 0 58 88 0 12, E0 48 95 0 82 93 0 16 15, C0 75 89 0 95 86 0 7.5,
        E1 97 90 0 105 90 0 4, E1 56 72 17 56 104 14 9 4, C0 -54 66 0 -80 96 0 5, C0 -37 7 10 -35 55 10 7,
        C0 37 7 10 35 55 10 7""",
    ),
    "horse": (
        0.9,
        "brown tan grey white / plain; dark brown / plain",
        """
        C0 -48 98 0 45 98 0 25 22, C0 56 108 0 86 152 0 14, C0 86 156 0 116 132 0 10.5,
        F0 84 162 6 84 180 8 5 4 0, B1 42 120 0 74 170 0 8 4, C1 -74 102 0 -86 45 0 7,
        C0 -45 8 12 -43 90 12 7.5, C0 45 8 12 43 90 12 7.5""",
    ),
    "motorbike": (
        1.1,
        "vivid warm dark / plain; dark / plain; grey white / plain",
        """
        F1 -58 30 -9 -58 30 9 30, F1 62 30 -7 62 30 7 30, F2 -58 30 -11 -58 30 11 15, F2 62 30 -9 62 30 9 15,
        E0 -12 74 0 46 80 0 16 17, E2 -25 40 0 30 40 0 20 16, B1 -65 72 0 -5 70 0 6 13,
        E0 -85 66 0 -40 60 0 10 10, C2 62 30 11 40 95 10 4, C1 36 100 -32 36 100 32 4, E2 45 85 0 60 83 0 10,
        C2 -80 28 17 5 25 17 5""",
    ),
    "pottedplant": (
        1.0,
        "warm brown white / plain bands; green / tufts; green / speckle",
        """
        F0 0 0 0 0 44 0 23 23 140, E1 0 42 0 0 130 0 28, E2 8 45 8 50 115 40 16 7, E2 -8 45 8 -55 105 30 15 7,
        E1 5 50 0 65 95 0 7 15, E2 -5 60 0 -30 145 0 9 16""",
    ),
    "sheep": (
        1.05,
        "white tan grey / tufts; dark tan grey / plain",
        """
        E0 -62 64 0 48 64 0 36 34, E0 20 55 0 52 100 0 22, E1 44 98 0 84 74 0 13 12, E1 50 92 10 48 82 30 6 4,
        C1 -30 6 15 -28 45 15 6, C1 30 6 15 28 45 15 6""",
    ),
    "sofa": (
        1.0,
        "vivid brown grey tan / plain bars checks; vivid brown grey tan / plain",
        """
        B0 0 8 0 0 44 0 42 85, B0 -32 44 0 -42 98 0 13 85, B0 0 8 85 0 66 85 43 12,
        B1 6 44 37 6 57 37 34 34""",
    ),
    "train": (
        0.85,
        "vivid warm dark green / plain; dark / plain; vivid warm grey / plain",
        """
        F0 -35 68 0 105 68 0 33, B0 -75 28 0 -75 128 0 42 40, B2 -75 128 0 -75 137 0 50 46,
        F1 78 90 0 78 142 0 10 10 150, B1 0 22 0 0 38 0 120 34, E2 20 80 0 20 116 0 15,
        F2 105 68 0 110 68 0 25, B1 -75 82 0 -75 115 0 28 42, F1 -80 22 32 -80 22 43 22,
        F1 -28 22 32 -28 22 43 22, F1 24 22 32 24 22 43 22, F1 76 22 32 76 22 43 22""",
    ),
    "tvmonitor": (
        1.05,
        "dark grey white / plain; glass vivid / plain bands checks patches",
        """
        B0 0 36 0 0 122 0 6 70, B1 5 43 0 5 115 0 4 63, E0 -10 45 0 -10 110 0 13 50, C0 0 5 0 0 45 0 8,
        F0 0 0 0 0 6 0 24 38""",
    ),
}

_Row = tuple  # kind, slot, a, b, rx, rz, shape: a primitive in metres


class Solids(NamedTuple):
    """n primitives; each maps its local frame to the outer one by p = axes @ local + centre."""

    kind: np.ndarray  # (n,)
    slot: np.ndarray  # (n,) material slot
    part: np.ndarray  # (n,) human part, 0 for everything but persons
    centre: np.ndarray  # (n, 3)
    axes: np.ndarray  # (n, 3, 3)
    shape: np.ndarray  # (n,) see the kinds


def _rows(recipe: str) -> list[_Row]:
    rows: list[_Row] = []
    for entry in recipe.split(","):
        head, *rest = entry.split()
        v, slot = [float(number) / 100 for number in rest], int(head[1])
        if head[0] == "R":
            rim = [(v[0] + v[2] * cos(k * pi / 5), v[1] + v[2] * sin(k * pi / 5), 0.0) for k in range(11)]
            rows += [(C, slot, a, b, v[3], v[3], 0.0) for a, b in zip(rim, rim[1:], strict=False)]
        else:
            rz, shape = v[7] if len(v) > 7 else v[6], v[8] if len(v) > 8 else 1.0
            rows.append(("ECBF".index(head[0]), slot, tuple(v[:3]), tuple(v[3:6]), v[6], rz, shape))
    paired = [row for row in rows if row[2][2] + row[3][2] != 0]
    return rows + [(kind, slot, (*a[:2], -a[2]), (*b[:2], -b[2]), *r) for kind, slot, a, b, *r in paired]


def _solids(rows: list[_Row], parts: list[int] | int = 0) -> Solids:
    kind, slot, a, b, rx, rz, shape = (np.array(column) for column in zip(*rows, strict=True))
    half = np.sqrt(((b - a) ** 2).sum(1)) / 2
    # The Householder reflection that takes the y axis to the direction of b - a needs no special cases.
    w = (b - a) / (2 * half[:, None]) - (0, 1, 0)
    frame = np.eye(3) - 2 * w[:, :, None] * w[:, None, :] / np.maximum((w * w).sum(1), 1e-12)[:, None, None]
    ry = np.where(kind == C, np.minimum(rx, rz), half)
    axes = frame * np.stack([rx, ry, rz], 1)[:, None, :]
    shape = np.where(kind == C, half / ry, shape)
    return Solids(kind, slot, np.full(len(kind), parts), (a + b) / 2, axes, shape)


def _slots(text: str) -> list[list[list[str]]]:
    return [[options.split() for options in slot.split("/")] for slot in text.split(";")]


MODELS = {CLASSES.index(name): _solids(_rows(text)) for name, (_, _, text) in RECIPES.items()}
MATERIALS = {CLASSES.index(name): _slots(text) for name, (_, text, _) in RECIPES.items()}
MATERIALS[PERSON] = _slots(_FIGURE)
ROOM = _slots("; ".join(f"{palette} / {_ROOM_PATTERNS}" for palette in ("floor", "plaster", "plaster")))
SCALES = {CLASSES.index(name): scale for name, (scale, _, _) in RECIPES.items()} | {PERSON: 1.0}
# Radius of the floor area to keep clear; less than the corners of its model reach, as most are not round.
RADII = {k: 0.75 * (abs(m.centre) + abs(m.axes).sum(2))[:, ::2].max() for k, m in MODELS.items()}
RADII[PERSON] = 0.38


def figure(rng: np.random.Generator) -> Solids:
    """A person with random joint angles, about 1.75 m tall, facing +x, lowest foot on the floor."""

    def bone(start: tuple, swing: float, spread: float, length: float) -> tuple:
        """The far end of a hanging bone turned by `swing` ahead and `spread` sideways (radians)."""
        flat = length * cos(spread)
        return start[0] + flat * sin(swing), start[1] - flat * cos(swing), start[2] + length * sin(spread)

    u, v = rng.random(11), rng.random((2, 5))
    if u[0] < 0.35:  # standing
        hips, knees, lean = 0.25 * u[1:3] - 0.1, 0.15 * u[3:5], 0.2 * u[5] - 0.08
    elif u[0] < 0.85:  # walking
        stride = 0.25 + 0.45 * u[1]
        hips, knees, lean = (stride, -0.8 * stride), (0.5 * u[3], 0.2 + 0.7 * u[4]), 0.25 * u[5]
    else:  # crouching
        hips, knees, lean = 0.9 + 0.5 * u[1:3], 1.2 + 0.5 * u[3:5], 0.5 * u[5]
    girth = 0.85 + 0.35 * u[8]
    sleeve, trouser = 2 if u[9] < 0.55 else 0, 3 if u[10] < 0.7 else 0  # long, or short and the limb is skin
    x, y, z = neck = bone((0.0, 0.0, 0.0), pi - lean, 0.0, 0.55)
    hx, hy, hz = head = bone(neck, pi - 0.5 * lean - 0.4 * u[6] + 0.2, 0.4 * u[7] - 0.2, 0.2)
    rows: list[_Row] = [
        (C, 2, (0.0, 0.06, 0.0), (x, y - 0.12, z), 0.12 * girth, 0.19 * girth, 0.0),
        (C, 0, neck, head, 0.06, 0.06, 0.0),
        (E, 0, (hx, hy - 0.15, hz), (hx, hy + 0.15, hz), 0.125, 0.115, 0.0),
        (E, 1, (hx - 0.03, hy - 0.09, hz), (hx - 0.03, hy + 0.18, hz), 0.13, 0.128, 0.0),
    ]
    for side, hip_swing, knee_bend, w in zip((-1, 1), hips, knees, v, strict=True):
        if w[0] < 0.22:  # raised arm
            swing, spread = 0.8 + 1.9 * w[1], side * (0.12 + 0.9 * w[2] ** 2)
        else:  # swings against the leg
            swing, spread = 0.7 * (w[1] - hip_swing) - 0.35, side * (0.12 + 0.5 * w[2] ** 2)
        shoulder, hip = (x, y - 0.1, side * (0.19 * girth + 0.02)), (0.0, 0.0, side * 0.1 * girth)
        elbow = bone(shoulder, swing, spread, 0.29)
        swing += 0.15 + 1.5 * w[3] ** 1.5
        wrist = bone(elbow, swing, spread / 2, 0.25)
        hand = bone(wrist, swing, spread / 2, 0.09)
        knee = bone(hip, hip_swing, side * (0.05 + 0.12 * w[4]), 0.43)
        ankle = bone(knee, hip_swing - knee_bend, side * 0.04, 0.42)
        toe = (ankle[0] + 0.14, ankle[1] - 0.02, ankle[2])
        limbs = [
            (2, shoulder, elbow, 0.06 * girth),
            (sleeve, elbow, wrist, 0.047 * girth),
            (0, wrist, hand, 0.05),
            (3, hip, knee, 0.088 * girth),
            (trouser, knee, ankle, 0.062 * girth),
            (4, ankle, toe, 0.055),
        ]
        rows += [(C, slot, a, b, r, r, 0.0) for slot, a, b, r in limbs]
    solids = _solids(rows, [2, 1, 1, 1, *(3, 4, 4, 5, 6, 6) * 2])
    return solids._replace(centre=solids.centre - (0.0, min(row[3][1] for row in rows) - 0.055, 0.0))
