"""From what the user asked for, a suite included, to the list of cells."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field

from bench import recipe as recipes
from bench import yamlfile
from bench.data import card as cards
from bench.errors import BenchError, did_you_mean
from bench.measure import provenance
from bench.spec import Job, Precision, Protocol, RunSpec

Positive = Annotated[int, Field(gt=0)]
DECODERS = ("segformer", "hrnet")


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
    seeds: str | int = "0"
    weights: str = "auto"
    limit_train: Positive | None = None
    limit_val: Positive | None = None


class Suite(BaseModel):
    """A named grid of cells: settings of `bench run`, some of which may be several values."""

    model_config = ConfigDict(extra="forbid")

    title: str
    source: str = ""  # paper and table that it reruns
    settings: Settings


def load_suite(name: str) -> Suite:
    return yamlfile.load(yamlfile.find("suites", name), Suite)


def jobs(
    suite: str | None,
    given: Mapping[str, Any],
    data_root: Path | None,
    device: str,
    workers: int | None,
    out: Path,
) -> list[Job]:
    """Every cell, in order: backbones, then methods, then seeds. Raises BenchError or MethodError in one line."""
    base = load_suite(suite).settings.model_dump(exclude_unset=True) if suite else {}
    if "steps" in given or "epochs" in given:
        base = {key: value for key, value in base.items() if key not in ("steps", "epochs")}
    settings = Settings(**(base | dict(given)))
    if not settings.methods:
        raise BenchError("no method given; e.g. --methods ours,mtlora, or --suite table1")
    _one_of("protocol", settings.protocol, get_args(Protocol))
    _one_of("precision", settings.precision, get_args(Precision))
    if settings.decoder is not None:
        _one_of("decoder", settings.decoder, DECODERS)
    seeds = _seeds(str(settings.seeds))
    card = cards.load(settings.dataset)
    tasks = cards.choose_tasks(card, settings.tasks)
    recipe = recipes.load(settings.recipe)
    unweighted = [task for task in tasks if task not in recipe.loss_weights]
    if unweighted:
        raise BenchError(f"recipe {settings.recipe} has no loss weight for {', '.join(unweighted)}")
    size = _size(settings.image_size) or recipe.image_size or card.image_size
    epochs, steps = _length(settings, recipe)
    limit_train = settings.limit_train or recipe.limit_train
    limit_val = settings.limit_val or recipe.limit_val
    if steps == 0:
        fingerprint = ""  # efficiency figures come from synthetic batches
    else:
        names = [cards.ids(card, s, data_root, n) for s, n in (("train", limit_train), ("val", limit_val))]
        for chosen in names:
            cards.check_files(card, data_root, chosen, tasks)
        fingerprint = cards.fingerprint(card, *names, tasks)

    # Only now the slow imports: whatever is wrong above is said at once.
    device_name, index = resolve_device(device, settings.precision)
    from methods.backbones import load as backbones
    from methods.registry import parse

    configured = parse(settings.methods)
    cells = []
    for name in dict.fromkeys(backbones.full_name(short.strip()) for short in settings.backbone.split(",")):
        source = backbones.resolve_weights(settings.weights, name)
        if source.path:
            backbones.load_backbone(
                name, size, source
            )  # the weights of another model are refused here, not by each cell
        check_buildable(configured, name, size, card.channels(tasks), settings.protocol, settings.decoder)
        for method, seed in itertools.product(configured, seeds):
            spec = RunSpec(
                method=method.expression,
                backbone=name,
                dataset=card.name,
                data_fingerprint=fingerprint,
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
                weights=f"file:{source.sha256}" if source.source == "file" else source.source,
                limit_train=limit_train,
                limit_val=limit_val,
                device=device_name,
                seed=seed,
            )
            default_workers = 0 if device_name == "cpu" else min(8, max(1, (os.cpu_count() or 1) - 1))
            cells.append(
                Job(
                    spec=spec,
                    out=out.resolve(),
                    card=str(Path(settings.dataset).resolve())
                    if settings.dataset.endswith((".yaml", ".yml"))
                    else settings.dataset,
                    data_root=data_root.resolve() if data_root else None,
                    weights_path=source.path.resolve() if source.path else None,
                    device_index=index,
                    workers=default_workers if workers is None else workers,
                )
            )
    return cells


def check_buildable(
    configured: list,
    backbone: str,
    size: tuple[int, int],
    channels: Mapping[str, int],
    protocol: str,
    decoder: str | None,
) -> None:
    """Raise MethodError where a method refuses the backbone, before anything is trained.

    Everything is built on the meta device: shapes without memory.
    """
    import torch

    from methods.backbones.load import WeightSource, load_backbone
    from methods.model import Setting

    with torch.device("meta"):
        for method in configured:
            method.build(load_backbone(backbone, size, WeightSource("random")), channels, Setting(protocol, decoder))


def resolve_device(device: str, precision: str) -> tuple[str, int]:
    """`auto|cpu|cuda|cuda:N` -> ("cpu" or the GPU's slug, index).

    CUDA is asked in a short-lived process, so that this one never holds memory on the GPU that it measures.
    """
    match = re.fullmatch(r"(auto|cpu|cuda)(?::(\d+))?", device)
    if not match or (match[2] and match[1] != "cuda"):
        raise BenchError(f"unknown device {device!r}; expected auto, cpu, cuda or cuda:N")
    index = int(match[2] or 0)
    count = 0 if match[1] == "cpu" else _cuda_devices()
    if match[1] == "cuda" and index >= count:
        found = f"{count} CUDA device{'s' if count != 1 else ''}" if count else "no CUDA device"
        raise BenchError(f"--device {device}: torch finds {found} on this machine; use --device cpu")
    if count == 0:
        if precision in ("fp16", "tf32"):
            raise BenchError(f"--precision {precision} needs a CUDA GPU; on a CPU use fp32 or bf16")
        return "cpu", 0
    return provenance.slug(provenance.gpu(index)[0]), index


def _cuda_devices() -> int:
    code = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise BenchError(f"torch cannot be imported: {error}") from error
    return int(done.stdout.split()[-1])


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
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


def _size(value: str | int | None) -> tuple[int, int] | None:
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
