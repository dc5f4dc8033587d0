"""Config files: what is accepted has every value that the file gives, and no other exception."""

import json

import pytest
import yaml

from rabit_jax import BadInput
from rabit_jax.experiments.ablation.config import Ablation
from rabit_jax.experiments.engine.config import SHIPPED, dump_yaml, load_config, read_yaml, to_dict
from rabit_jax.experiments.engine.folder import RunFolder
from rabit_jax.experiments.engine.settings import RunConfig
from tests.fuzz.mutations import damaged, mutated

FULL = yaml.safe_load(dump_yaml(RunConfig())) | {"mesh": {"data": 1}}
CASES = {
    "run": (RunConfig, [FULL, *(read_yaml(SHIPPED / f"{n}.yaml") for n in ("ptq", "quickstart"))]),
    "ablation": (Ablation, [read_yaml(SHIPPED / "ablation_small.yaml")]),
}


def leaves(tree, path=()):
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, (*path, str(key)))
    elif isinstance(tree, list) and tree:
        for n, value in enumerate(tree):
            yield from leaves(value, (*path, n))
    else:
        yield path, tree


def same(given, found):
    """Whether a config holds what YAML gave; YAML 1.1 takes 3e-3 for text, a config does not."""
    if given == {} and isinstance(found, dict):
        return True  # a section of which nothing is said
    if isinstance(found, bool) or isinstance(given, bool):
        words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        return words.get(str(given).lower(), given) == found
    if isinstance(found, int | float) and isinstance(given, str):
        return float(given) == found
    if isinstance(given, int | float) and isinstance(found, int | float):
        return float(given) == float(found)
    return given == found or str(given) == str(found) or (not given and not found)


def value_at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


@pytest.mark.parametrize("case", CASES)
def test_config_files(case, fuzz, tmp_path):
    cls, bases = CASES[case]
    file = tmp_path / "config.yaml"
    texts = [yaml.safe_dump(base, sort_keys=False).encode() for base in bases]

    def make(rng):
        n = int(rng.integers(len(bases)))
        if rng.random() < 0.3:
            content = damaged(texts[n], rng)
        elif rng.random() < 0.1:  # JSON is YAML too, and may be deep
            content = b"[" * int(rng.integers(1, 4000)) + texts[n]
        else:
            tree = mutated(bases[n], rng)
            content = json.dumps(tree).encode() if rng.random() < 0.3 else \
                yaml.safe_dump(tree, allow_unicode=bool(rng.integers(2))).encode(errors="replace")
        if rng.random() < 0.1:
            lines = content.splitlines(keepends=True) or [b""]
            lines.insert(int(rng.integers(len(lines))), lines[int(rng.integers(len(lines)))])
            content = b"".join(lines)
        file.write_bytes(content)
        return len(content)

    def use():
        config = load_config(cls, file)
        given, found = read_yaml(file), to_dict(config)
        for path, value in leaves(given):
            try:
                held = value_at(found, path)
            except (KeyError, TypeError, IndexError):
                held = None
            assert value is None or same(value, held), f"{path} is {value!r}, read as {held!r}"
        again = tmp_path / "again.yaml"
        again.write_text(dump_yaml(config), encoding="utf-8")
        assert to_dict(load_config(cls, again)) == found
        if cls is RunConfig:
            path = RunFolder(config).path
            assert path.name == config.name and ".." not in path.name

    accepted, refused = fuzz(1, make, use, 400)
    assert accepted and refused


@pytest.mark.parametrize("value", ["a\0b", "\x1b[2J", "x" * 300, "a\nb", ".", "..", "", "a/b"])
def test_a_name_that_no_folder_can_have(tmp_path, value):
    with pytest.raises(BadInput, match="name is "):
        RunConfig(name=value)
