"""What the fields of a Hugging Face `config.json` may hold, checked before any is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeGuard

from rabit_jax.errors import BadInput
from rabit_jax.formats.families import SIZES
from rabit_jax.models.config import MOST, MOST_LAYERS
from rabit_jax.types import Json

LARGEST = 1e30


class Kind(NamedTuple):
    """What a field may hold: a test of its value, and the words for it."""

    test: Callable[[object], bool]
    words: str


def is_whole(value: object, least: int = 0, most: int = MOST) -> bool:
    """Whether a value is an integer of that range; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number that float32 holds; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= LARGEST  # NaN is neither


def is_tokens(value: object) -> TypeGuard[int | list[int] | tuple[int, ...]]:
    """Whether a value is a token id or a list of them."""
    return all(map(is_whole, value)) if isinstance(value, (list, tuple)) else is_whole(value)


SIZE = Kind(lambda v: is_whole(v, 1), f"a positive integer of at most {MOST}")
LAYERS = Kind(lambda v: is_whole(v, 1, MOST_LAYERS), f"a positive integer of at most {MOST_LAYERS}")
COUNT = Kind(is_whole, f"an integer from 0 to {MOST}")
NUMBER = Kind(lambda v: is_number(v) and v >= 0, f"a number from 0 to {LARGEST:g}")
POSITIVE = Kind(lambda v: is_number(v) and v >= 1 / LARGEST,
                f"a positive number of at most {LARGEST:g}")
SWITCH = Kind(lambda v: isinstance(v, bool), "true or false")
TEXT = Kind(lambda v: isinstance(v, str), "text")
OBJECT = Kind(lambda v: isinstance(v, Mapping), "an object or null")
NAMES = Kind(lambda v: isinstance(v, (list, tuple)) and all(isinstance(one, str) for one in v),
             "a list of names")
TOKEN = Kind(is_whole, "a token id")
TOKENS = Kind(is_tokens, "a token id or a list of them")

# What must be there.
NEEDED = {**dict.fromkeys(SIZES, SIZE), "num_hidden_layers": LAYERS, "rms_norm_eps": NUMBER,
          "initializer_range": NUMBER, "max_position_embeddings": SIZE}
# What may be null or left out.
OPTIONAL = {
    "num_key_value_heads": SIZE, "head_dim": SIZE, "rope_theta": POSITIVE,
    "rope_local_base_freq": POSITIVE, "rope_scaling": OBJECT, "rope_parameters": OBJECT,
    "partial_rotary_factor": POSITIVE, "tie_word_embeddings": SWITCH, "bos_token_id": TOKEN,
    "eos_token_id": TOKENS, "dtype": TEXT, "torch_dtype": TEXT, "hidden_act": TEXT,
    "hidden_activation": TEXT, "layer_types": NAMES, "use_sliding_window": SWITCH,
    "sliding_window": SIZE, "max_window_layers": COUNT, "sliding_window_pattern": SIZE,
    "attention_bias": SWITCH, "mlp_bias": SWITCH, "use_bidirectional_attention": SWITCH,
    "query_pre_attn_scalar": POSITIVE, "attn_logit_softcapping": POSITIVE,
    "final_logit_softcapping": POSITIVE,
}
ROTARY = {
    "rope_theta": POSITIVE, "factor": POSITIVE, "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE, "original_max_position_embeddings": SIZE, "rope_type": TEXT,
    "type": TEXT, "partial_rotary_factor": POSITIVE,
}


def check_fields(raw: Json) -> None:
    """Raises BadInput for the first field that is missing or holds what it cannot mean."""
    for name, kind in NEEDED.items():
        _check("config field", name, raw.get(name), kind)
    check_kinds("config field", raw, OPTIONAL)


def check_kinds(what: str, raw: Mapping[str, object], kinds: Mapping[str, Kind]) -> None:
    """Raises BadInput for the first field of `raw` that is there and not of its kind.

    Args:
      what: what a field is called in the message, such as "config field".
      raw: the fields; null counts as not there.
      kinds: of the fields that are looked at.
    """
    for name, kind in kinds.items():
        if raw.get(name) is not None:
            _check(what, name, raw[name], kind)


def token_ids(value: object, where: str) -> tuple[int, ...]:
    """A token id, a list of them or null, as Hugging Face writes `eos_token_id`, as a tuple.

    Raises:
      BadInput: something else; the message begins with `where`.
    """
    if value is None:
        return ()
    if not is_tokens(value):
        raise BadInput(f"{where} is {shown(value)}, wanted {TOKENS.words}")
    return (value,) if isinstance(value, int) else tuple(value)


def shown(value: object) -> str:
    """A value for a message, shortened where it is long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check(what: str, name: str, value: object, kind: Kind) -> None:
    if not kind.test(value):
        raise BadInput(f"{what} {name} is {shown(value)}, wanted {kind.words}: correct config.json")
