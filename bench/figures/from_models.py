"""Figures that need a trained model and images: predictions, features, gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from bench.data.decode import IGNORE
from bench.data.loader import DenseDataset
from bench.data.preview import depth_range, draw, palette
from bench.data.subset import evenly_spaced
from bench.errors import BenchError
from bench.figures.from_records import heat
from bench.figures.style import caption, panels
from bench.tasks import TASKS
from bench.verbs.predict import picture, to_array
from bench.verbs.trained import Trained
from methods.model import upsample_logits

GATE_IMAGES = 64  # that gating scores are averaged over


def validation(trained: Trained, root: Path | None, count: int) -> DenseDataset:
    """`count` images, evenly spread, of the validation set that the record was evaluated on."""
    spec = trained.record.spec
    found = DenseDataset(trained.card, "val", spec.tasks, spec.image_size, root, spec.limit_val, skipped=spec.skipped)
    found.names = evenly_spaced(found.names, count)
    return found


@torch.inference_mode()
def predictions(cells: Sequence[Trained], root: Path | None, count: int) -> Figure:
    """Predictions of several cells below image and truth, for every task (BDTA, Fig. 5)."""
    first = cells[0]
    tasks = first.record.spec.tasks
    if any(cell.record.spec.tasks != tasks or cell.card.name != first.card.name for cell in cells) or any(
        cell.record.spec.image_size != first.record.spec.image_size for cell in cells
    ):
        raise BenchError("the records are of different tasks, data sets or image sizes: one picture cannot show them")
    samples = validation(first, root, count)
    count = len(samples)
    rows = count * (1 + len(cells))
    figure, axes = panels(rows * (1 + len(tasks)), 1.7, 1.7 * samples.size[0] / samples.size[1], 1 + len(tasks))
    grid = np.array(axes).reshape(rows, -1)
    seen: dict[str, set[int]] = {task: set() for task in tasks if first.card.tasks[task].classes}
    for index in range(len(samples)):
        sample = samples[index]
        top = grid[index * (1 + len(cells))]
        _image(top[0], draw("image", sample["image"].numpy(), first.card))
        for axis, task in zip(top[1:], tasks, strict=True):
            _image(axis, draw(task, sample[task].numpy(), first.card))
            axis.set_title(TASKS[task].title if index == 0 else "", fontsize=7)
        top[0].set_title(f"{samples.names[index]}; right: truth", fontsize=6)
        held = sample["depth"].numpy() if "depth" in tasks else None
        if held is not None:
            near, far = depth_range(held)
            top[1 + tasks.index("depth")].set_xlabel(f"{near:.1f} to {far:.1f} m", fontsize=5.5, labelpad=1)
        for task in seen:
            label = sample[task]
            seen[task] |= set(label[label != IGNORE].unique().tolist())
        for below, cell in enumerate(cells, 1):
            line = grid[index * (1 + len(cells)) + below]
            line[0].axis("off")
            line[0].text(0.98, 0.5, _title(cell), ha="right", va="center", fontsize=7, wrap=True)
            logits = cell.model(sample["image"][None])
            for axis, task in zip(line[1:], tasks, strict=True):
                array = to_array(task, upsample_logits(logits[task], samples.size)[0])
                if task in seen:
                    seen[task] |= set(np.unique(array).tolist())
                scale = depth_range(sample["depth"].numpy()) if task == "depth" else None  # the truth's, for all
                _image(axis, picture(task, array, cell.card, scale))
    figure.get_layout_engine().set(wspace=0.02, hspace=0.02, w_pad=0.01, h_pad=0.01)
    _legend(figure, first, seen)
    told = ["White: no label. Depth of an image: its truth's range in all rows, yellow beyond it."]
    caption(figure, [*(told if "depth" in tasks else ["White: no label."]), *_about(cells)])
    return figure


def _legend(figure: Figure, cell: Trained, seen: Mapping[str, set[int]]) -> None:
    """The colours of the classes that occur."""
    handles = []
    for task, numbers in seen.items():
        names, colours = cell.card.tasks[task].classes, palette(cell.card, task) / 255
        handles += [Patch(color=colours[number], label=names[number]) for number in sorted(numbers)]
    if handles:
        columns = max(1, int(figure.get_figwidth() / 1.15))
        figure.set_figheight(figure.get_figheight() + 0.14 * -(-len(handles) // columns))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=6, handlelength=1)


def _title(cell: Trained) -> str:
    return cell.record.method.title.replace(" (", "\n(").replace(" fine", "\nfine")


def _image(axis: Axes, picture: np.ndarray) -> None:
    axis.imshow(picture)
    axis.grid(visible=False)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _about(cells: Sequence[Trained]) -> list[str]:
    spec = cells[0].record.spec
    random = ["! RANDOM BACKBONE WEIGHTS"] if spec.weights == "random" else []
    return [f"{spec.dataset} · {spec.backbone} · records {', '.join(c.path.stem for c in cells)}", *random]


@torch.inference_mode()
def features(cell: Trained, root: Path | None, count: int) -> Figure:
    """Maps of the frozen backbone and of every task's adapted features, stage by stage (BDTA, Fig. 6): the three
    directions in which the maps vary most, as red, green and blue."""
    samples = validation(cell, root, count)
    tasks = cell.record.spec.tasks
    count = len(samples)
    figure, axes = panels(4 * count * (2 + len(tasks)), 1.5, 1.5 * samples.size[0] / samples.size[1], 2 + len(tasks))
    grid = np.array(axes).reshape(4 * count, -1)
    frozen = cell.backbone()  # the method's may be adapted, and multi-task streams see little of it
    for index in range(count):
        image = samples[index]["image"]
        general, found = frozen(image[None]).maps, cell.model.encoder(image[None]).task
        for stage in range(4):
            row = grid[4 * index + stage]
            if stage == 0:
                _image(row[0], draw("image", image.numpy(), cell.card))
            row[0].axis("off")
            maps = {"backbone": general[stage]} | {task: found[task][stage] for task in tasks}
            shades = principal([values[0] for values in maps.values()])
            for axis, name, shade in zip(row[1:], maps, shades, strict=True):
                _image(axis, shade)
                if stage == 0 and index == 0:
                    axis.set_title(TASKS[name].title if name in TASKS else name, fontsize=7)
            row[1].text(-0.06, 0.5, f"stage {stage + 1}", rotation=90, va="center", ha="right", fontsize=6.5,
                        transform=row[1].transAxes)  # fmt: skip
    figure.get_layout_engine().set(wspace=0.02, hspace=0.02, w_pad=0.01, h_pad=0.01)
    caption(
        figure,
        [
            f"{cell.record.method.title}. A stage's maps by their three principal components, one scale.",
            *_about([cell]),
        ],
    )
    return figure


def principal(maps: Sequence[Tensor]) -> list[np.ndarray]:
    """Maps (C, H, W) -> uint8 (H, W, 3) each: the three directions in which all of them together vary most, so that one
    colour means the same in all; stretched to their common range."""
    flat = [values.flatten(1).T.double() for values in maps]
    # Each map on its own scale: else the largest one alone would choose the directions.
    flat = [(x - x.mean(0)) / x.std().clamp_min(1e-12) for x in flat]
    _, _, directions = torch.linalg.svd(torch.cat(flat), full_matrices=False)
    directions = directions[:3]
    # A direction's sign means nothing: its largest entry decides it, so that a figure is the same every time.
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    scores = torch.cat(flat) @ (directions * largest.sign()).T
    low, high = scores.quantile(0.01, 0), scores.quantile(0.99, 0)
    shades = ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    shades = (torch.nn.functional.pad(shades, (0, 3 - shades.shape[1])) * 255).round().to(torch.uint8)
    sizes = [values.shape[1:] for values in maps]
    parts = shades.split([height * width for height, width in sizes])
    return [part.view(*size, 3).numpy() for part, size in zip(parts, sizes, strict=True)]


def gates(cell: Trained, root: Path | None, count: int) -> Figure:
    """Mean gating scores of MoTE's routers over validation images, by stage; a row a task's router (BDTA, Fig. 4)."""
    samples = validation(cell, root, GATE_IMAGES)
    scores = mean_gates(cell, samples)
    names = [TASKS[task].title for task in cell.record.spec.tasks]
    figure, axes = panels(len(scores), 2.5, 2.5)
    for stage, (axis, matrix) in enumerate(zip(axes, scores, strict=True)):
        heat(axis, matrix, names if stage == 0 else [""] * len(names), names, 0, 1, "viridis")
        axis.set_title(f"stage {stage + 1}", fontsize=8)
    axes[0].set_ylabel("router of")
    for axis in axes:
        axis.set_xlabel("expert of", fontsize=8)
    images = f"mean over {len(samples)} validation images"
    caption(figure, [f"{cell.record.method.title}. Gating scores, {images}.", *_about([cell])])
    return figure


@torch.inference_mode()
def mean_gates(cell: Trained, samples: DenseDataset) -> list[np.ndarray]:
    """A matrix (tasks, tasks) a stage, each row summing to one. Raises BenchError for a model without routers."""
    mixer = getattr(cell.model.decoder, "mixer", None)
    if mixer is None or not hasattr(mixer, "gates"):
        raise BenchError(f"{cell.record.spec.method} has no gates; MoTE of ours has them, unless mote=off")
    total: list[Tensor] = []
    for index in range(len(samples)):
        general = cell.model.encoder(samples[index]["image"][None]).general
        found = [gate[0].double() for gate in mixer.gates(general)]
        total = [a + b for a, b in zip(total, found, strict=True)] if total else found
    return [(each / len(samples)).numpy() for each in total]
