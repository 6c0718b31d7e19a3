"""The registry of methods, and method expressions such as `mtlora[rank=16]` or the grid `ours[r=2|4|8]`.

Adding a method is adding one file to this folder: whatever it registers is found by itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import itertools
import math
import pkgutil
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import methods

Family = Literal["fine-tuning", "single-task PEFT", "multi-task PEFT"]


class MethodError(ValueError):
    """A method, option or combination that cannot be built. The message is one line for the user."""


@dataclass(frozen=True)
class NoOptions:
    """For methods without options."""


@dataclass(frozen=True)
class Method:
    """A registered method.

    name       registry name; `aliases` are accepted in expressions
    title      as printed in tables
    family     fine-tuning | single-task PEFT | multi-task PEFT
    citation   short reference
    options    frozen dataclass whose defaults are the published ones
    build      (backbone, tasks, options, setting) -> MultiTaskModel
    rows       which row of the papers' tables a set of options stands for: (options) -> row name or None
    trains_backbone   what it adapts is the backbone's own parameters, under `equal` too
    starts_pretrained   before training every task's features are the frozen backbone's own (under `equal`)
    unreached  trainable parameters that no gradient reaches, as the published code counts them: pattern of names -> why
    """

    name: str
    title: str
    family: Family
    citation: str
    build: Callable[..., Any]
    options: type = NoOptions
    aliases: tuple[str, ...] = ()
    rows: Callable[[Any], str | None] = lambda options: None
    trains_backbone: bool = False
    starts_pretrained: bool = False
    unreached: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Configured:
    """A method with its options chosen."""

    method: Method
    options: Any

    @property
    def expression(self) -> str:
        """Canonical form: the registry name and the options that differ from their defaults, in field order."""
        changed = self.changed()
        inside = ",".join(f"{name}={_show(value)}" for name, value in changed.items())
        return f"{self.method.name}[{inside}]" if inside else self.method.name

    @property
    def title(self) -> str:
        inside = ", ".join(f"{name}={_show(value)}" for name, value in self.changed().items())
        return f"{self.method.title} [{inside}]" if inside else self.method.title

    def changed(self) -> dict[str, Any]:
        default = self.method.options()
        return {
            field.name: getattr(self.options, field.name)
            for field in dataclasses.fields(self.options)
            if getattr(self.options, field.name) != getattr(default, field.name)
        }

    @property
    def published_row(self) -> str | None:
        return self.method.rows(self.options)

    def build(self, backbone: Any, tasks: Mapping[str, int], setting: Any) -> Any:
        """Build the MultiTaskModel; `tasks` maps a task name to its number of output channels."""
        return self.method.build(backbone, tasks, self.options, setting)

    def try_build(self, backbone: Any, tasks: Mapping[str, int], setting: Any) -> Any:
        """`build` where only its success counts, on the meta device. Raises MethodError for a fault in the method's own
        code too: what went wrong, and in which line."""
        try:
            return self.build(backbone, tasks, setting)
        except MethodError:
            raise
        except Exception as error:
            raise MethodError(f"{self.method.name} cannot be built on {backbone.name}: {described(error)}") from error


def at_least_one(**values: int) -> None:
    """For the checks of options. Raises ValueError for a value below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


def probability(**values: float) -> None:
    """For the checks of options. Raises ValueError for a value outside [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), not {value:g}")


_METHODS: dict[str, Method] = {}
_MODULES: dict[str, str] = {}  # the module that has entered a method or a prefix, by its name


def register(method: Method) -> Method:
    """Enter a method. Raises MethodError if its name or an alias is taken by another."""
    for name in (method.name, *method.aliases):
        taken = _METHODS.get(name) or next((m for m in _METHODS.values() if name in m.aliases), None)
        if taken is not None:
            raise MethodError(f"method name {name!r} is already taken by {taken.title}")
    _METHODS[method.name] = method
    _MODULES[method.name] = _caller()
    return method


def _caller() -> str:
    """The module whose code has called the function that calls this."""
    return sys._getframe(2).f_globals.get("__name__", "")


def module_of(method: Method) -> str:
    """The module that has entered a method, by which it may have got its function from another."""
    return _MODULES.get(method.name) or _MODULES.get(method.name.partition(":")[0], "")


@dataclass(frozen=True)
class Prefix:
    """Methods `PREFIX:NAME` that are made when they are asked for."""

    prefix: str
    title: str
    citation: str
    options: type
    make: Callable[[str], Method]  # NAME -> method; raises MethodError for an unknown one


_PREFIXES: dict[str, Prefix] = {}


def register_prefix(prefix: Prefix) -> Prefix:
    _PREFIXES[prefix.prefix] = prefix
    _MODULES[prefix.prefix] = _caller()
    return prefix


_BROKEN: dict[str, str] = {}  # files of this folder that cannot be imported: name -> what is wrong


def broken() -> list[str]:
    """A line for each file of this folder that cannot be imported, after importing each of them once.

    Somebody may be writing it while cells of other methods run: it stops what asks for it, or for all, and nothing
    else. Raises MethodError where a file takes the name of another's method.
    """
    for module in pkgutil.iter_modules(methods.__path__):
        if module.ispkg or module.name in _BROKEN:
            continue
        try:
            importlib.import_module(f"methods.{module.name}")
        except Exception as error:  # whatever a new file may do wrong
            for name in [name for name, by in _MODULES.items() if by == f"methods.{module.name}"]:
                _METHODS.pop(name, None)  # half of it does not count
                _PREFIXES.pop(name, None)
                del _MODULES[name]
            if isinstance(error, MethodError):
                raise
            _BROKEN[module.name] = described(error)
    return [f"methods/{name}.py cannot be imported: {why}" for name, why in sorted(_BROKEN.items())]


def all_prefixes() -> dict[str, Prefix]:
    broken()
    return dict(sorted(_PREFIXES.items()))


def all_methods(whole: bool = True) -> dict[str, Method]:
    """Every registered method by name. Raises MethodError for a file that cannot be imported, unless not `whole`."""
    problems = broken()
    if problems and whole:
        raise MethodError("; ".join(problems))
    return dict(sorted(_METHODS.items()))


def get(name: str) -> Method:
    """A method by name or alias. Raises MethodError with a near miss."""
    known = all_methods(whole=False)
    prefix, colon, rest = name.partition(":")
    if colon and prefix in _PREFIXES:
        return _PREFIXES[prefix].make(rest)
    by_any_name = {alias: method for method in known.values() for alias in (method.name, *method.aliases)}
    if name not in by_any_name:
        unknown = f"unknown method {name!r}{near(name, by_any_name)}"
        raise MethodError("; ".join([unknown, *(broken() or ["`bench list methods` shows all"])]))
    return by_any_name[name]


def parse(text: str) -> list[Configured]:
    """Expand a comma-separated list of expressions and grids, e.g. `ours[r=2|4],mtlora`; `all` is every method
    that has a name of its own, so none of a prefix, and `-NAME` takes a method out of what stands before it.

    Raises MethodError for bad syntax, an unknown method, option or value.
    """
    chosen: dict[str, Configured] = {}
    for part in _split(text):
        if part.startswith("-"):
            if not re.fullmatch(r"[\w:.-]+", part[1:]) or part == "-all":
                raise MethodError(f"{part}: write -NAME, which takes a method out with all its options")
            without = {key: c for key, c in chosen.items() if c.method.name != get(part[1:]).name}
            if len(without) == len(chosen):
                raise MethodError(f"{part} takes nothing out: {part[1:]} is not among the methods before it")
            chosen = without
            continue
        for configured in (
            [Configured(m, m.options()) for m in all_methods().values()] if part == "all" else _expand(part)
        ):
            chosen.setdefault(configured.expression, configured)
    if not chosen:
        left = f"{text!r} takes out every method" if "-" in text else "no method given"
        raise MethodError(f"{left}; e.g. --methods ours,mtlora")
    return list(chosen.values())


def asks_for_all(text: str) -> bool:
    """Whether `parse` takes every method: then those that a backbone cannot serve are left out, not refused."""
    return "all" in _split(text)


def _split(text: str) -> list[str]:
    """Split at commas that stand outside brackets."""
    if text.count("[") != text.count("]"):
        raise MethodError(f"unbalanced brackets in {text!r}; write e.g. ours[r=2|4|8],mtlora")
    parts = re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text)
    return [part.strip() for part in parts if part.strip()]


def _expand(text: str) -> list[Configured]:
    match = re.fullmatch(r"([\w:.-]+)(?:\[([^\[\]]*)\])?", text)
    if not match:
        raise MethodError(f"cannot read method expression {text!r}; write e.g. ours[r=2|4|8] or mtlora[rank=16]")
    method = get(match[1])
    grid: dict[str, list[Any]] = {}
    for item in filter(None, (item.strip() for item in (match[2] or "").split(","))):
        name, equals, values = (piece.strip() for piece in item.partition("="))
        fields = {field.name: field for field in dataclasses.fields(method.options)}
        if name not in fields:
            known = ", ".join(fields) or "none"
            raise MethodError(f"{method.name} has no option {name!r}{near(name, fields)}; its options: {known}")
        if not equals or not values:
            default = fields[name].default
            example = "" if default is None else f", e.g. {name}={_show(default)}"
            raise MethodError(f"option {name!r} of {method.name} needs a value{example}")
        if name in grid:
            raise MethodError(f"option {name!r} of {method.name} is given twice; for a grid write {name}=1|2")
        hint = typing.get_type_hints(method.options)[name]
        grid[name] = [_convert(value.strip(), hint, f"{method.name}[{name}=...]") for value in values.split("|")]
    expanded = []
    for values in itertools.product(*grid.values()):
        try:
            expanded.append(Configured(method, method.options(**dict(zip(grid, values, strict=True)))))
        except ValueError as error:
            raise MethodError(f"{method.name}: {error}") from error
    return expanded


def _convert(text: str, hint: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType):  # X | None
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if text not in choices:
            raise MethodError(f"{where}: {text!r} is not one of {', '.join(choices)}{near(text, choices)}")
        return text
    if hint is bool:
        words = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}
        if text.lower() not in words:
            raise MethodError(f"{where}: {text!r} is neither on nor off")
        return words[text.lower()]
    try:
        value = hint(text)
    except ValueError as error:
        raise MethodError(f"{where}: {text!r} is not a valid {hint.__name__}") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise MethodError(f"{where}: {text!r} is not a finite number")
    return value


def _show(value: Any) -> str:
    """A value as an expression writes it: short, and read back as itself."""
    if isinstance(value, bool):
        return "on" if value else "off"
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return repr(value) if isinstance(value, float) and float(short) != value else short


def described(error: Exception) -> str:
    """Kind, first line and place of an exception, on one line."""
    if isinstance(error, SyntaxError) and error.filename:  # no frame is in the file that could not be read
        return f"{type(error).__name__}: {error.msg} ({Path(error.filename).name}, line {error.lineno})"
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}{place(error)}"


COMMON = {f"methods/{name}.py" for name in ("build", "decoder", "model", "registry")}


def place(error: BaseException) -> str:
    """Where an exception came from: the last line of a method's own file on the way to it, or of what methods share;
    ' (methods/FILE, line N)', or ''."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [(Path(f.filename).as_posix().rpartition("/methods/")[::2], f.lineno) for f in frames]
    found = [(f"methods/{file}", line) for (before, file), line in inside if before]
    own = [each for each in found if each[0].count("/") == 1 and each[0] not in COMMON]
    file, line = (own or found or [("", 0)])[-1]
    return f" ({file}, line {line})" if file else ""


def first_line(error: BaseException) -> str:
    """What an exception says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def near(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for a near miss, else ''."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
