"""Records as the tests of reports need them, and the tables that come of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from bench import tasks
from bench.recipe import Optimizer, Recipe, Schedule
from bench.record import Memory, MethodInfo, Parameters, Provenance, Record, Time, Weights
from bench.report import render
from bench.report.groups import Group, collect
from bench.report.groups import groups as groups_of
from bench.spec import RunSpec

FAMILIES = {"single_task_full": "fine-tuning", "lora": "single-task PEFT"}
ROWS = {"single_task_full": "Single-task full fine-tuning", "lora": "LoRA", "mtlora": "MTLoRA", "ours": "Ours"}
KEYS = {name: task.headline.key for name, task in tasks.TASKS.items()}
TINY = "swin_tiny_patch4_window7_224.ms_in1k"


def recipe(**changes: Any) -> Recipe:
    settings = {
        "title": "Quick",
        "optimizer": Optimizer(name="adamw", lr=4e-4),
        "schedule": Schedule(name="cosine"),
        "batch_size": 8,
        "epochs": 10,
        "loss_weights": {"semseg": 1.0},
    }
    return Recipe(**(settings | changes))


def make(out: Path, method: str = "ours", figures: dict[str, float] | None = None, **changes: Any) -> Path:
    """Write a record with these headline figures. `changes` are fields of the spec, or of the record by name."""
    figures = {"semseg": 50.0, "normals": 20.0} if figures is None else figures
    own = {name: changes.pop(name) for name in list(changes) if name in Record.model_fields}
    device_name = changes.pop("device_name", None)
    title = changes.pop("title", ROWS.get(method, method))
    fields = {
        "method": method, "backbone": TINY, "dataset": "scenes", "data_fingerprint": "ab12cd34ef",
        "tasks": tuple(figures), "protocol": "published", "decoder": None, "recipe_name": "quick", "recipe": recipe(),
        "image_size": (128, 128), "batch_size": 8, "epochs": 10, "steps": None, "precision": "fp32",
        "weights": "timm", "device": "cpu", "seed": 0,
    } | changes  # fmt: skip
    spec = RunSpec(**fields)
    kind = spec.device_kind
    name = method.partition("[")[0]
    provenance = Provenance(
        device=kind, device_name=device_name or {"cpu": "Some CPU", "cuda": "NVIDIA H200"}[kind], cores=4,
        memory_gib=16, platform="Linux", python="3.11", packages={"torch": "2.9.0"},
        weights=Weights(source=spec.weights if spec.weights in ("timm", "random") else "file"),
    )  # fmt: skip
    record = {
        "status": "ok",
        "method": MethodInfo(name=name, title=title, family=FAMILIES.get(name, "multi-task PEFT"),
                             published_row=ROWS.get(method)),
        "provenance": provenance,
        "parameters": Parameters(total=30_000_000, trainable=2_362_108, adaptation=2_194_076, backbone=0,
                                 decoder=168_032, shared=2_000_000, per_task=362_108),
        "memory": Memory(device=kind, peak_allocated=3 * 2**30, peak_reserved=4 * 2**30, process_peak=5 * 2**30),
        "time": Time(device=kind, warmup=3, samples=[float(n) for n in range(10, 0, -1)], batch_size=8),
        "metrics": {} if spec.steps == 0 else {task: {KEYS[task]: value} for task, value in figures.items()},
    } | own  # fmt: skip
    return Record(spec=spec, **record).write(out)


def groups(out: Path, any_device: bool = False) -> list[Group]:
    return groups_of(collect(out)[0], any_device)


def only(out: Path) -> Group:
    (group,) = groups(out)
    return group


def measured(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["Status"] != "published"].set_index("Method")


def printed(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["Status"] == "published"].set_index("Method")


def report(
    folder: Path, reference: str | None = None, width: int = 100, mix: bool = False, any_device: bool = False
) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    render.report(folder, None, reference, console, mix, any_device)
    return console.file.getvalue()
