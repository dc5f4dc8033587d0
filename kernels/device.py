"""What the first device is."""

from __future__ import annotations

import jax


def cuda_capability() -> int:
    """Compute capability of the first device, such as 90; 0 where it is not an NVIDIA GPU."""
    device = jax.devices()[0]
    # Other makers' GPUs have names such as gfx90a in its place.
    version = str(getattr(device, "compute_capability", ""))
    on_gpu = device.platform in ("gpu", "cuda") and "." in version
    return round(10 * float(version)) if on_gpu else 0
