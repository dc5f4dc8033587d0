"""Two pretrained models (`make models`) against transformers on PyTorch."""

from pathlib import Path

import jax
import numpy as np
import pytest

from rabit_jax import load_hf
from rabit_jax.experiments.fetch_models import FOLDER, MODELS
from rabit_jax.models.generation import generate

pytestmark = pytest.mark.more

ROOT = Path(__file__).parents[2]
TEXTS = (
    "The capital of France is Paris. In 1999, 3+4=7.", "  two spaces and   three\ttab",
    "one\n\ntwo\r\n", "naïve café “quotes” ﬁ e\u0301", "🙂🚀👨‍👩‍👧", "日本語 中文",
    "def f(x):\n    return x**2  # ok\n", "<|im_start|>user\nhi<|im_end|>\n",
    "<start_of_turn>user\nhi<end_of_turn>\n", "don't I'll we've THE'S", "", " ", "a\u00a0b\x00",
    "<h1>Title</h1>   \n\n\n\n", "1234567890 3.14159",
)


@pytest.fixture(scope="module", params=MODELS)
def loaded(request, tmp_path_factory):
    path = ROOT / FOLDER / MODELS[request.param].file
    if not path.exists():
        pytest.skip(f"{path} is missing: `make models` downloads it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield path, *load_hf(path)


def test_logits_and_tokens_are_those_of_transformers(loaded):
    torch = pytest.importorskip("torch", reason="the reference runs on PyTorch")
    transformers = pytest.importorskip("transformers")
    path, model, params, tokenizer = loaded
    theirs = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == theirs(text)["input_ids"], text
    tokens = tokenizer(TEXTS[0], return_tensors="np")["input_ids"]
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        wanted = reference(torch.tensor(tokens)).logits.numpy()
    found = np.asarray(jax.jit(model.apply)({"params": params}, tokens))
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_the_model_knows_the_capital_of_france_and_stops(loaded):
    path, model, params, tokenizer = loaded
    if tokenizer.chat_template is None:
        prompt = tokenizer("The capital of France is", return_tensors="np")["input_ids"]
    else:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is the capital of France? One sentence."}],
            add_generation_prompt=True, return_tensors="np", return_dict=True)["input_ids"]
    new = generate(model, params, prompt, max_new_tokens=24, eos_ids=model.config.eos_ids)
    text = tokenizer.decode(np.asarray(new)[0])
    assert "Paris" in text
    if tokenizer.chat_template is not None:
        assert any(tokenizer.decode([i]) in text for i in model.config.eos_ids)
