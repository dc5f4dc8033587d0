"""A save that fails halfway: the old model stays, and nothing half-written lies beside it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.errors import BadInput
from rabit_jax.formats.hf import load_hf, save_hf


def test_a_failed_save_leaves_the_old_model_alone(folder, model, params, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rabit_jax.formats.folder.save_file", full)
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

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(BadInput, match="cannot write model folder .*Input/output error"):
        save_hf(folder, model, jax.tree.map(jnp.zeros_like, params))
    assert [f.name for f in folder.parent.iterdir()] == ["model"]
    jax.tree.map(np.testing.assert_array_equal, load_hf(folder)[1], params)
