"""The six dense tasks as data: how each is scored and which way is better. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One figure of merit.

    `key` names it in records; `title` and `unit` in tables; `higher_is_better` is equation 13's l_k.
    """

    key: str
    title: str
    unit: str
    higher_is_better: bool


@dataclass(frozen=True)
class Task:
    """A dense prediction task. `metrics[0]` is the headline figure that enters Delta-m (see `headline`).

    `channels` is the number of output maps; None means that the dataset card's class list decides.
    `in_papers` is the heading under which the papers' tables print the headline figure, where it differs.
    """

    name: str
    title: str
    metrics: tuple[Metric, ...]
    channels: int | None = None
    in_papers: str = ""

    @property
    def headline(self) -> Metric:
        return self.metrics[0]


MIOU = Metric("mIoU", "mIoU", "%", True)
NORMALS_WITHIN = (11.25, 22.5, 30)  # degrees
EDGE_TOLERANCE = 0.0075  # of the image's diagonal, where a card says nothing else: that of BSDS, and of PASCAL-Context

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("semseg", "SemSeg", (MIOU,)),
        Task("human_parts", "Human parts", (MIOU,)),
        Task(
            "saliency",
            "Saliency",
            (Metric("max_mIoU", "max mIoU", "%", True), Metric("max_f", "max F (beta^2 = 0.3)", "%", True)),
            channels=1,
            in_papers="mIoU",
        ),
        # The papers print the MEAN angular error under the heading "RMSE"; here it has its own name.
        Task(
            "normals",
            "Normals",
            (
                Metric("mean_error", "mean error", "deg", False),
                Metric("median_error", "median error", "deg", False),
                Metric("rmse", "root mean square error", "deg", False),
                *(Metric(f"within_{a}", f"within {a} deg", "%", True) for a in NORMALS_WITHIN),
            ),
            channels=3,
            in_papers="RMSE",
        ),
        Task(
            "depth", "Depth", (Metric("rmse", "RMSE", "m", False), Metric("abs_rel", "abs rel", "", False)), channels=1
        ),
        Task(
            "edge",
            "Edge",
            (Metric("ods_f", "odsF", "%", True), Metric("max_f", "max F, pixelwise", "%", True)),
            channels=1,
        ),
    )
}


def headline(task: str, figures: Iterable[Mapping[str, object]]) -> Metric:
    """The task's headline metric, where all of these have it; else the next of its direction that all have.

    figures: metric key -> value of this task, a mapping a record; empty ones do not count. Records from before a metric
    was measured are told by the next one, under its own title.
    """
    measured, first = [each for each in figures if each], TASKS[task].headline
    alike = (metric for metric in TASKS[task].metrics if metric.higher_is_better == first.higher_is_better)
    return next((metric for metric in alike if all(metric.key in each for each in measured)), first)


def delta_m(ours: Mapping[str, float], reference: Mapping[str, float]) -> float:
    """Mean relative improvement over single-task baselines, in percent (BDTA+MoTE paper, equation 13).

    Both map a task name to its headline figure, for the same tasks. The sign is flipped where lower is better.
    """
    if set(ours) != set(reference) or not ours:
        raise ValueError(f"Delta-m needs the same tasks on both sides: {sorted(ours)} against {sorted(reference)}")
    if any(reference[task] == 0 for task in ours):
        raise ValueError("Delta-m is undefined where a reference figure is zero")
    gains = [
        (1 if TASKS[task].headline.higher_is_better else -1) * (ours[task] - reference[task]) / reference[task]
        for task in ours
    ]
    return 100 * sum(gains) / len(gains)
