"""Text -> tokens -> deterministic batches. Knows nothing of models."""

from rabit_jax.data.embedded import embedded_documents
from rabit_jax.data.sources import DataConfig, documents, unseen_documents
from rabit_jax.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from rabit_jax.data.tokens import TokenText, batch, tokenise, windows

__all__ = [
    "DataConfig",
    "TokenText",
    "batch",
    "documents",
    "embedded_documents",
    "load_tokenizer",
    "save_tokenizer",
    "tokenise",
    "train_tokenizer",
    "unseen_documents",
    "windows",
]
