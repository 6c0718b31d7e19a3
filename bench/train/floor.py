"""The floor: what predictions that never look at the image score. A figure means little without it.

A constant, and a map: a prediction for each place of the picture, the same for every image. Each is the most frequent
class or the mean of the training labels, which is not quite what is best for every metric. What the labels of other
images can teach (see --shuffle-labels) is about the map.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Executor

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.data.decode import IGNORE
from bench.data.loader import labelled_parts
from bench.tasks import EDGE_TOLERANCE, TASKS
from bench.train import metrics

CERTAIN = 20.0  # a logit that no threshold exceeds
BINARY = ("saliency", "edge")

Scores = dict[str, dict[str, float]]  # task -> metric key -> value
Sums = dict[str, tuple[Tensor, Tensor]]  # task -> labels (C, H, W) and valid labels (H, W), added up by place


def sum_labels(batches: Iterable[Mapping[str, Tensor]], channels: Mapping[str, int]) -> Sums:
    """Training labels by place: how often each class or the foreground occurs, sums of depths and normals."""
    sums: Sums = {}
    for batch in batches:
        for task, n in channels.items():
            label = batch[task]
            if task == "normals":
                values, valid = label, label.abs().sum(1) > 0
            elif task == "depth":
                values, valid = label[:, None], label > 0
            elif task in BINARY:
                valid = label != IGNORE
                values = torch.where(valid, label, 0)[:, None]
            else:
                valid = label != IGNORE
                places = torch.arange(label[0].numel()).expand_as(label.flatten(1)).reshape(label.shape)
                index = label[valid] * label[0].numel() + places[valid]
                values = torch.bincount(index, minlength=n * label[0].numel()).view(1, n, *label.shape[1:])
            values, count = values.double().sum(0), valid.sum(0)
            before = sums.get(task)
            sums[task] = (values, count) if before is None else (before[0] + values, before[1] + count)
    return sums


def best_constants(sums: Sums) -> dict[str, Tensor]:
    """Task -> logits (C, 1, 1) of the constant prediction that fits the training labels.

    The most frequent class; foreground everywhere; the mean normal; the mean depth, which minimises the RMSE.
    """
    everywhere = {t: (v.sum((1, 2), keepdim=True), n.sum()[None, None]) for t, (v, n) in sums.items()}
    return {
        task: torch.full((1, 1, 1), CERTAIN) if task in BINARY else _prediction(task, *everywhere[task])
        for task in sums
    }


def without_foreground(constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of saliency and edges alone: foreground nowhere, which scores more where most images have none."""
    return {task: -logits for task, logits in constants.items() if task in BINARY}


def best_maps(sums: Sums) -> dict[str, Tensor]:
    """Task -> logits (C, H, W): the same place by place, and how often there is foreground. A place that never had a
    label takes the constant."""
    constants = best_constants(sums)
    return {
        task: torch.where(count > 0, _prediction(task, values, count), constants[task])
        for task, (values, count) in sums.items()
    }


def _prediction(task: str, values: Tensor, count: Tensor) -> Tensor:
    if task == "normals":
        return F.normalize(values, dim=0).float()
    if task == "depth":
        return (values / count.clamp(min=1)).float()
    if task in BINARY:
        return (values / count.clamp(min=1)).logit(1e-6).float()
    return F.one_hot(values.argmax(0), len(values)).permute(2, 0, 1).float() * CERTAIN


def better(one: Scores, other: Scores) -> Scores:
    """Task by task those metrics whose headline figure is the better one; `other` may have fewer tasks."""
    chosen = dict(one)
    for task, found in other.items():
        headline = TASKS[task].headline
        a, b = one[task][headline.key], found[headline.key]
        if b > a if headline.higher_is_better else b < a:
            chosen[task] = found
    return chosen


def score_floors(
    floors: Iterable[Mapping[str, Tensor]],
    batches: Iterable[Mapping[str, Tensor]],
    channels: Mapping[str, int],
    tolerance: float = EDGE_TOLERANCE,
    pool: Executor | None = None,
) -> list[Scores]:
    """Metrics of predictions that are the same for every image, as `evaluate` gives them for a model.

    A floor maps tasks, all or some, to logits (C, 1, 1) or (C, H, W), which are resized to the labels. `tolerance` is
    that of edges, a share of the diagonal, and `pool` scores them, if given.
    """
    floors = list(floors)
    accumulators = [
        {task: metrics.make(task, channels[task], tolerance, pool) for task in channels if task in floor}
        for floor in floors
    ]
    for batch in batches:
        for task in channels:
            for _, label in labelled_parts(batch[task]):
                for floor, mine in zip(floors, accumulators, strict=True):
                    if task not in mine:
                        continue
                    resized = F.interpolate(floor[task][None], label.shape[-2:], mode="bilinear", align_corners=False)
                    mine[task].update(resized.expand(len(label), -1, -1, -1), label)
    return [{task: accumulator.compute() for task, accumulator in mine.items()} for mine in accumulators]
