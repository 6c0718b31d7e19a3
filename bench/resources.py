"""Where the harness keeps its own data files, in the source tree and in an installed wheel alike."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent

# In a wheel the cards and the papers' tables lie inside the package, since a top-level folder named
# `datasets` in site-packages would shadow the Hugging Face package of that name.
_PLACES = {
    "recipes": (PACKAGE / "recipes", PACKAGE / "recipes"),
    "suites": (PACKAGE / "suites", PACKAGE / "suites"),
    "datasets": (PACKAGE / "_share" / "datasets", ROOT / "datasets"),
    "published": (PACKAGE / "_share" / "published", ROOT / "results" / "published"),
}


def folder(kind: str) -> Path:
    """The folder of 'recipes', 'suites', 'datasets' or 'published'."""
    installed, in_tree = _PLACES[kind]
    return installed if installed.is_dir() else in_tree


def names(kind: str) -> list[str]:
    """The YAML files of a kind, by stem."""
    return sorted(path.stem for path in folder(kind).glob("*.yaml"))
