"""Text -> tokens -> deterministic batches. Knows nothing of models."""

from rabit_jax.data.embedded import embedded_documents
from rabit_jax.data.mix import Part
from rabit_jax.data.named import NAMED, named_text
from rabit_jax.data.sources import DataConfig, documents, mixed, unseen_documents
from rabit_jax.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from rabit_jax.data.tokens import TokenText, batch, tokenise, tokenise_stream, windows

__all__ = [
    "NAMED",
    "DataConfig",
    "Part",
    "TokenText",
    "batch",
    "documents",
    "embedded_documents",
    "load_tokenizer",
    "mixed",
    "named_text",
    "save_tokenizer",
    "tokenise",
    "tokenise_stream",
    "train_tokenizer",
    "unseen_documents",
    "windows",
]
