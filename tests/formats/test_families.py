"""Every model family against transformers on PyTorch, on tiny random models with all it has."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.formats.hf import load_hf, save_hf
from rabit_jax.formats.hf_config import from_hf, to_hf
from rabit_jax.models.generation import generate

torch = pytest.importorskip("torch", reason="the reference runs on PyTorch")
transformers = pytest.importorskip("transformers", reason="the reference is transformers")

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.3, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
}
ROPE3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 10, "sliding_window": 4}
LOCAL_GLOBAL = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e3},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
# Of each family what no other case of it has; windows are shorter than the text.
CASES = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3.2": ("llama", {"rope_parameters": ROPE3, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 4, "head_dim": 12}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 3,
                                "max_window_layers": 2, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3-biases": ("qwen3", {"head_dim": 12, "attention_bias": True, "layer_types": MIXED,
                               "use_sliding_window": True, "sliding_window": 3}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2-biases": ("gemma2", {**GEMMA, "attention_bias": True, "layer_types": MIXED,
                                 "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("gemma3_text", {**GEMMA, "rope_parameters": LOCAL_GLOBAL, "layer_types": MIXED}),
    "gemma3-caps": ("gemma3_text", {**GEMMA, "sliding_window_pattern": 3,
                                    "final_logit_softcapping": 3.0}),
}
# One of each family: text and folders, which cost a compilation of their own.
WHOLE = ["llama3.2", "mistral", "qwen2-windows", "qwen3", "gemma2", "gemma3"]


def _reference(name):
    family, settings = CASES[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():  # biases start at 0 and norms at 1 or 0, which would hide them
        for path, p in model.named_parameters():
            if path.endswith("bias") or "norm" in path:
                p.add_(0.2 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """`given(case)`: transformers' model, and ours as read from its folder."""
    made = {}

    def find(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            reference = _reference(name)
            reference.save_pretrained(folder)
            made[name] = (reference, *load_hf(folder)[:2], folder)
        return made[name]

    return find


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(3).integers(0, 61, (2, 11))


def _logits(reference, tokens, mask=None):
    mask = None if mask is None else torch.tensor(mask)
    with torch.no_grad():
        return reference(torch.tensor(tokens), attention_mask=mask).logits.numpy()


@pytest.mark.parametrize("name", CASES)
def test_logits_match(name, given, tokens, apply):
    reference, model, params, _ = given(name)
    wanted = _logits(reference, tokens)
    assert np.abs(wanted).max() > 1
    assert np.abs(np.asarray(apply(model, params, tokens)) - wanted).max() < 1e-4


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_padding_on_the_left(name, given, tokens, apply):
    reference, model, params, _ = given(name)
    mask = np.ones(tokens.shape, np.int64)
    mask[1, :3] = 0
    wanted = _logits(reference, tokens, mask)
    found = np.asarray(apply(model, params, tokens, jnp.asarray(mask, bool)))
    assert np.abs(found - wanted)[mask > 0].max() < 1e-4


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.more) for name in WHOLE[:-1]), WHOLE[-1]])
def test_greedy_text_is_the_same_until_two_tokens_tie(name, given, tokens):
    """Past the window, so that the cache of local layers is read beyond it."""
    reference, model, params, _ = given(name)
    wanted = reference.generate(torch.tensor(tokens), max_new_tokens=32, do_sample=False,
                                pad_token_id=0)[:, tokens.shape[1]:].numpy()
    found = np.asarray(generate(model, params, tokens, max_new_tokens=32))
    for row in range(len(tokens)):
        part = np.flatnonzero(found[row] != wanted[row])
        if not len(part):
            continue
        before = np.concatenate([tokens[row], wanted[row, : part[0]]])[None]
        top = np.sort(_logits(reference, before)[0, -1])[-2:]
        assert top[1] - top[0] < 1e-4, (name, row, part[0])


@pytest.mark.parametrize("name", WHOLE)
def test_transformers_reads_what_we_write(name, given, tokens, tmp_path):
    reference, model, params, _ = given(name)
    save_hf(tmp_path / "m", model, params)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", output_loading_info=True, attn_implementation="eager")
    assert type(again) is type(reference)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert np.abs(_logits(again, tokens) - _logits(reference, tokens)).max() < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_config_survives_the_way_out_and_back(name, given):
    config = given(name)[1].config
    assert from_hf(to_hf(config)) == config
    written = json.loads(json.dumps(to_hf(config)))
    assert from_hf(written) == config
    # What a program on transformers 4 reads: it knows neither of these fields.
    older = {k: v for k, v in written.items() if k not in ("rope_parameters", "dtype")}
    assert from_hf(older) == config


@pytest.mark.parametrize("family", sorted({family for family, _ in CASES.values()}))
def test_fields_left_out_mean_what_transformers_means(family):
    sizes = {**{k: v for k, v in SIZES.items() if k not in ("num_key_value_heads",
             "max_position_embeddings", "initializer_range")}, "hidden_size": 64,
             "num_attention_heads": 32}
    sparse = {"model_type": family, **sizes}
    full = transformers.AutoConfig.for_model(family, **sizes).to_dict()
    if family.startswith("qwen"):
        assert full["sliding_window"] is None
    found, wanted = from_hf(sparse), from_hf(full)
    assert dataclasses.replace(found, dtype="float32") == wanted


def test_the_language_model_of_a_multimodal_gemma(tokens, tmp_path, apply):
    """Tensors of the vision tower are left out, the prefix of the language model is taken off."""
    torch.manual_seed(0)
    text = {**SIZES, **GEMMA, "num_hidden_layers": 2, "rope_parameters": LOCAL_GLOBAL,
            "layer_types": MIXED[:2], "model_type": "gemma3_text"}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision,
                                       mm_tokens_per_image=4, eos_token_id=[1, 5])
    reference = transformers.Gemma3ForConditionalGeneration._from_config(
        config, attn_implementation="eager").eval()
    reference.save_pretrained(tmp_path)
    model, params, _ = load_hf(tmp_path)
    with torch.no_grad():
        wanted = reference(torch.tensor(tokens)).logits.numpy()
    assert np.abs(np.asarray(apply(model, params, tokens)) - wanted).max() < 1e-4


@pytest.mark.more
def test_packed_gemma_decodes_like_its_full_forward(given, tokens, apply):
    """Windows, caps, both norms and a layer of each kind through the packed engine."""
    from rabit_jax import LLAMA_LINEARS, ResidualSignSpec, convert, pack

    _, model, params, _ = given("gemma2")
    packed = pack(convert(params, [(LLAMA_LINEARS, ResidualSignSpec(k=2))]))
    found = np.asarray(generate(model, packed, tokens, max_new_tokens=8))
    whole = np.concatenate([tokens, found], axis=1)
    logits = np.asarray(apply(model, packed, whole))[:, tokens.shape[1] - 1 : -1]
    best = np.take_along_axis(logits, found[..., None], axis=-1)[..., 0]
    assert (logits.max(axis=-1) - best < 2e-2).all()


@pytest.mark.more
def test_every_parameter_of_a_family_reaches_the_logits(given, tokens):
    """A gradient of exactly zero would mean a parameter that nothing reads."""
    for name in ("qwen3-biases", "gemma3"):
        _, model, params, _ = given(name)

        def loss(p, model=model):
            return jnp.sum(jnp.sin(model.apply({"params": p}, jnp.asarray(tokens))))

        for path, grad in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
            layers = grad if str(path[0].key) == "layers" else grad[None]
            assert (np.abs(layers).reshape(len(layers), -1).max(axis=1) > 0).all(), path
