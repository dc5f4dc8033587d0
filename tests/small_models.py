"""Small decoders, as params and as folders, that tests of several packages share."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from rabit_jax import LLAMA_LINEARS
from rabit_jax.formats.hf import save_hf
from rabit_jax.formats.packed_model import save_packed
from rabit_jax.kernels.layout import from_stored, stored_bytes
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import Decoder, init_params, param_shapes
from rabit_jax.weights.sign_paths import PackedSign

TINY = ModelConfig(
    vocab_size=61, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=12, d_hidden=40,
    initializer_range=0.3, bos_id=1, eos_ids=(2,), max_position=48,
)


@pytest.fixture
def config():
    return TINY


@pytest.fixture(scope="session")
def model():
    return Decoder(TINY)


@pytest.fixture(scope="session")
def params():
    return jax.jit(init_params, static_argnums=0)(TINY, jax.random.key(0))


@pytest.fixture
def folder(tmp_path, model, params):
    """The tiny decoder as a Hugging Face folder."""
    save_hf(tmp_path / "model", model, params)
    return tmp_path / "model"


@pytest.fixture(scope="session")
def apply():
    """`apply(model, params, tokens, mask, hidden_states)`, compiled once for each of its kinds."""
    def run(model, params, tokens, mask=None, hidden_states=False):
        return model.apply({"params": params}, tokens, mask, hidden_states)

    return jax.jit(run, static_argnums=(0, 4))


@pytest.fixture(scope="session")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 9), 0, TINY.vocab_size)


# Inputs of 40 and 300: padded to one block and to two.
SMALL = ModelConfig(
    vocab_size=61, d_model=40, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=10, d_hidden=300,
    attention_bias=True, o_bias=True, bos_id=1, eos_ids=(2, 5), max_position=48,
)
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


def _random(config):
    """Random float32 params by path; NumPy, for nothing is compiled that way."""
    rng = np.random.default_rng(0)
    return {path: jnp.asarray(rng.normal(size=shape), jnp.float32)
            for path, shape in param_shapes(config).items()}


def _packed(config, k=2, keep=()):
    """Random params whose linears are packed, but for those in `keep`; the rest is float16."""
    rng = np.random.default_rng(1)

    def leaf(path, value):
        module, name = path.split("/")[-2:]
        if module not in LINEARS or name == "bias" or module in keep:
            return value.astype(jnp.float16)
        l, i, o = value.shape
        bits = from_stored(rng.integers(0, 256, (l, k, o, stored_bytes(i)), np.uint8), i)
        g, h = (rng.uniform(0.2, 0.6, (l, k, n)).astype(np.float16) for n in (o, i))
        limbs = 3 if module == "down" else None
        return PackedSign(jnp.asarray(bits), jnp.asarray(g), jnp.asarray(h), limbs)

    flat = {path: leaf(path, value) for path, value in _random(config).items()}
    return unflatten_dict(flat, sep="/")


@pytest.fixture(scope="session")
def small():
    """A config of two layers whose widths need padding."""
    return SMALL


@pytest.fixture(scope="session")
def random_params():
    """`random_params(config)` -> params by path."""
    return _random


@pytest.fixture(scope="session")
def random_packed():
    """`random_packed(config, k, keep)` -> a params tree with packed linears."""
    return _packed


@pytest.fixture(scope="session")
def words():
    """`words("a", "b")` -> a plain tokenizer of these words, the last one for unknown ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    def make(*vocabulary):
        ids = {word: n for n, word in enumerate(vocabulary)}
        plain = Tokenizer(models.WordLevel(ids, unk_token=vocabulary[-1]))
        plain.pre_tokenizer = pre_tokenizers.Whitespace()
        return plain

    return make


# A chat template that refuses one message, and writes each other as "[role] content".
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'forbidden' %}{{ raise_exception('not so') }}"
    "{% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def save_random_folders(root, config, tokenizer):
    """Writes `root/dense` and `root/packed`, a random model and one of one random sign path."""
    rng = np.random.default_rng(3)
    dense = {path: jnp.asarray(rng.normal(size=shape), jnp.float32)
             for path, shape in param_shapes(config).items()}
    packed = dict(dense)
    for path, value in dense.items():
        if re.fullmatch(LLAMA_LINEARS, path):
            l, i, o = value.shape
            bits = jnp.asarray(rng.integers(0, 256, (l, 1, o, 32), np.uint8))
            g, h = (jnp.full((l, 1, n), 0.7, jnp.float16) for n in (o, i))
            packed[path] = PackedSign(bits, g, h)
    save_hf(root / "dense", config, unflatten_dict(dense, sep="/"), tokenizer)
    save_packed(root / "packed", config, unflatten_dict(packed, sep="/"), tokenizer)
