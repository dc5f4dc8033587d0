"""The plots of a run's report, and what the plots of all reports share.

A figure is a string of SVG that scales with the page. matplotlib is imported when the first one is
drawn, and its global state stays as it was.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from rabit_jax.evaluate.sign_statistics import Histogram
from rabit_jax.types import Json

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e6e9ed"
BLUE, RUST = "#1d4e89", "#b5532a"
DIAGNOSTICS = {
    "path_correlation": "path correlation",
    "residual_alignment": "residual alignment",
    "slope": "slope",
    "relative_mse": "relative MSE",
}
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold dollars
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
# Lines of metrics.jsonl as they are read, and points of a curve: (x, y).
Lines = Sequence[Json]
Curve = tuple[Sequence[float], Sequence[float]]
ByLayer = Mapping[str, Mapping[str, Sequence[float | None]]]
LEGEND_LINE = 0.2  # inches that a line of the legend takes


def svg(
    title: str, draw: Callable[[Axes], None], size: tuple[float, float] = (4.6, 2.9), pad: float = 8
) -> str:
    """Return a figure that `draw` fills, as SVG; the same numbers give the same text."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict = {**_STYLE, "svg.hashsalt": title, "axes.titlepad": pad}
    with matplotlib.rc_context(style), io.StringIO() as out:
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        draw(axes)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        return _inline(out.getvalue(), title)


def svg_with_legend(
    title: str,
    draw: Callable[[Axes], Mapping[str, Artist]],
    labels: Iterable[str],
    size: tuple[float, float] = (4.6, 2.9),
) -> str:
    """Return a figure with its legend below it: it grows with its labels and hides no curve.

    Args:
      title: of the figure.
      draw: fills the axes and returns what the legend explains, by label.
      labels: all labels that `draw` may return; room for them is added to the size.
      size: width and height in inches without the legend.
    """
    labels = list(labels)
    columns = 1 if max(map(len, labels)) > 30 else 2

    def whole(axes: Axes) -> None:
        handles = draw(axes)
        # matplotlib leaves out what begins with "_".
        names = [f" {name}" if name.startswith("_") else name for name in handles]
        figure = axes.get_figure()
        assert figure is not None
        figure.legend(
            list(handles.values()), names, loc="outside lower left", ncols=columns, handlelength=3
        )

    return svg(title, whole, (size[0], size[1] + LEGEND_LINE * -(-len(labels) // columns)))


def against_tokens(axes: Axes, values: np.ndarray, xlabel: str, ylabel: str) -> None:
    """Give axes their labels: tokens as 1k and 1M, and a logarithmic scale for wide ranges.

    A range is wide where all values are positive and differ by more than a factor of 20.
    """
    from matplotlib.ticker import EngFormatter, LogFormatter, MaxNLocator

    finite = values[np.isfinite(values)]
    if finite.size and finite.min() > 0 and finite.max() > 20 * finite.min():
        axes.set_yscale("log")
        # The formatters of this scale write powers as mathematics, which is not parsed here.
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set(xlabel=xlabel, ylabel=ylabel)


def curve(lines: Lines, key: str) -> Curve:
    """Return (tokens, values) of the metrics lines that have a number under `key`."""
    found = [line for line in lines if line.get(key) is not None and line.get("tokens") is not None]
    return [line["tokens"] for line in found], [line[key] for line in found]


def over_tokens(title: str, unit: str, points: Curve, smooth: bool = True) -> str:
    """Return a curve against tokens; a long one is drawn light, its running mean on top."""

    def draw(axes: Axes) -> None:
        x, y = np.asarray(points[0]), np.asarray(points[1], float)
        window = len(y) // 40 if smooth else 1
        if window > 1:
            axes.plot(x, y, color=BLUE, lw=0.6, alpha=0.35)
        axes.plot(x, _running_mean(y, window) if window > 1 else y, color=BLUE, lw=1.6)
        against_tokens(axes, y, "tokens", unit)

    return svg(title, draw)


def by_layer(title: str, key: str, init: ByLayer | None, qat: ByLayer | None) -> str:
    """Return one diagnostic of every projection, its layers from left to right, init and QAT.

    Args:
      title: of the figure.
      key: one of DIAGNOSTICS.
      init: `{"layers/attn/q": {key: [one per layer]}}` or None.
      qat: the same after training.
    """
    names = list(init or qat or {})
    stages = {"init": (init or {}, MUTED, "--", "white"), "after QAT": (qat or {}, BLUE, "-", BLUE)}

    def draw(axes: Axes) -> Json:
        handles = {}
        for label, (stage, colour, dashes, fill) in stages.items():
            for place, name in enumerate(names):
                values = np.asarray(stage.get(name, {}).get(key) or [], float)
                if values.size:
                    (handles[label],) = axes.plot(
                        _across(place, len(values)), values, color=colour, ls=dashes, lw=1.1,
                        marker="o", ms=3.4 if len(values) <= 8 else 0, mfc=fill, clip_on=False,
                    )  # fmt: skip
        for place in range(1, len(names)):
            axes.axvline(place - 0.5, color=GRID, lw=0.8)
        if key in ("path_correlation", "residual_alignment", "slope"):
            axes.axhline(1.0 if key == "slope" else 0.0, color=MUTED, lw=0.8, ls=":")
        axes.grid(axis="x", visible=False)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_xticks(range(len(names)), [name.rpartition("/")[2] for name in names])
        axes.set(xlabel="projection (inside each: first to last layer)", ylabel=DIAGNOSTICS[key])
        return handles

    return svg_with_legend(title, draw, stages)


def _across(place: int, layers: int) -> np.ndarray:
    """Where the layers of the projection at a place of the x axis stand."""
    return place + (np.linspace(-0.34, 0.34, layers) if layers > 1 else np.zeros(1))


def weight_histogram(title: str, data: Histogram) -> str:
    """Return the share of a layer's weights per bin, with the levels they are rounded to.

    `data`: `weights` (counts), `edges` (one more) and `levels`, all in units of the scale.
    """

    def draw(axes: Axes) -> None:
        counts, edges = np.asarray(data["weights"], float), np.asarray(data["edges"], float)
        axes.stairs(100 * counts / max(counts.sum(), 1), edges, fill=True, color=BLUE, alpha=0.3)
        axes.stairs(100 * counts / max(counts.sum(), 1), edges, color=BLUE, lw=1.0)
        levels = sorted(float(level) for level in data["levels"])
        for level in levels:
            axes.axvline(level, color=RUST, lw=1.4)
        if len(levels) <= 8:
            for level in levels:
                axes.annotate(
                    f"{level:.2f}", (level, 1), xycoords=("data", "axes fraction"),
                    xytext=(0, 3), textcoords="offset points", ha="center", color=RUST, fontsize=9,
                )  # fmt: skip
        axes.set(xlabel="weight / scale", ylabel="share of the weights, %")
        axes.set_xlim(edges[0], edges[-1])

    return svg(title, draw, (5.6, 3.0), pad=16)


def _inline(text: str, title: str) -> str:
    """Make a matplotlib file fit to stand in HTML: no size, no metadata, no ids that repeat."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z.]+_\d+"', "", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"'DejaVu Sans'[^;\"]*?sans-serif", "system-ui, sans-serif", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)


def _running_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Mean over the `window` values around each, fewer at the ends."""
    ones = np.ones(window)
    return np.convolve(y, ones, "same") / np.convolve(np.ones_like(y), ones, "same")
