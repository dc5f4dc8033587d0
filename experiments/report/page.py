"""`report.html`: one file with the plots, tables and samples of a run; nothing is loaded from
elsewhere, so that it can be mailed, archived and read on a phone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rabit_jax.atomic import write_text
from rabit_jax.experiments.report.figures import (
    DIAGNOSTICS,
    by_layer,
    curve,
    over_tokens,
    weight_histogram,
)
from rabit_jax.progress import number

Lines = Sequence[Mapping[str, Any]]


def write_report(
    folder: str | Path,
    summary: Mapping[str, Any],
    metrics: Lines,
    histogram: Mapping[str, Any] | None,
    samples: Lines,
    table: Lines,
) -> Path:
    """Write `folder/report.html` and return its path; what the run did not make is left out.

    Args:
      folder: the run folder; its name is the title.
      summary: what `summary.json` holds.
      metrics: the lines of `metrics.jsonl`; `stage` is `teacher`, `qat` or `diagnostics`.
      histogram: `layer`, `weights` (counts), `edges`, `levels`, in units of the scale.
      samples: `prompt`, `teacher`, `packed` of each sample.
      table: rows with `name`, `ppl`, `bits_per_byte` and whatever else; keys are the columns,
        `ppl_over_teacher` is a share and shown in per cent.
    """
    path = Path(folder) / "report.html"
    teacher, qat, diagnostics = (
        [line for line in metrics if line.get("stage") == stage]
        for stage in ("teacher", "qat", "diagnostics")
    )
    body = (
        _headline(summary),
        _section("results", "Results", _table(table)),
        _section("teacher", "Teacher", _panels(teacher, _TEACHER)),
        _section("qat", "Quantisation-aware training", _panels(qat, _QAT)),
        _section("paths", "How the paths share the work", _paths(summary)),
        _section("time", "The same over time", _time(diagnostics)),
        _section("weights", "Weights and levels", _weights(histogram)),
        _section("bytes", "Bits and bytes", _bytes(summary)),
        _section("samples", "Samples", _samples(samples)),
        _footer(summary),
    )
    title = escape(Path(folder).resolve().name)
    text = PAGE.format(title=title, style=STYLE, body="\n".join(body))
    write_text(path, text)
    return path


def _section(name: str, title: str, content: str) -> str:
    content = content or f'<p class="missing">Not in this report: {_MISSING[name]}.</p>'
    return f'<section id="{name}"><h2>{title}</h2>{content}</section>'


def _headline(summary: Mapping[str, Any]) -> str:
    """The numbers one looks for first; each only where the run has it."""
    ppl = {name: _get(summary, name, "ppl") for name in ("teacher", "init", "qat", "packed")}
    cards = [(f"{label} perplexity", number(ppl[name])) for name, label in _MODELS if ppl[name]]
    if ppl["teacher"] and ppl["init"] and ppl["qat"]:
        lost, left = (math.log(ppl[name] / ppl["teacher"]) for name in ("init", "qat"))
        if lost > 0:
            cards.append(("of the gap closed by QAT", f"{100 * (1 - left / lost):.0f} %"))
    if bits := _get(summary, "packed", "bits_per_weight"):
        cards.append(("bits per weight", f"{bits:.3f}"))
    items = "".join(f"<div><b>{value}</b><span>{label}</span></div>" for label, value in cards)
    return f'<div class="cards">{items}</div>' if cards else ""


def _table(rows: Lines) -> str:
    """Rows of one shape or several: the columns are their keys in order of appearance."""
    if not rows:
        return ""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{escape(_COLUMNS.get(k, k.replace('_', ' ')))}</th>" for k in keys)
    cells = ([f"<td>{escape(_cell(key, row.get(key)))}</td>" for key in keys] for row in rows)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(key: str, value: Any) -> str:
    if key == "ppl_over_teacher" and value is not None:
        return f"{100 * value:+,.1f} %"
    fixed = key in _DECIMALS and isinstance(value, int | float)
    return f"{value:,.{_DECIMALS[key]}f}" if fixed else number(value)


def _panels(lines: Lines, panels: Iterable[tuple[str, str, str]]) -> str:
    """One figure per (key, title, unit) that the lines have values for."""
    # A speed of 0 is that of the first step, which has no time of its own.
    timed = [line for line in lines if line.get("tokens_per_second") != 0]
    curves = (
        (title, unit, curve(timed if key == "tokens_per_second" else lines, key), key != "lr")
        for key, title, unit in panels
    )
    return grid(over_tokens(*panel) for panel in curves if panel[2][0])


def grid(figures: Iterable[str]) -> str:
    """Figures side by side, "" for none."""
    body = "".join(f"<figure>{svg}</figure>" for svg in figures)
    return f'<div class="grid">{body}</div>' if body else ""


def _paths(summary: Mapping[str, Any]) -> str:
    stages = {name: _get(summary, "diagnostics", name) for name in _STAGE_NAMES}
    stages = {name: stage for name, stage in stages.items() if stage}
    if not any(stages.values()):
        return ""
    init, qat = (_get(stages.get(name, {}), "layers") for name in ("init", "qat"))
    rows = [
        {"mean over all layers": title}
        | {_STAGE_NAMES[name]: _get(stage or {}, "mean", key) for name, stage in stages.items()}
        for key, title in DIAGNOSTICS.items()
    ]
    figures = (by_layer(_upper(title), key, init, qat) for key, title in DIAGNOSTICS.items())
    return _table(rows) + _PATHS_NOTE + grid(figures if init or qat else ())


def _time(lines: Lines) -> str:
    panels = [(key, f"{_upper(title)} over time", title) for key, title in DIAGNOSTICS.items()]
    return _panels(lines, [*panels, ("flip_rate", "Sign flips", "share of signs per step")])


def _upper(title: str) -> str:
    return title[0].upper() + title[1:]


def _weights(data: Mapping[str, Any] | None) -> str:
    if not data:
        return ""
    note = (
        f"<p>Latent weights of <code>{escape(str(data['layer']))}</code> over their scale, against "
        f"the {len(data['levels'])} mean levels that they are rounded to.</p>"
    )
    figure = weight_histogram("Weights and levels", data)
    return f"{note}<figure>{figure}</figure>"


def _bytes(summary: Mapping[str, Any]) -> str:
    packed, dense = _get(summary, "packed", "bytes"), _get(summary, "dense", "bytes")
    if not packed:
        return ""
    nominal, stored = (
        _cell("bits_per_weight", _get(summary, "packed", key))
        for key in ("bits_per_weight", "stored_bits_per_weight")
    )
    rows = [
        {"name": "bits per weight, nominal", "value": nominal},
        {"name": "bits per weight, stored", "value": stored},
        {"name": "packed model, bytes", "value": packed},
        {"name": "dense model, bytes", "value": dense},
    ]
    bars = "".join(
        f'<div class="bar"><span>{name}</span>'
        f'<i style="width:{55 * size / max(dense, packed):.1f}%"></i>'
        f"<span>{size / 1e6:,.1f} MB</span></div>"
        for name, size in (("dense", dense), ("packed", packed))
        if dense
    )
    smaller = f"<p>{dense / packed:.2f} times smaller on disk.</p>" if dense else ""
    return _table(rows) + bars + smaller


def _samples(samples: Lines) -> str:
    return "".join(
        f'<div class="sample"><p class="prompt">{escape(str(s["prompt"]))}</p>'
        f"<div><h3>teacher</h3><p>{escape(str(s['teacher']))}</p></div>"
        f"<div><h3>packed</h3><p>{escape(str(s['packed']))}</p></div></div>"
        for s in samples
    )


def _footer(summary: Mapping[str, Any]) -> str:
    facts = [(name, summary[name]) for name in ("command", "seed", "tokens") if name in summary]
    if summary.get("peak_memory_bytes"):
        facts.append(("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"))
    for name, unit in (("seconds", " s"), ("tokens", ""), ("versions", "")):
        if isinstance(value := summary.get(name), Mapping):
            facts = [fact for fact in facts if fact[0] != name]
            facts.append((name, ", ".join(f"{k} {number(v)}{unit}" for k, v in value.items())))
    rows = "".join(f"<dt>{name}</dt><dd>{escape(number(value))}</dd>" for name, value in facts)
    return f"<footer><h2>How this was made</h2><dl>{rows}</dl></footer>"


def _get(tree: Mapping[str, Any], *keys: str) -> Any:
    """Return what lies under the keys, None where one of them is missing or null."""
    for key in keys:
        tree = (tree or {}).get(key)
    return tree

_STAGE_NAMES = {
    "init": "init", "qat": "after QAT",
    "init_student": "init, student inputs", "qat_student": "after QAT, student inputs",
}
_MODELS = (("teacher", "teacher"), ("init", "init"), ("qat", "QAT"), ("packed", "packed"))
_COLUMNS = {"name": "", "value": "", "ppl": "perplexity", "ppl_over_teacher": "over teacher"}
_DECIMALS = dict.fromkeys(_STAGE_NAMES.values(), 4)
_DECIMALS |= {"ppl": 2, "bits_per_byte": 3, "bits_per_weight": 4}
_TEACHER = (
    ("loss", "Teacher loss", "nats per token"),
    ("lr", "Teacher learning rate", "learning rate"),
    ("grad_norm", "Teacher gradient norm", "gradient norm"),
    ("tokens_per_second", "Teacher speed", "tokens per second"),
)
_QAT = (
    ("loss", "QAT loss", "KL + weighted MSE"),
    ("kl", "KL to the teacher", "nats per token"),
    ("hidden_mse", "Hidden-state MSE", "mean squared error"),
    ("lr", "QAT learning rate", "learning rate"),
    ("grad_norm", "QAT gradient norm", "gradient norm"),
    ("tokens_per_second", "QAT speed", "tokens per second"),
)
_MISSING = {
    "results": "no model was evaluated",
    "teacher": "the teacher was loaded, not trained in this run",
    "qat": "there was no quantisation-aware training",
    "paths": "a single path has nothing to correlate with, or nothing was measured",
    "time": "no diagnostics were taken during training",
    "weights": "no histogram was made",
    "bytes": "the model was not packed",
    "samples": "no text was generated",
}
_PATHS_NOTE = (
    "<p>Path correlation is wanted negative: the second path makes up for the first. Residual "
    "alignment is wanted positive, the slope near 1 (dotted), the relative MSE small. Measured on "
    "what enters each linear in the teacher; the columns of student inputs use what enters it in "
    "the student itself.</p>"
)
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main>
<h1>{title}</h1>
{body}
</main></body></html>
"""
STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #1f2933;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1020px; margin: 0 auto; padding: 2.2rem 1.2rem 3rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .7rem; padding-bottom: .3rem;
  border-bottom: 1px solid #d8dde3; }
h3 { font-size: .8rem; margin: 0 0 .2rem; color: #6b7785; font-weight: 600; }
p { margin: .5rem 0; max-width: 44rem; }
.missing { color: #6b7785; font-style: italic; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: .7rem; }
.cards div { background: #f4f6f8; border-radius: 6px; padding: .7rem .9rem; }
.cards b { display: block; font-size: 1.45rem; line-height: 1.3; color: #1d4e89; }
.cards span { font-size: .85rem; color: #52606d; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { padding: .35rem .9rem; text-align: right; white-space: nowrap; }
th { color: #52606d; font-weight: 600; border-bottom: 1px solid #9aa5b1; }
td { border-bottom: 1px solid #e6e9ed; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.grid { display: grid; gap: 1.2rem 1.6rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; max-width: 620px; }
.bar { display: flex; align-items: center; gap: .7rem; margin: .4rem 0; font-size: .9rem; }
.bar span:first-child { width: 4rem; }
.bar i { background: #1d4e89; height: 1rem; border-radius: 2px; min-width: 2px; }
.sample { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr));
  gap: .4rem 1.6rem; padding: 1rem 0; border-bottom: 1px solid #e6e9ed; }
.sample p { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: .95rem; }
.sample .prompt { grid-column: 1 / -1; font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; font-size: .9rem; }
dt { color: #52606d; }
dd { margin: 0; overflow-wrap: anywhere; }
"""
