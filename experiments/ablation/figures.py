"""The plots of an ablation, each a string of SVG.

Rows differ by colour, line style and marker at once; the colours are those of Okabe and Ito, with
the yellow that is too pale for lines left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rabit_jax.experiments.ablation.results import Results
from rabit_jax.experiments.engine.folder import RunFolder
from rabit_jax.experiments.report.figures import spans, svg

COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9", "#7a4b2a",
)  # fmt: skip
DASHES = ("-", "--", "-.", ":", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKERS = "osD^vPX*<>"
SIZE, LEGEND_LINE = (5.2, 3.3), 0.2
Lines = Sequence[Mapping[str, Any]]
Band = tuple[np.ndarray, np.ndarray]


def figures(results: Results) -> dict[str, str]:
    """SVG by name; a figure that nothing was measured for is left out."""
    lines = {row.label: _measured(results, row.label) for row in results.plan.rows}
    drawn = {
        name: _over_tokens(title, unit, {row: band(found, key) for row, found in lines.items()})
        for name, title, key, unit in (
            ("perplexity", "Perplexity over training", "nats_per_token", "perplexity"),
            ("alignment", "Residual alignment", "residual_alignment", "residual alignment"),
            ("correlation", "Path correlation", "path_correlation", "path correlation"),
            ("flips", "Sign flips", "flip_rate", "share of signs per step"),
        )
    }
    drawn["bits"] = _quality(results)
    return {name: figure for name, figure in drawn.items() if figure}


def _measured(results: Results, label: str) -> list[Lines]:
    """What was measured during training, one list of lines per complete seed."""
    folders = (RunFolder(c.config) for c, found in results.cells if c.row == label and found)
    return [
        [line for line in folder.metrics.lines() if line.get("stage") == "diagnostics"]
        for folder in folders
    ]


def band(seeds: Sequence[Lines], key: str) -> Band | None:
    """Tokens `[n]` that every seed was measured at, and the values there `[seeds, n]`.

    Nats per token are given as perplexities.
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
    """One curve per row, the mean over its seeds, with a band from the least to the largest."""
    if not any(bands.values()):
        return ""

    def draw(axes: Any) -> dict[str, Any]:
        import matplotlib.ticker

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
        if spans(np.concatenate([found[1].ravel() for found in bands.values() if found])):
            axes.set_yscale("log")
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6))
        axes.set(xlabel="tokens; band: least to largest seed", ylabel=unit)
        return handles

    return _with_legend(title, draw, bands)


def _quality(results: Results) -> str:
    """Perplexity against bits per weight, with the intervals of both tables."""
    rows = [row.label for row in results.plan.rows]
    points = {
        row: (results.estimate(row, "packed.bits_per_weight"), results.estimate(row, "qat.ppl"))
        for row in rows
    }
    if not any(bits and ppl for bits, ppl in points.values()):
        return ""

    def draw(axes: Any) -> dict[str, Any]:
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

    return _with_legend("Quality against size", draw, points)


def _with_legend(
    title: str, draw: Callable[[Any], dict[str, Any]], labels: Mapping[str, Any]
) -> str:
    """A figure with its legend below it, so that it grows with the rows and hides nothing."""
    columns = 1 if max(map(len, labels)) > 30 else 2
    lines = -(-len(labels) // columns)

    def whole(axes: Any) -> None:
        handles = draw(axes)
        # matplotlib reads a dollar sign as mathematics, and leaves out what begins with "_".
        names = [label.replace("$", r"\$") for label in handles]
        names = [f" {name}" if name.startswith("_") else name for name in names]
        axes.get_figure().legend(
            list(handles.values()), names, loc="outside lower left", ncols=columns, handlelength=3
        )

    return svg(title, whole, (SIZE[0], SIZE[1] + LEGEND_LINE * lines))


def _look(place: int) -> tuple[str, Any, str]:
    """Colour, dashes and marker of the row at a place: no two of the first 50 are alike."""
    return (
        COLOURS[place % len(COLOURS)],
        DASHES[place % len(DASHES)],
        MARKERS[place % len(MARKERS)],
    )
