"""The verbs of `bench data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench import options
from bench.data import card as cards
from bench.data.card import Card
from bench.one_line import one_line_errors

app = typer.Typer(help="Look at a dataset before training on it.", no_args_is_help=True)
DATASET = Annotated[str, typer.Argument(help="A card's name or a path to a YAML card.")]
DATA_ROOT = Annotated[Path | None, typer.Option(help="Folder that the card's files lie in.")]
TASK_LIST = Annotated[str | None, typer.Option(help="Comma-separated subset of the card's tasks. (default: all)")]


def _opened(dataset: str, data_root: Path | None) -> tuple[Card, Path | None]:
    """The card and the folder that its files lie in, if `bench run` would take it."""
    card = cards.load(dataset)
    cards.require_own_name(card)
    return card, cards.require_root(card, data_root) if card.source == "files" else data_root


def _all_or(card: Card, tasks: str | None) -> tuple[str, ...]:
    return cards.choose_tasks(card, tasks) if tasks else tuple(card.tasks)


@app.command()
@one_line_errors
def check(
    dataset: DATASET,
    data_root: DATA_ROOT = None,
    tasks: TASK_LIST = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. (default: one a core)")] = None,
) -> None:
    """Read every file once: counts, unreadable files, label values, sizes. Exit code 1: training would go wrong."""
    from bench.data.check import check
    from bench.measure import provenance

    card, root = _opened(dataset, data_root)
    if not check(card, root, _all_or(card, tasks), Console(), workers or provenance.usable_cores()):
        raise typer.Exit(1)


@app.command()
@one_line_errors
def preview(
    dataset: DATASET,
    data_root: DATA_ROOT = None,
    tasks: TASK_LIST = None,
    split: Annotated[str, typer.Option(help="train or val.")] = "train",
    count: Annotated[int, typer.Option(min=1, help="Samples, evenly spaced.")] = 6,
    image_size: Annotated[str | None, typer.Option(help="224, or HEIGHTxWIDTH. (default: the card's)")] = None,
    augment: Annotated[
        str | None, typer.Option(help="A recipe: draw the samples after its augmentation, the first epoch's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the augmentation.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the sheet goes.")] = Path("preview.png"),
) -> None:
    """A PNG sheet of samples with every task drawn, as training sees them."""
    from bench import recipe
    from bench.data import preview
    from bench.data.loader import DenseDataset
    from bench.data.subset import evenly_spaced

    options.one_of("split", split, ("train", "val"))
    card, root = _opened(dataset, data_root)
    changes = recipe.load(augment).augment if augment else None
    size = options.image_size(image_size) if image_size else card.image_size
    samples = DenseDataset(
        card, split, _all_or(card, tasks), size, root, augment=changes, seed=seed,
        names=evenly_spaced(cards.ids(card, split, root), count),
    )  # fmt: skip
    preview.save(preview.sheet(samples, range(len(samples))), out)
    console = Console()
    console.print(f"{len(samples)} samples of {card.name} {split} at {size[0]}x{size[1]}: {out}", soft_wrap=True)


@app.command()
@one_line_errors
def speed(
    dataset: DATASET,
    data_root: DATA_ROOT = None,
    tasks: TASK_LIST = None,
    recipe: Annotated[str, typer.Option(help="Whose augmentation.")] = "bdta",
    image_size: Annotated[str | None, typer.Option(help="224, or HEIGHTxWIDTH. (default: the card's)")] = None,
    count: Annotated[int, typer.Option(min=1, help="Training samples.")] = 32,
) -> None:
    """Training samples a second from one loader process, with each kind of --cache, side by side."""
    from bench import recipe as recipes
    from bench.data import speed

    card, root = _opened(dataset, data_root)
    chosen = cards.choose_tasks(card, tasks)
    size = options.image_size(image_size) if image_size else card.image_size
    console = Console()
    speed.show(speed.compare(card, root, chosen, size, recipes.load(recipe), count), count, console)


@app.command()
@one_line_errors
def fetch(dataset: DATASET, to: Annotated[Path, typer.Option(help="Folder to unpack below.")] = Path("data")) -> None:
    """Download a dataset's archive from its card's address, verify and unpack it; or explain the manual step."""
    from bench.data.fetch import fetch

    console = Console()
    root = fetch(cards.load(dataset), to, console)
    console.print(f"use it with --data-root {root}", soft_wrap=True)
