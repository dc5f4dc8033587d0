"""The tokenizer that the metadata of a GGUF file describe, as `tokenizer.json` has it.

A GGUF file stores vocabulary, merges or scores, and the kind of each token; how text is cut before
the merges is known by name only (`tokenizer.ggml.pre`). The patterns are those of the models' own
`tokenizer.json`, which llama.cpp follows too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rabit_jax.errors import BadInput, first_line
from rabit_jax.types import Json, Tokenizer

if TYPE_CHECKING:
    import tokenizers

CONTROL, USER_DEFINED = 3, 4  # kinds of tokens in tokenizer.ggml.token_type

_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",)
_QWEN2 = (_LLAMA3[0].replace(r"\p{N}{1,3}", r"\p{N}"),)
_DIGITS = (r"\p{N}", *_GPT2)
# The patterns of each `tokenizer.ggml.pre`, which cut one after the other.
PATTERNS = {
    # llama.cpp's own, of files from before there were names; no name at all means it too.
    "default": (r"[\p{P}\$\+<=>\^~\|]+", *_GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": _GPT2, "smollm": _DIGITS, "refact": _DIGITS,
    "llama3": _LLAMA3, "llama-v3": _LLAMA3, "llama-bpe": _LLAMA3, "falcon3": _LLAMA3,
    "smaug-bpe": _LLAMA3, "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2,
}
# Of these, a word that is a token is never merged from parts, and a begin token is the default.
_LLAMA3_LIKE = ("llama3", "llama-v3", "llama-bpe", "falcon3")
# Tokens that llama.cpp takes by their text for ends of a turn, whatever kind the file gives them.
TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>",
             "<|end_of_text|>", "<EOT>")
# Ids by role that SentencePiece has where the metadata name none.
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}


def read_tokenizer(fields: Json, architecture: str) -> Tokenizer:
    """A transformers tokenizer from the metadata of a GGUF file.

    Byte-level BPE (`gpt2`) and SentencePiece (`llama`) are read. Control tokens become special,
    user-defined ones stay whole in any text, and begin and end tokens are added where the file says
    so (SentencePiece and Llama 3: a begin token where it says nothing).

    Args:
      fields: metadata by key.
      architecture: `general.architecture`; Gemma's SentencePiece differs from Llama's.

    Raises:
      BadInput: a kind of tokenizer or a way of cutting text that is not known (the message begins
        with `unsupported`), a vocabulary without tokens, or one that contradicts itself.
    """
    try:
        return _built(fields, vocabulary(fields), architecture)
    except BaseException as error:  # the Rust library raises plain Exception, and panics
        if isinstance(error, BadInput | ImportError | OSError | KeyboardInterrupt | SystemExit):
            raise
        raise BadInput(f"the tokenizer in the GGUF file contradicts itself "
                       f"({first_line(error)[:200]}): fetch the file again") from error


def vocabulary(fields: Json) -> list[str]:
    """The tokens by their ids.

    Raises:
      BadInput: there are none.
    """
    tokens = fields.get("tokenizer.ggml.tokens")
    if not tokens:
        raise BadInput("the GGUF file has no tokenizer.ggml.tokens: take a file with a vocabulary")
    return tokens


def _built(fields: Json, tokens: list[str], architecture: str) -> Tokenizer:
    from transformers import PreTrainedTokenizerFast

    kind = fields.get("tokenizer.ggml.model")
    if kind == "gpt2":
        built = _byte_level(fields, tokens)
    elif kind == "llama":
        built = _gemma(fields, tokens) if architecture.startswith("gemma") else _llama(fields,
                                                                                      tokens)
    else:
        raise BadInput(f"unsupported tokenizer.ggml.model {kind!r}, supported are gpt2 and llama")
    _add_whole_tokens(built, tokens, fields)
    names = {role: _token(fields, tokens, key) for role, key in (
        ("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"),
        ("pad_token", "padding"))}
    _add_ends(built, fields, names["bos_token"], names["eos_token"])
    return PreTrainedTokenizerFast(
        tokenizer_object=built, chat_template=_template(fields),
        clean_up_tokenization_spaces=False, **names)


def token_id(fields: Json, role: str) -> int | None:
    """The id of the token that has a role ("bos", "eos", "unknown", ...), None where none has."""
    implied = (_SENTENCEPIECE_IDS.get(role)
               if fields.get("tokenizer.ggml.model") == "llama" else None)
    return fields.get(f"tokenizer.ggml.{role}_token_id", implied)


def _template(fields: Json) -> str | dict[str, str] | None:
    """The chat template; where the file has others by name, all of them by their names."""
    default = fields.get("tokenizer.chat_template")
    named = {name: fields.get(f"tokenizer.chat_template.{name}")
             for name in fields.get("tokenizer.chat_templates") or ()}
    found = {name: text for name, text in named.items() if isinstance(text, str)}
    if default is not None and found:
        return {"default": default, **found}
    return found or default


def end_ids(fields: Json) -> list[int]:
    """All end tokens: those that the metadata name, and ends of a turn known by their text."""
    named = (token_id(fields, role) for role in ("eos", "eot", "eom"))
    found = [i for i in named if i is not None]
    found += [i for i, token in enumerate(vocabulary(fields)) if token in TURN_ENDS]
    return list(dict.fromkeys(found))


def _byte_level(fields: Json, tokens: list[str]) -> tokenizers.Tokenizer:
    """GPT-2's BPE over bytes spelled as letters."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = fields.get("tokenizer.ggml.pre", "default")
    if name not in PATTERNS:
        raise BadInput(f"unsupported tokenizer.ggml.pre {name!r}, supported are "
                       f"{', '.join(PATTERNS)}")
    merges = [tuple(merge.split(" ")) for merge in fields.get("tokenizer.ggml.merges") or ()]
    built = Tokenizer(models.BPE(
        {token: i for i, token in enumerate(tokens)}, merges, ignore_merges=name in _LLAMA3_LIKE))
    cuts = [pre_tokenizers.Split(Regex(one), behavior="isolated") for one in PATTERNS[name]]
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if PATTERNS[name] is _QWEN2:
        built.normalizer = normalizers.NFC()
    built.decoder = decoders.ByteLevel()
    return built


def _llama(fields: Json, tokens: list[str]) -> tokenizers.Tokenizer:
    """SentencePiece BPE: spaces as U+2581, one more before every text and behind every special
    token, unknown characters as bytes."""
    from tokenizers import decoders, normalizers

    scores = fields.get("tokenizer.ggml.scores") or [-float(i) for i in range(len(tokens))]
    built = _sentencepiece(fields, tokens, scores)
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    built.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    built.decoder = decoders.Sequence(steps)
    return built


def _gemma(fields: Json, tokens: list[str]) -> tokenizers.Tokenizer:
    """Gemma's: no space in front, merges in the order of the vocabulary."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    # Runs of spaces are stored as spaces, which the normaliser never leaves.
    spelled = [t.replace(" ", "▁") if t and not t.strip(" ") else t for t in tokens]
    # The scores do not follow the order of Gemma's merges; the ids do.
    built = _sentencepiece(fields, spelled, [-float(i) for i in range(len(tokens))])
    built.normalizer = normalizers.Replace(" ", "▁")
    built.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return built


def _sentencepiece(fields: Json, tokens: list[str], scores: list[float]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, models

    unknown = token_id(fields, "unknown")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return Tokenizer(models.BPE(
        vocabulary, merges_by_score(tokens, scores), fuse_unk=True, byte_fallback=True,
        unk_token=None if unknown is None else tokens[unknown]))


def merges_by_score(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """The merges that a SentencePiece vocabulary implies, best first.

    SentencePiece joins the neighbours whose joint token has the highest score. So every way of
    cutting a token into two tokens is a merge with the token's score; merges of the same token are
    in the order of the ids of their parts.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    found = []
    for token, score in zip(tokens, scores, strict=True):
        cuts = [(ids[left], ids[right]) for cut in range(1, len(token))
                if (left := token[:cut]) in ids and (right := token[cut:]) in ids]
        found += [(-score, pair) for pair in sorted(cuts)]
    found.sort(key=lambda entry: entry[0])
    return [(tokens[left], tokens[right]) for _, (left, right) in found]


def _add_whole_tokens(built: tokenizers.Tokenizer, tokens: list[str], fields: Json) -> None:
    """Control tokens are special, user-defined ones are matched whole."""
    from tokenizers import AddedToken

    kinds = fields.get("tokenizer.ggml.token_type") or [0] * len(tokens)
    kinds = [CONTROL if token in TURN_ENDS else kind
             for token, kind in zip(tokens, kinds, strict=False)]
    of_kind = {kind: [AddedToken(token, special=kind == CONTROL, normalized=False)
                      for token, found in zip(tokens, kinds, strict=False)
                      if found == kind and built.token_to_id(token) is not None]
               for kind in (CONTROL, USER_DEFINED)}
    built.add_special_tokens(of_kind[CONTROL])
    built.add_tokens(of_kind[USER_DEFINED])


def _add_ends(
    built: tokenizers.Tokenizer, fields: Json, begin: str | None, end: str | None
) -> None:
    """Adds the begin and end tokens that the file asks for around every text."""
    from tokenizers import processors

    implied = (fields.get("tokenizer.ggml.model") == "llama"
               or fields.get("tokenizer.ggml.pre") in _LLAMA3_LIKE)
    first = begin if fields.get("tokenizer.ggml.add_bos_token", implied) else None
    last = end if fields.get("tokenizer.ggml.add_eos_token", False) else None
    around = [token for token in (first, last) if token is not None]
    if around:
        one = [*([first] if first else []), "$A", *([last] if last else [])]
        two = [*one, *(f"{piece}:1" for piece in (p if p != "$A" else "$B" for p in one))]
        built.post_processor = processors.TemplateProcessing(
            single=one, pair=two,
            special_tokens=[(token, built.token_to_id(token)) for token in dict.fromkeys(around)])


def _token(fields: Json, tokens: list[str], key: str) -> str | None:
    """The text of the token that has a role."""
    found = token_id(fields, key)
    if found is None:
        return None
    if not 0 <= found < len(tokens):
        raise BadInput(f"tokenizer.ggml.{key}_token_id is {found}, the vocabulary has "
                       f"{len(tokens)} tokens")
    return tokens[found]
