"""Embeddings as weight nodes: rows against float64 NumPy, what a lookup unpacks, what trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import (
    LLAMA_ENDS,
    CodebookSpec,
    DualBinarySpec,
    GroupUniformSpec,
    IndependentSignSpec,
    LowRankSignSpec,
    ResidualSignSpec,
    UniformResidualSpec,
    calibrate,
    convert,
    dense,
    describe,
    linear,
    pack,
    residual,
    scaled,
)
from rabit_jax.kernels.cpu.library import library
from rabit_jax.kernels.layout import unpack_bits
from rabit_jax.models.decoder import logits
from rabit_jax.train.optimizer import merge, partition, roles
from rabit_jax.train.sharding import make_mesh, param_shardings
from rabit_jax.tree import weights_of
from rabit_jax.weights.laid import lay
from rabit_jax.weights.seam import lookup
from rabit_jax.weights.table import Table

V, D = 61, 40
SPECS = {
    "residual": ResidualSignSpec(k=3, rounds=2),
    "independent": IndependentSignSpec(k=2, rounds=2),
    "uniform": UniformResidualSpec(k=2, rounds=2),
    "low rank": LowRankSignSpec(rank=8),
    "8-bit rows": GroupUniformSpec(bits=8, group=0),
    "4 bits": GroupUniformSpec(bits=4, group=16),
    "dual binary": DualBinarySpec(group=16),
    "codebook": CodebookSpec(iterations=2),
    "sum": residual(LowRankSignSpec(rank=8), ResidualSignSpec(k=1, rounds=0)),
    "two signs": residual(ResidualSignSpec(k=1, rounds=0), ResidualSignSpec(k=1, rounds=0)),
    "scaled": scaled(GroupUniformSpec(group=16)),
}
TOKENS = jnp.asarray([[0, 5, 60], [5, 5, 17]])


def embedding(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(V, D)), jnp.float32)


def table(spec):
    node = convert({"embed": {"embedding": embedding()}}, [(LLAMA_ENDS, spec)])
    return node["embed"]["embedding"]


@pytest.fixture(params=SPECS, scope="module")
def tables(request):
    node = table(SPECS[request.param])
    return node, node.pack("embed")


def test_a_lookup_is_the_rows_of_the_dense_table(tables):
    for node in tables:
        assert isinstance(node, Table) and node.shape == (V, D) and node.T.shape == (D, V)
        rows = jax.jit(lookup)(node, TOKENS)
        assert rows.dtype == jnp.float32 and rows.shape == (2, 3, D)
        np.testing.assert_allclose(rows, node.dense()[TOKENS], atol=1e-6)
        np.testing.assert_allclose(node.dense().T, node.T.dense(), atol=0)


def test_a_token_without_a_row_reads_nan(tables):
    for node in tables:
        rows = np.asarray(lookup(node, jnp.asarray([3, V])))
        assert np.isfinite(rows[0]).all() and np.isnan(rows[1]).all()


def test_eight_bit_rows_are_those_of_float64():
    packed = table(SPECS["8-bit rows"]).pack("embed")
    w = np.asarray(embedding(), np.float64)
    low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    step = (high - low) / 255
    zero = np.round(-low / step)
    codes = np.clip(np.round(w / step[:, None]) + zero[:, None], 0, 255)
    want = step[:, None] * (codes - zero[:, None])
    found = np.asarray(packed.lookup(jnp.arange(V)), np.float64)
    # Step and lowest level are stored in 16 bits.
    assert np.abs(found - want).max() < 1e-3 * np.abs(w).max()
    assert packed.bits_per_weight() == 8 + 32 / D


def test_rows_of_signs_are_those_of_float64():
    matrix = table(SPECS["residual"]).pack("embed").matrix
    signs = 2.0 * np.asarray(unpack_bits(matrix.bits, D), np.float64) - 1
    g, h = (np.asarray(a, np.float64) for a in (matrix.g, matrix.h))
    want = np.einsum("kvd,kv,kd->vd", signs, g, h)
    np.testing.assert_allclose(Table(matrix).lookup(TOKENS), want[np.asarray(TOKENS)], atol=1e-6)


def largest(jaxpr):
    """Elements of the largest array that an equation of a jaxpr, or of those inside it, makes."""
    sizes = [0]
    for eqn in jaxpr.eqns:
        sizes += [var.aval.size for var in eqn.outvars]
        for param in eqn.params.values():
            for inner in param if isinstance(param, (list, tuple)) else [param]:
                inner = getattr(inner, "jaxpr", inner)
                sizes += [largest(inner)] if hasattr(inner, "eqns") else []
    return max(sizes)


@pytest.mark.parametrize("kind", ["8-bit rows", "4 bits", "residual", "dual binary", "two signs"])
def test_a_lookup_unpacks_its_rows_alone(kind):
    node = table(SPECS[kind]).pack("embed")
    laid = lay([jax.tree.map(lambda a: a[None], node.T)], "cpu")
    held = [node, laid] if hasattr(laid, "lookup") else [node]
    for one in held:
        made = largest(jax.make_jaxpr(lookup)(one, TOKENS[0, :1]).jaxpr)
        assert made <= 8 * 256 < V * D


@pytest.mark.parametrize("kind", ["residual", "4 bits"])
def test_the_gradient_of_a_lookup_is_that_of_the_dense_table(kind):
    node = table(SPECS[kind])
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, D)), jnp.float32)
    one, other = (
        jax.grad(lambda n, f=f: jnp.sum(weight * f(n)))(node)
        for f in (lambda n: n.lookup(TOKENS), lambda n: n.dense()[TOKENS])
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert np.abs(one.matrix.latent[:, 5]).max() > 0 and not np.any(one.matrix.latent[:, 6])


@pytest.mark.parametrize("kind", ["8-bit rows", "4 bits"])
def test_laid_codes_multiply_and_look_up_as_the_table_does(kind):
    node = table(SPECS[kind]).pack("embed")
    laid = lay([jax.tree.map(lambda a: a[None], node.T)], "cpu")
    x = np.random.default_rng(3).normal(size=(4, D)).astype(np.float32)
    want = x @ np.asarray(node.dense()).T
    atol = 2e-5 if library() is None else 1e-3 * want.std()  # activations of 16 bits
    np.testing.assert_allclose(laid.matmul_at(x, 0), want, atol=atol)
    np.testing.assert_allclose(laid.lookup(TOKENS), node.lookup(TOKENS), atol=1e-6)
    assert np.isnan(np.asarray(laid.lookup(jnp.asarray([V])))).all()


def params(tied=True):
    rng = np.random.default_rng(2)
    kernel = jnp.asarray(rng.normal(size=(2, D, D)), jnp.float32)
    tree = {"embed": {"embedding": embedding()}, "layers": {"mlp": {"up": {"kernel": kernel}}}}
    head = {"head": {"kernel": jnp.asarray(rng.normal(size=(D, V)), jnp.float32)}}
    return tree if tied else {**tree, **head}


def test_embeddings_are_not_calibrated():
    rules = [(LLAMA_ENDS, SPECS["8-bit rows"]), ("layers/.*", ResidualSignSpec(k=1, rounds=1))]
    tree = params()

    def loss(p, batch):
        x = lookup(p["embed"]["embedding"], batch["tokens"])
        up = p["layers"]["mlp"]["up"]["kernel"]
        y = jax.lax.scan(lambda c, w: (c, linear(x, w)), 0, up)[1]
        return jnp.sum(jnp.square(y))

    batch = {"tokens": TOKENS, "mask": jnp.ones(TOKENS.shape, bool)}
    stats = calibrate(loss, tree, [batch], rules)
    assert set(stats) == {"layers/mlp/up/kernel"}
    rows = np.asarray(embedding(), np.float64)[np.asarray(TOKENS).ravel()]
    want = np.sqrt(np.mean(rows**2, axis=0))
    np.testing.assert_allclose(stats["layers/mlp/up/kernel"].s_in[1], want, rtol=1e-5)
    student = convert(tree, rules, stats)
    assert set(weights_of(student)) == {"embed/embedding", "layers/mlp/up/kernel"}


def test_figures_of_the_blocks_leave_the_table_out():
    rules = [(LLAMA_ENDS, SPECS["8-bit rows"]), ("layers/.*", ResidualSignSpec(k=1, rounds=1))]
    found = describe(pack(convert(params(tied=False), rules)))
    blocks = {row.path: row for row in found.rows}["layers/mlp/up/kernel"]
    assert found.bits_per_weight == blocks.bits_per_weight == 1 + 16 * 2 / D
    ends = sum(row.deployed_bytes for row in found.rows if not row.path.startswith("layers"))
    # Eight planes in blocks of 64 inputs and two levels for each row, twice.
    assert ends == 2 * (8 * V * 8 + V * 4)
    whole = 8 * (ends + blocks.deployed_bytes) / (2 * V * D + 2 * D * D)
    assert found.whole_model_bits_per_weight == pytest.approx(whole)
    only = describe(convert(params(), [(LLAMA_ENDS, SPECS["8-bit rows"])]))
    assert only.bits_per_weight == 8 + 32 / D


@pytest.mark.parametrize("freeze", [("embedding", "head"), ("embedding",), ("scale",), ()], ids=str)
def test_embedding_and_head_are_frozen_as_wholes(freeze):
    student = convert(params(tied=False), [(".*", ResidualSignSpec(k=2, rounds=0))])
    names = roles(student)
    trainable, frozen = partition(student, names, freeze)

    def trained(node):
        return {name for name in ("latent", "g", "h") if getattr(node, name) is not None}

    every = {"latent", "g", "h"}
    rest = {"latent"} if "scale" in freeze else every
    assert trained(trainable["embed"]["embedding"].matrix) == (
        set() if "embedding" in freeze else rest)
    assert trained(trainable["head"]["kernel"]) == (set() if "head" in freeze else rest)
    assert trained(trainable["layers"]["mlp"]["up"]["kernel"]) == rest
    back = merge(trainable, frozen)
    assert jax.tree.structure(back) == jax.tree.structure(student)
    jax.tree.map(np.testing.assert_array_equal, back, student)


def test_a_table_is_split_over_the_mesh_by_its_rows():
    rng = np.random.default_rng(0)
    tree = {"embed": {"embedding": jnp.asarray(rng.normal(size=(64, D)), jnp.float32)}}
    student = convert(tree, [(LLAMA_ENDS, GroupUniformSpec(bits=8, group=0))])
    mesh = make_mesh({"data": 2, "tensor": 4})
    for one in (student, pack(student)):
        placed = jax.device_put(one, param_shardings(one, mesh))
        node = placed["embed"]["embedding"].matrix
        large = node.latent if hasattr(node, "latent") else node.bits
        assert large.addressable_shards[0].data.size == large.size // 4
        np.testing.assert_allclose(dense(placed)["embed"]["embedding"][5],
                                   lookup(placed["embed"]["embedding"], jnp.asarray(5)), atol=1e-6)


@pytest.mark.parametrize("kind", ["8-bit rows", "residual"])
def test_logits_of_a_bfloat16_model_are_not_rounded_to_bfloat16(kind):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, D)), jnp.bfloat16)
    head = SPECS[kind].init(jnp.asarray(rng.normal(size=(D, V)), jnp.float32))
    found = np.asarray(logits(x, head))
    rounded = np.asarray(dense(head).astype(jnp.bfloat16).astype(jnp.float32), np.float64)
    wanted = np.asarray(x.astype(jnp.float32), np.float64) @ rounded
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
