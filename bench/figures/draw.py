"""`bench figure NAME`: the figures by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench.errors import BenchError, did_you_mean
from bench.figures.from_records import FIGURES as FROM_RECORDS
from bench.figures.from_records import Choice
from bench.figures.style import save

FROM_MODELS = ("predictions", "features", "gates")  # those of bench.figures.from_models, which imports torch
NAMES = (*FROM_RECORDS, *FROM_MODELS)


def figure(
    name: str,
    folder: Path,
    records: Sequence[str],
    weights: Path | None,
    dataset: str | None,
    data_root: Path | None,
    images: int,
    choice: Choice,
    out: Path,
    console: Console,
) -> None:
    """Draw a figure and write it as PNG and SVG. Raises BenchError or MethodError in one line."""
    if name not in NAMES:
        raise BenchError(f"unknown figure {name!r}{did_you_mean(name, NAMES)}; one of: {', '.join(NAMES)}")
    if name in FROM_RECORDS:
        from bench.report.groups import collect, groups

        drawn = list(FROM_RECORDS[name](groups(collect(folder)[0]), choice))
    else:
        if not records:
            raise BenchError(f"{name} is drawn from a trained model: name its record with --record, by hash or file")

        from bench import trained
        from bench.figures import from_models

        cells = [trained.load(record, folder, weights, dataset) for record in records]
        if name == "predictions":
            drawn = [("-".join(cell.path.stem for cell in cells), from_models.predictions(cells, data_root, images))]
        else:
            make = getattr(from_models, name)
            drawn = [(cell.path.stem, make(cell, data_root, images)) for cell in cells]
    for suffix, made in drawn:
        png, svg = save(made, out / f"{name}-{suffix}")
        console.print(f"wrote {png} and {svg.name}", soft_wrap=True)
