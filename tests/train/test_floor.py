"""The predictions that do not look at the image, against hand-computed figures."""

import pytest
import torch
import torch.nn.functional as F

from bench.data.decode import IGNORE
from bench.train.floor import best_constants, best_maps, better, score_floors, sum_labels, without_foreground

CHANNELS = {"semseg": 3, "saliency": 1, "normals": 3, "depth": 1}
UP, LEFT, NONE = [0, -1, 0], [-1, 0, 0], [0, 0, 0]


def batch_of(semseg, saliency, normals, depth):
    """One image of 1 x 4 pixels."""
    return {
        "image": torch.zeros(1, 3, 1, 4),
        "semseg": torch.tensor(semseg).view(1, 1, 4),
        "saliency": torch.tensor(saliency).float().view(1, 1, 4),
        "normals": torch.tensor(normals).float().T.reshape(1, 3, 1, 4),
        "depth": torch.tensor(depth).float().view(1, 1, 4),
    }


TRAIN = batch_of([2, 2, 1, IGNORE], [1, 0, 0, 0], [UP, LEFT, NONE, NONE], [2, 4, 0, 0])
MORE = batch_of([2, 0, 1, IGNORE], [1, 1, 0, IGNORE], [UP, UP, LEFT, NONE], [4, 4, 1, 0])
VAL = batch_of([2, 0, 2, IGNORE], [1, 1, 1, 0], [UP, UP, LEFT, NONE], [2, 4, 5, 0])


def score(floor, val=VAL):
    return score_floors([floor], [val], CHANNELS)[0]


def test_constants_are_fitted_on_one_set_and_scored_on_another():
    constants = best_constants(sum_labels([TRAIN], CHANNELS))
    assert constants["semseg"].argmax() == 2
    assert torch.allclose(constants["normals"].flatten(), F.normalize(torch.tensor([-1.0, -1.0, 0.0]), dim=0))
    assert constants["depth"].item() == 3
    scores = score(constants)
    # Class 2 is hit twice among three pixels, class 0 never; class 1 occurs nowhere.
    assert scores["semseg"]["mIoU"] == pytest.approx(100 * (2 / 3 + 0) / 2)
    assert scores["saliency"]["max_mIoU"] == pytest.approx(75)
    assert scores["normals"]["mean_error"] == pytest.approx(45, abs=1e-4)
    assert scores["depth"]["rmse"] == pytest.approx(((1 + 1 + 4) / 3) ** 0.5)


@pytest.mark.parametrize(("empty", "expected"), [(0, 25), (1, 50), (9, 90)])
def test_no_constant_saliency_beats_the_floor(empty, expected):
    """One image with an object on a quarter of it, and images without: nothing everywhere is right on those."""
    val = batch_of([0] * 4, [1, 0, 0, 0], [[0, 0, -1]] * 4, [1] * 4)
    val = {key: torch.cat([value] * (empty + 1)) for key, value in val.items()}
    val["saliency"][1:] = 0
    constants = best_constants(sum_labels([val], CHANNELS))
    others = [
        score(constants | {"saliency": torch.full((1, 1, 1), logit)}, val)["saliency"]["max_mIoU"]
        for logit in (-20.0, -1.0, 0.0, 1.0)
    ]
    everywhere, nowhere = score_floors([constants, without_foreground(constants)], [val], CHANNELS)
    best = better(everywhere, nowhere)
    assert best["saliency"]["max_mIoU"] == pytest.approx(expected) and expected >= max(others) - 1e-9
    assert best["semseg"] == everywhere["semseg"] and best["depth"] == everywhere["depth"]


def test_maps_are_fitted_place_by_place():
    sums = sum_labels([TRAIN, MORE], CHANNELS)
    maps, constants = best_maps(sums), best_constants(sums)
    # Place 3 never had a label: it takes the constant, which is class 2 (three times), two thirds up, depth 15 / 5.
    assert maps["semseg"].argmax(0).flatten().tolist() == [2, 0, 1, 2]  # of equally frequent classes the first
    assert maps["depth"].flatten().tolist() == [3, 4, 1, 3]
    assert torch.allclose(maps["saliency"].sigmoid().flatten(), torch.tensor([1, 0.5, 0, 0]), atol=1e-5)
    assert torch.allclose(maps["normals"][:, 0, 0], torch.tensor([0.0, -1, 0]))
    assert torch.allclose(maps["normals"][:, 0, 1], torch.tensor([-1.0, -1, 0]) / 2**0.5)
    assert torch.equal(maps["normals"][:, :, 3], constants["normals"][:, :, 0])
    scores = score(maps)
    assert scores["semseg"]["mIoU"] == pytest.approx(100 * (1 + 1 / 2) / 2)  # class 1 is not in the truth
    assert scores["depth"]["rmse"] == pytest.approx(((1 + 0 + 16) / 3) ** 0.5)
    assert scores["normals"]["mean_error"] == pytest.approx((0 + 45 + 0) / 3, abs=1e-3)


def test_batches_of_several_images_add_up():
    both = {key: torch.cat([TRAIN[key], MORE[key]]) for key in TRAIN}
    one, two = sum_labels([both], CHANNELS), sum_labels([TRAIN, MORE], CHANNELS)
    assert all(torch.equal(a, b) for task in one for a, b in zip(one[task], two[task], strict=True))


def test_a_map_is_resized_to_the_labels():
    maps = best_maps(sum_labels([TRAIN, MORE], CHANNELS))
    large = {key: value.repeat_interleave(2, -1).repeat_interleave(2, -2) for key, value in VAL.items()}
    big = {t: m.repeat_interleave(2, -1).repeat_interleave(2, -2) for t, m in maps.items()}
    blurred = {t: F.interpolate(m[None], (2, 8), mode="bilinear", align_corners=False)[0] for t, m in maps.items()}
    assert score(maps, large) == score(blurred, large) != score(big, large)
