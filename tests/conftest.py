"""What every test runs under: eight CPU devices, no network, strict JAX; set before JAX loads."""

import os
import shutil
import signal
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

GPU = os.environ.get("RABIT_GPU_TESTS") == "1"

if not GPU:
    os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
# Nearly all of the time of `make test` is compilation, which takes a third less with the older of
# the two emitters of jaxlib 0.10; later ones have one alone and refuse the flag.
FEW = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1"
if FEW and version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Under nohup every process that a test starts would ignore SIGHUP, and a test that sends it wait
# for ever. A handler, unlike that, is not inherited.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)
# Singular values of small matrices: threads that wait for each other take a hundred times as long
# when two test processes share two cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Runs in tests compile the same programs again and again: the processes of a session share them.
# The one that starts the others makes the folder and removes it.
CACHE = None if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="jax-cache-")
if CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import pytest  # noqa: E402

pytest_plugins = ["tests.references", "tests.small_models"]

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_unconfigure():
    """Remove the compiled programs of the session."""
    if CACHE:
        shutil.rmtree(CACHE, ignore_errors=True)


def pytest_collection_modifyitems(items):
    """Skip the tests marked gpu unless RABIT_GPU_TESTS=1 asks for them."""
    if not GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="RABIT_GPU_TESTS=1 runs it on a GPU"))


@pytest.fixture(autouse=True, scope="module")
def _room_for_programs():
    """Forget compiled programs before they fill the process's table of memory maps: each takes four
    or more, Linux allows 65,530, and LLVM ends in a segmentation fault beyond."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


def _llama(layers, width, hidden, vocabulary=32000):
    """Abstract float32 parameters of a Llama in the framework's tree."""

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    l, d, f, v = layers, width, hidden, vocabulary
    return {
        "embed": {"embedding": array(v, d)},
        "layers": {
            "attn": {name: {"kernel": array(l, d, d)} for name in "qkvo"},
            "mlp": {
                "gate": {"kernel": array(l, d, f)},
                "up": {"kernel": array(l, d, f)},
                "down": {"kernel": array(l, f, d)},
            },
            "attn_norm": {"scale": array(l, d)},
            "mlp_norm": {"scale": array(l, d)},
        },
        "final_norm": {"scale": array(d)},
        "head": {"kernel": array(d, v)},
    }


@pytest.fixture(autouse=True)
def _no_fetched_models():
    """What one test fetched from its hub is not there for the next."""
    yield
    if hub := sys.modules.get("rabit_jax.formats.hub"):
        hub.fetch.cache_clear()


@pytest.fixture(scope="session")
def llama_shapes():
    """`llama_shapes(layers, width, hidden)` -> abstract float32 parameters of a Llama."""
    return _llama
