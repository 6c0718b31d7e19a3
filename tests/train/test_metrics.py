"""Metrics against definitions by hand and against brute force in numpy."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from skimage.morphology import thin

from bench.tasks import EDGE_TOLERANCE, TASKS
from bench.train import metrics
from bench.train.edge_lines import lines
from bench.train.losses import synthetic_label
from bench.train.metrics import DepthError, EdgeF, MaxMeanIoU, MeanIoU, NormalsError, make
from tests.train.test_edge_lines import most_pairs

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")

CHANNELS = {"semseg": 5, "human_parts": 3, "saliency": 1, "normals": 3, "depth": 1, "edge": 1}
IGNORE = {"normals": 0, "depth": 0}


def example(task, images=5):
    generator = torch.Generator().manual_seed(0)
    label = synthetic_label(task, CHANNELS[task], (images, 6, 7), generator)
    (label[:, :, 2] if task == "normals" else label[:, 2]).fill_(IGNORE.get(task, 255))
    return 2 * torch.randn(images, CHANNELS[task], 6, 7, generator=generator), label


def score(task, logits, label):
    metric = make(task, CHANNELS[task])
    metric.update(logits, label)
    return metric.compute()


def probability(logits):
    return 1 / (1 + np.exp(-logits[:, 0].double().numpy()))


def mean_iou(logits, label):
    predicted, truth = logits.argmax(1).numpy(), label.numpy()
    valid = truth != 255
    ious = []
    for c in range(logits.shape[1]):
        p, t = (predicted == c) & valid, truth == c
        if (p | t).any():
            ious.append((p & t).sum() / (p | t).sum())
    return {"mIoU": 100 * np.mean(ious)}


def saliency(logits, label):
    p, y = probability(logits), label.numpy()
    curve = []
    for threshold in np.linspace(0.2, 0.9, 15):
        each = []
        for image, truth in zip(p, y, strict=True):
            marked, true = (image > threshold) & (truth != 255), truth == 1
            either = (marked | true).sum()
            each.append((marked & true).sum() / either if either else 1.0)
        curve.append(np.mean(each))
    return {"max_mIoU": 100 * max(curve), "max_f": 100 * max(f_measures(p, y))}


def f_measures(p, y):
    for threshold in np.linspace(0.2, 0.9, 15):
        precisions, recalls = [], []
        for image, truth in zip(p, y, strict=True):
            if not (truth == 1).any():
                continue
            marked = image[truth != 255] > threshold
            true = truth[truth != 255] == 1
            precisions.append(true[marked].mean() if marked.any() else 0.0)
            recalls.append(marked[true].mean())
        precision, recall = np.mean(precisions), np.mean(recalls)
        yield 1.3 * precision * recall / (0.3 * precision + recall)


def normals(logits, label):
    z, y = logits.double().numpy(), label.double().numpy()
    valid = y.any(1)
    cosine = (z * y).sum(1) / np.maximum(np.linalg.norm(z, axis=1) * np.linalg.norm(y, axis=1), 1e-12)
    angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))[valid]
    return {
        "mean_error": angle.mean(),
        # Of an even number the lower of the two in the middle.
        "median_error": pytest.approx(np.sort(angle)[(len(angle) - 1) // 2], abs=0.005),
        "rmse": np.sqrt((angle**2).mean()),
        **{f"within_{limit}": 100 * (angle < limit).mean() for limit in (11.25, 22.5, 30)},
    }


def depth(logits, label):
    y = label.double().numpy()
    d = (logits[:, 0].double().numpy() - y)[y > 0]
    return {"rmse": np.sqrt((d**2).mean()), "abs_rel": (np.abs(d) / y[y > 0]).mean()}


def edge(logits, label):
    p, y = probability(logits), label.numpy()
    best = 0
    for threshold in np.arange(100) / 100:
        marked = p[y != 255] >= threshold
        true = y[y != 255] == 1
        best = max(best, 2 * (marked & true).sum() / (marked.sum() + true.sum()))
    return {"ods_f": ods_f(p, y), "max_f": 100 * best}


def ods_f(p, y, tolerance=EDGE_TOLERANCE):
    """Lines are those of bench.train.edge_lines; matched by scipy, at one threshold after the other."""
    drawn = [np.where(truth != 255, lines(image), 0) for image, truth in zip(p, y, strict=True)]
    true = [thin(truth == 1) for truth in y]
    distance = tolerance * math.hypot(*y.shape[1:])
    best = 0
    for threshold in np.arange(1, 100) / 100:
        marked = [strengths >= threshold for strengths in drawn]
        hits = sum(most_pairs(m, t, distance) for m, t in zip(marked, true, strict=True))
        best = max(best, 2 * hits / sum(mask.sum() for mask in (*marked, *true)))
    return 100 * best


ApproxBase = type(pytest.approx(0)).__mro__[1]
REFERENCE = {
    "semseg": mean_iou, "human_parts": mean_iou, "saliency": saliency, "normals": normals, "depth": depth, "edge": edge,
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_by_brute_force(task):
    ours, reference = score(task, *example(task)), REFERENCE[task](*example(task))
    assert ours.keys() == reference.keys()
    for key, value in reference.items():
        assert ours[key] == (value if isinstance(value, ApproxBase) else pytest.approx(value, rel=1e-5))


@pytest.mark.parametrize("task", TASKS)
def test_keys_are_those_of_the_task(task):
    assert set(score(task, *example(task))) == {metric.key for metric in TASKS[task].metrics}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_partial_batches_are_one_batch(task, cut):
    logits, label = example(task)
    metric = make(task, CHANNELS[task])
    metric.update(logits[:cut], label[:cut])
    metric.update(logits[cut:], label[cut:])
    assert metric.compute() == pytest.approx(score(task, logits, label), rel=1e-7)  # single precision within an image


@pytest.mark.parametrize("task", TASKS)
def test_ignored_pixels_do_not_count(task):
    logits, label = example(task)
    changed = logits.clone()
    changed[:, :, 2] = -3 * changed[:, :, 2] + 1
    before, after = score(task, logits, label), score(task, changed, label)
    if task == "edge":  # a pixel may be a ridge because its ignored neighbour is lower
        del before["ods_f"], after["ods_f"]
    assert after == before


@pytest.mark.parametrize("task", ["semseg", "normals", "depth", "edge"])
def test_without_a_label_there_is_no_figure(task):
    logits, label = example(task)
    label.fill_(IGNORE.get(task, 255))
    assert all(math.isnan(value) for value in score(task, logits, label).values())
    assert all(math.isnan(value) for value in make(task, CHANNELS[task]).compute().values())


@pytest.mark.parametrize(
    ("task", "perfect", "expected"),
    [
        ("semseg", lambda y: torch.nn.functional.one_hot(y, 5).permute(0, 3, 1, 2).float(), {"mIoU": 100}),
        ("saliency", lambda y: 20 * y[:, None] - 10, {"max_mIoU": 100, "max_f": 100}),
        (
            "normals",
            lambda y: 3 * y,
            {
                "mean_error": 0,
                "median_error": 0.005,
                "rmse": 0,
                "within_11.25": 100,
                "within_22.5": 100,
                "within_30": 100,
            },
        ),
        ("depth", lambda y: y[:, None], {"rmse": 0, "abs_rel": 0}),
    ],
)
def test_a_perfect_prediction(task, perfect, expected):
    label = synthetic_label(task, CHANNELS[task], (2, 6, 7), torch.Generator().manual_seed(0))
    assert score(task, perfect(label), label) == pytest.approx(expected, abs=1e-4)


# Classes


def classified(predicted, truth, classes):
    metric = MeanIoU(classes)
    logits = torch.nn.functional.one_hot(torch.tensor([[predicted]]), classes).permute(0, 3, 1, 2).float()
    metric.update(logits, torch.tensor([[truth]]))
    return metric


def test_iou_by_hand():
    metric = classified([0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 255, 0], 4)
    # 0: one of {0, 1, 5}; 1: two of {1, 2, 3}; 2: predicted, but in no truth; 3: never occurs.
    metric.compute()
    assert metric.per_class == pytest.approx([100 / 3, 200 / 3, None, None])
    assert metric.compute() == {"mIoU": pytest.approx(50)}


def test_an_absent_class_has_no_iou_and_a_missed_one_has_zero():
    for truth, expected in (([0, 0], [100, None, None]), ([0, 1], [50, 0, None])):
        metric = classified([0, 0], truth, 3)
        metric.compute()
        assert metric.per_class == expected


# Saliency


def marked(probabilities, truth):
    metric = MaxMeanIoU()
    metric.update(torch.logit(torch.tensor([[probabilities]]))[:, None], torch.tensor([[truth]]).float())
    return metric


def test_saliency_takes_the_best_threshold_of_the_set_not_of_each_image():
    metric = marked([0.95, 0.52, 0.1, 0.1], [1, 0, 0, 0])  # IoU 1 from 0.55 on, 1/2 below
    assert metric.compute()["max_mIoU"] == pytest.approx(100)
    metric.update(torch.logit(torch.tensor([[[[0.48, 0.1, 0.1, 0.1]]]])), torch.tensor([[[1.0, 0, 0, 0]]]))
    # The second image is found up to 0.45, where the first scores 1/2: 3/4 against (1 + 0) / 2 above.
    assert metric.compute()["max_mIoU"] == pytest.approx(75)


def test_saliency_of_an_empty_image_found_empty_counts_as_one():
    assert marked([0.1, 0.1], [0, 0]).compute()["max_mIoU"] == 100
    assert marked([0.1, 0.1], [0, 255]).compute()["max_mIoU"] == 100
    assert marked([0.95, 0.95], [0, 0]).compute()["max_mIoU"] == 0
    assert marked([0.1, 0.1], [0, 1]).compute()["max_mIoU"] == 0


def test_saliency_without_any_label_does_not_count():
    metric = marked([0.95, 0.1], [1, 1])
    alone = metric.compute()
    metric.update(torch.zeros(2, 1, 1, 2), torch.full((2, 1, 2), 255.0))
    assert metric.compute() == alone and alone["max_mIoU"] == 50


def test_saliency_of_no_image():
    assert math.isnan(MaxMeanIoU().compute()["max_mIoU"])


# Several processes


def shard(rank, address, folder):
    """One of two processes, with three or two of the five images."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    found = {}
    for task in TASKS:
        logits, label = example(task)
        metric = make(task, CHANNELS[task])
        metric.update(logits[rank::2], label[rank::2])
        found[task] = (metric.compute(), getattr(metric, "per_class", None))
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_figures_of_one(tmp_path):
    torch.multiprocessing.spawn(shard, (tmp_path / "address", tmp_path), nprocs=2)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for task in TASKS:
            whole = make(task, CHANNELS[task])
            whole.update(*example(task))
            assert found[task][0] == pytest.approx(whole.compute(), rel=1e-9), task
            assert found[task][1] == pytest.approx(getattr(whole, "per_class", None)), task


# Normals and depth


@pytest.mark.parametrize("degrees", [0, 1e-5, 1e-3, 0.1, 30, 90, 150, 179.999, 180])
@pytest.mark.parametrize("length", [1e-3, 1.0, 50.0])
def test_normals_angle(degrees, length):
    angle = math.radians(degrees)
    metric = NormalsError()
    prediction = length * torch.tensor([math.sin(angle), 0.0, math.cos(angle)])
    metric.update(prediction.view(1, 3, 1, 1), torch.tensor([0.0, 0, 1]).view(1, 3, 1, 1))
    assert metric.compute()["mean_error"] == pytest.approx(degrees, rel=1e-5, abs=1e-5)


def test_no_direction_is_not_the_right_one():
    metric = NormalsError()
    metric.update(torch.zeros(1, 3, 1, 1), torch.tensor([0.0, 0, 1]).view(1, 3, 1, 1))
    assert metric.compute()["mean_error"] == 90


def test_normals_mean_is_over_pixels_not_images():
    metric = NormalsError()
    up = torch.tensor([0.0, 0, 1]).view(1, 3, 1, 1)
    metric.update(up.expand(1, 3, 1, 3), up.expand(1, 3, 1, 3))
    metric.update(torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1), up)
    assert metric.compute()["mean_error"] == pytest.approx(90 / 4)


def test_depth_by_hand():
    metric = DepthError()
    metric.update(torch.tensor([[[[3.0, 1.0, 9.0]]]]), torch.tensor([[[2.0, 4.0, 0.0]]]))
    expected = {"rmse": math.sqrt((1 + 9) / 2), "abs_rel": (1 / 2 + 3 / 4) / 2}
    assert metric.compute() == pytest.approx(expected)


# Edges


def test_edge_f_by_hand():
    metric = EdgeF()
    p, y = [0.9, 0.8, 0.7, 0.2, 0.6], [1, 0, 1, 1, 255]
    metric.update(torch.logit(torch.tensor([[[p]]])), torch.tensor([[y]]).float())
    # Marking everything: 2 * 3 / (4 + 3) beats 2 / 4, 2 / 5 and 4 / 6.
    assert metric.compute() == {"ods_f": 0, "max_f": pytest.approx(600 / 7)}  # a row of pixels has no ridges


def outline(*widths):
    """(1, 30, 30): the outlines of squares about the middle of an image, 40 pixels where the width is 11."""
    label = torch.zeros(1, 30, 30)
    for width in sorted(widths, reverse=True):
        low, high = 15 - width // 2, 16 + width // 2
        label[0, low:high, low:high], label[0, low + 1 : high - 1, low + 1 : high - 1] = 1, 0
    return label


def score_edges(drawn, label, reach):
    """With a tolerance of so many pixels."""
    metric = EdgeF(reach / math.hypot(30, 30))
    metric.update(20 * drawn[:, None] - 10, label)
    return metric.compute()


def test_edge_found_where_they_are_and_nearby():
    """The outline itself, and moved by a pixel or two: found within the tolerance alone."""
    label = outline(11)
    scores = {
        (shift, reach): score_edges(label.roll(shift, -1), label, reach)
        for shift in (0, 1, 2)
        for reach in (0.9, 1.1, 2.3)
    }
    assert all(scores[0, reach]["ods_f"] == pytest.approx(100) for reach in (0.9, 1.1, 2.3))
    assert scores[1, 0.9]["ods_f"] < 60 and scores[2, 1.1]["ods_f"] < 60
    assert scores[1, 1.1]["ods_f"] == scores[2, 2.3]["ods_f"] == pytest.approx(100)
    assert scores[0, 0.9]["max_f"] == 100 and scores[1, 1.1]["max_f"] == scores[1, 2.3]["max_f"] < 60


def test_lines_where_there_is_no_label_do_not_count():
    label = outline(11)
    drawn = label + outline(21)
    assert score_edges(drawn, label, 1)["ods_f"] < 80
    ignored = torch.full_like(label, 255)
    ignored[0, 8:23, 8:23] = label[0, 8:23, 8:23]
    assert score_edges(drawn, ignored, 1)["ods_f"] == pytest.approx(100)
    # Nor does the border of what is labelled, of a prediction that says nothing.
    assert score_edges(torch.full_like(label, 0.5), ignored, 1)["ods_f"] == 0


def test_edge_drawn_twice_counts_once():
    """A truth two pixels wide is one line, and of two predicted lines beside each other one is wrong."""
    label = outline(11)
    wide = label + outline(13)
    assert score_edges(label, wide, 2)["ods_f"] == pytest.approx(100, abs=5)
    # 40 of the 56 + 24 are matched, since the true ones are no more: 2 * 40 / (80 + 40).
    assert score_edges(outline(15, 7), label, 3)["ods_f"] == pytest.approx(200 / 3)


@pytest.mark.parametrize("ahead", [0, 2, 99])
def test_edges_scored_by_others(ahead, monkeypatch):
    """However far they are behind, nothing is lost and nothing counted twice."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(3, 1, 30, 30, generator=generator) for _ in range(4)]
    batches = [(logits, outline(11, 5 + 2 * n).repeat(3, 1, 1)) for n, logits in enumerate(drawn)]
    alone, scored = EdgeF(), 0
    with ThreadPoolExecutor(3) as pool:
        monkeypatch.setattr(metrics, "AHEAD", ahead)
        together = make("edge", 1, pool=pool)
        for logits, label in batches:
            scored += len(label)
            alone.update(logits, label)
            together.update(logits, label)
            assert len(together.awaited) == min(ahead, scored)
        assert together.compute() == alone.compute()
        assert together.true == alone.true > 0 and not together.awaited


def test_edge_without_edges_in_the_prediction():
    metric = EdgeF()
    metric.update(torch.full((1, 1, 1, 4), -50.0), torch.tensor([[[1.0, 0, 0, 0]]]))
    # Only the threshold zero marks anything, all of it; and there it is no line.
    assert metric.compute() == {"ods_f": 0, "max_f": pytest.approx(40)}
