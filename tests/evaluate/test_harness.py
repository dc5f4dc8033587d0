"""The harness adapter against the harness's own Hugging Face model, on the same weights."""

import copy
import dataclasses
import json
import random
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from rabit_jax.data.tokenizer import train_tokenizer
from rabit_jax.errors import BadInput
from rabit_jax.evaluate import batched_generation
from rabit_jax.evaluate.batched_generation import BatchGenerator, Settings, settings_of
from rabit_jax.evaluate.harness import HarnessModel
from rabit_jax.formats.hf import load_hf, save_hf
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import Decoder, param_shapes
from rabit_jax.train.sharding import AXES

pytest.importorskip("lm_eval", reason="the adapter is for lm-evaluation-harness")

CONFIG = ModelConfig(
    vocab_size=300, d_model=32, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, d_hidden=48,
    bos_id=0, eos_ids=(0,), max_position=96,
)
WORDS = "the cat dog sat ran on under a mat log and or then house red blue".split()


def sentence(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model folder and three tasks with their data."""
    root, rng = tmp_path_factory.mktemp("harness"), random.Random(0)
    tokenizer = train_tokenizer([sentence(rng, 40) for _ in range(40)], 300)
    draw = np.random.default_rng(3)
    flat = {path: draw.normal(size=shape).astype(np.float32) * 0.5
            for path, shape in param_shapes(CONFIG).items()}
    # Words become likely, so that some answers are what the model itself would say.
    flat["head/kernel"][:, [tokenizer.encode(f" {word}")[0] for word in WORDS]] *= 3
    save_hf(root / "model", CONFIG, unflatten_dict(flat, sep="/"), tokenizer)
    documents = [
        {"question": sentence(rng, rng.choice([5, 9, 120])) + rng.choice(["", ".", " "]),
         # Some answers are one token, some share their beginning, some are long.
         "choices": [" dog", " the", " cat", " ran", " cat " + sentence(rng, 12)],
         "answer": n % 5, "text": sentence(rng, rng.choice([1, 20, 150]))}
        for n in range(11)
    ]
    data = root / "data.json"
    data.write_text("\n".join(map(json.dumps, documents)))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
              "test_split": "test", "metadata": {"version": 1}}
    write(root, {
        **common, "task": "tiny_choice", "output_type": "multiple_choice",
        "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
        "target_delimiter": "", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    })
    write(root, {
        **common, "task": "tiny_text", "output_type": "generate_until",
        "doc_to_text": "{{question}}", "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": [" the", "og"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    })
    write(root, {
        **common, "task": "tiny_rolling", "output_type": "loglikelihood_rolling",
        "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    })
    return root


def write(root, task):
    (root / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))


@pytest.fixture(scope="module")
def ours(place):
    return HarnessModel(*load_hf(place / "model"), batch_size=32)


@pytest.fixture(scope="module")
def evaluate(place):
    """`evaluate(model, *tasks) -> results with samples`, on the tasks of `place`."""
    import datasets
    from lm_eval.evaluator import evaluate as run
    from lm_eval.tasks import TaskManager

    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(place / "cache"))
    manager = TaskManager(include_path=str(place), include_defaults=False)

    def call(model, *tasks, limit=None):
        loaded = manager.load(list(tasks))
        for task in loaded["tasks"].values():
            task.set_config("num_fewshot", 0)
        return run(model, loaded, limit=limit, bootstrap_iters=0)

    yield call
    patch.undo()


def answers(results):
    return {name: [row["resps"] for row in rows] for name, rows in results["samples"].items()}


@pytest.mark.filterwarnings("ignore")
def test_scores_and_texts_are_those_of_the_harness_own_model(place, ours, evaluate):
    pytest.importorskip("torch", reason="the reference runs on PyTorch")
    from lm_eval.models.huggingface import HFLM

    reference = HFLM(pretrained=str(place / "model"), device="cpu", dtype="float32", batch_size=3)
    tasks = ("tiny_choice", "tiny_text", "tiny_rolling")
    wanted, found = (evaluate(model, *tasks) for model in (reference, ours))
    mine, theirs = answers(found), answers(wanted)
    assert mine["tiny_text"] == theirs["tiny_text"]
    assert len({text for ((text,),) in mine["tiny_text"]}) > 5
    np.testing.assert_allclose(
        np.ravel(mine["tiny_rolling"]), np.ravel(theirs["tiny_rolling"]), rtol=1e-5)
    pairs = [np.array(side["tiny_choice"], float)[:, :, 0] for side in (mine, theirs)]
    np.testing.assert_allclose(pairs[0][..., 0], pairs[1][..., 0], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(pairs[0][..., 1], pairs[1][..., 1])
    assert 0 < pairs[0][..., 1].sum() < pairs[0][..., 1].size
    for task in tasks:
        numbers = {k: v for k, v in wanted["results"][task].items() if isinstance(v, float)}
        assert numbers
        for name, value in numbers.items():
            assert found["results"][task][name] == pytest.approx(value, rel=1e-5)


def asked(*arguments):
    """A request as the harness makes it."""
    return SimpleNamespace(args=arguments)


PROMPTS = ["the cat", "a dog sat on the mat", "", "red " * 90, "under a log"]
GREEDY = {"until": [" the"], "max_gen_toks": 16}


@pytest.mark.more
@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_a_mesh_changes_nothing(place, ours, shape):
    mesh = Mesh(np.asarray(jax.devices()[:2]).reshape(shape), AXES)
    meshed = HarnessModel(*load_hf(place / "model"), batch_size=4, mesh=mesh)
    pairs = [asked(prompt, answer) for prompt in PROMPTS for answer in (" dog", " the cat")]
    scores = [model.loglikelihood(pairs) for model in (ours, meshed)]
    np.testing.assert_allclose(*scores, rtol=1e-5)
    written = [model.generate_until([asked(prompt, GREEDY) for prompt in PROMPTS])
               for model in (ours, meshed)]
    assert written[0] == written[1] and len(set(written[0])) > 2


@pytest.mark.more
def test_sampling_follows_the_seed(place, ours):
    hot = {"until": [], "max_gen_toks": 16, "do_sample": True, "temperature": 2.0}
    requests = [asked(prompt, hot) for prompt in PROMPTS[:2]]

    def texts(seed):
        return HarnessModel(
            ours.model, ours.params, ours.tokenizer, batch_size=2, seed=seed
        ).generate_until(requests)

    first = texts(1)
    assert first == texts(1) != texts(2)


def test_the_chat_template_is_the_tokenizers(place):
    lm = HarnessModel(*load_hf(place / "model"))
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a cat"}]
    with pytest.raises(BadInput, match="no chat template"):
        lm.apply_chat_template(history)
    lm.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none here') }}"
        "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert lm.apply_chat_template(history) == "<user>a cat<assistant>"
    assert lm.apply_chat_template(history[1:], add_generation_prompt=False) == "<user>a cat"
    assert "/" not in lm.tokenizer_name and lm.chat_template(True) == lm.tokenizer.chat_template


def test_generation_settings():
    def found(**given):
        return settings_of(given, 100)

    assert found(until=" the", max_gen_toks=9) == Settings((" the",), 9, 0.0, 1.0)
    assert found(max_new_tokens=9, until=["a", ""], do_sample=False, temperature=0.7,
                 top_p=0.9, top_k=5, num_beams=1) == Settings(("a",), 9, 0.0, 1.0)
    assert found(max_tokens=9, temperature=0.7, top_p=0.9) == Settings((), 9, 0.7, 0.9)
    for given, message in [
        ({}, "256 new tokens"), ({"max_gen_toks": 100}, "100 new tokens, wanted 1 to 99"),
        ({"max_gen_toks": 9, "num_beams": 4}, "num_beams to 4"),
        ({"max_gen_toks": 9, "temperature": 1, "top_k": 5}, "top_k to 5"),
        ({"max_gen_toks": 9, "do_sample": True}, "temperature 0.0"),
    ]:
        with pytest.raises(BadInput, match=message):
            found(**given)


def test_a_stop_string_that_is_a_special_token_ends_the_text(ours, monkeypatch):
    """Decoding leaves it out, so the text alone would go on behind it."""
    tokenizer = copy.deepcopy(ours.tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn|>"]})
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    cat, dog = (tokenizer.encode(word)[0] for word in (" cat", " dog"))
    rows = np.array([[cat, dog, turn, cat], [cat, 0, turn, dog], [dog, cat, dog, dog]])
    asked_for = []

    def stream(*arguments):
        asked_for.append(arguments[-1])
        yield from (rows[:, :1], rows[:, 1:])

    monkeypatch.setattr(batched_generation, "stream", stream)
    generator = BatchGenerator(ours.model, ours.params, (0,), None, 0)
    monkeypatch.setitem(vars(generator), "engines", [None])
    settings = Settings(("<|turn|>", "og dog"), 4, 0.0, 1.0)
    texts = generator.generate([[cat]] * 3, settings, tokenizer, 3)
    assert texts == [" cat dog", " cat", " dog cat d"] and asked_for == [(0, turn)]


def test_bad_input(ours):
    model, params, tokenizer = ours.model, ours.params, ours.tokenizer
    without = SimpleNamespace(eos_token_id=None)
    endless = Decoder(dataclasses.replace(model.config, eos_ids=()))
    for wrong, settings, message in [
        (None, {}, "no tokenizer"), (without, {}, "without an end-of-text token"),
        (tokenizer, {"max_length": 97}, "max_length is 97, wanted 2 to the model's 96"),
        (tokenizer, {"batch_size": 0}, "batch_size is 0"),
    ]:
        with pytest.raises(BadInput, match=message):
            HarnessModel(model if wrong is tokenizer else endless, params, wrong, **settings)
    assert HarnessModel(model, params, without).eot_token_id == 0  # the model names one
    with pytest.raises(BadInput, match="holds the token .* ends at 299"):
        wider = copy.copy(ours)
        wider.tokenizer = copy.deepcopy(tokenizer)
        wider.tokenizer.add_tokens(["<extra>"])
        wider.tok_encode("the <extra>")
    with pytest.raises(BadInput, match="0 to score"):
        ours.loglikelihood([asked("the cat", "")])
    with pytest.raises(BadInput, match="wanted at least 1 of both and at most 96"):
        ours.loglikelihood([asked("the cat", " the" * 97)])


def test_special_tokens_stay_before_the_text(place, ours):
    """A tokenizer that writes `<s> text </s>`: no end before a continuation, no begin twice."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(ours.tokenizer)
    begin, end = tokenizer.convert_ids_to_tokens([5, 7])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(begin, 5), (end, 7)])
    tokenizer.bos_token = begin
    wrapping = copy.copy(ours)
    wrapping.tokenizer = tokenizer
    bare = ours.tok_encode("the cat")
    assert tokenizer.encode("the cat") == [5, *bare, 7]
    assert wrapping.tok_encode("the cat") == [5, *bare]
    assert wrapping.tok_encode(tokenizer.decode([5, *bare])) == [5, *bare]
    assert wrapping.tok_encode("the cat", add_special_tokens=False) == bare
    context, continuation = wrapping._encode_pair("the cat", " sat")
    assert (context, continuation) == ([5, *bare], ours.tok_encode(" sat"))
    # Of a whole text the first token is predicted from one begin token.
    one = [asked("the cat sat")]
    (wanted, _), = wrapping._loglikelihood_tokens([(None, [5], ours.tok_encode("the cat sat"))])
    assert wrapping.loglikelihood_rolling(one) == pytest.approx([wanted], rel=1e-5)
    again = [asked(tokenizer.decode([5, *ours.tok_encode("the cat sat")]))]
    assert wrapping.loglikelihood_rolling(again) == pytest.approx([wanted], rel=1e-5)
