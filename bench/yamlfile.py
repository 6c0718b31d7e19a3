"""YAML files that are checked against a pydantic model, with errors that name the file, the line and the key."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from bench import resources
from bench.errors import BenchError, did_you_mean

M = TypeVar("M", bound=BaseModel)


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
        raise BenchError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(data, dict):
        raise BenchError(f"{path}: expected a mapping of keys to values")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise BenchError(f"{path}:{_line(tree, first['loc'])}: {describe(first, model)}") from error


def describe(error: dict, model: type[BaseModel]) -> str:
    """One line for a pydantic error: which key, what was expected, and a near miss for a misspelt key."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields(model, error["loc"][:-1])
        hint = did_you_mean(str(error["loc"][-1]), known)
        expected = f"; expected one of: {', '.join(known)}" if known else ""
        return f"unknown key {where!r}{hint}{expected}"
    if error["type"] == "missing":
        return f"missing key {where!r}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _fields(model: type[BaseModel], loc: tuple) -> list[str]:
    """Field names of the model that `loc` leads to, through dicts, lists and optional values."""
    current: object = model
    for part in loc:
        if isinstance(current, type) and issubclass(current, BaseModel):
            field = current.model_fields.get(str(part))
            current = _inner_model(field.annotation) if field else None
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _inner_model(annotation: object) -> object:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_inner_model, getattr(annotation, "__args__", ()))), None)


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
