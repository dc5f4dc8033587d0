"""`describe`: sizes against arithmetic by hand, on abstract shapes too."""

import math

import jax
import jax.numpy as jnp
import pytest

from rabit_jax import ResidualSign, ResidualSignSpec, convert, describe, pack
from rabit_jax.weights.conversion import LLAMA_LINEARS


def test_llama2_7b_at_two_bits_is_2_15_gb(llama_shapes):
    abstract = llama_shapes(32, 4096, 11008)
    rules = [(LLAMA_LINEARS, ResidualSignSpec(k=2))]
    found = describe(jax.eval_shape(lambda p: convert(p, rules), abstract))
    assert found.deployed_bytes == pytest.approx(2.15e9, rel=5e-3)
    assert found.bits_per_weight == pytest.approx(2.012, abs=1e-3)
    assert found.stored_bits_per_weight == pytest.approx(found.bits_per_weight, rel=1e-12)
    l, d, f, v = 32, 4096, 11008, 32000
    linears = [(d, d)] * 4 + [(d, f)] * 3
    bytes_ = l * sum(2 * i * o // 8 + 2 * 2 * (i + o) for i, o in linears)
    assert found.deployed_bytes == bytes_ + 2 * (2 * v * d + 2 * l * d + d)
    assert found.trained_bytes == 4 * (
        l * sum(i * o + 2 * (i + o) for i, o in linears) + 2 * v * d + 2 * l * d + d
    )
    assert len(found.quantised) == 7 and len(found.rows) == 12


@pytest.fixture(scope="module")
def student():
    def node(k, dtype, *shape):
        *lead, i, o = shape
        g, h = jnp.ones((*lead, k, o)), jnp.ones((*lead, k, i))
        return ResidualSign(jnp.ones(shape, dtype), g, h)

    return {
        "a": {"kernel": node(3, "float32", 2, 256, 8)},
        "b": {"kernel": node(1, "bfloat16", 10, 6)},
        "c": {"kernel": jnp.ones((4, 4))},
    }


def test_rows_are_the_bytes_that_packing_leaves(student):
    before, after = describe(student), describe(pack(student))
    rows = {row.path: row for row in before.rows}
    assert list(rows) == ["a/kernel", "b/kernel", "c/kernel"]
    assert [row.k for row in before.rows] == [3, 1, None]
    assert [row.shape for row in before.rows] == [(2, 256, 8), (10, 6), (4, 4)]
    assert [row.representation for row in before.rows] == ["ResidualSign", "ResidualSign", "array"]
    assert [row.representation for row in after.rows] == ["PackedSign", "PackedSign", "array"]

    assert rows["a/kernel"].deployed_bytes == 2 * 3 * (8 * 32 + 2 * (256 + 8))
    assert rows["b/kernel"].deployed_bytes == 6 * 8 + 2 * (10 + 6)
    assert rows["c/kernel"].deployed_bytes == 2 * 16
    assert rows["b/kernel"].trained_bytes == 2 * 60 + 4 * (10 + 6)
    assert rows["a/kernel"].trained_bytes == 4 * 2 * (256 * 8 + 3 * (256 + 8))
    assert rows["a/kernel"].bits_per_weight == pytest.approx(3 + 48 * 264 / 2048)
    assert rows["b/kernel"].bits_per_weight == pytest.approx(1 + 16 * 16 / 60)
    assert rows["b/kernel"].stored_bits_per_weight == pytest.approx(8 * 80 / 60)

    nodes = [x for x in after.rows if x.k]
    # In memory rows are padded to 256 inputs, in the file to 64.
    assert nodes[0].trained_bytes == rows["a/kernel"].deployed_bytes
    assert nodes[1].trained_bytes == 6 * 32 + 2 * (10 + 6)
    assert after.deployed_bytes == before.deployed_bytes
    mean = (4096 * rows["a/kernel"].bits_per_weight + 60 * rows["b/kernel"].bits_per_weight) / 4156
    assert before.bits_per_weight == after.bits_per_weight == pytest.approx(mean)


def test_the_table_shows_every_row_and_the_total(student):
    text = str(describe(student)).splitlines()
    assert len(text) == 6
    assert "a/kernel" in text[1] and "ResidualSign" in text[1] and "[2, 256, 8]" in text[1]
    assert text[-2].startswith("total")
    found = describe(student)
    whole = 8 * found.deployed_bytes / sum(math.prod(row.shape) for row in found.rows)
    assert text[-1] == (
        f"bits per weight: {found.stored_bits_per_weight:.3f} in the quantised matrices, "
        f"{whole:.3f} over the whole model, {16 / whole:.2f} times smaller than bfloat16"
    )
    # The padding of the rows of 10 inputs is stored, so it is counted.
    assert f"{8 * 80 / 60:7.3f}" in text[2]


def test_a_tree_without_nodes_is_described_too():
    found = describe({"w": jnp.ones((3, 4))})
    assert found.quantised == () and found.deployed_bytes == 24 and found.trained_bytes == 48
    assert "w" in str(found)
