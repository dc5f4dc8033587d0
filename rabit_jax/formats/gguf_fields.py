"""The types that metadata of a GGUF file must have, checked once so that no reader has to.

The types are those of the format's list of standard keys; where that has an integer or a float, any
width is taken.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from rabit_jax.errors import BadInput
from rabit_jax.types import Json

LONGEST = 128  # characters of a tensor's name; llama.cpp itself takes 63


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: object) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)
            and abs(value) < 1e30 and math.isfinite(value))


def _text(value: object) -> bool:
    return isinstance(value, str)


def _flag(value: object) -> bool:
    return isinstance(value, bool)


def _list_of(kind: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(kind, value))


def _whole_or_list(value: object) -> bool:
    return _whole(value) or _list_of(_whole)(value)


def _period(value: object) -> bool:
    return _whole(value) and value != 0 or _list_of(_flag)(value)


_WHOLE = (_whole, "an integer that is not negative")
_COUNT = (_whole_or_list, "an integer that is not negative, or a list of them")
_NUMBER = (_number, "a finite number")
_TEXT = (_text, "a text")
_FLAG = (_flag, "true or false")
_GENERAL = {
    "general.architecture": _TEXT, "general.alignment": _WHOLE, "split.count": _WHOLE,
    "split.no": _WHOLE,
    "tokenizer.ggml.model": _TEXT, "tokenizer.ggml.pre": _TEXT, "tokenizer.chat_template": _TEXT,
    "tokenizer.ggml.tokens": (_list_of(_text), "a list of texts"),
    "tokenizer.ggml.merges": (_list_of(_text), "a list of texts"),
    "tokenizer.chat_templates": (_list_of(_text), "a list of texts"),
    "tokenizer.ggml.scores": (_list_of(_number), "a list of finite numbers"),
    "tokenizer.ggml.token_type": (_list_of(_whole), "a list of integers"),
    "tokenizer.ggml.add_bos_token": _FLAG, "tokenizer.ggml.add_eos_token": _FLAG,
    "tokenizer.ggml.add_space_prefix": _FLAG,
    **{f"tokenizer.ggml.{name}_token_id": _WHOLE
       for name in ("bos", "eos", "eot", "eom", "unknown", "padding")},
}
# Behind `<architecture>.`
_OWN = {
    **dict.fromkeys(("context_length", "embedding_length", "block_count", "vocab_size",
                     "attention.key_length", "attention.value_length", "rope.dimension_count",
                     "attention.sliding_window", "expert_count", "expert_used_count"), _WHOLE),
    **dict.fromkeys(("feed_forward_length", "attention.head_count", "attention.head_count_kv"),
                    _COUNT),
    **dict.fromkeys(("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.freq_base_swa",
                     "rope.scaling.factor", "rope.scale_linear", "final_logit_softcapping"),
                    _NUMBER),
    "rope.scaling.type": _TEXT, "attention.causal": _FLAG, "rope.scaling.finetuned": _FLAG,
    "attention.sliding_window_pattern": (_period, "a positive integer or a list of flags"),
}


def check_fields(fields: Json, path: Path) -> None:
    """Raises BadInput for the first standard key whose value has another type."""
    name = fields.get("general.architecture")
    kinds = _GENERAL | {f"{name}.{key}": kind for key, kind in _OWN.items()}
    for key, (fits, wanted) in kinds.items():
        if key in fields and not fits(fields[key]):
            found = repr(fields[key])
            found = found if len(found) <= 60 else f"{found[:57]}..."
            raise BadInput(f"{key[:60]} of {path} is {found}, wanted {wanted}: the file is "
                           "damaged, fetch it again")


def check_name(name: str, what: str, path: Path) -> None:
    """Raises BadInput for a name of a key or tensor that no message can show."""
    if not name or not name.isprintable() or len(name) > LONGEST:
        raise BadInput(f"{path} has a {what} of the name {name[:40]!r}, wanted at most {LONGEST} "
                       "printable characters: the file is damaged, fetch it again")
