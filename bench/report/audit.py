"""`bench audit`: the papers' printed figures against what can be recomputed from them, and against our own counts.

Nothing here knows which figures are wrong: every check goes over all rows, and a finding is a disagreement larger than
rounding can explain. No torch, but for the counts.
"""

from __future__ import annotations

import ast
import itertools
import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.text import Text

from bench.errors import BenchError
from bench.report import published
from bench.tasks import TASKS, delta_m

Verdict = Literal["agrees", "rounding", "disagrees", "not checked"]
ABOUT = 0.1  # "~" in a text allows so much, relatively
DECODERS = ("Fine-tuning Decoders", "Decoder-only fine-tuning")
# Channels of the twelve blocks of Swin-T, whose widths the formulas of the VMT-Adapter paper sum over.
SWIN_TINY_BLOCKS = (96,) * 2 + (192,) * 2 + (384,) * 6 + (768,) * 2
DIRECTIONS = {task: TASKS[task].headline.higher_is_better for task in published.TASKS} | {
    "delta_m": True, "tp_m": False, "encoder_m": False, "memory_gb": False, "seconds_per_batch": False
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One figure or statement of a paper and what it comes to when recomputed."""

    check: str
    source: str
    where: str  # table and row, or section
    what: str
    printed: str
    recomputed: str
    verdict: Verdict


def findings(count: Callable[[str, str], float] | None = None) -> list[Finding]:
    """Every check on every row. `count(expression, backbone)` gives our own trainable parameters in millions, NaN where
    the method cannot be built; None leaves out what needs it."""
    rows = published.load()
    found = [*_delta(rows), *_decoders(rows), *_same_row(rows), *_twins(rows), *_headings(rows), *_references(rows)]
    return [*found, *_formulas(rows), *_claims(rows, count)]


def own_counts(pairs: Iterable[tuple[str, str]], count: Callable[[str, str], float]) -> list[Finding]:
    """Our own count of each (expression, published row) against #TP wherever that row is printed."""
    found = []
    for expression, row in pairs:
        for printed in _rows_of(published.load(), row):
            ours = count(expression, printed["backbone"])
            if not math.isnan(printed["tp_m"]) and not math.isnan(ours):
                what = f"#TP of {expression}"
                found.append(_finding("own count", printed, what, printed["tp_m"], ours, 0.005, places=2))
    return list(dict.fromkeys(found))


def _rows_of(rows: pd.DataFrame, row: str) -> list[dict[str, Any]]:
    return [r for r in rows.to_dict("records") if published.canonical(r["row"]) == published.canonical(row)]


def _finding(
    check: str, row: Mapping[str, Any], what: str, printed: float, value: float, rounding: float, places: int
) -> Finding:
    """`rounding`: the largest difference that rounding of the printed figures can make."""
    written = f"{printed:.{places}f}", f"{value:.{places}f}"
    close = abs(value - printed) <= rounding + 1e-9
    verdict: Verdict = "agrees" if written[0] == written[1] else "rounding" if close else "disagrees"
    return Finding(check, row["source"], _place(row), what, *written, verdict)


def _place(row: Mapping[str, Any]) -> str:
    pretraining = " 22k" if row["pretraining"].endswith("22k") else ""
    return f"Table {row['table']:.0f}, {row['row']} ({row['backbone']}{pretraining})"


def _baseline(rows: pd.DataFrame, source: str) -> dict[str, Any] | None:
    own = rows[rows["source"] == source]
    return next((r for r in own.to_dict("records") if published.canonical(r["row"]) == published.BASELINE), None)


def _delta(rows: pd.DataFrame) -> Iterator[Finding]:
    """Delta-m (equation 13) from a row's own metrics, against the single-task row of the same paper."""
    for row in rows[rows[list(published.TASKS)].notna().all(axis=1)].to_dict("records"):
        base = _baseline(rows, row["source"])
        if base is None:
            continue
        value = delta_m({t: row[t] for t in published.TASKS}, {t: base[t] for t in published.TASKS})
        # Metrics are printed to 0.01, so each is off by 0.005 at most, and so is Delta-m itself.
        slack = sum(0.005 / base[t] + 0.005 * row[t] / base[t] ** 2 for t in published.TASKS)
        rounding = 0.005 + 100 * slack / len(published.TASKS)
        yield _finding("delta-m", row, "delta-m (%)", row["delta_m"], value, rounding, 2)


def _decoders(rows: pd.DataFrame) -> Iterator[Finding]:
    """Encoder + decoder = total, with the decoder of the decoder-only row of the same table."""
    for (_, _), table in rows[rows["encoder_m"].notna()].groupby(["source", "table"], sort=False):
        decoder = next((r["tp_m"] for r in table.to_dict("records") if r["row"] in DECODERS), None)
        for row in table.to_dict("records") if decoder is not None else []:
            # Single-task rows count the four decoders, as every row does.
            total = row["encoder_m"] + decoder
            yield _finding("sum", row, "#TP", row["tp_m"], total, 0.01, 2)


COMPARED = (*published.TASKS, "delta_m", "tp_m", "memory_gb", "seconds_per_batch")


def _same_row(rows: pd.DataFrame) -> Iterator[Finding]:
    """One method on one backbone has the same figures wherever it is printed."""
    # A table without its pre-training is about the default one, where the figures can be told apart at all.
    named = rows.assign(name=[published.canonical(r) for r in rows["row"]])
    for _, same in named.groupby(["name", "backbone", "pretraining"], sort=False):
        first, *others = same.to_dict("records")
        for other in others:
            for column in COMPARED:
                if pd.notna(first[column]) and pd.notna(other[column]):
                    what = f"{column}, as in {first['source'].partition(',')[0]} {_place(first)}"
                    yield _finding("same row", other, what, other[column], first[column], 0, 2)


def _twins(rows: pd.DataFrame) -> Iterator[Finding]:
    """The same four metrics under two names can hardly both be measured."""
    measured = rows[rows[list(published.TASKS)].notna().all(axis=1)]
    for _, same in measured.groupby([*published.TASKS, "backbone", "pretraining"], sort=False):
        by_name = {published.canonical(r["row"]): r for r in same.to_dict("records")}
        for one, other in itertools.combinations(by_name.values(), 2):
            figures = " / ".join(f"{one[t]:.2f}" for t in published.TASKS)
            yield Finding(
                "twins", other["source"], _place(other),
                f"metrics {figures} are also those of {one['row']} ({one['source'].partition(',')[0]} {_place(one)})",
                f"delta-m {other['delta_m']:+.2f}, #TP {other['tp_m']:.2f}",
                f"delta-m {one['delta_m']:+.2f}, #TP {one['tp_m']:.2f}", "disagrees",
            )  # fmt: skip


def _headings(rows: pd.DataFrame) -> Iterator[Finding]:
    """The same normals figure under two metrics' names, and rows of one table that do not share a decoder."""
    measured = rows[rows["normals"].notna() & (rows["normals_as"] != "")]
    measured = measured.assign(name=[published.canonical(r) for r in measured["row"]])
    keys = ["name", "backbone", "pretraining", "normals"]
    pairs = measured.merge(measured, on=keys, suffixes=("", "_other"))
    pairs = pairs[pairs["normals_as"] > pairs["normals_as_other"]]
    tables_of = ["source", "table", "normals_as", "source_other", "table_other", "normals_as_other"]
    for (source, table, heading, other, other_table, other_heading), same in pairs.groupby(tables_of, sort=False):
        yield Finding(
            "heading", other, f"Table {other_table:.0f}",
            f"normals of {same['name'].nunique()} rows are those of {source.partition(',')[0]} Table {table:.0f} under "
            "another metric's name", other_heading, heading, "disagrees",
        )  # fmt: skip
    for (source, table), own in rows.groupby(["source", "table"], sort=False):
        decoders = own["decoder"][own["decoder"] != ""].drop_duplicates().tolist()
        verdict: Verdict = "agrees" if len(decoders) <= 1 else "disagrees"
        yield Finding(
            "decoder", source, f"Table {table:.0f}", "one decoder for all of #TP (as the counts fit)", "one column",
            " and ".join(decoders), verdict,
        )  # fmt: skip


def _references(rows: pd.DataFrame) -> Iterator[Finding]:
    """Delta-m needs the single-task row of the same backbone."""
    for (source, backbone), own in rows[rows["delta_m"].notna()].groupby(["source", "backbone"], sort=False):
        known = {published.canonical(r) for r in rows[rows["backbone"] == backbone]["row"]}
        if published.BASELINE not in known:
            yield Finding(
                "reference", source, f"{len(own)} rows on {backbone}", "delta-m without a printed single-task row",
                ", ".join(f"{v:+.2f}" for v in own["delta_m"]), "no reference is printed", "not checked",
            )  # fmt: skip


def _formulas(rows: pd.DataFrame) -> Iterator[Finding]:
    """The formulas for the encoder's parameters, summed over the blocks of Swin-T, for four tasks."""
    for formula in published.formulas().to_dict("records"):
        printed = next(
            r for r in rows.to_dict("records") if r["source"] == formula["source"] and r["row"] == formula["row"]
        )
        values = {"T": 4, "L": 1, "rho": float(formula["rho"]), "m": float(formula["m"] or "nan")}
        total = sum(_evaluate(formula["parameters"], values | {"d": d}) for d in SWIN_TINY_BLOCKS)
        setting = ", ".join(f"{k} = {formula[k]}" for k in ("rho", "m") if formula[k])
        fitted = "" if formula["m"] or formula["row"] == "VMT-Adapter" else ", fitted: the paper prints none"
        what = f"encoder by Table {formula['table']}'s {formula['parameters']}, block by block, {setting}{fitted}"
        yield _finding("formula", printed, what, printed["encoder_m"], total / 1e6, 0.005, 2)


def _claims(rows: pd.DataFrame, count: Callable[[str, str], float] | None) -> Iterator[Finding]:
    """What the texts say of the tables."""
    for claim in published.claims().to_dict("records"):
        about = (claim["source"], claim["where"], f'"{claim["quote"]}"')
        if not claim["expression"] or ("count[" in claim["expression"] and count is None):
            why = "needs our own counts" if claim["expression"] else "no figures are printed that it follows from"
            yield Finding("text", *about, claim["printed"], why, "not checked")
            continue
        value = _of_claim(claim, rows, count)
        if claim["relation"] == "true":
            yield Finding("text", *about, "true", _chain(claim, rows), "agrees" if value else "disagrees")
            continue
        printed = float(claim["printed"])
        places = len(claim["printed"].partition(".")[2])
        holds = {
            "=": f"{value:.{places}f}" == claim["printed"].lstrip("+"),
            "~": abs(value - printed) <= ABOUT * abs(printed),
            ">=": value >= printed,
        }[claim["relation"]]
        shown = f"{value:.{max(places, 2)}f}" if value % 1 else f"{value:.0f}"
        mark = {"=": "", "~": "about ", ">=": "over "}[claim["relation"]]
        yield Finding("text", *about, mark + claim["printed"], shown, "agrees" if holds else "disagrees")


FIGURE = re.compile(r"(\w+)\[([^\]]+)\]")


def _of_claim(claim: Mapping[str, str], rows: pd.DataFrame, count: Callable[[str, str], float] | None) -> float:
    def look_up(column: str, name: str) -> float:
        if column == "count":
            return count(name, claim["backbone"])
        return _figure(claim, rows, column, name)

    values: dict[str, float] = {}

    def named(match: re.Match) -> str:
        key = f"x{len(values)}"
        values[key] = look_up(match[1], match[2])
        ranks[key] = _ranker(claim, rows, match[1])
        return key

    ranks: dict[str, Callable[[float], int]] = {}
    return _evaluate(FIGURE.sub(named, claim["expression"]), values, ranks)


def _own_table(claim: Mapping[str, str], rows: pd.DataFrame) -> pd.DataFrame:
    return rows[
        (rows["source"] == claim["source"])
        & (rows["table"] == float(claim["table"] or "nan"))
        & (rows["backbone"] == claim["backbone"])
    ]


def _figure(claim: Mapping[str, str], rows: pd.DataFrame, column: str, name: str) -> float:
    own = _own_table(claim, rows)
    chosen = own.loc[own["row"] == name, column]
    if chosen.empty:
        raise BenchError(f"claims.csv: no {column} of {name!r} in {claim['source']}, Table {claim['table']}")
    return float(chosen.iloc[0])


def _ranker(claim: Mapping[str, str], rows: pd.DataFrame, column: str) -> Callable[[float], int]:
    """Which place a value takes in its column, 1 the best."""
    if column == "count":
        return lambda value: 0
    values = _own_table(claim, rows)[column].dropna()
    better = (lambda v: values > v) if DIRECTIONS[column] else (lambda v: values < v)
    return lambda value: int(better(value).sum()) + 1


def _chain(claim: Mapping[str, str], rows: pd.DataFrame) -> str:
    """A comparison with its figures put in."""
    return FIGURE.sub(lambda m: f"{_figure(claim, rows, m[1], m[2]):g}", claim["expression"])


OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Pow: operator.pow, ast.Gt: operator.gt, ast.Lt: operator.lt, ast.LtE: operator.le, ast.GtE: operator.ge,
}  # fmt: skip


def _evaluate(
    text: str, values: Mapping[str, float], ranks: Mapping[str, Callable[[float], int]] | None = None
) -> float:
    """Arithmetic and comparisons on named values, ^ for powers; max, min, and rank of a figure."""

    def of(node: ast.AST) -> float:
        match node:
            case ast.Constant(value=int() | float()):
                return node.value
            case ast.Name():
                return values[node.id]
            case ast.UnaryOp(op=ast.USub()):
                return -of(node.operand)
            case ast.BinOp():
                return OPERATORS[type(node.op)](of(node.left), of(node.right))
            case ast.Compare():
                sides = [of(each) for each in (node.left, *node.comparators)]
                return all(OPERATORS[type(op)](a, b) for op, a, b in zip(node.ops, sides, sides[1:], strict=False))
            case ast.Call(func=ast.Name(id="rank"), args=[ast.Name(id=name)]):
                return ranks[name](values[name])
            case ast.Call(func=ast.Name(id="max" | "min" as name)):
                return {"max": max, "min": min}[name](of(each) for each in node.args)
        raise BenchError(f"no arithmetic: {text!r}")

    try:
        return of(ast.parse(text.replace("^", "**"), mode="eval").body)
    except (SyntaxError, KeyError) as error:
        raise BenchError(f"no arithmetic: {text!r} ({error})") from error


HEADINGS = {
    "delta-m": "Delta-m by equation 13 from a row's own four metrics",
    "sum": "Encoder + decoder = #TP, in millions",
    "same row": "The same method in another table",
    "twins": "The same metrics under two names",
    "heading": "One figure under two metrics' names",
    "decoder": "One decoder for all rows of a table",
    "reference": "Delta-m without a printed reference",
    "formula": "The paper's own parameter formulas, in millions",
    "text": "What the text says of the tables",
    "own count": "#TP against the parameters counted here, in millions (what a paper leaves open is our reading of it)",
}


def show(found: list[Finding], everything: bool, console: Console) -> None:
    """Disagreements, a paper at a time; with `everything` the rest as well."""
    shown = [f for f in found if everything or f.verdict == "disagrees"]
    for source in dict.fromkeys(f.source for f in shown):
        console.print(f"\n[bold]{escape(source)}[/bold]")
        for check, heading in HEADINGS.items():
            own = [f for f in shown if (f.source, f.check) == (source, check)]
            if own:
                console.print(f"  {escape(heading)}", style="italic")
            for f in own:
                verdict = f" [{f.verdict}]" if everything else ""
                values = f"printed {f.printed}, recomputed {f.recomputed}"
                if f.printed == "true":  # a statement, with the printed figures put in
                    values = f"in figures {f.recomputed}{', which is false' if f.verdict == 'disagrees' else ''}"
                line = f"{f.where}: {f.what}: {values}{verdict}"
                console.print(Padding(Text(line), (0, 0, 0, 4)))
    tally = {v: sum(f.verdict == v for f in found) for v in ("agrees", "rounding", "disagrees", "not checked")}
    console.print(
        f"\n{len(found)} checks: {tally['disagrees']} disagree, {tally['agrees']} agree to the last digit, "
        f"{tally['rounding']} within rounding, {tally['not checked']} cannot be checked"
        + ("" if everything else "; --all prints every one"),
        soft_wrap=True,
    )


def as_json(found: list[Finding]) -> str:
    return json.dumps([asdict(f) for f in found], indent=1)
