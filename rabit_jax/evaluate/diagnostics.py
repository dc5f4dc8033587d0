"""Inter-path adaptation: how the sign paths of each linear divide the teacher's output among them.

For one linear on inputs x: `y_t = x W_teacher`, `y_i = x W_hat_i`, `R_i = y_t - y_1 - ... - y_i`. A
meter stands in for the kernel and multiplies like it; one extra leaf, all zero, has as its
"gradient" the second moments of `(1, R_k, y_1, ..., y_k)`, so one `jit(grad)` measures all layers
through scan, remat and any mesh, without touching the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float

from rabit_jax.errors import BadInput
from rabit_jax.hosts import on_mesh
from rabit_jax.signs.ste import F32
from rabit_jax.tree import is_weight, leaves, map_leaves, pytree_dataclass, weights_of
from rabit_jax.types import Array, Batch, Json, Params, Weight
from rabit_jax.weights.seam import linear

Apply = Callable[[Params, Batch], Array]
NAMES = ("path_correlation", "residual_alignment", "slope", "relative_mse")


@pytree_dataclass
class Meter:
    """A kernel that compares what two weights make of its inputs.

    Attributes:
      teacher: float `[..., i, o]`.
      student: the weight node whose paths are measured.
      moments: float32 zeros `[..., k + 2, k + 2]`; its cotangent is `sum z z^T` over real tokens
        and outputs, `z = (1, R_k, y_1, ..., y_k)`. R_k stands in place of y_t, which is the sum of
        the others: the small error of a good fit is then no difference of large numbers.
      mask: bool `[..., b, t]`, True for real tokens.
      drive: whose product goes on through the model, "teacher" or "student".
    """

    teacher: jax.Array
    student: Weight
    moments: jax.Array
    mask: jax.Array
    drive: str = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `[..., i, o]` of the kernel."""
        return self.teacher.shape

    def matmul(self, x: Float[Array, "b t i"]) -> Float[Array, "b t o"]:
        """`x @ W` of the driving weight, `x: [b, t, i]` -> `[b, t, o]`.

        The gradient by x is zero: only moments, which need none, are ever taken from it.
        """
        if x.shape[:-1] != self.mask.shape:
            raise BadInput(
                f"a measured linear is fed {list(x.shape)} where the batch mask is "
                f"{list(self.mask.shape)}: diagnostics want inputs [b, t, i]"
            )
        weights = (self.teacher, self.student)
        return _metered(x, weights, self.moments, self.mask, self.drive, x.shape[-1])

    def dense(self) -> Float[Array, "... i o"]:
        """The driving matrix, `[..., i, o]`."""
        return self.teacher if self.drive == "teacher" else self.student.dense()


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _metered(x, weights, moments, mask, drive, inputs):
    return linear(x, weights[drive == "student"])


def _metered_forward(x, weights, moments, mask, drive, inputs):
    # Measured here and not in the backward, so that these few numbers are all that is kept for it.
    teacher, student = weights
    sums = _sums(x, teacher, student, mask)
    return _metered(x, weights, moments, mask, drive, inputs), sums


def _metered_backward(drive, inputs, sums, dy):
    dx = jnp.zeros((*dy.shape[:-1], inputs), dy.dtype)
    return dx, None, sums, None

_metered.defvjp(_metered_forward, _metered_backward)


def _sums(x: jax.Array, teacher: jax.Array, student: Weight, mask: jax.Array) -> jax.Array:
    x = jnp.where(mask[..., None], x, 0).astype(F32)
    product = partial(jnp.matmul, x, precision="highest")
    rest = product(teacher.astype(F32))
    one = jnp.broadcast_to(mask[..., None], rest.shape).astype(F32)
    y = []
    for path in student.paths():
        y.append(product(path))
        rest = rest - y[-1]
    z = jnp.stack([one, rest, *y])
    # Outputs first, tokens second: one float32 sum over both would stall once it is long enough.
    per_token = jnp.einsum("z...o,w...o->...zw", z, z, precision="highest")
    return jnp.sum(per_token, axis=tuple(range(mask.ndim)))


@partial(jax.jit, static_argnames=("apply", "drive", "replicated"))
def _moments(teacher, student, batch, apply, drive, replicated):
    """`{path: sum z z^T, [..., k + 2, k + 2] float32}` of one batch."""
    nodes, kernels = weights_of(student), dict(leaves(teacher))
    zeros = {
        path: jnp.zeros((*node.shape[:-2], *2 * (_paths(node) + 2,)))
        for path, node in nodes.items()
    }
    mask = batch.get("mask", jnp.ones(batch["tokens"].shape, bool)).astype(bool)

    def output(zeros):
        def meter(path, leaf):
            if path not in nodes:
                return leaf
            lead = nodes[path].shape[:-2]
            masks = jnp.broadcast_to(mask.reshape((1,) * len(lead) + mask.shape), lead + mask.shape)
            return Meter(kernels[path], nodes[path], zeros[path], masks, drive)

        driver = map_leaves(meter, teacher if drive == "teacher" else student)
        return jnp.sum(apply(driver, batch).astype(F32))

    sums = jax.grad(output)(zeros)
    return sums if replicated is None else jax.lax.with_sharding_constraint(sums, replicated)


def _paths(node: Weight) -> int:
    return len(jax.eval_shape(lambda node: list(node.paths()), node))


def diagnose(
    apply: Apply,
    teacher: Params,
    student: Params,
    batches: Iterable[Batch],
    *,
    drive: str = "teacher",
    batch_sharding: jax.sharding.NamedSharding | None = None,
) -> Json:
    """Correlation, alignment, slope and error of the paths of every quantised linear.

        path_correlation     Corr(y_i, y_j), mean over the pairs i < j; wanted negative
        residual_alignment   Corr(R_{i-1}, y_i), mean over i >= 2; wanted positive
        slope                Cov(R_{i-1}, y_i) / Var(y_i), mean over i >= 2; 1 is ideal
        relative_mse         |y_t - y_1 - ... - y_k|^2 / |y_t|^2

    Moments run over all real tokens and outputs, flattened and centred by the overall mean; float32
    within a batch, float64 over batches. Read them together: path correlation alone also falls with
    the ratio of the scales. Source: arXiv 2602.05367.

    Args:
      apply: `apply(params, batch) -> float array` that depends on all layers, for example the
        features of the model, which must multiply through `linear(x, w)`. Pass the same function
        again, not a new lambda, and nothing is compiled twice.
      teacher: full-precision params.
      student: params with weight nodes; each must name its terms by `paths()`.
      batches: dicts with `tokens: [b, t]` and, unless all tokens are real, `mask: [b, t]` bool,
        True for real tokens.
      drive: "teacher": x is what enters the linear in the teacher; "student": what enters it in the
        student, whose norms and embeddings then count too.
      batch_sharding: sharding of every batch entry on a mesh, None for one device. The params are
        used in the shards they are in.

    Returns:
      `{"mean": {name: float}, "layers": {"layers/attn/q": {name: [float per layer], "pairs":
      {"1-2": [...]}, "alignments": {"2": [...]}, "slopes": {"2": [...]}}}}`, plain floats for JSON.
      The first three names are None where k = 1, single entries None where a variance is zero;
      "mean" is over all projections and layers that have a number.

    Raises:
      BadInput: an unknown drive, no weight node, a teacher that lacks its kernel, no real token, a
        linear that `apply` never reached, or moments that are not finite.
    """
    _check(teacher, student, drive)
    replicated = None
    if batch_sharding is not None:
        replicated = jax.sharding.NamedSharding(batch_sharding.mesh, jax.sharding.PartitionSpec())
    total = None
    for batch in batches:
        if batch_sharding is not None:
            batch = on_mesh(batch, batch_sharding)
        sums = _moments(teacher, student, batch, apply, drive, replicated)
        sums = jax.tree.map(lambda a: np.asarray(a, np.float64), sums)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    if total is None:
        raise BadInput("diagnostics saw no batch: give them at least one with real tokens")
    layers = {path.removesuffix("/kernel"): _report(path, sums) for path, sums in total.items()}
    return {"mean": {name: _mean(layers, name) for name in NAMES}, "layers": layers}


def _check(teacher: Params, student: Params, drive: str) -> None:
    if drive not in ("teacher", "student"):
        raise BadInput(f"drive is {drive!r}: choose 'teacher' or 'student'")
    nodes, kernels = weights_of(student), dict(leaves(teacher))
    if not nodes:
        raise BadInput("diagnostics found no weight node in the student: convert it first")
    for path, node in nodes.items():
        kernel = kernels.get(path)
        if kernel is None or is_weight(kernel) or kernel.shape != node.shape:
            kind = type(kernel).__name__ if is_weight(kernel) else "array"
            found = "nothing" if kernel is None else f"{kind} {list(kernel.shape)}"
            raise BadInput(
                f"diagnostics of {path}: the teacher holds {found} there, wanted its "
                f"full-precision kernel {list(node.shape)}"
            )


def _report(path: str, sums: np.ndarray) -> Json:
    """The measures of one projection from `sum z z^T: [..., k + 2, k + 2]`."""
    sums = sums.reshape(-1, *sums.shape[-2:])
    count = sums[:, 0, 0]
    if not np.isfinite(sums).all():
        raise BadInput(f"diagnostics of {path}: its outputs are not finite; check both models")
    if not count.all():
        raise BadInput(
            f"diagnostics of {path}: no token reached it; the masks must keep some tokens and the "
            "output of apply must depend on every layer"
        )
    second = sums[:, 1:, 1:] / count[:, None, None]
    mean = sums[:, 0, 1:] / count[:, None]
    covariance = second - mean[:, :, None] * mean[:, None, :]
    error = _ratio(second[:, 0, 0], second.sum(axis=(1, 2)))
    return {**_adaptation(covariance), "relative_mse": _plain(error)}


def _adaptation(covariance: np.ndarray) -> Json:
    """The measures between paths, from the covariance `[l, k + 1, k + 1]` of `(R_k, y_1, ...)`."""
    unit = np.eye(covariance.shape[-1])
    k = len(unit) - 1

    def cov(u, v):
        return np.einsum("z,lzw,w->l", u, covariance, v)

    def corr(u, v):
        return _ratio(cov(u, v), np.sqrt(np.maximum(cov(u, u) * cov(v, v), 0)))

    pairs = {f"{i}-{j}": corr(unit[i], unit[j]) for i, j in combinations(range(1, k + 1), 2)}
    # R_{i-1} = R_k + y_i + ... + y_k
    rest = {i: unit[0] + unit[i:].sum(axis=0) for i in range(2, k + 1)}
    alignments = {str(i): corr(r, unit[i]) for i, r in rest.items()}
    slopes = {str(i): _ratio(cov(r, unit[i]), cov(unit[i], unit[i])) for i, r in rest.items()}
    groups = {"pairs": pairs, "alignments": alignments, "slopes": slopes}
    means = (_plain(np.mean(list(g.values()), axis=0)) if g else None for g in groups.values())
    listed = {name: {key: _plain(v) for key, v in g.items()} for name, g in groups.items()}
    return {**dict(zip(NAMES, means, strict=False)), **listed}


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full_like(a, np.nan), where=b > 0)


def _plain(values: np.ndarray) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in values]


def _mean(layers: Mapping[str, Json], name: str) -> float | None:
    found = [v for layer in layers.values() for v in layer[name] or () if v is not None]
    return float(np.mean(found)) if found else None
