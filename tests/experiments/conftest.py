"""A run in small: its text, its config, and the finished run."""

import random
import signal

import numpy as np
import pytest
import yaml
from flax.traverse_util import unflatten_dict

from rabit_jax import save_hf
from rabit_jax.data.tokenizer import train_tokenizer
from rabit_jax.experiments import run as command
from rabit_jax.experiments.engine.config import load_config
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import param_shapes

NOUNS = "file list string module function object value error line number class method".split()
VERBS = "returns raises reads writes calls takes holds opens closes finds".split()


def story(seed, sentences):
    rng = random.Random(seed)
    return "\n\n".join(
        f"The {rng.choice(NOUNS)} {rng.choice(VERBS)} a {rng.choice(NOUNS)} {n} of "
        f"{rng.choice(NOUNS)}s and the {rng.choice(NOUNS)} {rng.choice(VERBS)} it."
        for n in range(sentences)
    )


def settings(folder):
    training = {"batch_size": 8, "length": 32, "save_every": 4, "log_every": 1}
    return {
        "name": "tiny",
        "output": str(folder / "runs"),
        "data": {
            "source": "files",
            "files": [str(folder / "train.txt")],
            "eval_files": [str(folder / "eval.txt")],
            "unseen_files": [str(folder / "unseen.txt")],
            "vocab_size": 300,
            "cache": str(folder / "cache"),
        },
        "model": {
            "d_model": 256,
            "n_layers": 2,
            "n_heads": 4,
            "n_kv_heads": 2,
            "head_dim": 64,
            "d_hidden": 256,
            "max_position": 64,
        },
        "teacher": {**training, "steps": 12, "watch_every": 6, "optimizer": {"lr": 3e-3}},
        "calibrate": {"sequences": 16, "batch_size": 8, "length": 32},
        "init": {"spec": {"rounds": 10}},
        "qat": {**training, "steps": 8, "watch_every": 4, "optimizer": {"lr": 1e-3}},
        "evaluate": {"context": 32, "windows": 16, "diagnostic_windows": 8},
        "generate": {"prompts": ["The file"], "max_new_tokens": 5},
    }


@pytest.fixture(scope="session")
def tensor_bytes():
    """`tensor_bytes(path)`: what the tensors of a safetensors file take, without its header."""

    def count(path):
        data = path.read_bytes()
        return len(data) - 8 - int.from_bytes(data[:8], "little")

    return count


def write_texts(folder):
    """The texts that `settings(folder)` names."""
    (folder / "train.txt").write_text(story(0, 1500))
    (folder / "eval.txt").write_text(story(1, 150))
    (folder / "unseen.txt").write_text(story(2, 150).upper())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_texts(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings(folder)))
    return folder


@pytest.fixture(autouse=True)
def _signals():
    kept = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def run():
    """Runs the command in a folder: `run(place, *arguments) -> exit code`."""

    def main(place, *arguments):
        return command.main(["--config", str(place / "config.yaml"), *arguments])

    return main


@pytest.fixture(scope="module")
def finished(place, run):
    assert run(place, "--until", "teacher") == 0
    folder = place / "runs" / "tiny"
    assert sorted(p.stem for p in (folder / "stages").iterdir()) == ["teacher"]
    assert (folder / "teacher").is_dir() and not (folder / "summary.json").exists()
    assert run(place) == 0
    return folder


@pytest.fixture
def read_config(tmp_path):
    """`read_config(cls, text, *overrides)`: the config of a file with that YAML."""

    def read(cls, text, *overrides):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(cls, path, overrides)

    return read


def ptq_settings(place, model):
    return {
        "task": "ptq", "name": "ptq", "output": str(place / "runs"), "seed": 5,
        "data": {"source": "files", "files": [str(place / "train.txt")],
                 "eval_files": [str(place / "eval.txt")], "cache": str(place / "cache")},
        "teacher": {"path": str(model)},
        "calibrate": {"sequences": 12, "batch_size": 4, "length": 24},
        "init": {"spec": {"rounds": 4}},
        "evaluate": {"context": 32, "windows": 6, "batch_size": 4},
    }


def _random_params(config):
    """Random params; one norm of the second layer has an outlier."""
    rng = np.random.default_rng(0)
    flat = {path: rng.normal(1, 0.3, shape) if path.endswith("scale")
            else rng.normal(0, 0.1, shape) for path, shape in param_shapes(config).items()}
    flat["layers/attn_norm/scale"][1, 3] = 60
    return unflatten_dict({p: a.astype(np.float32) for p, a in flat.items()}, sep="/")


def write_model(place, layers):
    """A random model, its second layer with an outlier channel, and a tokeniser; its folder.

    All its kernels are [64, 64], so that the SVID compiles once.
    """
    folder, text = place / "model", (place / "train.txt").read_text()
    tokenizer = train_tokenizer([text], 300)
    config = ModelConfig(
        vocab_size=len(tokenizer), d_model=64, n_layers=layers, n_heads=4, n_kv_heads=4,
        head_dim=16, d_hidden=64, initializer_range=0.1, max_position=64, eos_ids=(0,), bos_id=0,
    )
    save_hf(folder, config, _random_params(config), tokenizer)
    return folder


@pytest.fixture(scope="module")
def ptq_model(place):
    """The model of three layers that `ptq` packs."""
    return write_model(place, 3)


@pytest.fixture(scope="module")
def ptq(place, ptq_model):
    """Runs the post-training of `ptq_model`: `ptq(*arguments) -> exit code`."""
    file = place / "ptq.yaml"
    file.write_text(yaml.safe_dump(ptq_settings(place, ptq_model)))
    return lambda *arguments: command.main(["--config", str(file), *arguments])
