"""From what the user asked for, a suite included, to the list of cells."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from bench import options
from bench import recipe as recipes
from bench.data import card as cards
from bench.data import subset
from bench.data.card import Card
from bench.data.check import digits
from bench.data.verify import examine
from bench.device import Device, resolve_device
from bench.errors import BenchError
from bench.measure import gpu_state, provenance
from bench.options import one_of
from bench.spec import EvalSize, Job, Precision, RunSpec
from bench.suite import Settings, load_suite
from methods.choices import DecoderName, MemoryUse, Protocol


@dataclass(frozen=True)
class Data:
    """Which samples the cells of a run read, settled once for all of them."""

    fingerprint: str
    limit_train: int | None
    limit_val: int | None
    skipped: tuple[str, ...] = ()
    contents: dict[str, str] = field(default_factory=dict)  # split -> digits of its files


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
    seeds = options.seeds(str(settings.seeds))
    epochs, steps = _length(settings, recipe)
    if settings.shuffle_labels and steps == 0:
        raise BenchError("--shuffle-labels says nothing where nothing is trained (--steps 0)")
    card, tasks = _card(settings, recipe)
    if steps != 0:
        for split in ("train", "val"):
            cards.ids(card, split, data_root)  # raises where the folder or a list is missing
    size = options.image_size(settings.image_size) if settings.image_size is not None else None
    size = size or recipe.image_size or card.image_size

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
    of_all = functools.partial(
        RunSpec,
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
        limit_train=data.limit_train,
        limit_val=data.limit_val,
        eval_size=settings.eval_size,
        shuffled_labels=settings.shuffle_labels,
        skipped=data.skipped,
        device=place.slug,
    )
    here = functools.partial(
        Job,
        out=out.resolve(),
        card=_card_reference(settings.dataset),
        data_root=data_root.resolve() if data_root else None,
        data_contents=data.contents,
        device_index=place.index,
        device_name=place.name,
        workers=_default_workers(place) if workers is None else workers,
        cache=cache,
        keep_weights=keep_weights,
        probes=probes,
        estimate=estimate,
    )
    cells = []
    for backbone, methods in built.items():
        source = weights[backbone]
        named = f"file:{source.sha256}" if source.source == "file" else source.source
        path = source.path.resolve() if source.path else None
        for method, seed in itertools.product(methods, seeds):
            spec = of_all(method=method.expression, backbone=backbone, weights=named, seed=seed)
            cells.append(here(spec=spec, weights_path=path))
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
        one_of("decoder", settings.decoder, get_args(DecoderName))
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


def _length(settings: Settings, recipe: recipes.Recipe) -> tuple[int | None, int | None]:
    """(epochs, steps), one of them None."""
    if settings.epochs is not None and settings.steps is not None:
        raise BenchError("give --epochs or --steps, not both")
    if settings.epochs is None and settings.steps is None:
        return recipe.epochs, recipe.steps
    return settings.epochs, settings.steps
