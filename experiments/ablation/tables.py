"""The tables of an ablation, as sections, in Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rabit_jax.experiments.ablation.cells import Row
from rabit_jax.experiments.ablation.results import (
    METRICS,
    Estimate,
    Results,
    Summary,
    comparisons,
    lookup,
)
from rabit_jax.experiments.ablation.runner import described, last_line
from rabit_jax.experiments.engine.config import to_dict
from rabit_jax.progress import number

LR = "qat.optimizer.lr"


@dataclass(frozen=True)
class Column:
    """A metric as the tables show it: its title, key, number format and unit."""

    title: str
    key: str
    form: str
    scale: float = 1.0


@dataclass
class Section:
    """A heading with what stands below it; everything is plain text.

    Attributes:
      name: id in HTML.
      title: heading.
      columns: of the table.
      rows: of the table; none leaves it out.
      notes: paragraphs.
      points: list items.
    """

    name: str
    title: str
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    points: list[str] = field(default_factory=list)

RESULTS = (
    Column("perplexity", "qat.ppl", ".2f"),
    Column("unseen perplexity", "qat.unseen.ppl", ".2f"),
    Column("bits per byte", "qat.bits_per_byte", ".4f"),
    Column("unseen bits per byte", "qat.unseen.bits_per_byte", ".4f"),
    Column("KL to the teacher, nats", "qat.kl", ".4f"),
    Column("perplexity at init", "init.ppl", ".2f"),
    Column("gap closed, %", "gap_closed", ".1f", 100),
)
DIAGNOSTICS = (
    Column("path correlation", "diagnostics.qat.mean.path_correlation", ".4f"),
    Column("residual alignment", "diagnostics.qat.mean.residual_alignment", ".4f"),
    Column("slope", "diagnostics.qat.mean.slope", ".4f"),
    Column("relative MSE", "diagnostics.qat.mean.relative_mse", ".4f"),
    Column("signs flipped per step, %", "flip_rate", ".4f", 100),
)
COST = (
    Column("bits per weight", "packed.bits_per_weight", ".4f"),
    Column("stored bits per weight", "packed.stored_bits_per_weight", ".4f"),
    Column("training state, MB", "state_bytes", ".1f", 1e-6),
    Column("peak memory, GB", "training_memory_bytes", ".2f", 1e-9),
    Column("seconds per step", "step_seconds", ".3f"),
    Column("multiplications, M", "cost.multiplications", ".3f", 1e-6),
    Column("additions, M", "cost.additions", ".3f", 1e-6),
    Column("lookups, M", "cost.lookups", ".3f", 1e-6),
    Column("weight bytes, MB", "cost.bytes", ".3f", 1e-6),
)


def sections(results: Results, command: str) -> list[Section]:
    """Everything that the report says, in order; what the ablation has not is left out."""
    found = [
        _results(results),
        _metrics(results, Section("paths", "How the paths share the work"), DIAGNOSTICS),
        _metrics(results, Section("cost", "Cost"), COST),
        _comparisons(results),
        _search(results),
        _missing(results),
        _made(results, command),
    ]
    notes = {
        "paths": "Means over all layers after QAT, measured on what enters each linear in the "
        "teacher; the share of signs flipped is the mean over the watched steps.",
        "cost": "Operations and bytes of weights are per token, over the quantised linears. Memory "
        "is the peak of the training process; time per step is on the device named below, with as "
        "many cells at once as --jobs allowed.",
    }
    for section in found:
        if section and section.name in notes:
            section.notes.append(notes[section.name])
    return [section for section in found if section]


def shown(found: Estimate | None, column: Column) -> str:
    """`mean +- half` in the column's format and unit; `-` where there is nothing."""
    if found is None:
        return "-"
    half = f" ± {found.half * column.scale:{column.form}}" if found.half else ""
    return f"{found.mean * column.scale:{column.form}}{half}"


def _metrics(results: Results, section: Section, columns: Sequence[Column]) -> Section | None:
    """One line per row; columns that no row has a number for are left out."""
    rows = results.plan.rows
    found = {
        column: [results.estimate(row.label, column.key) for row in rows] for column in columns
    }
    kept = [column for column in columns if any(found[column])]
    if not kept:
        return None
    section.columns = ["row", "seeds", *(column.title for column in kept)]
    for place, row in enumerate(rows):
        numbers = (shown(found[column][place], column) for column in kept)
        section.rows.append([row.label, _seeds(results, row), *numbers])
    return section


def _seeds(results: Results, row: Row) -> str:
    count, wanted = len(results.of(row.label)), len(results.plan.ablation.seeds)
    if row.single:
        return f"{count} (single)"
    return str(count) if count == wanted else f"{count} of {wanted}"


def _results(results: Results) -> Section:
    section = Section("results", "Results")
    if not _metrics(results, section, RESULTS):
        section.notes.append("No cell is complete yet.")
        return section
    contexts = {lookup(summary, "qat.context") for summary in results.every()} - {None}
    if contexts:
        section.title += f", context {', '.join(f'{c:g}' for c in sorted(contexts))}"
    search = results.plan.ablation.search
    for key in dict.fromkeys([LR, *([search.key] if search else [])]):
        section.columns.append("learning rate" if key == LR else key)
        for line, row in zip(section.rows, results.plan.rows, strict=True):
            line.append(_setting(results, row, key))
    section.rows.insert(0, _teacher(results.every(), section.columns))
    section.notes.append(
        "Means over the seeds ± half of the 95% interval of Student's t over them; without ± there "
        "is one seed, or all are equal."
    )
    if any(row.single for row in results.plan.rows):
        also = " and without a search" if search else ""
        section.notes.append(f"single: run with the first seed only{also}, so it has no interval.")
    if any(results.edge(row) for row in results.plan.rows):
        section.notes.append(
            "edge: the best of the searched values is the smallest or the largest of them; a wider "
            "search may do better."
        )
    return section


def _setting(results: Results, row: Row, key: str) -> str:
    """A setting of a row; where the search chooses it, its choice."""
    search, value = results.plan.ablation.search, results.chosen.get(row.label)
    if search and row.trials and key == search.key and value is None:
        return "-"
    found = to_dict(row.configs.get(value, row.config))
    for name in key.split("."):
        found = found[name]
    edge = search and key == search.key and results.edge(row)
    return (f"{found:g}" if isinstance(found, float) else str(found)) + (" (edge)" if edge else "")


def _teacher(summaries: Iterable[Summary], columns: Sequence[str]) -> list[str]:
    """The line of the full-precision model; a number that differs between cells is left out."""
    keys = {column.title: column for column in RESULTS if column.key.startswith("qat.")}
    line = ["teacher, full precision", "-"]
    for title in columns[2:]:
        column = keys.get(title)
        key = column.key.replace("qat.", "teacher.") if column else ""
        values = {lookup(summary, key) for summary in summaries} - {None}
        line.append(shown(Estimate(values.pop(), None, 1), column) if len(values) == 1 else "-")
    return line


def _comparisons(results: Results) -> Section | None:
    share, gap = Column("", "", ".1f", 100), Column("", "", ".4f")
    found = comparisons(results)
    if not found:
        return None
    unseen = any(c.unseen_difference for c in found)
    section = Section("compare", "Comparisons, paired over seeds")
    section.columns = ["comparison", "row", "baseline", "seeds", "gap closed, %", "ln perplexity"]
    section.columns += ["unseen gap closed, %", "unseen ln perplexity"] if unseen else []
    for c in found:
        line = [c.label, c.row, c.baseline, str(c.difference.n if c.difference else 0)]
        line += [shown(c.share, share), shown(c.difference, gap)]
        line += [shown(c.unseen_share, share), shown(c.unseen_difference, gap)] if unseen else []
        section.rows.append(line)
    section.notes.append(
        "gap closed: of the log-perplexity gap to the teacher that the baseline leaves, the share "
        "that the row closes. ln perplexity: the row's minus the baseline's; negative is better."
    )
    return section


def _search(results: Results) -> Section | None:
    search = results.plan.ablation.search
    if not search or not results.trials:
        return None
    seed, form = results.plan.ablation.seeds[0], Column("", "", ".2f")
    section = Section("search", f"Search over {search.key}")
    section.columns = ["row", *(f"{value:g}" for value in search.values), "chosen"]
    found = {(cell.row, cell.value): summary for cell, summary in results.trials}
    for row in results.plan.rows:
        if row.trials:
            values = (lookup(found[row.label, value], "qat.ppl") for value in search.values)
            cells = [shown(None if v is None else Estimate(v, None, 1), form) for v in values]
            section.rows.append([row.label, *cells, _setting(results, row, search.key)])
    section.notes.append(
        f"Held-out perplexity after {search.steps:g} of the steps of QAT, seed {seed}; the lowest "
        "is used for all seeds of the row."
    )
    return section


def _missing(results: Results) -> Section:
    section = Section("missing", "Missing cells")
    cells = [*results.trials, *results.cells]
    for cell, found in cells:
        if not found:
            said = last_line(cell)
            why = f"{cell.folder} ends with: {said}" if said else "not begun"
            why = why if cell.config else "its search has no result"
            section.points.append(f"{described(cell)}: {why}")
    section.notes.append(
        f"{len(section.points)} of {len(cells)} cells are missing."
        if section.points
        else f"None: all {len(cells)} are complete."
    )
    return section


def _made(results: Results, command: str) -> Section:
    """Command, seeds, tokens, time, device and versions."""
    summaries, plan = results.every(), results.plan
    cells = [found for _, found in results.cells if found]
    facts = {"command": command, "seeds": ", ".join(map(str, plan.ablation.seeds))}
    qat = sorted({lookup(s, "tokens.qat") for s in cells} - {None})
    facts["QAT tokens per cell"] = ", ".join(map(number, qat))
    if plan.teacher:
        t = plan.teacher.config.teacher
        facts["teacher tokens"] = number(t.steps * t.batch_size * t.length)
    else:
        facts["teacher"] = plan.ablation.run.teacher.path
    seconds = sum(
        sum(s["seconds"].values()) for s in summaries if isinstance(s.get("seconds"), dict)
    )
    facts["time of all cells"] = f"{seconds:,.0f} s" if seconds else ""
    facts["device"] = "; ".join(sorted({s["device"] for s in summaries if s.get("device")}))
    versions = (s.get("versions") or {} for s in summaries)
    named = dict.fromkeys(f"{name} {value}" for found in versions for name, value in found.items())
    facts["versions"] = ", ".join(sorted(named))
    points = [f"{name}: {value}" for name, value in facts.items() if value]
    return Section("made", "How this was made", points=points)


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
