"""`report.html`: one file with the plots, tables and samples of a run.

It loads nothing from elsewhere, so that it can be mailed, archived and read on a phone. What the
page says stands in `templates/report.html.j2`; the numbers and figures are chosen here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from rabit_jax.atomic import write_text
from rabit_jax.evaluate.gap import gap_closed
from rabit_jax.evaluate.sign_statistics import Histogram
from rabit_jax.experiments.report.figures import (
    DIAGNOSTICS,
    Lines,
    by_layer,
    curve,
    over_tokens,
    weight_histogram,
)
from rabit_jax.formats.rendering import environment
from rabit_jax.progress import number
from rabit_jax.types import Json

TEMPLATES = Path(__file__).with_name("templates")
Summary = Json  # `summary.json` as it is read: nested dicts of numbers, strings and nulls
Panel = tuple[str, str, str]  # key of the metrics lines, title, unit

_STAGES = {
    "init": "init", "qat": "after QAT",
    "init_student": "init, student inputs", "qat_student": "after QAT, student inputs",
}
_MODELS = {"teacher": "teacher", "init": "init", "qat": "QAT", "packed": "packed"}
_HEADINGS = {"name": "", "ppl": "perplexity", "ppl_over_teacher": "over teacher",
             "bits_per_weight": "bits per weight, blocks",
             "whole_model_bits_per_weight": "bits per weight, whole model"}
_DECIMALS = {"ppl": 2, "bits_per_byte": 3, "bits_per_weight": 4,
             "whole_model_bits_per_weight": 4}
_TEACHER: tuple[Panel, ...] = (
    ("loss", "Teacher loss", "nats per token"),
    ("lr", "Teacher learning rate", "learning rate"),
    ("grad_norm", "Teacher gradient norm", "gradient norm"),
    ("tokens_per_second", "Teacher speed", "tokens per second"),
)
_HELD_OUT: tuple[Panel, ...] = (
    ("nats_per_token", "Held-out text during training", "nats per token"),
)
_QAT: tuple[Panel, ...] = (
    ("loss", "QAT loss", "KL + weighted MSE"),
    ("kl", "KL to the teacher", "nats per token"),
    ("hidden_mse", "Hidden-state MSE", "mean squared error"),
    ("lr", "QAT learning rate", "learning rate"),
    ("grad_norm", "QAT gradient norm", "gradient norm"),
    ("tokens_per_second", "QAT speed", "tokens per second"),
)
_OVER_TIME: tuple[Panel, ...] = (
    *((key, f"{title[0].upper()}{title[1:]} over time", title)
      for key, title in DIAGNOSTICS.items()),
    ("flip_rate", "Sign flips", "share of signs per step"),
)  # fmt: skip
_SIZES = (
    ("bits_per_weight", "bits per weight, blocks, nominal"),
    ("stored_bits_per_weight", "bits per weight, blocks"),
    ("whole_model_bits_per_weight", "bits per weight, whole model with embedding and head"),
)


class ResultRow(TypedDict):
    """One model of the results table; `ppl_over_teacher` is a share, 0.08 for 8% more."""

    name: str
    ppl: float
    bits_per_byte: float
    ppl_over_teacher: float
    bits_per_weight: float
    whole_model_bits_per_weight: float | None


class Sample(TypedDict):
    """A prompt and what the teacher and the packed model make of it."""

    prompt: str
    teacher: str
    packed: str


class Table(NamedTuple):
    """A table whose cells are text."""

    columns: list[str]
    rows: list[list[str]]


def write_report(
    folder: str | Path,
    summary: Summary,
    metrics: Lines,
    histogram: Histogram | None,
    samples: Sequence[Sample],
    results: Sequence[ResultRow],
) -> Path:
    """Write `folder/report.html` and return its path; what the run did not make is left out.

    Args:
      folder: the run folder; its name is the title.
      summary: the content of `summary.json`.
      metrics: the lines of `metrics.jsonl`; `stage` is `teacher`, `validation`,
        `qat` or `diagnostics`.
      histogram: weights of one layer, None where there is none.
      samples: continuations of the prompts.
      results: the rows of the results table.
    """
    path = Path(folder) / "report.html"
    teacher, held_out, qat, diagnostics = (
        [line for line in metrics if line.get("stage") == stage]
        for stage in ("teacher", "validation", "qat", "diagnostics")
    )
    dense, packed = (_get(summary, name, "bytes") for name in ("dense", "packed"))
    page = environment(TEMPLATES).get_template("report.html.j2")
    text = page.render(
        title=Path(folder).resolve().name,
        headline=_headline(summary),
        about=_about(summary),
        results=_results(results),
        teacher=_panels(held_out, _HELD_OUT) + _panels(teacher, _TEACHER),
        qat=_panels(diagnostics, _HELD_OUT) + _panels(qat, _QAT),
        diagnostics=_diagnostics(summary),
        correlation=_correlation(summary),
        by_layer=_by_layer(summary),
        over_time=_panels(diagnostics, _OVER_TIME),
        histogram=histogram,
        weight_figure=histogram and weight_histogram("Weights and levels", histogram),
        sizes=_sizes(summary),
        bars=_bars(dense, packed) if dense and packed else [],
        smaller=dense / packed if dense and packed else 0,
        samples=samples,
        made=_made(summary),
    )
    write_text(path, text)
    return path


def _headline(summary: Summary) -> list[tuple[str, str]]:
    """Label and value of the numbers that one looks for first, of those that the run has."""
    ppl = {key: _get(summary, key, "ppl") for key in _MODELS}
    found = [(f"{_MODELS[key]} perplexity", number(value)) for key, value in ppl.items() if value]
    if ppl["teacher"] and ppl["init"] and ppl["qat"]:
        closed = gap_closed([ppl["teacher"]], [ppl["init"]], [ppl["qat"]])
        if closed:
            found.append(("of the gap closed by QAT", f"{100 * closed.share:.0f} %"))
    if bits := _get(summary, "packed", "stored_bits_per_weight"):
        found.append(("bits per weight, blocks", f"{bits:.3f}"))
    if bits := _get(summary, "packed", "whole_model_bits_per_weight"):
        found.append(("bits per weight, whole model", f"{bits:.3f}"))
    return found


def _about(summary: Summary) -> list[tuple[str, str]]:
    """What the results belong to: model, size, text, tokens, time and place."""
    found = []
    sizes = _get(summary, "parameters") or {}
    if sizes.get("total"):
        found.append(("model", f"{summary.get('model', '')}: {number(sizes['total'])} parameters, "
                               f"{number(sizes['quantised'])} of them quantised".lstrip(": ")))
    if packed := _get(summary, "packed"):
        if whole := packed.get("whole_model_bits_per_weight"):
            found.append((
                "bits per weight",
                f"{packed['stored_bits_per_weight']:.3f} in the quantised blocks, {whole:.3f} over "
                f"the whole model ({packed['whole_model_ratio']:.2f} times smaller than bfloat16)"))
        if packed.get("bytes"):
            dense = _get(summary, "dense", "bytes")
            found.append(("size", f"{number(packed['bytes'])} bytes packed, with the header of the "
                                  f"file, {number(dense)} bytes dense in 16 bits"))
    if paths := summary.get("k"):
        found.append(("sign paths", "; ".join(
            f"{path.removeprefix('layers/').removesuffix('/kernel')} "
            f"{''.join(map(str, own))}" for path, own in paths.items())
            + " (a digit for each layer, shared out by init.budget)"))
    if context := next((c for m in _MODELS if (c := _get(summary, m, "context"))), None):
        found.append(("context", f"{number(context)} tokens, of every perplexity here"))
    if tokens := summary.get("tokens"):
        found.append(("tokens", ", ".join(f"{k} {number(n)}" for k, n in tokens.items() if n)))
    found += [(key, summary[key]) for key in ("data", "date", "device") if summary.get(key)]
    if versions := summary.get("versions"):
        found.append(("versions", ", ".join(f"{k} {v}" for k, v in versions.items())))
    return found


def _correlation(summary: Summary) -> tuple[float, float] | None:
    """The mean path correlation at init and after QAT, where it has risen and stayed negative."""
    init, qat = (_get(summary, "diagnostics", stage, "mean", "path_correlation")
                 for stage in ("init", "qat"))
    return (init, qat) if init is not None and qat is not None and init < qat < 0 else None


def _results(rows: Sequence[ResultRow]) -> Table:
    """The rows' keys in order of appearance are the columns."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    columns = [_HEADINGS.get(key, key.replace("_", " ")) for key in keys]
    return Table(columns, [[_cell(key, row.get(key)) for key in keys] for row in rows])


def _cell(key: str, value: Any) -> str:
    if key == "ppl_over_teacher" and value is not None:
        return f"{100 * value:+,.1f} %"
    return _fixed(value, _DECIMALS[key]) if key in _DECIMALS else number(value)


def _fixed(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:,.{decimals}f}"


def _panels(lines: Lines, panels: Iterable[Panel]) -> list[str]:
    """One figure for each panel that the lines have values for."""
    # The speed of the first step is recorded as 0, because it is not measured.
    timed = [line for line in lines if line.get("tokens_per_second") != 0]
    curves = (
        (title, unit, curve(timed if key == "tokens_per_second" else lines, key), key != "lr")
        for key, title, unit in panels
    )
    return [over_tokens(*panel) for panel in curves if panel[2][0]]


def _diagnostics(summary: Summary) -> Table:
    """The mean of each diagnostic over all layers, by stage."""
    stages = {label: _get(summary, "diagnostics", key) for key, label in _STAGES.items()}
    means = {label: _get(found, "mean") or {} for label, found in stages.items() if found}
    rows = [
        [title, *(_fixed(mean.get(key), 4) for mean in means.values())]
        for key, title in DIAGNOSTICS.items()
    ]
    return Table(["mean over all layers", *means], rows if means else [])


def _by_layer(summary: Summary) -> list[str]:
    init, qat = (_get(summary, "diagnostics", stage, "layers") for stage in ("init", "qat"))
    if not init and not qat:
        return []
    return [by_layer(title[0].upper() + title[1:], key, init, qat)
            for key, title in DIAGNOSTICS.items()]  # fmt: skip


def _sizes(summary: Summary) -> Table:
    packed = _get(summary, "packed") or {}
    if not packed.get("bytes"):
        return Table([], [])
    rows = [[title, _fixed(packed[key], 4)] for key, title in _SIZES if packed.get(key)]
    rows.append(["packed model with its header, bytes", number(packed["bytes"])])
    rows.append(["dense model, bytes", number(_get(summary, "dense", "bytes"))])
    return Table(["", ""], rows)


def _bars(dense: int, packed: int) -> list[tuple[str, str, str]]:
    """Name, megabytes and width in per cent of the page of the dense and the packed model."""
    sizes, whole = {"dense": dense, "packed": packed}, max(dense, packed)
    return [(name, number(n / 1e6), f"{55 * n / whole:.1f}") for name, n in sizes.items()]


def _made(summary: Summary) -> list[tuple[str, str]]:
    """Name and value of what it takes to make the run again."""
    found = [(key, number(summary[key])) for key in ("command", "seed") if key in summary]
    if peak := summary.get("peak_memory_bytes"):
        found.append(("peak memory", f"{peak / 2**30:.2f} GiB"))
    for key, unit in (("seconds", " s"),):
        if values := summary.get(key):
            pairs = (f"{name} {number(value)}{unit}" for name, value in values.items())
            found.append((key, ", ".join(pairs)))
    return found


def _get(tree: Summary, *keys: str) -> Any:
    """What lies under the keys; None where one of them is missing or null."""
    found: Any = tree
    for key in keys:
        found = (found or {}).get(key)
    return found
