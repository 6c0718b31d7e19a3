"""A dataset card: a YAML file that says where images and labels lie and how they are encoded. No torch here.

Bringing your own data is writing a card; see datasets/nyud_v2.yaml for a folder of files.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from bench import yamlfile
from bench.data import scenes
from bench.errors import BenchError, did_you_mean
from bench.tasks import TASKS


def _known_task(name: str) -> str:
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}{did_you_mean(name, TASKS)}; one of: {', '.join(TASKS)}")
    return name


class TaskCard(BaseModel):
    """How one task's labels are stored.

    path      pattern below the data root with {id}; empty for rendered data
    classes   class names in label order, for semseg and human_parts
    ignore    raw values that mean "no label"; where not given, 255 for class labels and none for masks
    subtract  taken from the other raw values to give 0..n-1, for semseg and human_parts
    scale     depth only: metres = stored value * scale
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = ""
    classes: tuple[str, ...] = ()
    ignore: tuple[int, ...] | None = None
    subtract: int = 0
    scale: Annotated[float, Field(gt=0)] = 1.0


class Card(BaseModel):
    """A dataset. `source: scenes` is rendered by bench itself, `source: files` is read from --data-root."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]  # a folder of records is named after it
    title: str
    source: Literal["files", "scenes"] = "files"
    licence: str = ""
    homepage: str = ""
    image_size: tuple[Annotated[int, Field(ge=32)], Annotated[int, Field(ge=32)]]  # (height, width)
    image: str = ""  # pattern below the data root with {id}
    splits: dict[Literal["train", "val"], str | int]  # a list of ids below the root, or a number of scenes
    seed: int = 0  # scenes only
    tasks: dict[Annotated[str, AfterValidator(_known_task)], TaskCard]
    default_tasks: tuple[str, ...] = ()  # where --tasks is not given; empty = all

    @field_validator("tasks")
    @classmethod
    def _labelled(cls, tasks: dict[str, TaskCard]) -> dict[str, TaskCard]:
        for name, task in tasks.items():
            if TASKS[name].channels is None and len(task.classes) < 2:
                raise ValueError(f"task {name!r} needs a list of at least two 'classes'")
        if not tasks:
            raise ValueError("at least one task is needed")
        return tasks

    @model_validator(mode="after")
    def _complete(self) -> Card:
        missing = {"train", "val"} - set(self.splits)
        if missing:
            raise ValueError(f"splits lacks {', '.join(sorted(missing))}")
        patterns = {"image": self.image} | {f"tasks.{name}.path": task.path for name, task in self.tasks.items()}
        for key, pattern in patterns.items():
            if self.source == "files":
                _check_pattern(key, pattern)
        for task in self.default_tasks:
            if task not in self.tasks:
                raise ValueError(f"default_tasks names {task!r}, which is not under tasks")
        for split, value in self.splits.items():
            if isinstance(value, int) != (self.source == "scenes"):
                expected = "a number of scenes" if self.source == "scenes" else "the path of a list of ids"
                raise ValueError(f"splits.{split} must be {expected} where source is {self.source}")
        return self

    def channels(self, tasks: tuple[str, ...]) -> dict[str, int]:
        """Task name -> number of output maps."""
        return {task: TASKS[task].channels or len(self.tasks[task].classes) for task in tasks}


def _check_pattern(key: str, pattern: str) -> None:
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(pattern) if field is not None}
        if fields == {"id"}:
            pattern.format(id="0001")
    except ValueError as error:
        raise ValueError(f"{key}: {pattern!r} is not a valid pattern: {error}") from error
    if fields != {"id"}:
        raise ValueError(f"{key}: {pattern!r} must contain {{id}} and no other field")
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise ValueError(f"{key}: {pattern!r} must stay below the data root")


def load(name: str) -> Card:
    """A built-in card by name, or a YAML file by path."""
    return yamlfile.load(yamlfile.find("datasets", name), Card)


def ids(card: Card, split: Literal["train", "val"], root: Path | None, limit: int | None = None) -> list[str]:
    """The ids of a split, in file order; `limit` picks that many, evenly spaced, the same ones every time.

    Raises BenchError for a missing, empty or repeated list.
    """
    value = card.splits[split]
    if isinstance(value, int):
        # Training and validation scenes come from one generator and must not overlap.
        start = 0 if split == "train" else int(card.splits["train"])
        names = [str(i) for i in range(start, start + value)]
    else:
        path = require_root(card, root) / value
        if not path.is_file():
            raise BenchError(f"{card.name}: no list of {split} images at {path}; is --data-root right?")
        try:
            names = path.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise BenchError(f"{card.name}: cannot read {path} as a list of ids: {error}") from error
        if not names:
            raise BenchError(f"{card.name}: {path} is empty")
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise BenchError(f"{card.name}: {path} names the image {twice!r} twice")
    if limit is not None and limit < len(names):
        names = [names[i * len(names) // limit] for i in range(limit)]
    return names


def require_root(card: Card, root: Path | None) -> Path:
    if root is None:
        raise BenchError(f"dataset {card.name} is read from files; say where with --data-root FOLDER")
    if not root.is_dir():
        raise BenchError(f"no such data folder: {root}")
    return root


def choose_tasks(card: Card, wanted: str | None) -> tuple[str, ...]:
    """`--tasks semseg,depth`, or the card's default. In the card's order, so that the same choice is the same cell."""
    if wanted is None:
        return card.default_tasks or tuple(card.tasks)
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    for name in names:
        if name not in card.tasks:
            hint = did_you_mean(name, card.tasks)
            raise BenchError(f"dataset {card.name} has no task {name!r}{hint}; it has: {', '.join(card.tasks)}")
    if not names:
        raise BenchError("--tasks names no task")
    return tuple(task for task in card.tasks if task in names)


def check_files(card: Card, root: Path | None, names: list[str], tasks: tuple[str, ...]) -> list[int]:
    """The sizes in bytes of all files in use. Raises BenchError naming the first one that is not there."""
    if card.source != "files":
        return []
    folder = require_root(card, root)
    patterns = [card.image, *(card.tasks[task].path for task in tasks)]
    files = [folder / pattern.format(id=name) for name in names for pattern in patterns]
    missing = [file for file in files if not file.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
        raise BenchError(f"{card.name}: missing {missing[0]}{more}")
    return [file.stat().st_size for file in files]


def fingerprint(card: Card, train: list[str], val: list[str], tasks: tuple[str, ...], sizes: Sequence[int] = ()) -> str:
    """Twelve hex digits of what the card says, the tasks, the ids in use, the sizes of their files and, for scenes,
    the renderer's version. Contents are not read: a file changed without changing its size is not noticed."""
    content = [
        card.model_dump(mode="json", exclude={"title", "licence", "homepage"}),
        train,
        val,
        tasks,
        list(sizes),
        scenes.VERSION if card.source == "scenes" else None,
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
