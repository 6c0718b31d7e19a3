"""The floor: what the best constant prediction scores. A figure means little without it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.data.decode import IGNORE
from bench.data.loader import labelled_parts
from bench.train import metrics

CERTAIN = 20.0  # a logit that no threshold exceeds


def fit_constants(batches: Iterable[Mapping[str, Tensor]], channels: Mapping[str, int]) -> dict[str, Tensor]:
    """Task -> logits (C,) of the constant prediction that fits the training labels.

    The most frequent class; foreground everywhere (nowhere scores less); the mean normal; the mean depth, which
    minimises the RMSE.
    """
    sums = {task: torch.zeros(max(n, 3), dtype=torch.double) for task, n in channels.items()}
    counts = dict.fromkeys(channels, 0)
    for batch in batches:
        for task, n in channels.items():
            label = batch[task]
            if task == "normals":
                sums[task] += label.double().sum((0, 2, 3))
            elif task == "depth":
                sums[task][0] += label.double().sum()
                counts[task] += int((label > 0).sum())
            elif task not in ("saliency", "edge"):
                sums[task][:n] += torch.bincount(label[label != IGNORE], minlength=n).double()
    constants = {}
    for task, n in channels.items():
        if task in ("saliency", "edge"):
            constants[task] = torch.tensor([CERTAIN])
        elif task == "depth":
            constants[task] = (sums[task][:1] / max(counts[task], 1)).float()
        elif task == "normals":
            constants[task] = F.normalize(sums[task], dim=0).float()
        else:
            constants[task] = F.one_hot(sums[task][:n].argmax(), n).float() * CERTAIN
    return constants


def score_constants(
    constants: Mapping[str, Tensor], batches: Iterable[Mapping[str, Tensor]], channels: Mapping[str, int]
) -> dict[str, dict[str, float]]:
    """Metrics of the constant predictions over a set, as `evaluate` gives them for a model."""
    accumulators = {task: metrics.make(task, n) for task, n in channels.items()}
    for batch in batches:
        for task, accumulator in accumulators.items():
            for _, label in labelled_parts(batch[task]):
                logits = constants[task].view(1, -1, 1, 1).expand(len(label), -1, *label.shape[-2:])
                accumulator.update(logits, label)
    return {task: accumulator.compute() for task, accumulator in accumulators.items()}
