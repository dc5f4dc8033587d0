"""Checkpoints: whole or not there, verified, restored anywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rabit_jax import BadInput, ResidualSign
from rabit_jax.train.checkpoints import Checkpoints, abstract, checksum


def tree(seed=0):
    rng = np.random.default_rng(seed)
    latent = jnp.asarray(rng.normal(size=(2, 8, 16)), jnp.bfloat16)
    return {
        "node": ResidualSign(latent, jnp.ones((2, 2, 16)), jnp.ones((2, 2, 8))),
        "none": None,
        "count": jnp.int32(3),
        "table": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32),
    }


def same(a, b):
    return all(
        bool((x == y).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def damage(folder, step, how):
    """Change or cut the largest data file of a checkpoint."""
    file = max(
        (f for f in (folder / str(step)).rglob("*") if f.is_file()), key=lambda f: f.stat().st_size
    )
    content = bytearray(file.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def test_round_trip_keeps_nodes_dtypes_and_bits(tmp_path):
    with Checkpoints(tmp_path) as kept:
        kept.save(5, tree())
        step, found = kept.restore_last(abstract(tree()))
    assert step == 5 and same(found, tree())
    assert isinstance(found["node"], ResidualSign) and found["node"].latent.dtype == jnp.bfloat16


def test_only_the_last_are_kept_and_none_is_none(tmp_path):
    with Checkpoints(tmp_path, keep=2) as kept:
        assert kept.restore_last(abstract(tree())) is None
        for step in (1, 2, 3):
            kept.save(step, tree(step))
        assert kept.steps() == [2, 3]


@pytest.mark.parametrize("how", ["cut", "flip"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, capsys, how):
    with Checkpoints(tmp_path) as kept:
        for step in (1, 2):
            kept.save(step, tree(step))
        kept.wait()
    damage(tmp_path, 2, how)
    with Checkpoints(tmp_path) as kept:
        step, found = kept.restore_last(abstract(tree()))
    assert step == 1 and same(found, tree(1))
    assert str(tmp_path / "2") in capsys.readouterr().err


def test_all_damaged_is_an_error(tmp_path):
    with Checkpoints(tmp_path) as kept:
        kept.save(1, tree())
        kept.wait()
    damage(tmp_path, 1, "cut")
    with Checkpoints(tmp_path) as kept, pytest.raises(BadInput, match="no checkpoint in"):
        kept.restore_last(abstract(tree()))


def test_checksum_sees_one_bit_and_a_swap():
    base = tree()["table"]
    words = np.asarray(base).view(np.uint32)
    flipped = words.copy()
    flipped[3, 5] ^= 1
    swapped = words.copy()
    swapped[0, [0, 1]] = swapped[0, [1, 0]]
    sums = {int(checksum(jnp.asarray(w.view(np.float32)))) for w in (words, flipped, swapped)}
    wanted = int(
        (words.ravel().astype(np.uint64) * (2 * np.arange(words.size, dtype=np.uint64) + 1)).sum()
        % 2**32
    )
    assert len(sums) == 3 and wanted in sums


def test_restores_onto_another_mesh(tmp_path, meshes):
    first = NamedSharding(meshes(8, 1), PartitionSpec(None, "data"))
    second = NamedSharding(meshes(2, 4), PartitionSpec("tensor", None))
    state = {"w": jax.device_put(tree()["table"], first)}
    with Checkpoints(tmp_path) as kept:
        kept.save(1, state)
        found = kept.restore(1, abstract(state, {"w": second}))
    assert found["w"].sharding == second and same(found, state)
