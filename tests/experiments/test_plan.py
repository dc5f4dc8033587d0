"""The plan of a run against counts by hand, the compiled program and the memory it takes."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import yaml
from jax.sharding import NamedSharding, PartitionSpec

from rabit_jax import BadInput
from rabit_jax.experiments import run
from rabit_jax.experiments.engine.config import load_config
from rabit_jax.experiments.engine.inputs import check_batches
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.experiments.planning import plan as plan_module
from rabit_jax.experiments.planning.collectives import Collective, find_collectives
from rabit_jax.experiments.planning.flops import count_flops
from rabit_jax.experiments.planning.plan import planned
from rabit_jax.experiments.planning.programs import device_bytes, find_programs
from rabit_jax.experiments.planning.targets import CHIPS, find_target
from rabit_jax.train.sharding import make_mesh
from tests.experiments.conftest import ptq_settings, story, write_model

SMALL = [
    "model.d_model=32", "model.n_layers=3", "model.n_heads=2", "model.n_kv_heads=2",
    "model.head_dim=16", "model.d_hidden=64", "data.vocab_size=512", "teacher.length=16",
    "qat.length=16", "calibrate.length=16", "evaluate.context=16",
]


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def test_flops_count_loops_branches_and_recomputation():
    w, x = shape(4, 8, 8), shape(5, 8)

    def layers(x, w):
        y, _ = jax.lax.scan(lambda y, one: (jnp.tanh(y @ one), None), x, w)
        return jnp.sum(y)

    one = 2 * 5 * 8 * 8
    assert count_flops(layers, x, w).model == {"float32": 4 * one}
    # Backward: dx and dw of every layer; with recomputation the forward pass once more.
    assert count_flops(jax.grad(layers, (0, 1)), x, w).total == 3 * 4 * one
    again = count_flops(jax.grad(jax.checkpoint(layers), (0, 1)), x, w)
    assert (again.model.total(), again.recomputed.total()) == (3 * 4 * one, 4 * one)

    def branch(flag, x, w):
        return jax.lax.cond(flag, lambda: x @ w[0], lambda: x)

    assert count_flops(branch, shape(dtype=jnp.bool_), x, w).total == one
    bf16 = shape(5, 8, dtype=jnp.bfloat16)

    def mixed(x, w):
        with jax.named_scope("optimizer"):
            return jax.jit(lambda a: a @ a.T)(w[0]), x @ x.T

    found = count_flops(mixed, bf16, w)
    assert found.optimizer == {"float32": 2 * 8**3, "bfloat16": 2 * 25 * 8} and not found.model


def test_collectives_are_read_with_the_turns_of_their_loops():
    mesh = make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])

    def where(*spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    def layers(x, w):  # [8, 16] split by rows; [5, 16, 16] split by inputs, then reduced
        y, _ = jax.lax.scan(lambda y, one: (jnp.tanh(y @ one), None), x, w)
        return y

    jitted = jax.jit(layers, in_shardings=(where("data", "tensor"), where(None, "tensor", None)),
                     out_shardings=where("data", None))
    text = jitted.lower(shape(8, 16), shape(5, 16, 16)).compile().as_text()
    found = find_collectives(text, 4)
    reduces = [one for one in found if one.kind == "all-reduce" and one.turns == 5]
    assert [(one.result, one.devices) for one in reduces] == [(4 * 16 * 4, 2)]
    assert reduces[0].moved == 5 * 4 * 16 * 4


@pytest.mark.parametrize("kind, moved", [
    ("all-reduce", 1500), ("all-gather", 750), ("reduce-scatter", 3000), ("all-to-all", 750),
    ("collective-permute", 1000)])
def test_bytes_that_a_ring_sends(kind, moved):
    assert Collective(kind, 1000, 4, 1).moved == moved


def test_the_forms_in_which_a_text_writes_collectives():
    text = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %c = f32[] add(%a, %b)
}
%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8]
  %s = bf16[16]{0} reduce-scatter(%y), replica_groups={{0,1},{2,3}}, to_apply=%add
}
ENTRY %main.2 (q: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), body=%body.1, backend_config={"known_trip_count":{"n":"6"}}
  %r = (f32[4]{0}, f32[2]{0}) all-reduce(%a, %b), replica_groups={}, to_apply=%add
}
"""
    found = sorted(find_collectives(text, 8), key=lambda one: one.kind)
    assert found == [Collective("all-gather", 256, 4, 6), Collective("all-reduce", 24, 8, 1),
                     Collective("reduce-scatter", 32, 2, 6)]


def test_bytes_by_part_are_the_arguments_of_the_compiled_program():
    config = load_config(RunConfig, "quickstart", [*SMALL, "mesh.data=2", "mesh.tensor=2"])
    target = find_target("cpu:4")
    mesh = make_mesh(config.mesh, target.devices)
    programs = {p.name: p for p in find_programs(config, mesh)}
    assert list(programs) == ["teacher", "calibrate", "qat", "decode"]
    program = programs["qat"]
    compiled = program.function.lower(*program.arguments).compile()
    parts = sum(device_bytes(tree) for tree in program.parts.values())
    found = compiled.memory_analysis().argument_size_in_bytes
    # A step does not read arguments that it does not need, such as unused leaves of the batch.
    assert abs(found - parts) <= 64 + 0.001 * parts
    whole = make_mesh({"data": 1}, target.devices[:1])
    alone = {p.name: p for p in find_programs(dataclasses.replace(config, mesh={}), whole)}["qat"]
    latents = [tree.parts["trained"]["layers"]["attn"]["q"]["kernel"].latent
               for tree in (program, alone)]
    assert device_bytes(latents[1]) == 2 * device_bytes(latents[0])


def test_the_plan_of_a_shipped_config_in_json(capsys):
    code = run.main(["--config", "quickstart", *SMALL, "--plan", "cpu:2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and found["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    by_name = {one["program"]: one for one in found["programs"]}
    assert list(by_name) == ["teacher", "calibrate", "qat", "decode"]
    for one in found["programs"]:
        assert one["fits"] and one["peak"] >= sum(one["parts"].values()) > 0 and not one["error"]
    assert by_name["teacher"]["collectives"]["all-reduce"] > 0
    # teacher: 6 FLOPs a parameter and token, the projection's recomputation and attention besides
    linears = 3 * (4 * 32 * 32 + 3 * 32 * 64)
    assert by_name["teacher"]["flops"] > 6 * (linears + 32 * 512) * 8 * 15 / 2


@pytest.mark.more
def test_what_does_not_fit_is_said_with_the_options_that_make_it_fit(monkeypatch, capsys):
    config = load_config(RunConfig, "quickstart", [*SMALL, "teacher.path="])
    full = {one.program: one for one in planned(config, find_target("cpu:1"))}
    small = dataclasses.replace(CHIPS["cpu"], memory=int(0.93 * full["qat"].peak))
    monkeypatch.setitem(CHIPS, "cpu", small)
    code = run.main(["--config", "quickstart", *SMALL, "--plan", "cpu:1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 3
    advice = found["advice"]["qat"]
    assert advice and all("=" in one for one in advice)
    tried = load_config(RunConfig, "quickstart", [*SMALL, *advice])
    (one,) = planned(tried, find_target("cpu:1"), "qat")
    assert one.fits


@pytest.mark.parametrize("name, words", [
    ("h1000:8", "kinds of device are"), ("h100:0", "how many devices"),
    ("h100:8x", "how many devices"), ("cpu:4096", "XLA_FLAGS")])
def test_targets_that_cannot_be(name, words):
    with pytest.raises(BadInput, match=words):
        find_target(name)


def test_a_missing_compiler_is_one_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'jax\[tpu\]'"):
        find_target("v5e:8")


def test_a_batch_that_does_not_divide_is_refused(capsys):
    assert run.main(["--config", "quickstart", *SMALL, "qat.batch_size=3", "--plan", "cpu:2"]) == 2
    assert "multiple of 2" in capsys.readouterr().err


@pytest.fixture(scope="module")
def ptq_config(tmp_path_factory):
    """A config of task ptq on a model of two small layers."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "train.txt").write_text(story(0, 20))
    found = ptq_settings(folder, write_model(folder, 2))
    (folder / "config.yaml").write_text(yaml.safe_dump(found))
    return str(folder / "config.yaml")


END = ["end_to_end.steps=2", "end_to_end.batch_size=4", "end_to_end.length=24",
       "tune.epochs=1", "tune.batch_size=4", "tune.length=24"]


def test_post_training_is_planned_on_the_devices_that_it_takes(ptq_config, capsys):
    """One where no mesh is given, as in the run; what goes block by block is named."""
    code = run.main(["--config", ptq_config, *END, "--plan", "cpu:2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and found["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    assert [one["program"] for one in found["programs"]] == ["end_to_end", "decode"]
    assert found["programs"][0]["collective_bytes"] == 0
    assert found["not_planned"] == ["quantise", "tune"]


@pytest.mark.parametrize("overrides, said", [
    (["end_to_end.batch_size=3"], "end_to_end.batch_size is 3 for 2 parts"),
    (["end_to_end.accumulate=4"], "end_to_end.batch_size is 4 in 4 pieces for 2 parts"),
    (["evaluate.batch_size=5"], "evaluate.batch_size is 5 for 2 parts"),
    (["tune.batch_size=3"], "tune.batch_size is 3 for 2 parts"),
    (["end_to_end.length=4096"], "end_to_end uses sequences of 4096 tokens"),
])
def test_a_plan_refuses_what_the_run_would_refuse(ptq_config, overrides, said, capsys):
    arguments = ["--config", ptq_config, *END, *overrides, "--plan", "cpu:2", "mesh.fsdp=2"]
    assert run.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_batches_of_stages_that_are_left_out_may_have_any_size(ptq_config):
    config = load_config(RunConfig, ptq_config, ["tune.batch_size=3", "end_to_end.batch_size=5"])
    check_batches(config, 4)
    with pytest.raises(BadInput, match="calibrate.batch_size is 4 for 8 parts"):
        check_batches(config, 8)


def test_decoding_that_does_not_fit_gets_advice_that_helps_one_device(capsys):
    config, target = load_config(RunConfig, "quickstart", SMALL), find_target("cpu:1")
    plan_module._print(config, target, [plan_module.Planned("decode", {"packed": 1})],
                       {"decode": None})
    assert "lower evaluate.context" in capsys.readouterr().out


MEASURE = """
import ctypes, gc, json, re, sys
import jax, numpy as np
from rabit_jax.experiments.engine.config import load_config
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.experiments.planning.plan import planned
from rabit_jax.experiments.planning.programs import find_programs
from rabit_jax.experiments.planning.targets import find_target
from rabit_jax.train.sharding import make_mesh

def kib(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

name, overrides = sys.argv[1], sys.argv[2:]
config, target = load_config(RunConfig, "quickstart", overrides), find_target("cpu:1")
(plan,) = planned(config, target, name)
mesh = make_mesh(config.mesh, target.devices)
program = next(p for p in find_programs(config, mesh) if p.name == name)
compiled = program.function.lower(*program.arguments).compile()
def fill(s):
    # Made on the device: NumPy's memory cannot be donated, and would be copied.
    value = 1 if s.dtype == np.int32 else 0.5
    return jax.jit(lambda: jax.numpy.full(s.shape, value, s.dtype), out_shardings=s.sharding)()

def run():
    arguments = jax.block_until_ready(jax.tree.map(fill, program.arguments))
    jax.block_until_ready(compiled(*arguments))

run()  # threads and code pages that the first call brings stay
gc.collect(); ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")
before = kib("VmRSS")
run()
print(json.dumps({"planned": plan.peak, "measured": kib("VmHWM") - before}))
"""


@pytest.mark.more
@pytest.mark.parametrize("name", ["teacher", "qat"])
def test_the_peak_is_within_a_tenth_of_the_memory_that_a_step_takes(name):
    sizes = ["model.d_model=512", "model.n_layers=6", "model.n_heads=8", "model.n_kv_heads=8",
             "model.d_hidden=1536", "data.vocab_size=4096", "qat.batch_size=4",
             "teacher.batch_size=4"]
    # Without these glibc keeps what NumPy has freed, and it would count as the step's.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", MEASURE, name, *sizes], capture_output=True,
                          text=True, check=False, env={**os.environ, **allocator})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert abs(found["planned"] / found["measured"] - 1) < 0.1, found
