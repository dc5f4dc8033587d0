"""The one place that knows Triton and jax-triton, whose interface depends on their versions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rabit_jax.errors import BadInput
from rabit_jax.kernels.device import cuda_capability

try:
    import triton.language as tl
    from triton import constexpr_function as static
    from triton import jit
except ModuleNotFoundError:  # Modules with kernels import without Triton; calling them needs it.
    tl = None

    def jit(kernel: Callable) -> Callable:
        """The function as it is: without Triton it cannot run."""
        return kernel

    static = jit

# Programs per matrix that keep the largest devices busy: 4 on each of about 132 processors.
PROGRAMS = 528


def capability(impl: str) -> int:
    """Compute capability, such as 90, of the first device.

    Raises:
      BadInput: the first device is not an NVIDIA GPU.
    """
    version = cuda_capability()
    if not version:
        found = jax.devices()[0].platform
        raise BadInput(f"{impl} runs on NVIDIA GPUs and the first device is {found}: choose "
                       "impl=None, which takes what the device can do")
    return version


def lay_inputs(u: jax.Array, row_bytes: int, block: int) -> jax.Array:
    """`[..., i]` -> `[..., 8 block ceil(row_bytes / block)]`, what blocks of a row's bytes meet.

    The last block of a row ends where the row ends. Where it begins before the one before it ends,
    its first inputs come for the second time and are 0 here.
    """
    whole = row_bytes // block * block * 8
    rest = -(-row_bytes // block) * block * 8 - whole
    repeated = max(rest - (8 * row_bytes - whole), 0) if whole else 0
    lead = [(0, 0)] * (u.ndim - 1)
    padded = jnp.pad(u, [*lead, (0, 8 * row_bytes - u.shape[-1])])
    last = padded[..., whole:]
    last = jnp.pad(last, [*lead, (repeated, rest - repeated - last.shape[-1])])
    return jnp.concatenate([padded[..., :whole], last], axis=-1)


def splits(programs: int, blocks: int) -> int:
    """Parts of the inputs, such that the device is full and no part is empty."""
    return max(1, min(blocks, PROGRAMS // programs))


def partial_sums(
    kernel: Any, arrays: Sequence[jax.Array], shape: tuple[int, ...], grid: tuple[int, int, int],
    warps: int, stages: int, version: int, constants: dict[str, Any],
) -> jax.Array:
    """`sum_z y[z]` of what a kernel writes, `y: [z, ...]` float32 of a shape, in a fixed order."""
    from jax_triton import triton_call

    _repair_dce_rule()
    out = jax.ShapeDtypeStruct(shape, jnp.float32)
    # jax-triton 0.4 has another name for the outputs, and takes Triton's options in a dictionary.
    if "out_type" in inspect.signature(triton_call).parameters:
        versioned = {"out_type": out, "backend_options": {"enable_fp_fusion": True}}
    else:
        versioned = {"out_shape": out, "enable_fp_fusion": True}
    y = triton_call(
        *arrays, kernel=kernel, grid=grid, num_warps=warps, num_stages=stages,
        compute_capability=version, name=kernel.__name__, **versioned, **constants)
    return jnp.sum(y, axis=0)


@functools.cache
def _repair_dce_rule() -> None:
    """Lets jax.jit remove dead code around a Triton kernel with jax-triton 0.4 under jax 0.12.

    The rule that jax-triton registers takes two arguments, jax 0.12 calls it with a third between.
    """
    from jax.interpreters import partial_eval
    from jax_triton.triton_lib import triton_kernel_call_p

    rule = getattr(partial_eval, "dce_rules", {}).get(triton_kernel_call_p)
    if rule is not None and len(inspect.signature(rule).parameters) == 2:
        partial_eval.dce_rules[triton_kernel_call_p] = lambda used, *rest: rule(used, rest[-1])
