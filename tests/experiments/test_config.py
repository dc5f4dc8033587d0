"""Loading configs: what the type of a field makes of YAML and overrides, and every refusal."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from pydantic import Field

from rabit_jax.errors import BadInput
from rabit_jax.experiments.engine.config import load_config


@dataclass(frozen=True)
class Rule:
    match: str
    k: int = 2


@dataclass(frozen=True)
class Optimiser:
    learning_rate: float = 1e-3
    kind: Literal["muon", "adamw"] = "muon"
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = None

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise BadInput(f"learning_rate must be above 0, found {self.learning_rate}")


@dataclass(frozen=True)
class Train:
    steps: int = 100
    resume: bool = False
    optimiser: Optimiser = Optimiser()


@dataclass(frozen=True)
class Config:
    name: str
    seed: int = 0
    train: Train = Train()
    teacher: Train = Train(steps=500, optimiser=Optimiser(learning_rate=0.5))
    student: Train | None = None
    mesh: dict[str, int] = field(default_factory=lambda: {"data": 1})
    files: tuple[str, ...] = ()
    widths: tuple[int, ...] = (256, 512)
    rules: tuple[Rule, ...] = (Rule("layers/.*"),)
    k: Literal[1, 2, 3, 4] = 2
    note: str | None = None
    share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.5


@pytest.fixture
def load(read_config):
    """Return a function from YAML text and overrides to a Config."""
    return lambda text="name: run", *overrides: read_config(Config, text, *overrides)


FULL = """
name: full
seed: 7
train: {steps: 12, resume: yes, optimiser: {learning_rate: 1e-4, kind: adamw, clip: 1}}
mesh: {data: 2, tensor: 4}
files: [a.txt, "b,c.txt"]
rules:
  - {match: layers/attn/.*, k: 3}
  - match: layers/mlp/.*
k: 4
note: "no"
"""


def test_a_whole_file_becomes_typed_values(load):
    config = load(FULL)
    optimiser = Optimiser(1e-4, "adamw", (0.9, 0.95), 1.0)
    assert config == Config(
        name="full",
        seed=7,
        train=Train(12, True, optimiser),
        mesh={"data": 2, "tensor": 4},
        files=("a.txt", "b,c.txt"),
        rules=(Rule("layers/attn/.*", 3), Rule("layers/mlp/.*", 2)),
        k=4,
        note="no",
    )
    assert type(config.train.optimiser.clip) is float
    assert isinstance(config.rules, tuple)


def test_what_a_section_leaves_out_comes_from_the_default_of_its_own_field(load):
    config = load("name: run\nteacher: {optimiser: {kind: adamw}}")
    assert config.teacher == Train(500, False, Optimiser(0.5, "adamw"))
    assert load("name: run", "teacher.resume=on").teacher.steps == 500
    assert load("name: run\ntrain:\n").train == Train()


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=12", "seed", 12),
        ("seed=1e3", "seed", 1000),
        ("seed=-3", "seed", -3),
        ("seed=1234567890123456789", "seed", 1234567890123456789),
        ("name=no", "name", "no"),
        ("name=2024-01-01", "name", "2024-01-01"),
        ("name=a=b", "name", "a=b"),
        ("name=", "name", ""),
        ("k=3", "k", 3),
        ("note=null", "note", None),
        ("note=later", "note", "later"),
        ("files=a.txt,b.txt", "files", ("a.txt", "b.txt")),
        ("files=[a.txt, 'b,c']", "files", ("a.txt", "b,c")),
        ("files=", "files", ()),
        ("files=[]", "files", ()),
        ("widths=[1, 2,3]", "widths", (1, 2, 3)),
        ("mesh.tensor=2", "mesh", {"data": 1, "tensor": 2}),
        ("mesh={tensor: 8}", "mesh", {"tensor": 8}),
        ("rules=[{match: 'a,b', k: 1}]", "rules", (Rule("a,b", 1),)),
        ("student.steps=5", "student", Train(steps=5)),
        ("train={steps: 5}", "train", Train(steps=5)),
        ("train.optimiser.learning_rate=3e-4", "train", Train(optimiser=Optimiser(3e-4))),
        ("train.optimiser.clip=.5", "train", Train(optimiser=Optimiser(clip=0.5))),
        ("train.optimiser.clip=inf", "train", Train(optimiser=Optimiser(clip=math.inf))),
        ("train.optimiser.betas=0,1", "train", Train(optimiser=Optimiser(betas=(0.0, 1.0)))),
    ],
)
def test_an_override_is_read_by_the_type_of_its_field(load, override, key, value):
    config = load("name: run", override)
    assert getattr(config, key) == value
    assert dataclasses.replace(config, **{key: getattr(load(), key)}) == load()


@pytest.mark.parametrize("word", ["true", "True", "yes", "on", "false", "no", "OFF"])
def test_bool_words_mean_the_same_in_yaml_and_overrides(load, word):
    wanted = word.lower() in ("true", "yes", "on")
    assert load(f"name: run\ntrain: {{resume: {word}}}").train.resume is wanted
    assert load("name: run", f"train.resume={word}").train.resume is wanted


def test_overrides_win_over_the_file_and_later_ones_over_earlier(load):
    config = load(FULL, "mesh.data=3", "seed=1", "seed=2", "train.steps=9", "student=null")
    assert config.mesh == {"data": 3, "tensor": 4}
    assert (config.seed, config.train.steps) == (2, 9)
    assert config.train.optimiser.kind == "adamw"


def test_overrides_leave_the_class_defaults_alone(load):
    @dataclass(frozen=True)
    class Place:
        mesh: dict[str, int]

    @dataclass(frozen=True)
    class Places:
        here: Place = Place({"data": 1})  # noqa: B008 - the shared default is what is tested

    assert load("name: run", "mesh.tensor=2").mesh == {"data": 1, "tensor": 2}
    assert load().mesh == {"data": 1}
    assert load_config(Places, None, ["here.mesh.pipe=2"]).here.mesh == {"data": 1, "pipe": 2}
    assert load_config(Places, None).here.mesh == {"data": 1}
    assert load_config(Config, None, ["name=x"]) == Config("x")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.stepz", "train.steps"),
        ("train.optimiser.learning_rat", "train.optimiser.learning_rate"),
        ("teacher.optimizer.kind", "teacher.optimiser.kind"),
        ("train.learning_rate", "train.optimiser.learning_rate"),
        ("sed", "seed"),
        ("student.stepz", "student.steps"),
        ("seed.a", "seed"),
        ("rules.0.k", "rules[].k"),
    ],
)
def test_an_unknown_key_names_the_nearest(load, key, nearest):
    with pytest.raises(BadInput, match="unknown config key") as error:
        load("name: run", f"{key}=1")
    assert repr(key) in str(error.value) and repr(nearest) in str(error.value)


def test_an_unknown_key_in_the_file_is_found_at_every_depth(load):
    for text, key in [
        ("name: run\nstepz: 1", "stepz"),
        ("name: run\ntrain: {optimiser: {lr: 1}}", "train.optimiser.lr"),
        ("name: run\nrules: [{match: a}, {mtch: b}]", "rules[1].mtch"),
        ("name: run\non: 3", "True"),
    ]:
        with pytest.raises(BadInput, match="unknown config key") as error:
            load(text)
        assert repr(key) in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: no", ["'name'", "False", "str", "quote"]),
        ("name: 3", ["'name'", "3", "str", "quotes"]),
        ("name: 2024-01-01", ["'name'", "str", "quotes"]),
        ("name:", ["'name'", "None", "str"]),
        ("name: x\nseed: two", ["'seed'", "'two'", "int"]),
        ("name: x\nseed: 1.5", ["'seed'", "1.5", "int"]),
        ("name: x\nseed: yes", ["'seed'", "True", "int"]),
        ("name: x\nseed: [1]", ["'seed'", "[1]", "int"]),
        ("name: x\nseed: .inf", ["'seed'", "inf", "int"]),
        ("name: x\ntrain: {resume: 1}", ["'train.resume'", "1", "bool"]),
        ("name: x\ntrain: {resume: maybe}", ["'train.resume'", "'maybe'", "bool"]),
        ("name: x\ntrain: 5", ["'train'", "5", "a mapping", "steps"]),
        ("name: x\ntrain: {optimiser: {learning_rate: [1]}}", ["optimiser.learning_rate", "float"]),
        ("name: x\ntrain: {optimiser: {learning_rate: .nan}}", ["nan", "float"]),
        ("name: x\ntrain: {optimiser: {clip: big}}", ["'big'", "float or null"]),
        ("name: x\ntrain: {optimiser: {betas: [1, 2, 3]}}", ["betas", "2 values"]),
        ("name: x\ntrain: {optimiser: {kind: sgd}}", ["'sgd'", "'muon'", "'adamw'"]),
        ("name: x\nk: 5", ["'k'", "5", "1, 2, 3, 4"]),
        ("name: x\nk: yes", ["'k'", "True", "1, 2, 3, 4"]),
        ("name: x\nmesh: [2]", ["'mesh'", "mapping of names to int"]),
        ("name: x\nmesh: {data: two}", ["'mesh.data'", "'two'", "int"]),
        ("name: x\nfiles: a.txt", ["'files'", "'a.txt'", "a list of str"]),
        ("name: x\nfiles: [a, no]", ["'files[1]'", "False", "quote"]),
        ("name: x\nrules: [{k: 2}]", ["'rules[0].match'", "missing"]),
        ("name: x\nk: true", ["'k'", "True", "1, 2, 3, 4"]),
        ("name: x\nk: 2.0", ["'k'", "2.0", "1, 2, 3, 4"]),
        ("name: x\ntrain: {optimiser: {kind: adam}}", ["did you mean 'adamw'?"]),
        ("name: x\ntrain: {optimiser: {clip: yes}}", ["'train.optimiser.clip'", "True", "float"]),
        ("name: x\ntrain: {optimiser: {betas: [1]}}", ["betas", "[1]", "2 values", "[1e-3, 1e-3]"]),
        ("name: x\nfiles: !!set {a, b}", ["'files'", "a list of str", "[text, text]"]),
        ("name: x\nseed: !!binary MTI=", ["'seed'", "b'12'", "int"]),
        (f"name: x\nshare: {'9' * 400}", ["'share'", "999...", "float"]),
        (f"name: x\nseed: 1{'0' * 30}", ["'seed'", "int of 64 bits"]),
        (f"name: x\nseed: -{2**63}", ["'seed'", "int of 64 bits"]),
        ("name: x\nmesh:", ["'mesh'", "None", "mapping of names to int", "{name: 3}"]),
        ("name: x\nmesh: {2: 1}", ["'mesh'", "2", "quote"]),
        ("name: x\ntrain.steps: 1", ["'train.steps'", "train: {steps: ...}"]),
        ("name: x\nshare: 1.5", ["'share' is 1.5", "less than or equal to 1"]),
        ("name: x\nshare: -1", ["'share' is -1", "greater than or equal to 0"]),
        ("name: x\nshare: .inf", ["'share' is inf", "finite"]),
        ("seed: 1", ["'name'", "missing", "str"]),
        ("- name", ["mapping"]),
        ("just text", ["mapping", "just text"]),
    ],
)
def test_a_wrong_value_names_key_value_and_type(load, text, words):
    with pytest.raises(BadInput) as error:
        load(text)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, (word, message)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", ["'seed'", "a.b=c"]),
        ("=3", ["a.b=c"]),
        ("train=fast", ["'train'", "'fast'", "mapping"]),
        ("files=[a", ["override", "not valid YAML"]),
        ("mesh.data=two", ["'mesh.data'", "'two'", "int"]),
        ("train.optimiser.kind=sgd", ["'sgd'", "'muon'"]),
        ("train.optimiser.learning_rate=-1", ["train.optimiser: learning_rate must be above 0"]),
    ],
)
def test_a_bad_override_is_one_sentence(load, override, words):
    with pytest.raises(BadInput) as error:
        load("name: run", override)
    for word in words:
        assert word in str(error.value)


def test_an_override_below_a_scalar_names_what_is_there(load):
    with pytest.raises(BadInput, match="'train' is 5, wanted a mapping"):
        load("name: run\ntrain: 5", "train.steps=1")


def test_a_union_of_types_is_a_mistake_of_the_schema():
    @dataclass(frozen=True)
    class Wrong:
        x: int | str = 0

    with pytest.raises(TypeError, match="X | None"):
        load_config(Wrong, None, ["x=1"])
