"""Which code a cell's figures come from: the files that its process can read, by what they import of each other.

A commit says too much (a word in the README changes it) and too little (nothing of what was edited since).
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache, partial
from importlib.util import resolve_name
from pathlib import Path

from bench.resources import ROOT
from methods.registry import module_of, parse

CELL = "bench.run"  # what its process runs; methods are found by the registry, not imported by it


def fingerprint(expression: str) -> str:
    """16 hexadecimal digits of the code that a cell of this method is run by. Comments count, other methods do not."""
    return _digest(files(expression))


def of(module: str) -> str:
    """The same of a module of `bench` or `methods` and of what it imports of them."""
    return _digest(_reached(module))


def _digest(files: set[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def files(expression: str) -> set[Path]:
    """The harness's part of it, and the method's file with all that it imports of `bench` and `methods`."""
    (configured,) = parse(expression)
    build = configured.method.build
    while isinstance(build, partial):  # of a method that is made when it is asked for
        build = build.func
    return _reached(CELL, build.__module__, module_of(configured.method))


def _reached(*modules: str) -> set[Path]:
    """The files of these modules and of those that they import, wherever in the file, and so on."""
    found: set[Path] = set()
    left = list(modules)
    while left:
        module = left.pop()
        left += filter(None, [module.rpartition(".")[0]])  # a package is imported before its parts
        path = _file(module)
        if path is not None and path not in found:
            found.add(path)
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            left.extend(_imports(path, package, path.stat().st_mtime_ns))
    return found


def _file(module: str) -> Path | None:
    if module.partition(".")[0] not in ("bench", "methods"):
        return None
    place = ROOT.joinpath(*module.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


@cache
def _imports(path: Path, package: str, changed: int) -> tuple[str, ...]:
    """Names of modules, and of what is taken from them, which may be modules too."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # somebody is at work on it while cells run
        return ()
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            names += [source, *(f"{source}.{alias.name}" for alias in node.names)]
    return tuple(names)
