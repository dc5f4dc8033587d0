"""Several processes that run one program on one mesh: who writes, and what all have to agree on.

Every process runs the same code on its part of the arrays (`jax.distributed`). Files, logs and
records are the first one's; what a process reads from a disk and then decides on is decided by the
first and told to the others, since a decision that differs between processes is a deadlock.

In a single process everything here does the plain thing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from jax.typing import ArrayLike
from jaxtyping import PyTree

from rabit_jax.errors import BadInput, ToldByFirst
from rabit_jax.types import Json

T = TypeVar("T")
Told = TypeVar("Told", bound="bool | int | float | str | list | dict | None")  # by JSON
SHORTEST = 256  # bytes of a message


def several() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this process writes files and logs."""
    return not several() or jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Return once every process is here; `name` is that of the place in the program."""
    if several():
        multihost_utils.sync_global_devices(name)


def any_asks(flag: bool) -> bool:
    """Whether the flag is set in any process; all must call it."""
    if not several():
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def all_agree(flag: bool) -> bool:
    """Whether the flag is set in every process; all must call it."""
    return not any_asks(not flag)


def first_does(work: Callable[[], Told]) -> Told:
    """What `work` returns in the first process, which alone does it; others wait and get the same.

    The result must be JSON, or None.

    Raises:
      BadInput: `work` raised it; in the other processes as `ToldByFirst`.
    """
    if not several():
        return work()
    told: Json = {}
    failed: BaseException | None = None
    if first():
        try:
            told = {"result": work()}
        except BadInput as error:
            told, failed = {"error": str(error)}, error
    told = _from_first(told)
    if failed is not None:
        raise failed
    if "error" in told:
        raise ToldByFirst(told["error"])
    return told["result"]


def first_before_others(work: Callable[[], T]) -> T:
    """What `work` returns, done by the first process and, when that has finished, by the others.

    For work that leaves a cache on a shared disk, which the others then read.
    """
    if not several():
        return work()
    result: list[T] = []

    def begin() -> None:
        result.append(work())

    first_does(begin)
    return result[0] if first() else work()


def _from_first(value: Json) -> Json:
    """A JSON object of the first process, in all of them."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    # In few lengths, for each is compiled anew.
    padded = np.zeros(max(SHORTEST, 1 << (length - 1).bit_length()), np.uint8)
    if first():
        padded[:length] = text
    found = np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)
    return json.loads(found[:length].tobytes().decode())


def whole(tree: PyTree, everywhere: bool = True) -> PyTree:
    """Arrays that lie in parts on several processes as whole ones on the host; others stay.

    Args:
      tree: of arrays.
      everywhere: False keeps them in the first process alone and gives None elsewhere; one array is
        gathered at a time, so the others hold no more than that.
    """
    if not several():
        return tree

    def gathered(leaf: object) -> object:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if leaf.is_fully_replicated:
            return np.asarray(leaf)
        found = multihost_utils.process_allgather(leaf, tiled=True)
        return found if everywhere or first() else None

    return jax.tree.map(gathered, tree)


def on_mesh(tree: PyTree, shardings: PyTree[Sharding] | Sharding) -> PyTree:
    """Arrays on the devices of their shardings, like `jax.device_put`.

    With several processes host arrays are the same in each of them, and each puts its own parts on
    its own devices: nothing is sent and nothing compared.
    """
    if not several():
        return jax.device_put(tree, shardings)

    def put(leaf: ArrayLike, sharding: Sharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    if isinstance(shardings, Sharding):
        return jax.tree.map(lambda leaf: put(leaf, shardings), tree)
    return jax.tree.map(put, tree, shardings)
