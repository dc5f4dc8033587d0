"""A tokenizer as the metadata of a GGUF file: the inverse of `gguf_tokenizer.read_tokenizer`.

GGUF names how text is cut before the merges instead of holding the pattern, and says of the merges
of SentencePiece the scores alone. Whether a tokenizer is of such a form is not guessed: what is
written is read back, and both must make the same tokens of texts that tell the known forms apart.
"""

from __future__ import annotations

import json

from rabit_jax.errors import BadInput
from rabit_jax.formats.gguf_tokenizer import CONTROL, USER_DEFINED, read_tokenizer
from rabit_jax.formats.tokenizer import begins_with, encode
from rabit_jax.types import Json, Tokenizer

NORMAL, UNUSED, BYTE = 1, 5, 6  # further kinds of tokens in tokenizer.ggml.token_type
# One name for each way of cutting text that `gguf_tokenizer.PATTERNS` knows.
CUTS = ("smollm", "gpt-2", "llama-bpe", "qwen2")
PROBES = (
    "Hello world", " a leading blank", "  two blanks and   three\ttab", "one\n\ntwo\r\n \n",
    "3.14 + 7,000,000 = 12345", "naïve café “quotes” ﬁ e\u0301", "🙂🚀\U0001f468\u200d\U0001f469",
    "def f(x):\n    return x**2\n", "日本語 中文 한국어", "don't I'll we've THE'S", "", " ",
    "a\u00a0b", "<h1>Title</h1>   \n\n\n\n", "Привет, мир! שלום 你好",
    "snake_case HTTPServer v1.2.3-rc4 https://a.b/c?d=e&f=%20",
)


def tokenizer_fields(
    tokenizer: Tokenizer | None, vocab_size: int, architecture: str, end_ids: tuple[int, ...]
) -> Json:
    """The `tokenizer.*` metadata of a tokenizer.

    Args:
      tokenizer: of transformers.
      vocab_size: rows of the model's table; ids that the tokenizer has no token for are unused.
      architecture: `general.architecture` of the file.
      end_ids: ids that end a text, at most 3: end of text, of a turn, of a message.

    Raises:
      BadInput: no tokenizer, one of a kind that GGUF does not describe (the message begins with
        `unsupported`), or more end tokens than it has names for.
    """
    if tokenizer is None:
        raise BadInput("the model folder has no tokenizer, and a GGUF file wants one: add the "
                       "tokenizer.json of the model")
    if len(end_ids) > 3:
        raise BadInput(f"the model has the end tokens {list(end_ids)}, and GGUF has names for 3")
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    if raw["model"]["type"] != "BPE":
        raise BadInput(f"unsupported tokenizer model {raw['model']['type']}, a GGUF file of these "
                       "models holds BPE")
    tokens, kinds = _tokens(tokenizer, vocab_size)
    fields: Json = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    fields |= _named_ids(tokenizer, end_ids)
    fields |= _templates(tokenizer)
    if raw["model"].get("byte_fallback"):
        fields |= _scores(raw, tokens, architecture)
        tried = [fields]
    else:
        merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
        fields |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": merges}
        tried = [{**fields, "tokenizer.ggml.pre": cut} for cut in CUTS]
    return _first_equal(tokenizer, tried, architecture)


def _templates(tokenizer: Tokenizer) -> Json:
    """The chat template, and those of other names, which a tokenizer may have besides."""
    found = tokenizer.chat_template or {}
    found = {"default": found} if isinstance(found, str) else dict(found)
    default = found.pop("default", None)
    fields: Json = {f"tokenizer.chat_template.{name}": text for name, text in found.items()}
    if found:
        fields["tokenizer.chat_templates"] = list(found)
    return fields | ({"tokenizer.chat_template": default} if default else {})


def _tokens(tokenizer: Tokenizer, vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and kind of each id."""
    tokens = [f"<unused id {i}>" for i in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for token, i in tokenizer.get_vocab().items():
        if i < vocab_size:  # a token beyond the table is one that the model never meets
            tokens[i], kinds[i] = token, NORMAL
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                kinds[i] = BYTE
    for i, added in tokenizer.added_tokens_decoder.items():
        if i < vocab_size:
            tokens[i], kinds[i] = added.content, CONTROL if added.special else USER_DEFINED
    return tokens, kinds


def _named_ids(tokenizer: Tokenizer, end_ids: tuple[int, ...]) -> Json:
    """The ids of special tokens by role, and which of them are put around a text."""
    roles = {"bos": tokenizer.bos_token_id, "unknown": tokenizer.unk_token_id,
             "padding": tokenizer.pad_token_id,
             "eos": end_ids[0] if end_ids else tokenizer.eos_token_id,
             **dict(zip(("eot", "eom"), end_ids[1:], strict=False))}
    fields: Json = {f"tokenizer.ggml.{role}_token_id": i for role, i in roles.items()
                    if i is not None}
    before = begins_with(tokenizer)
    (bare,), (whole,) = (encode(tokenizer, ["a"], special) for special in (False, True))
    fields["tokenizer.ggml.add_bos_token"] = bool(before)
    fields["tokenizer.ggml.add_eos_token"] = len(whole) > len(before) + len(bare)
    return fields


def _scores(raw: Json, tokens: list[str], architecture: str) -> Json:
    """The metadata of SentencePiece: a token's score falls with the place of its first merge, for
    Gemma with its id."""
    ranks: dict[str, int] = {}
    for place, merge in enumerate(raw["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, place)
    by_id = architecture.startswith("gemma")
    never = len(raw["model"]["merges"])
    scores = [-float(i if by_id else ranks.get(token, never)) for i, token in enumerate(tokens)]
    prefix = (raw.get("pre_tokenizer") or {}).get("prepend_scheme", "never") != "never" or (
        '"Prepend"' in json.dumps(raw.get("normalizer")))
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": scores, "tokenizer.ggml.add_space_prefix": prefix}


def _first_equal(tokenizer: Tokenizer, tried: list[Json], architecture: str) -> Json:
    """The first metadata that are read as a tokenizer of the same tokens."""
    used = [t for t in (tokenizer.bos_token, tokenizer.eos_token) if t]
    texts = [*PROBES, *(f"{token}a {token}\nb{token}" for token in used)]
    wanted = encode(tokenizer, texts, special=True)
    differs = ""
    for fields in tried:
        found = encode(read_tokenizer(fields, architecture), texts, special=True)
        if found == wanted:
            return fields
        differs = next(t for t, a, b in zip(texts, found, wanted, strict=True) if a != b)
    raise BadInput(f"unsupported tokenizer: none that GGUF has a name for ({', '.join(CUTS)}, "
                   f"SentencePiece) makes its tokens of {differs!r}")
