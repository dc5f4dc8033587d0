"""JSON texts that may be damaged or hostile, and objects that hold a checksum of themselves.

    {"step": 3, "sha256": "9b1c..."}    sha256 of json.dumps({"step": 3}, sort_keys=True)
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from rabit_jax.types import Json


def seal(content: Json, indent: int | None = None) -> str:
    """The JSON text of `content` with its checksum as `sha256`, in place of one that it has."""
    plain = {name: value for name, value in content.items() if name != "sha256"}
    return json.dumps({**plain, "sha256": _checksum(plain)}, indent=indent)


def unseal(text: str) -> Json:
    """What was sealed, without its checksum; an object without one is taken as it is, for version
    0.1 wrote none.

    Raises:
      ValueError: the text is no JSON object, or its checksum is not that of its content.
    """
    found = parse(text)
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, wanted an object")
    content = {name: value for name, value in found.items() if name != "sha256"}
    if "sha256" in found and found["sha256"] != _checksum(content):
        raise ValueError("its checksum does not match")
    return content


def parse(text: str | bytes, finite: bool = False) -> Any:
    """What a JSON text holds; ValueError, and no other error, where it is none.

    Args:
      text: the text, or its bytes in UTF-8.
      finite: refuse the NaN and Infinity that Python reads and writes, which are no JSON, and
        1e999, which it rounds to infinity.
    """
    number = _finite if finite else float
    try:
        return json.loads(text, parse_constant=number, parse_float=number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds {text[:20]}, which is no finite number")
    return number


def _checksum(content: Json) -> str:
    try:
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
