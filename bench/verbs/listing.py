"""`bench list`: what can be asked for by name."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator

from rich.markup import escape
from rich.table import Table

from bench import recipe, resources
from bench.data import card
from bench.errors import BenchError, did_you_mean
from bench.suite import load_suite
from methods.registry import Method, Prefix, all_methods, all_prefixes, broken


def table(what: str) -> Table:
    """Methods, backbones, datasets, recipes or suites: each name beside what there is to say of it, a line a fact."""
    kinds = _kinds()
    if what not in kinds:
        near = did_you_mean(what, (*kinds, *_named()))
        raise BenchError(f"cannot list {what!r}{near}; one of: {', '.join(kinds)}, or a method's name")
    out = Table.grid(padding=(0, 2, 0, 0))
    out.add_column(no_wrap=True, style="bold")  # what a user types stays in one piece
    out.add_column(overflow="fold")
    for name, *lines in kinds[what]():
        out.add_row(name, "\n".join(filter(None, lines)))
    return out


def _kinds() -> dict[str, Callable[[], Iterator[tuple[str, ...]]]]:
    return {
        "methods": _methods,
        "backbones": _backbones,
        "datasets": _datasets,
        "recipes": _recipes,
        "suites": _suites,
    }


def about(name: str) -> str | None:
    """What a method's file says of it and of its options, as plain text; None where no method is called so."""
    if name in _kinds():  # methods are imported, and torch with them, for the rest alone
        return None
    prefix, colon, rest = name.partition(":")
    found = all_prefixes().get(prefix) if colon else _named().get(name)
    if found is None:
        problem = next((line for line in broken() if name in line), None)
        if problem:
            raise BenchError(problem)
        return None
    if isinstance(found, Prefix):
        if rest not in ("", "NAME"):
            found.make(rest)  # raises MethodError for a name that there is not
        make = found.make
    else:
        make = found.build
    file = inspect.getmodule(make).__doc__ or ""
    options = [inspect.cleandoc(text) for text in _said(found.options)]
    parts = (f"{name} · {found.title}", inspect.cleandoc(file), _options(found.options), *options)
    return "\n\n".join(filter(None, parts))


def _named() -> dict[str, Method | Prefix]:
    """The methods by each of their names."""
    methods = {name: m for m in all_methods(whole=False).values() for name in (m.name, *m.aliases)}
    return methods | all_prefixes()


def _said(options: type) -> list[str]:
    """The docstrings of an options class and of what it comes from, but those that dataclasses make up."""
    classes = [each for each in options.__mro__ if dataclasses.is_dataclass(each)]
    return [each.__doc__ for each in classes if each.__doc__ and not each.__doc__.startswith(f"{each.__name__}(")]


def _dim(text: str) -> str:
    return f"[dim]{escape(text)}[/dim]" if text else ""


def _methods() -> Iterator[tuple[str, ...]]:
    for method in all_methods(whole=False).values():
        names = "\n= ".join((method.name, *method.aliases))
        yield names, f"{method.title} · {method.family}", _dim(method.citation), escape(_options(method.options))
    for prefix in all_prefixes().values():
        title = f"{prefix.title} · single-task PEFT"
        yield f"{prefix.prefix}:NAME", title, _dim(prefix.citation), escape(_options(prefix.options))
    for problem in broken():
        yield "[red]broken[/red]", f"[red]{escape(problem)}[/red]"


def _options(kind: type) -> str:
    """Each option with its default, and the other choices where there are few."""
    hints = typing.get_type_hints(kind)
    shown = []
    for field in dataclasses.fields(kind):
        value = "on" if field.default is True else "off" if field.default is False else field.default
        others = [c for c in typing.get_args(hints[field.name]) if isinstance(c, str) and c != value]
        value = field.metadata.get("default", value)  # in words, where the value itself says nothing
        default = "" if value is None else f"={value}"
        shown.append(field.name + default + (f" (or {', '.join(others)})" if others else ""))
    return f"[{', '.join(shown)}]" if shown else ""


def _backbones() -> Iterator[tuple[str, ...]]:
    from methods.backbones.load import SHORT_NAMES

    yield from SHORT_NAMES.items()
    yield "swin_*", "any timm Swin V1 by its timm name"
    yield "vit_*, deit_*", "any plain Vision Transformer by its timm name, for images whose sides its patch divides"
    yield "pvt_v2_*", "any PVT v2 by its timm name"
    yield "any other", "a timm features_only model with maps at strides 4, 8, 16, 32, e.g. tf_efficientnet_lite0"


def _datasets() -> Iterator[tuple[str, ...]]:
    for name in resources.names("datasets"):
        found = card.load(name)
        needs = "" if found.source == "scenes" else "; needs --data-root"
        yield name, found.title, f"{', '.join(found.tasks)}; {'x'.join(map(str, found.image_size))}{needs}"
    yield "path/to/card.yaml", "your own; needs --data-root"


def _recipes() -> Iterator[tuple[str, ...]]:
    for name in resources.names("recipes"):
        r = recipe.load(name)
        rate = f"{r.optimizer.name} {r.rates}"
        if r.optimizer.base_batch_size:
            rate += f" at batch {r.optimizer.base_batch_size}"
        if r.optimizer.backbone_factor != 1:
            rate += f" (times {r.optimizer.backbone_factor:g} in a backbone trained whole)"
        if r.optimizer.adaptation_factor != 1:
            rate += f" (times {r.optimizer.adaptation_factor:g} in what a method adds)"
        length = f"{r.epochs} epochs" if r.epochs else f"{r.steps} steps"
        yield name, r.title, _dim(r.source), f"{rate}, {r.schedule.name}, batch {r.batch_size}, {length}"


def _suites() -> Iterator[tuple[str, ...]]:
    for name in resources.names("suites"):
        suite = load_suite(name)
        where = suite.settings.backbone.replace(",", ", ")
        yield name, suite.title, _dim(suite.source), escape(f"{suite.settings.methods} on {where}")
