"""The pictures of docs/performance.md, from the JSON of the benchmarks.

    python benchmarks/pictures.py build/bench/*.json build/bench

Which rows go into which picture is said by `facts["series"]`: "density", "latency", and the rest, which have
`facts["x"]`. The same JSON makes the same files. A picture without a row is not made.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from harness import Row
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from table import read

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

# Okabe and Ito's colours, which people tell apart however they see colours.
BLUE, ORANGE, GREEN, PURPLE, SKY, RED = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
MARKERS = "osD^vP"

STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "font.size": 9,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "svg.fonttype": "none",
    "svg.hashsalt": "balloon",
}

COST = {
    "devices": "devices, kicked one after the other",
    "idle devices": "devices, of which one is kicked",
    "ram": "guest RAM",
    "regions": "regions of guest RAM",
    "ranges": "ranges in a drain",
}
"""The horizontal axis of what has an `x`."""


def short(seconds: float, _: object = None) -> str:
    """A time as an axis has it."""
    if not seconds:
        return "0"
    for name, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 0.9995:
            return f"{seconds * scale:g} {name}"
    return f"{seconds * 1e9:g} ns"


def number(value: float, _: object = None) -> str:
    return f"{value:g}" if value < 1000 else f"{value:,.0f}"


def size(value: float, _: object = None) -> str:
    """Bytes as an axis has them."""
    return f"{value / (1 << 30):g} GiB" if value >= 1 << 30 else f"{value / (1 << 20):g} MiB"


def log_times(axes: Axes, which: str = "y") -> None:
    """A logarithmic axis of times, with a label at 1, 2 and 5 of each decade."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    (axes.set_yscale if which == "y" else axes.set_xscale)("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if which == "y" else (1,)))
    axis.set_major_formatter(FuncFormatter(short))
    axis.set_minor_formatter(NullFormatter())
    low, high = axis.get_data_interval()
    if which == "y":
        axes.set_ylim(nice(low / 1.1, down=True), nice(high * 1.1))


def nice(value: float, *, down: bool = False) -> float:
    """The next of 1, 2, 5, 10 times a power of ten."""
    decade = 10.0 ** math.floor(math.log10(value))
    steps = [decade * step for step in (1, 2, 5, 10)]
    return max(one for one in steps if one <= value) if down else min(one for one in steps if one >= value)


def density(rows: list[Row]) -> Figure:
    """Time per page against the length of the runs that the pages lie in: ours and one call a page."""
    figure, axes = plt.subplots(figsize=(7.6, 3.4))
    backings = list(dict.fromkeys(row.facts["backing"] for row in rows))
    for colour, backing in zip(COLOURS, backings, strict=False):
        mine = sorted(
            (row for row in rows if row.facts["backing"] == backing), key=lambda row: row.facts["run"]
        )
        runs = [row.facts["run"] for row in mine]
        axes.plot(runs, [row.ours for row in mine], "o-", color=colour, label=f"{backing}: balloon")
        for name in dict.fromkeys(name for row in mine for name in row.against):
            with_it = [row for row in mine if name in row.against]
            axes.plot(
                [row.facts["run"] for row in with_it],
                [row.against[name]["time"] for row in with_it],
                "x--",
                color=colour,
                label=f"{backing}: {name}",
            )
    axes.set_xscale("log", base=2)
    runs = sorted({row.facts["run"] for row in rows})
    axes.set_xticks(runs, [str(run) for run in runs])
    axes.xaxis.set_minor_locator(NullLocator())
    log_times(axes)
    axes.set(
        title="256 pages given back",
        xlabel="length of the runs in which they lie, in pages",
        ylabel="time per page",
    )
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), handlelength=3)
    return figure


def latency(rows: list[Row]) -> Figure:
    """Which part of the kicks was answered within a time, with the GIL free and taken."""
    figure, both = plt.subplots(
        1, len(rows), figsize=(3.6 * len(rows), 3.2), sharex=True, sharey=True, squeeze=False
    )
    names = list(dict.fromkeys(name.partition(",")[0] for row in rows for name in row.facts["distributions"]))
    for axes, row in zip(both[0], rows, strict=True):
        for name, taken in row.facts["distributions"].items():
            who = name.partition(",")[0]
            share = [(place + 0.5) / len(taken) * 100 for place in range(len(taken))]
            times = sorted(one / 1e6 for one in taken)
            place = names.index(who)
            axes.plot(times, share, color=COLOURS[place], linestyle=("-", "--", ":")[place % 3], label=who)
        log_times(axes, "x")
        axes.set(
            title=next(iter(row.facts["distributions"])).partition(", ")[2] or row.name,
            xlabel="from kick to call",
        )
    both[0][0].set(ylabel="kicks answered, %", ylim=(0, 100))
    both[0][0].legend(loc="lower right", handlelength=3)
    return figure


def cost(rows: list[Row]) -> Figure:
    """What one unit costs against how many there are of something."""
    kinds = list(dict.fromkeys(row.facts["series"] for row in rows))
    figure, all_axes = plt.subplots(1, len(kinds), figsize=(3.6 * len(kinds), 3.2), squeeze=False)
    for axes, kind in zip(all_axes[0], kinds, strict=True):
        mine = sorted((row for row in rows if row.facts["series"] == kind), key=lambda row: row.facts["x"])
        lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for row in mine:
            backing = row.facts.get("backing", "")
            lines.setdefault((backing, "balloon"), []).append((row.facts["x"], row.ours))
            for name, other in row.against.items():
                if not name.startswith("ours"):  # a baseline for the ratio, and a point of the line itself
                    lines.setdefault((backing, name), []).append((row.facts["x"], other["time"]))
        backings = list(dict.fromkeys(backing for backing, _ in lines))
        for place, ((backing, name), points) in enumerate(lines.items()):
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                marker=MARKERS[place % len(MARKERS)],
                linestyle="-" if name == "balloon" else "--",
                color=COLOURS[backings.index(backing) if len(backings) > 1 else place % len(COLOURS)],
                label=f"{backing}: {name}" if backing else name,
            )
        axes.set_xscale("log")
        if kind == "ram":
            places = sorted({row.facts["x"] for row in mine})
            axes.set_xticks(places, [size(place) for place in places], fontsize="small")
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.xaxis.set_major_formatter(FuncFormatter(number))
        axes.xaxis.set_minor_formatter(NullFormatter())
        top = max(y for points in lines.values() for _, y in points)
        low = min(y for points in lines.values() for _, y in points)
        if top > 10 * low:
            log_times(axes)
        else:
            axes.set_ylim(0, 1.25 * top)
            axes.yaxis.set_major_formatter(FuncFormatter(short))
        axes.set(xlabel=COST.get(kind, kind), ylabel=f"time per {mine[0].unit}")
    handles, labels = all_axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), handlelength=3)
    return figure


def draw(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Make the pictures that there are rows for."""
    by_series: dict[str, list[Row]] = {}
    for row in rows:
        by_series.setdefault(str(row.facts.get("series", "")), []).append(row)
    pictures = {
        "density": (density, by_series.get("density", [])),
        "latency": (latency, by_series.get("latency", [])),
        "devices": (cost, [*by_series.get("devices", []), *by_series.get("idle devices", [])]),
        "growth": (cost, [row for kind in ("ram", "regions", "ranges") for row in by_series.get(kind, [])]),
    }
    made = []
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, (how, wanted) in pictures.items():
            if wanted:
                figure = how(wanted)
                made.append(folder / f"{name}.svg")
                figure.savefig(made[-1], metadata={"Date": None, "Creator": None})
                plt.close(figure)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("files", nargs="+", type=Path, help="JSON of the benchmarks")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    args = parser.parse_args()
    for path in draw(read(args.files).rows, args.folder):
        print(path)


if __name__ == "__main__":
    main()
