"""Charts, each an SVG element to put into a page: curves over tokens, heat maps, and what a caller draws itself.

Axis names:
    points    rows of the run that hold the value, in order
    experts   experts of one layer
    columns   of a heat map, from the first step to the last
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import Formatter, FuncFormatter, MaxNLocator, PercentFormatter

from moe_pretrain.run_folder.metrics_file import MetricsRow
from moe_pretrain.system.files import write_whole
from moe_pretrain.system.words import short_number

MAX_POINTS = 2000

_LEGEND_INCHES, _LEGEND_INCHES_OF_LETTER = 0.6, 0.075
"""Width of a legend's line and gaps, and of a letter."""

BLUE, ORANGE, GREEN, GREY = "#2563a8", "#d1662a", "#2e8b57", "#777777"
_IDLE_ZEROS = re.compile(r"\.0+(?=[kMBT])|(?<=\.\d)0(?=[kMBT])")
_COUNT = FuncFormatter(lambda value, _: _IDLE_ZEROS.sub("", short_number(value)))
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names are anybody's: a $ in one is no formula
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.1,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def column(rows: Sequence[MetricsRow], key: str) -> np.ndarray:
    """Return one number per row as float64; NaN where a row lacks it or holds null."""
    values = [row.get(key) for row in rows]
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def thin(x: np.ndarray, y: np.ndarray, limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Thin a curve for drawing, keeping every spike.

    Args:
        x: Positions, [points].
        y: Values, [points]; may hold NaN.
        limit: Most points to return.

    Returns:
        The curve itself when it is short enough; else, from each of ``limit // 2`` equal stretches,
        its lowest and its highest point in their order.
    """
    if len(y) <= limit:
        return x, y
    keep: set[int] = set()
    for stretch in np.array_split(np.arange(len(y)), limit // 2):
        part = y[stretch]
        keep.add(int(stretch[np.argmin(np.where(np.isnan(part), np.inf, part))]))
        keep.add(int(stretch[np.argmax(np.where(np.isnan(part), -np.inf, part))]))
    index = np.array(sorted(keep))
    return x[index], y[index]


@dataclass(frozen=True)
class Curve:
    """One line of a chart: a column of the rows against their tokens."""

    rows: Sequence[MetricsRow]
    key: str
    color: str = BLUE
    label: str = ""
    marker: str = ""


def line_chart(
    name: str,
    title: str,
    curves: Sequence[Curve],
    *,
    size: tuple[float, float] = (4.2, 2.6),
    y_format: str = "",
    from_zero: bool = False,
    reference: tuple[float, str] | None = None,
    marks: tuple[Sequence[float], str] = ((), ""),
) -> str:
    """Draw curves over tokens.

    Args:
        name: Unique within the page.
        title: Stands above the chart, with the unit.
        curves: What to draw; a legend appears when one has a label.
        size: Width and height in inches.
        y_format: "" for plain numbers, "count" for 12.3k, "integer", "percent" for 40%.
        from_zero: Start the y axis at 0.
        reference: Height and label of a dashed line across.
        marks: Token positions and common label of dotted lines from top to bottom.

    Returns:
        SVG element.
    """

    def draw(axes: Axes) -> None:
        for curve in curves:
            x, y = thin(column(curve.rows, "tokens"), column(curve.rows, curve.key))
            axes.plot(x, y, color=curve.color, label=curve.label, marker=curve.marker, ms=3)
        if reference is not None:
            axes.axhline(reference[0], color=GREY, ls="--", label=reference[1])
        for number, tokens in enumerate(marks[0]):
            axes.axvline(tokens, color=GREY, ls=":", label="" if number else marks[1])
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
        _format_y(axes, y_format, from_zero)
        finish(axes, title, "tokens")

    return chart(name, title, draw, size)


def chart(name: str, title: str, draw: Callable[[Axes], None], size: tuple[float, float] = (4.2, 2.6)) -> str:
    """Return what ``draw`` puts on one pair of axes as an SVG element.

    Args:
        name: Unique within the page.
        title: Read out by screen readers.
        draw: Fills the axes.
        size: Width and height in inches.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        return _to_svg(figure, name, title)


def write_png(
    path: Path, draws: Sequence[Callable[[Axes], None]], size: tuple[float, float], colors: Mapping[str, str]
) -> None:
    """Write a picture with what each of ``draws`` puts on axes of its own, side by side.

    Args:
        path: Where.
        draws: Fill the axes.
        size: Width and height in inches.
        colors: The legend below them: label to colour.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        for axes, draw in zip(figure.subplots(1, len(draws), squeeze=False)[0], draws, strict=True):
            draw(axes)
        handles = [Line2D([], [], color=color, lw=3, label=plain(label)) for label, color in colors.items()]
        longest = max(map(len, colors), default=0)
        columns = int(size[0] / (_LEGEND_INCHES + _LEGEND_INCHES_OF_LETTER * longest))
        figure.legend(handles=handles, loc="outside lower center", ncols=max(1, min(columns, len(handles))))
        content = io.BytesIO()
        figure.savefig(content, dpi=160)
    write_whole(path, content.getvalue())


def plain(label: str) -> str:
    """A label whose dollars are dollars and no mathematics."""
    return label.replace("$", r"\$")


def _format_y(axes: Axes, y_format: str, from_zero: bool) -> None:
    if from_zero:
        highest = axes.dataLim.y1 if axes.dataLim.y1 > 0 else 1
        axes.set_ylim(-0.02 * highest, 1.06 * highest)
    if y_format == "count":
        axes.yaxis.set_major_formatter(_COUNT)
    elif y_format == "integer":
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    elif y_format == "percent":
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    else:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))


@dataclass(frozen=True)
class HeatMap:
    """Values over experts and time: [experts, columns]."""

    title: str
    values: np.ndarray
    first_step: int
    last_step: int


def heat_maps(name: str, title: str, maps: Sequence[HeatMap], color_label: str) -> str:
    """Draw heat maps of positive numbers side by side, four to a line, with one colour bar.

    Args:
        name: Unique within the page.
        title: Read out by screen readers.
        maps: At least one.
        color_label: What the colour means; 1 is white, less is blue, more is red.

    Returns:
        SVG element.
    """
    highest = max(float(np.nanmax(each.values, initial=0)) for each in maps)
    norm = TwoSlopeNorm(vcenter=1, vmin=0, vmax=max(2.0, highest))
    columns = min(4, len(maps))
    lines = math.ceil(len(maps) / columns)
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(2.4 * columns + 0.8, 1.9 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for unused in panels[len(maps) :]:
            unused.remove()
        panels = panels[: len(maps)].tolist()
        for axes, each in zip(panels, maps, strict=True):
            image = axes.imshow(
                each.values,
                aspect="auto",
                interpolation="none",
                cmap="RdBu_r",
                norm=norm,
                extent=(each.first_step, each.last_step, len(each.values) - 0.5, -0.5),
            )
            axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            finish(axes, each.title, "step")
        figure.supylabel("expert", fontsize=9)
        bar = figure.colorbar(image, ax=panels, pad=0.01, fraction=0.03, aspect=15 * lines)
        bar.set_label(color_label)
        return _to_svg(figure, name, title)


def finish(axes: Axes, title: str, x_label: str, x_format: Formatter = _COUNT) -> None:
    """Title and x axis, the same on all charts."""
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(x_format)


def _to_svg(figure: Figure, name: str, description: str) -> str:
    """Write a figure as an SVG element without a fixed size; ids derive from ``name`` alone."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[^"]*pt"', "", svg, count=2)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)
