"""Tasks of lm-evaluation-harness in `python -m experiments.evaluate`."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import os
import sys
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from rabit_jax.errors import BadInput, first_line
from rabit_jax.models.decoder import Decoder
from rabit_jax.progress import progress, say

RESAMPLES = 1000


def load_tasks(names: Sequence[str], include_path: str | None) -> tuple[Any, list[Any]]:
    """The harness's task manager, and tasks and groups of names or patterns, with their data.

    Raises:
      BadInput: lm-eval is not installed, an unknown name, or data that cannot be loaded.
    """
    from rabit_jax.evaluate.harness import require_harness

    require_harness()
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import pattern_match

    say("reading the harness's list of tasks")
    manager = TaskManager(include_path=include_path)
    wanted: dict[str, None] = {}
    for name in names:
        found = pattern_match([name], manager.all_tasks)
        if not found:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.0)[0]
            raise BadInput(f"the harness has no task {name!r}, the nearest is {near!r}; put tasks "
                           "of your own into --include-path")
        wanted |= dict.fromkeys(found)
    tasks = []
    with progress("data of the tasks", len(wanted)) as bar:
        for done, name in enumerate(wanted, 1):
            tasks += _loaded(manager, name)
            bar.update(done)
    return manager, _outermost(tasks)


def _loaded(manager: Any, name: str) -> list[Any]:
    """A group and all in it, or the tasks of a name."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = manager.load(name)
    except Exception as error:  # data sets, their transports and tasks raise many kinds
        raise BadInput(
            f"cannot load the task {name!r} ({type(error).__name__}: {first_line(error)}): check "
            "the network, or run once with one (its data are kept under HF_HOME)") from error
    for task in found["tasks"].values():
        for kind in ("UNSAFE_CODE", "MULTIMODAL"):
            if getattr(task, kind, False):
                raise BadInput(f"the task {name!r} runs code that models write or shows them more "
                               f"than text ({kind}), which has no form here: leave it out")
    return list(found.get("groups", {}).values()) or list(found["tasks"].values())


def _outermost(items: Sequence[Any]) -> list[Any]:
    """Tasks and groups without those that a group among them holds: the harness takes each once.

    A group's results have rows of all that it holds.

    Raises:
      BadInput: two groups share a task and neither holds the other.
    """
    groups = [item for item in items if hasattr(item, "get_all_tasks")]
    inner = {_name(part) for group in groups
             for part in (*group.get_all_tasks(), *group.get_all_groups())}
    kept = {_name(item): item for item in items if _name(item) not in inner}
    owners: dict[str, str] = {}
    for name in [name for name, item in kept.items() if item in groups]:
        for task in kept[name].get_all_tasks():
            other = owners.setdefault(task.task_name, name)
            if other != name:
                raise BadInput(f"the groups {other!r} and {name!r} share the task "
                               f"{task.task_name!r}: evaluate them one after the other")
    return list(kept.values())


def _name(item: Any) -> str:
    return getattr(item, "task_name", None) or item.name


def task_rows(
    options: argparse.Namespace, model: Decoder, params: Any, tokenizer: Any, mesh: Any,
    loaded: tuple[Any, list[Any]],
) -> list[dict[str, Any]]:
    """Every metric of every task and group that `load_tasks` loaded, and the mean accuracy where
    there are several."""
    from lm_eval import simple_evaluate

    from rabit_jax.evaluate.harness import HarnessModel

    manager, tasks = loaded
    lm = HarnessModel(model, params, tokenizer, batch_size=options.batch_size,
                      max_length=options.max_length, mesh=mesh)
    _check_generation(manager.load(tasks)["tasks"], lm.max_length)
    # Its resampling forks, which a process with JAX's threads must not do; it prints to stdout.
    os.environ["DISABLE_MULTIPROC"] = "1"
    with contextlib.redirect_stdout(sys.stderr):
        found = simple_evaluate(
            model=lm, tasks=tasks, task_manager=manager, num_fewshot=options.num_fewshot,
            limit=options.limit, bootstrap_iters=RESAMPLES, log_samples=False,
            apply_chat_template=options.chat)
    rows = []
    for name, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr"):
                label = metric if kind == "none" else f"{metric} ({kind})"
                stderr = metrics.get(f"{metric}_stderr,{kind}")
                rows.append(make_row(name, label, value, stderr, found["n-shot"].get(name),
                                     metrics.get("sample_len")))
    single = [row["value"] for row in rows
              if row["metric"] == "acc" and row["name"] in found["configs"]]
    if len(single) > 1 and None not in single:
        rows.append(make_row(f"mean of {len(single)} tasks", "acc", sum(single) / len(single)))
    return rows


def _check_generation(tasks: Mapping[str, Any], max_length: int) -> None:
    """Refuses settings of generation before anything is scored, not in the middle of it."""
    from rabit_jax.evaluate.writing import settings_of

    for name, task in tasks.items():
        if task.get_config("output_type") == "generate_until":
            try:
                settings_of(task.get_config("generation_kwargs") or {}, max_length)
            except BadInput as error:
                raise BadInput(f"{name}: {error}") from error


def make_row(
    name: str, metric: str, value: float, stderr: Any = None, shots: int | None = None,
    samples: int | None = None, context: int | None = None,
) -> dict[str, Any]:
    """A row of the result; figures that are not finite are None, which JSON can hold."""
    figures = [float(x) if isinstance(x, Real) and math.isfinite(x) else None
               for x in (value, stderr)]
    return {"name": name, "metric": metric, "value": figures[0], "stderr": figures[1],
            "shots": shots, "samples": samples, "context": context}
