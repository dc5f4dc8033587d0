"""Dense products against float64, as `x @ W` and in the form for matrix tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import ResidualSignSpec, linear
from rabit_jax.weights import product as module
from rabit_jax.weights.product import product, wide_product

F64 = np.float64


@pytest.fixture(params=[False, True], ids=["plain", "tiles"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(module, "amx", lambda: request.param)
    return request.param


def wide(a):
    return np.asarray(a.astype(jnp.float32), F64)


def near(found, wanted, dtype):
    """Within the rounding of the result, and of sums of float32."""
    scale = np.sqrt(np.mean(np.square(wanted)))
    tolerance = {"bfloat16": 2.0**-8, "float32": 3e-6}[jnp.dtype(dtype).name]
    np.testing.assert_allclose(wide(found), wanted, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (2, 1, 3, 7)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("function", [product, wide_product])
def test_the_product_and_its_gradients(shape, dtype, function, tiles):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), dtype)
    w = jnp.asarray(rng.normal(size=(7, 6)), jnp.float32)
    y, pull = jax.vjp(function, x, w)
    out = dtype if function is product else "float32"
    # Its gradients read dy in the dtype of the products.
    dy = jnp.asarray(rng.normal(size=y.shape), dtype).astype(out)
    assert y.dtype == jnp.dtype(out)
    rounded = wide(w.astype(dtype))
    near(y, wide(x) @ rounded, out)
    dx, dw = pull(dy)
    assert dx.dtype == x.dtype and dw.dtype == w.dtype
    near(dx, wide(dy) @ rounded.T, dtype)
    flat_x, flat_dy = (wide(a).reshape(-1, a.shape[-1]) for a in (x, dy))
    near(dw, flat_x.T @ flat_dy, dtype)


def test_nodes_and_arrays_multiply_by_it(tiles, monkeypatch):
    """On a host with tiles no bfloat16 product has the form that XLA widens."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 64)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)
    for weight in (w, ResidualSignSpec(k=2).init(w)):
        text = jax.jit(lambda x, weight=weight: linear(x, weight)).lower(x).as_text()
        products = [line for line in text.splitlines() if "dot_general" in line]
        assert len(products) == 1
        assert products[0].endswith("xf32>" if tiles else "xbf16>")


def test_a_stack_of_matrices_multiplies_as_numpy_does(tiles):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((3, 2, 7), (3, 7, 5)))
    near(product(x, w), wide(x) @ wide(w), "bfloat16")
