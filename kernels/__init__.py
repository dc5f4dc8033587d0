"""Packed +-1 matrix products: file layout and backends. Knows arrays only."""

# In a checkout's root `import kernels` finds this folder, although transformers (or anybody) may
# mean the package `kernels` of PyPI. Under that name the modules of both are found, and a name that
# is not here loads the other package, the first time one is asked for. Nothing of this is so under
# the name rabit_jax.kernels.
if __name__ == "kernels":
    import sys
    from importlib.machinery import PathFinder
    from pathlib import Path

    _here = Path(__file__).resolve().parents[1]
    _other = PathFinder.find_spec("kernels", [p for p in sys.path if Path(p).resolve() != _here])
    if _other is not None and _other.submodule_search_locations:
        __path__ += _other.submodule_search_locations

    def __getattr__(name: str) -> object:
        global _other
        if _other is not None and _other.loader is not None:
            loader, _other = _other.loader, None
            loader.exec_module(sys.modules["kernels"])
            if name in globals():
                return globals()[name]
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
