"""Metrics as torchmetrics accumulators: exact over a whole set, a last partial batch and several processes.

Predictions are full-resolution logits (B, C, H, W) in float32. `compute` gives metric key -> value, in the units of
bench.tasks; mean IoU also keeps `per_class`.
"""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import Executor, Future

import numpy as np
import torch
from torch import Tensor

import methods.backbones.torchvision_import  # noqa: F401  isort: skip  torchmetrics imports torchvision
from torchmetrics import Metric

from bench.data.decode import IGNORE
from bench.tasks import EDGE_TOLERANCE, NORMALS_WITHIN
from bench.train.edge_lines import LEVELS, counts

SALIENCY_THRESHOLDS = torch.linspace(0.2, 0.9, 15)
ANGLE_BINS = 18_000  # of 0.01 degrees
AHEAD = 16  # images whose edges a pool may be behind


class MeanIoU(Metric):
    """Intersection over union from one confusion matrix over the whole set, in percent.

    Averaged over the classes that occur in the truth, so that every method is averaged over the same ones: on a
    whole validation set these are all, and the figure is the code family's, which counts an absent class as 0.
    `per_class`, after `compute`: IoU by class index, None for a class that the truth does not hold.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.add_state("confusion", torch.zeros(classes, classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, label: Tensor) -> None:
        valid = label != IGNORE
        pairs = label[valid] * self.classes + logits.argmax(1)[valid]
        self.confusion += torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes)

    def compute(self) -> dict[str, float]:
        """Also sets `per_class`: here, because only here other processes' counts are in."""
        hits, truth = self.confusion.diag().double(), self.confusion.sum(1)
        union = self.confusion.sum(0) + truth - hits
        self.per_class: list[float | None] = [
            100 * (h / u).item() if present > 0 else None for h, u, present in zip(hits, union, truth, strict=True)
        ]
        present = [iou for iou in self.per_class if iou is not None]
        return {"mIoU": sum(present) / len(present) if present else math.nan}


class MaxMeanIoU(Metric):
    """Saliency: foreground IoU of each image at 15 thresholds, averaged over images; the best threshold's, percent.

    An image without foreground in prediction and truth counts as 1, as in the code family; one without any label does
    not count. Beside it the maximal F-measure of the saliency literature (Achanta et al., CVPR 2009): precision and
    recall of each image that has foreground, averaged over images, (1 + 0.3) P R / (0.3 P + R) at the best threshold;
    marking nothing is precision 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(len(SALIENCY_THRESHOLDS), dtype=torch.double), dist_reduce_fx="sum")
        for name in ("precision", "recall"):
            self.add_state(name, torch.zeros(len(SALIENCY_THRESHOLDS), dtype=torch.double), dist_reduce_fx="sum")
        for name in ("images", "salient"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, label: Tensor) -> None:
        valid, truth = label != IGNORE, label == 1
        true, labelled = truth.flatten(1).sum(1).double(), valid.flatten(1).any(1)
        probability = logits[:, 0].sigmoid()
        for i, threshold in enumerate(SALIENCY_THRESHOLDS.tolist()):
            predicted = (probability > threshold) & valid
            both = (predicted & truth).flatten(1).sum(1).double()
            either = (predicted | truth).flatten(1).sum(1).double()
            self.total[i] += torch.where(either > 0, both / either.clamp_min(1), 1.0)[labelled].sum()
            marked = predicted.flatten(1).sum(1).double()
            self.precision[i] += (both / marked.clamp_min(1))[true > 0].sum()
            self.recall[i] += (both / true.clamp_min(1))[true > 0].sum()
        self.images += labelled.sum()
        self.salient += (true > 0).sum()

    def compute(self) -> dict[str, float]:
        f = math.nan
        if self.salient:
            precision, recall = self.precision / self.salient, self.recall / self.salient
            f = 100 * (1.3 * precision * recall / (0.3 * precision + recall).clamp_min(1e-12)).max().item()
        return {"max_mIoU": 100 * (self.total.max() / self.images).item() if self.images else math.nan, "max_f": f}


class NormalsError(Metric):
    """Angles in degrees between predicted and true normals over all valid pixels of the set.

    Mean, median (to 0.01 degrees, from a histogram), root mean square, and the shares within 11.25, 22.5 and 30
    degrees in percent.
    """

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "squared"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.double), dist_reduce_fx="sum")
        self.add_state("within", torch.zeros(len(NORMALS_WITHIN), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("histogram", torch.zeros(ANGLE_BINS, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("pixels", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, label: Tensor) -> None:
        valid = (label != 0).any(1)
        # atan2 of cross and dot is exact for small angles, where arccos loses half its digits.
        cross = torch.linalg.cross(logits, label, dim=1).square().sum(1).sqrt()  # see normals_l1
        dot = (logits * label).sum(1)
        angle = torch.atan2(cross, dot).rad2deg()
        angle = angle.where((cross != 0) | (dot != 0), 90.0)  # no direction at all: neither right nor wrong
        angle = angle[valid].double()
        self.total += angle.sum()
        self.squared += angle.square().sum()
        self.within += torch.stack([(angle < limit).sum() for limit in NORMALS_WITHIN])
        bins = (angle * (ANGLE_BINS / 180)).long().clamp(0, ANGLE_BINS - 1)
        self.histogram += torch.bincount(bins, minlength=ANGLE_BINS)
        self.pixels += valid.sum()

    def compute(self) -> dict[str, float]:
        shares = [f"within_{limit}" for limit in NORMALS_WITHIN]
        if not self.pixels:
            return dict.fromkeys(("mean_error", "median_error", "rmse", *shares), math.nan)
        middle = torch.searchsorted(self.histogram.cumsum(0), (self.pixels + 1) // 2)
        return {
            "mean_error": (self.total / self.pixels).item(),
            "median_error": (middle.item() + 0.5) * 180 / ANGLE_BINS,
            "rmse": (self.squared / self.pixels).sqrt().item(),
            **{name: 100 * (n / self.pixels).item() for name, n in zip(shares, self.within, strict=True)},
        }


class DepthError(Metric):
    """Root mean square error in metres and mean absolute relative error, over all valid pixels of the set."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("squared", "relative"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.double), dist_reduce_fx="sum")
        self.add_state("pixels", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, label: Tensor) -> None:
        valid = label > 0
        truth = label[valid].double()
        difference = logits[:, 0][valid].double() - truth
        self.squared += difference.square().sum()
        self.relative += (difference.abs() / truth).sum()
        self.pixels += valid.sum()

    def compute(self) -> dict[str, float]:
        if not self.pixels:
            return {"rmse": math.nan, "abs_rel": math.nan}
        return {"rmse": (self.squared / self.pixels).sqrt().item(), "abs_rel": (self.relative / self.pixels).item()}


class EdgeF(Metric):
    """F-measure in percent at the threshold that is best over the whole set: odsF, and pixel by pixel.

    odsF counts lines within `tolerance`, a share of the image's diagonal (see bench.train.edge_lines, where it says how
    this differs from the papers' MATLAB tool); the true edges are thinned to lines too. Pixel by pixel there is no
    tolerance, and a prediction wider than the truth is wrong: stricter, and closer to what the loss is told.
    """

    def __init__(self, tolerance: float = EDGE_TOLERANCE, pool: Executor | None = None) -> None:
        """`pool`: who counts, while the next predictions are made; None for here and now."""
        super().__init__()
        self.tolerance, self.pool = tolerance, pool
        self.awaited: deque[Future] = deque()
        for name in ("positives", "negatives", "drawn", "matched"):
            self.add_state(name, torch.zeros(LEVELS, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("true", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, label: Tensor) -> None:
        probability = logits[:, 0].sigmoid()
        bins = (probability * LEVELS).long().clamp(0, LEVELS - 1)
        self.positives += torch.bincount(bins[label == 1], minlength=LEVELS)
        self.negatives += torch.bincount(bins[label == 0], minlength=LEVELS)
        images = probability.cpu().numpy(), (label == 1).cpu().numpy(), (label != IGNORE).cpu().numpy()
        for image in zip(*images, strict=True):
            if self.pool is None:
                self._add(*counts(*image, self.tolerance))
            else:
                self.awaited.append(self.pool.submit(counts, *image, self.tolerance))
                self._settle(AHEAD)

    def _settle(self, left: int = 0) -> None:
        while len(self.awaited) > left:
            self._add(*self.awaited.popleft().result())

    def _add(self, drawn: np.ndarray, found: np.ndarray, true: int) -> None:
        self.drawn += torch.from_numpy(drawn).to(self.drawn)
        self.matched += torch.from_numpy(found).to(self.matched)
        self.true += true

    def compute(self) -> dict[str, float]:
        self._settle()
        if not self.true:
            return {"ods_f": math.nan, "max_f": math.nan}
        hits, false, matched, drawn = (  # at each threshold, from the highest down
            counts.flip(0).cumsum(0).double() for counts in (self.positives, self.negatives, self.matched, self.drawn)
        )
        return {
            "ods_f": 100 * (2 * matched / (drawn + self.true)).max().item(),
            "max_f": 100 * (2 * hits / (hits + false + self.positives.sum())).max().item(),
        }


def make(task: str, channels: int, tolerance: float = EDGE_TOLERANCE, pool: Executor | None = None) -> Metric:
    """The accumulator of a task; `tolerance` and `pool` are of edges alone."""
    kinds = {"saliency": MaxMeanIoU, "normals": NormalsError, "depth": DepthError}
    if task == "edge":
        return EdgeF(tolerance, pool)
    return kinds[task]() if task in kinds else MeanIoU(channels)
