"""The constant prediction against hand-computed figures."""

import pytest
import torch
import torch.nn.functional as F

from bench.data.decode import IGNORE
from bench.train.floor import fit_constants, score_constants

CHANNELS = {"semseg": 3, "saliency": 1, "normals": 3, "depth": 1}


def batch_of(semseg, saliency, normals, depth):
    """One image of 1 x 4 pixels."""
    return {
        "image": torch.zeros(1, 3, 1, 4),
        "semseg": torch.tensor(semseg).view(1, 1, 4),
        "saliency": torch.tensor(saliency).float().view(1, 1, 4),
        "normals": torch.tensor(normals).float().T.reshape(1, 3, 1, 4),
        "depth": torch.tensor(depth).float().view(1, 1, 4),
    }


def test_constants_are_fitted_on_one_set_and_scored_on_another():
    up, left = [0, -1, 0], [-1, 0, 0]
    train = batch_of([2, 2, 1, IGNORE], [1, 0, 0, 0], [up, left, [0, 0, 0], [0, 0, 0]], [2, 4, 0, 0])
    val = batch_of([2, 0, 2, IGNORE], [1, 1, 1, 0], [up, up, left, [0, 0, 0]], [2, 4, 5, 0])
    constants = fit_constants([train], CHANNELS)
    assert constants["semseg"].argmax() == 2
    assert torch.allclose(constants["normals"], F.normalize(torch.tensor([-1.0, -1.0, 0.0]), dim=0))
    assert constants["depth"].item() == 3
    scores = score_constants(constants, [val], CHANNELS)
    # Class 2 is hit twice among three pixels, class 0 never; class 1 occurs nowhere.
    assert scores["semseg"]["mIoU"] == pytest.approx(100 * (2 / 3 + 0) / 2)
    assert scores["saliency"]["max_mIoU"] == pytest.approx(75)
    assert scores["normals"]["mean_error"] == pytest.approx(45, abs=1e-4)
    assert scores["depth"]["rmse"] == pytest.approx(((1 + 1 + 4) / 3) ** 0.5)


def test_no_constant_saliency_beats_foreground_everywhere():
    val = batch_of([0] * 4, [1, 0, 0, 0], [[0, 0, -1]] * 4, [1] * 4)
    constants = fit_constants([val], CHANNELS)
    best = score_constants(constants, [val], CHANNELS)["saliency"]["max_mIoU"]
    others = [
        score_constants(constants | {"saliency": torch.tensor([logit])}, [val], CHANNELS)["saliency"]["max_mIoU"]
        for logit in (-20.0, -1.0, 0.0, 1.0)
    ]
    assert best == 25 and best >= max(others)
