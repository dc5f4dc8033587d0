"""The low-bit linears of gemlite and Humming as further rows of the same run, where they are there.

Both are kernel libraries for torch that serving engines use. Weights are of 1 or 2 bits in groups
of 128 inputs with a float16 scale each, gemlite's with a zero too. Calls are recorded as CUDA
graphs, so that starting them costs as little as it costs a compiled program.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from rabit_jax.errors import BadInput
from rabit_jax.kernels.bench.case import SAMPLE_OUTPUTS, SAMPLE_ROWS, activations, relative_error

LIBRARIES = ("gemlite", "humming")
GROUP = 128
PRODUCTS = 16  # in one graph

Tensor: TypeAlias = Any  # of torch, which only some machines have


class Linear(NamedTuple):
    """A packed linear: `call(x)`, the bytes of its tensors, and the matrix `[o, i]` it stands for,
    a tensor of torch."""

    call: Callable[[Tensor], Tensor]
    bytes: int
    matrix: Tensor


def missing() -> dict[str, str]:
    """The libraries that cannot be measured, and a line that says why."""
    both = "so gemlite and Humming have no rows"
    if importlib.util.find_spec("torch") is None:
        return dict.fromkeys(LIBRARIES, f"torch is not installed, {both}")
    if not _torch().cuda.is_available():
        return dict.fromkeys(LIBRARIES, f"torch finds no CUDA, {both}")
    return {name: f"{name} is not installed, so it has no rows"
            for name in LIBRARIES if importlib.util.find_spec(name) is None}


def cases(inputs: int, outputs: int, batch: int) -> list[TorchCase]:
    """The cases of the libraries that are there, at one shape and batch."""
    makers = {"gemlite": {"gemlite_w1": (gemlite, 1), "gemlite_w2": (gemlite, 2)},
              "humming": {"humming_w2": (humming, 2)}}
    return [TorchCase(impl, make, bits, inputs, outputs, batch)
            for name, found in makers.items() if name not in missing()
            for impl, (make, bits) in found.items()]


def _torch() -> ModuleType:
    """torch, which only some machines have; imported by name, so that type checkers need not."""
    return import_module("torch")


def gemlite(bits: int, inputs: int, outputs: int) -> Linear:
    """`s (q - z)` of groups, by gemlite."""
    torch, library = _torch(), import_module("gemlite")
    half = library.DType.FP16
    linear = library.GemLiteLinear(
        W_nbits=bits, group_size=GROUP, in_features=inputs, out_features=outputs,
        input_dtype=half, output_dtype=half)
    q = torch.randint(0, 2**bits, (outputs, inputs), dtype=torch.uint8, device="cuda")
    scales = torch.rand((outputs, inputs // GROUP), device="cuda").add(0.5).div(inputs**0.5).half()
    zeros = torch.full_like(scales, (2**bits - 1) / 2)
    grouped = q.half().reshape(outputs, -1, GROUP)
    matrix = (grouped - zeros[:, :, None]) * scales[:, :, None]
    linear.pack(q, scales.reshape(-1, 1), zeros.reshape(-1, 1), None)
    size = sum(t.numel() * t.element_size() for t in (linear.W_q, linear.scales, linear.zeros))
    return Linear(linear, size, matrix.reshape(outputs, inputs))


def humming(bits: int, inputs: int, outputs: int) -> Linear:
    """`s q` of groups, q from -2 to 1, by Humming."""
    torch, library = _torch(), import_module("humming.layer")
    least = -(2 ** (bits - 1))
    q = torch.randint(least, -least, (outputs, inputs), device="cuda").half()
    # Each group has the value from which the library finds the scale again.
    q.reshape(outputs, -1, GROUP)[:, :, 0] = least
    scales = torch.rand((outputs, inputs // GROUP), device="cuda").add(0.5).div(inputs**0.5).half()
    matrix = (q.reshape(outputs, -1, GROUP) * scales[:, :, None]).reshape(outputs, inputs)
    layer = library.HummingLayer(
        shape_n=outputs, shape_k=inputs, torch_dtype=torch.float16,
        weight_config={"dtype": f"int{bits}", "group_size": GROUP}).cuda()
    layer.load_from_unquantized(matrix)
    layer.transform()
    kept = [t for name, t in layer.state_dict().items() if name.startswith("weight")]
    return Linear(layer, sum(t.numel() * t.element_size() for t in kept), matrix)


class TorchCase:
    """One library's linear of one number of bits; attributes and methods as of `Case`."""

    k = None

    def __init__(self, impl: str, make: Callable[[int, int, int], Linear], bits: int, inputs: int,
                 outputs: int, batch: int) -> None:
        self.impl, self.make, self.sizes = impl, make, (bits, inputs, outputs)
        self.xs = tuple(_torch().from_numpy(np.array(activations(batch, inputs, "float16", n)))
                        .cuda() for n in range(PRODUCTS))
        self.rotation: list[Linear] = []
        self.seconds: list[float] = []
        self.turn, self.copies, self.graphs = 0, 1, []

    def check(self) -> None:
        """Make the first linear.

        Raises:
          BadInput: a shape that is no multiple of the group.
        """
        _, inputs, outputs = self.sizes
        if inputs % GROUP or outputs % GROUP:
            raise BadInput(f"{self.impl} wants inputs and outputs in multiples of {GROUP}, found "
                           f"{inputs}x{outputs}")
        self.rotation = [self.make(*self.sizes)]

    @property
    def bytes(self) -> int:
        """Bytes of one linear, scales and zeros included."""
        return self.rotation[0].bytes

    def error(self) -> float:
        """Relative error of one product on a sample of its outputs."""
        first, outputs = self.rotation[0], self.sizes[2]
        sample = np.unique(np.linspace(0, outputs - 1, SAMPLE_OUTPUTS).astype(int))
        w = first.matrix[sample].double().cpu().numpy()
        x = self.xs[0][:SAMPLE_ROWS].double().cpu().numpy()
        y = first.call(self.xs[0])[:SAMPLE_ROWS].double().cpu().numpy()[:, sample]
        return relative_error(y, x @ w.T)

    def rotate(self, copies: int) -> None:
        """Hold `copies` linears, and record the calls on them as graphs."""
        torch = _torch()
        # Once outside a graph, where the kernel is compiled and tuned.
        self.rotation[0].call(self.xs[0])
        more = (self.make(*self.sizes) for _ in range(copies - 1))
        self.rotation += [linear._replace(matrix=None) for linear in more]
        self.copies = copies
        for first in range(0, copies, PRODUCTS):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for n, x in enumerate(self.xs):
                    self.rotation[(first + n) % copies].call(x)
            self.graphs.append(graph)

    def run(self) -> float:
        """One graph on the next linears; returns the seconds of one product, by CUDA's events."""
        torch = _torch()
        graph = self.graphs[self.turn % len(self.graphs)]
        self.turn += 1
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / (1e3 * PRODUCTS)
