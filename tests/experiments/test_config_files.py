"""Config files: found by path or by a shipped one's name, refused where they are no YAML."""

from dataclasses import dataclass

import pytest

from rabit_jax.errors import BadInput
from rabit_jax.experiments.ablation.config import Ablation
from rabit_jax.experiments.engine.config import load_config
from rabit_jax.experiments.engine.settings import RunConfig


@dataclass(frozen=True)
class Config:
    name: str
    seed: int = 0


@pytest.fixture
def load(read_config):
    """Return a function from YAML text to a Config."""
    return lambda text: read_config(Config, text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [a\nseed: 1", ["config.yaml", "line 2"]),
        ("name: x\n\tseed: 1", ["config.yaml", "line 2"]),
        ("name: x\nseed: 1\nseed: 2", ["line 3", "'seed'", "twice"]),
        ("name: x\n? [a]\n: 1", ["line 2", "one word"]),
        ("name: !!python/object:os.system x", ["line 1"]),
        ("name: 2024-13-45", ["line 1", "'2024-13-45' is no timestamp", "quotes"]),
        ("name: x\nseed: !!bool maybe", ["line 2", "'maybe' is no bool"]),
        ("name: x\0", ["#x0000"]),
    ],
)
def test_bad_yaml_names_the_line(load, text, words):
    with pytest.raises(BadInput, match="not valid YAML") as error:
        load(text)
    for word in words:
        assert word in str(error.value)


LAUGH = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    ["name: " + "[" * 60 + "]" * 60, "[" * 600, "{a: " * 600, LAUGH, LAUGH.replace("<<:", "y:"),
     "name: &a [*a]", "name: &a {b: *a}"],
    ids=["nested", "open", "mappings", "merges", "aliases", "itself", "below itself"],
)
def test_yaml_that_would_grow_without_end_is_refused(load, text):
    with pytest.raises(BadInput, match="too large for a config: it may hold 100000") as error:
        load(text)
    assert "\n" not in str(error.value)


def test_aliases_are_read_and_an_override_changes_one_place_only(read_config):
    @dataclass(frozen=True)
    class Two:
        a: Config
        b: Config

    text = "a: &a {name: x, seed: 3}\nb: *a"
    assert read_config(Two, text, "b.seed=5") == Two(Config("x", 3), Config("x", 5))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(BadInput, match="nowhere.yaml: No such file"):
        load_config(Config, tmp_path / "nowhere.yaml", [])
    with pytest.raises(BadInput, match="directory"):
        load_config(Config, tmp_path, [])
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9t\xe9")
    with pytest.raises(BadInput, match="UTF-8"):
        load_config(Config, tmp_path / "latin.yaml", [])


def test_a_config_that_comes_with_the_package_is_taken_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "shipped" / "models").mkdir(parents=True)
    (tmp_path / "shipped" / "small.yaml").write_text("name: shipped")
    (tmp_path / "shipped" / "models" / "one-1.5b.yaml").write_text("name: nested")
    monkeypatch.setattr("rabit_jax.experiments.engine.config.SHIPPED", tmp_path / "shipped")
    here = tmp_path / "here"
    (here / "small").mkdir(parents=True)  # A folder of that name is no config.
    monkeypatch.chdir(here)
    for name in ("small", "small.yaml"):
        assert load_config(Config, name).name == "shipped"
    for name in ("models/one-1.5b", "models/one-1.5b.yaml"):
        assert load_config(Config, name).name == "nested"
    with pytest.raises(BadInput, match="no-such.* by its name: models/one-1.5b, small$"):
        load_config(Config, "no-such")
    with pytest.raises(BadInput, match="did you mean 'small'[?]"):
        load_config(Config, "smal.yaml")
    (here / "small.yaml").write_text("name: mine")
    assert load_config(Config, "small.yaml").name == "mine"


@pytest.mark.parametrize("text", ["", "# all of it\n# is comment\n", "---\n", "null", "~"])
def test_a_file_without_settings_starts_nothing(load, text):
    with pytest.raises(BadInput, match=r"config.yaml holds no settings: .* \{\} takes the default"):
        load(text)


def test_a_file_without_end_is_not_read_to_its_end():
    with pytest.raises(BadInput, match="/dev/zero is too large for a config"):
        load_config(Config, "/dev/zero")



@pytest.mark.parametrize("key", ["qat.steps", "qat.batch_size", "qat.length", "qat.watch_every",
                                 "calibrate.sequences", "evaluate.windows"])
def test_what_a_device_counts_fits_into_32_bits(key):
    """Else the first array that holds it ends the run with a traceback."""
    assert load_config(RunConfig, None, [f"{key}={2**31 - 1}"])
    with pytest.raises(BadInput, match=f"'{key}' is {2**31}: it must be less than or equal to"):
        load_config(RunConfig, None, [f"{key}={2**31}"])


def test_a_name_that_is_no_text_is_told_whatever_it_names(tmp_path):
    """A row of an ablation names a list of settings."""
    file = tmp_path / "ablation.yaml"
    file.write_text("name: a\nrows: {1: [init.spec.k=2]}\n")
    with pytest.raises(BadInput, match="'rows' has the name 1 in it: quote the name"):
        load_config(Ablation, file)
