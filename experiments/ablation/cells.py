"""What an ablation consists of: its rows, and the run behind every cell.

A cell is one row with one seed, an ordinary run whose config is that of the section `run` with the
row's overrides on top.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rabit_jax import BadInput
from rabit_jax.experiments.ablation.config import Ablation, Overrides, Search
from rabit_jax.experiments.engine.config import difference, dump_yaml, read_yaml, with_overrides
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.experiments.engine.validation import build
from rabit_jax.types import Json


@dataclass(frozen=True)
class Cell:
    """One run of the ablation.

    Attributes:
      row: label of its row.
      seed: its seed.
      kind: what it is for.
      value: of the searched setting; None where nothing was searched.
      folder: the run folder; the config that the run is given lies beside it.
      config: of the run; None while the row's search has no result.
    """

    row: str
    seed: int
    kind: Literal["teacher", "search", "cell"]
    value: float | None
    folder: Path
    config: RunConfig | None

    @property
    def file(self) -> Path:
        """The resolved config that the run is started with."""
        return self.folder.with_name(f"{self.folder.name}.yaml")


@dataclass(frozen=True)
class Row:
    """One row: its label, its folder's name, its config, and those of its search by value.

    Attributes:
      label: as the tables name it.
      slug: as its folder is called.
      single: run with the first seed only, and without a search.
      configs: config by searched value; without a search the only key is None.
      trials: shortened config by searched value.
    """

    label: str
    slug: str
    single: bool
    configs: Mapping[float | None, RunConfig]
    trials: Mapping[float, RunConfig]

    @property
    def config(self) -> RunConfig:
        """The config, whatever the search will choose."""
        return next(iter(self.configs.values()))


@dataclass(frozen=True)
class Plan:
    """An ablation with every config resolved."""

    ablation: Ablation
    rows: tuple[Row, ...]

    @property
    def folder(self) -> Path:
        """Where everything of the ablation lies."""
        return Path(self.ablation.output) / self.ablation.name

    @property
    def teacher(self) -> Cell | None:
        """The run that trains the shared teacher; None where `run.teacher.path` names one."""
        if self.ablation.run.teacher.path:
            return None
        folder = self.folder / "teacher"
        config = _placed(self.ablation.run, folder, self.ablation.run.seed)
        return Cell("teacher", config.seed, "teacher", None, folder, config)

    def trials(self) -> list[Cell]:
        """The cells of the search, row by row."""
        return [
            self._cell(
                row, "search", self.folder / "search" / row.slug / repr(v), v, c,
                self.ablation.search_seed,
            )
            for row in self.rows
            for v, c in row.trials.items()
        ]

    def cells(self, chosen: Mapping[str, float]) -> list[Cell]:
        """The cells, seed by seed over all rows, then the single ones.

        Args:
          chosen: label of a row -> value that its search chose.
        """

        def cell(row: Row, seed: int) -> Cell:
            value = chosen.get(row.label) if row.trials else None
            folder = self.folder / "cells" / row.slug / f"seed-{seed}"
            return self._cell(row, "cell", folder, value, row.configs.get(value), seed)

        full = [cell(r, seed) for seed in self.ablation.seeds for r in self.rows if not r.single]
        return full + [cell(r, self.ablation.seeds[0]) for r in self.rows if r.single]

    def _cell(
        self,
        row: Row,
        kind: Literal["search", "cell"],
        folder: Path,
        value: float | None,
        config: RunConfig | None,
        seed: int,
    ) -> Cell:
        if config:
            shared = str(self.folder / "teacher" / "teacher")
            given = dataclasses.replace(config.teacher, path=config.teacher.path or shared)
            config = dataclasses.replace(_placed(config, folder, seed), teacher=given)
        return Cell(row.label, seed, kind, value, folder, config)


def _placed(config: RunConfig, folder: Path, seed: int) -> RunConfig:
    """The config of a run whose folder is `folder`."""
    return dataclasses.replace(config, output=str(folder.parent), name=folder.name, seed=seed)


def make_plan(file: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """Read an ablation's config and resolve every row.

    Raises:
      BadInput: what `load_config` and the classes here refuse; an override of a row that is wrong;
        two rows that are the same run or would share a folder.
    """
    tree = read_yaml(file)
    _check_kind(file, tree)
    tree = with_overrides(Ablation, tree, overrides)
    ablation = build(Ablation, tree)

    def resolve(where: str, settings: Sequence[str]) -> RunConfig:
        try:
            return build(RunConfig, with_overrides(RunConfig, tree.get("run") or {}, settings))
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from None

    if search := ablation.search:
        for choice in _choices(search).values():
            resolve("search", [choice])

    # A search must not see the windows that the tables are made of.
    part = ("evaluate.part=report",) if search else ()
    rows = tuple(
        _row(label, (*settings, *part), single, None if single else search, resolve)
        for label, settings, single in ablation.labelled()
    )
    _check_distinct(rows)
    return Plan(ablation, rows)


def _check_kind(file: str | Path, tree: Json) -> None:
    """Raise BadInput for the config of a run: other keys, and no row."""
    own = {f.name for f in dataclasses.fields(Ablation)}
    run = {f.name for f in dataclasses.fields(RunConfig)} - own
    if (found := sorted(run & set(tree))) and not {"run", "rows", "grid", "single"} & set(tree):
        raise BadInput(
            f"{file} is the config of a run (it has {found[0]!r}), not of an ablation: an ablation "
            "has these settings in its section run, and rows, grid or single with the overrides of "
            "each row, as experiments/configs/ablation_small.yaml has; experiments.run runs it"
        )


def _row(
    label: str,
    settings: Overrides,
    single: bool,
    search: Search | None,
    resolve: Callable[[str, Sequence[str]], RunConfig],
) -> Row:
    keys = [setting.partition("=")[0].strip() for setting in settings]
    for key in keys:
        if key in ("name", "output", "seed"):
            raise BadInput(f"row {label!r} sets {key}: the ablation gives each cell its own")
        if key.partition(".")[0] in ("teacher", "model") and key != "teacher.path":
            raise BadInput(
                f"row {label!r} sets {key}: the teacher is shared by all rows, so set it in run"
            )
        if search and key == search.key:
            raise BadInput(
                f"row {label!r} sets {key}, which the search chooses: leave it out, or put the row "
                "under single"
            )
    slug = re.sub(r"[^\w.=+]+", "-", label.lower()).strip("-.")
    if not slug or len(slug.encode()) > 200:
        raise BadInput(f"the row label {label!r} gives no name for a folder: use other words")
    where = f"row {label!r}"
    config = resolve(where, settings)
    if not search:
        return Row(label, slug, single, {None: config}, {})
    # The tuning of blocks has epochs, and too few to be cut: its trials are as long as its cells.
    steps = max(1, round(search.steps * config.qat.steps))
    short = [f"qat.steps={steps}"] if config.task == "qat" else []
    choices = _choices(search).items()
    full: dict[float | None, RunConfig] = {
        value: resolve(where, (*settings, choice)) for value, choice in choices
    }
    own = "evaluate.part=search"
    trials = {value: resolve(where, (*settings, *short, choice, own)) for value, choice in choices}
    return Row(label, slug, single, full, trials)


def _choices(search: Search) -> dict[float, str]:
    """The override of each value of a search."""
    return {value: f"{search.key}={value!r}" for value in search.values}


def _check_distinct(rows: Sequence[Row]) -> None:
    """Raise BadInput for rows that are the same run, or whose folders would have the same name."""
    slugs: dict[str, str] = {}
    runs: dict[tuple[bool, str], str] = {}
    for row in rows:
        # What a search will choose is not known yet: those rows are compared with their like.
        key = bool(row.trials), dump_yaml(row.config)
        if key in runs:
            raise BadInput(
                f"the rows {runs[key]!r} and {row.label!r} are the same run: every setting is equal"
            )
        if row.slug in slugs:
            raise BadInput(
                f"the rows {slugs[row.slug]!r} and {row.label!r} would share the folder "
                f"{row.slug}: rename one of them"
            )
        runs[key] = slugs[row.slug] = row.label


def differing(plan: Plan, row: Row) -> list[str]:
    """What a row changes of `run`, as `key: before -> after`."""
    search = plan.ablation.search
    lines = difference(plan.ablation.run, row.config).splitlines()
    lines = [line for line in lines if not line.startswith("evaluate.part: ")]
    if search and row.trials:
        lines = [line for line in lines if not line.startswith(f"{search.key}: ")]
        lines.append(f"{search.key}: searched")
    return lines
