"""`init.spec` in a config: one of several dataclasses, told apart by the key `type`."""

import pytest
import yaml

from rabit_jax import (
    BadInput,
    CodebookSpec,
    DualBinarySpec,
    FrozenPathSpec,
    GroupUniformSpec,
    IndependentSignSpec,
    LowRankSignSpec,
    ResidualSignSpec,
    UniformResidualSpec,
    residual,
    scaled,
)
from rabit_jax.experiments.engine.config import dump_yaml, load_config
from rabit_jax.experiments.engine.settings import RunConfig


def spec(*overrides, file=None):
    return load_config(RunConfig, file, overrides).init.spec


def refused(*overrides, file=None):
    with pytest.raises(BadInput) as error:
        spec(*overrides, file=file)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("overrides", "wanted"), [
    ([], ResidualSignSpec()),
    (["init.spec.k=3", "init.spec.ste=smooth"], ResidualSignSpec(k=3, ste="smooth")),
    (["init.spec.type=independent", "init.spec.rounds=0"], IndependentSignSpec(rounds=0)),
    (["init.spec.rounds=0", "init.spec.type=frozen_path"], FrozenPathSpec(rounds=0)),
    (["init.spec.type=uniform", "init.spec.k=3"], UniformResidualSpec(k=3)),
    (["init.spec.type=low_rank", "init.spec.bits=0.55"], LowRankSignSpec(bits=0.55)),
    (["init.spec.type=round_to_nearest", "init.spec.bits=3"], GroupUniformSpec(bits=3)),
    (["init.spec.type=dual_binary"], DualBinarySpec()),
    (["init.spec.type=codebook", "init.spec.dim=8"], CodebookSpec(dim=8)),
    (["init.spec={type: scaled, a_in: 1, spec: {type: dual_binary, group: 64}}"],
     scaled(DualBinarySpec(group=64), a_in=1.0)),
    (["init.spec={type: sum, parts: [{type: low_rank, bits: 1}, {type: residual, k: 1}]}"],
     residual(LowRankSignSpec(bits=1.0), ResidualSignSpec(k=1))),
], ids=str)
def test_every_spec_is_read_and_written(overrides, wanted, tmp_path):
    config = load_config(RunConfig, None, overrides)
    assert config.init.spec == wanted
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(config))
    assert load_config(RunConfig, file) == config
    assert yaml.safe_load(file.read_text())["init"]["spec"]["type"] == wanted.type


def test_overrides_fill_what_the_file_leaves(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("init: {spec: {type: independent, rounds: 3}}")
    assert spec("init.spec.k=1", file=file) == IndependentSignSpec(k=1, rounds=3)
    assert spec("init.spec.type=uniform", file=file) == UniformResidualSpec(rounds=3)


def test_a_spec_within_a_spec_keeps_its_own_defaults():
    assert spec("init.spec={type: scaled, spec: {k: 3}}") == scaled(ResidualSignSpec(k=3))


@pytest.mark.parametrize(("overrides", "said"), [
    (["init.spec={type: [1]}"], "'init.spec.type' is [1], wanted one of 'residual'"),
    (["init.spec.type=low_rnk"], "'init.spec.type' is 'low_rnk', wanted one of 'residual'"),
    (["init.spec.type=low_rnk"], "did you mean 'low_rank'?"),
    (["init.spec.type=low_rank", "init.spec.rounds=3"],
     "'init.spec.rounds' does not go with the chosen init.spec.type: leave it out, or choose a"),
    (["init.spec.bits=2"], "'init.spec.bits' does not go with the chosen init.spec.type"),
    (["init.spec.rouds=2"], "the nearest key is 'init.spec.rounds'"),
    (["init.spec.ste=hard"], "init.spec: ste is 'hard': choose identity, scaled"),
    (["init.spec=3"], "'init.spec' is 3, wanted a mapping"),
    (["init.spec={type: sum, parts: [{k: 1}]}"], "'init.spec.parts[0].type' is None"),
    (["init.spec={type: sum, parts: [{type: residual, k: 1}]}"], "a sum needs at least two"),
    (["init.spec={type: sum, parts: [{type: residual, q: 1}, {type: residual}]}"],
     "unknown config key 'init.spec.parts[0].q'"),
], ids=str)
def test_wrong_specs_are_refused(overrides, said):
    assert said in refused(*overrides)
