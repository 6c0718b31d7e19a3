"""Edges as lines a pixel wide, and how many of them lie where the truth has some: what odsF counts.

A boundary is found if it is drawn near the true one, once. So predictions are brought down to lines, and each pixel of
these may stand for one pixel of the true lines, no further away than a tolerance (Martin et al., TPAMI 2004; Dollar and
Zitnick, TPAMI 2015, whose code the papers' odsF comes from). All in numpy, one image at a time.
"""

from __future__ import annotations

import math

import numpy as np

LEVELS = 100  # thresholds 0.01 to 0.99
TRIANGLE = np.array([1, 2, 3, 4, 5, 4, 3, 2, 1]) / 25
SLACK = 1.01  # so much lower than its neighbour a pixel may be
FREE = -1
TOGETHER = 256  # pixels
RIM = 5  # pixels from the image's border within which strengths fall to zero


def ridges(probability: np.ndarray) -> np.ndarray:
    """Strengths (H, W): the probabilities where they are maximal across their edge, within `SLACK`, else 0.

    Dollar and Zitnick's non-maximum suppression with a radius of one pixel: across an edge is where the second
    derivatives of the smoothed probabilities point.
    """
    from scipy.ndimage import convolve1d, map_coordinates

    if min(probability.shape) < 2:  # no derivatives
        return np.zeros_like(probability)
    smooth = convolve1d(convolve1d(probability, TRIANGLE, axis=0, mode="reflect"), TRIANGLE, axis=1, mode="reflect")
    down, right = np.gradient(smooth)
    (down_down, down_right), right_right = np.gradient(down), np.gradient(right, axis=1)
    angle = np.arctan(down_down * np.sign(-down_right) / (right_right + 1e-5))
    y, x = np.indices(probability.shape, dtype=float)
    sine, cosine = np.sin(angle), np.cos(angle)
    one, other = (
        map_coordinates(probability, [y + side * sine, x + side * cosine], order=1, mode="nearest") for side in (1, -1)
    )
    strengths = np.where(probability * SLACK >= np.maximum(one, other), probability, 0)
    rim = min(RIM, *(length // 2 for length in probability.shape))
    down, right = (np.minimum(np.arange(length), np.arange(length)[::-1]) for length in probability.shape)
    return strengths * np.minimum(down / rim, 1)[:, None] * np.minimum(right / rim, 1)


def _may_go() -> np.ndarray:
    """(2, 256): whether a pixel with these eight neighbours is taken away, in each of the two halves of a pass. Guo and
    Hall, CACM 1989, conditions G1 to G3; neighbours counterclockwise from the east, the lowest bit first."""
    code = np.arange(256)
    x = [(code >> i & 1).astype(bool) for i in range(8)] * 2
    crossings = sum((~x[i] & (x[i + 1] | x[i + 2])).astype(int) for i in (0, 2, 4, 6))
    pairs = [sum((x[i + first] | x[i + first + 1]).astype(int) for i in (0, 2, 4, 6)) for first in (0, 1)]
    thick = np.minimum(*pairs)
    removable = (crossings == 1) & (thick >= 2) & (thick <= 3)
    return np.stack([removable & ~((x[i + 1] | x[i + 2] | ~x[i + 7]) & x[i]) for i in (0, 4)])


MAY_GO = _may_go()
AROUND = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))


def thinned(mask: np.ndarray) -> np.ndarray:
    """Lines a pixel wide (bool, H x W), connected as the mask is. The result of `skimage.morphology.thin`, some ten
    times as fast, which counts here: it is done for every image that is scored."""
    height, width = mask.shape
    padded = np.zeros((height + 2, width + 2), np.uint8)
    inside = padded[1:-1, 1:-1]
    inside[:] = mask
    going = True
    while going:
        going = False
        for may_go in MAY_GO:
            code = np.zeros((height, width), np.uint8)
            for bit, (dy, dx) in enumerate(AROUND):
                code |= padded[1 + dy : height + 1 + dy, 1 + dx : width + 1 + dx] << bit
            gone = may_go[code] & inside.view(bool)
            if gone.any():
                inside[gone] = 0
                going = True
    return inside.astype(bool)


def lines(probability: np.ndarray) -> np.ndarray:
    """Strengths (H, W) of the predicted lines' pixels, else 0.

    The papers' tool thins what exceeds a threshold, at every threshold anew; here the ridges are thinned once, where
    they exceed the lowest, so that the lines of a high threshold are among those of a low one, and one pass matches
    them all. A flat map has no lines.
    """
    if not np.ptp(probability):
        return np.zeros_like(probability)
    strengths = ridges(probability)
    return np.where(thinned(strengths >= 1 / LEVELS), strengths, 0)


def counts(
    probability: np.ndarray, truth: np.ndarray, valid: np.ndarray, tolerance: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """Of one image: drawn and matched pixels by the level that they are drawn at, (LEVELS,) of int each, and how many
    pixels the true lines have.

    probability (H, W); truth and valid (H, W): bool, whether a pixel is an edge and whether that is known. `tolerance`
    is a share of the diagonal.
    """
    strengths, true = np.where(valid, lines(probability.astype(float)), 0), thinned(truth)
    drawn = np.bincount(_levels(strengths[strengths >= 1 / LEVELS]), minlength=LEVELS)
    return drawn, matched(strengths, true, tolerance * math.hypot(*truth.shape)), int(true.sum())


def _levels(strengths: np.ndarray) -> np.ndarray:
    return (strengths * LEVELS).astype(int).clip(max=LEVELS - 1)


def matched(strengths: np.ndarray, truth: np.ndarray, distance: float) -> np.ndarray:
    """(LEVELS,) of int: by how many the matched pixels grow when the threshold falls to k / LEVELS.

    strengths (H, W): of predicted pixels, 0 elsewhere; truth (H, W): bool. Pixels are matched one to one, no further
    apart than `distance` pixels, and as many as can be, at every threshold: a maximum matching. (The papers' tool
    minimises distances as well, in an assignment solved approximately, and so finds at most as many.)

    One pass from the strongest level on. Its pixels first take what is free near them; each that finds nothing looks
    for a chain of pixels that can pass theirs on (Kuhn's algorithm, which keeps a matching of the pixels so far
    maximal). Where a search fails, so does every later one that gets there: its true pixels are never asked again.
    """
    reach = int(distance)
    offsets = np.arange(-reach, reach + 1)
    squares = np.add.outer(offsets**2, offsets**2)
    height, width = truth.shape
    stride = width + 2 * reach
    nearest_first = np.argsort(squares, axis=None, kind="stable")[: (squares <= distance**2).sum()]
    around = np.add.outer(offsets * stride, offsets).ravel()[nearest_first]
    count = int(truth.sum())
    numbers = np.full((height + 2 * reach, stride), count)  # of the true pixels; `count` where there is none
    numbers[reach : reach + height, reach : reach + width][truth] = np.arange(count)
    numbers = numbers.ravel()

    rows, columns = np.nonzero(strengths >= 1 / LEVELS)
    levels = _levels(strengths[rows, columns])
    order = np.argsort(-levels, kind="stable")
    places = ((rows + reach) * stride + columns + reach)[order]
    owner = np.append(np.full(count, FREE), 0)  # the predicted pixel that a true one is matched to
    partner = np.full(len(places), FREE)
    closed = np.append(np.zeros(count, bool), True)
    seen, found_by = np.full(count, -1), np.full(count, -1)

    def take(pixels: np.ndarray, near: np.ndarray) -> np.ndarray:
        """Each the nearest free true pixel of its row in `near`; those that are left without one."""
        while True:
            free = owner[near] == FREE
            wanting = np.flatnonzero(free.any(1))
            if not len(wanting):
                return pixels
            taken, winners = np.unique(near[wanting, free[wanting].argmax(1)], return_index=True)
            winners = wanting[winners]
            owner[taken], partner[pixels[winners]] = pixels[winners], taken
            pixels, near = np.delete(pixels, winners), np.delete(near, winners, axis=0)

    def search(pixel: int) -> bool:
        """Whether the others could make room for it."""
        asking, visited = np.array([pixel]), []
        while len(asking):
            near = numbers[places[asking][:, None] + around]
            who, which = np.nonzero(~closed[near])
            found, by = near[who, which], asking[who]
            new = seen[found] != pixel
            found, by = found[new], by[new]
            seen[found], found_by[found] = pixel, by
            free = found[owner[found] == FREE]
            if len(free):
                end = int(free[0])
                while end != FREE:
                    giver = int(found_by[end])
                    before = int(partner[giver])
                    owner[end], partner[giver] = giver, end
                    end = before
                return True
            visited.append(found)
            asking = np.unique(owner[found])
        for found in visited:
            closed[found] = True
        return False

    grown = np.zeros(LEVELS, int)
    starts = np.flatnonzero(np.diff(levels[order], prepend=LEVELS))
    for of_level in np.split(np.arange(len(places)), starts[1:]) if len(places) else ():
        for first in range(0, len(of_level), TOGETHER):
            pixels = of_level[first : first + TOGETHER]
            near = numbers[places[pixels][:, None] + around]
            hopeful = ~closed[near].all(1)
            pixels = pixels[hopeful]
            left = take(pixels, near[hopeful])
            grown[levels[order[of_level[0]]]] += len(pixels) - len(left) + sum(map(search, left.tolist()))
    return grown
