"""What weights of k sign matrices with row and column scales share; `PackedSign` deploys them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer
from jaxtyping import Bool, Float, Float16, Int8, UInt8

from rabit_jax.errors import BadInput, check_choice
from rabit_jax.kernels.layout import pack_bits, unpack_bits
from rabit_jax.signs.channel_importance import Stats, check_exponents, importance
from rabit_jax.signs.iterative_svid import svid
from rabit_jax.signs.ste import (
    F32,
    live_paths,
    outer,
    scale_gradients,
    ste_names,
    summed,
    with_sign,
)
from rabit_jax.tree import per_layer, pytree_dataclass
from rabit_jax.types import Array, Json, Shape
from rabit_jax.weights.axes import PACKED_DTYPES, Sizes
from rabit_jax.weights.costs import Cost
from rabit_jax.weights.leaves import Header, ReadPart, WeightNode, leaf


class SignPaths(WeightNode):
    """Mixin of weights `sum_i diag(h_i) B_i diag(g_i)` with `g: [..., k, o]`, `h: [..., k, i]`.

    They all pack into the same form, so costs follow from the shape and k alone.
    """

    def positive(self) -> Bool[Array, "... k i o"]:
        """Signs as bool `[..., k, i, o]`, True for +1."""
        raise NotImplementedError(f"{type(self).__name__} does not derive its signs")

    @property
    def k(self) -> int:
        """Number of sign paths."""
        return self.sizes()["k"]

    def signs(self) -> Int8[Array, "... k i o"]:
        """Signs as int8 `[..., k, i, o]`, each -1 or +1."""
        return plus_minus(self.positive())

    def cost(self) -> Cost:
        """Cost per token: `k (i + o)` multiplications and `k i o` additions a layer.

        The additions within a path are `i - 1` for each output, and one more joins the paths.
        """
        i, o = self.shape[-2:]
        paths = sum(sizes["k"] for sizes in self.layer_sizes())
        return Cost(paths * (i + o), paths * i * o, 0, self.deployed_bytes())


def plus_minus(positive: Bool[Array, "*n"]) -> Int8[Array, "*n"]:
    """Bool, True for +1 -> int8, each -1 or +1."""
    return positive.astype(jnp.int8) * 2 - 1


T = TypeVar("T")
SCALE_DTYPE = PACKED_DTYPES["scale"]


@pytree_dataclass
class PackedSign(SignPaths):
    """`W_hat = sum_i diag(h_i) B_i diag(g_i)` with `B_i` packed in the `rb256` layout.

    Attributes:
      bits: uint8 `[..., k, o, 32 ceil(i / 256)]`.
      g: float16 `[..., k, o]`.
      h: float16 `[..., k, i]`.
      limbs: bytes of fixed point that integer kernels give each activation, 2 or 3, as
        `init.record_limbs` chose it; None leaves it to them.
      layer_k: paths of each layer of a stack where these differ; the scales of further ones are 0,
        and a file does not hold them. None where all have k. See `weights.mixed_stack`.
    """

    bits: Array = leaf("sign", "k o i/8")
    g: Array = leaf("scale", "k o")
    h: Array = leaf("scale", "k i")
    limbs: int | None = struct.field(pytree_node=False, default=None)
    layer_k: tuple[int, ...] | None = struct.field(pytree_node=False, default=None, repr=False)

    header_type = "sign"
    header_sizes = {"k": "k"}

    def layer_sizes(self) -> list[Sizes]:
        """As of every weight, with the paths of each layer."""
        if self.layer_k is None or self.lead() != (len(self.layer_k),):
            return super().layer_sizes()  # also of one layer that was taken out of a stack
        return [self.sizes() | {"k": k} for k in self.layer_k]

    def matmul(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """`x @ W_hat`, `[..., i]` -> `[..., o]`, without building `W_hat`."""
        from rabit_jax.kernels.matmul import packed_matmul

        return packed_matmul(x, self.bits, self.g, self.h, limbs=self.limbs or 2)

    def positive(self) -> Bool[Array, "... k i o"]:
        """Signs as bool `[..., k, i, o]`, True for +1."""
        return jnp.swapaxes(unpack_bits(self.bits, self.shape[-2]), -1, -2).astype(bool)

    def paths(self) -> Iterator[Float[Array, "... i o"]]:
        """`W_hat_1, ..., W_hat_k`, float32 `[..., i, o]`."""
        signs = self.signs()
        for i in range(self.k):
            scales = outer(self.h[..., i, :].astype(F32), self.g[..., i, :].astype(F32))
            yield signs[..., i, :, :] * scales

    def dense(self) -> Float[Array, "... i o"]:
        """`W_hat`, float32 `[..., i, o]`, differentiable by the scales."""
        return scaled_signs(self.bits, self.g, self.h)

    def header(self) -> Json:
        """As of every weight, and `"limbs"` where they were chosen."""
        return super().header() | ({} if self.limbs is None else {"limbs": self.limbs})

    @classmethod
    def abstract(cls, header: Header, read: ReadPart | None = None) -> Self:
        """As of every weight; raises ValueError for limbs that are neither 2 nor 3."""
        limbs = header.get("limbs")
        if limbs not in (None, 2, 3):
            raise ValueError(f"limbs is {limbs!r}")
        return super().abstract(header, read).replace(limbs=limbs)


def with_layer_k(node: PackedSign) -> PackedSign:
    """A stack with the paths and the `layer_k` that its scales say, see `signs.ste.live_paths`.

    Traced scales, as under `jax.eval_shape`, say nothing: all paths stay.
    """
    if isinstance(node.g, Tracer):
        return node
    live = live_paths(node.g, node.h)
    ks = tuple(map(int, np.ravel(live.sum(axis=-1))))
    if live.ndim != 2 or set(ks) == {node.k}:
        return node
    most = max(ks)
    bits = (node.bits * live[..., None, None].astype(node.bits.dtype))[:, :most]
    return node.replace(bits=bits, g=node.g[:, :most], h=node.h[:, :most],
                        layer_k=None if set(ks) == {most} else ks)


@jax.custom_vjp
def scaled_signs(
    bits: UInt8[Array, "... k o n"], g: Float[Array, "... k o"], h: Float[Array, "... k i"]
) -> Float[Array, "... i o"]:
    """`sum_i diag(h_i) B_i diag(g_i)` of packed signs, float32 `[..., i, o]`.

    Backward, with `G = dL/dW_hat`: `dL/dg_i[o] = sum_in G B_i h_i`, `dL/dh_i[in] = sum_out G B_i
    g_i`. The signs are unpacked again in it, so no sign is kept in more than one bit.

    Args:
      bits: uint8 `[..., k, o, 32 ceil(i / 256)]`.
      g: `[..., k, o]` float.
      h: `[..., k, i]` float.
    """
    terms = (with_sign(outer(h[..., n, :], g[..., n, :]), positive)
             for n, positive in enumerate(_unpacked(bits, h.shape[-1])))
    return summed(terms)


def _unpacked(bits: jax.Array, inputs: int) -> Iterator[jax.Array]:
    """Signs of each path, bool `[..., i, o]`, True for +1."""
    for n in range(bits.shape[-3]):
        yield jnp.swapaxes(unpack_bits(bits[..., n, :, :], inputs), -1, -2).astype(bool)


def _forward(bits, g, h):
    return scaled_signs(bits, g, h), (bits, g, h)


def _backward(residuals, cotangent):
    bits, g, h = residuals
    signs = _unpacked(bits, h.shape[-1])
    return None, *scale_gradients(cotangent.astype(F32), signs, g, h)


scaled_signs.defvjp(_forward, _backward)


def pack_positive(positive: Bool[Array, "... i o"]) -> UInt8[Array, "... o n"]:
    """Bool `[..., i, o]`, True for +1 -> `rb256` bits, uint8 `[..., o, 32 ceil(i / 256)]`."""
    return per_layer(lambda one: pack_bits(one.T), positive)


@jax.jit
def balance(*scales: Float[Array, ...]) -> tuple[Float[Array, ...], ...]:
    """Give the scales of each path equal geometric means; their product is unchanged.

    The 16-bit range then serves all of them equally. float32, such as `g: [..., k, o]`,
    `h: [..., k, i]`. Scales of 0 stay 0.
    """
    scales = tuple(s.astype(F32) for s in scales)
    sizes = [jnp.where(s == 0, 1, jnp.abs(s)) for s in scales]
    log_means = [jnp.mean(jnp.log(s), axis=-1, keepdims=True) for s in sizes]
    wanted = sum(log_means) / len(scales)
    return tuple(s * jnp.exp(wanted - m) for s, m in zip(scales, log_means, strict=True))


def round_scales(name: str, **scales: Float[Array, ...]) -> tuple[Float16[Array, ...], ...]:
    """Balance the scales of a weight, `g=..., h=...`, and round them to float16.

    A path whose scales are all 0 stands for zeros, as those of a matrix of zeros do, and is kept.
    Traced scales, as under `jax.eval_shape`, have no values that could be checked.

    Raises:
      BadInput: a scale is or would become 0, subnormal, infinite or NaN; the message names the
        layer and the scale.
    """
    if any(isinstance(s, Tracer) for s in scales.values()):
        return tuple(s.astype(SCALE_DTYPE) for s in balance(*scales.values()))
    empty = _empty(scales)
    _check_scales(scales, empty, name, float(np.finfo(np.float32).tiny))
    rounded = tuple(s.astype(SCALE_DTYPE) for s in balance(*scales.values()))
    labelled = dict(zip(scales, rounded, strict=True))
    _check_scales(labelled, empty, name, float(np.finfo(np.float16).tiny))
    return rounded


def _empty(scales: Mapping[str, jax.Array]) -> np.ndarray:
    """Which paths have scales of 0 only: bool `[..., k, 1]`."""
    zero = [(np.asarray(s, np.float32) == 0).all(axis=-1, keepdims=True) for s in scales.values()]
    return np.logical_and.reduce(zero)


def _check_scales(
    scales: Mapping[str, jax.Array], empty: np.ndarray, name: str, smallest: float
) -> None:
    for label, scale in scales.items():
        values = np.asarray(scale, np.float32)
        kept = (np.abs(values) >= smallest) & np.isfinite(values)
        bad = np.argwhere(~(kept | empty))
        if len(bad):
            raise BadInput(
                f"{name}: scale {label}{bad[0].tolist()} becomes {values[tuple(bad[0])]:.3g} in "
                f"float16 ({len(bad)} of {values.size} leave the normal range 6.1e-05 to 65504): "
                "keep scales positive while training, or initialise this layer again"
            )


@dataclass(frozen=True)
class SignFit:
    """Settings of the preconditioned iterative residual SVID (arXiv 2602.05367, section 4).

    The scales are fitted to `diag(s_in^a_in) W diag(s_out^a_out)` and mapped back.

    Attributes:
      k: number of sign paths, 1 to 4.
      a_in: exponent of the input importance; 0 ignores it.
      a_out: exponent of the output importance; 0 ignores it.
      shrinkage: how far the importances are drawn to their mean, 0 to 1.
      rounds: most refinement rounds; 0 is greedy SVID.
      tolerance: share of the error below which a round's gain ends the rounds.
      ste: straight-through rule of the latents: identity, scaled, clipped, smooth, see
        `signs.ste.path_slope`, or one that `add_ste` named.
    """

    k: int = 2
    a_in: float = 0.5
    a_out: float = 0.5
    shrinkage: float = 0.0
    rounds: int = 80
    tolerance: float = 1e-3
    ste: str = "identity"

    def __post_init__(self):
        """Raises BadInput for a setting out of its range."""
        if self.k not in (1, 2, 3, 4):
            raise BadInput(f"k is {self.k}: the number of sign paths must be 1, 2, 3 or 4")
        if self.rounds < 0 or self.tolerance < 0 or not 0 <= self.shrinkage <= 1:
            raise BadInput(
                f"rounds {self.rounds}, tolerance {self.tolerance}, shrinkage {self.shrinkage}: "
                "rounds and tolerance must not be negative, shrinkage must lie in 0..1"
            )
        check_exponents(self.a_in, self.a_out)
        check_choice("ste", self.ste, ste_names())

    def scales(
        self, w: Float[Array, "... i o"], stats: Stats | None
    ) -> tuple[Float[Array, "... k o"], Float[Array, "... k i"]]:
        """Scales `g: [..., k, o]`, `h: [..., k, i]` float32 of `w: [..., i, o]`, layer by layer."""
        return fit_layers(_svid_scales, self, w, stats)


def _svid_scales(fit: SignFit, w: jax.Array, d_in: jax.Array, d_out: jax.Array) -> tuple:
    found = svid(w, fit.k, d_in, d_out, rounds=fit.rounds, tolerance=fit.tolerance)
    return found.g, found.h


@partial(jax.jit, static_argnums=(0, 1))
def fit_layers(
    method: Callable[..., T], fit: SignFit, w: Float[Array, "... i o"], stats: Stats | None
) -> T:
    """`method(fit, w, d_in, d_out)` of every matrix of a stack, one layer at a time.

    Args:
      method: of one matrix `[i, o]` and its importances `[i]`, `[o]`.
      fit: settings with `a_in`, `a_out` and `shrinkage`.
      w: `[..., i, o]` float.
      stats: calibration statistics `[..., i]`, `[..., o]`; None gives importances of 1.
    """
    d_in, d_out = importances(w.shape, stats, fit.a_in, fit.a_out, fit.shrinkage)
    return per_layer(partial(method, fit), w, d_in, d_out)


def importances(
    shape: Shape, stats: Stats | None, a_in: float, a_out: float, shrinkage: float
) -> tuple[Float[Array, "... i"], Float[Array, "... o"]]:
    """The diagonals `d_in: [..., i]`, `d_out: [..., o]` float32 of a preconditioner."""
    *lead, i, o = shape
    if stats is None:
        stats = Stats(jnp.ones((*lead, i)), jnp.ones((*lead, o)))
    return importance(stats.s_in, a_in, shrinkage), importance(stats.s_out, a_out, shrinkage)
