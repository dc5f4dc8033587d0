"""`summary.json` and `report.html`, made from the records of the stages."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rabit_jax import ResidualSign, cost
from rabit_jax.atomic import write_text
from rabit_jax.evaluate.gap import gap_closed
from rabit_jax.evaluate.sign_statistics import Histogram, weight_histogram
from rabit_jax.experiments.engine.inputs import Inputs, abstract_params
from rabit_jax.experiments.engine.job import Job
from rabit_jax.experiments.engine.machine import peak_memory
from rabit_jax.experiments.engine.stages import Record
from rabit_jax.experiments.report.page import (
    ResultRow,
    Sample,
    Summary,
    write_report,
)
from rabit_jax.experiments.report.run_card import changed_settings, write_card
from rabit_jax.formats.packed_model import packed_bytes
from rabit_jax.progress import number
from rabit_jax.tree import leaves, weights_of
from rabit_jax.types import Json
from rabit_jax.weights.mixed_stack import with_paths

LABELS = {
    "teacher": "teacher, full precision",
    "round_to_nearest": "round to nearest, group 128",
    "greedy": "greedy SVID",
    "init": "calibrated init",
    "tuned": "after block tuning",
    "qat": "after QAT",
    "packed": "packed",
}
# What is not quantised counts with 16 bits, as in `describe`, whatever it was trained in.
DENSE_BITS = 16.0


def summarise(run: Inputs, records: Mapping[str, Record], command: str) -> Json:
    """The nested summary. Other tools read it, so its keys do not change."""
    results = {name: record["result"] for name, record in records.items()}
    measured = results["evaluate"]
    packed = {**results["pack"], **whole_model(run.folder.path)}
    dense = packed.pop("dense_bytes")
    k = results["init"].get("k", {})
    closed = gap_closed(*([measured[name]["ppl"]] for name in ("teacher", "init", "qat")))
    return {
        "name": run.config.name,
        "command": command,
        "seed": run.config.seed,
        **{
            name: measured[name]
            for name in ("teacher", "greedy", "round_to_nearest", "init", "qat", "nested")
            if name in measured
        },
        "packed": packed,
        "dense": {"bytes": dense},
        "unigram_nats": measured["unigram_nats"],
        "gap_closed": closed and closed.share,
        "diagnostics": {"init": results["init"]["diagnostics"], **measured["diagnostics"]},
        "relative_error": {
            "init": results["init"]["relative_error"],
            "qat": measured["relative_error"],
        },
        "disordered": measured["disordered"],
        **training_figures(run, records["qat"]),
        **({"k": k} if k else {}),
        "cost": cost(with_paths(run.abstract_student(), k))._asdict(),
        "tokens": {name: r["tokens"] for name, r in results.items() if "tokens" in r},
        "seconds": {name: record["seconds"] for name, record in records.items()},
        "peak_memory_bytes": max(
            [peak_memory(), *(r.get("peak_memory_bytes", 0) for r in records.values())]
        ),
        "parameters": parameters(run),
        "versions": records["qat"]["versions"],
        "device": records["qat"]["device"],
        "spec": str(run.config.init),
        **circumstances(run),
    }


def whole_model(folder: Path) -> dict[str, float]:
    """Bits of all tensors of a run's packed file per parameter, embedding and head included; and
    how many times smaller that is than bfloat16."""
    bits = packed_bytes(folder / "packed")["whole_model_bits_per_weight"]
    return {"whole_model_bits_per_weight": bits, "whole_model_ratio": 16 / bits}


def circumstances(run: Inputs | Job) -> dict[str, str]:
    """The model that was quantised, the text, and when the results were written."""
    return {
        "model": run.config.teacher.path or "trained in this run",
        "data": changed_settings(run.config.data),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def training_figures(run: Inputs, record: Record) -> dict[str, float | None]:
    """Of QAT: share of signs flipped per step, seconds per step, bytes of process and state."""
    lines = run.folder.metrics.lines()
    flips = [f for line in lines if (f := line.get("flip_rate")) is not None]
    speeds = [line["tokens_per_second"] for line in lines if line["stage"] == "qat"]
    section = run.config.qat
    speed = speeds[-1] if speeds else 0
    return {
        "flip_rate": sum(flips) / len(flips) if flips else None,
        "step_seconds": section.batch_size * section.length / speed if speed else None,
        "training_memory_bytes": record["peak_memory_bytes"],
        "state_bytes": record["result"]["state_bytes"],
    }


def parameters(run: Inputs | Job) -> dict[str, int]:
    """Numbers of weights: all, outside embedding and head, and quantised."""
    sizes = {path: leaf.size for path, leaf in leaves(abstract_params(run.model_config))}
    outer = sum(n for path, n in sizes.items() if path.startswith(("embed/", "head/")))
    quantised = sum(math.prod(w.shape) for w in weights_of(run.abstract_student()).values())
    return {
        "total": sum(sizes.values()),
        "non_embedding": sum(sizes.values()) - outer,
        "quantised": quantised,
    }


def table_rows(summary: Summary) -> list[ResultRow]:
    """The results table: one row per model, with the bits per weight that are stored."""
    packed_bits: float = summary["packed"]["stored_bits_per_weight"]
    bits = {"teacher": DENSE_BITS, "round_to_nearest": 2.25}
    whole = {"teacher": DENSE_BITS, "packed": summary["packed"].get("whole_model_bits_per_weight")}
    rows = [
        ResultRow(
            name=label,
            ppl=summary[key]["ppl"],
            bits_per_byte=summary[key]["bits_per_byte"],
            ppl_over_teacher=summary[key]["ppl"] / summary["teacher"]["ppl"] - 1,
            bits_per_weight=bits.get(key, packed_bits),
            whole_model_bits_per_weight=whole.get(key),
        )
        for key, label in LABELS.items()
        if key in summary
    ]
    return rows + [
        ResultRow(
            name=label,
            ppl=found["ppl"],
            bits_per_byte=found["bits_per_byte"],
            ppl_over_teacher=found["ppl"] / summary["teacher"]["ppl"] - 1,
            bits_per_weight=found["stored_bits_per_weight"],
            whole_model_bits_per_weight=found["whole_model_bits_per_weight"],
        )
        for label, found in smaller(summary).items()
    ]


def smaller(summary: Summary) -> dict[str, Json]:
    """The models of the first paths that nested training has made, without the whole one, by what
    the table calls them."""
    found = list((summary.get("nested") or {}).items())[:-1]
    return {f"the first {n} of its paths": scored for n, scored in found}


def costs(summary: Summary) -> str:
    """Two lines for the terminal: bytes of the packed and the dense model; time and memory."""
    return (
        f"packed file with its header: {number(summary['packed']['bytes'])} bytes; 16-bit dense: "
        f"{number(summary['dense']['bytes'])} bytes; bits per weight: "
        f"{summary['packed']['stored_bits_per_weight']:.3f} in the blocks, "
        f"{summary['packed']['whole_model_bits_per_weight']:.3f} over the whole model\n"
        f"time: {sum(summary['seconds'].values()):.0f} s; peak memory: "
        f"{summary['peak_memory_bytes'] / 1e9:.2f} GB"
    )


def write_results(
    run: Inputs, summary: Summary, samples: Sequence[Sample], histogram: Histogram | None
) -> Path:
    """Write the packed model's card, `report.html`, whose path is returned, and `summary.json`:
    last, for a run that has it is complete."""
    folder = run.folder.path
    write_card(run.config, folder, summary)
    report = write_report(
        folder, summary, run.folder.metrics.lines(), histogram, samples, table_rows(summary)
    )
    write_text(folder / "summary.json", json.dumps(summary, indent=1))
    return report


def trained_histogram(run: Inputs) -> Histogram | None:
    """Of the first weight of sign paths, in the middle layer; None where there is none. All
    processes take part."""
    nodes = weights_of(run.student).items()
    path = next((path for path, node in nodes
                 if path.startswith("layers/") and isinstance(node, ResidualSign)), None)
    if path is None:
        return None
    return weight_histogram(run.student, path, run.model_config.n_layers // 2)
