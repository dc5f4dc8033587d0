"""Passes over the blocks of a decoder with one block in memory, the states between them on disk.

Each function below is compiled once and serves every block: which layer it is shows only in its
arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from rabit_jax import Stats, hosts
from rabit_jax.calibration.blockwise import Block, block_sums
from rabit_jax.calibration.probes import added, root_mean
from rabit_jax.evaluate.perplexities import features_nats
from rabit_jax.experiments.engine.pieces import Pieces
from rabit_jax.formats.checkpoint import Checkpoint
from rabit_jax.models.block import block
from rabit_jax.models.config import ModelConfig, compute_dtype
from rabit_jax.models.decoder import Decoder
from rabit_jax.models.rotary import local_layers, make_context
from rabit_jax.signs.ste import F32
from rabit_jax.train.block_tuning import Block as TunedBlock
from rabit_jax.train.losses import features_loss
from rabit_jax.train.sharding import batch_sharding, param_shardings
from rabit_jax.types import Array, Batch, Params
from rabit_jax.weights.mixed_stack import at_most_paths
from rabit_jax.weights.shardings import gather_when_used, split_rows

T = TypeVar("T")


class Source(Protocol):
    """Where params come from, part by part."""

    def block(self, n: int) -> Params:
        """Params of one block under `layers`, without the axis of layers."""
        ...

    def ends(self, *names: str) -> Params:
        """Those of `embed`, `final_norm`, `head` that are asked for and there."""
        ...


@dataclass(frozen=True)
class FromCheckpoint:
    """Full-precision params, read from the checkpoint's files at every call, float32."""

    checkpoint: Checkpoint

    def block(self, n: int) -> Params:
        """Params of one block."""
        return self._read([p for p in self.checkpoint.shapes if p.startswith("layers/")], n)

    def ends(self, *names: str) -> Params:
        """Params outside the blocks."""
        return self._read([p for p in self.checkpoint.shapes if p.split("/")[0] in names])

    def _read(self, paths: list[str], layer: int | None = None) -> Params:
        found = {p: jnp.asarray(self.checkpoint.read(p, layer)) for p in paths}
        return unflatten_dict(found, sep="/")


@dataclass(frozen=True)
class FromBlocks:
    """Params with the blocks that a run has packed so far, read from its pieces at every call.

    Attributes:
      checkpoint: of everything else.
      pieces: of the run.
      name: layer -> name of the piece.
    """

    checkpoint: Checkpoint
    pieces: Pieces
    name: Callable[[int], str]

    def block(self, n: int) -> Params:
        """Params of one block: its packed weights, and what is not packed from the checkpoint."""
        found = {path: jax.tree.map(lambda a: jnp.asarray(a[0]), leaf)
                 for path, leaf in self.pieces.read_block(self.name(n))[0].items()}
        for path in self.checkpoint.shapes:
            if path.startswith("layers/") and path not in found:
                found[path] = jnp.asarray(self.checkpoint.read(path, n))
        return unflatten_dict(found, sep="/")

    def ends(self, *names: str) -> Params:
        """Params outside the blocks."""
        return FromCheckpoint(self.checkpoint).ends(*names)


@dataclass(frozen=True)
class FromParams:
    """Params in memory, such as those of a packed model."""

    params: Params

    def block(self, n: int) -> Params:
        """Params of one block."""
        return {"layers": jax.tree.map(lambda a: a[n], self.params["layers"])}

    def ends(self, *names: str) -> Params:
        """Params outside the blocks."""
        return {name: self.params[name] for name in names if name in self.params}


@dataclass(frozen=True)
class FirstPaths:
    """The model of the first sign paths of the blocks of another source.

    Attributes:
      source: of the whole.
      paths: of every weight; a weight that has fewer stays as it is.
    """

    source: Source
    paths: int

    def block(self, n: int) -> Params:
        """Params of one block."""
        return at_most_paths(self.source.block(n), self.paths)

    def ends(self, *names: str) -> Params:
        """Params outside the blocks."""
        return self.source.ends(*names)


def head_names(config: ModelConfig) -> tuple[str, ...]:
    """The params that final norm and head read."""
    return ("final_norm", "embed" if config.tied_head else "head")


@dataclass(frozen=True)
class Sweep:
    """The passes of one model over rows of tokens, all in batches of one shape.

    The state `x-<n>` is the input of block n, `x-<l>` the output of the last, and `dx-<n>` the
    gradient of the summed next-token cross-entropy by it; all in the compute dtype, so nothing is
    lost on the way through the disk.

    Attributes:
      config: of the decoder.
      source: of its params.
      pieces: where states are kept.
      tokens: int32 `[n, t]`, n a multiple of `batch_size`.
      mask: bool `[n, t]`, True for real tokens.
      batch_size: rows of a batch.
      prefix: of the names of states.
      mesh: devices that share rows and params; None for one device.
    """

    config: ModelConfig
    source: Source
    pieces: Pieces
    tokens: np.ndarray
    mask: np.ndarray
    batch_size: int
    prefix: str = ""
    mesh: Mesh | None = None

    def placed(self, params: Params) -> Params:
        """Params where they live on the mesh; without one they stay."""
        if self.mesh is None:
            return params
        return hosts.on_mesh(params, param_shardings(params, self.mesh))

    def _ends(self, *names: str) -> Params:
        return self.placed(self.source.ends(*names))

    def name(self, kind: str, n: int) -> str:
        """Name of a state: `kind` is x or dx."""
        return f"{self.prefix}{kind}-{n:03}"

    def embed(self) -> None:
        """Makes `x-000`."""
        ends = self._ends("embed")
        with self.pieces.writing(self.name("x", 0)) as write:
            for batch in self._batches():
                write(_embed(self.config, ends, batch["tokens"]))

    def forward(self, n: int, params: Params) -> None:
        """Makes `x-<n + 1>` from `x-<n>`."""
        params = self.placed(params)
        with self.pieces.writing(self.name("x", n + 1)) as write:
            for batch, x in zip(self._batches(), self._states("x", n), strict=True):
                write(_forward(self.config, params, x, self.local(n), batch["mask"]))

    def inputs(
        self, n: int, params: Params, paths: Collection[str], clip: float
    ) -> dict[str, Stats]:
        """Makes `x-<n + 1>` and returns the statistics of block n with `s_out = 1`."""
        total, params = None, self.placed(params)
        with self.pieces.writing(self.name("x", n + 1)) as write:
            for batch, x in zip(self._batches(), self._states("x", n), strict=True):
                y, sums = _forward_sums(
                    self.config, params, x, self.local(n), batch["mask"], paths, clip
                )
                write(y)
                total = added(total, hosts.whole(sums))
        return root_mean(total, int(self.mask.sum()))

    def head_gradient(self, chunk: int, labels: str, key: jax.Array) -> None:
        """Makes `dx-<l>` from `x-<l>`; batch by batch the key is folded with its first row."""
        last, ends = self.config.n_layers, self._ends(*head_names(self.config))
        with self.pieces.writing(self.name("dx", last)) as write:
            states = zip(self._batches(), self._states("x", last), strict=True)
            for step, (batch, x) in enumerate(states):
                own = jax.random.fold_in(key, step * self.batch_size)
                write(_head_gradient(self.config, ends, x, batch, own, chunk, labels))

    def backward(
        self, n: int, params: Params, paths: Collection[str], clip: float
    ) -> dict[str, Stats]:
        """Makes `dx-<n>` from `x-<n>` and `dx-<n + 1>`; returns the statistics of block n."""
        total, params = None, self.placed(params)
        with self.pieces.writing(self.name("dx", n)) as write:
            states = zip(
                self._batches(), self._states("x", n), self._states("dx", n + 1), strict=True
            )
            for batch, x, dy in states:
                dx, sums = _backward(
                    self.config, params, x, dy, self.local(n), batch["mask"], paths, clip
                )
                write(dx)
                total = added(total, hosts.whole(sums))
        return root_mean(total, int(self.mask.sum()))

    def nats(self, chunk: int) -> float:
        """Summed cross-entropy of the rows that have real tokens, from `x-<l>`, in float64."""
        last, ends = self.config.n_layers, self._ends(*head_names(self.config))
        states = zip(self._batches(), self._states("x", last), strict=True)
        return sum(float(_nats(self.config, ends, x, batch, chunk)) for batch, x in states)

    def state_bytes(self) -> int:
        """Bytes of one state."""
        item = jnp.dtype(compute_dtype(self.config)).itemsize
        return self.tokens.size * self.config.d_model * item

    def mapped(self, kind: str, n: int) -> np.ndarray:
        """A state of all rows, `[n, t, d]`, as a memory map."""
        shape = (*self.tokens.shape, self.config.d_model)
        return self.pieces.mapped(self.name(kind, n), shape, compute_dtype(self.config))

    def _batches(self) -> Iterator[dict[str, np.ndarray]]:
        for begin in range(0, len(self.tokens), self.batch_size):
            rows = slice(begin, begin + self.batch_size)
            yield self._rows({"tokens": self.tokens[rows], "mask": self.mask[rows]})

    def _states(self, kind: str, n: int) -> Iterator[np.ndarray | Array]:
        shape = (self.batch_size, self.tokens.shape[1], self.config.d_model)
        self.pieces.check_size(self.name(kind, n), self.state_bytes())
        found = self.pieces.reading(self.name(kind, n), shape, compute_dtype(self.config))
        return map(self._rows, found)

    def _rows(self, batch: T) -> T:
        """A batch split by rows over the mesh."""
        return batch if self.mesh is None else hosts.on_mesh(batch, batch_sharding(self.mesh))

    def local(self, n: int) -> np.ndarray:
        """Whether block n attends to a window only, a bool scalar."""
        return local_layers(self.config)[n]


@cache
def tuned_block(config: ModelConfig) -> TunedBlock:
    """`block(params, {"x", "local"}) -> output`, one function for all blocks of a model, for
    `tune_block`."""

    def run(params: Params, batch: Batch) -> Array:
        x = batch["x"]
        return _block(config, batch["local"], jnp.ones(x.shape[:2], bool))(params, x)

    return run


def _block(config: ModelConfig, local: Array, mask: Array) -> Block:
    view = make_context(config, mask).view(local)

    def run(params: Params, x: Array) -> Array:
        own = gather_when_used(params)
        return split_rows(block(own["layers"], split_rows(x), view, config)[0])

    return run


def _decoder(config: ModelConfig, ends: Params, x: Array, method: str) -> Array:
    return cast(Array, Decoder(config).apply({"params": ends}, x, method=method))


@partial(jax.jit, static_argnames="config")
def _embed(config: ModelConfig, ends: Params, tokens: Array) -> Array:
    return _decoder(config, ends, tokens, "embedded")


@partial(jax.jit, static_argnames="config")
def _forward(config: ModelConfig, params: Params, x: Array, local: Array, mask: Array) -> Array:
    return _block(config, local, mask)(params, x)


@partial(jax.jit, static_argnames=("config", "paths", "clip"))
def _forward_sums(config, params, x, local, mask, paths, clip):
    block = _block(config, local, mask)
    y, _, sums = block_sums(block, params, x, jnp.zeros_like(x), mask, paths, clip)
    # As sums of squares of 1, whose root mean square is 1 and changes no importance.
    count = jnp.sum(mask.astype(F32))
    return y, {p: Stats(s.s_in, jnp.full_like(s.s_out, count)) for p, s in sums.items()}


@partial(jax.jit, static_argnames=("config", "paths", "clip"))
def _backward(config, params, x, dy, local, mask, paths, clip):
    _, dx, sums = block_sums(_block(config, local, mask), params, x, dy, mask, paths, clip)
    return dx, sums


@partial(jax.jit, static_argnames=("config", "chunk", "labels"))
def _head_gradient(config, ends, x, batch, key, chunk, labels):
    def loss(x: Array) -> Array:
        features = _decoder(config, ends, x, "normed")

        def head(part: Array) -> Array:
            return _decoder(config, ends, part, "head")

        return features_loss(head, features, batch, chunk, labels, key)[0]

    return jax.grad(loss)(x)


@partial(jax.jit, static_argnames=("config", "chunk"))
def _nats(config, ends, x, batch, chunk):
    features = _decoder(config, ends, x, "normed")
    return features_nats(
        Decoder(config), ends, features, batch["tokens"], batch["mask"][:, :1], chunk
    )
