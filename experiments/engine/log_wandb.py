"""The metrics of a run on Weights & Biases, where the config field `wandb` names a project."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from rabit_jax.atomic import write_text
from rabit_jax.errors import BadInput

ID = "wandb-id"


def find_wandb() -> Any:
    """The package wandb.

    Raises:
      BadInput: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise BadInput(
            f"the config asks for Weights & Biases, which cannot be imported ({error}): "
            "`pip install wandb`, or leave the setting `wandb` out"
        ) from None


class WandbLog:
    """One run on Weights & Biases for a run folder, opened at its first line.

    Stages count their steps from 0, so each has its own step axis `<stage>/step`. The id is kept in
    `<folder>/wandb-id`: with `--resume` the same run goes on there, without it a new one begins.
    Lines between the last checkpoint and a stop are sent again by a resumed run.
    """

    def __init__(self, folder: Path, project: str, config: dict, resume: bool):
        """Nothing is sent yet; raises BadInput where wandb is not installed."""
        self.wandb = find_wandb()
        self.folder, self.project, self.config, self.resume = folder, project, config, resume
        self.run: Any = None
        self.stages: set[str] = set()

    def add(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Send the values of one step of a stage."""
        if self.run is None:
            self.run = self._open()
        known = {f"{stage}/{name}": value for name, value in values.items()}
        if stage not in self.stages:
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self.stages.add(stage)
        self.run.log({**known, f"{stage}/step": step})

    def _open(self) -> Any:
        kept = self.folder / ID
        name = kept.read_text().strip() if self.resume and kept.exists() else None
        try:
            run = self.wandb.init(
                project=self.project, name=self.folder.name, config=self.config,
                dir=str(self.folder), id=name, resume="allow",
            )
        except Exception as error:  # Its errors of login and network have no common class.
            raise BadInput(
                f"Weights & Biases cannot be reached ({error}): `wandb login`, set "
                "WANDB_MODE=offline, or leave the setting `wandb` out"
            ) from error
        write_text(kept, run.id)
        return run

    def close(self) -> None:
        """Send what is left; in a `finally` after an exception the run counts as failed."""
        if self.run is not None:
            self.run.finish(exit_code=0 if sys.exc_info()[0] is None else 1)
