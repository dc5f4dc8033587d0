"""The tables of an ablation, and the pages that show them: Markdown, HTML and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rabit_jax.experiments.ablation.cells import Row
from rabit_jax.experiments.ablation.results import (
    METRICS,
    Estimate,
    Results,
    as_estimate,
    comparisons,
)
from rabit_jax.experiments.ablation.runner import Summary, cell_name, last_line, lookup
from rabit_jax.experiments.engine.config import to_dict
from rabit_jax.experiments.report.page import TEMPLATES
from rabit_jax.formats.rendering import environment
from rabit_jax.progress import number

LEARNING_RATES = {"qat": "qat.optimizer.lr", "ptq": "tune.optimizer.lr"}  # by task


@dataclass(frozen=True)
class Column:
    """A metric as a column shows it: its title, key, number format, and factor to its unit."""

    title: str
    key: str
    form: str
    scale: float = 1.0

    def text(self, found: Estimate | None) -> str:
        """`mean +- half`, or `mean (low to high)`, in the column's format and unit; `-` where
        there is nothing."""
        if found is None:
            return "-"
        if found.ends:
            low, high = (f"{end * self.scale:{self.form}}" for end in found.ends)
            return f"{found.mean * self.scale:{self.form}} ({low} to {high})"
        half = f" ± {found.half * self.scale:{self.form}}" if found.half else ""
        return f"{found.mean * self.scale:{self.form}}{half}"

    def single(self, value: float | None) -> str:
        """One number, without an interval."""
        return self.text(None if value is None else Estimate(value, None, 1))


@dataclass
class Table:
    """A titled table with what stands below it; everything is plain text.

    Attributes:
      name: its id in HTML.
      title: its heading.
      columns: headings of the columns.
      rows: cells; without any only notes and facts are shown.
      notes: paragraphs.
      facts: pairs of a name and a value.
    """

    name: str
    title: str
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)


RESULTS = (
    Column("perplexity", "qat.ppl", ".2f"),
    Column("unseen perplexity", "qat.unseen.ppl", ".2f"),
    Column("bits per byte", "qat.bits_per_byte", ".4f"),
    Column("unseen bits per byte", "qat.unseen.bits_per_byte", ".4f"),
    Column("KL to the teacher, nats", "qat.kl", ".4f"),
    Column("perplexity at init", "init.ppl", ".2f"),
    Column("gap closed by training, %", "gap_closed", ".1f", 100),
)
COVERED = (
    "Intervals cover the seeds alone: all cells share one teacher, one training text and one set "
    "of evaluation windows, whose choice they say nothing about."
)
GAP = (
    "gap closed = 1 - mean(ln ppl of the model - ln ppl of the teacher) / mean(ln ppl of the start "
    "- ln ppl of the teacher), means over the seeds, all of them; in parentheses Fieller's 95% "
    "interval of this ratio of means, where it is bounded. "
)
DIAGNOSTICS = (
    Column("path correlation", "diagnostics.qat.mean.path_correlation", ".4f"),
    Column("residual alignment", "diagnostics.qat.mean.residual_alignment", ".4f"),
    Column("slope", "diagnostics.qat.mean.slope", ".4f"),
    Column("relative MSE", "diagnostics.qat.mean.relative_mse", ".4f"),
    Column("signs flipped per step, %", "flip_rate", ".4f", 100),
)
COST = (
    Column("bits per weight, blocks", "packed.stored_bits_per_weight", ".4f"),
    Column("bits per weight, whole model", "packed.whole_model_bits_per_weight", ".4f"),
    Column("bits per weight, blocks, nominal", "packed.bits_per_weight", ".4f"),
    Column("training state, MB", "state_bytes", ".1f", 1e-6),
    Column("peak memory, GB", "training_memory_bytes", ".2f", 1e-9),
    Column("seconds per step", "step_seconds", ".3f"),
    Column("multiplications, M", "cost.multiplications", ".3f", 1e-6),
    Column("additions, M", "cost.additions", ".3f", 1e-6),
    Column("lookups, M", "cost.lookups", ".3f", 1e-6),
    Column("weight bytes, MB", "cost.bytes", ".3f", 1e-6),
)


def report_tables(results: Results, command: str) -> list[Table]:
    """All tables of the report in order, without those that the ablation has no numbers for."""
    paths = Table("paths", "How the paths share the work", notes=[
        "Means over all layers after training, measured on the inputs that each linear layer "
        "receives in the teacher. The share of signs flipped is the mean over the watched steps."
    ])  # fmt: skip
    cost = Table("cost", "Cost", notes=[
        "Bits per weight of the blocks count the padding of the file, nominal ones do not; those "
        "of the whole model count embedding, head and norms too. "
        "Operations and bytes of weights are per token, over the quantised linear layers. Memory "
        "is the peak of the training process. Time per step is that of the device named below, "
        "with as many cells at once as --jobs allowed."
    ])  # fmt: skip
    tables = [
        results_table(results),
        paths if _fill(paths, results, DIAGNOSTICS) else None,
        cost if _fill(cost, results, COST) else None,
        _comparison_table(results),
        _search_table(results),
        _missing_cells(results),
        _provenance(results, command),
    ]
    return [table for table in tables if table]


def results_table(results: Results) -> Table:
    """Perplexities of the teacher and of every row, with the settings that a search chose."""
    table = Table("results", "Results")
    if not _fill(table, results, RESULTS):
        table.notes.append("No cell is complete yet.")
        return table
    contexts = _values(results.summaries(), "qat.context")
    if contexts:
        table.title += f", context {', '.join(f'{context:g}' for context in contexts)}"
    search = results.plan.ablation.search
    rate = LEARNING_RATES[results.plan.ablation.run.task]
    for key in [rate] if search is None or search.key == rate else [rate, search.key]:
        table.columns.append("learning rate" if key == rate else key)
        for line, row in zip(table.rows, results.plan.rows, strict=True):
            line.append(_setting(results, row, key))
    cells = [found for _, found in results.cells if found]
    table.rows.insert(0, _teacher_row(cells, table.columns))
    table.notes += _result_notes(results)
    return table


def _fill(table: Table, results: Results, columns: Sequence[Column]) -> bool:
    """Give the table a line per row of the ablation; returns whether there is any number.

    Columns that no row has a number for are left out.
    """
    rows = results.plan.rows
    found = {
        column: [results.estimate(row.label, column.key) for row in rows] for column in columns
    }
    kept = [column for column in columns if any(found[column])]
    if not kept:
        return False
    table.columns = ["row", "seeds", *(column.title for column in kept)]
    for place, row in enumerate(rows):
        numbers = (column.text(found[column][place]) for column in kept)
        table.rows.append([row.label, _seeds(results, row), *numbers])
    return True


def _seeds(results: Results, row: Row) -> str:
    count, wanted = len(results.by_seed(row.label)), len(results.plan.ablation.seeds)
    if row.single:
        return f"{count} (single)"
    return str(count) if count == wanted else f"{count} of {wanted}"


def _result_notes(results: Results) -> list[str]:
    rows, search = results.plan.rows, results.plan.ablation.search
    notes = [
        "Means over the seeds ± half of their 95% interval (Student's t). Without ± there is one "
        f"seed, or all seeds give the same number. {COVERED}",
        f"{GAP}The start of gap closed by training is the row's own init.",
    ]
    if any(row.single for row in rows):
        also = " and without a search" if search else ""
        notes.append(f"single: run with the first seed only{also}, so there is no interval.")
    if any(results.at_edge(row) for row in rows):
        notes.append(
            "edge: the best of the searched values is the smallest or the largest of them; a wider "
            "search may do better."
        )
    return notes


def _setting(results: Results, row: Row, key: str) -> str:
    """A setting of a row; where the search chooses it, its choice."""
    search, value = results.plan.ablation.search, results.chosen.get(row.label)
    searched = search is not None and key == search.key
    if searched and row.trials and value is None:
        return "-"
    found = to_dict(row.configs.get(value, row.config))
    for name in key.split("."):
        found = found[name]
    text = f"{found:g}" if isinstance(found, float) else str(found)
    return f"{text} (edge)" if searched and results.at_edge(row) else text


def _teacher_row(summaries: Sequence[Summary], columns: Sequence[str]) -> list[str]:
    """The line of the full-precision model; a number that differs between cells is left out."""
    by_title = {column.title: column for column in RESULTS if column.key.startswith("qat.")}
    line = ["teacher, full precision", "-"]
    for title in columns[2:]:
        column = by_title.get(title)
        values = _values(summaries, column.key.replace("qat.", "teacher.")) if column else []
        line.append(column.single(values[0]) if column and len(values) == 1 else "-")
    return line


def _values(summaries: Iterable[Summary], key: str) -> list[float]:
    """The different numbers under a key, ascending."""
    found = (lookup(summary, key) for summary in summaries)
    return sorted({value for value in found if value is not None})


def _comparison_table(results: Results) -> Table | None:
    share, gap = Column("", "", ".1f", 100), Column("", "", ".4f")
    found = comparisons(results)
    if not found:
        return None
    unseen = any(c.unseen_difference for c in found)
    table = Table("compare", "Comparisons, paired over seeds")
    closed = "gap closed of the baseline, %"
    table.columns = ["comparison", "row", "baseline", "seeds", closed, "ln perplexity"]
    table.columns += [f"unseen {closed}", "unseen ln perplexity"] if unseen else []
    for c in found:
        line = [c.label, c.row, c.baseline, str(c.difference.n if c.difference else 0)]
        line += [share.text(as_estimate(c.gap_closed)), gap.text(c.difference)]
        if unseen:
            line += [share.text(as_estimate(c.unseen_gap_closed)), gap.text(c.unseen_difference)]
        table.rows.append(line)
    table.notes.append(
        f"{GAP}The start of gap closed of the baseline is the baseline after QAT. ln perplexity: "
        f"the row's minus the baseline's; negative is better. {COVERED}"
    )
    return table


def _search_table(results: Results) -> Table | None:
    search, perplexity = results.plan.ablation.search, RESULTS[0]
    if not search or not results.trials:
        return None
    table = Table("search", f"Search over {search.key}")
    table.columns = ["row", *(f"{value:g}" for value in search.values), "chosen"]
    found = {(cell.row, cell.value): summary for cell, summary in results.trials}
    for row in results.plan.rows:
        if row.trials:
            values = (lookup(found[row.label, value], perplexity.key) for value in search.values)
            cells = map(perplexity.single, values)
            table.rows.append([row.label, *cells, _setting(results, row, search.key)])
    table.notes.append(
        f"Perplexity after {search.steps:g} of the steps of QAT with seed "
        f"{results.plan.ablation.search_seed}, on evaluation windows that no other table is made "
        "of. All seeds of a row use the value with the lowest."
    )
    return table


def _missing_cells(results: Results) -> Table:
    table = Table("missing", "Missing cells")
    cells = [*results.trials, *results.cells]
    for cell, found in cells:
        if not found:
            last = last_line(cell)
            why = f"{cell.folder} ends with: {last}" if last else "not begun"
            why = why if cell.config else "its search has no result"
            table.facts.append((cell_name(cell), why))
    table.notes.append(
        f"{len(table.facts)} of {len(cells)} cells are missing."
        if table.facts
        else f"None: all {len(cells)} are complete."
    )
    return table


def _provenance(results: Results, command: str) -> Table:
    """Command, seeds, tokens, time, device and versions."""
    summaries, plan = results.summaries(), results.plan
    facts = {"command": command, "seeds": ", ".join(map(str, plan.ablation.seeds))}
    qat = _values((found for _, found in results.cells if found), "tokens.qat")
    facts["QAT tokens per cell"] = ", ".join(map(number, qat))
    if plan.teacher:
        t = plan.ablation.run.teacher
        facts["teacher tokens"] = number(t.steps * t.batch_size * t.length)
    else:
        facts["teacher"] = plan.ablation.run.teacher.path
    seconds = sum(sum((summary.get("seconds") or {}).values()) for summary in summaries)
    facts["time of all cells"] = f"{seconds:,.0f} s" if seconds else ""
    facts["device"] = "; ".join(sorted({s["device"] for s in summaries if s.get("device")}))
    versions = ((s.get("versions") or {}).items() for s in summaries)
    names = {f"{name} {value}" for found in versions for name, value in found}
    facts["versions"] = ", ".join(sorted(names))
    return Table("made", "How this was made", facts=[fact for fact in facts.items() if fact[1]])


def page(
    kind: str, title: str, tables: Sequence[Table], figures: Mapping[str, str]
) -> str:
    """The report as one file: kind "md", which links `figures/NAME.svg`, or "html".

    `figures` are SVG by name; "rows" stands above the table of results, the others below it.
    """
    figures = dict(figures)
    first = figures.pop("rows", "")
    template = environment(Path(__file__).with_name("templates"), TEMPLATES).get_template
    return template(f"ablation.{kind}.j2").render(
        title=title, tables=tables, first=first, figures=figures
    )


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
