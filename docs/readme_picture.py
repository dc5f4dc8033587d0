"""Draws the picture at the top of the README from a finished run.

    python docs/readme_picture.py runs/quickstart docs/quickstart.svg
"""

import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

GREY, RUST, BLUE = "#9aa5b1", "#b5532a", "#1d4e89"
MODELS = (
    ("teacher", "teacher, full precision", GREY), ("round_to_nearest", "round to nearest", RUST),
    ("init", "sign paths, before training", BLUE), ("packed", "sign paths, trained", BLUE),
)


def draw(summary: dict) -> Figure:
    """Perplexity of the models on held-out text, and the bytes of the 16-bit and packed files."""
    figure = Figure((8.4, 2.3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    found = [(name, summary[key]["ppl"], colour) for key, name, colour in MODELS
             if summary.get(key)]
    sizes = [("16-bit file", summary["dense"]["bytes"], GREY),
             ("packed file", summary["packed"]["bytes"], BLUE)]
    bars(left, found, "perplexity on held-out text (lower is better)", "{:.1f}")
    bars(right, [(n, b / 1e6, c) for n, b, c in sizes], "megabytes, whole model", "{:.2f}")
    return figure


def bars(axes, rows: list[tuple[str, float, str]], title: str, form: str) -> None:
    """Horizontal bars with their values, the first row on top."""
    names, values, colours = zip(*rows, strict=True)
    drawn = axes.barh(names, values, color=colours, height=0.6)
    axes.bar_label(drawn, [form.format(v) for v in values], padding=4)
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlim(0, 1.15 * max(values))
    axes.xaxis.set_visible(False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(length=0)


def main() -> None:
    """Read the run's summary, write the picture."""
    run, target = map(Path, sys.argv[1:])
    summary = json.loads((run / "summary.json").read_text())
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "readme",
                                "font.family": "sans-serif"}):
        draw(summary).savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main()
