"""The example of the documentation, from its page to a packed file: config, training, mesh."""

import importlib
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from rabit_jax import (
    BadInput,
    add_representation,
    add_ste,
    convert,
    dense,
    load_packed_params,
    pack,
    save_packed_params,
)
from rabit_jax.experiments import run as command
from rabit_jax.experiments.engine.config import load_config, section_hash
from rabit_jax.experiments.engine.settings import Init, PathSpec
from rabit_jax.formats.packed_model import load_packed
from rabit_jax.signs import ste as rules_of_ste
from rabit_jax.train.optimizer import OptimizerConfig
from rabit_jax.train.sharding import make_mesh
from rabit_jax.train.trainer import make_trainer
from rabit_jax.weights import representations

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "your-own-representation.md"
CODE, SECTION = (re.search(rf"```{kind}\n(.*?)```", PAGE.read_text(), re.S).group(1)
                 for kind in ("python", "yaml"))


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """The name of the module of the page; what it lists is taken back after the tests."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "row_sign.py").write_text(CODE)
    sys.path.insert(0, str(folder))
    types = dict(representations.PACKED_TYPES)
    yield "row_sign"
    sys.path.remove(str(folder))
    sys.modules.pop("row_sign", None)
    representations._own_specs.clear()
    rules_of_ste._own_rules.clear()
    representations.PACKED_TYPES.clear()
    representations.PACKED_TYPES.update(types)


@pytest.fixture
def config(place, ptq_model):
    """A post-training run whose section init is that of the page."""
    file = place / "own.yaml"
    settings = {
        "task": "ptq", "name": "own", "output": str(place / "runs"),
        "teacher": {"path": str(ptq_model)}, "calibrate": {"mode": "none"},
        "evaluate": {"models": []}, **yaml.safe_load(SECTION),
    }
    file.write_text(yaml.safe_dump(settings))
    return file


def test_a_config_names_it_once_its_module_is_imported(config, module, capsys):
    assert command.main(["--config", str(config), "--dry-run"]) == 2
    assert "row_sign" in capsys.readouterr().err
    arguments = ["--config", str(config), "--import", module]
    assert command.main([*arguments, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "RowSign" in out and "ResidualSign" in out and "ste: triangle" in out
    assert command.main(arguments) == 0
    _, params, _ = load_packed(config.parent / "runs" / "own" / "packed")
    attn = params["layers"]["attn"]
    assert type(attn["q"]["kernel"]).__name__ == "PackedRowSign"
    assert type(attn["v"]["kernel"]).__name__ == "PackedSign" and attn["v"]["kernel"].k == 3


def test_a_module_that_cannot_be_imported_is_one_sentence(config, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--config", str(config), "--import", "no_such_module"])
    assert ended.value.code == 2
    assert "--import no_such_module: ModuleNotFoundError" in capsys.readouterr().err


def test_it_is_converted_trained_on_a_mesh_packed_and_read_back(module, tmp_path):
    own = importlib.import_module(module)
    w = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 32)), jnp.float32)
    student = convert({"q": {"kernel": w}}, [("q/kernel", own.RowSignSpec())])
    np.testing.assert_allclose(
        student["q"]["kernel"].dense(), np.sign(w) * np.abs(w).mean(1, keepdims=True), rtol=1e-6
    )

    def loss(params, _, batch):
        y = jnp.einsum("bi,lio->blo", batch["tokens"], dense(params)["q"]["kernel"])
        return {"loss": jnp.sum((y - 1) ** 2)}

    batch = {"tokens": np.random.default_rng(1).normal(size=(8, 64)).astype(np.float32)}
    found = {}
    for name, shape in (("one", {"data": 8}), ("cut", {"data": 2, "tensor": 4})):
        trainer = make_trainer(loss, student, OptimizerConfig(lr=1e-2), 3, mesh=make_mesh(shape))
        state = trainer.state
        for _ in range(3):
            state, metrics = trainer.step(state, trainer.frozen, None, trainer.place(batch))
        found[name] = trainer.params(state)["q"]["kernel"], float(metrics["loss"])
    assert found["one"][1] == pytest.approx(found["cut"][1], rel=1e-4)
    node = found["one"][0]
    assert not np.array_equal(node.latent, w)
    packed = pack({"q": {"kernel": node}})
    assert packed["q"]["kernel"].deployed_bytes() == 2 * (32 * 8 + 2 * 32)
    read = load_packed_params(save_packed_params(tmp_path / "own.safetensors", packed))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), packed, read)
    assert all(jax.tree.leaves(same))
    np.testing.assert_allclose(read["q"]["kernel"].dense(), node.dense(), rtol=1e-3)


def test_names_that_are_taken_or_missing_are_refused(module):
    own = importlib.import_module(module)
    add_representation(own.RowSignSpec, own.PackedRowSign)  # a second time changes nothing
    with pytest.raises(BadInput, match="no `type`"):
        add_representation(PathSpec)
    with pytest.raises(BadInput, match="'residual' of Other"):
        add_representation(type("Other", (representations.ResidualSignSpec,), {}))
    with pytest.raises(BadInput, match="header_type is ''"):
        add_representation(own.RowSignSpec, own.RowSign)
    with pytest.raises(BadInput, match="'clipped' exists"):
        add_ste("clipped", lambda v, a: a)


def test_a_setting_that_is_new_keeps_the_keys_of_old_runs_and_is_part_of_new_ones(read_config):
    old = {"quantise": list(Init().quantise), "keep": [], "spec": Init().spec}
    assert section_hash(Init()) == section_hash(old)
    changed = read_config(Init, "by_path: [{paths: layers/attn/v/kernel, spec: {k: 3}}]")
    assert section_hash(changed) != section_hash(Init())
    assert [spec.k for _, spec in changed.rules()] == [3, 2]
    assert load_config(Init, None) == Init()
