"""From text to deterministic batches of tokens; models play no part here."""

from rabit_jax.data.embedded import embedded_documents
from rabit_jax.data.mix import Part
from rabit_jax.data.readers import NAMED, file_documents, hub_documents, named_text
from rabit_jax.data.sources import DataConfig, documents, unseen_documents
from rabit_jax.data.tokenizer import train_tokenizer
from rabit_jax.data.tokens import TokenText, batch, tokenise, windows

__all__ = [
    "NAMED",
    "DataConfig",
    "Part",
    "TokenText",
    "batch",
    "documents",
    "embedded_documents",
    "file_documents",
    "hub_documents",
    "named_text",
    "tokenise",
    "train_tokenizer",
    "unseen_documents",
    "windows",
]
