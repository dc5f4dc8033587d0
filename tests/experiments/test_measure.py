"""Every window is measured, whatever the size of the batches."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from rabit_jax.experiments.engine import measure
from rabit_jax.experiments.engine.settings import Evaluate
from rabit_jax.train.sharding import AXES


@pytest.mark.parametrize("devices, size", [(1, 32), (1, 50), (1, 64), (4, 32), (4, 64)])
def test_a_last_batch_that_is_not_full_counts(devices, size):
    rows = np.arange(50 * 4, dtype=np.int32).reshape(50, 4)
    run = SimpleNamespace(
        text=SimpleNamespace(windows=lambda: rows), config=SimpleNamespace(
            evaluate=Evaluate(batch_size=size)),
        mesh=Mesh(np.asarray(jax.devices()[:devices]).reshape(-1, 1, 1), AXES),
    )
    for count in (50, 33, 3):
        batches = list(measure._windows(run, count))
        assert len({batch["tokens"].shape for batch in batches}) == 1
        real = np.concatenate([np.asarray(b["tokens"])[np.asarray(b["mask"])] for b in batches])
        np.testing.assert_array_equal(real.reshape(-1, 4), rows[:count])
