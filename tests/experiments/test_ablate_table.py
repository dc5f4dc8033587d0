"""The numbers of an ablation's tables, by hand, and the pages they stand on."""

import csv
import io
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from rabit_jax.experiments import ablate
from rabit_jax.experiments.ablation.cells import make_plan
from rabit_jax.experiments.ablation.figures import band
from rabit_jax.experiments.ablation.results import (
    METRICS,
    choose,
    collect,
    comparisons,
    estimate,
)
from rabit_jax.experiments.ablation.runner import lookup
from rabit_jax.experiments.engine.config import dump_yaml

SEEDS = (0, 1, 2)
CONFIG = {
    "name": "by <hand>",
    "run": {"teacher": {"path": "/models/none"}},
    "rows": {"a": [], "b | <i>$x$</i>": ["qat.gamma=0"], "_c": ["qat.gamma=2"]},
    "single": {"only": ["qat.gamma=3"]},
    "compare": {"a over b": ["a", "b | <i>$x$</i>"], "c over a": ["_c", "a"]},
}
PPL = {"a": (44.0, 46.0, 51.0), "b | <i>$x$</i>": (52.0, 50.0, 60.0), "_c": (40.0, None, 43.0)}
PPL["only"] = (70.0,)


def summary(ppl):
    return {
        "teacher": {"ppl": 32.0, "context": 128, "unseen": {"ppl": 41.0}},
        "init": {"ppl": 500.0},
        "qat": {"ppl": ppl, "context": 128, "kl": None, "unseen": {"ppl": ppl + 10}},
        "gap_closed": 0.875,
        "diagnostics": {"qat": None},
        "state_bytes": 12_300_000,
        "packed": {"bits_per_weight": 2.1875, "stored_bits_per_weight": 2.25,
                   "whole_model_bits_per_weight": 5.4375},
        "tokens": {"qat": 1000},
        "seconds": {"init": 1.0, "qat": 3599.0},
        "device": "abacus",
        "versions": {"python": "3.11.7"},
    }


def leave(cell, found):
    """What a complete run leaves, as far as the tables look."""
    cell.folder.mkdir(parents=True)
    (cell.folder / "config.yaml").write_text(dump_yaml(cell.config))
    cell.file.write_text(dump_yaml(cell.config))
    (cell.folder / "summary.json").write_text(json.dumps(found))
    lines = [
        {"stage": "diagnostics", "step": s, "tokens": 100 * s, "nats_per_token": 4 + 1 / s,
         "path_correlation": -0.1 * s, "residual_alignment": None}
        for s in (1, 2, 3)
    ]  # fmt: skip
    lines.insert(0, {"stage": "qat", "step": 1, "tokens": 100, "loss": 1.0})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (cell.folder / "metrics.jsonl").write_text(text)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    file = folder / "ablation.yaml"
    config = CONFIG | {"output": str(folder / "runs")}
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    made = make_plan(file)
    for cell in made.cells({}):
        if (ppl := PPL[cell.row][cell.seed]) is not None:
            leave(cell, summary(ppl))
    return made


@pytest.fixture(scope="module")
def page(plan):
    """Folder of the tables, made with --table."""
    file = Path(plan.ablation.output).parent / "ablation.yaml"
    assert ablate.main(["--config", str(file), "--table"], [sys.executable, "-c", "1/0"]) == 0
    return plan.folder


def test_the_interval_is_students():
    # t_{0.975} is 4.30265 for two degrees of freedom and 12.7062 for one.
    found = estimate([44.0, 46.0, 51.0])
    assert (found.mean, found.n) == (47.0, 3)
    assert found.half == pytest.approx(4.30265 * math.sqrt((9 + 1 + 16) / 2) / math.sqrt(3), 1e-5)
    assert estimate([1.0, None, 3.0]).half == pytest.approx(12.7062 * math.sqrt(2 / 2), 1e-5)
    assert estimate([5.0]).half is None and estimate([None]) is None
    assert estimate([0.1, 0.1, 0.1]).half == 0
    assert math.isinf(estimate([1.0, math.inf]).mean) and estimate([1.0, math.inf]).half is None


def test_a_key_that_is_not_there_is_none():
    found = summary(44.0)
    assert lookup(found, "qat.unseen.ppl") == 54.0
    for key in ("qat.kl", "qat.unseen.x", "diagnostics.qat.mean.slope", "cost.bytes", "device"):
        assert lookup(found, key) is None


def test_comparisons_are_paired_over_the_seeds_that_both_have(plan):
    over_b, over_a = comparisons(collect(plan))
    ours, theirs = math.log(44 * 46 * 51 / 32**3), math.log(52 * 50 * 60 / 32**3)
    assert over_b.gap_closed.share == pytest.approx(1 - ours / theirs)
    assert over_b.gap_closed.low < over_b.gap_closed.share < over_b.gap_closed.high
    assert over_b.difference.mean == pytest.approx(math.log(44 * 46 * 51 / (52 * 50 * 60)) / 3)
    assert over_b.gap_closed.n == 3
    # Seeds 0 and 2: the interval of two numbers is 12.7062 times half their distance.
    low, high = sorted(math.log(c / a) for c, a in ((40, 44), (43, 51)))
    assert over_a.difference.n == 2
    assert over_a.difference.mean == pytest.approx((low + high) / 2)
    assert over_a.difference.half == pytest.approx(12.7062 * (high - low) / 2, 1e-5)
    unseen = 1 - math.log(50 * 53 / 41**2) / math.log(54 * 61 / 41**2)
    assert over_a.unseen_gap_closed.share == pytest.approx(unseen)


def test_a_baseline_at_the_teacher_leaves_nothing_to_close(plan):
    same = make_plan(Path(plan.ablation.output).parent / "ablation.yaml")
    results = collect(same)
    cells = [(cell, summary(32.0) if cell.row == "a" else found) for cell, found in results.cells]
    found = comparisons(type(results)(same, {}, [], cells))[1]
    assert found.gap_closed is None and found.difference.n == 2


def test_a_seed_whose_baseline_beats_the_teacher_counts_and_does_not_explode(plan):
    # Gaps of the baseline: 0.1, 0.1 and, below the teacher, -0.001: a mean of ratios would be -30.
    ppl = {"a": (33.6, 33.6, 33.0), "b | <i>$x$</i>": (35.3, 35.3, 31.97)}
    results = collect(plan)
    cells = [(cell, summary(ppl[cell.row][cell.seed]) if cell.row in ppl else found)
             for cell, found in results.cells]
    closed = comparisons(type(results)(plan, {}, [], cells))[0].gap_closed
    gaps = [np.log(np.array(values) / 32) for values in ppl.values()]
    assert closed.n == 3
    assert closed.share == pytest.approx(1 - gaps[0].mean() / gaps[1].mean())


def test_the_search_takes_the_lowest_finite_perplexity(tmp_path):
    file = tmp_path / "ablation.yaml"
    search = {"values": [1e-3, 3e-3, 1e-2], "steps": 0.25}
    config = CONFIG | {"output": str(tmp_path), "search": search}
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    made = make_plan(file)
    found = {"a": (50, 45, 46), "_c": (60, math.nan, 44)}
    for cell in made.trials():
        if cell.row in found:
            leave(cell, summary(found[cell.row][search["values"].index(cell.value)]))
    results = collect(made)
    assert results.chosen == {"a": 3e-3, "_c": 1e-2} == choose(results.trials)
    leave(made.cells(results.chosen)[0], summary(43.0))
    assert ablate.main(["--config", str(file), "--table"]) == 0
    text = (made.folder / "ablation.md").read_text()
    assert "| a | 50.00 | 45.00 | 46.00 | 0.003 |" in text
    assert "| _c | 60.00 | nan | 44.00 | 0.01 (edge) |" in text
    assert "a wider search may do better" in text and "after 0.25 of the steps of QAT" in text
    assert "| only | 0 (single) |" in text and "seed 1: its search has no result" in text


def test_markdown_has_every_number(page):
    text = (page / "ablation.md").read_text()
    for line in (
        "## Results, context 128",
        "| a | 3 | 47.00 ± 8.96 | 57.00 ± 8.96 | 500.00 | 86.1 (79.2 to 92.9) | 0.001 |",
        "![](figures/rows.svg)",
        "Intervals cover the seeds alone",
        "| b \\| &lt;i>$x$&lt;/i> | 3 | 54.00 ± 13.14 |",
        "| _c | 2 of 3 | 41.50 ± 19.06 |",
        "| only | 1 (single) | 70.00 |",
        "| teacher, full precision | - | 32.00 | 41.00 |",
        "| row | seeds | bits per weight, blocks | bits per weight, whole model |",
        "| a | 3 | 2.2500 | 5.4375 | 2.1875 | 12.3 |",
        "1 of 10 cells are missing.",
        "- _c, seed 1: not begun",
        "- QAT tokens per cell: 1,000",
        "- time of all cells: 32,400 s",
        "- device: abacus",
        "![](figures/perplexity.svg)",
    ):
        assert line in text, line
    # Nothing was measured for these columns and sections.
    for words in ("KL to the teacher", "share the work", "Search over", "lookups"):
        assert words not in text


def test_csv_has_a_line_per_complete_cell(page):
    rows = list(csv.DictReader(io.StringIO((page / "ablation.csv").read_text())))
    assert list(rows[0]) == ["row", "seed", "kind", "value", *METRICS]
    found = [(row["row"], row["seed"], float(row["qat.ppl"])) for row in rows]
    wanted = [
        (row, str(seed), values[seed])
        for seed in SEEDS
        for row, values in PPL.items()
        if seed < len(values) and values[seed] and row != "only"
    ]
    assert found == [*wanted, ("only", "0", 70.0)]
    assert rows[0]["packed.whole_model_bits_per_weight"] == "5.4375"
    assert rows[0]["qat.kl"] == "" and rows[0]["state_bytes"] == "12300000"


class Page(HTMLParser):
    """Text per section, tags and links, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.section, self.tags, self.links, self.text = [], "top", [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.links += [v for k, v in attrs.items() if k in ("href", "src", "xlink:href")]
        self.section = attrs["id"] if tag == "section" else self.section
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text[self.section] = self.text.get(self.section, "") + data + " "


def test_html_is_one_file_that_loads_nothing(page):
    text = (page / "ablation.html").read_text(encoding="utf-8")
    read = Page(text)
    assert not {"script", "link", "img", "i"} & set(read.tags)
    assert all(link.startswith("#") for link in read.links)
    assert set(re.findall(r"https?://[\w./]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert "by <hand>" in read.text["top"] and "47.00 ± 8.96" in read.text["results"]
    assert "b | <i>$x$</i>" in read.text["results"] and "$x$" in read.text["figures"]
    for name in ("cost", "compare", "missing", "made"):
        assert read.text[name]
    assert "bits per weight, whole model" in read.text["cost"] and "5.4375" in read.text["cost"]


def test_figures_are_of_what_was_measured(page):
    found = {path.name for path in (page / "figures").iterdir()}
    assert found == {"rows.svg", "perplexity.svg", "correlation.svg", "bits.svg"}
    rows = (page / "figures" / "rows.svg").read_text()
    assert [rows.index(f">{label}<") for label in ("a", "_c", "only", "teacher")]
    assert rows.count("70.0 →") == 0 and "open dot: one seed" in rows
    html = (page / "ablation.html").read_text(encoding="utf-8")
    assert html.index("Perplexity of every row") < html.index("47.00 ± 8.96")
    text = (page / "figures" / "perplexity.svg").read_text()
    for label in ("&lt;i&gt;", "_c", "only"):
        assert label in text
    assert len(set(re.findall(r"stroke: (#\w{6}); stroke-width: 1.5", text))) >= 3


def test_a_band_has_the_tokens_that_all_seeds_have():
    lines = [
        [{"tokens": t, "nats_per_token": math.log(ppl)} for t, ppl in seed.items()]
        for seed in ({1: 80, 2: 40, 3: 20}, {1: 60, 3: 30, 4: 10}, {})
    ]
    tokens, values = band(lines, "nats_per_token")
    np.testing.assert_array_equal(tokens, [1, 3])
    np.testing.assert_allclose(values, [[80, 20], [60, 30]])
    assert band(lines, "flip_rate") is None and band([], "flip_rate") is None


def test_cells_of_task_ptq_show_what_tuning_made(tmp_path):
    """The packed model where it was scored, the tuned one where not."""
    config = {
        "name": "tuned", "output": str(tmp_path / "runs"), "seeds": [0, 1],
        "run": {"task": "ptq", "teacher": {"path": "/models/none"},
                "tune": {"epochs": 1, "optimizer": {"name": "relative", "lr": 0.25}}},
        "rows": {"a": [], "b": ["init.spec.k=3"]},
    }  # fmt: skip
    file = tmp_path / "ablation.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    made = make_plan(file)
    for cell in made.cells({}):
        found = {name: value for name, value in summary(1.0).items() if name != "qat"}
        found |= {"task": "ptq", "qat": None, "tuned": {"ppl": 40.0 + 2 * cell.seed, "context": 8}}
        if cell.row == "b":
            found["packed"] = {**found["packed"], "ppl": 34.0 + 2 * cell.seed, "context": 8}
        leave(cell, found)
    results = collect(made)
    assert results.estimate("a", "qat.ppl").mean == 41.0
    assert results.estimate("b", "qat.ppl").mean == 35.0
    closed = 1 - math.log(35.0 / 32) / math.log(500 / 32)
    assert results.estimate("b", "gap_closed").mean == pytest.approx(closed, rel=1e-3)
    assert ablate.main(["--config", str(file), "--table"]) == 0
    text = (made.folder / "ablation.md").read_text()
    assert "Results, context 8" in text and "0.25" in text
    assert "gap closed by training" in text
