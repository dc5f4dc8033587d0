"""The run folder `runs/<name>`: the config that it belongs to, and where things lie in it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from pathlib import Path

from rabit_jax import BadInput
from rabit_jax.atomic import write_text
from rabit_jax.experiments.engine.config import difference, dump_yaml, load_config, to_dict
from rabit_jax.experiments.engine.metrics import Metrics, WandbLog
from rabit_jax.experiments.engine.records import refuse_later
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.locks import locked
from rabit_jax.progress import say

# Names that a run writes. A folder that holds one of them and no config is somebody else's.
OWN = ("calibration.safetensors", "checkpoints", "packed", "teacher")


class RunFolder:
    """`runs/<name>`: `config.yaml`, `metrics.jsonl`, `checkpoints/`, `stages/`, `packed/`.

    Attributes:
      path: of the folder.
      config: that it is to hold.
      metrics: of the run.
    """

    def __init__(self, config: RunConfig):
        """The folder of a config; nothing is written yet."""
        self.path = Path(config.output) / config.name
        self.config = config
        self.metrics = Metrics(self.path)
        self._lock = contextlib.ExitStack()
        self._locked = False

    def lock(self) -> None:
        """Become the one process that writes the folder, until `close`.

        Raises:
          BadInput: another process works in it, which the message names, a later version of this
            package has worked in it, or it cannot be written.
        """
        if self._locked:
            return
        refuse_later(self.path)
        try:
            self._lock.enter_context(locked(self.path / ".lock", f"the run folder {self.path}"))
        except OSError as error:
            raise self._unwritable(error) from error
        self._locked = True

    def check(self) -> None:
        """Raises BadInput where the folder could not be made: a run finds that out before it reads
        text, which may take hours."""
        try:
            here = self.path.absolute()
            place = next(p for p in (here, *here.parents) if p.exists())
            if not place.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if not os.access(place, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise self._unwritable(error) from error

    def exists(self) -> bool:
        """Whether a run was started in the folder."""
        return (self.path / "config.yaml").exists()

    def close(self) -> None:
        """Send what is left of the metrics and give the lock up."""
        try:
            self.metrics.close()
        finally:  # what is left may not fit on a full disk
            self._lock.close()
            self._locked = False

    def open(self, resume: bool) -> None:
        """Create the folder, lock it and write the resolved config.

        Raises:
          BadInput: `resume` with a config that differs from the one in the folder, a folder that
            is no run's or a later version's, is in use or cannot be written, or Weights & Biases is
            asked for and not installed.
        """
        if project := self.config.wandb:
            self.metrics.wandb = WandbLog(self.path, project, to_dict(self.config), resume)
        written = self.path / "config.yaml"
        changed = self._changed(written) if written.exists() else ""
        if resume and changed:
            raise BadInput(
                f"cannot resume {self.path}: its config differs ({changed}); "
                "take the change back, or run without --resume to redo what it affects"
            )
        if changed:
            say(f"{self.path} holds a run with another config ({changed}); stages that the change "
                "affects are redone in it, name=... starts a run beside it")
        taken = [name for name in OWN if (self.path / name).exists()]
        if taken and not written.exists():
            raise BadInput(
                f"{self.path} holds {', '.join(taken)} but no config.yaml, so it is not the folder "
                "of a run: set name or output to another place"
            )
        try:
            self.lock()
            write_text(written, dump_yaml(self.config))
            self.metrics.forget()  # whatever reads the file finds whole lines of JSON
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> BadInput:
        return BadInput(
            f"cannot write the run folder {self.path} ({error.strerror or error}); set output to "
            "another place"
        )

    def _changed(self, written: Path) -> str:
        """How the config in the folder differs from this one, "" where it does not."""
        try:
            before = load_config(RunConfig, written)
        except BadInput as error:
            return str(error)
        # A checkpoint restores on any mesh, so a run may go on with other devices.
        before = dataclasses.replace(before, mesh=self.config.mesh, hosts=self.config.hosts)
        return "; ".join(difference(before, self.config).splitlines())

    def checkpoints(self, stage: str) -> Path:
        """Folder of a stage's checkpoints."""
        return self.path / "checkpoints" / stage
