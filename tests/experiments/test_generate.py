"""The generate command in process: text, batches, end tokens, exit codes."""

import io
import json
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.data.tokenizer import train_tokenizer
from rabit_jax.experiments import generate as command
from rabit_jax.experiments.engine.continuing import Writer
from rabit_jax.formats.hf import save_hf
from rabit_jax.formats.packed_model import load_model
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import Decoder
from tests.small_models import save_random_folders

CONFIG = ModelConfig(
    vocab_size=300, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_hidden=48,
    bos_id=0, eos_ids=(), max_position=64,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense and a packed folder of tiny random models, with a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["the cat sat on the mat, the cat ran"] * 3, 300)
    save_random_folders(root, CONFIG, tokenizer)
    return root


@pytest.fixture
def run(capsys):
    """Runs the command; returns exit code, stdout and stderr."""
    def call(*args):
        code = command.main([str(arg) for arg in args])
        return code, *capsys.readouterr()

    return call


def greedy(folder, prompt, steps):
    """New ids by the argmax of whole forward passes, and the tokenizer."""
    model, params, tokenizer = load_model(folder)
    model = Decoder(model.config)
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
    ids = tokenizer.encode(prompt)
    # One padded length for all steps: later positions cannot change earlier logits.
    tokens, n = np.zeros((1, 48), np.int32), len(ids)
    tokens[0, :n] = ids
    for at in range(n, n + steps):
        tokens[0, at] = np.asarray(apply(tokens))[0, at - 1].argmax()
    return tokens[0, n : n + steps].tolist(), tokenizer


@pytest.mark.parametrize("kind", ["dense", pytest.param("packed", marks=pytest.mark.more)])
def test_greedy_text_is_the_argmax(folders, run, kind):
    new, tokenizer = greedy(folders / kind, "the cat", 8)
    code, out, err = run("--model", folders / kind, "--prompt", "the cat", "--greedy",
                         "--max-new-tokens", 8)
    assert code == 0
    assert out == "the cat" + tokenizer.decode(new, skip_special_tokens=True) + "\n"
    # The first new token comes out of the prefill.
    read = len(tokenizer.encode("the cat"))
    size = r"bits per weight: .* over the whole model, .*\n" if kind == "packed" else ""
    rate = r"in \d+\.\d\d s, [\d,]+\.\d tokens/s"
    assert re.fullmatch(rf"prefill: {read} tokens {rate}; decode: 7 tokens {rate} "
                        r"\(compilation not included\)\n" + size, err)


def test_a_batch_gives_each_prompt_its_own_text(folders, run):
    prompts = ["the cat sat on the mat", "the cat"]
    settings = ("--model", folders / "packed", "--greedy", "--max-new-tokens", 8)
    alone = [run(*settings, "--prompt", prompt)[1] for prompt in prompts]
    code, out, err = run(*settings, "--prompt", prompts[0], "--prompt", prompts[1])
    assert (code, out) == (0, "\n".join(alone))
    assert "decode: 14 tokens in " in err


def test_stdin_is_a_prompt(folders, run, monkeypatch):
    settings = ("--model", folders / "packed", "--greedy", "--max-new-tokens", 8, "--prompt")
    wanted = run(*settings, "the cat")[1]
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n"))
    assert run(*settings, "-")[1] == wanted


@pytest.mark.more
def test_seed_and_temperature(folders, run):
    settings = ("--model", folders / "packed", "--prompt", "the cat", "--max-new-tokens", 8)
    first, again, other = (run(*settings, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again != other
    plain = run(*settings, "--greedy")[1]
    assert run(*settings, "--temperature", 0)[1] == plain
    assert run(*settings, "--top-p", 1e-6)[1] == plain != first


def test_text_stops_at_an_end_token_of_the_generation_config(folders, run, tmp_path):
    new, tokenizer = greedy(folders / "packed", "the cat", 8)
    at = next(n for n in range(2, 8) if new[n] not in new[:n])
    folder = shutil.copytree(folders / "packed", tmp_path / "packed")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [299, new[at]]}))
    code, out, err = run("--model", folder, "--prompt", "the cat", "--greedy",
                         "--max-new-tokens", 8)
    assert (code, out) == (0, "the cat" + tokenizer.decode(new[:at]) + "\n")
    assert f"decode: {at} tokens in " in err


def test_one_prompt_is_printed_as_it_comes_on_a_terminal(folders, run, monkeypatch):
    settings = ("--model", folders / "dense", "--greedy", "--prompt", "the cat")
    wanted = run(*settings, "--max-new-tokens", 24)[1]
    pieces, write = [], sys.stdout.write
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("sys.stdout.write", lambda piece: [pieces.append(piece), write(piece)][1])
    code, out, err = run(*settings, "--max-new-tokens", 24)
    assert (code, out) == (0, wanted) and "decode: 23 tokens in " in err
    # The first token, 16 more, 7 more, and what was held back with the line break.
    shown = [piece for piece in pieces if piece not in ("", "\n")]
    assert shown[0].startswith("the cat") and len(shown) >= 3


def test_one_token_is_no_decode(folders, run):
    code, out, err = run("--model", folders / "dense", "--prompt", "the cat", "--greedy",
                         "--max-new-tokens", 1)
    assert code == 0 and out.startswith("the cat") and "; decode: 0 tokens (" in err


def test_weights_that_overflow_are_one_sentence(folders, run, tmp_path):
    """Every weight is finite, so loading takes them; the logits are not."""
    model, params, tokenizer = load_model(folders / "dense")
    params["final_norm"]["scale"] = jnp.full_like(params["final_norm"]["scale"], 3e38)
    save_hf(tmp_path / "huge", model, params, tokenizer)
    code, out, err = run("--model", tmp_path / "huge", "--prompt", "the cat", "--greedy",
                         "--max-new-tokens", 8)
    assert (code, out) == (2, "")
    assert "NaN or infinity at new token 1" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("args, message", [
    (["--prompt", ""], "empty prompt"),
    (["--prompt", " \n"], "empty prompt"),
    (["--prompt", "a", "--prompt", ""], "empty prompt"),
    (["--prompt", "\udce9"], "not UTF-8"),
    (["--prompt", "a", "--seed", "-1"], "--seed is -1"),
    (["--prompt", "a", "--top-p", "2"], "top_p 2.0"),
    (["--prompt", "a", "--temperature", "nan"], "temperature nan"),
    (["--prompt", "a", "--max-new-tokens", "0"], "makes at least 1"),
    (["--prompt", "a", "--max-new-tokens", "64"], "64 positions"),
    (["--prompt", "a", "--system", "b"], "--system is for --chat"),
])
def test_bad_input_is_one_sentence(folders, run, args, message):
    code, out, err = run("--model", folders / "packed", "--max-new-tokens", 8, *args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("model, said", [
    ("x" * 5000, "File name too long"), ("~nobody-of-that-name/x", "does not exist"),
])
def test_names_that_no_folder_can_have(run, model, said):
    code, out, err = run("--model", model, "--prompt", "x")
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1


def test_bad_folders_are_one_sentence(folders, run, tmp_path):
    bare = shutil.copytree(folders / "dense", tmp_path / "bare",
                           ignore=shutil.ignore_patterns("tokenizer*"))
    cut = shutil.copytree(folders / "packed", tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-9])
    for folder, message in [(tmp_path / "none", "no model folder"), (bare, "holds no tokenizer"),
                            (cut, "truncated")]:
        code, out, err = run("--model", folder, "--prompt", "a")
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1


def test_special_tokens_stay_before_the_prompt(folders, run, tmp_path):
    """A tokenizer that writes `<|endoftext|> text X`: X would end the prompt."""
    folder = shutil.copytree(folders / "dense", tmp_path / "dense")
    new, plain = greedy(folders / "dense", "<|endoftext|>the cat", 6)
    file = folder / "tokenizer.json"
    raw, tokens = json.loads(file.read_text()), {"<|endoftext|>": 0, "the": 7}
    raw["post_processor"] = {
        "type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}},
                   {"SpecialToken": {"id": "the", "type_id": 0}}],
        "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in tokens.items()},
    }
    file.write_text(json.dumps(raw))
    assert load_model(folder)[2].encode("the cat")[-1] == 7
    settings = ("--model", folder, "--greedy", "--max-new-tokens", 6, "--prompt")
    text = plain.decode(new[: (new + [0]).index(0)])
    assert run(*settings, "the cat")[1] == f"the cat{text}\n"
    assert run(*settings, "<|endoftext|>the cat")[1] == f"<|endoftext|>the cat{text}\n"


def test_a_run_folder_stands_for_its_packed_model(folders, run, tmp_path):
    settings = ("--greedy", "--max-new-tokens", 8, "--prompt", "the cat")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("task: qat")
    code, out, err = run("--model", tmp_path / "run", *settings)
    assert (code, out) == (2, "") and "is a run folder without packed/" in err
    shutil.copytree(folders / "packed", tmp_path / "run" / "packed")
    assert run("--model", tmp_path / "run", *settings)[:2] == run(
        "--model", folders / "packed", *settings)[:2]


def test_a_token_without_a_row_is_named_before_any_work(folders, run, tmp_path, monkeypatch):
    folder = shutil.copytree(folders / "dense", tmp_path / "dense")
    tokenizer = load_model(folder)[2]
    tokenizer.add_tokens([f"<{n}>" for n in range(300)])
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(Writer, "write", lambda *_: pytest.fail("worked"))
    code, out, err = run("--model", folder, "--prompt", "see <299>")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert "holds the token '<299>' with id" in err and "ends at 299" in err


def test_usage(capsys):
    for args, code, word in [(["--help"], 0, "examples:"), (["--prompt", "a"], 2, "--model"),
                             (["--model", "m"], 2, "--prompt --chat"),
                             (["--model", "m", "--prompt", "a", "--chat"], 2, "not allowed"),
                             (["--model", "m", "--prompt", "a", "--activation-bits", "4"], 2,
                              "choose from 16, 8")]:
        with pytest.raises(SystemExit) as ended:
            command.main(args)
        assert ended.value.code == code
        assert word in "".join(capsys.readouterr())
