"""Telling a given model's files apart."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from rabit_jax.experiments.engine.files import given_files


@pytest.fixture
def teacher(tmp_path):
    """A model folder whose weights are larger than what is read of them."""
    weights = np.arange(100_000, dtype=np.float32)
    save_file({"w": weights}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("place", [0, 99_999])
def test_other_weights_of_the_same_size_are_told_by_either_end(teacher, place):
    before = given_files(str(teacher))
    weights = np.arange(100_000, dtype=np.float32)
    weights[place] += 0.5
    save_file({"w": weights}, teacher / "model.safetensors")
    assert given_files(str(teacher)) != before
    assert given_files(str(teacher)) == given_files(str(teacher))


def test_the_card_is_no_input_of_a_run(teacher):
    before = given_files(str(teacher))
    (teacher / "README.md").write_text("edited by hand")
    assert given_files(str(teacher)) == before
    (teacher / "config.json").write_text("{ }")
    assert given_files(str(teacher)) != before
