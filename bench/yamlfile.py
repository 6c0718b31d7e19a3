"""YAML files that are checked against a pydantic model, with errors that name the file, the line and the key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from bench import resources
from bench.errors import BenchError, did_you_mean, first_line

M = TypeVar("M", bound=BaseModel)


def _square(value: object) -> object:
    return (value, value) if isinstance(value, int) else value


Side = Annotated[int, Field(ge=32)]
ImageSize = Annotated[tuple[Side, Side], BeforeValidator(_square)]  # (height, width); one number is both


def find(kind: str, name: str) -> Path:
    """The file of a built-in name, or the user's own YAML path. `kind` is 'datasets', 'recipes' or 'suites'."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
        if not path.is_file():
            raise BenchError(
                f"no such file: {path}; give a path to a YAML file or one of: {', '.join(resources.names(kind))}"
            )
        return path
    known = resources.names(kind)
    if name not in known:
        singular = kind.removesuffix("s")
        hint = did_you_mean(name, known)
        raise BenchError(f"unknown {singular} {name!r}{hint}; one of: {', '.join(known)}, or a path to a .yaml file")
    return resources.folder(kind) / f"{name}.yaml"


def load(path: Path, model: type[M]) -> M:
    """Read and check a YAML file. Raises BenchError with file, line, key and what was expected."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", error))
        hint = "; text with braces in it must be quoted" if "'{'" in problem or "'}'" in problem else ""
        raise BenchError(f"{path}{line}: not valid YAML: {problem}{hint}") from error
    except Exception as error:  # a date of no calendar, a tag whose text is none of its kind: Python's own errors
        raise BenchError(f"{path}: not valid YAML: {first_line(error)}") from error
    if not isinstance(data, dict):
        raise BenchError(f"{path}: expected a mapping of keys to values")
    _refuse_duplicates(tree, path, set())
    try:
        return model.model_validate(data)
    except ValidationError as error:
        # A misspelt key is also a missing one: the misspelling is what the user wants to hear of.
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        told = describe(first, model)
        # What several keys have to do with each other is checked at the top, and named at the beginning of the message.
        named = re.match(r"([\w.]+):? ", told)
        loc = first["loc"] or (tuple(named[1].split(".")) if named else ())
        raise BenchError(f"{path}:{_line(tree, loc)}: {told}") from error


def describe(error: dict, model: type[BaseModel]) -> str:
    """One line for a pydantic error: which key, what was expected, and a near miss for a misspelt key; or where a key
    belongs that is none of a model's, which its `elsewhere` may say."""
    where = ".".join(str(part) for part in error["loc"] if part != "[key]")  # pydantic's mark for a mapping's key
    if error["type"] == "extra_forbidden":
        inner = _model_at(model, error["loc"][:-1])
        known = list(inner.model_fields) if inner else []
        advice = getattr(inner, "elsewhere", lambda key: "")(str(error["loc"][-1]))
        if advice:
            return f"{where}: {advice}"
        hint = did_you_mean(str(error["loc"][-1]), known)
        expected = f"; expected one of: {', '.join(known)}" if known else ""
        return f"unknown key {where!r}{hint}{expected}"
    if error["type"] == "missing" and isinstance(error["loc"][-1], int):
        return f"{where.rpartition('.')[0]}: too few values"
    if error["type"] == "missing":
        return f"missing key {where!r}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _model_at(model: type[BaseModel], loc: tuple) -> type[BaseModel] | None:
    """The model that the key path `loc` leads to, through mappings, lists and optional values."""
    current: Any = model
    for part in loc:
        current = _step(current, part)
    return next((kind for kind in (current, *get_args(current)) if _is_model(kind)), None)


def _step(annotation: Any, part: str | int) -> Any:
    """The annotation one key below another; None where there is none."""
    if _is_model(annotation):
        field = annotation.model_fields.get(str(part))
        return field.annotation if field else None
    arguments = get_args(annotation)
    if get_origin(annotation) in (dict, list, tuple):
        return arguments[-1] if get_origin(annotation) is dict else arguments[0]
    return next((found for kind in arguments if (found := _step(kind, part)) is not None), None)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _refuse_duplicates(node: yaml.Node | None, path: Path, done: set[int]) -> None:
    """YAML itself lets a later key silently replace an earlier one. `done`: ids of nodes, which aliases share."""
    if id(node) in done:
        return
    done.add(id(node))
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise BenchError(f"{path}:{line}: key {key.value!r} stands here and in line {seen[key.value]}")
            seen[key.value] = line
            _refuse_duplicates(value, path, done)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_duplicates(value, path, done)


def _line(node: yaml.Node | None, loc: tuple) -> int:
    """The line (from 1) where the key path `loc` stands, or of its nearest ancestor."""
    line = 1
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if pair is None:
                return line
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line
