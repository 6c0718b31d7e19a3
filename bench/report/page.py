"""`bench report --html`: everything in one file that opens from disk: a table to sort and filter, a plot, cards.

The table is DataTables (by itables), the plot Plotly; both lie inside the file, which asks nothing of a network.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from bench.errors import BenchError
from bench.files import write_atomically
from bench.record import Record
from bench.report import published, tables
from bench.report.front import front
from bench.report.groups import Group, weights_of
from bench.report.palette import COLOURS, places
from bench.tasks import TASKS

SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star")
GREY = "#8a8a8a"  # readable on white and on black
INTEGERS = ("group", "seeds", "passes", "batch")
MEMORY = {False: "memory GiB, GPU", True: "process GiB, CPU"}  # by whether it was a CPU; never in one column
SECONDS = {False: "s/batch, GPU", True: "s/batch, CPU"}
PRINTED = (f"memory GB {published.MARK}", f"s/batch {published.MARK}")  # another GPU, another GB
COSTS = ("#TP M", *MEMORY.values(), *SECONDS.values(), "GMAC")
FIGURES = ("Δm %", *COSTS, *PRINTED, "passes", "seeds", "source")
DIGITS = {"Depth RMSE m ↓": 3, **dict.fromkeys((*SECONDS.values(), PRINTED[1]), 3), "GMAC": 1}


def write(
    groups: Sequence[Group], problems: Sequence[str], reference: str | None, gallery: Sequence[Path], out: Path
) -> None:
    """Write the page. Raises BenchError where a picture of the gallery is none, or the file cannot be written."""
    pictures = [(path.stem, _embedded(path)) for path in gallery]
    rows = [row for number, group in enumerate(groups, 1) for row in _rows(number, group, reference)]
    write_atomically(out, _page(groups, rows, problems, pictures, reference))


def _rows(number: int, group: Group, reference: str | None) -> list[dict[str, Any]]:
    """What the table shows of a group: a row a method, and the papers' rows of the same methods."""
    against = tables.baseline(group, reference)
    spec, cpu = group.spec, group.spec.device_kind == "cpu"
    common = {
        "dataset": spec.dataset, "backbone": published.short_backbone(spec.backbone), "protocol": spec.protocol,
        "size": "x".join(map(str, spec.image_size)), "batch": spec.batch_size, "precision": spec.precision,
        "weights": "RANDOM" if group.random else "pretrained", "device": "cpu" if cpu else spec.device,
        "source": f"measured ({'CPU' if cpu else 'GPU'})",
    }  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"method": floor[tables.METHOD], "anchor": "", "group": number, "family": floor[tables.FAMILY], "#TP M": 0.0,
         "status": "floor", "source": common["source"]}
        | {_task(group, task): floor[tables.headline(group, task)] for task in spec.tasks}
        | common for floor in tables.floors(group)
    ]  # fmt: skip
    printed_rows = {}
    for place, records in enumerate(group.methods()):
        values = tables.measured_row(group, records, against) | tables.cost_row(group, records)
        anchor = f"m{number}-{records[0].spec.hash}"
        row = {"method": values[tables.METHOD], "anchor": anchor, "group": number, "family": values[tables.FAMILY]}
        row |= {_task(group, task): values[tables.headline(group, task)] for task in spec.tasks}
        row |= {
            "Δm %": values[tables.DELTA], "#TP M": values.get(tables.TP), "passes": values[tables.PASSES],
            "GMAC": values[tables.MACS], MEMORY[cpu]: values[tables.CPU_PROCESS if cpu else tables.CUDA_ALLOCATED],
            SECONDS[cpu]: values[tables.CPU_MEDIAN if cpu else tables.CUDA_MEDIAN], "seeds": values[tables.SEEDS],
            "status": values[tables.STATUS], "place": place,
        }  # fmt: skip
        rows.append(row | common)
        printed_rows[records[0].method.published_row] = records[0].method.family
    for printed in published.accuracy_rows(set(printed_rows), spec.backbone).to_dict("records"):
        cost = published.efficiency_rows([printed["row"]], spec.backbone).to_dict("records")
        row = {"method": f"{printed['row']} {published.MARK}", "anchor": "", "group": number,
               "family": printed_rows[printed["row"]]}  # fmt: skip
        row |= {_task(group, task): printed[task] for task in spec.tasks if task in published.TASKS}
        row |= {
            # Against the paper's single-task row: under another reference it has none.
            "Δm %": printed["delta_m"] if reference is None else None, "#TP M": printed["tp_m"], "status": "published",
            "source": f"published {published.MARK}", "dataset": printed["dataset"], "backbone": common["backbone"],
        }  # fmt: skip
        if cost:
            row |= {f"memory GB {published.MARK}": cost[0]["memory_gb"],
                    f"s/batch {published.MARK}": cost[0]["seconds_per_batch"]}  # fmt: skip
        rows.append(row)
    return rows


def _task(group: Group, task: str) -> str:
    metric = group.headlines[task]
    return f"{TASKS[task].title} {metric.title} {metric.unit} {'↑' if metric.higher_is_better else '↓'}"


def _page(
    groups: Sequence[Group],
    rows: Sequence[dict[str, Any]],
    problems: Sequence[str],
    pictures: Sequence[tuple[str, str]],
    reference: str | None,
) -> str:
    records = sum(len(group.found) for group in groups)
    marks = list(dict.fromkeys(mark for group in groups for mark in group.marks))
    against = "Δm is against the single-task baseline."
    if reference is not None and not reference.startswith(tables.BASELINE):
        against = f"Δm of measured rows is against {reference}, NOT the single-task baseline."
    printed = ""
    if any(row["status"] == "published" for row in rows):
        printed = f"{published.MARK} rows are printed in papers: PASCAL-Context, another GPU, memory in GB. "
    listed = "".join(f"<li>Group {number}: {html.escape(group.title)}</li>" for number, group in enumerate(groups, 1))
    parts = [
        "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        "<link rel='icon' href='data:,'>",  # else a browser asks for one
        "<title>Benchmark report</title>", f"<style>{STYLE}</style>", f"<script>{DARK}</script>", "</head><body>",
        "<a class='skip' href='#table'>Skip to the table</a>",
        f"<h1>Benchmark report</h1><p>{records} records, settings apart: {len(groups)}. Only rows of one group are "
        f"comparable. {printed}{html.escape(against)}</p>",
        "".join(f"<p class='mark'>{html.escape(mark)}</p>" for mark in marks),
        f"<details><summary>Settings of the groups</summary><ol class='groups'>{listed}</ol></details>",
        "<h2 id='table'>Table</h2><p>Click a heading to sort; type into the field below a column to filter; a method's "
        f"name leads to its card.</p><div class='wide'>{_table(rows)}</div>",
        "<h2 id='plot'>Accuracy against cost</h2><p>Nothing is both cheaper and better than the points on the line; "
        f"hover over a point for its figures.</p>{_plots(groups, rows)}",
        f"<h2 id='cards'>Methods</h2>{''.join(_cards(groups))}",
    ]  # fmt: skip
    if pictures:
        figures = "".join(
            f"<figure><img src='{source}' alt='{html.escape(name)}' loading='lazy'>"
            f"<figcaption>{html.escape(name)}</figcaption></figure>"
            for name, source in pictures
        )
        parts.append(f"<h2 id='gallery'>Pictures</h2>{figures}")
    if problems:
        told = "".join(f"<li>{html.escape(problem)}</li>" for problem in problems)
        parts.append(f"<h2>Unreadable files</h2><ul>{told}</ul>")
    parts += [f"<script type='text/plain' id='plotly'>{get_plotlyjs()}</script>", f"<script>{DRAW}</script>"]
    return "\n".join([*parts, "</body></html>\n"])


def _table(rows: Sequence[dict[str, Any]]) -> str:
    from itables import JavascriptFunction
    from itables.javascript import generate_init_offline_itables_html, to_html_datatable
    from itables.utils import find_package_file

    frame = pd.DataFrame(rows)
    linked = [
        f"<a href='#{row['anchor']}'>{html.escape(row['method'])}</a>" if row["anchor"] else html.escape(row["method"])
        for row in rows
    ]
    frame = frame.drop(columns=["anchor", "place"], errors="ignore").assign(method=linked)
    first = ["method", "group", "status", *(c for c in frame if c.endswith(("↑", "↓"))), *FIGURES]
    first = [column for column in first if column in frame]
    frame = frame[[*first, *(c for c in frame if c not in first)]]
    text = frame.select_dtypes(["object", "string"]).columns.difference(["method"])
    frame[text] = frame[text].map(lambda value: html.escape(value) if isinstance(value, str) else value)
    for column in frame.select_dtypes("number"):
        frame[column] = (
            frame[column].astype("Int64") if column in INTEGERS else frame[column].round(DIGITS.get(column, 2))
        )
    body = to_html_datatable(
        frame, connected=False, allow_html=True, showIndex=False, column_filters="footer", maxBytes=0, maxRows=0,
        maxColumns=0, paging=len(frame) > 100, pageLength=100, classes="display compact nowrap",
        layout={"topStart": "search", "topEnd": None}, order=[],
        text_in_header_can_be_selected=False, style="width:100%", table_id="records",
        columnDefs=[{"targets": "_all", "render": JavascriptFunction(DASH)}],
    )  # fmt: skip
    return generate_init_offline_itables_html(find_package_file("html", "dt_bundle.js")) + body


def _plots(groups: Sequence[Group], rows: Sequence[dict[str, Any]]) -> str:
    """A plot a group, drawn when it is opened; the first one is open."""
    out = []
    for number, group in enumerate(groups, 1):
        own = [row for row in rows if row["group"] == number]
        figure = _plot(group, own)
        if figure is None:
            continue
        data = figure.to_json().replace("</", "<\\/")
        opened = "" if out else " open"
        out.append(
            f"<details class='plot'{opened}><summary>Group {number}: {html.escape(group.title)}</summary>"
            f"<div></div><script type='application/json'>{data}</script></details>"
        )
    return "".join(out) or "<p>No group has accuracy figures.</p>"


def _plot(group: Group, rows: Sequence[dict[str, Any]]) -> go.Figure | None:
    """Every figure of accuracy against every cost, chosen from a list, with the front; None where there is none."""
    goods = {"Δm %": True} | {_task(group, t): group.headlines[t].higher_is_better for t in group.spec.tasks}
    pairs = [
        (x, y) for y in goods for x in COSTS if any(pd.notna(row.get(x)) and pd.notna(row.get(y)) for row in rows)
    ]  # fmt: skip
    if not pairs:
        return None
    figure = go.Figure()
    x, y = pairs[0]
    front = _front(rows, x, y, goods[y])
    figure.add_scatter(x=front[0], y=front[1], mode="lines", name="front", line={"color": GREY, "width": 1},
                       hoverinfo="skip")  # fmt: skip
    # What looks at no image costs nothing, and has no place on a logarithmic axis.
    rows = [row for row in rows if row["status"] != "floor" and any(pd.notna(row.get(name)) for name in goods)]
    for index, row in enumerate(rows):
        printed = row["status"] == "published"
        colour, marker = places(row.get("place", index), len(SYMBOLS))
        symbol = SYMBOLS[marker]
        look = {"size": 12, "color": GREY if printed else COLOURS[colour]}
        figure.add_scatter(
            x=_values([row], x), y=_values([row], y), mode="markers", name=html.escape(row["method"]), hoverinfo="text",
            hovertext=_hover(row, list(goods)), marker=look | {"symbol": f"{symbol}-open" if printed else symbol},
        )  # fmt: skip
    buttons = []
    for x, y in pairs:
        front = _front(rows, x, y, goods[y])
        data = {"x": [front[0], *([v] for v in _values(rows, x))], "y": [front[1], *([v] for v in _values(rows, y))]}
        titles = {"xaxis.title.text": x, "yaxis.title.text": y, "xaxis.autorange": True, "yaxis.autorange": True}
        buttons.append({"label": f"{y} against {x}", "method": "update", "args": [data, titles]})
    figure.update_layout(
        height=460, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"color": GREY},
        margin={"l": 60, "r": 20, "t": 60, "b": 60}, hovermode="closest", legend={"orientation": "h", "y": -0.2},
        updatemenus=[{"buttons": buttons, "x": 0, "y": 1.17, "xanchor": "left", "bgcolor": "rgba(138,138,138,0.15)"}],
        template="none",
    )  # fmt: skip
    figure.update_xaxes(title=pairs[0][0], type="log", gridcolor="rgba(138,138,138,0.25)", zeroline=False)
    figure.update_yaxes(title=pairs[0][1], gridcolor="rgba(138,138,138,0.25)", zerolinecolor=GREY)
    return figure


def _values(rows: Sequence[dict[str, Any]], name: str) -> list[float | None]:
    return [None if pd.isna(row.get(name, float("nan"))) else float(row[name]) for row in rows]


def _front(rows: Sequence[dict[str, Any]], x: str, y: str, higher_is_better: bool) -> tuple[list[float], list[float]]:
    """Steps through the measured points that none is both cheaper and better than; printed rows are of another GPU."""
    sign = 1 if higher_is_better else -1
    points = [
        (row[x], sign * row[y])
        for row in rows
        if row["status"] == "ok" and pd.notna(row.get(x)) and pd.notna(row.get(y))
    ]
    best = front(points)
    xs, ys = [], []
    for place, (a, b) in enumerate(best):
        if place:
            xs.append(float(a))
            ys.append(sign * float(best[place - 1][1]))
        xs.append(float(a))
        ys.append(sign * float(b))
    return xs, ys


def _hover(row: dict[str, Any], goods: Sequence[str]) -> str:
    figures = [f"{name}: {row[name]:.4g}" for name in (*goods, *COSTS) if pd.notna(row.get(name))]
    return "<br>".join([f"<b>{html.escape(row['method'])}</b>", *figures, html.escape(row["source"])])


def _cards(groups: Sequence[Group]) -> Iterable[str]:
    for number, group in enumerate(groups, 1):
        for records in group.methods():
            yield _card(number, group, records)


def _card(number: int, group: Group, records: Sequence[Record]) -> str:
    first = records[0]
    provenance = first.provenance
    failure = next((r.failure.message for r in records if r.failure), "")
    sections: dict[str, dict[str, Any]] = {
        "What it is": {
            "method": first.spec.method, "family": first.method.family, "paper": first.method.citation or "none named",
            "row of the papers' tables": first.method.published_row or "none",
            "seeds": ", ".join(f"{r.spec.seed}: {r.status.replace('_', ' ')}" for r in records),
            **({"failure": failure} if failure else {}),
            **({"time": host} if (host := tables.of_host(records)) else {}),
        },
        "Options": first.method.options,
        "Trainable parameters": first.parameters.model_dump(exclude_none=True) if first.parameters else {},
        "Setting": {
            "backbone": first.spec.backbone, "dataset": first.spec.dataset, "tasks": ", ".join(first.spec.tasks),
            "protocol": first.spec.protocol, "recipe": first.spec.recipe_name, "batch": first.spec.batch_size,
            "precision": first.spec.precision, "weights": weights_of(first),
        },
        "Run on": {
            "device": provenance.device_name, "commit": provenance.commit or "unknown",
            "started": provenance.started or "unknown",
            **{name: version for name, version in provenance.packages.items() if name in ("torch", "timm")},
        } if provenance else {},
        "Metrics of the first seed": {
            f"{TASKS[task].title} {metric.title}": f"{value:.4g} {metric.unit}".strip()
            for task, values in first.metrics.items() if task in TASKS
            for metric in TASKS[task].metrics if (value := values.get(metric.key)) is not None
        },
    }  # fmt: skip
    body = "".join(
        f"<h4>{title}</h4><dl>"
        + "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(_told(v))}</dd>" for k, v in pairs.items())
        + "</dl>"
        for title, pairs in sections.items()
        if pairs
    )
    title = html.escape(f"{first.method.title} · group {number}")
    anchor = f"m{number}-{first.spec.hash}"
    return f"<details class='card' id='{anchor}'><summary>{title}</summary>{body}</details>"


def _told(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _embedded(path: Path) -> str:
    """A PNG, JPEG or SVG file as an address that holds it. Raises BenchError."""
    kinds = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".svg": "image/svg+xml"}
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BenchError(f"--gallery {path}: {error.strerror}") from error
    if path.suffix.lower() not in kinds:
        raise BenchError(f"--gallery {path} is no picture; give {', '.join(kinds)}")
    return f"data:{kinds[path.suffix.lower()]};base64,{base64.b64encode(data).decode()}"


# DataTables takes its dark colours from a class of the root element.
DARK = """(() => {
  const wish = matchMedia('(prefers-color-scheme: dark)');
  const set = () => document.documentElement.classList.toggle('dark', wish.matches);
  set(); wish.addEventListener('change', set);
  // A card that is asked for by its address opens.
  const open = () => { const card = document.getElementById(location.hash.slice(1)); if (card) card.open = true; };
  addEventListener('hashchange', open); addEventListener('load', open);
})();"""

# Plotly is five megabytes: it is run when the table is there already. A plot in a closed box has no size: it is drawn
# when the box is first opened.
DRAW = """const draw = box => {
  const target = box.querySelector('div'), data = box.querySelector('script[type]');
  if (!box.open || !data || !window.Plotly) return;
  const figure = JSON.parse(data.textContent);
  data.remove();
  Plotly.newPlot(target, figure.data, figure.layout, {responsive: true, displaylogo: false});
};
addEventListener('load', () => setTimeout(() => {
  const script = document.createElement('script');
  script.textContent = document.getElementById('plotly').textContent;
  document.body.append(script);
  document.querySelectorAll('details.plot').forEach(box => {
    box.addEventListener('toggle', () => draw(box));
    draw(box);
  });
}, 300));"""

# What is missing sorts as it did, and shows as in the other tables.
DASH = """function (data, type) {
  return type === 'display' && (data === null || data !== data || data === 'NaN' || data === '<NA>') ? '–' : data;
}"""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --mark: #b3261e; }
:root.dark { --mark: #ffb4ab; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 90rem; }
:root.dark body { background: #16181c; color: #e6e6e6; }
:root.dark a { color: #8ab4f8; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; } h4 { margin: .8rem 0 .2rem; }
.skip { position: absolute; left: -999px; } .skip:focus { position: static; }
.mark { color: var(--mark); font-weight: 600; }
.wide { overflow-x: auto; }
.groups { font-size: .85rem; }
details { border: 1px solid var(--line); border-radius: .4rem; padding: .4rem .8rem; margin: .4rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .1rem 1rem; margin: 0; }
dl { font-size: .9rem; }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; }
table input { max-width: 6rem; }
"""
