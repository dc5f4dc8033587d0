"""What a config is written as: YAML read back equal, plain JSON, differences and hashes."""

import json
from dataclasses import dataclass, field

import pytest
import yaml

from rabit_jax.experiments.engine.config import (
    difference,
    dump_yaml,
    load_config,
    section_hash,
    to_dict,
)


@dataclass(frozen=True)
class Rule:
    match: str
    k: int = 2


@dataclass(frozen=True)
class Train:
    steps: int = 100
    learning_rate: float = 1e-3
    clip: float | None = None


@dataclass(frozen=True)
class Config:
    name: str
    seed: int = 0
    train: Train = Train()
    mesh: dict[str, int] = field(default_factory=lambda: {"data": 1})
    files: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = (Rule("layers/.*"),)
    note: str | None = None


@pytest.fixture
def load(read_config):
    """Return a function from overrides of a full config to a Config."""
    return lambda *overrides: read_config(Config, FULL, *overrides)


FULL = """
name: full
seed: 7
train: {steps: 12, learning_rate: 1e-4, clip: 1}
mesh: {data: 2, tensor: 4}
files: [a.txt, "b,c.txt"]
rules:
  - {match: layers/attn/.*, k: 3}
  - match: layers/mlp/.*
note: "no"
"""


def test_dump_is_read_back_equal(load, tmp_path):
    config = load("train.learning_rate=1e-5", "name=on", "note='tis: \"é\"")
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(Config, path, []) == config
    assert yaml.safe_load(dump_yaml(config)) == to_dict(config)


def test_to_dict_is_plain_json(load):
    tree = to_dict(load())
    assert json.loads(json.dumps(tree)) == tree
    assert tree["rules"][0] == {"match": "layers/attn/.*", "k": 3}


def test_difference_shows_both_values_by_dotted_key(load):
    before = load()
    after = load("train.steps=13", "mesh.pipe=2", "files=a.txt")
    assert difference(before, before) == ""
    assert set(difference(before, after).splitlines()) == {
        "train.steps: 12 -> 13",
        "mesh.pipe: (absent) -> 2",
        "files: ['a.txt', 'b,c.txt'] -> ['a.txt']",
    }
    assert difference(after, to_dict(before)).startswith("train.steps: 13 -> 12")
    assert difference(Config("a", mesh={}), Config("a")) == (
        "mesh: {} -> (absent)\nmesh.data: (absent) -> 1"
    )


def test_the_hash_sees_values_and_order_of_objects_only():
    config = Config("run")
    assert section_hash(config, "x") == section_hash(to_dict(config), "x")
    assert section_hash({"a": 1, "b": 2}) == section_hash({"b": 2, "a": 1})
    assert section_hash((1, 2)) == section_hash([1, 2])
    different = [(config,), (Config("run", seed=1),), ("a", "b"), ("b", "a"), ("ab",), (1,), ("1",)]
    assert len({section_hash(*objects) for objects in different}) == len(different)


def test_the_hash_is_that_of_the_compact_json():
    # printf '[{"b":1.5}]' | sha256sum
    assert section_hash({"b": 1.5}).startswith("41aa00f19aa82044")
