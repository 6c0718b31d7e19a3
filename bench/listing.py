"""`bench list`: what can be asked for by name."""

from __future__ import annotations

import dataclasses
import typing

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
    table.add_column(columns[0], no_wrap=True)  # what a user types stays in one piece
    for column in columns[1:]:
        table.add_column(column, overflow="fold")
    return table


def _with_source(title: str, source: str) -> str:
    return f"{title}\n[dim]{source}[/dim]" if source else title


def _methods() -> Table:
    from methods.registry import all_methods, all_prefixes

    out = _table("methods", "name", "title", "family", "options and their defaults")
    for method in all_methods().values():
        names = "\n= ".join((method.name, *method.aliases))
        out.add_row(names, _with_source(method.title, method.citation), method.family, _options(method.options))
    for prefix in all_prefixes().values():
        source = _with_source(prefix.title, prefix.citation)
        out.add_row(f"{prefix.prefix}:NAME", source, "single-task PEFT", _options(prefix.options))
    return out


def _options(kind: type) -> str:
    """Each option with its default, and the other choices where there are few."""
    hints = typing.get_type_hints(kind)
    shown = []
    for field in dataclasses.fields(kind):
        value = "on" if field.default is True else "off" if field.default is False else field.default
        others = [c for c in typing.get_args(hints[field.name]) if c != value]
        shown.append(f"{field.name}={value}" + (f" (or {', '.join(others)})" if others else ""))
    return escape(", ".join(shown))


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
    out = _table("recipes", "name", "title", "optimizer", "schedule", "batch", "length")
    for name in resources.names("recipes"):
        r = recipe.load(name)
        length = f"{r.epochs} epochs" if r.epochs else f"{r.steps} steps"
        base = f" at batch {r.optimizer.base_batch_size}" if r.optimizer.base_batch_size else ""
        rates = r.tune.rates if r.tune else [r.optimizer.lr]
        slower = (
            f"; x{r.optimizer.backbone_factor:g} in a backbone trained whole"
            if r.optimizer.backbone_factor != 1
            else ""
        )
        rate = f"{r.optimizer.name} {' or '.join(f'{value:g}' for value in rates)}{base}{slower}"
        out.add_row(name, _with_source(r.title, r.source), rate, r.schedule.name, str(r.batch_size), length)
    return out


def _suites() -> Table:
    out = _table("suites", "name", "title", "methods", "backbones")
    for name in resources.names("suites"):
        suite = grid.load_suite(name)
        title = _with_source(suite.title, suite.source)
        out.add_row(name, title, escape(suite.settings.methods), suite.settings.backbone.replace(",", "\n"))
    return out
