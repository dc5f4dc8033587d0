"""Bytes that a compiled program moves between devices, read from its text.

XLA's text lists each computation with its instructions. An all-reduce inside of a loop over layers
counts as often as the loop turns, which the compiler has noted where it knows it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from math import prod

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8}
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:body|calls|to_apply|true_computation|false_computation|called_computations|"
    r"branch_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)")
_TURNS = re.compile(r'known_trip_count"?:\{"n":"(\d+)"')
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[(\d+),(\d+)\])")


@dataclass(frozen=True)
class Collective:
    """One instruction that moves bytes between devices.

    Attributes:
      kind: one of `KINDS`.
      result: bytes of its result on one device.
      devices: how many take part.
      turns: how often it is carried out.
    """

    kind: str
    result: int
    devices: int
    turns: int

    @property
    def moved(self) -> float:
        """Bytes that a device sends, by the usual ring: `2 (n-1)/n` of an all-reduce's result,
        `(n-1)/n` of an all-gather's or all-to-all's, `n-1` times a reduce-scatter's."""
        n = self.devices
        share = {"all-reduce": 2 * (n - 1) / n, "all-gather": (n - 1) / n,
                 "all-to-all": (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
        return self.turns * self.result * share[self.kind]


def find_collectives(text: str, devices: int) -> list[Collective]:
    """The collectives of a compiled program of that many devices."""
    calls: dict[str, Counter[str]] = defaultdict(Counter)
    found: dict[str, list[Collective]] = defaultdict(list)
    entry, inside = "", ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            inside = head[2]
            entry = inside if head[1] else entry
            continue
        instruction = _INSTRUCTION.match(line)
        if not instruction:
            continue
        kind = instruction[2].removesuffix("-start")
        if kind in KINDS:
            found[inside].append(_collective(kind, instruction[1], line, devices))
            continue
        turns = int(match[1]) if kind == "while" and (match := _TURNS.search(line)) else 1
        for names in _CALLED.findall(line):
            for name in names.split(", "):
                calls[inside][name.strip("% ")] += turns
    runs: Counter[str] = Counter()
    _run(entry, 1, calls, runs)
    return [Collective(one.kind, one.result, one.devices, runs[name])
            for name, own in found.items() for one in own if runs[name]]


def _run(name: str, turns: int, calls: dict[str, Counter[str]], runs: Counter[str]) -> None:
    """Add to `runs` how often a computation and those that it calls are carried out."""
    runs[name] += turns
    for called, times in calls[name].items() if name in calls else ():
        _run(called, turns * times, calls, runs)


def _collective(kind: str, result: str, line: str, devices: int) -> Collective:
    """An instruction with the type `result`; that of an asynchronous start is (operands, results,
    ...), whose largest part is what moves, and the smallest for a reduce-scatter."""
    sizes = [BYTES.get(dtype, 4) * prod(int(n) for n in shape.split(",") if n)
             for dtype, shape in _SHAPE.findall(result)]
    if "-start(" in line:
        size = min(sizes[:2]) if kind == "reduce-scatter" else max(sizes, default=0)
    else:
        size = sum(sizes)  # several arrays may be combined in one
    groups = _GROUPS.search(line)
    if groups is None:
        taking = devices
    else:
        taking = len(groups[1].split(",")) if groups[1] else int(groups[3])
    return Collective(kind, size, max(taking, 1), 1)
