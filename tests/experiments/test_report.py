"""The report as a browser reads it: one file, sections, numbers, curves, and text kept text."""

import copy
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from rabit_jax.experiments.report.figures import by_layer, curve, over_tokens, weight_histogram
from rabit_jax.experiments.report.page import write_report

VOID = {"meta", "br", "img", "link", "input", "hr"}
SECTIONS = ["results", "teacher", "qat", "paths", "time", "weights", "bytes", "samples"]


class Page(HTMLParser):
    """Text and number of figures per section, links, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.section, self.tags, self.links = [], "top", [], []
        self.text, self.figures = {}, {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.links += [v for k, v in attrs.items() if k in ("href", "src", "xlink:href")]
        if tag == "section":
            self.section = attrs["id"]
        if tag == "figure":
            self.figures[self.section] = self.figures.get(self.section, 0) + 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "section":
            self.section = "top"

    def handle_data(self, data):
        if "style" not in self.open:
            self.text[self.section] = self.text.get(self.section, "") + data + " "


def diagnostics(shift):
    values = {
        name: {
            "path_correlation": [-0.2 - shift, -0.3],
            "residual_alignment": [0.5, 0.6 + shift],
            "slope": [0.9, 1.1],
            "relative_mse": [0.13, 0.12],
        }
        for name in ("layers/attn/q", "layers/mlp/down")
    }
    mean = {
        "path_correlation": -0.2512 - shift,
        "residual_alignment": 0.5678,
        "slope": 0.9876,
        "relative_mse": 0.1305,
    }
    return {"mean": mean, "layers": values}


SUMMARY = {
    "teacher": {"ppl": 10.0, "bits_per_byte": 1.25, "context": 128},
    "init": {"ppl": 40.0, "bits_per_byte": 2.0, "context": 128},
    "qat": {"ppl": 20.0, "bits_per_byte": 1.5, "context": 128},
    "packed": {
        "ppl": 20.01,
        "bits_per_byte": 1.51,
        "context": 128,
        "bits_per_weight": 2.1875,
        "stored_bits_per_weight": 2.25,
        "bytes": 2_000_000,
    },
    "dense": {"bytes": 9_000_000},
    "diagnostics": {"init": diagnostics(0.0), "qat": diagnostics(0.1)},
    "tokens": {"teacher": 1000, "qat": 2000},
    "seconds": {"teacher": 150.25, "qat": 99.5},
    "peak_memory_bytes": 3 * 2**30,
    "versions": {"python": "3.11.7", "jax": "0.10.2"},
    "seed": 17,
    "command": "python -m experiments.run --config <quick>.yaml",
}
METRICS = [
    {"stage": "teacher", "step": s, "tokens": 64 * s, "loss": 9.0 / s, "lr": 0.1 / s,
     "grad_norm": 1.0, "tokens_per_second": 0.0 if s == 1 else 9000.0}
    for s in range(1, 9)
] + [
    {"stage": "qat", "step": s, "tokens": 64 * s, "loss": 2.0 / s, "kl": 1.0 / s,
     "hidden_mse": 0.1 / s, "lr": 0.1 / s, "grad_norm": 1.0, "tokens_per_second": 5000.0}
    for s in range(1, 201)
] + [
    {"stage": "diagnostics", "step": s, "tokens": 64 * s, "path_correlation": -0.1 * s,
     "residual_alignment": 0.1 * s, "slope": 0.9, "relative_mse": 0.2, "flip_rate": 0.1**s}
    for s in range(1, 5)
]  # fmt: skip
HISTOGRAM = {
    "layer": "layers/attn/q[1]",
    "weights": [1, 5, 5, 1],
    "edges": [-2.0, -1.0, 0.0, 1.0, 2.0],
    "levels": [-1.51, -0.45, 0.45, 1.51],
}
SAMPLES = [
    {"prompt": "def f(", "teacher": "<script>alert('x')</script> & more", "packed": "a < b\n  c"},
]
TABLE = [
    {"name": "teacher", "ppl": 10.0, "bits_per_byte": 1.25, "ppl_over_teacher": 0.0},
    {"name": "half", "ppl": 1.5},
    {"name": "round-to-nearest", "ppl": 12345.678, "ppl_over_teacher": 0.0815},
]


def report(folder, summary=SUMMARY, metrics=METRICS, hist=HISTOGRAM, samples=SAMPLES, table=TABLE):
    path = write_report(folder, summary, metrics, hist, samples, table)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a report with everything in it, and the page."""
    folder = tmp_path_factory.mktemp("run <1>")
    return folder, report(folder)


def test_every_section_has_its_numbers_and_figures(whole):
    folder, page = whole
    assert set(SECTIONS) <= set(page.text)
    assert page.figures == {"teacher": 4, "qat": 6, "paths": 4, "time": 5, "weights": 1}
    wanted = {
        "top": [folder.name, "50 %", "python -m experiments.run --config <quick>.yaml", "17",
                "3.00 GiB", "jax 0.10.2", "teacher 150.2 s", "qat 2,000"],
        "results": ["perplexity", "bits per byte", "round-to-nearest", "12,345.68",
                    "over teacher", "+8.2 %", "teacher 10.00 1.250 +0.0 %", "half 1.50 - -"],
        "teacher": ["Teacher loss", "nats per token", "tokens", "Teacher gradient norm"],
        "qat": ["QAT loss", "KL to the teacher", "Hidden-state MSE"],
        "paths": ["-0.2512", "-0.3512", "0.5678", "0.1305", "Path correlation", "down"],
        "time": ["Slope over time", "Relative MSE over time", "Sign flips"],
        "weights": ["layers/attn/q[1]", "4 mean levels", "-1.51", "0.45", "weight / scale"],
        "bytes": ["2.1875", "2.2500", "2,000,000", "9,000,000", "4.50 times smaller"],
        "samples": ["def f(", "<script>alert('x')</script> & more", "a < b\n  c"],
    }  # fmt: skip
    for section, words in wanted.items():
        for word in words:
            assert word in page.text[section], (section, word)
    assert not any("Not in this report" in text for text in page.text.values())


def test_what_it_is_stands_on_top_and_samples_before_the_details(tmp_path):
    packed = SUMMARY["packed"] | {"whole_model_bits_per_weight": 7.25, "whole_model_ratio": 2.207}
    summary = SUMMARY | {
        "packed": packed, "model": "org/teacher", "data": "source=files", "device": "a GPU",
        "date": "2026-01-02T03:04:05+00:00", "parameters": {"total": 1_234_567, "quantised": 900},
    }
    text = (write_report(tmp_path, summary, METRICS, HISTOGRAM, SAMPLES, TABLE)).read_text()
    top = " ".join(Page(text).text["top"].split())
    for word in ("org/teacher: 1,234,567 parameters, 900 of them quantised", "2,000,000 bytes",
                 "2.250 in the quantised blocks, 7.250 over the whole model (2.21 times smaller",
                 "128 tokens", "qat 2,000", "source=files", "2026-01-02", "a GPU", "jax 0.10.2"):
        assert word in top, word
    places = [text.index(f'<section id="{name}"') for name in SECTIONS]
    order = [name for _, name in sorted(zip(places, SECTIONS, strict=True))]
    assert order[:2] == ["results", "samples"]
    assert text.index("<dt>versions</dt>") < places[0]


def test_a_held_out_curve_is_drawn_and_a_rising_correlation_explained(tmp_path, whole):
    watched = [{"stage": stage, "step": s, "tokens": 64 * s, "nats_per_token": 3 / s}
               for stage in ("validation", "diagnostics") for s in range(1, 4)]
    summary = SUMMARY | {"diagnostics": {"init": diagnostics(0.0), "qat": diagnostics(-0.1)}}
    page = report(tmp_path, summary, METRICS + watched)
    assert page.figures["teacher"] == 5 and page.figures["qat"] == 7
    for name in ("teacher", "qat"):
        assert "Held-out text during training" in page.text[name]
    assert "rose from -0.25 at the start to -0.15" in " ".join(page.text["paths"].split())
    assert "no fault" not in whole[1].text["paths"]


def test_nothing_runs_and_nothing_is_loaded_from_elsewhere(whole):
    folder, page = whole
    assert "script" not in page.tags and "link" not in page.tags and "img" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[\w./]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    ids = re.findall(r'<(?:clipPath|path|section)[^>]* id="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_the_same_numbers_give_the_same_figure():
    first, second = (weight_histogram("t", HISTOGRAM) for _ in range(2))
    assert first == second


def test_what_the_run_lacks_is_said_and_nothing_else_changes(tmp_path):
    metrics = [line for line in METRICS if line["stage"] == "qat"]
    summary = copy.deepcopy(SUMMARY) | {"diagnostics": {"init": None, "qat": None}}
    del summary["init"], summary["packed"]
    page = report(tmp_path, summary, metrics, None, [], TABLE)
    missing = {name for name in SECTIONS if "Not in this report" in page.text[name]}
    assert missing == {"teacher", "paths", "time", "weights", "bytes", "samples"}
    assert "teacher was loaded" in page.text["teacher"]
    assert "gap closed" not in page.text["top"]
    assert page.figures == {"qat": 6}


def test_an_empty_run_still_has_a_report(tmp_path):
    page = report(tmp_path, {}, [], None, [], [])
    assert all("Not in this report" in page.text[name] for name in SECTIONS)


def test_one_stage_of_diagnostics_and_values_that_are_not_finite(tmp_path):
    summary = SUMMARY | {"diagnostics": {"init": diagnostics(0.0), "qat": None}}
    metrics = [METRICS[0], METRICS[1] | {"loss": float("nan"), "kl": None}, METRICS[2]]
    page = report(tmp_path, summary, metrics, None)
    assert page.figures == {"paths": 4, "teacher": 4}
    text = " ".join(page.text["paths"].split())
    assert "relative MSE 0.1305 " in text and "after QAT" not in text


def test_a_failed_write_leaves_the_old_report_and_no_pieces(tmp_path, monkeypatch):
    report(tmp_path, {}, [], None)
    before = (tmp_path / "report.html").read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rabit_jax.atomic.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        report(tmp_path, SUMMARY, [], None)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_bytes() == before


def test_curve_keeps_only_lines_that_have_the_number():
    lines = [{"tokens": 1, "loss": 2.0}, {"tokens": 2}, {"tokens": 3, "loss": None}, {"loss": 1.0}]
    assert curve(lines, "loss") == ([1], [2.0])


def svg_points(svg):
    """Return the points of the blue curve, in SVG units."""
    (path,) = re.findall(r'<path d="([^"]+)"[^>]*stroke: #1d4e89', svg)
    return np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path), float)


def test_a_curve_is_drawn_where_its_numbers_are():
    x, y = [0, 100, 200, 300], [1.0, 4.0, 2.0, 3.0]
    drawn = svg_points(over_tokens("t", "u", (x, y)))
    assert drawn.shape == (4, 2)
    for column, values, direction in ((0, x, 1.0), (1, y, -1.0)):
        slope, offset = np.polyfit(values, drawn[:, column], 1)
        assert slope * direction > 0
        np.testing.assert_allclose(slope * np.array(values) + offset, drawn[:, column], atol=1e-3)


def test_a_wide_range_is_drawn_on_a_logarithmic_scale():
    y = [0.001, 0.01, 0.1]
    drawn = over_tokens("t", "u", ([0, 1, 2], y))
    heights = svg_points(drawn)[:, 1]
    np.testing.assert_allclose(heights[0] - heights[1], heights[1] - heights[2], atol=1e-3)
    labels = re.findall(r">([^<>]+)</text>", drawn.replace("\N{MINUS SIGN}", "-"))
    assert {"1e-03", "1e-02", "1e-01"} <= set(labels)
    assert "$" not in drawn


def test_every_layer_of_every_projection_gets_a_marker():
    layers = diagnostics(0.0)["layers"]
    svg = by_layer("t", "slope", layers, layers)
    legend = 2
    assert len(re.findall(r"<use ", svg.split("axvline")[0])) >= 2 * 2 * 2 + legend
    assert ">q<" in svg and ">down<" in svg


def test_the_levels_stand_at_their_values_of_the_histogram():
    svg = weight_histogram("t", HISTOGRAM)
    lines = re.findall(r'd="M ([\d.]+) [\d.]+ ?\s*L \1 [\d.]+ ?\s*"[^>]*stroke: #b5532a', svg)
    places = np.array(lines, float)
    assert len(places) == 4
    slope, offset = np.polyfit(HISTOGRAM["levels"], places, 1)
    fitted = slope * np.array(HISTOGRAM["levels"]) + offset
    np.testing.assert_allclose(fitted, places, atol=1e-3)


def test_importing_the_report_does_not_import_matplotlib():
    code = "import sys, rabit_jax.experiments.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
