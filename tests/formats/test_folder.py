"""Model folders: a save that fails halfway leaves the old one, and what tells one from another."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from rabit_jax.errors import BadInput
from rabit_jax.formats.folder import fingerprint
from rabit_jax.formats.hf import load_hf, save_hf


def test_a_failed_save_leaves_the_old_model_alone(folder, model, params, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rabit_jax.atomic.save_file", full)
    with pytest.raises(BadInput, match="cannot write model folder .*No space left on device"):
        save_hf(folder, model, jax.tree.map(jnp.zeros_like, params))
    assert [f.name for f in folder.parent.iterdir()] == ["model"]
    jax.tree.map(np.testing.assert_array_equal, load_hf(folder)[1], params)


def test_the_old_model_comes_back_where_the_new_one_cannot_take_its_place(
    folder, model, params, monkeypatch
):
    rename = Path.rename

    def fail(self, target):
        if self.name == "new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr("rabit_jax.atomic._exchanged", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(BadInput, match="cannot write model folder .*Input/output error"):
        save_hf(folder, model, jax.tree.map(jnp.zeros_like, params))
    assert [f.name for f in folder.parent.iterdir()] == ["model"]
    jax.tree.map(np.testing.assert_array_equal, load_hf(folder)[1], params)


@pytest.fixture
def teacher(tmp_path):
    """A model folder whose weights are larger than what is read of them."""
    weights = np.arange(100_000, dtype=np.float32)
    save_file({"w": weights}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("place", [0, 99_999])
def test_other_weights_of_the_same_size_are_told_by_either_end(teacher, place):
    before = fingerprint(str(teacher))
    weights = np.arange(100_000, dtype=np.float32)
    weights[place] += 0.5
    save_file({"w": weights}, teacher / "model.safetensors")
    assert fingerprint(str(teacher)) != before
    assert fingerprint(str(teacher)) == fingerprint(str(teacher))


def test_the_card_is_no_input_of_a_run(teacher):
    before = fingerprint(str(teacher))
    (teacher / "README.md").write_text("edited by hand")
    assert fingerprint(str(teacher)) == before
    (teacher / "config.json").write_text("{ }")
    assert fingerprint(str(teacher)) != before
