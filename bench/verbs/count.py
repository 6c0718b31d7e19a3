"""`bench count`: trainable parameters under both protocols and backbone passes, without data, weights or a GPU."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench import resources
from bench.data import card as cards
from bench.report import published
from bench.suite import load_suite

if TYPE_CHECKING:
    from methods.backbones.base import Backbone
    from methods.choices import DecoderName
    from methods.model import MultiTaskModel
    from methods.registry import Configured

METHOD, PASSES, PUBLISHED, EQUAL, PRINTED = "method", "passes", "published", "equal", "printed"


def counts(
    methods: str,
    backbones: str,
    dataset: str,
    tasks: str | None,
    size: tuple[int, int],
    tell: Callable[[str], None] = lambda line: None,
    decoder: DecoderName | None = None,
) -> pd.DataFrame:
    """Millions of trainable parameters, a row a method and backbone; built on the meta device, shapes without memory.

    published, equal   under the two protocols, with `decoder` in place of theirs
    printed            as the papers print it for the row that the method stands for and their four tasks, else NaN
    passes             of the backbone for one image
    `tell` hears what is left out: methods of `all` that a backbone cannot serve, and named ones that another can.
    Raises BenchError or MethodError in one line.
    """
    from bench.fitting import on_each
    from methods.backbones.load import full_name
    from methods.model import Setting

    card = cards.load(dataset)
    channels = card.channels(cards.choose_tasks(card, tasks))

    def row(backbone: str, frame: Backbone, configured: Configured) -> dict[str, Any]:
        models = {
            protocol: configured.try_build(copy.deepcopy(frame), channels, Setting(protocol, decoder))
            for protocol in (PUBLISHED, EQUAL)
        }
        # The papers count four tasks with a decoder of theirs; for others their figure says nothing.
        theirs = configured.published_row if set(channels) == set(published.TASKS) and decoder is None else None
        return {
            "backbone": backbone,
            METHOD: configured.expression,
            PASSES: _passes(models[PUBLISHED], configured, size),
            **{protocol: model.ledger().trainable / 1e6 for protocol, model in models.items()},
            PRINTED: published.parameters(theirs, backbone),
        }

    names = [full_name(name.strip()) for name in backbones.split(",")]
    return pd.DataFrame(itertools.chain(*on_each(methods, names, size, row, tell).values()))


def _passes(model: MultiTaskModel, configured: Configured, size: tuple[int, int]) -> int:
    """Raises MethodError for a fault in the method's own code."""
    import torch

    from methods.registry import MethodError, described

    try:
        return model.passes(torch.empty(1, 3, *size))
    except MethodError:
        raise
    except Exception as error:
        raise MethodError(f"{configured.expression} cannot run: {described(error)}") from error


def of_published_rows(tell: Callable[[str], None]) -> tuple[list[tuple[str, str]], Callable[[str, str], float]]:
    """(expression, row of the papers' tables) of every suite, and a function (expression, backbone) -> millions of
    trainable parameters under `published`, for the tasks of PASCAL-Context. `tell` hears what is being counted."""
    from methods.registry import parse

    pairs = {}
    for suite in resources.names("suites"):
        for configured in parse(load_suite(suite).settings.methods):
            if configured.published_row:
                pairs[configured.expression] = configured.published_row

    @functools.cache
    def counted(expression: str, backbone: str) -> float:
        tell(f"{expression} on {backbone}")
        return float(counts(expression, backbone, "pascal_context", None, (448, 448))[PUBLISHED].iloc[0])

    return list(pairs.items()), counted


def markdown(table: pd.DataFrame) -> str:
    columns = [c for c in table.columns if c != "backbone" or table["backbone"].nunique() > 1]
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    lines += ["| " + " | ".join(_cell(row[c]) for c in columns) + " |" for row in table.to_dict("records")]
    return "\n".join(lines)


def show(table: pd.DataFrame, console: Console, decoder: str | None = None) -> None:
    under = f", decoder {decoder}" if decoder else ""
    for backbone, rows in table.groupby("backbone", sort=False):
        out = Table(title=f"Trainable parameters in millions, {backbone}{under}", title_justify="left")
        for column in rows.columns.drop("backbone"):
            out.add_column(column, justify="left" if column == METHOD else "right", overflow="fold")
        for row in rows.drop(columns="backbone").to_dict("records"):
            out.add_row(*(escape(_cell(value)) for value in row.values()))
        console.print(out)
    console.print("published, equal: counted here under each protocol; printed: the papers' figure for the same tasks")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "–" if pd.isna(value) else f"{value:.2f}"
    return str(value)
