"""Conversations in process, from lines of stdin."""

import io
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from rabit_jax.data.tokenizer import train_tokenizer
from rabit_jax.experiments import generate as command
from rabit_jax.experiments.engine.continuing import Writer, until_end
from rabit_jax.formats.hf import save_hf
from rabit_jax.formats.packed_model import load_model
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import param_shapes
from rabit_jax.models.generation import _extend, _prefill, generate
from tests.small_models import CHAT_TEMPLATE

CONFIG = ModelConfig(
    vocab_size=300, d_model=32, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, d_hidden=48,
    bos_id=0, eos_ids=(), max_position=200,
)
QUESTIONS = "the cat?\nwhere is the mat?\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense folder of a tiny random model whose tokenizer has a chat template."""
    rng = np.random.default_rng(3)
    params = {path: jnp.asarray(rng.normal(size=shape), jnp.float32)
              for path, shape in param_shapes(CONFIG).items()}
    tokenizer = train_tokenizer(["[user] the cat sat on the mat\n[assistant] the cat"] * 3, 300)
    tokenizer.chat_template = CHAT_TEMPLATE
    folder = tmp_path_factory.mktemp("models") / "chat"
    save_hf(folder, CONFIG, unflatten_dict(params, sep="/"), tokenizer)
    return folder


@pytest.fixture
def chat(capsys, monkeypatch, folder):
    """Runs a conversation; returns exit code, stdout and stderr."""
    def call(lines, *args, model=folder, terminal=False):
        stdin = io.TextIOWrapper(io.BytesIO(lines.encode(errors="surrogateescape")), "utf-8")
        stdin.isatty = lambda: terminal
        monkeypatch.setattr("sys.stdin", stdin)
        settings = ["--model", model, "--chat", "--greedy", "--max-new-tokens", 8, *args]
        return command.main([str(arg) for arg in settings]), *capsys.readouterr()

    return call


def answers(folder, questions, system=None):
    """New ids and text of a greedy model for each question, its own answers before it."""
    model, params, tokenizer = load_model(folder)
    text = f"[system] {system}\n" if system else ""
    found = []
    for question in questions:
        text += f"[user] {question}\n[assistant]"
        ids = tokenizer.encode(text)
        # As many tokens as the command pads to, so that both compile alike.
        padded = np.pad(ids, (-len(ids) % 64, 0))[None]
        mask = np.arange(padded.shape[1])[None] >= padded.shape[1] - len(ids)
        new = np.asarray(generate(model, params, padded, mask, max_new_tokens=8))[0]
        new = until_end(new.tolist(), model.config.eos_ids)  # the tokenizer names one
        found.append((new, tokenizer.decode(new, skip_special_tokens=True)))
        text += f" {found[-1][1]}\n"
    return found


@pytest.mark.parametrize("system", [None, "be brief"])
def test_the_conversation_is_kept(chat, folder, system):
    args = () if system is None else ("--system", system)
    code, out, err = chat(QUESTIONS, *args)
    (one, first), (two, second) = answers(folder, QUESTIONS.splitlines(), system)
    assert (code, out) == (0, f"{first}\n{second}\n")
    made = len(one) + len(two) - 2
    assert made > 7 and f"decode: {made} tokens in " in err and len(err.splitlines()) == 1


def test_reset_forgets_and_exit_ends(chat):
    code, out, err = chat("the cat?\n\n/reset\nthe cat?\n/exit\nthe cat?\n")
    first = chat("the cat?")[1]
    assert (code, out) == (0, first * 2) and "a new conversation" in err


def test_an_answer_stops_at_an_end_token(chat, folder, tmp_path):
    [(ids, _)] = answers(folder, ["the cat?"])
    at = next(n for n in range(1, 8) if ids[n] not in ids[:n])
    copy = shutil.copytree(folder, tmp_path / "chat")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [299, ids[at]]}))
    code, out, err = chat("the cat?\n", model=copy)
    assert (code, out) == (0, load_model(folder)[2].decode(ids[:at]) + "\n")
    assert f"decode: {at} tokens in " in err


def test_a_question_that_does_not_fit_is_left_out(chat, folder):
    code, out, err = chat("cat " * 200 + "\nthe cat?\n")
    assert (code, out) == (0, chat("the cat?\n")[1])
    assert re.search(r"now has \d+ tokens and the model a context of 200.*/reset", err)
    # An answer ends where the context does.
    encode = load_model(folder)[2].encode
    near = "x" * (196 - len(encode("[user] x\n[assistant]")) + 1)
    assert len(encode(f"[user] {near}\n[assistant]")) == 196
    code, out, err = chat(near)
    assert code == 0 and "decode: 3 tokens in " in err


def test_ctrl_c_stops_only_the_answer(chat, monkeypatch):
    wanted, write = chat("the cat?\n")[1], Writer.write

    def interrupted(writer, *args):
        yield next(write(writer, *args))
        monkeypatch.setattr(Writer, "write", write)
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "write", interrupted)
    code, out, _ = chat("the cat?\n/reset\nthe cat?\n")
    partial, rest = out.split("\n", 1)
    assert (code, rest) == (0, wanted) and partial and wanted.startswith(partial)


def test_bad_input_is_one_sentence(chat, folder, tmp_path):
    bare = shutil.copytree(folder, tmp_path / "bare",
                           ignore=shutil.ignore_patterns("chat_template*"))
    for lines, args, message in [
        ("hello\n", {"model": bare}, "no chat template"),
        ("forbidden\n", {}, "refuses the conversation (not so)"),
        ("\udce9\n", {}, "not UTF-8"),
    ]:
        code, out, err = chat(lines, **args)
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1


def test_a_terminal_is_asked(chat):
    code, out, err = chat("the cat?\n", terminal=True)
    assert code == 0 and err.startswith("> > prefill: ") and ">" not in out


def test_turns_of_like_length_are_compiled_once(chat):
    begun = _prefill._cache_size(), _extend._cache_size()
    chat("a\n/reset\nab\n/reset\nabc\n", "--max-new-tokens", 7)
    assert (_prefill._cache_size(), _extend._cache_size()) == (begun[0] + 1, begun[1] + 1)
