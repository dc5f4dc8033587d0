"""Checkpoints: asynchronous, atomic, verified, restored onto any mesh."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from rabit_jax.errors import BadInput

logging.getLogger("absl").setLevel(logging.ERROR)
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


@jax.jit
def checksum(tree: Any) -> jax.Array:
    """A uint32 of all bits of a tree: `sum_n (2 n + 1) word_n` modulo 2^32 over every array.

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


def abstract(tree: Any, shardings: Any = None) -> Any:
    """Shapes, dtypes and target shardings of a tree, to restore onto."""
    if shardings is None:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
        )
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


class Checkpoints:
    """Checkpoints of one stage in a folder, one per kept step.

    Saving returns at once and is finished in the background; a checkpoint appears under its final
    name only when it is whole. Each holds a checksum of its bits that restoring verifies.

    Example:
      >>> with Checkpoints("runs/a/checkpoints/qat") as checkpoints:
      ...     checkpoints.save(100, state)
      ...     step, state = checkpoints.restore_last(abstract(state))
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        """Open or create `folder`; at most `keep` checkpoints stay."""
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self.folder = Path(folder).absolute()
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: Any) -> None:
        """Save `state` after `step` steps, in the background.

        Raises:
          BadInput: the folder holds that step or a later one, of another run.
        """
        tree = {"state": state, "checksum": checksum(state)}
        if step in self.manager.all_steps() or not self.manager.save(
            step, args=ocp.args.StandardSave(tree)
        ):
            raise BadInput(
                f"{self.folder} holds checkpoints up to step {self.manager.latest_step()}, so step "
                f"{step} cannot be saved there: resume them or choose an empty folder"
            )

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        self.manager.wait_until_finished()
        return sorted(self.manager.all_steps())

    def restore(self, step: int, target: Any) -> Any:
        """Restore one step onto the shapes and shardings of `target` (see `abstract`).

        Raises:
          BadInput: it cannot be read, or its bits do not match its checksum.
        """
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
                f"checkpoint {self.folder / str(step)} cannot be read "
                f"({(str(error).strip() or type(error).__name__).splitlines()[0][:200]})"
            ) from error
        if int(checksum(found["state"])) != int(found["checksum"]):
            raise BadInput(
                f"checkpoint {self.folder / str(step)} is damaged: its checksum does not match"
            )
        return found["state"]

    def restore_last(self, target: Any) -> tuple[int, Any] | None:
        """The newest whole checkpoint as `(step, state)`, None where there is none.

        One that cannot be read is named on stderr and the one before it is tried; once that has
        loaded, the bad one is set aside as `<folder>-damaged-<step>`.

        Raises:
          BadInput: there are checkpoints and none can be read; all stay where they are.
        """
        bad: list[int] = []
        for step in reversed(self.steps()):
            try:
                found = self.restore(step, target)
            except BadInput as error:
                print(f"{error}; trying the one before it", file=sys.stderr)
                bad.append(step)
                continue
            for other in bad:
                (self.folder / str(other)).rename(f"{self.folder}-damaged-{other}")
            if bad:
                self.manager.reload()
            return step, found
        if bad:
            raise BadInput(
                f"no checkpoint in {self.folder} can be read: start the stage again without them"
            )
        return None

    def wait(self) -> None:
        """Wait until the last save is on disk; raises what went wrong in the background."""
        self.manager.wait_until_finished()

    def __enter__(self) -> Checkpoints:
        """Itself."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Finish pending saves."""
        self.manager.wait_until_finished()
        self.manager.close()
