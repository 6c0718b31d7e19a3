"""`bench list`: what can be asked for by name."""

from __future__ import annotations

import dataclasses

from rich.markup import escape
from rich.table import Table

from bench import grid, recipe, resources
from bench.data import card
from bench.errors import BenchError, did_you_mean


def table(what: str) -> Table:
    """A rich table of methods, backbones, datasets, recipes or suites."""
    kinds = {
        "methods": _methods,
        "backbones": _backbones,
        "datasets": _datasets,
        "recipes": _recipes,
        "suites": _suites,
    }
    if what not in kinds:
        raise BenchError(f"cannot list {what!r}{did_you_mean(what, kinds)}; one of: {', '.join(kinds)}")
    return kinds[what]()


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _methods() -> Table:
    from methods.registry import all_methods

    out = _table("methods", "name", "title", "family", "options and their defaults", "reference")
    for method in all_methods().values():
        defaults = method.options()
        options = ", ".join(
            f"{field.name}={'on' if value is True else 'off' if value is False else value}"
            for field in dataclasses.fields(defaults)
            for value in [getattr(defaults, field.name)]
        )
        names = " = ".join((method.name, *method.aliases))
        out.add_row(names, method.title, method.family, escape(options), method.citation)
    return out


def _backbones() -> Table:
    from methods.backbones.load import SHORT_NAMES

    out = _table("backbones", "name", "timm model")
    for short, name in SHORT_NAMES.items():
        out.add_row(short, name)
    out.add_row("swin_*", "any timm Swin V1 by its timm name")
    out.add_row("any other", "a timm features_only model with maps at strides 4, 8, 16, 32, e.g. tf_efficientnet_lite0")
    return out


def _datasets() -> Table:
    out = _table("datasets", "name", "title", "tasks", "size", "needs")
    for name in resources.names("datasets"):
        found = card.load(name)
        needs = "nothing" if found.source == "scenes" else "--data-root"
        out.add_row(name, found.title, ", ".join(found.tasks), "x".join(map(str, found.image_size)), needs)
    out.add_row("path/to/card.yaml", "your own", "", "", "--data-root")
    return out


def _recipes() -> Table:
    out = _table("recipes", "name", "title", "optimizer", "schedule", "batch", "length", "source")
    for name in resources.names("recipes"):
        r = recipe.load(name)
        length = f"{r.epochs} epochs" if r.epochs else f"{r.steps} steps"
        rate = f"{r.optimizer.name} {r.optimizer.lr:g}"
        out.add_row(name, r.title, rate, r.schedule.name, str(r.batch_size), length, r.source)
    return out


def _suites() -> Table:
    out = _table("suites", "name", "title", "methods", "backbones", "source")
    for name in resources.names("suites"):
        suite = grid.load_suite(name)
        out.add_row(name, suite.title, escape(suite.settings.methods), suite.settings.backbone, suite.source)
    return out
