"""Losses against sums written out pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bench.tasks import TASKS
from bench.train.losses import LOSSES, balanced_bce, synthetic_label

CHANNELS = {"semseg": 5, "human_parts": 3, "saliency": 1, "normals": 3, "depth": 1, "edge": 1}


def example(task, ignored=True):
    """Logits and labels of two 4x5 images, some pixels without a label."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, CHANNELS[task], 4, 5)
    label = synthetic_label(task, CHANNELS[task], (2, 4, 5), torch.Generator().manual_seed(1))
    if ignored:
        rows = label[:, :, 2] if task == "normals" else label[:, 2]
        rows.fill_({"normals": 0, "depth": 0}.get(task, 255))
    return logits, label


def pixels(logits, label):
    """(logits, label) of every pixel, in double precision."""
    for b, i, j in np.ndindex(logits.shape[0], *logits.shape[2:]):
        yield logits[b, :, i, j].double().numpy(), label[b, ..., i, j].double().numpy()


def cross_entropy(logits, label):
    each = [math.log(np.exp(z).sum()) - z[int(y)] for z, y in pixels(logits, label) if y != 255]
    return sum(each) / len(each)


def weighted_bce(logits, label, weight=None):
    valid = [(z[0], y) for z, y in pixels(logits, label) if y != 255]
    weight = sum(y == 0 for _, y in valid) / len(valid) if weight is None else weight
    positive = sum(-math.log(1 / (1 + math.exp(-z))) for z, y in valid if y == 1)
    negative = sum(-math.log(1 - 1 / (1 + math.exp(-z))) for z, y in valid if y == 0)
    return (weight * positive + (1 - weight) * negative) / len(valid)


def normals(logits, label):
    each = [np.abs(z / np.linalg.norm(z) - y).mean() for z, y in pixels(logits, label) if y.any()]
    return sum(each) / len(each)


def depth(logits, label):
    each = [abs(z[0] - y) for z, y in pixels(logits, label) if y > 0]
    return sum(each) / len(each)


REFERENCE = {
    "semseg": cross_entropy,
    "human_parts": cross_entropy,
    "saliency": weighted_bce,
    "normals": normals,
    "depth": depth,
    "edge": lambda logits, label: weighted_bce(logits, label, 0.95),
}


def test_every_task_has_a_loss():
    assert set(LOSSES) == set(TASKS) == set(REFERENCE)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_by_brute_force(task, ignored):
    logits, label = example(task, ignored)
    assert LOSSES[task](logits, label).item() == pytest.approx(REFERENCE[task](logits, label), rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_ignored_pixels_get_no_gradient_and_the_others_do(task):
    logits, label = example(task)
    logits.requires_grad_()
    LOSSES[task](logits, label).backward()
    reached = logits.grad.abs().sum((0, 1, 3)) > 0
    assert reached.tolist() == [True, True, False, True]


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_without_a_label_costs_nothing(task):
    logits, label = example(task)
    label.fill_(0 if task in ("normals", "depth") else 255)
    logits.requires_grad_()
    loss = LOSSES[task](logits, label)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()  # NaN would count as any


@pytest.mark.parametrize(
    ("task", "perfect"),
    [
        ("semseg", lambda y: 100 * torch.nn.functional.one_hot(y, 5).permute(0, 3, 1, 2).float()),
        ("saliency", lambda y: 200 * y[:, None] - 100),
        ("edge", lambda y: 200 * y[:, None] - 100),
        ("normals", lambda y: 7 * y),  # whatever their length
        ("depth", lambda y: y[:, None]),
    ],
)
def test_a_perfect_prediction_costs_nothing(task, perfect):
    _, label = example(task, ignored=False)
    assert LOSSES[task](perfect(label), label).item() == pytest.approx(0, abs=1e-6)


def test_by_hand():
    # One positive and three negatives, all at probability 1/2: (3/4 + 3/4) * ln 2 / 4.
    label = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    assert LOSSES["saliency"](torch.zeros(1, 1, 2, 2), label).item() == pytest.approx(0.375 * math.log(2))
    assert LOSSES["edge"](torch.zeros(1, 1, 2, 2), label).item() == pytest.approx((0.95 + 3 * 0.05) * math.log(2) / 4)
    assert LOSSES["semseg"](torch.zeros(1, 8, 2, 2), torch.zeros(1, 2, 2).long()).item() == pytest.approx(math.log(8))
    # (0.6, 0, 0.8) for (0, 0, 1): (0.6 + 0 + 0.2) / 3.
    z, y = torch.tensor([3.0, 0, 4]), torch.tensor([0.0, 0, 1])
    assert LOSSES["normals"](z.view(1, 3, 1, 1), y.view(1, 3, 1, 1)).item() == pytest.approx(0.8 / 3)
    assert LOSSES["depth"](torch.full((1, 1, 1, 2), 3.0), torch.tensor([[[1.0, 4.0]]])).item() == pytest.approx(1.5)


def test_balance_is_of_the_whole_batch():
    logits, label = torch.zeros(2, 1, 1, 1), torch.tensor([1.0, 0.0]).view(2, 1, 1)
    assert balanced_bce(logits, label).item() == pytest.approx(math.log(2) / 2)
    assert balanced_bce(logits[:1], label[:1]).item() == 0  # no negative: weight zero


@pytest.mark.parametrize("task", ["saliency", "edge"])
def test_large_logits_stay_finite(task):
    logits = torch.tensor([[[[-1e4, 1e4]]]], requires_grad=True)
    loss = LOSSES[task](logits, torch.tensor([[[1.0, 0.0]]]))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_normals_of_length_zero_give_a_finite_gradient():
    logits = torch.zeros(1, 3, 2, 2, requires_grad=True)
    loss = LOSSES["normals"](logits, torch.tensor([0.0, 0.6, 0.8]).view(1, 3, 1, 1).expand(1, 3, 2, 2))
    loss.backward()
    assert loss.item() == pytest.approx(1.4 / 3)
    assert logits.grad.isfinite().all()


def test_a_component_of_zero_is_a_label():
    """Only the zero vector is ignored: (1, 0, 0) is a normal, and its zeros count."""
    label = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
    assert LOSSES["normals"](torch.tensor([0.0, 2, 0]).view(1, 3, 1, 1), label).item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("task", TASKS)
def test_synthetic_labels_have_the_tasks_encoding(task):
    label = synthetic_label(task, CHANNELS[task], (2, 8, 8), torch.Generator().manual_seed(0))
    assert label.shape == ((2, 3, 8, 8) if task == "normals" else (2, 8, 8))
    if task == "normals":
        torch.testing.assert_close(label.norm(dim=1), torch.ones(2, 8, 8))
    elif task == "depth":
        assert label.min() > 0
    elif CHANNELS[task] > 1:
        assert label.dtype == torch.long and set(label.unique().tolist()) <= set(range(CHANNELS[task]))
    else:
        assert set(label.unique().tolist()) == {0.0, 1.0}
