"""Every packed weight in a file: written, counted byte by byte, read back, and refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from rabit_jax import (
    LLAMA_ENDS,
    LLAMA_LINEARS,
    BadInput,
    CodebookSpec,
    DualBinarySpec,
    GroupUniformSpec,
    LowRankSignSpec,
    ResidualSignSpec,
    convert,
    describe,
    load_hf,
    pack,
    residual,
    save_hf,
    scaled,
)
from rabit_jax.formats import packed_model as io
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import Decoder, init_params
from rabit_jax.tree import weights_of
from rabit_jax.weights.representations import abstract_packed, is_packed_node

CONFIG = ModelConfig(vocab_size=32, d_model=256, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=128,
                     d_hidden=256, tied_head=True)
SPECS = {
    "sign": ResidualSignSpec(k=2, rounds=0),
    "grouped_sign": ResidualSignSpec(k=2, rounds=0, group=64),
    "low_rank": LowRankSignSpec(rank=16),
    "group_uniform": GroupUniformSpec(group=64),
    "dual_binary": DualBinarySpec(group=64),
    "codebook": CodebookSpec(dim=1, bits=1, iterations=1),
    "sum": residual(LowRankSignSpec(rank=8), ResidualSignSpec(k=1, rounds=0)),
    "scaled": scaled(GroupUniformSpec(group=64)),
}


@pytest.fixture(scope="module")
def teacher():
    return jax.jit(lambda key: init_params(CONFIG, key))(jax.random.key(0))


@pytest.fixture(params=SPECS, scope="module")
def written(request, teacher, tmp_path_factory):
    """Type, packed params and the folder that they were written to."""
    packed = pack(convert(teacher, [(LLAMA_LINEARS, SPECS[request.param])]))
    folder = tmp_path_factory.mktemp("packed") / "model"
    return request.param, packed, io.save_packed(folder, CONFIG, packed)


def test_what_is_read_is_what_was_written(written):
    kind, packed, folder = written
    model, read, _ = io.load_packed(folder)
    wanted, found = packed["layers"], read["layers"]
    assert jax.tree.structure(found) == jax.tree.structure(wanted) and model.config == CONFIG
    for name in ("attn", "mlp"):
        jax.tree.map(np.testing.assert_array_equal, found[name], wanted[name])
    raw = json.loads((folder / "config.json").read_text())
    assert raw["quantization_config"]["types"] == [kind]


def test_bits_per_weight_are_the_bytes_of_the_file(written):
    _, packed, folder = written
    with safe_open(folder / io.FILE, "numpy") as file:
        modules = json.loads(file.metadata()["modules"])
        sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}
    counted = sum(
        size for name, size in sizes.items() if any(name.startswith(f"{m}.") for m in modules)
    )
    described = describe(packed)
    weights = 2 * 7 * 256 * 256
    assert len(modules) == 14
    # All widths are multiples of 256, so nothing is padded: nominal and stored are the same.
    assert described.bits_per_weight == pytest.approx(8 * counted / weights, rel=1e-12)
    assert io.packed_bytes(folder)["linear_bytes"] == counted


ROWS = GroupUniformSpec(bits=8, group=0)


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_are_packed_too(teacher, tmp_path, tied):
    config = dataclasses.replace(CONFIG, tied_head=tied)
    head = {} if tied else {"head": {"kernel": teacher["embed"]["embedding"].T[:, ::-1]}}
    rules = [(LLAMA_ENDS, ROWS), (LLAMA_LINEARS, SPECS["sign"])]
    student = convert({**teacher, **head}, rules)
    packed = pack(student)
    folder = io.save_packed(tmp_path / "model", config, packed)
    model, read, _ = io.load_packed(folder)
    assert model.config == config and jax.tree.structure(read) == jax.tree.structure(packed)
    jax.tree.map(np.testing.assert_array_equal, weights_of(read), weights_of(packed))
    with safe_open(folder / io.FILE, "numpy") as file:
        modules = json.loads(file.metadata()["modules"])
        sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}
    matrix = {"type": "group_uniform", "in": 256, "out": 32, "bits": 8, "group": 256}
    assert modules["model.embed_tokens"] == {"type": "table", "in": 32, "out": 256,
                                             "matrix": matrix}
    assert tied or modules["lm_head"] == matrix
    # A byte for each weight and two 16-bit levels for each row.
    assert sum(n for name, n in sizes.items() if "embed_tokens" in name) == 32 * (256 + 4)
    found, described = io.packed_bytes(folder), describe(packed)
    linear = sum(n for name, n in sizes.items() if "_proj." in name)
    assert found["linear_bytes"] == linear and found["weights"] == 2 * 7 * 256 * 256
    assert described.stored_bits_per_weight == found["stored_bits_per_weight"] == (
        8 * linear / found["weights"])
    assert found["other_bytes"] == sum(sizes.values()) - linear
    assert found["parameters"] == sum(x.size for x in jax.tree.leaves({**teacher, **head}))
    assert described.deployed_bytes == sum(sizes.values())


def test_a_packed_embedding_is_exported_dense(teacher, tmp_path):
    packed = pack(convert(teacher, [(LLAMA_ENDS, ROWS)]))
    save_hf(tmp_path / "dense", CONFIG, packed)
    _, read, _ = load_hf(tmp_path / "dense")
    np.testing.assert_array_equal(read["embed"]["embedding"], packed["embed"]["embedding"].dense())
    # Row by row within half a step, and the rounding of the two levels to 16 bits.
    w = np.asarray(teacher["embed"]["embedding"], np.float64)
    step = (w.max(1) - w.min(1)) / 255
    missed = np.abs(np.asarray(read["embed"]["embedding"]) - w).max(1)
    assert (missed < 0.5 * step + 1e-3 * np.abs(w).max(1)).all()


def test_a_sum_computes_what_its_terms_do(teacher, tmp_path):
    packed = pack(convert(teacher, [(LLAMA_LINEARS, SPECS["sum"])]))
    folder = io.save_packed(tmp_path / "model", CONFIG, packed)
    _, read, _ = io.load_packed(folder)
    tokens = jnp.arange(12).reshape(2, 6)
    run = jax.jit(lambda p: Decoder(CONFIG).apply({"params": p}, tokens))
    dense = jax.tree.map(
        lambda w: w.dense() if is_packed_node(w) else w.astype(jnp.float32), read,
        is_leaf=is_packed_node,
    )
    np.testing.assert_allclose(run(read), run(dense), atol=2e-3)


@pytest.mark.parametrize(("header", "said"), [
    ({"type": "ternary"}, "type 'ternary': the types are sign, low_rank"),
    ({"in": 4}, "type None"),
    ([], "type None"),
    ({"type": "sign", "in": 4, "out": 4}, "sign weight is damaged .'k'."),
    ({"type": "group_uniform", "in": 4, "out": 4, "bits": 2, "group": 0}, "is damaged"),
    ({"type": "table", "in": 4, "out": 8, "matrix": {"type": "sign", "in": 4, "out": 8, "k": 1}},
     "table weight is damaged .a table .4, 8. of a matrix .4, 8.."),
    ({"type": "sum", "in": 4, "out": 4, "terms": [{"type": "nothing"}]}, "type 'nothing'"),
], ids=str)
def test_damaged_headers_are_refused(header, said):
    with pytest.raises(BadInput, match=said):
        abstract_packed(header)
