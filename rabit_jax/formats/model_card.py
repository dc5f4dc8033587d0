"""Model cards: the README.md of a model folder, with the front matter that the hub reads."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rabit_jax.formats.families import HF_MODULES
from rabit_jax.formats.gptq import Layout
from rabit_jax.formats.hub import ID
from rabit_jax.formats.rendering import environment

CARD = "README.md"
Score = tuple[str, str, str, int]  # model, perplexity, bits per byte, context
_UNKNOWN_LICENCE = "not known here; where there is a base model, that one's applies"
_TAGS = ["rabit", "residual-binarisation"]
# What may be a path inside of a longer text: anything between blanks, quotes, brackets and "=".
_WORD = re.compile(r"[^\s=,'\"`()\[\]{}]+")
# In quotes a path may have blanks.
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_PHRASE = re.compile(r"[^=,'\"`()\[\]{}]+")
_LOCAL = re.compile(r"(file:(//)?)?(~?/|~\w+/|\.\.?/|[A-Za-z]:[\\/])")


def packed_card(
    name: str, bits: float, stored_bits: float, base: str | None = None,
    licence: str | None = None, scores: Sequence[Score] = (),
    facts: Mapping[str, str] | None = None, whole_bits: float | None = None,
    kept: str = "embedding, norms, head",
) -> str:
    """The card of a packed model. Of local paths, here and in `facts`, it gives the last part.

    Args:
      name: of the model, a title.
      bits: nominal bits per weight of the packed linears.
      stored_bits: the same with the padding of the file.
      base: the model that was quantised; a hub id is named in the front matter.
      licence: its licence as the hub spells it, None where it is not known.
      scores: rows of model, perplexity, bits per byte and context.
      whole_bits: bits per weight of the whole model, embedding and head included.
      facts: more lines of Markdown, such as the data, the tokens and the command.
      kept: what is not quantised, see `kept_parts`.

    Returns:
      Markdown.

    Example:
      >>> text = packed_card("mine", 2.19, 2.25, base="org/teacher", licence="apache-2.0")
    """
    return _render(
        "packed_card", front=_front(base, licence, "rabit_jax", [*_TAGS, "quantized"]), name=name,
        bits=bits, stored_bits=stored_bits, whole_bits=whole_bits, kept=kept,
        base=_model_name(base) if base else None,
        licence=licence or _UNKNOWN_LICENCE, scores=scores,
        facts={fact: without_local_paths(text) for fact, text in (facts or {}).items()},
    )


def kept_parts(modules: Iterable[str], tied_head: bool) -> str:
    """What a packed model keeps in 16 bits besides its blocks, for its card.

    Args:
      modules: the packed modules by Hugging Face's names.
      tied_head: whether the head is the embedding.

    >>> kept_parts(["model.embed_tokens"], tied_head=True)
    'norms'
    """
    packed = set(modules)
    embedding, head = (HF_MODULES[name] in packed for name in ("embed", "head"))
    parts = {"embedding": embedding, "norms": False, "head": embedding if tied_head else head}
    return ", ".join(part for part, is_packed in parts.items() if not is_packed)


def dense_card(name: str, source: str, dtype: str, base: str | None, licence: str | None) -> str:
    """The card of a dense export of the model `source`, stored in `dtype`; see `packed_card`."""
    return _render(
        "dense_card", front=_front(base, licence, "transformers", _TAGS), name=name,
        source=_model_name(source), dtype=dtype, licence=licence or _UNKNOWN_LICENCE,
    )


def gptq_card(
    name: str, source: str, layout: Layout, dtype: str, base: str | None, licence: str | None,
) -> str:
    """The card of an export of the model `source` in GPTQ's layout; see `packed_card`."""
    return _render(
        "gptq_card", front=_front(base, licence, "transformers", [*_TAGS, "gptq", "quantized"]),
        name=name, source=_model_name(source), bits=layout.bits, group=layout.group, dtype=dtype,
        vllm=layout.in_vllm(), licence=licence or _UNKNOWN_LICENCE,
    )


def base_and_licence(folder: Path) -> tuple[str | None, str | None]:
    """The base model and the licence in the front matter of a folder's card, None where absent.

    A card that is missing, or whose front matter cannot be read, names neither.
    """
    import yaml
    from huggingface_hub import ModelCard

    try:
        data = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError):
        return None, None
    base, licence = data.get("base_model"), data.get("license")
    return (base if isinstance(base, str) else None), licence


def without_local_paths(text: str) -> str:
    """The text with each path of this machine shortened to its last part; hub ids stay.

    >>> without_local_paths("--config /home/me/my.yaml teacher.path=org/name")
    '--config my.yaml teacher.path=org/name'
    """
    text = _QUOTED.sub(lambda quoted: _shortened(_PHRASE, quoted[0]), text)
    return _shortened(_WORD, text)


def _shortened(pieces: re.Pattern[str], text: str) -> str:
    return pieces.sub(lambda one: _last_part(one[0]) if _is_local(one[0]) else one[0], text)


def _render(template: str, **values: object) -> str:
    folder = Path(__file__).with_name("templates")
    return environment(folder).get_template(f"{template}.md.j2").render(values)


def _front(base: str | None, licence: str | None, library: str, tags: list[str]) -> str:
    from huggingface_hub import ModelCardData

    hub = base if base and "/" in base and _is_hub_id(base) else None
    licence = licence and " ".join(licence.split())  # a line "---" would end the front matter
    data = ModelCardData(
        base_model=hub, base_model_relation="quantized" if hub else None, library_name=library,
        license=licence, pipeline_tag="text-generation", tags=[*tags, "jax"])
    return data.to_yaml()


def _is_hub_id(name: str) -> bool:
    return bool(ID.fullmatch(name)) and not Path(name).exists()


def _model_name(name: str) -> str:
    return name if _is_hub_id(name) else _last_part(name)


def _is_local(word: str) -> bool:
    """Whether a word is a path: one that begins like it, or that matches a file from here."""
    if _LOCAL.match(word.strip()):
        return True
    return "/" in word and "\0" not in word and next(glob.iglob(word), None) is not None


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", os.path.abspath(path.strip()))[-1] or path
