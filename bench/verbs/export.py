"""`bench export`: a trained cell as a file that others can load: its trained weights with a model card, and the whole
model by torch.export."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from bench import resources
from bench.data import decode, scenes
from bench.errors import BenchError
from bench.files import write_atomically
from bench.record import read
from bench.spec import trained_weights
from bench.tasks import TASKS
from bench.verbs.predict import network_input
from bench.verbs.trained import Trained
from methods.registry import described

FILES = ("record.trained.safetensors", "README.md", "model.pt2")  # beside record.json
TOLERANCE = 1e-3  # of the largest output of a task


def export(trained: Trained, out: Path, images: Sequence[Path], console: Console) -> None:
    """Write record.json, record.trained.safetensors, README.md and model.pt2 into
    `out`, and check the exported model against PyTorch on the images, or on rendered scenes where none are given.

    Raises BenchError where the model cannot be exported, where it answers differently, and where another cell is in
    the folder.
    """
    spec = trained.record.spec
    _refuse_another(out, trained)
    samples, which = _samples(images, spec.image_size)
    model = trained.model
    model.requires_grad_(False)
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(trained.path, out / "record.json")
        shutil.copyfile(trained_weights(trained.path), trained_weights(out / "record.json"))
    except OSError as error:
        raise BenchError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from error
    try:
        # Of a model that it cannot trace, torch prints the whole graph beside the error.
        with torch.no_grad(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            program = torch.export.export(model, (samples[:1],), strict=False)
    except Exception as error:  # whatever of a method torch.export does not know
        raise BenchError(f"{spec.method} cannot be exported: {described(error)}") from error
    path = out / "model.pt2"
    torch.export.save(program, path)
    try:
        worst = check(model, torch.export.load(path).module(), samples)
    except BenchError:
        path.unlink()
        raise
    write_atomically(out / "README.md", model_card(trained, worst, which))
    console.print(f"wrote record.json, record.trained.safetensors, README.md and model.pt2 to {out}", soft_wrap=True)
    console.print(f"exported model against PyTorch on {which}: largest relative difference {max(worst.values()):.1e}")


def _refuse_another(out: Path, trained: Trained) -> None:
    kept, mine = out / "record.json", trained.record.path(Path())
    if kept.exists() and kept.samefile(trained.path):
        raise BenchError(f"{out} is the folder that the record lies in: name a new folder with --out")
    foreign = [name for name in FILES if (out / name).exists()] if not kept.exists() else []
    if foreign:
        raise BenchError(f"{out} has a {foreign[0]} that no export made: name a new folder with --out")
    try:
        there = read(kept).path(Path()) if kept.is_file() else mine
    except BenchError:
        there = kept
    if there != mine:
        raise BenchError(f"{out} holds another cell ({there.parent.name}, {there.stem}): name a new folder with --out")


def check(model: nn.Module, exported: nn.Module, samples: Tensor) -> dict[str, float]:
    """Largest difference of a task's outputs over all samples, relative to its largest output.

    Raises BenchError where one is above TOLERANCE.
    """
    worst: dict[str, float] = {}
    with torch.no_grad():
        for sample in samples:
            ours, theirs = model(sample[None]), exported(sample[None])
            for task, out in ours.items():
                difference = ((out - theirs[task]).abs().max() / out.abs().max().clamp_min(1e-12)).item()
                worst[task] = max(worst.get(task, 0.0), difference)
    bad = {task: value for task, value in worst.items() if not value <= TOLERANCE}
    if bad:
        told = ", ".join(f"{task} by {value:.1e}" for task, value in bad.items())
        raise BenchError(
            f"the exported model differs from PyTorch's: {told} of the largest output; it is not to be used"
        )
    return worst


def _samples(images: Sequence[Path], size: tuple[int, int]) -> tuple[Tensor, str]:
    if images:
        arrays = [decode.read_image(path) for path in images]
        which = f"{len(images)} image{'s' if len(images) > 1 else ''}"
    else:
        arrays = [np.asarray(scenes.render(0, index, size)["image"]) for index in range(2)]
        which = "2 rendered scenes"
    return torch.stack([network_input(array, size) for array in arrays]), which


def model_card(trained: Trained, worst: dict[str, float], which: str) -> str:
    record, spec = trained.record, trained.record.spec
    height, width = spec.image_size
    lines = [
        f"# {record.method.title} on {spec.backbone}",
        f"{record.method.citation or 'No citation'}. Trained on {spec.dataset} ({', '.join(spec.tasks)}), protocol "
        f"{spec.protocol}, recipe {spec.recipe_name}, "
        f"{f'{spec.epochs} epochs' if spec.steps is None else f'{spec.steps} steps'}, batch {spec.batch_size}, "
        f"{height}x{width}, {spec.precision}, seed {spec.seed}; backbone weights: {spec.weights}.",
    ]
    if spec.limit_train or spec.limit_val:
        lines.append(f"Training images limited to {spec.limit_train}, validation images to {spec.limit_val}.")
    if spec.weights == "random":
        lines.append("**The frozen backbone has RANDOM weights: this model is of no use but for trying things out.**")
    rows = ["| task | metric | value |", "| --- | --- | ---: |"]
    for task, values in record.metrics.items():
        for metric in TASKS[task].metrics:
            value = values.get(metric.key)
            written = "–" if value is None else f"{value:.4g} {metric.unit}".strip()
            rows.append(f"| {TASKS[task].title} | {metric.title} | {written} |")
    classes = {task: trained.card.tasks[task].classes for task in spec.tasks if trained.card.tasks[task].classes}
    provenance = record.provenance
    commit = f", commit {provenance.commit}" if provenance and provenance.commit else ""
    commit += " and changes to it" if provenance and provenance.dirty else ""
    lines += [
        "\n".join(rows),
        "## Files",
        f"- `model.pt2`: the whole model by torch.export for one image, float32 (1, 3, {height}, {width}) in [0, 1] "
        "(normalisation is inside) -> a dictionary of logits (1, channels, height, width). "
        "`torch.export.load('model.pt2').module()` runs it without this project.",
        "- `record.json`: every setting, what it was run on and all figures.",
        "- `record.trained.safetensors`: what training changed; `bench predict IMAGE --record record.json` puts it on "
        f"the backbone{' (its checkpoint: `--weights`)' if spec.weights.startswith('file:') else ''}"
        f"{'' if spec.dataset in resources.names('datasets') else ' (the data set: `--dataset CARD`)'}.",
        f"Exported against PyTorch on {which}: largest differences, relative to the largest output: "
        + ", ".join(f"{task} {value:.1e}" for task, value in worst.items())
        + ".",
        "Depth is in metres; saliency and edge are logits of a sigmoid; normals are not normalised (x right, y down).",
        *(f"Classes of {task}: {', '.join(names)}." for task, names in classes.items()),
        f"Made by bench{commit}.",
    ]
    settings = json.dumps(spec.model_dump(mode="json"), indent=1)
    return "\n\n".join([*lines, "## Settings", f"```json\n{settings}\n```"]) + "\n"
