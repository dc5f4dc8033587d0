"""Damage by a seeded generator: of bytes as disks and networks make it, of trees as people do."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

# What stands where a number, a text or a list was wanted.
HOSTILE = (
    None, True, False, 0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64,
    -(2**63), 10**18, 10**30, int("9" * 400), 0.5, -0.0, 1e-320, 1e308, float("inf"),
    float("-inf"), float("nan"), "", " ", "null", "nan", "1e999", "0x10", "yes", "true", "1_000",
    "a", "../../etc/passwd", "..", ".", "/etc/passwd", "/", "~root", "a/b", "a\0b", "\ud800",
    "\u202egpj.exe", "é", "e\u0301", "🙂" * 20, "x" * 5000, "\n", "a\nb",
    "<script>alert(1)</script>", "${HOME}",
    "{{ 7 * 7 }}", "%s%n", "!!python/object/apply:os.system [id]", "__class__", "(" * 30,
    [], {}, [[]], [None], ["../x"], {"a": {}}, {"": 1}, {"__proto__": 1}, [0] * 300,
    [[[[[[[[1]]]]]]]],
    {"type": "residual"}, {"type": None}, [1, "a", None],
)


def damaged(content: bytes, rng: np.random.Generator, head: int = 0) -> bytes:
    """One damaged copy of a file; half of the damage is in its first `head` bytes."""
    found = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        size = len(found)
        if not size:
            break
        at = int(rng.integers(min(head, size) if head and rng.random() < 0.5 else size))
        _damage(found, at, int(rng.integers(1, 65)), int(rng.integers(9)), rng)
    return bytes(found)


def _damage(found: bytearray, at: int, n: int, kind: int, rng: np.random.Generator) -> None:
    if kind == 0:
        found[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        found[at : at + n] = rng.integers(0, 256, len(found[at : at + n]), np.uint8).tobytes()
    elif kind == 2:
        found[at : at + n] = bytes(len(found[at : at + n]))
    elif kind == 3:
        del found[at:]
    elif kind == 4:
        del found[at : at + n]
    elif kind == 5:
        found[at:at] = found[max(at - n, 0) : at] or b"0"
    elif kind == 6:  # a length or an offset that is far too large, or negative
        wide = int(rng.choice([2, 4, 8]))
        value = int(rng.choice(np.array([0, 1, 2**15, 2**31 - 1, 2**31, 2**62, 2**63 - 1])))
        found[at : at + wide] = value.to_bytes(8, "little")[:wide]
    elif kind == 7:
        found[at : at + n] = b"\xff" * len(found[at : at + n])
    else:  # a digit, a quote or a bracket of a text
        signs = b'0123456789-.eE"{}[],:\\ \n\t#&*!|>%@`'
        found[at] = signs[int(rng.integers(len(signs)))]


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value of a tree of dicts and lists, the root left out."""
    pairs = tree.items() if isinstance(tree, dict) else \
        enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield (*path, key)
        yield from places(value, (*path, key))


def hostile(rng: np.random.Generator, *more: Any) -> Any:
    """A value of no sense; `more` are some that fit the format."""
    choices = HOSTILE + more
    return copy.deepcopy(choices[int(rng.integers(len(choices)))])


def mutated(tree: Any, rng: np.random.Generator, *more: Any) -> Any:
    """A copy of a tree of dicts and lists with one to three of its places changed."""
    found = copy.deepcopy(tree)
    for _ in range(int(rng.integers(1, 4))):
        known = list(places(found))
        if not known:
            return found
        *path, key = known[int(rng.integers(len(known)))]
        holder = found
        for step in path:
            holder = holder[step]
        _mutate(holder, key, known, found, rng, more)
    return found


def _mutate(
    holder: Any, key: Any, known: list, found: Any, rng: np.random.Generator, more: tuple
) -> None:
    kind = int(rng.integers(7))
    if kind < 3:
        holder[key] = hostile(rng, *more)
    elif kind == 3:
        del holder[key]
    elif kind == 4 and isinstance(holder, dict):  # another name, another case, a blank behind it
        name = str(key)
        names = (name + " ", name.upper(), name[:-1], f"{name}.{name}", "x" + name, name + "\0")
        holder[names[int(rng.integers(len(names)))]] = holder.pop(key)
    elif kind == 5:  # what stands elsewhere in the tree
        other = found
        for step in known[int(rng.integers(len(known)))]:
            other = other[step]
        holder[key] = copy.deepcopy(other)
    elif (isinstance(holder[key], int | float) and not isinstance(holder[key], bool)
          and abs(holder[key]) < 1e300):  # more times a float is no number
        factor = rng.choice([-1, 0, 2, 3, 0.5, 1e9, 1e-9])
        holder[key] = type(holder[key])(holder[key] * factor)
    else:
        holder[key] = [holder[key]] * int(rng.integers(1, 4))


def json_bytes(tree: Any, rng: np.random.Generator) -> bytes:
    """A tree as JSON; now and then a key is given twice, or the text itself is damaged."""
    text = json.dumps(tree).encode("utf-8", errors="replace")
    if rng.random() < 0.1 and isinstance(tree, dict) and tree:
        key = list(tree)[int(rng.integers(len(tree)))]
        again = json.dumps({key: hostile(rng)}).encode("utf-8", errors="replace")
        text = again[:-1] + b", " + text[1:]
    if rng.random() < 0.1:
        depth = int(rng.integers(1, 3000))
        text = b'{"a":' * depth + text + b"}" * depth
    return damaged(text, rng) if rng.random() < 0.3 else text
