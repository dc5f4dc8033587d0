"""An ablation's tables as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from rabit_jax.experiments.ablation_results import METRICS, Results, lookup
from rabit_jax.experiments.ablation_table import Section


def markdown(title: str, parts: Sequence[Section], figures: Iterable[str]) -> str:
    """The report as Markdown; figures are linked by their paths."""
    lines = [f"# {title}", ""]
    for section in parts:
        lines += [f"## {_plain(section.title)}", ""]
        if section.rows:
            lines += [_line(section.columns), _line(["---"] * len(section.columns))]
            lines += [*map(_line, section.rows), ""]
        for note in section.notes:
            lines += [note, ""]
        lines += [f"- {_plain(point)}" for point in section.points] + [""] * bool(section.points)
        if section.name == "results":
            for path in figures:
                lines += [f"![]({path})", ""]
    return "\n".join(lines).rstrip() + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(_plain, cells))} |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def comma_separated(results: Results) -> str:
    """One line per complete cell: row, seed, kind, searched value and every metric."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", "seed", "kind", "value", *METRICS])
    for cell, found in (*results.trials, *results.cells):
        if found:
            numbers = (lookup(found, key) for key in METRICS)
            writer.writerow([cell.row, cell.seed, cell.kind, cell.value, *numbers])
    return out.getvalue()
