"""JSON texts against Python's json and hashlib."""

import hashlib
import json
import math

import pytest

from rabit_jax.json_text import parse, seal, unseal

CONTENT = {"b": [1, 2.5, None, "é"], "a": {"c": True}, "loss": math.inf}
DEEP = '{"a":' * 5000 + "1" + "}" * 5000


def test_a_sealed_object_holds_the_checksum_of_the_rest():
    found = json.loads(seal({**CONTENT, "sha256": "of before"}))
    assert found.pop("sha256") == hashlib.sha256(
        json.dumps(CONTENT, sort_keys=True).encode()).hexdigest()
    assert found == CONTENT


@pytest.mark.parametrize("indent", [None, 1])
def test_what_was_sealed_comes_back(indent):
    assert unseal(seal(CONTENT, indent)) == CONTENT
    assert unseal(json.dumps(CONTENT)) == CONTENT  # as version 0.1 wrote it


@pytest.mark.parametrize("change", [
    {"a": {"c": False}}, {"more": 1}, {"sha256": None}, {"sha256": 0}, {"sha256": "0" * 64},
])
def test_a_change_is_seen(change):
    with pytest.raises(ValueError, match="checksum does not match"):
        unseal(json.dumps({**json.loads(seal(CONTENT)), **change}))


@pytest.mark.parametrize("text", ["[]", "1", "null", "", "{", '{"a": 1} x', DEEP, "9" * 9999])
def test_no_object_is_a_value_error(text):
    with pytest.raises(ValueError):
        unseal(text)


@pytest.mark.parametrize("text", ["NaN", "-Infinity", '{"a": [1e999]}'])
def test_numbers_that_are_not_finite(text):
    assert parse(text) is not None
    with pytest.raises(ValueError, match="no finite number"):
        parse(text, finite=True)


def test_bytes_are_utf_8():
    assert parse('{"é": 1}'.encode()) == {"é": 1}
    with pytest.raises(ValueError):
        parse(b'{"\xff": 1}')
