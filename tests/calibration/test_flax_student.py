"""Convert, train, pack and save a model of `nn.Dense` and `nn.DenseGeneral` that is not ours."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rabit_jax import (
    BadInput,
    CodebookSpec,
    GroupUniformSpec,
    LowRankSignSpec,
    ResidualSignSpec,
    Stats,
    calibrate_flax,
    convert,
    dense,
    describe,
    linear,
    load_packed_params,
    pack,
    residual,
    save_packed_params,
    scaled,
)
from rabit_jax.calibration.outliers import record_limbs
from rabit_jax.evaluate.sign_statistics import snapshot
from rabit_jax.train.optimizer import OptimizerConfig
from rabit_jax.train.trainer import make_trainer
from rabit_jax.tree import weights_of
from rabit_jax.types import Weight
from rabit_jax.weights.representations import abstract_packed, is_packed_node

D, HEADS, TOKENS, CLASSES = 32, 4, 6, 4
QKV, OUTPUT = (D, HEADS, D // HEADS), (HEADS, D // HEADS, D)
SIGNS = ResidualSignSpec(k=2, rounds=2)
RULES = [("attention/.*/kernel", SIGNS)]


class Model(nn.Module):
    """`[b, t, 8] -> [b, classes]`: one attention layer between two linears."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(D, name="embed")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS, name="attention")(x)
        return nn.Dense(CLASSES, name="head")(x.mean(axis=1))


CLASSIFIER = np.random.default_rng(9).normal(size=(8, CLASSES))


def draw(seed, rows=64):
    """The class is the largest of linear functions of the mean token."""
    x = np.random.default_rng(seed).normal(size=(rows, TOKENS, 8)).astype(np.float32)
    return {"x": x, "labels": np.argmax(x.mean(1) @ CLASSIFIER, axis=-1)}


def loss(params, batch):
    logits = Model().apply({"params": dense(params)}, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).sum()


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(Model().init, jax.random.key(0), draw(0)["x"])["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.2, s.dtype), shapes)


@pytest.fixture(scope="module")
def stats(params):
    return calibrate_flax(loss, params, [draw(0)], RULES)


@pytest.fixture(scope="module")
def student(params, stats):
    return convert(params, RULES, stats)


def test_a_kernel_of_several_axes_is_converted_as_the_matrix_that_it_is(params, stats, student):
    nodes = weights_of(student)
    assert len(nodes) == 4
    for path, node in nodes.items():
        kernel = params
        for key in path.split("/"):
            kernel = kernel[key]
        matrix = kernel.reshape(stats[path].s_in.shape[0], -1)
        want = SIGNS.init(matrix, stats[path])
        jax.tree.map(np.testing.assert_array_equal, node.matrix, want)
        assert node.shape == kernel.shape and isinstance(node, Weight)
    query, out = (nodes[f"attention/{name}/kernel"] for name in ("query", "out"))
    assert (query.inputs, query.outputs) == ((D,), QKV[1:])
    assert (out.inputs, out.outputs) == (OUTPUT[:2], (D,))
    rows = {row.path: row for row in describe(student).rows}
    row = rows["attention/query/kernel"]
    assert (row.representation, row.shape, row.k) == ("ResidualSign", QKV, 2)
    assert row.bits_per_weight == 2 + 2 * 16 * 2 * D / D**2
    packed = {row.path: row for row in describe(pack(student)).rows}
    assert packed["attention/query/kernel"].representation == "PackedSign"


@pytest.mark.more
def test_stacked_kernels_of_several_axes(params, stats):
    path = "attention/out/kernel"
    kernel = params["attention"]["out"]["kernel"]
    tree = {"w": jnp.stack([kernel, 2 * kernel, -kernel])}
    stack = jax.tree.map(lambda s: jnp.stack([s, s[::-1], s]), stats[path])
    node = convert(tree, [("w", SIGNS)], {"w": stack})["w"]
    assert node.shape == (3, *OUTPUT) and node.matrix.shape == (3, D, D)
    for n in range(3):
        one = SIGNS.init(tree["w"][n].reshape(D, D), jax.tree.map(lambda s: s[n], stack))  # noqa: B023
        np.testing.assert_allclose(node.dense()[n], one.dense().reshape(OUTPUT), atol=1e-6)


def test_statistics_of_another_shape_are_refused(params):
    for kernel in (params["attention"]["query"]["kernel"], params["embed"]["kernel"]):
        wrong = Stats(jnp.ones(5), jnp.ones(D))
        with pytest.raises(BadInput, match=r"statistics of w are those of a matrix \[5, 32\]"):
            convert({"w": kernel}, [("w", SIGNS)], {"w": wrong})


SPECS = {
    "signs": SIGNS,
    "low-rank and sign": residual(LowRankSignSpec(rank=8), ResidualSignSpec(k=1)),
    "scaled groups": scaled(GroupUniformSpec(group=16)),
    "codebook": CodebookSpec(iterations=2),
}


def reshaped(name, seed=0):
    """A kernel `[4, 8, 32]` as a `Reshaped` matrix `[32, 32]`."""
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.normal(size=OUTPUT), jnp.float32)
    own = Stats(*(jnp.asarray(np.exp(rng.normal(size=D)), jnp.float32) for _ in range(2)))
    return convert({"w": w}, [("w", SPECS[name])], {"w": own}, jax.random.key(0))["w"]


@pytest.mark.parametrize(
    "name", [name if name == "signs" else pytest.param(name, marks=pytest.mark.more)
             for name in SPECS]
)
def test_a_reshaped_weight_is_a_weight(name):
    node = reshaped(name)
    x = np.random.default_rng(1).normal(size=(3, *OUTPUT[:2])).astype(np.float32)
    for weight in (node, node.pack("w")):
        w = np.asarray(weight.dense(), np.float64)
        assert w.shape == weight.shape == OUTPUT and isinstance(weight, Weight)
        want = np.einsum("bhc,hco->bo", x.astype(np.float64), w)
        # Integer kernels round the inputs to two bytes.
        atol = 1e-5 if weight is node else 5e-4
        np.testing.assert_allclose(linear(x, weight), want, atol=atol * np.abs(want).max())
        np.testing.assert_allclose(sum(weight.paths()), w, atol=1e-5)
        assert jax.tree.structure(weight.roles()) == jax.tree.structure(weight)
        assert (weight.bits_per_weight(), weight.cost()) == (
            weight.matrix.bits_per_weight(), weight.matrix.cost())
    packed = node.pack("w")
    assert is_packed_node(packed) and not is_packed_node(node)
    shapes = abstract_packed(json.loads(json.dumps(packed.header())))
    assert jax.tree.structure(shapes) == jax.tree.structure(packed)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(
        lambda a: (a.shape, a.dtype), packed)


def test_signs_and_limbs_see_through_the_shape(stats, student):
    assert set(snapshot(student)) == set(weights_of(student))
    packed = record_limbs(pack(student), stats)
    limbs = {path: node.matrix.limbs for path, node in weights_of(packed).items()}
    assert limbs == dict.fromkeys(weights_of(student), 2)


@pytest.mark.more
def test_it_trains_and_what_is_packed_computes_what_was_trained(params, student, tmp_path):
    """Some steps, on the trainer of any params tree; packing rounds two scales to 11 bits."""
    count = lambda batch: jnp.asarray(batch["labels"].size, jnp.float32)  # noqa: E731
    trainer = make_trainer(
        lambda p, teacher, batch: {"loss": loss(p, batch)}, student,
        OptimizerConfig(name="adamw", lr=5e-3), 60, count=count,
    )
    state = trainer.state
    for n in range(60):
        state, metrics = trainer.step(state, trainer.frozen, None, trainer.place(draw(100 + n)))
        jax.block_until_ready(metrics)  # steps of eight devices on two cores must not pile up
    trained, held_out = trainer.params(state), draw(1, rows=512)
    before, after = (float(loss(tree, held_out)) / 512 for tree in (student, trained))
    assert after < 0.75 * before
    packed = pack(trained)
    logits = lambda tree: Model().apply({"params": dense(tree)}, held_out["x"])  # noqa: E731
    exact = np.asarray(logits(trained))
    np.testing.assert_allclose(logits(packed), exact, atol=5e-3 * np.abs(exact).max())
    read = load_packed_params(save_packed_params(tmp_path / "model.safetensors", packed))
    np.testing.assert_array_equal(logits(read), logits(packed))


@pytest.mark.more
def test_a_file_of_every_kind_gives_back_the_same_tree(tmp_path):
    tree = {
        "blocks": {0: {"w": reshaped("signs").pack("w")}, 1: {"w": reshaped("codebook").pack("w")}},
        "sum": reshaped("low-rank and sign").pack("w"),
        "scaled": reshaped("scaled groups").pack("w"),
        "stack": jax.tree.map(lambda *a: jnp.stack(a), *(reshaped("signs", n).pack("w")
                                                        for n in range(3))),
        "bias": jnp.arange(3, dtype=jnp.bfloat16), "ids": jnp.arange(4), "one": jnp.float32(3),
    }
    file = save_packed_params(tmp_path / "deep" / "params.safetensors", tree)
    read = load_packed_params(file)
    assert jax.tree.structure(read) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(tree), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(a, b)
    assert read["stack"].shape == (3, *OUTPUT)
    assert [f.name for f in file.parent.iterdir()] == [file.name]

    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(BadInput, match="is altered"):
        load_packed_params(file)


def test_a_file_of_a_packed_model(student, tmp_path):
    packed = pack(student)
    read = load_packed_params(save_packed_params(tmp_path / "model.safetensors", packed))
    assert jax.tree.structure(read) == jax.tree.structure(packed)
    jax.tree.map(np.testing.assert_array_equal, read, packed)


def test_params_that_cannot_be_saved_are_refused(student, params, tmp_path):
    file = tmp_path / "params.safetensors"
    packed = pack(student)
    for tree, message in [
        (student, "attention/key/kernel is a Reshaped, wanted a packed weight"),
        (params, "no packed weight"),
        ({"a": [packed["head"]["kernel"]]}, "wanted nested dicts"),
        ({"a": {"b": packed["head"]["kernel"]}, "a/b": params["head"]["kernel"]},
         "two parameters have the path a/b"),
    ]:
        with pytest.raises(BadInput, match=message):
            save_packed_params(file, tree)
    assert not list(tmp_path.iterdir())
    with pytest.raises(BadInput, match="missing, truncated or damaged"):
        load_packed_params(file)
