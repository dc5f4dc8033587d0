"""Errors in one sentence."""

import copy
import pickle

from rabit_jax.errors import LONGEST, BadInput, first_line


def test_a_message_is_one_line_that_can_be_read():
    assert str(BadInput("k is 5: wanted 1 to 4")) == "k is 5: wanted 1 to 4"
    assert str(BadInput("tensor a\nb\r\nc is missing")) == "tensor a b c is missing"
    long = str(BadInput("x" * 10**6))
    assert len(long) == LONGEST and long.endswith("x...")
    error = BadInput("two  blanks stay")
    assert str(copy.copy(error)) == str(pickle.loads(pickle.dumps(error))) == "two  blanks stay"


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\none\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
