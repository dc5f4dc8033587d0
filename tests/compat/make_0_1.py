"""How `made_by_0_1.tar.xz` was made: run in an empty folder with version 0.1 on the path.

A finished QAT run, a finished post-training run of its teacher, and the packed file of one
tree that holds every representation, each tiny. `expected.npz` holds the dense matrices and the
logits that 0.1 computed from them.
"""

import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import numpy as np
import yaml

from rabit_jax import (
    CodebookSpec,
    DualBinarySpec,
    FrozenPathSpec,
    GroupUniformSpec,
    IndependentSignSpec,
    LowRankSignSpec,
    ResidualSignSpec,
    UniformResidualSpec,
    convert,
    dense,
    load_model,
    pack,
    residual,
    save_packed_params,
    scaled,
)
from rabit_jax.init import Stats

NOUNS = "file list string module function object value error line number class method".split()
VERBS = "returns raises reads writes calls takes holds opens closes finds".split()
TRAINING = {"batch_size": 4, "length": 16, "save_every": 4, "log_every": 1}
QAT = {
    "name": "tiny",
    "data": {
        "source": "files", "files": ["train.txt"], "eval_files": ["eval.txt"],
        "unseen_files": ["unseen.txt"], "vocab_size": 262, "cache": "cache",
    },
    "model": {
        "d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8,
        "d_hidden": 24, "max_position": 32,
    },
    "teacher": {**TRAINING, "steps": 8, "watch_every": 4, "optimizer": {"lr": 3e-3}},
    "calibrate": {"sequences": 8, "batch_size": 4, "length": 16},
    "init": {"spec": {"rounds": 4}},
    "qat": {**TRAINING, "steps": 8, "watch_every": 4, "optimizer": {"lr": 1e-3}},
    "evaluate": {"context": 16, "windows": 8, "diagnostic_windows": 4},
    "generate": {"prompts": ["The file"], "max_new_tokens": 4},
}
PTQ = {
    "task": "ptq", "name": "ptq",
    "data": {"source": "files", "files": ["train.txt"], "eval_files": ["eval.txt"],
             "cache": "cache"},
    "teacher": {"path": "runs/tiny/teacher"},
    "calibrate": {"sequences": 8, "batch_size": 4, "length": 16},
    "init": {"spec": {"rounds": 4}},
    "evaluate": {"context": 16, "windows": 4, "batch_size": 4},
}
SPECS = {
    "residual": ResidualSignSpec(k=2),
    "independent": IndependentSignSpec(k=2),
    "frozen": FrozenPathSpec(k=2),
    "uniform": UniformResidualSpec(k=2),
    "low_rank": LowRankSignSpec(bits=2.0),
    "group_uniform": GroupUniformSpec(group=8),
    "dual_binary": DualBinarySpec(group=8),
    "codebook": CodebookSpec(),
    "scaled": scaled(GroupUniformSpec(group=8)),
    "sum": residual(LowRankSignSpec(bits=1.0), ResidualSignSpec(k=1)),
    "reshaped": ResidualSignSpec(k=2),
}


def story(seed, sentences):
    rng = random.Random(seed)
    return "\n\n".join(
        f"The {rng.choice(NOUNS)} {rng.choice(VERBS)} a {rng.choice(NOUNS)} {n} of "
        f"{rng.choice(NOUNS)}s and the {rng.choice(NOUNS)} {rng.choice(VERBS)} it."
        for n in range(sentences)
    )


def every_representation():
    rng = np.random.default_rng(0)
    params = {name: {"kernel": rng.normal(size=(2, 32, 24)).astype("float32")} for name in SPECS}
    params["reshaped"]["kernel"] = rng.normal(size=(2, 32, 4, 6)).astype("float32")
    params["norm"] = {"scale": rng.normal(size=(2, 32)).astype("float32")}
    stats = {f"{name}/kernel": Stats(*(rng.uniform(0.5, 2, (2, n)).astype("float32")
                                       for n in (32, 24))) for name in SPECS}
    rules = [(f"{name}/kernel", spec) for name, spec in SPECS.items()]
    packed = pack(convert(params, rules, stats, jax.random.key(0)))
    save_packed_params("every.safetensors", packed)
    return {name: np.asarray(dense(packed)[name]["kernel"]) for name in SPECS}


def logits(folder):
    model, params, _ = load_model(folder)
    tokens = np.arange(24).reshape(2, 12) % 262
    return np.asarray(model.apply({"params": params}, tokens))


def main():
    for name, seed, sentences in (("train", 0, 200), ("eval", 1, 40), ("unseen", 2, 40)):
        Path(f"{name}.txt").write_text(story(seed, sentences))
    for config in (QAT, PTQ):
        file = Path(f"{config['name']}.yaml")
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        subprocess.run([sys.executable, "-m", "rabit_jax.experiments.run", "--config", str(file)],
                       check=True)
    np.savez_compressed("expected.npz", **every_representation(),
                        tiny=logits("runs/tiny/packed"), ptq=logits("runs/ptq/packed"))
    for folder in ("checkpoints/teacher", "tensorboard"):
        shutil.rmtree(f"runs/tiny/{folder}")
    with tarfile.open("made_by_0_1.tar.xz", "w:xz", preset=9) as archive:
        for path in ("train.txt", "eval.txt", "unseen.txt", "tiny.yaml", "ptq.yaml", "cache",
                     "runs", "every.safetensors", "expected.npz"):
            archive.add(path)


if __name__ == "__main__":
    main()
