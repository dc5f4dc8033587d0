"""Checkpoints: whole or not there, verified, restored anywhere."""

import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rabit_jax import BadInput, ResidualSign, hosts
from rabit_jax.train.checkpoints import Checkpoints, abstract, all_finite, checksum


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


def test_several_processes_do_not_begin_to_write_on_a_disk_without_room(tmp_path, monkeypatch):
    """Their part of the whole is tested by `make test-hosts`; here the others agree."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree()))
    assert size == 2 * 8 * 16 * 2 + (2 * 2 * 16 + 2 * 2 * 8) * 4 + 4 + 64 * 64 * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size - 1))
    with Checkpoints(tmp_path) as kept:
        kept.save(1, tree())  # one process finds out by itself
        kept.wait()
        monkeypatch.setattr(hosts, "several", lambda: True)
        monkeypatch.setattr(hosts, "all_agree", bool)
        kept._check_room(size - 1)
        with pytest.raises(OSError, match="No space left") as error:
            kept.save(2, tree())
        assert error.value.filename == str(tmp_path)
        monkeypatch.undo()


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


def _emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def _a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def _without_item(folder):
    shutil.rmtree(folder / "default")


def _half_saved(folder):
    (folder / "default").rename(folder / "default.orbax-checkpoint-tmp")


def _broken_link(folder):
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")


def _empty_files(folder):
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        file.write_bytes(b"")


def _unparsable(folder):
    (folder / "default" / "_METADATA").write_text("{")


@pytest.mark.parametrize("content", [b"[" * 100_000, b"", b"{}" * 10**6, b"[1]", b"\xff", None])
def test_times_that_cannot_be_read_cost_no_checkpoint(tmp_path, capsys, content):
    with Checkpoints(tmp_path) as kept:
        kept.save(1, tree())
    file = tmp_path / "1" / "_CHECKPOINT_METADATA"
    file.unlink()
    file.symlink_to("/dev/zero") if content is None else file.write_bytes(content)
    with Checkpoints(tmp_path) as kept:
        step, found = kept.restore_last(abstract(tree()))
    assert step == 1 and same(found, tree())
    assert capsys.readouterr().err.count("is damaged and was removed: it holds times alone") == 1


@pytest.mark.parametrize("spoil", [
    _emptied, _a_file, _without_item, _half_saved, _broken_link, _empty_files, _unparsable,
])  # fmt: skip
def test_the_newest_sound_state_is_found_whatever_lies_there(tmp_path, capsys, spoil):
    folder = tmp_path / "qat"
    with Checkpoints(folder) as kept:
        for step in (1, 2):
            kept.save(step, tree(step))
        kept.wait()
    spoil(folder / "2")
    # Left by an interrupted save, and by an earlier damage of the same step.
    (folder / "3.orbax-checkpoint-tmp" / "default").mkdir(parents=True)
    earlier = tmp_path / "qat-damaged-2"
    earlier.mkdir()
    (earlier / "kept").touch()
    with Checkpoints(folder) as kept:
        step, found = kept.restore_last(abstract(tree()))
        assert step == 1 and same(found, tree(1))
        assert sorted(p.name for p in tmp_path.iterdir()) == \
            ["qat", "qat-damaged-2", "qat-damaged-2-2"]
        assert sorted(p.name for p in folder.iterdir()) == ["1"]
        kept.save(2, tree(5))
        step, found = kept.restore_last(abstract(tree()))
    assert step == 2 and same(found, tree(5))
    assert capsys.readouterr().err.count("trying the one before it") == 1


def test_a_state_that_cannot_be_used_is_passed_over(tmp_path, capsys):
    with Checkpoints(tmp_path / "qat") as kept:
        kept.save(1, {"w": jnp.ones(3)})
        kept.save(2, {"w": jnp.full(3, jnp.nan)})
        step, found = kept.restore_last(abstract({"w": jnp.ones(3)}), all_finite)
    assert step == 1 and same(found, {"w": jnp.ones(3)})
    assert "not finite" in capsys.readouterr().err
