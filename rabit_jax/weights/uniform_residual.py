"""The residual chain with evenly spaced levels: one scale pair for all paths, or one scale for each
group of inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from rabit_jax.errors import BadInput
from rabit_jax.signs.channel_importance import Stats
from rabit_jax.signs.iterative_svid import TINY, floored, rank1, root_of_unit
from rabit_jax.signs.ste import F32, coupled, outer, ste_names, summed, with_sign
from rabit_jax.tree import pytree_dataclass
from rabit_jax.types import Array
from rabit_jax.weights.leaves import choice, leaf, size
from rabit_jax.weights.residual_sign import ResidualSign
from rabit_jax.weights.sign_paths import PackedSign, SignFit, SignPaths, fit_layers
from rabit_jax.weights.uniform_sign import UniformSign, fit_group_scales


@dataclass(frozen=True)
class UniformResidualSpec(SignFit):
    """One scale pair, fitted like those of `ResidualSignSpec`; the settings are those of `SignFit`.

    Starts from the first path of greedy SVID. Each round derives the signs by the coupled forward,
    `C = sum_i 2^(1-i) B_i`, and refits `W ~ C * (h g^T)` by weighted alternating least squares:

        h_i = sum_o W C g / sum_o C^2 g^2;   g_o = sum_i W C h / sum_i C^2 h^2

    With a `group`, outputs have one scale for each group of inputs and inputs have none: the levels
    are then whole multiples of one step per group, which GPTQ folders and GGUF files hold exactly.
    It takes `k + 16 / group` bits a weight, row and column scales `k + 16 (i + o) / (i o)`: at
    k = 2 on 2048 x 2048 2.125 with groups of 128 against 2.016 (2.031 where a pair of scales is
    stored for each path, as here).

    Attributes:
      group: inputs that share the only scale of an output; 0 gives row and column scales.
      The others are those of `SignFit`.

    Example:
      >>> node = UniformResidualSpec(k=2).init(w)      # w: [..., i, o]
    """

    group: int = field(default=0, metadata={"added": True})
    type: Literal["uniform"] = field(default="uniform", kw_only=True)

    def __post_init__(self):
        """Raises BadInput for a setting out of its range."""
        super().__post_init__()
        if self.group < 0:
            raise BadInput(f"group is {self.group}: a group must hold at least 1 input, or be 0 "
                           "for row and column scales")

    def init(
        self, w: Float[Array, "... i o"], stats: Stats | None = None, key: jax.Array | None = None
    ) -> UniformResidual | UniformSign:
        """Kernel `[..., i, o]` -> `UniformResidual`, or `UniformSign` with a `group`, fitted layer
        by layer.

        Args:
          w: float `[..., i, o]`.
          stats: calibration statistics `[..., i]`, `[..., o]`; None fits the plain squared error.
          key: unused, nothing is random here.
        """
        latent = jnp.array(w, F32, copy=True)
        if self.group:
            s = fit_layers(fit_group_scales, self, w, stats)
            return UniformSign(latent, s, self.group, self.k, self.ste)
        g, h = fit_layers(_fit_layer, self, w, stats)
        return UniformResidual(latent, g, h, self.k, self.ste)

    def dense(self, node: UniformResidual | UniformSign) -> Float[Array, "... i o"]:
        """`W_hat: [..., i, o]` float32."""
        return node.dense()


def _fit_layer(fit: UniformResidualSpec, w: jax.Array, d_in: jax.Array, d_out: jax.Array) -> tuple:
    """`g: [1, o]`, `h: [1, i]` of one matrix; the best round is kept."""
    root = root_of_unit(w)
    p = w.astype(F32) / root / root * outer(d_in, d_out)
    magnitude = jnp.abs(p)

    def levels(g, h):
        """`C = sum_i 2^(1-i) B_i` of the current scales, so that `W_hat = C * (h g^T)`."""
        free = UniformResidual(p, g[None], h[None], fit.k).free()
        signs = (positive for positive, _ in coupled(free.latent, free.g, free.h))
        return summed(with_sign(jnp.full_like(p, 0.5**n), on) for n, on in enumerate(signs))

    def error(g, h):
        return jnp.sum(jnp.square(p - levels(g, h) * outer(h, g)))

    def step(state):
        count, g, h, before, _, best = state
        c = levels(g, h)
        pc, cc = p * c, jnp.square(c)
        h = jnp.maximum(pc @ g / jnp.maximum(cc @ jnp.square(g), TINY), 0)
        g = jnp.maximum(h @ pc / jnp.maximum(jnp.square(h) @ cc, TINY), 0)
        now = error(g, h)
        best = jax.tree.map(lambda a, b: jnp.where(now < best[0], a, b), (now, g, h), best)
        return count + 1, g, h, now, before - now, best

    def gaining(state):
        count, _, _, now, gain, _ = state
        return (count < fit.rounds) & ((gain > fit.tolerance * now) | (fit.tolerance == 0))

    g, h = rank1(magnitude, jnp.mean(magnitude, axis=1), 1e-4)
    start = error(g, h)
    state = (jnp.int32(0), g, h, start, jnp.asarray(jnp.inf, F32), (start, g, h))
    *_, (_, g, h) = jax.lax.while_loop(gaining, step, state)
    return root * floored(g / d_out)[None], root * floored(h / d_in)[None]


@pytree_dataclass
class UniformResidual(SignPaths):
    """`ResidualSign` with every path's scale half of that before: `a_i = a / 2^(i-1)`.

        W_hat = sum_i 2^(1-i) diag(h) B_i diag(g),  B_i = sign(W - W_hat_1 - ... - W_hat_{i-1})

    For k = 2 the levels are -3a/2, -a/2, a/2, 3a/2: a uniform 2-bit quantiser with a rank-1 scale.
    Beside `ResidualSign` it tells what one shared latent brings from what free scales bring.

    Attributes:
      latent: `W`, float32 or bfloat16 `[..., i, o]`.
      g: float32 `[..., 1, o]` output scale ("row scale") of the first path.
      h: float32 `[..., 1, i]` input scale ("column scale").
      k: number of sign paths.
      ste: straight-through rule of the latent, see `ste.path_slope`.
    """

    latent: Array = leaf("latent", "i o")
    g: Array = leaf("scale", "1 o")
    h: Array = leaf("scale", "1 i")
    k: int = size("k", default=2)
    ste: str = choice("identity", ste_names)

    packed = PackedSign

    def free(self) -> ResidualSign:
        """The same weight with a scale pair for every path: `g_i = g / 2^(i-1)`, `h_i = h`."""
        lead = (1,) * (self.g.ndim - 2)
        halves = 0.5 ** jnp.arange(self.k, dtype=F32).reshape(*lead, self.k, 1)
        return ResidualSign(
            self.latent, self.g * halves, jnp.repeat(self.h, self.k, axis=-2), self.ste
        )

    def dense(self) -> Float[Array, "... i o"]:
        """`W_hat`, float32 `[..., i, o]`; gradients as in `ste.effective_weight`."""
        return self.free().dense()

    def positive(self) -> Bool[Array, "... k i o"]:
        """Signs as bool `[..., k, i, o]`, True for +1."""
        return self.free().positive()

    def paths(self) -> Iterator[Float[Array, "... i o"]]:
        """`W_hat_1, ..., W_hat_k`, float32 `[..., i, o]`."""
        return self.free().paths()

    def pack(self, name: str) -> PackedSign:
        """As `ResidualSign`: the packed form stores, and is counted with, a pair for each path.

        Raises:
          BadInput: a scale leaves the float16 range; the message begins with `name`.
        """
        return self.free().pack(name)

    def rescaled(
        self, d_in: Float[Array, "... i"], d_out: Float[Array, "... o"]
    ) -> UniformResidual:
        """The node of `diag(d_in) W_hat diag(d_out)`, `d_in: [..., i]`, `d_out: [..., o]` > 0."""
        node = ResidualSign(self.latent, self.g, self.h).rescaled(d_in, d_out)
        return self.replace(latent=node.latent, g=node.g, h=node.h)
