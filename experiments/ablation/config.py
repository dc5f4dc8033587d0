"""The schema of an ablation's config file: a run, and the grid of overrides x seeds to do it with.

A row is a label and its overrides of `run`:

    name: small
    run: {...}                      a config of experiments.run
    seeds: [0, 1, 2]
    rows:
      coupled: []
      independent: [init.spec.rounds=0]
    compare: {against independent: [coupled, independent]}
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from rabit_jax import BadInput
from rabit_jax.experiments.engine.refusals import nearest
from rabit_jax.experiments.engine.settings import RunConfig, check_folder_name

Overrides = tuple[str, ...]


@dataclass(frozen=True)
class Search:
    """One setting chosen for every row before its seeds are run.

    Attributes:
      key: dotted key of the setting in the section `run`.
      values: what is tried.
      steps: share of `qat.steps` that a trial trains for; with task ptq it is trained whole.
    """

    key: str = "qat.optimizer.lr"
    values: tuple[float, ...] = ()
    steps: float = 0.5

    def __post_init__(self):
        """Raises BadInput for fewer than two values, a value twice, or a share outside (0, 1]."""
        if len(set(self.values)) < 2 or len(set(self.values)) < len(self.values):
            raise BadInput(f"values are {list(self.values)}: give two or more different ones")
        if not 0 < self.steps <= 1:
            raise BadInput(f"steps is {self.steps}: it is a share of qat.steps, above 0, at most 1")


@dataclass(frozen=True)
class Ablation:
    """A grid of overrides x seeds.

    Attributes:
      name: name of the ablation's folder.
      output: where that folder lies.
      run: settings of every cell; name, output and seed are the cell's own, and the seed given here
        is that of the shared teacher.
      seeds: seeds of every row.
      rows: label -> overrides of `run`.
      grid: axis -> choice -> overrides; the product of the axes gives further rows.
      single: rows run with the first seed only.
      search: a setting that is chosen for each row of `rows` and `grid`, with a seed and on
        evaluation windows that are not those of the tables.
      compare: label -> (row, baseline row), paired over seeds.
    """

    name: str
    output: str = "runs"
    run: RunConfig = field(default_factory=RunConfig)
    seeds: tuple[int, ...] = (0, 1, 2)
    rows: dict[str, Overrides] = field(default_factory=dict)
    grid: dict[str, dict[str, Overrides]] = field(default_factory=dict)
    single: dict[str, Overrides] = field(default_factory=dict)
    search: Search | None = None
    compare: dict[str, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self):
        """Raises BadInput for a folder, seeds, rows or comparisons that cannot be."""
        check_folder_name(self.name, "the ablation's folder")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise BadInput(
                f"seeds are {list(self.seeds)}: give one or more, none twice, none negative"
            )
        for axis, choices in self.grid.items():
            if not choices:
                raise BadInput(f"the axis {axis!r} of the grid has no choices: give it some")
        labels = [label for label, _, _ in self.labelled()]
        if not labels:
            raise BadInput("there is no row: give rows, grid or single")
        for label in labels:
            if labels.count(label) > 1:
                raise BadInput(f"two rows are called {label!r}: rename one of them")
        for name, pair in self.compare.items():
            for row in pair:
                if row not in labels:
                    raise BadInput(
                        f"compare {name!r} names the row {row!r}, which is not there: the nearest "
                        f"row is {nearest(row, labels)!r}"
                    )

    @property
    def search_seed(self) -> int:
        """Seed of the search's trials: the one after the largest of the rows."""
        return max(self.seeds) + 1

    def labelled(self) -> Iterator[tuple[str, Overrides, bool]]:
        """Label, overrides and whether it is a single row, of every row."""
        for label, overrides in self.rows.items():
            yield label, overrides, False
        for choices in itertools.product(*(axis.items() for axis in self.grid.values())):
            if choices:
                label = ", ".join(name for name, _ in choices)
                yield label, tuple(itertools.chain(*(made for _, made in choices))), False
        for label, overrides in self.single.items():
            yield label, overrides, True
