"""`bench figure NAME`: the figures by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from bench.errors import BenchError, did_you_mean
from bench.figures.from_records import FIGURES as FROM_RECORDS
from bench.figures.from_records import Choice
from bench.figures.style import save
from bench.one_line import errors

FROM_MODELS = ("predictions", "features", "gates")  # those of bench.figures.from_models, which imports torch
NAMES = (*FROM_RECORDS, *FROM_MODELS)
OPTIONS = {  # which figures an option says something to; the others refuse it
    "reference": ("pareto", "sweep", "ablation"),
    "option": ("sweep",),
    "published": ("pareto",),
    "any-device": ("pareto",),
    "record": FROM_MODELS,
    "weights": FROM_MODELS,
    "dataset": FROM_MODELS,
    "data-root": FROM_MODELS,
    "images": ("predictions", "features"),
}


def figure(
    name: str,
    folder: Path,
    records: Sequence[str],
    weights: Path | None,
    dataset: str | None,
    data_root: Path | None,
    images: int | None,
    choice: Choice,
    out: Path,
    console: Console,
) -> None:
    """Draw a figure and write it as PNG and SVG. Raises BenchError or MethodError in one line."""
    if name not in NAMES:
        raise BenchError(f"unknown figure {name!r}{did_you_mean(name, NAMES)}; one of: {', '.join(NAMES)}")
    given = {
        "reference": choice.reference, "option": choice.option, "published": choice.published, "record": records,
        "any-device": choice.any_device,
        "weights": weights, "dataset": dataset, "data-root": data_root, "images": images,
    }  # fmt: skip
    for option, value in given.items():
        if value and name not in OPTIONS[option]:
            raise BenchError(f"--{option} says nothing to {name}; it is for {', '.join(OPTIONS[option])}")
    if out.suffix.lower() in (".png", ".svg"):
        raise BenchError(f"--out {out}: give a folder; the files in it are named after figure and setting")
    if name in FROM_RECORDS:
        from bench.report.groups import collect, groups

        found, problems = collect(folder)
        for problem in problems:
            errors.print(f"left out: {escape(problem)}")
        drawn = list(FROM_RECORDS[name](groups(found, choice.any_device), choice))
    else:
        if not records:
            raise BenchError(f"{name} is drawn from a trained model: name its record with --record, by hash or file")

        from bench.figures import from_models
        from bench.verbs import trained

        cells = [trained.load(record, folder, weights, dataset) for record in records]
        images = images or 2
        if name == "predictions":
            drawn = [("-".join(cell.path.stem for cell in cells), from_models.predictions(cells, data_root, images))]
        else:
            make = getattr(from_models, name)
            drawn = [(cell.path.stem, make(cell, data_root, images)) for cell in cells]
    for suffix, made in drawn:
        png, svg = save(made, out / f"{name}-{suffix}")
        console.print(f"wrote {png} and {svg.name}", soft_wrap=True)
