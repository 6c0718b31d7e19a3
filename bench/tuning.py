"""Choosing a method's learning rate on the training split: which trials, and which of them was best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from bench.recipe import Tuning
from bench.record import Record
from bench.spec import Job, Trial, Tried, Tuned
from bench.tasks import Metric, headline

LEAST = 1e-3  # zero has no logarithm


def trial(job: Job, rate: float) -> Job:
    """The job of one rate. It has seed 0, so that all seeds of a cell share it."""
    spec, tuning = job.spec, job.spec.recipe.tune
    changes = {
        "recipe": spec.recipe.with_rate(rate),
        "trial": Trial(length=tuning.length, holdout=tuning.holdout),
        "seed": 0,
    }
    return job.model_copy(update={"spec": spec.model_copy(update=changes), "keep_weights": False, "probes": 0})


def next_rate(tuning: Tuning, records: Sequence[Record]) -> float | None:
    """The rate to try after those of `records`: the recipe's in turn, then one beyond the edge as long as the best is
    there, as far from it as its neighbour is on the other side. None where all is tried."""
    if len(records) < len(tuning.rates):
        return tuning.rates[len(records)]
    best = choose(records).rate
    if best is None or len(records) >= len(tuning.rates) + tuning.extend:
        return None
    rates = sorted(record.spec.recipe.optimizer.lr for record in records)
    if best == rates[0]:
        return float(f"{best * best / rates[1]:.6g}")
    return float(f"{best * best / rates[-2]:.6g}") if best == rates[-1] else None


def held_out(names: Sequence[str], share: float, blocks: int = 8) -> tuple[list[str], list[str]]:
    """(names to train on, names held out), both in file order.

    Neighbours in file order often show the same place, so whole runs are held out: the end of each of `blocks` equal
    parts. At least one name stays on either side.
    """
    count = len(names)
    if count < 2:
        raise ValueError(f"{count} image cannot be split into some to train on and some to hold out")
    total = min(max(1, round(count * share)), count - 1)
    blocks = min(blocks, total, count - total)
    out = set()
    for block in range(blocks):
        end = round((block + 1) * count / blocks)
        out |= set(range(end - (total * (block + 1) // blocks - total * block // blocks), end))
    return [n for i, n in enumerate(names) if i not in out], [n for i, n in enumerate(names) if i in out]


def score(record: Record, metrics: Mapping[str, Metric] | None = None) -> float | None:
    """Mean over tasks of the headline figure's logarithm (or another metric's), with the sign turned where lower is
    better; None where the trial did not end well or a task has no figure. A figure counts as `LEAST` at least: a
    rate that finds nothing in one task still has the others.

    The difference of two scores is, for small differences, Delta-m (BDTA paper, equation 13) of one trial against the
    other; unlike Delta-m itself it needs no reference and puts all trials in one order. A task whose figure still
    changes by tens of percent between rates, as mIoU does early in training, decides it more than the others.
    """
    if record.status != "ok":
        return None
    total = 0.0
    for task, metric in (metrics or _headlines([record])).items():
        value = record.metrics.get(task, {}).get(metric.key)
        if value is None:
            return None
        total += (1 if metric.higher_is_better else -1) * math.log(max(value, LEAST))
    return total / len(record.spec.tasks)


def _headlines(records: Sequence[Record]) -> dict[str, Metric]:
    """The metric of each task that all trials which ended well have."""
    good = [record for record in records if record.status == "ok"]
    return {task: headline(task, (r.metrics.get(task, {}) for r in good)) for task in records[0].spec.tasks}


def choose(records: Sequence[Record]) -> Tuned:
    """The rate with the best score, the smaller one of equals.

    A rate may lose by diverging or without a score. A trial that failed otherwise (memory, a crash, an interrupt) says
    nothing of its rate: then there is no choice, as there is none where no trial has a score.
    """
    metrics = _headlines(records)
    tried = tuple(
        Tried(
            rate=record.spec.recipe.optimizer.lr,
            status=record.status,
            message=record.failure.message if record.failure else "",
            score=score(record, metrics),
            figures={task: record.metrics.get(task, {}).get(metric.key) for task, metric in metrics.items()},
            metrics={task: metric.key for task, metric in metrics.items()},
            commits=tuple(record.provenance.commits()) if record.provenance else (),
        )
        for record in records
    )
    for each in tried:
        if each.status not in ("ok", "diverged"):
            told = f"the trial of learning rate {each.rate:g}: {each.status.replace('_', ' ')}: {each.message}"
            return Tuned(rate=None, tried=tried, reason=f"{told}; --retry runs it again")
    scored = [each for each in tried if each.score is not None]
    if not scored:
        reason = f"no learning rate came to a score in its trial: {tried[0].message or 'a task has no figure'}"
        return Tuned(rate=None, tried=tried, reason=reason)
    return Tuned(rate=max(scored, key=lambda each: (each.score, -each.rate)).rate, tried=tried)
