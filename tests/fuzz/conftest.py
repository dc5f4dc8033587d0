"""The property of every reader: a result or one sentence, in little memory and little time."""

import resource
import signal
import traceback
import tracemalloc

import numpy as np
import pytest

from rabit_jax.errors import BadInput

SECONDS = 20  # of CPU time for one input
SPARE = 32 << 20  # bytes beside the multiple of the input that reading may take
PEAK = 384 << 20  # bytes by which no input may raise the peak of the whole process


@pytest.fixture(params=[pytest.param(60), pytest.param(10_000, marks=pytest.mark.slow)],
                ids=["some", "all"])
def count(request):
    """How many inputs a test tries."""
    return request.param


@pytest.fixture
def fuzz(count):
    """`fuzz(seed, make, use, multiple, again)`: how many inputs were used and how many refused.

    `make(rng)` writes an input and returns the number of its bytes, `use()` reads it. Input n
    depends on (seed, n) alone. Any exception but a BadInput of one line fails, and so does memory
    beyond `multiple` times the input. Of each kind of failure the first input is reported; `again`
    names inputs that once failed, which a short run tries, too.
    """

    def run(seed, make, use, multiple=64, again=()):
        refused, failures, numbers = 0, {}, sorted({*range(count), *again})
        kept = signal.signal(signal.SIGPROF, _out_of_time)
        tracemalloc.start()
        try:
            for n in numbers:
                size = make(np.random.default_rng([seed, n]))
                try:
                    refused += _one(use, size, multiple)
                except Exception as error:
                    where = traceback.extract_tb(error.__traceback__)[-4:]
                    kind = (type(error).__name__, *(frame[:2] for frame in where))
                    failures.setdefault(kind, (n, error, where))
        finally:
            tracemalloc.stop()
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, kept)
        for n, error, where in failures.values():
            print(f"input {n} of seed {seed}: {type(error).__name__}: {str(error)[:300]!r}")
            print("".join(traceback.format_list(where)))
        assert not failures, f"{len(failures)} kinds of failures in {len(numbers)} inputs"
        return len(numbers) - refused, refused

    return run


def _out_of_time(_, frame):
    where = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "native code"
    raise TimeoutError(f"more than {SECONDS} seconds of CPU time, in {where}")


def _one(use, size, multiple):
    """Whether one input was refused."""
    tracemalloc.reset_peak()
    before, peak = tracemalloc.get_traced_memory()[0], _peak()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    refused = False
    try:
        use()
    except BadInput as error:
        refused = True
        text = str(error)
        assert text.strip() and "\n" not in text, f"not one line: {text!r}"
        assert len(text) < 2000, f"{len(text)} characters: {text[:300]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    taken = tracemalloc.get_traced_memory()[1] - before
    assert taken <= SPARE + multiple * size, f"{taken} bytes of memory for {size} of input"
    assert _peak() - peak <= PEAK + multiple * size
    return refused


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
