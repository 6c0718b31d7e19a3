"""The one evaluation loop, for every method.

Apart from the training loop because torchmetrics takes longer to import than torch: what only measures does without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor

import torch
from accelerate import Accelerator
from torch import nn

from bench.data.loader import DenseDataset, labelled_parts, validation_batches
from bench.train import metrics
from bench.train.loop import DivergedError, to_device
from methods.model import upsample_logits


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    dataset: DenseDataset,
    channels: Mapping[str, int],
    batch_size: int,
    workers: int,
    accelerator: Accelerator,
    report: Callable[[int, int], None],
    pool: Executor | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, list[float | None]]]:
    """Metrics of every task at the labels' resolution (the network's, unless the data set keeps original labels: then
    predictions are resized to each), and IoU by class where a task has classes. Edges are scored by `pool`, if given.
    Raises DivergedError for a model whose predictions are not finite: metrics would score them all the same."""
    device = accelerator.device
    was_training = model.training
    model.eval()
    labels = dataset.card.tasks
    accumulators = {
        task: metrics.make(task, n, labels[task].tolerance, pool).to(device) for task, n in channels.items()
    }
    finite = {task: torch.tensor(True, device=device) for task in channels}  # read once: each reading waits for a GPU
    batches = validation_batches(dataset, batch_size, workers, device.type == "cuda")
    for index, host_batch in enumerate(batches):
        batch = to_device(host_batch, device)
        outputs = model(batch["image"])
        for task, accumulator in accumulators.items():
            finite[task] &= outputs[task].isfinite().all()
            for images, label in labelled_parts(batch[task]):
                logits = outputs[task][images]
                if logits.shape[-2:] != label.shape[-2:]:
                    logits = upsample_logits(logits, label.shape[-2:])
                accumulator.update(logits.float(), label)
        report(index + 1, len(batches))
    model.train(was_training)
    bad = [task for task, of_task in finite.items() if not of_task]
    if bad:
        raise DivergedError(f"the predictions of {', '.join(bad)} are not finite after training")
    values = {task: accumulator.compute() for task, accumulator in accumulators.items()}
    return values, {t: a.per_class for t, a in accumulators.items() if isinstance(a, metrics.MeanIoU)}
