"""How figures look: colours that the colour-blind tell apart (Okabe and Ito), markers besides, sizes for print."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files alone; no window, whatever the user's backend is

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from bench.errors import BenchError
from bench.report.palette import COLOURS, places

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")
SETTINGS = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
    "grid.linewidth": 0.5, "legend.frameon": False, "figure.dpi": 100, "savefig.dpi": 200, "svg.fonttype": "none",
    "svg.hashsalt": "bench",  # the same figure is the same file
}  # fmt: skip


def look(index: int) -> tuple[str, str, str]:
    """Colour, marker and line of the index-th series: no two of the first 64 share colour and marker."""
    colour, marker = places(index, len(MARKERS))
    return COLOURS[colour], MARKERS[marker], LINES[index // len(COLOURS) % len(LINES)]


plt.rcParams.update(SETTINGS)
CHARACTERS = 15.5  # of the caption's size, an inch
LEGEND_CHARACTERS = 18.5  # of a legend's


def panels(count: int, width: float = 3.2, height: float = 2.6, columns: int = 4) -> tuple[Figure, list[plt.Axes]]:
    """A figure of `count` axes, at most `columns` side by side; sizes in inches, of one panel."""
    across = min(count, columns)
    down = -(-count // across)
    figure, axes = plt.subplots(
        down, across, figsize=(across * width, down * height), squeeze=False, layout="constrained"
    )
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.set_visible(False)
    return figure, flat[:count]


def legend_below(figure: Figure, axes: plt.Axes, columns: int = 3) -> None:
    """In at most so many columns, fewer where they would be wider than the figure."""
    handles, labels = axes.get_legend_handles_labels()
    widest = 0.5 + max(map(len, labels), default=0) / LEGEND_CHARACTERS
    columns = max(1, min(columns, int(figure.get_figwidth() / widest)))
    figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(labels) // columns))  # no room of the axes
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)


def caption(figure: Figure, lines: Sequence[str]) -> None:
    """Where the figures come from, small, above them; as wide as the figure."""
    width = int(figure.get_figwidth() * CHARACTERS)
    parts = [part for line in lines for part in textwrap.wrap(line, width)]
    figure.set_figheight(figure.get_figheight() + 0.12 * len(parts))
    figure.suptitle("\n".join(parts), x=0.01, ha="left", fontsize=6.5, color="#555555")


def plain(value: float, _: int) -> str:
    """A tick as a plain number, for logarithmic axes over less than a decade or two."""
    return f"{value:g}"


def save(figure: Figure, stem: Path) -> list[Path]:
    """PNG and SVG. Raises BenchError where they cannot be written."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        for path in paths:
            figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise BenchError(f"cannot write {stem}: {error}; choose another folder with --out") from error
    finally:
        plt.close(figure)
    return paths
