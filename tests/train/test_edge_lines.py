"""Lines and their matching against scikit-image, scipy's maximum matching and the papers' procedure step by step."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.special import expit
from skimage.morphology import thin

from bench.train import edge_lines
from bench.train.edge_lines import LEVELS, lines, matched, ridges, thinned

SEEDS = range(40)


def most_pairs(predicted, truth, distance):
    """The size of a maximum matching of two masks' pixels, by scipy."""
    p, t = np.argwhere(predicted), np.argwhere(truth)
    if not len(p) or not len(t):
        return 0
    near = np.hypot(*(p[:, None] - t).transpose(2, 0, 1)) <= distance
    return (maximum_bipartite_matching(csr_array(near), perm_type="column") >= 0).sum()


@pytest.mark.parametrize("seed", SEEDS)
def test_thinned_as_scikit_image_does(seed):
    generator = np.random.default_rng(seed)
    mask = generator.random(generator.integers(1, 40, 2)) < generator.choice([0.3, 0.5, 0.8, 0.95])
    mask |= gaussian_filter(generator.normal(size=mask.shape), 2) > 0.1  # blobs and lines
    assert np.array_equal(thinned(mask), thin(mask))
    assert np.array_equal(thinned(thinned(mask)), thinned(mask))


@pytest.mark.parametrize("seed", SEEDS)
def test_as_many_are_matched_as_can_be_at_every_threshold(seed, monkeypatch):
    generator = np.random.default_rng(seed)
    shape = generator.integers(2, 14, 2)
    strengths = np.where(generator.random(shape) < generator.choice([0.1, 0.4, 0.9]), generator.random(shape), 0)
    if generator.random() < 0.5:  # many pixels of a level, taken several at a time
        strengths = np.ceil(strengths * 4) / 5
    monkeypatch.setattr(edge_lines, "TOGETHER", generator.choice([1, 3, 256]))
    truth = generator.random(shape) < generator.choice([0.05, 0.3, 0.8])
    distance = generator.choice([0.5, 1, 1.5, 2, 3.2, 20])
    found = matched(strengths, truth, distance)[::-1].cumsum()[::-1]
    for level in range(1, LEVELS):
        assert found[level] == most_pairs(strengths >= level / LEVELS, truth, distance)


def test_as_many_are_matched_in_a_whole_image():
    """Where most of what is drawn is near no free pixel: of 300 levels' pixels, as a network draws them."""
    generator = np.random.default_rng(0)
    noise = gaussian_filter(generator.normal(size=(2, 90, 120)), (0, 2, 2))
    truth = thinned(noise[0] > 0.02)
    probability = expit(40 * (noise[0] + noise[1] / 2))
    strengths = lines(probability)
    found = matched(strengths, truth, 2.5)[::-1].cumsum()[::-1]
    for level in (1, 20, 50, 80, 99):
        assert found[level] == most_pairs(strengths >= level / LEVELS, truth, 2.5)
    assert found[1] < min(truth.sum(), (strengths > 0).sum())


def test_a_later_pixel_takes_what_an_earlier_one_can_do_without():
    """b, the second, can only have x; a took it, though it could have had y."""
    strengths = np.array([[0, 0.5, 0.9, 0]])
    for truth in ([[1, 0, 0, 1]], [[1, 0, 1, 0]], [[0, 0, 1, 1]]):
        assert matched(strengths, np.array(truth, bool), 1).sum() == 2
    assert matched(strengths, np.array([[0, 0, 0, 1]], bool), 1).tolist() == [int(k == 90) for k in range(LEVELS)]


def test_the_distance_is_euclidean_and_included():
    strengths = np.zeros((9, 9))
    strengths[4, 4] = 1
    for y, x in np.ndindex(9, 9):
        truth = np.zeros((9, 9), bool)
        truth[y, x] = True
        assert matched(strengths, truth, math.sqrt(5)).sum() == (math.hypot(y - 4, x - 4) <= math.sqrt(5))


def blurred(angle, size=41, width=2.0):
    """Probabilities of a line through the middle, as wide as a network draws one, and each pixel's distance from it."""
    y, x = np.mgrid[:size, :size] - size // 2
    distance = np.abs(x * math.sin(angle) - y * math.cos(angle))
    return 0.9 * np.exp(-((distance / width) ** 2) / 2), distance


@pytest.mark.parametrize("degrees", [0, 20, 45, 70, 90, 110, 135, 160])
def test_a_blurred_line_becomes_a_line(degrees):
    probability, distance = blurred(math.radians(degrees))
    found = lines(probability) > 0
    inside = np.zeros_like(found)
    inside[6:-6, 6:-6] = True
    assert distance[found & inside].max() <= 1.5
    # A pixel's width, all along: as many pixels as the longer of its two sides has.
    length = found[6:-6, 6:-6].sum()
    assert 27 <= length <= 32, length


def ridges_by_pixel(e):
    """Edges' non-maximum suppression as its authors' code has it, pixel by pixel: edgesDetect.m, and edgesNmsMex.cpp
    with a radius of 1, a rim of 5 and a slack of 1.01."""
    height, width = e.shape
    triangle = np.convolve(np.ones(5), np.ones(5)) / 25  # convTri(E, 4)
    padded = np.pad(e, 4, mode="symmetric")
    smooth = np.array([
        [triangle @ padded[y : y + 9, x : x + 9] @ triangle for x in range(width)] for y in range(height)
    ])  # fmt: skip

    def slope(a, axis):  # central differences, one-sided at the ends
        a = a if axis else a.T
        out = np.empty_like(a)
        out[:, 1:-1] = (a[:, 2:] - a[:, :-2]) / 2
        out[:, 0], out[:, -1] = a[:, 1] - a[:, 0], a[:, -1] - a[:, -2]
        return out if axis else out.T

    xx = slope(slope(smooth, 1), 1)
    xy, yy = slope(slope(smooth, 0), 1), slope(slope(smooth, 0), 0)
    angle = np.mod(np.arctan(yy * np.sign(-xy) / (xx + 1e-5)), math.pi)

    def at(y, x):
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        y0, x0 = min(int(y), height - 2), min(int(x), width - 2)
        b, a = y - y0, x - x0
        top = e[y0, x0] * (1 - a) + e[y0, x0 + 1] * a
        return top * (1 - b) + (e[y0 + 1, x0] * (1 - a) + e[y0 + 1, x0 + 1] * a) * b

    out = e.copy()
    for y, x in np.ndindex(height, width):
        for side in (-1, 1):
            if e[y, x] * 1.01 < at(y + side * math.sin(angle[y, x]), x + side * math.cos(angle[y, x])):
                out[y, x] = 0
    rim = min(5, height // 2, width // 2)
    for i in range(rim):
        out[i] *= i / rim
        out[height - 1 - i] *= i / rim
        out[:, i] *= i / rim
        out[:, width - 1 - i] *= i / rim
    return out


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("shape", [(2, 3), (4, 9), (11, 10), (24, 17)])
def test_ridges_as_their_authors_find_them(seed, shape):
    generator = np.random.default_rng(seed)
    noise = gaussian_filter(generator.normal(size=shape), generator.choice([0.5, 1, 3]))
    probability = expit(6 * noise / noise.std())
    np.testing.assert_allclose(ridges(probability), ridges_by_pixel(probability), rtol=1e-9, atol=1e-12)


def test_strengths_are_the_probabilities_and_fall_to_zero_at_the_rim():
    probability, _ = blurred(0)
    found = ridges(probability)[20]
    assert found[5:-5] == pytest.approx(probability[20, 5:-5])
    assert found[:6] == pytest.approx(probability[20, :6] * np.array([0, 0.2, 0.4, 0.6, 0.8, 1]))
    assert found[-6:] == pytest.approx(found[:6][::-1])


def test_where_nothing_stands_out_there_are_no_lines():
    assert not lines(np.full((30, 40), 0.7)).any()
    assert not lines(np.full((1, 4), 0.7)).any()
    ramp = np.tile(np.linspace(0.2, 0.8, 40), (30, 1))
    assert (lines(ramp) > 0)[6:-6, 6:-6].sum() < 30


@pytest.mark.parametrize(
    ("ground", "gain", "noise", "most"), [(0, 2.5, 0.6, 0.1), (0.05, 2, 0, 0.5), (0.3, 2, 1, 0.5), (0.3, 30, 0.2, 10)]
)
def test_close_to_thinning_at_every_threshold(ground, gain, noise, most):
    """Thinning once moves the figure by tenths on dark, flat and grey ground. Where broad saturated edges stand on grey
    ground it says too much, by up to ten: at the lowest threshold these are one area with the ground."""
    ours, theirs = np.zeros((2, LEVELS)), np.zeros((2, LEVELS))
    total = 0
    for seed in range(6):
        generator = np.random.default_rng(seed)
        regions = gaussian_filter(generator.normal(size=(72, 96)), 6) > 0
        truth = thin(regions ^ np.roll(regions, 1, 0) | regions ^ np.roll(regions, 1, 1))
        waves = gaussian_filter(generator.normal(size=truth.shape), 2)
        probability = np.clip(ground + gain * gaussian_filter(truth.astype(float), 1.5) + noise * waves, 0, 1)
        distance = 0.011 * math.hypot(*truth.shape)
        total += truth.sum()
        drawn, strengths = lines(probability), ridges(probability)
        found = matched(drawn, truth, distance)[::-1].cumsum()[::-1]
        for level in range(5, LEVELS, 5):
            ours[:, level] += found[level], (drawn >= level / LEVELS).sum()
            line = thin(strengths >= level / LEVELS)
            theirs[:, level] += most_pairs(line, truth, distance), line.sum()
    f_ours, f_theirs = (200 * hits / (marked + total) for hits, marked in (ours, theirs))
    assert 50 < f_theirs.max() < 95
    assert f_ours.max() == pytest.approx(f_theirs.max(), abs=most)
