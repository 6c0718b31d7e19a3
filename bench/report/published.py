"""The papers' printed tables as data, and which of their rows stand beside a measured one.

A CSV row holds what the paper prints, and nothing recomputed; `bench audit` recomputes what can be and prints the
disagreements. `*_table*.csv` are rows of tables, `vmt_formulas.csv` is Table 1 of the VMT-Adapter paper, and
`claims.csv` what the texts say of the tables.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pandas as pd

from bench import resources
from bench.errors import BenchError

TASKS = ("semseg", "human_parts", "saliency", "normals")  # percent, percent, percent, degrees
TEXT = ("source", "row", "family", "backbone", "pretraining", "dataset", "decoder", "normals_as")
NUMBERS = ("table", *TASKS, "delta_m", "tp_m", "encoder_m", "memory_gb", "seconds_per_batch")
MARK = "†"
BASELINE = "single-task full fine-tuning"  # canonical


def load() -> pd.DataFrame:
    """Every printed row of every table.

    Text columns hold "" and number columns NaN where the paper prints nothing. Units: `delta_m` percent, `tp_m`
    million trainable parameters, `encoder_m` those of them outside the decoder, `memory_gb` the paper's "GB" (it does
    not say whether 1e9 or 2^30 bytes). `normals_as`: the name that the paper gives the normals metric.
    """
    return _load(resources.folder("published")).copy()


def table(number: int, paper: str = "BDTA+MoTE") -> pd.DataFrame:
    """One table of a paper, in its own row order."""
    rows = load()
    return rows[(rows["table"] == number) & rows["source"].str.startswith(paper)].reset_index(drop=True)


@functools.cache
def _load(folder: Path) -> pd.DataFrame:
    paths = sorted(folder.glob("*_table*.csv"))
    if not paths:
        raise BenchError(f"no published tables in {folder}; restore results/published or install bench again")
    return pd.concat([_read(path) for path in paths], ignore_index=True)


def _read(path: Path) -> pd.DataFrame:
    try:
        # Everything as text first, so that an empty name stays "" and only the number columns know NaN.
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)
        return rows[list(TEXT)].join(rows[list(NUMBERS)].apply(pd.to_numeric))
    except (OSError, ValueError, KeyError) as error:
        raise BenchError(f"{path} is not a table of published rows: {error}") from error


def claims() -> pd.DataFrame:
    """What the papers' texts say: source, table, backbone, where, quote, expression, relation, printed; all as text."""
    return _text("claims.csv")


def formulas() -> pd.DataFrame:
    """Parameter formulas and efficiency classes (VMT-Adapter, Table 1), with a row of Table 2 that each can be held to:
    source, table, method, parameters, efficiency, row, rho, m; all as text."""
    return _text("vmt_formulas.csv")


def _text(name: str) -> pd.DataFrame:
    path = resources.folder("published") / name
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise BenchError(f"{path} cannot be read: {error}") from error


def canonical(row: str) -> str:
    """One spelling for the rows that both papers print: `Multiple LoRA` and `LoRA` are the same method."""
    name = row.lower().removeprefix("multiple ")
    return {"fine-tuning decoders": "decoder-only fine-tuning"}.get(name, name)


def short_backbone(name: str) -> str:
    """The papers' name of a timm model: swin_tiny, swin_small or swin_base; any other name as it is."""
    match = re.match(r"swin_(tiny|small|base)(?=[_.]|$)", name)
    return match[0] if match else name


def pretraining(name: str) -> str:
    """ImageNet-22k or ImageNet-1k by the tag of a timm name; 1k, the papers' default, where the tag says neither."""
    return "ImageNet-22k" if "in22k" in name.partition(".")[2] else "ImageNet-1k"


def same_dataset(name: str) -> bool:
    """Whether a dataset card's name means PASCAL-Context, which all these rows are on."""
    return re.sub(r"[^a-z0-9]", "", name.lower()) in ("pascal", "pascalcontext", "pascalmt")


def accuracy_rows(names: Collection[str], backbone: str) -> pd.DataFrame:
    """Rows with task metrics for these row names, on the same backbone and pre-training set.

    A row that several tables print is taken from the first of them, so ablations come from Tables 4 and 5 and the
    methods themselves from Table 1.
    """
    rows = load()
    chosen = rows[
        rows["row"].isin(names)
        & (rows["backbone"] == short_backbone(backbone))
        & (rows["pretraining"] == pretraining(backbone))
        & rows[list(TASKS)].notna().all(axis=1)
    ]
    return chosen.sort_values("table", kind="stable").drop_duplicates("row").reset_index(drop=True)


def efficiency_rows(names: Collection[str], backbone: str) -> pd.DataFrame:
    """Rows with memory and time (Table 2) for these row names, on the same backbone. These do not depend on what it was
    pre-trained on; Delta-m does, and is there for the same pre-training set alone."""
    rows = load()
    chosen = rows["row"].isin(names) & (rows["backbone"] == short_backbone(backbone)) & rows["memory_gb"].notna()
    found = rows[chosen].reset_index(drop=True)
    return found.assign(delta_m=found["delta_m"].where(found["pretraining"].isin(("", pretraining(backbone)))))


def parameters(row: str | None, backbone: str) -> float:
    """Printed #TP in millions of a row on this backbone, from the first table that has it; NaN where none has."""
    rows = load()
    chosen = rows.loc[(rows["row"] == row) & (rows["backbone"] == short_backbone(backbone)), ["table", "tp_m"]]
    return float(chosen.sort_values("table")["tp_m"].iloc[0]) if len(chosen) else float("nan")


def has_backbone(name: str) -> bool:
    """Whether any table has it."""
    return short_backbone(name) in set(load()["backbone"])


def source(row: Any, dataset: str) -> str:
    """Where a printed row comes from, in words; says so where `dataset`, the measured one, is another."""
    where = [row["source"], f"Table {row['table']}", row["dataset"], row["pretraining"] or "pre-training not stated"]
    other = "" if same_dataset(dataset) else f"; not comparable with {dataset}"
    return f"published: {', '.join(where)}{other}"
