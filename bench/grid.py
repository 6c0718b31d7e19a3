"""From what the user asked for, a suite included, to the list of cells."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from bench import recipe as recipes
from bench import yamlfile
from bench.data import card as cards
from bench.data import subset
from bench.data.card import Card
from bench.data.check import digits
from bench.data.verify import examine
from bench.errors import BenchError, did_you_mean
from bench.measure import gpu_state, provenance
from bench.spec import EvalSize, Job, MemoryUse, Precision, Protocol, RunSpec

Positive = Annotated[int, Field(gt=0)]
# Options of `bench run` that no suite has.
OF_ONE_RUN = (
    "cache", "data-root", "device", "dry-run", "estimate", "no-estimate", "fresh", "keep-weights", "no-keep-weights",
    "out", "probe-gradients", "retry", "shared-gpu", "workers",
)  # fmt: skip
DECODERS = ("segformer", "hrnet", "highres")


class Settings(BaseModel):
    """What a run is asked for. The same keys as the options of `bench run`, and as a suite's settings."""

    model_config = ConfigDict(extra="forbid")

    methods: str = ""
    backbone: str = "swin_tiny"
    dataset: str = "scenes"
    tasks: str | None = None
    protocol: str = "published"
    decoder: str | None = None
    recipe: str = "quick"
    image_size: str | int | None = None
    batch_size: Positive | None = None
    epochs: Positive | None = None
    steps: Annotated[int, Field(ge=0)] | None = None
    precision: str = "fp32"
    memory: str = "default"
    cudnn_benchmark: bool = False
    seeds: str | int = "0"
    weights: str = "auto"
    limit_train: Positive | None = None
    limit_val: Positive | None = None
    eval_size: str = "network"
    skip_bad: bool = False
    shuffle_labels: bool = False

    @field_validator("methods", "backbone", "tasks", "seeds", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        """A YAML list says the same as its values with commas between."""
        return ",".join(map(str, value)) if isinstance(value, list) else value

    @staticmethod
    def elsewhere(key: str) -> str:
        """Where an option of `bench run` belongs that is no setting; "" for what is no option."""
        option = key.replace("_", "-")
        return f"is of one machine or one run: give --{option} to `bench run`" if option in OF_ONE_RUN else ""


class Suite(BaseModel):
    """A named grid of cells: settings of `bench run`, some of which may be several values."""

    model_config = ConfigDict(extra="forbid")

    title: str
    source: str = ""  # paper and table that it reruns
    settings: Settings


def load_suite(name: str) -> Suite:
    return yamlfile.load(yamlfile.find("suites", name), Suite)


@dataclass(frozen=True)
class Data:
    """Which samples the cells of a run read, settled once for all of them."""

    fingerprint: str
    limit_train: int | None
    limit_val: int | None
    skipped: tuple[str, ...] = ()
    contents: dict[str, str] = field(default_factory=dict)  # split -> digits of its files


@dataclass(frozen=True)
class Device:
    slug: str  # "cpu", or the GPU's name
    name: str = ""
    index: int = 0
    uuid: str = ""


def jobs(
    suite: str | None,
    given: Mapping[str, Any],
    data_root: Path | None,
    device: str,
    workers: int | None,
    out: Path,
    tell: Callable[[str], None] = lambda line: None,
    cache: str = "none",
    shared_gpu: bool = True,
    keep_weights: bool = True,
    probes: int = 0,
    estimate: bool = True,
) -> list[Job]:
    """Every cell, in order: backbones, then methods, then seeds. Raises BenchError or MethodError in one line.

    Every image and label in use is read once: a bad one is named before anything is trained, and the contents decide
    which cells have been run already. Unless `shared_gpu`, a GPU on which another process computes is refused. Where
    `all` methods were asked for, or a named one can run on another of the backbones, those that refuse a backbone are
    left out and `tell` hears why.
    """
    settings = _settings(suite, given)
    one_of("cache", cache, ("none", "ram", "disk"))
    recipe = recipes.load(settings.recipe)
    seeds = _seeds(str(settings.seeds))
    if settings.shuffle_labels and _length(settings, recipe)[1] == 0:
        raise BenchError("--shuffle-labels says nothing where nothing is trained (--steps 0)")
    epochs, steps = _length(settings, recipe)
    card, tasks = _card(settings, recipe)
    if steps != 0:
        for split in ("train", "val"):
            cards.ids(card, split, data_root)  # raises where the folder or a list is missing
    size = parse_size(settings.image_size) or recipe.image_size or card.image_size

    # Only now the slow imports: whatever is wrong above is said at once.
    place = resolve_device(device, settings.precision)
    if place.uuid and not shared_gpu:
        gpu_state.refuse_company(place.uuid, place.name)
    from bench.fitting import fitting
    from methods.backbones import load as backbones
    from methods.model import Setting

    names = dict.fromkeys(backbones.full_name(short.strip()) for short in settings.backbone.split(","))
    weights = {backbone: backbones.resolve_weights(settings.weights, backbone) for backbone in names}
    for backbone, source in weights.items():
        if source.path:
            # The weights of another model are refused here, once, and not by each cell.
            backbones.load_backbone(backbone, size, source)
    setting = Setting(settings.protocol, settings.decoder)
    built = fitting(settings.methods, list(names), size, card.channels(tasks), setting, tell)
    # Last, because it takes longest: every file is opened.
    data = _data(settings, recipe, card, tasks, data_root, tell)
    cells = []
    for backbone, methods in built.items():
        source = weights[backbone]
        for method, seed in itertools.product(methods, seeds):
            spec = RunSpec(
                method=method.expression,
                backbone=backbone,
                dataset=card.name,
                data_fingerprint=data.fingerprint,
                tasks=tasks,
                protocol=settings.protocol,
                decoder=settings.decoder,
                recipe_name=Path(settings.recipe).stem,
                recipe=recipe,
                image_size=size,
                batch_size=settings.batch_size or recipe.batch_size,
                epochs=epochs,
                steps=steps,
                precision=settings.precision,
                memory=settings.memory,
                cudnn_benchmark=settings.cudnn_benchmark,
                weights=f"file:{source.sha256}" if source.source == "file" else source.source,
                limit_train=data.limit_train,
                limit_val=data.limit_val,
                eval_size=settings.eval_size,
                shuffled_labels=settings.shuffle_labels,
                skipped=data.skipped,
                device=place.slug,
                seed=seed,
            )
            cells.append(
                Job(
                    spec=spec,
                    out=out.resolve(),
                    card=_card_reference(settings.dataset),
                    data_root=data_root.resolve() if data_root else None,
                    data_contents=data.contents,
                    weights_path=source.path.resolve() if source.path else None,
                    device_index=place.index,
                    device_name=place.name,
                    workers=_default_workers(place) if workers is None else workers,
                    cache=cache,
                    keep_weights=keep_weights,
                    probes=probes,
                    estimate=estimate,
                )
            )
    return cells


def _settings(suite: str | None, given: Mapping[str, Any]) -> Settings:
    """The suite's settings under what was given, checked as far as they can be by themselves."""
    base = load_suite(suite).settings.model_dump(exclude_unset=True) if suite else {}
    if "steps" in given or "epochs" in given:
        base = {key: value for key, value in base.items() if key not in ("steps", "epochs")}
    settings = Settings(**(base | dict(given)))
    if not settings.methods:
        raise BenchError("no method given; e.g. --methods ours,mtlora, or --suite table1")
    one_of("protocol", settings.protocol, get_args(Protocol))
    one_of("eval-size", settings.eval_size, get_args(EvalSize))
    one_of("precision", settings.precision, get_args(Precision))
    one_of("memory", settings.memory, get_args(MemoryUse))
    if settings.decoder is not None:
        one_of("decoder", settings.decoder, DECODERS)
    return settings


def _card(settings: Settings, recipe: recipes.Recipe) -> tuple[Card, tuple[str, ...]]:
    """The dataset's card and the tasks that are trained."""
    card = cards.load(settings.dataset)
    cards.require_own_name(card)
    tasks = cards.choose_tasks(card, settings.tasks)
    unweighted = [task for task in tasks if task not in recipe.loss_weights]
    if unweighted:
        usual = recipes.load("quick").loss_weights
        advice = ", ".join(f"{task}: {usual[task]:g}" for task in unweighted if task in usual)
        raise BenchError(
            f"recipe {settings.recipe} has no loss weight for {', '.join(unweighted)}"
            + (f"; the recipe quick has {advice}" if advice else "")
        )
    if recipe.augment.border == "background" and (recipe.augment.rotate or recipe.augment.scale[0] < 1):
        firsts = [classes[0] for task in tasks if (classes := card.tasks[task].classes)]
        first = next((name for name in firsts if name.casefold().strip("_") not in ("background", "bg")), None)
        if first is not None:
            raise BenchError(
                f"recipe {settings.recipe} takes what lies outside an image for background (border), and class 0 of "
                f"{card.name} is {first!r}; use border: ignore"
            )
    return card, tasks


def _data(
    settings: Settings,
    recipe: recipes.Recipe,
    card: Card,
    tasks: tuple[str, ...],
    root: Path | None,
    tell: Callable[[str], None],
) -> Data:
    if _length(settings, recipe)[1] == 0:
        # Efficiency figures come from synthetic batches: of the data, only the number of outputs matters.
        channels = json.dumps(card.channels(tasks))
        return Data(hashlib.sha256(channels.encode()).hexdigest()[:12], None, None)
    limits = {"train": settings.limit_train or recipe.limit_train, "val": settings.limit_val or recipe.limit_val}

    def choose(without: Sequence[str] = ()) -> dict[str, list[str]]:
        return {split: subset.ids(card, split, root, limit, tasks, without, tell) for split, limit in limits.items()}

    names = choose()
    both = set(names["train"]) & set(names["val"])
    if both:
        tell(f"warning: {len(both)} of {len(names['val'])} validation images are trained on too, e.g. {min(both)}")
    skipped: tuple[str, ...] = ()
    contents: dict[str, str] = {}
    if card.source == "files":
        names, skipped, contents = _usable(card, cards.require_root(card, root), names, tasks, settings, choose, tell)
    batch = settings.batch_size or recipe.batch_size
    if batch > len(names["train"]):
        tell(f"warning: batches are of all {len(names['train'])} training images, not of {batch}")
    limits = {split: subset.binding(card, split, root, limit) for split, limit in limits.items()}
    return Data(
        cards.fingerprint(card, names["train"], names["val"], tasks, contents),
        limits["train"],
        limits["val"],
        skipped,
        {split: digits(contents[name] for name in chosen) for split, chosen in names.items()} if contents else {},
    )


def _usable(
    card: Card,
    root: Path,
    names: dict[str, list[str]],
    tasks: tuple[str, ...],
    settings: Settings,
    choose: Callable[[Sequence[str]], dict[str, list[str]]],
    tell: Callable[[str], None],
) -> tuple[dict[str, list[str]], tuple[str, ...], dict[str, str]]:
    """The ids by split, all of them readable, those that were left out for it, and the digest of each one's files.

    Without --skip-bad a bad image is an error; with it, a limited split gets another image in its place.
    """
    skipped: list[str] = []
    while True:
        everything = list(dict.fromkeys(names["train"] + names["val"]))
        seen = examine(card, root, everything, tasks, provenance.usable_cores(), tell)
        bad = seen.bad
        if not bad:
            return names, tuple(skipped), seen.contents
        if not settings.skip_bad:
            more = f" (and {len(bad) - 1} more: `bench data check` lists them)" if len(bad) > 1 else ""
            raise BenchError(f"{card.name}: {next(iter(bad.values()))}{more}; --skip-bad goes on without such images")
        for name, problem in bad.items():
            tell(f"skipped {name}: {problem}")
        skipped += bad
        names = choose(skipped)
        for split, remaining in names.items():
            if not remaining:
                raise BenchError(f"{card.name}: every {split} image is unreadable: `bench data check` lists why")


def _card_reference(dataset: str) -> str:
    return str(Path(dataset).expanduser().resolve()) if dataset.endswith((".yaml", ".yml")) else dataset


def _default_workers(place: Device) -> int:
    return 0 if place.slug == provenance.CPU else min(8, max(1, provenance.usable_cores() - 1))


def resolve_device(device: str, precision: str) -> Device:
    """`auto|cpu|cuda|cuda:N` -> where the cells will run. Raises BenchError for what this machine does not have.

    CUDA is asked in a short-lived process, so that this one never holds memory on the GPU that it measures.
    """
    match = re.fullmatch(r"(auto|cpu|cuda)(?::(\d+))?", device)
    if not match or (match[2] and match[1] != "cuda"):
        raise BenchError(f"unknown device {device!r}; expected auto, cpu, cuda or cuda:N")
    index = int(match[2] or 0)
    gpus = [] if match[1] == "cpu" else _cuda_devices()
    if match[1] == "cuda" and index >= len(gpus):
        found = f"{len(gpus)} CUDA device{'s' if len(gpus) != 1 else ''}" if gpus else "no CUDA device"
        raise BenchError(f"--device {device}: torch finds {found} on this machine; use --device cpu")
    if not gpus:
        if precision in ("fp16", "tf32"):
            raise BenchError(f"--precision {precision} needs a CUDA GPU; on a CPU use fp32 or bf16")
        return Device(provenance.CPU)
    name, major = gpus[index]["name"], gpus[index]["major"]
    if precision in ("bf16", "tf32") and major < 8:
        raise BenchError(f"--precision {precision}: {name} has no {precision}; use fp32 or fp16")
    return Device(provenance.slug(name), name, index, gpus[index].get("uuid", ""))


def _cuda_devices() -> list[dict[str, Any]]:
    """Name, compute capability and UUID of every GPU that torch can use."""
    code = (
        "import json, torch; n = torch.cuda.device_count() if torch.cuda.is_available() else 0; "
        "all = [torch.cuda.get_device_properties(i) for i in range(n)]; "
        "print(json.dumps([{'name': p.name, 'major': p.major, 'uuid': str(p.uuid)} for p in all]))"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise BenchError(f"torch cannot be asked for GPUs: {last}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchError(f"torch cannot be asked for GPUs: {error}") from error


def one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises BenchError for a value that is not among the choices."""
    if value not in choices:
        raise BenchError(f"unknown {option} {value!r}{did_you_mean(value, choices)}; one of: {', '.join(choices)}")


def _seeds(text: str) -> list[int]:
    try:
        seeds = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise BenchError(f"--seeds {text!r} is not a comma-separated list of whole numbers") from error
    if any(not 0 <= seed < 2**32 for seed in seeds):
        raise BenchError(f"--seeds {text!r}: a seed must be at least 0 and below 2^32")
    return seeds


def parse_size(value: str | int | None) -> tuple[int, int] | None:
    """`448` or `HEIGHTxWIDTH` -> (height, width). Raises BenchError."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", str(value).lower())
    if not match:
        raise BenchError(f"--image-size {value!r} is neither a number nor HEIGHTxWIDTH")
    return int(match[1]), int(match[2] or match[1])


def _length(settings: Settings, recipe: recipes.Recipe) -> tuple[int | None, int | None]:
    """(epochs, steps), one of them None."""
    if settings.epochs is not None and settings.steps is not None:
        raise BenchError("give --epochs or --steps, not both")
    if settings.epochs is None and settings.steps is None:
        return recipe.epochs, recipe.steps
    return settings.epochs, settings.steps
