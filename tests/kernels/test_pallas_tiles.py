"""How rows and columns are cut: every row is stored once, every column is counted once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rabit_jax.errors import BadInput
from rabit_jax.kernels.gpu import pallas_tiles

few = settings(deadline=None, max_examples=40, derandomize=True)


@few
@given(st.lists(st.integers(1, 90), min_size=1, max_size=4), st.sampled_from([16, 32, 64]))
def test_every_row_is_in_one_tile_of_its_member(rows, tile):
    stored, starts = [], np.cumsum([0, *rows])
    for index in range(pallas_tiles.tiles(rows, tile)):
        first, member, end = (int(a) for a in pallas_tiles.place(index, rows, tile))
        assert starts[member] <= first < end == starts[member + 1]
        stored += range(first, min(first + tile, end))
    assert stored == list(range(sum(rows)))


@few
@given(st.integers(1, 40), st.sampled_from([32, 64, 128]), st.integers(1, 600))
def test_every_column_meets_its_activation_once(blocks, width, programs):
    held = 32 * blocks
    parts, each = pallas_tiles.cut(-(-held // width), programs, 2, 8)
    assert parts * each * width >= held and each <= 8
    rng = np.random.default_rng(0)
    w = np.concatenate([rng.normal(size=held), np.full(max(width - held, 0), 7.0)])
    x = rng.normal(size=held)
    laid = np.asarray(pallas_tiles.arrange(jnp.asarray(x, jnp.float32), width, parts * each))
    total = 0.0
    for step in range(parts * each):
        at = int(pallas_tiles.column(step, parts * each - 1, held, width))
        assert at % 32 == 0 and 0 <= at <= max(held - width, 0)
        total += w[at : at + width] @ laid[step * width : (step + 1) * width]
    assert total == pytest.approx(w[:held] @ x, abs=1e-4)


def test_stacks_whose_offsets_would_be_negative_give_one_layer(monkeypatch):
    bits = jnp.arange(3 * 2 * 20 * 32, dtype=jnp.uint32).astype(jnp.uint8).reshape(3, 2, 20, 32)
    view, layer = pallas_tiles.flat_rows(bits, 2, 16)
    assert view.shape == (120, 32) and layer.tolist() == [2]
    monkeypatch.setattr(pallas_tiles, "_SIGNED", 0)
    copy, layer = pallas_tiles.flat_rows(bits, 2, 16)
    assert copy.shape == (40, 32) and layer.tolist() == [0]
    assert jnp.array_equal(copy, view[80:])


def test_code_for_other_devices_than_nvidia_gpus_is_refused():
    def run(x):
        return pallas_tiles.on_gpu(x, "some_impl") + 1

    with pytest.raises(BadInput, match="some_impl runs on NVIDIA GPUs only.*cpu"):
        jax.jit(run)(jnp.ones(3))
    jax.jit(run).trace(jnp.ones(3)).lower(lowering_platforms=("cuda",))
