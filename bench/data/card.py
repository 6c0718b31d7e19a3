"""A dataset card: a YAML file that says where images and labels lie and how they are encoded. No torch here.

Bringing your own data is writing a card; see datasets/nyud_v2.yaml for a folder of files.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from bench import resources, yamlfile
from bench.data import scenes
from bench.errors import BenchError, did_you_mean
from bench.tasks import EDGE_TOLERANCE, TASKS

Colour = Annotated[int, Field(ge=0, le=255)]


def _known_task(name: str) -> str:
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}{did_you_mean(name, TASKS)}; one of: {', '.join(TASKS)}")
    return name


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Patterns = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


MOST_SCENES = 1_000_000


class Keep(BaseModel):
    """Which pixels have a label: those where another class map has one of these values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    key: str = ""
    values: tuple[int, ...]


class TaskCard(BaseModel):
    """How one task's labels are stored.

    path      pattern below the data root with {id}, or a list of them: each image has the first that is there; empty
              for rendered data
    key       the variable, in a .mat file
    rule      how labels come out of the file, where not as they are: `pascal_parts` paints the parts of all persons of
              a PASCAL-Part annotation in the classes of `parts`; `boundaries` thins the boundaries of a class map
    parts     pascal_parts only: class name -> the parts' names in the annotation
    classes   class names in label order, for semseg and human_parts
    colours   of the classes, as [red, green, blue], for pictures
    ignore    raw values that mean "no label"; where not given, 255 for class labels and none for masks
    ignore_empty   an image without anything but class 0 has no label at all (human parts without a person)
    subtract  taken from the other raw values to give 0..n-1, for semseg and human_parts
    threshold   of a soft mask, as a share of 255 (or of 1 in an array of fractions); without it, masks hold 0 and 1, or
              0 to 255, in which values above one half are on (borders may be smooth)
    keep      normals only: where there is a label
    scale     depth only: metres = stored value * scale
    tolerance   edge only: how far an edge may lie from the true one in odsF, as a share of the image's diagonal
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Patterns = ()
    key: str = ""
    rule: Literal["", "pascal_parts", "boundaries"] = ""
    parts: dict[str, tuple[str, ...]] = {}
    classes: tuple[str, ...] = ()
    colours: tuple[tuple[Colour, Colour, Colour], ...] = ()
    ignore: tuple[int, ...] | None = None
    ignore_empty: bool = False
    subtract: int = 0
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = None
    keep: Keep | None = None
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    tolerance: Annotated[float, Field(gt=0, le=0.1)] = EDGE_TOLERANCE

    @model_validator(mode="after")
    def _consistent(self) -> TaskCard:
        twice = next((name for name in self.classes if self.classes.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two classes are called {twice!r}")
        if len(self.classes) > 255:
            raise ValueError(f"{len(self.classes)} classes; at most 255, since labels are kept in a byte")
        if self.colours and len(self.colours) != len(self.classes):
            raise ValueError(f"{len(self.colours)} colours for {len(self.classes)} classes")
        unknown = [name for name in self.parts if name not in self.classes[1:]]
        if unknown:
            raise ValueError(f"parts names {unknown[0]!r}, which is not one of the classes after the background")
        if (self.rule == "pascal_parts") != bool(self.parts):
            raise ValueError("rule: pascal_parts and parts go together")
        return self


class Fetch(BaseModel):
    """Where the data comes from: the address of a tar archive, the folder it unpacks to and its SHA-256 if known; or
    what to do by hand."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = ""
    folder: str = ""
    sha256: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    manual: str = ""

    @model_validator(mode="after")
    def _useful(self) -> Fetch:
        if bool(self.url) == bool(self.manual):
            raise ValueError("fetch needs a url and folder, or a manual step")
        if self.url and not self.folder:
            raise ValueError("fetch with a url needs the folder that the archive holds")
        if self.url and Path(self.folder).name != self.folder:
            raise ValueError(f"fetch.folder must be the name of one folder, not {self.folder!r}")
        return self


class Card(BaseModel):
    """A dataset. `source: scenes` is rendered by bench itself, `source: files` is read from --data-root."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]  # a folder of records is named after it
    title: str
    source: Literal["files", "scenes"] = "files"
    licence: str = ""
    homepage: str = ""
    fetch: Fetch | None = None
    image_size: yamlfile.ImageSize
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
            if name != "edge" and "tolerance" in task.model_fields_set:
                raise ValueError(f"task {name!r} has a tolerance, which is of edges alone")
        if not tasks:
            raise ValueError("at least one task is needed")
        return tasks

    @model_validator(mode="after")
    def _complete(self) -> Card:
        missing = {"train", "val"} - set(self.splits)
        if missing:
            raise ValueError(f"splits lacks {', '.join(sorted(missing))}")
        patterns = [("image", self.image)]
        for name, task in self.tasks.items():
            patterns += [(f"tasks.{name}.path", pattern) for pattern in task.path or ("",)]
            patterns += [(f"tasks.{name}.keep.path", task.keep.path)] if task.keep else []
        for key, pattern in patterns:
            if self.source == "files":
                _check_pattern(key, pattern)
        for task in self.default_tasks:
            if task not in self.tasks:
                raise ValueError(f"default_tasks names {task!r}, which is not under tasks")
        for split, value in self.splits.items():
            if isinstance(value, int) != (self.source == "scenes"):
                expected = "a number of scenes" if self.source == "scenes" else "the path of a list of ids"
                raise ValueError(f"splits.{split} must be {expected} where source is {self.source}")
            if isinstance(value, int) and not 1 <= value <= MOST_SCENES:
                raise ValueError(f"splits.{split} must be a number of scenes from 1 to {MOST_SCENES}")
            if isinstance(value, str) and (Path(value).is_absolute() or ".." in Path(value).parts):
                raise ValueError(f"splits.{split}: {value!r} must stay below the data root")
        return self

    @property
    def edge_tolerance(self) -> float:
        return self.tasks["edge"].tolerance if "edge" in self.tasks else EDGE_TOLERANCE

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


def require_own_name(card: Card) -> None:
    """Raise BenchError for a card that cannot be told from a built-in one by its name."""
    if card.name in resources.names("datasets") and load(card.name) != card:
        raise BenchError(f"{card.name!r} is the name of a built-in card, and the given one is another: rename it")


def ids(card: Card, split: Literal["train", "val"], root: Path | None) -> list[str]:
    """All ids of a split, in file order. Raises BenchError for a missing, empty or repeated list."""
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
            names = path.read_text(encoding="utf-8-sig").split()
        except (OSError, UnicodeDecodeError) as error:
            raise BenchError(f"{card.name}: cannot read {path} as a list of ids: {error}") from error
        if not names:
            raise BenchError(f"{card.name}: {path} is empty")
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise BenchError(f"{card.name}: {path} names the image {twice!r} twice")
        outside = next((name for name in names if Path(name).is_absolute() or ".." in Path(name).parts), None)
        if outside is not None:
            raise BenchError(f"{card.name}: {path} names {outside!r}, which leads out of the data root")
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


def locate(root: Path, patterns: Sequence[str], name: str) -> Path:
    """The first of the patterns' files that is there; if none is, the first."""
    paths = [root / pattern.format(id=name) for pattern in patterns]
    return next((path for path in paths if path.is_file()), paths[0])


def files_of(card: Card, root: Path, name: str, tasks: Sequence[str]) -> list[Path]:
    """The image and every file that its labels for these tasks come from."""
    files = [root / card.image.format(id=name)]
    for task in tasks:
        files.append(locate(root, card.tasks[task].path, name))
        if keep := card.tasks[task].keep:
            files.append(root / keep.path.format(id=name))
    return files


def check_files(card: Card, root: Path | None, names: list[str], tasks: tuple[str, ...]) -> None:
    """Raises BenchError naming the first file in use that is not there."""
    if card.source != "files":
        return
    folder = require_root(card, root)
    files = [file for name in names for file in files_of(card, folder, name, tasks)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
        raise BenchError(f"{card.name}: missing {missing[0]}{more}")


def fingerprint(
    card: Card, train: list[str], val: list[str], tasks: tuple[str, ...], contents: Mapping[str, str] | None = None
) -> str:
    """Twelve hex digits of what the card says, the tasks, the ids in use, the contents of their files (id -> digest)
    and, for scenes, the renderer's version. Where the files lie and when they were written is no part of it."""
    said = card.model_dump(mode="json", exclude={"title", "licence", "homepage", "fetch"})
    for task in said["tasks"].values():
        # Where it says nothing of the figures, so that records from before cards had it keep their place.
        if task["tolerance"] == EDGE_TOLERANCE or "edge" not in tasks:
            del task["tolerance"]
    content = [
        said,
        train,
        val,
        tasks,
        [contents[name] for name in (*train, *val)] if contents else [],
        scenes.VERSION if card.source == "scenes" else None,
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
