"""What a finished run writes and prints: summary, model card, report, and the table of results."""

from __future__ import annotations

import json

from rabit_jax import cost, describe, hosts
from rabit_jax.atomic import write_text
from rabit_jax.evaluate.sign_statistics import Histogram
from rabit_jax.experiments.engine.console import table
from rabit_jax.experiments.engine.inputs import Inputs, abstract_params
from rabit_jax.experiments.engine.job import Job, trained
from rabit_jax.experiments.engine.machine import peak_memory
from rabit_jax.experiments.engine.stages import Record
from rabit_jax.experiments.report.run_card import write_card
from rabit_jax.experiments.report.summary import (
    DENSE_BITS,
    LABELS,
    circumstances,
    costs,
    parameters,
    smaller,
    summarise,
    table_rows,
    trained_histogram,
    whole_model,
    write_results,
)
from rabit_jax.types import Json
from rabit_jax.weights.mixed_stack import with_paths

COLUMNS = ("model", "perplexity", "bits per byte", "over teacher", "block bits",
           "whole-model bits")


def finish(run: Inputs | Job, records: dict[str, Record], command: str) -> None:
    """Write the results of a run whose stages are complete, and print those one looks for first.

    All processes take part, for the trained model lies in parts on them; the first one writes.
    """
    if isinstance(run, Job):
        hosts.first_does(lambda: _finish_ptq(run, records, command))
    else:
        histogram = trained_histogram(run)
        hosts.first_does(lambda: _finish_qat(run, records, command, histogram))
    if hosts.first():
        print(f"packed model: {run.folder.path / 'packed'}")


def _finish_qat(
    run: Inputs, records: dict[str, Record], command: str, histogram: Histogram | None
) -> None:
    summary = summarise(run, records, command)
    samples = records["generate"]["result"]["samples"]
    report = write_results(run, summary, samples, histogram)
    rows = [(r["name"], r["ppl"], r["bits_per_byte"], f"{100 * r['ppl_over_teacher']:+.1f}%",
             r["bits_per_weight"], r["whole_model_bits_per_weight"]) for r in table_rows(summary)]
    title = f"{summary['name']}, context {summary['teacher']['context']}"
    table(title, COLUMNS, rows, stdout=True)
    closed = summary["gap_closed"]
    print(f"gap to the teacher closed by QAT: {'-' if closed is None else f'{100 * closed:.0f}%'}")
    print(costs(summary))
    print(f"report: {report}")


def _finish_ptq(job: Job, records: dict[str, Record], command: str) -> None:
    summary, folder = _summarise_ptq(job, records, command), job.folder.path
    write_card(job.config, folder, summary)
    write_text(folder / "summary.json", json.dumps(summary, indent=1))
    teacher, packed = summary["teacher"], summary["packed"]
    bits = packed["stored_bits_per_weight"], packed["whole_model_bits_per_weight"]
    sizes = {"teacher": (DENSE_BITS, DENSE_BITS), "init": bits, "tuned": bits, "packed": bits}
    scored = [(LABELS[name], summary.get(name) or {}, bits) for name, bits in sizes.items()
              if summary.get(name) or name not in ("init", "tuned")]
    scored += [(label, found, (found["stored_bits_per_weight"],
                               found["whole_model_bits_per_weight"]))
               for label, found in smaller(summary).items()]
    rows = []
    for label, found, bits in scored:
        ppl = found.get("ppl")
        over = f"{100 * (ppl / teacher['ppl'] - 1):+.1f}%" if ppl and teacher else None
        rows.append((label, ppl, found.get("bits_per_byte"), over, *bits))
    context = next((m["context"] for m in (teacher, packed) if m and "context" in m), None)
    title = f"{summary['name']}, post-training" + (f", context {context}" if context else "")
    table(title, COLUMNS, rows, stdout=True)
    print(costs(summary))


def _summarise_ptq(job: Job, records: dict[str, Record], command: str) -> Json:
    """The nested summary with the keys of every run; what needs training is null."""
    results = {name: dict(record["result"]) for name, record in records.items()}
    errors, k = results["quantise"].pop("relative_error"), results["quantise"].pop("k", {})
    tokens = {"calibrate" if name == "quantise" else name: result.pop("tokens")
              for name, result in results.items() if "tokens" in result}
    packing = "pack" if trained(job.config) else "quantise"
    scored = {name.removeprefix("score_"): result for name, result in results.items()
              if name.startswith("score_")}
    # Lines of training, where the folder held such a run before, have no seconds.
    lines = [line for line in job.folder.metrics.lines() if "seconds" in line]
    seconds: dict[str, float] = {}
    for line in lines:
        seconds[line["stage"]] = seconds.get(line["stage"], 0.0) + line["seconds"]
    if "end_to_end" in records:
        seconds["end_to_end"] = records["end_to_end"]["seconds"]
    return {
        "name": job.config.name,
        "task": "ptq",
        "command": command,
        "seed": job.config.seed,
        "teacher": scored.get("teacher"),
        "init": scored.get("init"),
        "qat": None,
        **({"tuned": scored["tuned"]} if "tuned" in scored else {}),
        **{name: results[name] for name in ("tune", "end_to_end") if name in results},
        **({"nested": scored["nested"]} if "nested" in scored else {}),
        "packed": {**scored.get("packed", {}), **results[packing], **whole_model(job.folder.path)},
        "dense": {"bytes": describe(abstract_params(job.model_config)).deployed_bytes},
        "diagnostics": {"init": None, "qat": None},
        "relative_error": {"init": errors},
        **({"k": k} if k else {}),
        "cost": cost(with_paths(job.abstract_student(), k))._asdict(),
        "tokens": tokens,
        "seconds": seconds,
        "peak_memory_bytes": max([peak_memory(), *(n["peak_memory_bytes"] for n in lines)]),
        "parameters": parameters(job),
        "versions": records[packing]["versions"],
        "device": records[packing]["device"],
        "spec": str(job.config.init),
        **circumstances(job),
    }
