"""Residual binarisation of large language models in JAX.

A 2-bit model is a sum of sign matrices with row and column scales,
`W_hat = sum_i diag(h_i) B_i diag(g_i)`, whose paths are all derived from one latent weight.

The params tree is the model state; a weight is a small pytree that knows how to multiply;
everything here is a pure function over the tree.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rabit_jax.public import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """A public name, or a module or package of the library, imported when first asked for.

    Raises:
      AttributeError: the library has no such name.
    """
    here = pkgutil.iter_modules(__path__)  # noqa: F405
    if name in {module.name for module in here}:
        return importlib.import_module(f"{__name__}.{name}")
    public = importlib.import_module(f"{__name__}.public")
    if name == "__all__" or name in public.__all__:
        return getattr(public, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The names that completion offers."""
    return sorted({*globals(), *__getattr__("__all__")})
