"""Model cards: the README.md of a model folder, with the front matter that the hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rabit_jax.formats.hub import ID

CARD = "README.md"
# What a card's reader puts in place of FOLDER: a folder or a hub id.
_PACKED = """\
from rabit_jax.models import generate, load_packed
model, params, tokenizer = load_packed("FOLDER")
prompt = tokenizer(["The list"], return_tensors="np")["input_ids"]
new = generate(model, params, prompt, max_new_tokens=32, eos_ids=model.config.eos_ids)
print(tokenizer.decode(new[0]))"""
_DENSE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")"""


def packed_card(
    name: str, bits: float, stored_bits: float, base: str | None = None,
    licence: str | None = None, scores: Sequence[Sequence[Any]] = (),
    facts: Mapping[str, Any] | None = None,
) -> str:
    """The card of a packed model.

    Args:
      name: of the model, a title.
      bits: nominal bits per weight of the packed linears.
      stored_bits: the same with the padding of the file.
      base: the model that was quantised; a hub id is named in the front matter.
      licence: its licence as the hub spells it, None where it is not known.
      scores: rows of model, perplexity, bits per byte and context.
      facts: more lines, such as the data, the tokens and the command.

    Returns:
      Markdown.

    Example:
      >>> text = packed_card("mine", 2.19, 2.25, base="org/teacher", licence="apache-2.0")
    """
    of = f" of {base}" if base else ""
    head = (f"Residual binarisation{of}: each packed linear layer is a sum of sign matrices with "
            "row and column scales, `W_hat = sum_i diag(h_i) B_i diag(g_i)`, or the representation "
            "that `quantization_config` in config.json names.")
    lines = {
        "bits per weight of the packed linears": f"{bits:.4g}",
        "the same as stored, with padding": f"{stored_bits:.4g}",
        "embedding, norms, head": "16 bits, not quantised",
        **(facts or {}),
    }
    front = _front(base, licence, "rabit_jax", ["rabit", "residual-binarisation", "quantized"])
    return "\n\n".join([front, f"# {name}", head, _list(lines, licence), *_scores(scores),
                        *_load(_PACKED)]) + "\n"


def dense_card(name: str, source: str, dtype: str, base: str | None, licence: str | None) -> str:
    """The card of a dense export of `source`; see `packed_card`."""
    head = (f"The dense form of {source}: every weight is stored as the matrix that the quantised "
            f"model multiplies by, in {dtype}. It takes the room of an unquantised model and is "
            "there for programs that read dense folders.")
    front = _front(base, licence, "transformers", ["rabit", "residual-binarisation"])
    return "\n\n".join([front, f"# {name}", head, _list({}, licence), *_load(_DENSE)]) + "\n"


def base_and_licence(folder: Path) -> tuple[str | None, str | None]:
    """What the front matter of a folder's card names as base model and licence, None for neither.

    A card whose front matter cannot be read counts as one that says nothing.
    """
    import yaml
    from huggingface_hub import ModelCard

    try:
        data = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError):  # none there, or a text that is no card
        return None, None
    base = data.base_model
    return (base if isinstance(base, str) else None), data.license


def _front(base: str | None, licence: str | None, library: str, tags: list[str]) -> str:
    from huggingface_hub import ModelCardData

    hub = base if base and "/" in base and ID.fullmatch(base) and not Path(base).exists() else None
    data = ModelCardData(
        base_model=hub, base_model_relation="quantized" if hub else None, library_name=library,
        license=licence, pipeline_tag="text-generation", tags=[*tags, "jax"])
    return f"---\n{data.to_yaml()}\n---"


def _load(code: str) -> list[str]:
    return ["## Load", "`FOLDER` is a folder or a hub id.", f"```python\n{code}\n```"]


def _list(lines: Mapping[str, Any], licence: str | None) -> str:
    told = licence or "not known here; where there is a base model, that one's applies"
    return "\n".join(f"* {name}: {value}" for name, value in {**lines, "licence": told}.items())


def _scores(rows: Sequence[Sequence[Any]]) -> list[str]:
    if not rows:
        return []
    head = "| model | perplexity | bits per byte | context |\n|---|---|---|---|"
    return ["\n".join([head, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])]
