"""Checkpoints: asynchronous, atomic, verified, restored onto any mesh."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Bool, PyTree, UInt32

from rabit_jax import hosts
from rabit_jax.atomic import free_name, remove
from rabit_jax.errors import BadInput, first_line
from rabit_jax.json_text import parse
from rabit_jax.progress import say
from rabit_jax.types import Array
from rabit_jax.workspaces import naming

# Orbax logs every error with its traceback in each of its threads and raises it as well.
logging.getLogger("absl").setLevel(logging.CRITICAL)
Tree = TypeVar("Tree")
_ITEM = "default"  # the folder in that of a step in which Orbax keeps the one tree
_TIMES = "_CHECKPOINT_METADATA"  # when the step was saved; nothing of the state depends on it
_LARGEST = 1 << 20  # bytes of that file, which has some hundred
_OF_TIMES: dict[str, type | tuple[type, ...]] = {  # its fields; Orbax refuses any other kind
    "item_handlers": (dict, str), "metrics": dict, "performance_metrics": dict,
    "init_timestamp_nsecs": int, "commit_timestamp_nsecs": int, "custom_metadata": dict,
}
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


@jax.jit
def checksum(tree: PyTree[Array]) -> UInt32[Array, ""]:
    """A checksum of all bits of a tree: `sum_n (2 n + 1) word_n` modulo 2^32 over every array.

    Integer sums do not depend on their order, so the value is the same on every mesh.
    """
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
        words = jax.lax.bitcast_convert_type(leaf, _UNSIGNED[leaf.dtype.itemsize]).astype(
            jnp.uint32
        )
        strides = [1]
        for n in reversed(leaf.shape[1:]):
            strides.insert(0, strides[0] * n)
        index = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, stride in enumerate(strides[: leaf.ndim]):
            index += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(
                stride % 2**32
            )
        total = total * jnp.uint32(31) + jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)
    return total


@jax.jit
def all_finite(tree: PyTree[Array]) -> Bool[Array, ""]:
    """Whether no array of a tree holds NaN or infinity."""
    found = jnp.bool_(True)
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            found &= jnp.all(jnp.isfinite(leaf))
    return found


def abstract(tree: Tree, shardings: PyTree[jax.sharding.Sharding] | None = None) -> Tree:
    """The tree with `jax.ShapeDtypeStruct` for each array, the target of `Checkpoints.restore`.

    The shardings are those of the arrays unless `shardings` gives others.
    """
    if shardings is None:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
        )
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def _holds_times(file: Path) -> bool:
    """Whether a file, and no link, is one that Orbax reads when it opens the folder."""
    try:
        if file.is_symlink() or not file.is_file() or file.stat().st_size > _LARGEST:
            return False
        found = parse(file.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and all(
        found.get(name) is None or isinstance(found[name], kind)
        and not (kind is int and not 0 <= found[name] < 1 << 63)
        for name, kind in _OF_TIMES.items()
    ) and len(found.keys() - _OF_TIMES.keys()) + len(found.get("custom_metadata") or ()) < 2


class Checkpoints:
    """Checkpoints of one stage in a folder, one per kept step.

    `save` returns at once and the files are written in the background; a checkpoint gets its final
    name only when it is complete. Each holds a checksum of its bits, which `restore` verifies.

    Example:
      >>> with Checkpoints("runs/a/checkpoints/qat") as checkpoints:
      ...     checkpoints.save(100, state)
      ...     step, state = checkpoints.restore_last(abstract(state))
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        """Open or create `folder`; at most `keep` checkpoints stay."""
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self.folder = Path(folder).absolute()
        self._drop_unreadable_times()
        # Without the handler Orbax takes it from the newest step, and an empty folder has none.
        self.manager = ocp.CheckpointManager(
            self.folder, options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    def save(self, step: int, state: PyTree[Array]) -> None:
        """Save `state` after `step` steps, in the background.

        Raises:
          BadInput: the folder already holds that step or a later one, of another run.
          OSError: the disk is full.
        """
        tree = {"state": state, "checksum": checksum(state)}
        self._check_room(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        there = hosts.first_does(lambda: os.path.lexists(self.folder / str(step)))
        if there and step not in self.manager.all_steps():
            self._set_aside(step)
        with naming(self.folder):
            saved = step not in self.manager.all_steps() and self.manager.save(
                step, args=ocp.args.StandardSave(tree))
        if not saved:
            raise BadInput(
                f"{self.folder} holds checkpoints up to step {self.manager.latest_step()}, so step "
                f"{step} cannot be saved there: resume them or choose an empty folder"
            )

    def _check_room(self, size: int) -> None:
        """Raise the error of a full disk in all processes where one of them has no room for a state
        of so many bytes: once they write, they would wait for each other in Orbax for minutes."""
        if not hosts.several():
            return
        if not hosts.all_agree(shutil.disk_usage(self.folder).free >= size):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        self.manager.wait_until_finished()
        return sorted(self.manager.all_steps())

    def begun(self) -> bool:
        """Whether anything has the name of a checkpoint, whole or damaged."""
        return hosts.first_does(lambda: bool(self._named_steps()))

    def restore(self, step: int, target: Tree) -> Tree:
        """The state after `step` steps, in the shapes and shardings of `target` (see `abstract`).

        Raises:
          BadInput: it cannot be read, or its bits do not match its checksum.
        """
        self.manager.wait_until_finished()
        folder = self.folder / str(step)
        if not (folder / _ITEM).is_dir():
            raise BadInput(f"checkpoint {folder} cannot be read (it holds no state)")
        # A link to a device that gives bytes for ever would be read into memory.
        if strange := next((f for f in folder.rglob("*") if not (f.is_file() or f.is_dir())), None):
            raise BadInput(f"checkpoint {folder} cannot be read ({strange.relative_to(folder)} is "
                           "no file)")
        replicated = jax.tree.leaves(target)[0].sharding
        if isinstance(replicated, jax.sharding.NamedSharding):
            replicated = jax.sharding.NamedSharding(replicated.mesh, jax.sharding.PartitionSpec())
        wanted = {
            "state": target,
            "checksum": jax.ShapeDtypeStruct((), jnp.uint32, sharding=replicated),
        }
        try:
            found = self.manager.restore(step, args=ocp.args.StandardRestore(wanted))
        except Exception as error:  # orbax and tensorstore raise many types for a damaged file
            raise BadInput(
                f"checkpoint {folder} cannot be read ({first_line(error)[:200]})"
            ) from error
        if int(checksum(found["state"])) != int(found["checksum"]):
            raise BadInput(f"checkpoint {folder} is damaged: its checksum does not match")
        return found["state"]

    def restore_last(
        self, target: Tree, sound: Callable[[Tree], object] = lambda state: True
    ) -> tuple[int, Tree] | None:
        """The newest whole checkpoint as `(step, state)`, None if there is none.

        If one cannot be read, a line on stderr names it and the one before it is tried; once that
        has loaded, the damaged one is renamed to `<folder>-damaged-<step>`, with a number behind
        it where that name is taken. What an interrupted save has left is removed.

        Args:
          target: as for `restore`.
          sound: whether a state that was read can be used.

        Raises:
          BadInput: there are checkpoints but none can be used; all keep their names.
        """
        self.manager.wait_until_finished()
        bad: list[int] = []
        for step in hosts.first_does(self._begin_restoring):
            found, error = None, None
            try:
                found = self.restore(step, target)
                if not sound(found):
                    raise BadInput(f"checkpoint {self.folder / str(step)} holds values that are "
                                   "not finite")
            except BadInput as failure:
                error = failure
            if not hosts.all_agree(error is None):
                error = error or "another process cannot read it"
                say(f"{error}; trying the one before it", always=True)
                bad.append(step)
                found = None  # before the next one is read
                continue
            assert found is not None
            for other in bad:
                self._set_aside(other)
            if bad:
                self.manager.reload()
            return step, found
        if bad:
            raise BadInput(
                f"no checkpoint in {self.folder} can be used: start the stage again without them "
                "(a run does so without --resume)"
            )
        return None

    def _begin_restoring(self) -> list[int]:
        """Remove what interrupted saves have left; the steps there are."""
        for unfinished in self.folder.glob("*.orbax-checkpoint-tmp*"):
            remove(unfinished)
        return self._named_steps()

    def _named_steps(self) -> list[int]:
        """Steps of all that has the name of a checkpoint, whatever it is, newest first."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted((int(n) for n in names if n.isascii() and n.isdigit() and str(int(n)) == n),
                      reverse=True)

    def _drop_unreadable_times(self) -> None:
        """Remove what Orbax would stumble over before any step is asked for, and can do without."""
        for step in self._named_steps():
            file = self.folder / str(step) / _TIMES
            if not os.path.lexists(file) or _holds_times(file):
                continue
            say(f"{file} is damaged and was removed: it holds times alone", always=True)
            remove(file)

    def _set_aside(self, step: int) -> None:
        """Rename what has the name of a step to a name that is free."""
        wanted = self.folder.with_name(f"{self.folder.name}-damaged-{step}")
        hosts.first_does(lambda: os.rename(self.folder / str(step), free_name(wanted)))

    def wait(self) -> None:
        """Wait until the last save is on disk; raises any error of the background thread."""
        with naming(self.folder):
            self.manager.wait_until_finished()

    def __enter__(self) -> Checkpoints:
        """The checkpoints themselves."""
        return self

    def __exit__(self, *_: object) -> None:
        """Finish pending saves."""
        with naming(self.folder):
            self.manager.wait_until_finished()
            self.manager.close()
