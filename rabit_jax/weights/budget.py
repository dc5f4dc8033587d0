"""How many sign paths each matrix of a model gets under a budget of bits.

    minimise sum_m e_m(k_m)   subject to   sum_m b_m(k_m) <= B

is a multiple-choice knapsack: b_m(k) are the stored bits of matrix m with k paths and e_m(k) its
error. Its linear relaxation has a known solution (Sinha and Zoltners, The Multiple-Choice Knapsack
Problem, Operations Research 27, 1979): begin with the cheapest choice of every matrix and take the
steps along the lower convex hulls of (b_m, e_m) in the order of error saved per bit, until one does
not fit. What is taken up to there errs by less than the saving of that one step, which one matrix
of hundreds can hardly matter for; further steps that still fit are taken too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rabit_jax.errors import BadInput
from rabit_jax.signs.channel_importance import Stats
from rabit_jax.signs.ste import F32, outer
from rabit_jax.tree import leaves, map_leaves, weights_of
from rabit_jax.types import Array, Params, Shape, Spec, Weight
from rabit_jax.weights.residual_sign import ResidualSign, ResidualSignSpec


class Option(NamedTuple):
    """One choice of a matrix.

    Attributes:
      bits: that it is stored in.
      error: that it leaves.
    """

    bits: int
    error: float


def allocate(options: Sequence[Sequence[Option]], budget: float) -> list[int]:
    """The number of the option that each matrix takes.

    Args:
      options: of each matrix, any number in any order.
      budget: bits of all matrices together.

    Returns:
      Indices into the options. Their bits do not exceed the budget. Their error exceeds the least
      possible one by no more than the saving of the first step that did not fit.

    Raises:
      BadInput: the cheapest options do not fit.

    Example:
      >>> allocate([[Option(1, 5.0), Option(2, 1.0)], [Option(1, 2.0), Option(2, 1.5)]], 3)
      [1, 0]
    """
    hulls = [_hull(own) for own in options]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(own[n].bits for own, n in zip(options, chosen, strict=True))
    if left < 0:
        raise BadInput(f"a budget of {budget:.0f} bits: the cheapest options take "
                       f"{budget - left:.0f}")
    steps = []
    for m, (own, hull) in enumerate(zip(options, hulls, strict=True)):
        for a, b in zip(hull, hull[1:], strict=False):
            bits, saved = own[b].bits - own[a].bits, own[a].error - own[b].error
            steps.append((-saved / bits, m, b, bits))
    blocked = set()  # matrices whose next step did not fit
    for _, m, b, bits in sorted(steps):
        if m not in blocked and bits <= left:
            chosen[m], left = b, left - bits
        else:
            blocked.add(m)
    return chosen


def _hull(options: Sequence[Option]) -> list[int]:
    """The options on the lower convex hull of (bits, error), the cheapest first."""
    hull: list[int] = []
    for n in sorted(range(len(options)), key=lambda n: options[n]):
        bits, error = options[n]
        if hull and error >= options[hull[-1]].error:
            continue
        while len(hull) > 1:
            (b0, e0), (b1, e1) = options[hull[-2]], options[hull[-1]]
            if (e0 - e1) * (bits - b1) > (e1 - error) * (b1 - b0):
                break
            hull.pop()
        if hull and options[hull[-1]].bits == bits:
            hull.pop()
        hull.append(n)
    return hull


def path_specs(spec: Spec) -> list[Spec]:
    """The spec with 1, 2, ... paths up to its own number; itself alone where k is not free.

    Free is the k of `ResidualSignSpec` without groups: its stacks hold layers of different k.
    """
    if not isinstance(spec, ResidualSignSpec) or spec.group:
        return [spec]
    return [dataclasses.replace(spec, k=k) for k in range(1, spec.k + 1)]


def stored_bits(spec: Spec, shape: Shape) -> int:
    """Bits of one matrix `[i, o]` in a packed file, scales and padding included."""
    node = jax.eval_shape(spec.init, jax.ShapeDtypeStruct(shape, F32))
    return 8 * node.deployed_bytes()


def budget_range(
    specs: Mapping[str, Spec], shapes: Mapping[str, Shape]
) -> tuple[float, float]:
    """The least and the most stored bits per weight that the specs allow for kernels `[l, i, o]`.

    Args:
      specs: `{path: spec}`, as for `path_specs`.
      shapes: of the kernels, by path.
    """
    counts = {path: prod(shapes[path]) for path in specs}
    ends = [sum(prod(shapes[p][:-2]) * stored_bits(path_specs(spec)[n], shapes[p][-2:])
                for p, spec in specs.items()) for n in (0, -1)]
    return ends[0] / sum(counts.values()), ends[1] / sum(counts.values())


def check_budget(
    budget: float, specs: Mapping[str, Spec], shapes: Mapping[str, Shape]
) -> None:
    """Raises BadInput for a budget, in stored bits per weight, that the specs cannot use."""
    if not any(len(path_specs(spec)) > 1 for spec in specs.values()):
        raise BadInput("a budget chooses k of matrices whose spec has the type residual, no groups "
                       "and k of at least 2: set init.spec.k to the most paths of a matrix")
    least, most = budget_range(specs, shapes)
    if not least <= budget <= most:
        raise BadInput(f"the budget is {budget:g} bits per weight, wanted {least:.3f} to "
                       f"{most:.3f}: that is what these matrices store with k = 1 and with the k "
                       "of their spec, which init.spec.k sets")


@jax.jit
def sensitivity(
    w: Float[Array, "... i o"], node: Weight, stats: Stats | None
) -> Float[Array, ...]:
    """`sum_io s_in_i^2 (W - W_hat)_io^2 s_out_o^2` of each matrix of a stack, float32.

    With root mean squares of inputs and of output gradients as statistics, this is the expected
    loss that an error adds, to second order and with independent channels and tokens: the Fisher
    information of `W_io` is then `s_in_i^2 s_out_o^2`. Without statistics it is the squared error
    in units of the mean square of the matrix.
    """
    error = jnp.square(w.astype(F32) - node.dense())
    if stats is None:
        size = jnp.mean(jnp.square(w.astype(F32)), axis=(-1, -2))
        return error.sum(axis=(-1, -2)) / jnp.maximum(size, jnp.finfo(F32).tiny)
    return jnp.sum(error * jnp.square(outer(stats.s_in.astype(F32), stats.s_out.astype(F32))),
                   axis=(-1, -2))


def apply_budget(
    params: Params, student: Params, specs: Mapping[str, Spec], stats: Mapping[str, Stats] | None,
    budget: float, done: Callable[[str], None] | None = None,
) -> tuple[Params, dict[str, list[int]]]:
    """The student with as many paths in each layer of each matrix as a budget gives it.

    Args:
      params: full precision.
      student: what `convert` made of them with the most paths that a matrix may have.
      specs: by path, from `match_rules`, of the matrices that count towards the budget.
      stats: as for `convert`.
      budget: stored bits per weight of these matrices, see `check_budget`.
      done: called with a path when its errors are known.

    Returns:
      The student, in whose stacks paths that a layer does not have are zeros, see
      `weights.mixed_stack`; and the paths of each layer, by path.

    Raises:
      BadInput: as `check_budget`.

    Example:
      >>> specs = match_rules(params, rules)
      >>> student = convert(params, rules, stats)
      >>> student, k = apply_budget(params, student, specs, stats, 2.2)
    """
    kernels, nodes = dict(leaves(params)), weights_of(student)
    shapes = {path: kernels[path].shape for path in specs}
    check_budget(budget, specs, shapes)
    fits: dict[str, list[Any]] = {}
    options: dict[str, list[list[Option]]] = {}
    for path, spec in specs.items():
        own = None if stats is None else stats[path]
        every, w = path_specs(spec), kernels[path]
        fits[path] = [nodes[path] if one is every[-1] else one.init(w, own) for one in every]
        errors = np.stack([np.atleast_1d(sensitivity(w, fit, own)) for fit in fits[path]], axis=-1)
        bits = [stored_bits(one, w.shape[-2:]) for one in every]
        options[path] = [list(map(Option, bits, map(float, row))) for row in errors]
        fits[path] = [fit if n == len(every) - 1 else fit.replace(latent=None)
                      for n, fit in enumerate(fits[path])]
        if done is not None:
            done(path)
    chosen = share_out(options, budget, shapes)
    found = {path: _selected(fits[path], ks) for path, ks in chosen.items() if len(fits[path]) > 1}
    return map_leaves(lambda path, leaf: found.get(path, leaf), student), chosen


def share_out(
    options: Mapping[str, Sequence[Sequence[Option]]], budget: float,
    shapes: Mapping[str, Shape],
) -> dict[str, list[int]]:
    """Paths of each layer of each matrix by `allocate`, `{path: [k, ...]}`.

    Args:
      options: of each layer of each matrix, k = 1, 2, ....
      budget: bits per weight.
      shapes: of the kernels.
    """
    flat = [own for layers in options.values() for own in layers]
    chosen = iter(allocate(flat, budget * sum(prod(shapes[path]) for path in options)))
    return {path: [next(chosen) + 1 for _ in layers] for path, layers in options.items()}


def _selected(fits: Sequence[Any], ks: Sequence[int]) -> ResidualSign:
    """The stack whose layer n has the scales of `fits[ks[n] - 1]`, zeros behind them."""
    most = fits[-1]

    def chosen(name: str) -> Array:
        wide = jnp.zeros_like(getattr(most, name))
        for k, fit in enumerate(fits, 1):
            own = getattr(fit, name)
            here = jnp.reshape(jnp.asarray(ks) == k, (*own.shape[:-2], 1, 1))
            wide = wide.at[..., :k, :].set(jnp.where(here, own, wide[..., :k, :]))
        return wide

    return most.replace(g=chosen("g"), h=chosen("h"))
