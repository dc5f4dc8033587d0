"""The first device: its compute capability, and whether a one-bit kernel computes rightly on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rabit_jax.errors import BadInput
from rabit_jax.kernels.layout import pack_bits


def cuda_capability() -> int:
    """Compute capability of the first device, such as 90; 0 where it is not an NVIDIA GPU."""
    device = jax.devices()[0]
    # Other makers' GPUs have names such as gfx90a in its place.
    version = str(getattr(device, "compute_capability", ""))
    on_gpu = device.platform in ("gpu", "cuda") and "." in version
    return round(10 * float(version)) if on_gpu else 0


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


def passes(product: Callable, name: str, instead: str) -> bool:
    """Whether `product(u, bits, g, layer, rows, limbs)` is right on the first GPU.

    False, with a warning that says why and that the kernel `instead` takes the place of `name`,
    where it does not compile or its sums are wrong.
    """
    try:
        wrong = _wrong(product)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        wrong = f"{type(error).__name__}: {lines[0]}"
    if wrong:
        warnings.warn(f"{name} failed its self-test and {instead} takes its place ({wrong})",
                      RuntimeWarning, stacklevel=3)
    return not wrong


def _wrong(product: Callable) -> str:
    """What is wrong with a product of 2 members, 3 rows and all kinds of tails; "" if nothing."""
    rng = np.random.default_rng(0)
    rows, i, batch = (70, 41), 1100, 3
    signs = rng.choice([-1.0, 1.0], (2, 1, sum(rows), i))
    u = rng.normal(size=(batch, 1, 2, i)).astype(np.float32)
    want = np.einsum("oi,boi->bo", signs[1, 0], u[:, 0].repeat(rows, axis=1).astype(np.float64))
    for limbs, tolerance in ((2, 1e-3), (3, 1e-5)):
        run = jax.jit(lambda u, positive, limbs=limbs: product(
            u, pack_bits(positive), jnp.ones((2, 1, sum(rows))), jnp.int32(1), rows, limbs))
        # Compiled by hand, because a call would become part of a caller that is being traced.
        y = run.lower(u, signs > 0).compile()(u, signs > 0)
        error = np.linalg.norm(np.asarray(y, np.float64) - want) / np.linalg.norm(want)
        if not error < tolerance:
            return f"an error of {error:.1e} with {8 * limbs} planes"
    return ""
