"""What `experiments.evaluate` measures of a model: perplexities, and tasks of lm-eval.

A row of a result is made by `make_row`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh

from rabit_jax import hosts
from rabit_jax.errors import BadInput, first_line
from rabit_jax.evaluate.perplexities import perplexity
from rabit_jax.evaluate.texts import text_windows
from rabit_jax.experiments.engine.config import load_config
from rabit_jax.experiments.engine.folder import RunFolder
from rabit_jax.experiments.engine.inputs import Inputs
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.formats.folder import is_run_folder
from rabit_jax.formats.packed_model import load_model
from rabit_jax.formats.tokenizer import check_ids
from rabit_jax.models.decoder import Decoder
from rabit_jax.progress import loading, progress, say
from rabit_jax.train.sharding import batch_sharding, make_mesh, param_shardings
from rabit_jax.types import Json, Params, Tokenizer
from rabit_jax.weights.mixed_stack import first_paths

# What lm-eval, an optional package, has no types for: a task or group, and the manager with those
# that it loaded.
Task: TypeAlias = Any
Loaded: TypeAlias = tuple[Any, list[Task]]

RESAMPLES = 1000
Row: TypeAlias = dict[str, str | int | float | None]


@dataclass(frozen=True)
class Subject:
    """A model that is evaluated.

    Attributes:
      name: folder or hub id, for messages.
      model, params, tokenizer: as `load_model` gives them.
      mesh: of the devices that share the work; None for one device.
    """

    name: str
    model: Decoder
    params: Params
    tokenizer: Tokenizer
    mesh: Mesh | None = None


def load_subject(path: str, paths: int | None = None) -> Subject:
    """A model to evaluate: of a model folder or hub id, or the trained student of a run folder.

    Args:
      path: of the model.
      paths: how many sign paths of each matrix are kept; None keeps all.

    Raises:
      BadInput: no such model, a damaged one, one without a tokenizer, or a run whose student is not
        trained yet.
    """
    model, params, tokenizer = _load(path, paths)
    if tokenizer is None:
        raise BadInput(f"{path} holds no tokenizer, so text cannot be read: put the model's "
                       "tokenizer.json and tokenizer_config.json there")
    if len(jax.devices()) == 1:
        return Subject(path, model, params, tokenizer)
    mesh = make_mesh()
    placed = hosts.on_mesh(params, param_shardings(params, mesh))
    return Subject(path, model, placed, tokenizer, mesh)


def _load(path: str, paths: int | None) -> tuple[Decoder, Params, Tokenizer | None]:
    if not is_run_folder(Path(os.path.expanduser(path))):
        with loading(path) as done:
            return load_model(path, done, paths)
    folder = Path(os.path.expanduser(path)).resolve()
    config = load_config(RunConfig, folder / "config.yaml")
    # Neither the run's devices nor its text need be on this machine.
    teacher = dataclasses.replace(
        config.teacher, path=config.teacher.path or str(folder / "teacher"))
    config = dataclasses.replace(config, output=str(folder.parent), name=folder.name,
                                 teacher=teacher, mesh={"tensor": len(jax.devices())})
    found = Inputs(config, RunFolder(config))
    if not hosts.first_does(lambda: (folder / "stages" / "qat.json").exists()):
        if (folder / "packed" / "config.json").exists():  # a run of task ptq, which trains none
            with loading(path) as done:
                return load_model(folder / "packed", done, paths)
        raise BadInput(f"{path} has no trained student: let the run finish its stage qat, or name "
                       "a model folder in it, such as teacher or packed")
    say(f"the trained student of {path}")
    student = found.student if paths is None else first_paths(found.student, paths)
    # A tokeniser that the cache has lost is trained again, by one.
    tokenizer = hosts.first_before_others(lambda: found.text.tokenizer)
    return found.model, student, tokenizer


def begin_token(subject: Subject, wanted: bool | None) -> int | None:
    """The token that every window begins with; without a wish one for Gemma, which needs it."""
    if wanted is None:
        wanted = subject.model.config.family.startswith("gemma")
    if not wanted:
        return None
    begin = subject.tokenizer.bos_token_id
    if not isinstance(begin, int):
        raise BadInput(f"the tokenizer of {subject.name} has no begin token: give --no-begin")
    return begin


def perplexity_rows(
    subject: Subject, name: str, documents: Sequence[str], *, context: int, batch_size: int,
    limit: int | None, begin: int | None,
) -> list[Row]:
    """Perplexity of one text, and its bits per byte where the windows are cut in order.

    Args:
      subject: the model.
      name, documents: of the text.
      context: tokens of a window.
      batch_size: windows at once.
      limit: only the first windows; None takes all.
      begin: token that every window begins with, or None.
    """
    with progress(f"windows of {name}, percent", 100) as bar:
        cut = text_windows(name, documents, subject.tokenizer, context, limit,
                           lambda done, total: bar.update(100 * done // total), begin)
        bar.update(100)
    check_ids(cut.tokens, subject.tokenizer, subject.model.config.vocab_size)
    with progress(f"perplexity, {name}", len(cut.tokens)) as bar:
        found = perplexity(
            subject.model, subject.params, cut.tokens, batch_size=batch_size,
            text_bytes=cut.text_bytes, total_tokens=cut.total_tokens,
            progress=lambda done, _: bar.update(done),
            batch_sharding=batch_sharding(subject.mesh) if subject.mesh else None)
    if math.isnan(found.nats_per_token):
        raise BadInput(f"the logits of {subject.name} hold NaN: the weights are damaged or "
                       f"overflow {subject.model.config.dtype}, pack or load them again")
    figures = {"perplexity": found.ppl, "nats_per_token": found.nats_per_token,
               "bits_per_byte": found.bits_per_byte}
    return [make_row(name, metric, value, samples=len(cut.tokens), context=context)
            for metric, value in figures.items() if value is not None]


def load_tasks(names: Sequence[str], include_path: str | None) -> Loaded:
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


def _loaded(manager: Any, name: str) -> list[Task]:
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


def _outermost(items: Sequence[Task]) -> list[Task]:
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


def _name(item: Task) -> str:
    return getattr(item, "task_name", None) or item.name


def task_rows(
    subject: Subject, loaded: Loaded, *, batch_size: int, max_length: int | None,
    num_fewshot: int | None, limit: int | None, chat: bool,
) -> list[Row]:
    """Every metric of every task and group that `load_tasks` loaded, and the mean accuracy where
    there are several."""
    from rabit_jax.evaluate.harness import HarnessModel

    manager, tasks = loaded
    lm = HarnessModel(subject.model, subject.params, subject.tokenizer, batch_size=batch_size,
                      max_length=max_length, mesh=subject.mesh)
    _check_generation(manager.load(tasks)["tasks"], lm.max_length)
    # Its resampling forks, which a process with JAX's threads must not do; it prints to stdout.
    os.environ["DISABLE_MULTIPROC"] = "1"
    lm_eval: Any = importlib.import_module("lm_eval")
    with contextlib.redirect_stdout(sys.stderr):
        found = lm_eval.simple_evaluate(
            model=lm, tasks=tasks, task_manager=manager, num_fewshot=num_fewshot, limit=limit,
            bootstrap_iters=RESAMPLES, log_samples=False, apply_chat_template=chat)
    rows = [row for name, metrics in found["results"].items()
            for row in _metric_rows(name, metrics, found["n-shot"].get(name))]
    single = [row["value"] for row in rows
              if row["metric"] == "acc" and row["name"] in found["configs"]]
    known = [value for value in single if isinstance(value, float)]
    if len(single) > 1 and len(known) == len(single):
        rows.append(make_row(f"mean of {len(known)} tasks", "acc", sum(known) / len(known)))
    return rows


def _metric_rows(name: str, metrics: Json, shots: int | None) -> list[Row]:
    """A row for each metric of one task or group; the harness's keys are "metric,filter"."""
    rows = []
    for key, value in metrics.items():
        metric, _, kind = key.partition(",")
        if kind and not metric.endswith("_stderr"):
            label = metric if kind == "none" else f"{metric} ({kind})"
            stderr = metrics.get(f"{metric}_stderr,{kind}")
            rows.append(make_row(name, label, value, stderr, shots, metrics.get("sample_len")))
    return rows


def _check_generation(tasks: Mapping[str, Task], max_length: int) -> None:
    """Refuses settings of generation before anything is scored, not in the middle of it."""
    from rabit_jax.evaluate.batched_generation import settings_of

    for name, task in tasks.items():
        if task.get_config("output_type") == "generate_until":
            try:
                settings_of(task.get_config("generation_kwargs") or {}, max_length)
            except BadInput as error:
                raise BadInput(f"{name}: {error}") from error


def make_row(
    name: str, metric: str, value: object, stderr: object = None, shots: int | None = None,
    samples: int | None = None, context: int | None = None,
) -> Row:
    """A row of the result; figures that are not finite are None, which JSON can hold."""
    figures = [float(x) if isinstance(x, Real) and math.isfinite(x) else None
               for x in (value, stderr)]
    return {"name": name, "metric": metric, "value": figures[0], "stderr": figures[1],
            "shots": shots, "samples": samples, "context": context}
