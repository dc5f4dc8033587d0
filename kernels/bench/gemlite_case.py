"""gemlite's 1- and 2-bit linears as further rows of the same run, where it is installed.

Weights are in groups of 128 inputs with a float16 scale and zero each, as double-binary
factorisation uses them. Calls are recorded as CUDA graphs, so that starting them costs as little as
it costs a compiled program.
"""

from __future__ import annotations

import importlib.util
import time
from importlib import import_module
from typing import Any

import numpy as np

from rabit_jax.errors import BadInput
from rabit_jax.kernels.bench.case import SAMPLE_OUTPUTS, SAMPLE_ROWS, activations, relative_error

BITS = (1, 2)
GROUP = 128
PRODUCTS = 16  # in one graph


def missing() -> str | None:
    """Why gemlite cannot be measured, in a few words; None where it can."""
    for name in ("torch", "gemlite"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed, so gemlite has no rows"
    return None if _torch().cuda.is_available() else "torch finds no CUDA, so gemlite has no rows"


def _torch() -> Any:
    """torch, which only some machines have; imported by name, so that type checkers need not."""
    return import_module("torch")


def cases(inputs: int, outputs: int, batch: int) -> list[GemliteCase]:
    """One case for each of `BITS` at one shape and batch."""
    return [GemliteCase(inputs, outputs, batch, bits) for bits in BITS]


class GemliteCase:
    """The linear of one number of bits; attributes and methods as of `Case`."""

    k = None

    def __init__(self, inputs: int, outputs: int, batch: int, bits: int) -> None:
        self.impl, self.bits, self.inputs, self.outputs = f"gemlite_w{bits}", bits, inputs, outputs
        self.xs = tuple(self._x(activations(batch, inputs, "float16", n))
                        for n in range(PRODUCTS))
        self.rotation: list[Any] = []
        self.seconds: list[float] = []
        self.turn, self.copies, self.graphs = 0, 1, []

    @staticmethod
    def _x(x: Any) -> Any:
        return _torch().from_numpy(np.array(x)).cuda()

    def check(self) -> None:
        """Make the first linear.

        Raises:
          BadInput: a shape that is no multiple of the group.
        """
        if self.inputs % GROUP or self.outputs % GROUP:
            raise BadInput(f"gemlite wants inputs and outputs in multiples of {GROUP}, found "
                           f"{self.inputs}x{self.outputs}")
        linear, self.weight = self._linear()
        self.rotation = [linear]

    @property
    def bytes(self) -> int:
        """Bytes of one linear, scales and zeros included."""
        linear = self.rotation[0]
        return sum(t.numel() * t.element_size() for t in (linear.W_q, linear.scales, linear.zeros))

    def error(self) -> float:
        """Relative error of one product on a sample of its outputs."""
        q, scales, zeros = self.weight
        outputs = np.unique(np.linspace(0, self.outputs - 1, SAMPLE_OUTPUTS).astype(int))
        w = (q[outputs].reshape(len(outputs), -1, GROUP) - zeros[outputs][:, :, None]
             ) * scales[outputs][:, :, None]
        x = self.xs[0][:SAMPLE_ROWS].double().cpu().numpy()
        y = self.rotation[0](self.xs[0])[:SAMPLE_ROWS].double().cpu().numpy()[:, outputs]
        return relative_error(y, x @ w.reshape(len(outputs), -1).T)

    def _linear(self) -> tuple[Any, tuple[np.ndarray, ...]]:
        """A packed linear; its integers `[o, i]`, and scales and zeros `[o, i / GROUP]`."""
        torch, gemlite, i, o = _torch(), import_module("gemlite"), self.inputs, self.outputs
        half = gemlite.DType.FP16
        linear = gemlite.GemLiteLinear(
            W_nbits=self.bits, group_size=GROUP, in_features=i, out_features=o, input_dtype=half,
            output_dtype=half)
        q = torch.randint(0, 2**self.bits, (o, i), dtype=torch.uint8, device="cuda")
        scales = torch.rand((o, i // GROUP), device="cuda").add(0.5).div(i**0.5).half()
        zeros = torch.full_like(scales, (2**self.bits - 1) / 2)
        plain = q.cpu().numpy(), scales.double().cpu().numpy(), zeros.double().cpu().numpy()
        linear.pack(q, scales.reshape(-1, 1), zeros.reshape(-1, 1), None)
        return linear, plain

    def rotate(self, copies: int) -> None:
        """Hold `copies` linears, and record the calls on them as graphs."""
        torch = _torch()
        # Once outside a graph, where the kernel is compiled and tuned.
        self.rotation[0](self.xs[0])
        self.rotation += [self._linear()[0] for _ in range(copies - 1)]
        self.copies = copies
        for first in range(0, copies, PRODUCTS):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for n, x in enumerate(self.xs):
                    self.rotation[(first + n) % copies](x)
            self.graphs.append(graph)

    def run(self) -> float:
        """One graph on the next linears; returns the seconds of one product."""
        torch = _torch()
        graph = self.graphs[self.turn % len(self.graphs)]
        self.turn += 1
        torch.cuda.synchronize()
        begin = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / PRODUCTS
