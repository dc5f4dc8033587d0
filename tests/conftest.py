"""What every test runs under: eight CPU devices, no network, strict JAX; set before JAX loads."""

import os

GPU = os.environ.get("RABIT_GPU_TESTS") == "1"

if not GPU:
    os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Singular values of small matrices: threads that wait for each other take a hundred times as long
# when two test processes share two cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
    """Skip the tests marked gpu unless RABIT_GPU_TESTS=1 asks for them."""
    if not GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="RABIT_GPU_TESTS=1 runs it on a GPU"))
