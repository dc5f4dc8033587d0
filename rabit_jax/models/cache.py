"""The key-value cache: arrays or codes of 8 or 4 bits, and windows that keep their last keys only.

Layers that see all earlier keys share one stack of slots, layers with a sliding window another one,
a ring: the token at place p of a sequence is in slot p modulo its size.

Axes: l layers, b batch, n key heads, s slots, h head_dim, t time, m groups of a head.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from rabit_jax.errors import BadInput
from rabit_jax.models.config import ModelConfig
from rabit_jax.tree import pytree_dataclass
from rabit_jax.types import Array

BITS = (16, 8, 4)
PIECE = 256  # tokens that a ring takes at once besides its window
GROUP = 32  # values of a head that share a step of 4-bit codes
SMALLEST = 2.0**-14  # of steps: the least normal float16


@pytree_dataclass
class Codes:
    """Keys or values in 8 bits, `x = s c`, or in 4, `x = low + s c` with a group's own s and low.

    Scales lie as the bits of float16 numbers, because XLA's CPU would widen a float16 array to
    write one slot of it.

    Attributes:
      codes: int8 `[..., s, h]`, -127 to 127; or uint8 `[..., s, h/2]`, where value i below h/2 is
        the low half of byte i and value `i + h/2` the high one, 0 to 15.
      scale: uint16 `[..., s, 1]`; or `[..., s, 2m]`, the s of all groups, then their low.
    """

    codes: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `[..., s, h]` of the values."""
        whole = self.codes.dtype == jnp.int8
        return (*self.codes.shape[:-1], self.codes.shape[-1] * (1 if whole else 2))


Store: TypeAlias = Array | Codes  # keys or values `[l, b, n, s, h]`


class ByKind(NamedTuple):
    """The stores of a model with windows: of its other layers, if any, and of those with one."""

    full: Store | None
    local: Store


Stores: TypeAlias = Store | ByKind


class Layer(NamedTuple):
    """A layer in a loop over all of them.

    Attributes:
      number: among all layers.
      local: whether it has the sliding window.
      own: its number among the layers of its kind, which share a store.
    """

    number: int | Array
    local: bool
    own: int | Array


def check_bits(bits: int) -> None:
    """Raises BadInput for cache bits that are none of 16, 8 and 4."""
    if bits not in BITS:
        raise BadInput(f"cache_bits is {bits}, wanted 16, 8 or 4: 16 keeps keys and values in the "
                       "dtype that the engine computes in")


def group_of(head_dim: int) -> int:
    """Values that share a step of 4-bit codes: 32, or half a head that 64 does not divide."""
    return GROUP if head_dim % (2 * GROUP) == 0 else head_dim // 2


def encode(x: Float[Array, "*a h"], bits: int) -> Codes:
    """The codes nearest to `x`.

    8 bits: `s = max |x| / 127` over the head. 4 bits: `low = min x`, `s = (max x - low) / 15`
    over a group of `group_of(h)` values. Codes are rounded for the scales as float16 has them.
    """
    x = x.astype(jnp.float32)
    if bits == 8:
        step = _half(jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127, SMALLEST))
        codes = jnp.clip(jnp.round(x / step), -127, 127).astype(jnp.int8)
        return Codes(codes, _bits(step))
    *lead, h = x.shape
    groups = x.reshape(*lead, -1, group_of(h))
    low, high = _half(jnp.min(groups, axis=-1)), jnp.max(groups, axis=-1)
    step = _half(jnp.maximum((high - low) / 15, SMALLEST))
    codes = jnp.clip(jnp.round((groups - low[..., None]) / step[..., None]), 0, 15)
    codes = codes.astype(jnp.uint8).reshape(*lead, 2, h // 2)
    return Codes(codes[..., 0, :] | codes[..., 1, :] << 4,
                 jnp.concatenate([_bits(step), _bits(low)], axis=-1))


def decoded(codes: Codes) -> Float[Array, "*a h"]:
    """The values of codes, float32 `[..., h]`."""
    scale = jax.lax.bitcast_convert_type(codes.scale, jnp.float16).astype(jnp.float32)
    if codes.codes.dtype == jnp.int8:
        return codes.codes.astype(jnp.float32) * scale
    halves = jnp.stack([codes.codes & 15, codes.codes >> 4], axis=-2)
    *lead, h = codes.shape
    step, low = jnp.split(scale, 2, axis=-1)
    groups = halves.reshape(*lead, step.shape[-1], -1).astype(jnp.float32)
    return (groups * step[..., None] + low[..., None]).reshape(*lead, h)


def _half(x: Array) -> Array:
    """Float32 numbers that float16 holds; XLA would leave out a conversion there and back."""
    return jax.lax.reduce_precision(jnp.clip(x, -65504, 65504), exponent_bits=5, mantissa_bits=10)


def _bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x.astype(jnp.float16), jnp.uint16)


def like(store: Store, new: Float[Array, "b n t h"]) -> Store:
    """New keys or values in the form of a store."""
    if not isinstance(store, Codes):
        return new.astype(store.dtype)
    return encode(new, 8 if store.codes.dtype == jnp.int8 else 4)


def empty_stores(config: ModelConfig, batch: int, slots: int, bits: int = 16) -> Stores:
    """Zeros for the keys, or for the values, of all layers; take the config of the engine.

    With 16 bits in the compute dtype, on a CPU in float32: XLA's CPU widens a whole bfloat16 cache
    to write one slot of it.
    """
    check_bits(bits)

    def store(layers: int, slots: int) -> Store:
        shape = (layers, batch, config.n_kv_heads, slots, config.head_dim)
        if bits == 16:
            on_cpu = jax.default_backend() == "cpu"
            return jnp.zeros(shape, "float32" if on_cpu else config.dtype)
        outline = jax.eval_shape(
            lambda: encode(jnp.zeros((*shape[3:],)), bits))
        return jax.tree.map(lambda a: jnp.zeros((*shape[:3], *a.shape), a.dtype), outline)

    local = sum(config.local_layers)
    if not windowed(config):
        return store(config.n_layers, slots)
    full = config.n_layers - local
    return ByKind(store(full, slots) if full else None, store(local, ring_slots(config, slots)))


def windowed(config: ModelConfig) -> bool:
    """Whether some layers have a sliding window, and so a store of their own."""
    return config.window is not None and any(config.local_layers)


def ring_slots(config: ModelConfig, slots: int) -> int:
    """Slots of the layers with a window for a cache of `slots`.

    A query of the last 256 tokens still finds its window when all of them have been written, so
    that a piece of a prompt is written first and read then.
    """
    assert config.window is not None
    return min(slots, config.window + PIECE - 1)


def of_kind(stores: Stores, local: bool) -> Store:
    """The store of layers with a window, or of the others."""
    if not isinstance(stores, ByKind):
        return stores
    found = stores.local if local else stores.full
    assert found is not None
    return found


def with_kind(stores: Stores, local: bool, new: Store) -> Stores:
    """The stores with that of `of_kind` replaced."""
    if not isinstance(stores, ByKind):
        return new
    return stores._replace(local=new) if local else stores._replace(full=new)


def ring_places(last: Int[Array, "*b"], size: int) -> Int[Array, "*b s"]:
    """The place in the sequence of what each slot of a ring holds once `last` is written; negative
    where nothing is."""
    slot = jnp.arange(size, dtype=jnp.int32).reshape((1,) * last.ndim + (size,))
    return last[..., None] - (last[..., None] - slot) % size


def pattern(local: Bool[np.ndarray, " l"]) -> int:
    """The shortest period of the kinds of the layers."""
    layers = len(local)
    return next(p for p in range(1, layers + 1) if (local[p:] == local[: layers - p]).all())


def kinds(config: ModelConfig) -> list[Layer]:
    """All layers."""
    flags = [windowed(config) and flag for flag in config.local_layers or ()]
    flags = flags or [False] * config.n_layers
    return [Layer(n, flag, sum(one == flag for one in flags[:n])) for n, flag in enumerate(flags)]
