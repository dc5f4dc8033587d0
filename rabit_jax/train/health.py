"""Health of a training: what goes wrong in a step, where, and what is done about it.

A step looks for four kinds of fault: a loss, a gradient or an updated weight that is not finite; a
loss far above its running mean (a spike); a scale that is not positive or larger than 16 bits hold;
and a storm of sign flips, a large share of a matrix's signs turned by one step. The tests run on
the device inside the compiled step and come out as three scalars: the index of the first place at
fault, the number of places, and the value found at the first. So the host waits for nothing, and a
step that is to be skipped is skipped on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float, Int, PyTree

from rabit_jax.errors import BadInput
from rabit_jax.tree import is_weight, leaves, path_name, pytree_dataclass
from rabit_jax.types import Array, Params, Weight

F32 = jnp.float32
T = TypeVar("T")
Action: TypeAlias = Literal["ignore", "warn", "skip", "rollback", "stop"]
Kind: TypeAlias = Literal["nonfinite", "spike", "scale", "flips"]
SEVERITY = ("stop", "rollback", "skip", "warn")  # the gravest fault of a step decides
SPIKE_WINDOW = 50  # steps over which the running mean of the loss forgets
KEYS = ("fault", "faults", "fault_value")  # the scalars in the metrics of a step


@dataclass(frozen=True)
class HealthConfig:
    """What is done about a fault in a training step.

    The actions: "ignore" does not look; "warn" prints a line and writes one to the metrics; "skip"
    also leaves weights and optimiser state bit for bit as they were, while the data count as used;
    "rollback" goes back to the last checkpoint and on with the data behind the fault; "stop" ends
    the run and keeps the checkpoints.

    Attributes:
      nonfinite: a loss, gradient or updated weight that is NaN or infinite: skip, rollback or stop.
      spike: a loss above `spike_factor` times its running mean, once 50 steps have been seen.
      spike_factor: that factor.
      scale: a scale that is not positive, or above 65504, the largest number of float16; not
        those of paths that a layer under a budget lacks.
      flips: more than the share `flips_share` of the signs of one path of one matrix turned by one
        step. Looking costs two derivations of all signs, a few per cent of a step.
      flips_share: that share.
      patience: skipped or rolled back steps in a row, or rollbacks to one checkpoint, after which
        the run stops.
    """

    nonfinite: Action = "stop"
    spike: Action = "ignore"
    spike_factor: float = 3.0
    scale: Action = "warn"
    flips: Action = "ignore"
    flips_share: float = 0.05
    patience: int = 10

    def __post_init__(self):
        """Raises BadInput for values out of range."""
        if self.nonfinite in ("ignore", "warn"):
            raise BadInput(
                f"nonfinite is {self.nonfinite!r}: a state that is not finite cannot be trained "
                "on; choose skip, rollback or stop"
            )
        ranges = {
            "spike_factor": (1 < self.spike_factor < math.inf, "above 1 and finite"),
            "flips_share": (0 < self.flips_share < 1, "above 0 and below 1"),
            "patience": (self.patience >= 1, "at least 1"),
        }
        for name, (inside, wanted) in ranges.items():
            if not inside:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be {wanted}")

    def action(self, kind: Kind) -> Action:
        """What is done about a kind of fault."""
        return getattr(self, kind)


@pytree_dataclass
class LossMean:
    """The running mean of the loss that spikes are measured by; part of the state of a training.

    Attributes:
      mean: float32 scalar, over healthy steps.
      seen: int32 scalar, how many those were.
    """

    mean: Array
    seen: Array


class Watched(NamedTuple):
    """The state of an optimiser, and the running mean of the loss beside it."""

    state: optax.OptState
    loss: LossMean


def watched(state: optax.OptState, mean: LossMean | None) -> optax.OptState:
    """The state with the mean, or alone: so it is what it was where no mean is kept."""
    return state if mean is None else cast(optax.OptState, Watched(state, mean))


def unwatched(state: optax.OptState) -> tuple[optax.OptState, LossMean | None]:
    """Inverse of `watched`."""
    return (state.state, state.loss) if isinstance(state, Watched) else (state, None)


class Group(NamedTuple):
    """Places that are tested together, one for each layer of an array.

    Attributes:
      kind: of the fault.
      what: is tested: "loss", "gradient", "weights", "scale" or "signs".
      path: of the array or weight node; "" for the loss.
      layers: number of stacked layers; 0 for what is not stacked.
    """

    kind: Kind
    what: str
    path: str
    layers: int

    @property
    def size(self) -> int:
        """Number of places."""
        return max(self.layers, 1)


@dataclass(frozen=True)
class Fault:
    """The first fault of a step.

    Attributes:
      group: where it was found.
      layer: which layer; None where the place is not stacked.
      value: the loss, the largest scale or the share of flipped signs; NaN or infinity as found.
      places: how many places of the step are at fault.
      action: what is done about it.
    """

    group: Group
    layer: int | None
    value: float
    places: int
    action: Action

    def __str__(self) -> str:
        """What was found and where, as part of a sentence."""
        group, at = self.group, "" if self.layer is None else f", layer {self.layer}"
        more = f", and {self.places - 1} more places" if self.places > 1 else ""
        where = f"{group.path}{at}"
        if group.kind == "spike":
            return f"the loss {self.value:.4g} is far above its running mean"
        if group.kind == "flips":
            return f"{self.value:.1%} of the signs of {where} have turned in one step{more}"
        if group.kind == "scale":
            return f"the scales {where} have left their range (found {self.value:.4g}){more}"
        if group.what == "loss":
            return f"the loss is not finite{more}"
        verb = "is" if group.what == "gradient" else "are"
        return f"the {group.what} of {where} {verb} not finite{more}"

    def record(self) -> dict[str, str | int | float]:
        """The fields of a line of metrics; a value that is not finite is left out."""
        found: dict[str, str | int | float] = {
            "kind": self.group.kind, "what": self.group.what, "path": self.group.path,
            "places": self.places, "action": self.action,
        }
        found |= {} if self.layer is None else {"layer": self.layer}
        return found | ({"value": self.value} if math.isfinite(self.value) else {})


@dataclass(frozen=True)
class Health:
    """The tests of one training.

    Attributes:
      config: what is done.
      groups: what is tested, gravest first; `make_health` finds them.
    """

    config: HealthConfig
    groups: tuple[Group, ...]

    @property
    def skips(self) -> bool:
        """Whether a step may be skipped on the device."""
        return any(self.config.action(group.kind) == "skip" for group in self.groups)

    @property
    def repairs(self) -> bool:
        """Whether a run may have fewer updates than steps."""
        actions = {self.config.action(group.kind) for group in self.groups}
        return bool(actions & {"skip", "rollback"})

    def read(self, values: dict[str, float]) -> Fault | None:
        """Take the scalars of `tested` out of the metrics of a step; None for a healthy step."""
        index, places, value = (values.pop(name, -1) for name in KEYS)
        if index < 0:
            return None
        for group in self.groups:
            if index < group.size:
                layer = int(index) if group.layers else None
                return Fault(group, layer, value, int(places), self.config.action(group.kind))
            index -= group.size
        raise AssertionError(f"a step reports a place beyond the {len(self.groups)} groups tested")


def make_health(config: HealthConfig, trainable: Params, names: PyTree[str]) -> Health:
    """The tests for a trainable tree whose leaves have the roles `names`; shapes are enough."""
    groups = [Group("nonfinite", "loss", "", 0)]
    groups += [Group("nonfinite", "gradient", path, _layers(path, leaf))
               for path, leaf in _arrays(trainable)]
    if config.nonfinite != "stop":  # the loop tests the state before it is saved in any case
        groups += [Group("nonfinite", "weights", path, _layers(path, leaf))
                   for path, leaf in _arrays(trainable)]
    groups.append(Group("spike", "loss", "", 0))
    groups += [Group("scale", "scale", path, _layers(path, leaf))
               for path, leaf in _scales(trainable, names)]
    groups += [Group("flips", "signs", path, _layers(path, jax.tree.leaves(node)[0]))
               for path, node in _moving_signs(trainable, names)]
    wanted = [group for group in groups if config.action(group.kind) != "ignore"]
    return Health(config, tuple(
        sorted(wanted, key=lambda group: SEVERITY.index(config.action(group.kind)))))


def first_mean(health: Health | None) -> LossMean | None:
    """The running mean before the first step; None where spikes are not looked for."""
    if health is None or health.config.spike == "ignore":
        return None
    return LossMean(jnp.zeros((), F32), jnp.zeros((), jnp.int32))


def next_mean(before: LossMean | None, loss: Float[Array, ""], kept: Bool[Array, ""]
              ) -> LossMean | None:
    """The running mean after a step: `m += (loss - m) / min(n, 50)`, n healthy steps seen.

    A step that is not `kept` leaves it as it was.
    """
    if before is None:
        return None
    seen = before.seen + 1
    mean = before.mean + (loss - before.mean) / jnp.minimum(seen, SPIKE_WINDOW)
    return LossMean(jnp.where(kept, mean, before.mean), jnp.where(kept, seen, before.seen))


class Tested(NamedTuple):
    """What the tests of a step found.

    Attributes:
      metrics: the scalars `fault`, index of the first place at fault or -1, `faults`, how many
        places, and `fault_value`, what the first one holds.
      skip: whether a fault asks for the step to be skipped.
      healthy: whether the loss may enter the running mean.
    """

    metrics: dict[str, Float[Array, ""] | Int[Array, ""]]
    skip: Bool[Array, ""]
    healthy: Bool[Array, ""]


def tested(
    health: Health, loss: Float[Array, ""], mean: LossMean | None, grads: Params,
    before: Params, after: Params, frozen: Params, names: PyTree[str],
) -> Tested:
    """Test one step.

    Args:
      health: what is tested.
      loss: of the step, a scalar.
      mean: the running mean before it.
      grads: the gradient, a tree like `after`.
      before: what trains, before the step.
      after: what trains, after the update and the projection.
      frozen: what does not train.
      names: roles of `after`.
    """
    values: dict[tuple[str, str, str], tuple[Array, Array]] = {
        ("nonfinite", "loss", ""): (~jnp.isfinite(loss), loss)
    }
    for what, tree in (("gradient", grads), ("weights", after)):
        for path, leaf in _arrays(tree):
            bad = _by_layer(path, ~jnp.isfinite(leaf), jnp.any)
            values["nonfinite", what, path] = bad, jnp.full_like(bad, jnp.nan, F32)
    if mean is not None:
        high = (mean.seen >= SPIKE_WINDOW) & (loss > health.config.spike_factor * mean.mean)
        values["spike", "loss", ""] = high, loss
    for (path, leaf), (_, old) in zip(_scales(after, names), _scales(before, names), strict=True):
        # A path that its layer lacks has scales of 0 and keeps them (`weights.mixed_stack`).
        lacks = jnp.all((leaf == 0) & (old == 0), axis=-1, keepdims=True) & (leaf.ndim > 1)
        held = jnp.where(lacks, 1, leaf)
        least, most = (_by_layer(path, held, fn) for fn in (jnp.min, jnp.max))
        low = ~(least > 0)
        most_held = float(jnp.finfo(jnp.float16).max)
        values["scale", "scale", path] = low | ~(most <= most_held), jnp.where(low, least, most)
    if health.config.flips != "ignore":
        for path, share in _flips(before, after, frozen, names):
            values["flips", "signs", path] = share > health.config.flips_share, share
    found = [values[group[:3]] for group in health.groups]
    flags = jnp.concatenate([jnp.atleast_1d(flag) for flag, _ in found])
    amounts = jnp.concatenate([jnp.atleast_1d(value).astype(F32) for _, value in found])
    first = jnp.argmax(flags)
    metrics = {
        "fault": jnp.where(jnp.any(flags), first, -1),
        "faults": jnp.sum(flags, dtype=jnp.int32),
        "fault_value": amounts[first],
    }
    # A stop or a rollback throws the state away, so "skip" alone matters here.
    actions = [health.config.action(group.kind) for group in health.groups]
    sizes = [group.size for group in health.groups]
    skipping = [action == "skip"
                for action, n in zip(actions, sizes, strict=True) for _ in range(n)]
    harmless = [group.kind in ("scale", "flips") for group in health.groups
                for _ in range(group.size)]
    return Tested(metrics, jnp.any(flags & jnp.asarray(skipping)),
                  ~jnp.any(flags & ~jnp.asarray(harmless)))


def _arrays(tree: PyTree) -> list[tuple[str, Array]]:
    """Every array by path, those inside of weight nodes too."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(path_name(path), leaf) for path, leaf in flat]


def _layers(path: str, leaf: Array) -> int:
    """Number of stacked layers of an array; 0 where it is not stacked."""
    return leaf.shape[0] if path.startswith("layers/") and leaf.ndim else 0


def _by_layer(path: str, x: Array, function: Callable[..., Array]) -> Array:
    """A reduction of an array, layer by layer where it is stacked: `[l]` or a scalar."""
    return function(x, axis=tuple(range(1, x.ndim))) if _layers(path, x) else function(x)


def _scales(tree: Params, names: PyTree[str]) -> list[tuple[str, Array]]:
    named = zip(_arrays(tree), jax.tree.leaves(names), strict=True)
    return [(path, leaf) for (path, leaf), name in named if name == "scale"]


def _moving_signs(trainable: Params, names: PyTree[str]) -> list[tuple[str, Weight]]:
    """Weight nodes that have signs and latents that train."""
    flat = dict(leaves(names))
    return [(path, node) for path, node in leaves(trainable)
            if is_weight(node) and hasattr(node, "positive")
            and "latent" in jax.tree.leaves(flat[path])]


def _flips(
    before: Params, after: Params, frozen: Params, names: PyTree[str]
) -> list[tuple[str, Float[Array, " l"]]]:
    """The largest share of flipped signs of any path: of each layer, by path of the node."""
    fixed = dict(leaves(frozen))

    def share(pair: Sequence[Any]) -> Array:
        # Of every path [..., k, i, o]; a node of several parts gives a tree of them.
        changed = jax.tree.map(jnp.not_equal, *(node.positive() for node in pair))
        rates = [jnp.max(jnp.mean(one, axis=(-2, -1), dtype=F32))
                 for one in jax.tree.leaves(changed)]
        return jnp.max(jnp.stack(rates))

    found, old = [], dict(leaves(before))
    for path, node in _moving_signs(after, names):
        pair = tuple(_filled(one, fixed[path]) for one in (old[path], node))
        stacked = _layers(path, jax.tree.leaves(node)[0])
        found.append((path, jax.lax.map(share, pair) if stacked else share(pair)))
    return found


def _filled(node: T, frozen: T) -> T:
    """A node with its frozen arrays in the holes."""
    return jax.tree.map(lambda a, b: b if a is None else a, node, frozen,
                        is_leaf=lambda x: x is None)
