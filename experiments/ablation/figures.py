"""The plots of an ablation, each a string of SVG.

Rows differ by colour, line style and marker at once; the colours are those of Okabe and Ito, with
the yellow that is too pale for lines left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rabit_jax.experiments.ablation.results import Results
from rabit_jax.experiments.ablation.runner import lookup
from rabit_jax.experiments.engine.folder import RunFolder
from rabit_jax.experiments.report.figures import Lines, against_tokens, svg, svg_with_legend
from rabit_jax.types import Json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.typing import LineStyleType

COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9", "#7a4b2a",
)  # fmt: skip
DASHES = ("-", "--", "-.", ":", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKERS = "osD^vPX*<>"
SIZE = (5.2, 3.3)
MOST_CURVES = 8  # in one figure: more cannot be told apart
ROW_INCHES = 0.27
BITS = "packed.stored_bits_per_weight"
Band = tuple[np.ndarray, np.ndarray]


def figures(results: Results) -> dict[str, str]:
    """SVG by name; a figure that nothing was measured for is left out."""
    curves = results.plan.rows
    if len(curves) > MOST_CURVES:
        curves = [row for row in curves if not row.single] or curves
    lines = {row.label: _diagnostics(results, row.label) for row in curves[:MOST_CURVES]}
    drawn = {"rows": _dots(results)}
    drawn |= {
        name: _over_tokens(title, unit, {row: band(found, key) for row, found in lines.items()})
        for name, title, key, unit in (
            ("perplexity", "Perplexity over training", "nats_per_token", "perplexity"),
            ("alignment", "Residual alignment", "residual_alignment", "residual alignment"),
            ("correlation", "Path correlation", "path_correlation", "path correlation"),
            ("flips", "Sign flips", "flip_rate", "share of signs per step"),
        )
    }
    drawn["bits"] = _quality_against_size(results)
    return {name: figure for name, figure in drawn.items() if figure}


def _dots(results: Results) -> str:
    """Perplexity of every row as a dot with its interval, and the teacher's as a line.

    A row beyond 1.5 times the median would squeeze the others together: it stands at the right edge
    as a number.
    """
    found = ((row.label, results.estimate(row.label, "qat.ppl")) for row in results.plan.rows)
    rows = [(label, e) for label, e in found if e and np.isfinite(e.mean)]
    if not rows:
        return ""
    found = (lookup(summary, "teacher.ppl") for _, summary in results.cells if summary)
    taught = {ppl for ppl in found if ppl is not None}
    most = 1.5 * float(np.median([e.mean for _, e in rows]))

    def draw(axes: Axes) -> None:
        for place, (_, e) in enumerate(rows):
            if e.mean > most:
                axes.annotate(f"{e.mean:.1f} →", (1, place), xycoords=("axes fraction", "data"),
                              ha="right", va="center", color=COLOURS[0])
                continue
            axes.errorbar(e.mean, place, xerr=e.half or None, fmt="o", ms=5, capsize=3, lw=1.3,
                          color=COLOURS[0], mfc="white" if e.n == 1 else COLOURS[0])
        for ppl in taught:
            axes.axvline(ppl, color=COLOURS[1], lw=1.3, ls="--")
            axes.annotate("teacher", (ppl, 1), xycoords=("data", "axes fraction"), xytext=(3, 2),
                          textcoords="offset points", color=COLOURS[1], fontsize=9)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.margins(x=0.08)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("perplexity; bar: 95% interval over seeds; open dot: one seed")

    return svg("Perplexity of every row", draw, (7.2, 1.1 + ROW_INCHES * len(rows)), pad=16)


def _diagnostics(results: Results, label: str) -> list[Lines]:
    """The diagnostics taken during training, one list of lines per complete seed."""
    configs = (c.config for c, found in results.cells if c.row == label and found and c.config)
    return [
        [line for line in RunFolder(config).metrics.lines() if line.get("stage") == "diagnostics"]
        for config in configs
    ]


def band(seeds: Sequence[Lines], key: str) -> Band | None:
    """Tokens `[n]` at which every seed was measured, and the values there `[seeds, n]`.

    Nats per token become perplexities.
    """
    found = [
        {line["tokens"]: line[key] for line in lines if line.get(key) is not None}
        for lines in seeds
    ]
    found = [values for values in found if values]
    shared = sorted(set.intersection(*map(set, found))) if found else []
    if not shared:
        return None
    values = np.array([[each[tokens] for tokens in shared] for each in found], float)
    return np.array(shared), np.exp(values) if key == "nats_per_token" else values


def _over_tokens(title: str, unit: str, bands: Mapping[str, Band | None]) -> str:
    """One curve per row, the mean over its seeds, with a band from the smallest to the largest."""
    if not any(bands.values()):
        return ""

    def draw(axes: Axes) -> Json:
        handles = {}
        for place, (label, found) in enumerate(bands.items()):
            if found:
                tokens, values = found
                colour, dashes, marker = _look(place)
                (handles[label],) = axes.plot(
                    tokens, values.mean(0), color=colour, ls=dashes, lw=1.5, marker=marker, ms=4,
                    markevery=max(1, len(tokens) // 8),
                )  # fmt: skip
                axes.fill_between(tokens, values.min(0), values.max(0), color=colour, alpha=0.15)
        drawn = np.concatenate([found[1].ravel() for found in bands.values() if found])
        against_tokens(axes, drawn, "tokens; band: smallest to largest seed", unit)
        return handles

    return svg_with_legend(title, draw, bands, SIZE)


def _quality_against_size(results: Results) -> str:
    """Perplexity against bits per weight, with the intervals of both tables."""
    rows = [row.label for row in results.plan.rows]
    points = {
        row: tuple(results.estimate(row, key) for key in (BITS, "qat.ppl")) for row in rows
    }
    if not any(bits and ppl for bits, ppl in points.values()):
        return ""

    def draw(axes: Axes) -> Json:
        handles = {}
        for place, (label, (bits, ppl)) in enumerate(points.items()):
            if bits and ppl:
                colour, _, marker = _look(place)
                handles[label] = axes.errorbar(
                    bits.mean, ppl.mean, yerr=ppl.half or None, color=colour, fmt=marker, ms=6,
                    capsize=3, lw=1.2,
                )  # fmt: skip
        axes.set(xlabel="bits per weight; bar: 95% interval", ylabel="perplexity")
        return handles

    return svg_with_legend("Quality against size", draw, points, SIZE)


def _look(place: int) -> tuple[str, LineStyleType, str]:
    """Colour, dashes and marker of the row at a place; the first 50 rows all differ."""
    return (
        COLOURS[place % len(COLOURS)],
        DASHES[place % len(DASHES)],
        MARKERS[place % len(MARKERS)],
    )
