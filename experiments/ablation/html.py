"""`ablation.html`: the tables and figures of an ablation in one file, in the look of a run's
report; nothing is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from rabit_jax.experiments.ablation.tables import Section
from rabit_jax.experiments.report.page import PAGE, STYLE, grid

# Tables with many columns: wider than a report, and headings that break.
_WIDER = """main { max-width: 1280px; }
th { white-space: normal; vertical-align: bottom; }
th, td { padding: .35rem .6rem; }
figure svg { max-width: 560px; }
"""


def page(title: str, parts: Sequence[Section], figures: Mapping[str, str]) -> str:
    """The whole page; `figures` are SVG by name and stand below the results."""
    body = []
    for section in parts:
        body.append(_section(section))
        if section.name == "results" and figures:
            body.append(f'<section id="figures"><h2>Figures</h2>{grid(figures.values())}</section>')
    return PAGE.format(title=escape(title), style=STYLE + _WIDER, body="\n".join(body))


def _section(section: Section) -> str:
    notes = "".join(f"<p>{escape(note)}</p>" for note in section.notes)
    content = _table(section) + notes + _points(section)
    return f'<section id="{section.name}"><h2>{escape(section.title)}</h2>{content}</section>'


def _table(section: Section) -> str:
    if not section.rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in section.columns)
    rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in section.rows)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _points(section: Section) -> str:
    """`name: text` items as a list of definitions."""
    pairs = (point.partition(": ") for point in section.points)
    items = "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, _, b in pairs)
    return f"<dl>{items}</dl>" if items else ""
