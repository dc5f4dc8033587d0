"""Task ptq on eight devices (2 x 2 x 2) against one: statistics, signs, tuning, scores."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

MESH = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")


@pytest.fixture(scope="module")
def folders(place, ptq):
    found = {}
    for name, mesh in (("one", ()), ("eight", MESH)):
        assert ptq(f"name={name}", *mesh) == 0
        found[name] = place / "runs" / name
    return found


@pytest.mark.more
def test_statistics_and_signs_are_those_of_one_device(folders):
    one, eight = (load_file(folders[n] / "calibration.safetensors") for n in ("one", "eight"))
    assert one.keys() == eight.keys() and one
    for name, wanted in one.items():
        np.testing.assert_allclose(eight[name], wanted, rtol=1e-5)
    one, eight = (load_file(folders[n] / "packed" / "model.safetensors") for n in ("one", "eight"))
    for name, wanted in one.items():
        if name.endswith(".bits"):
            differ = np.unpackbits(wanted ^ eight[name]).mean()
            assert differ < 1e-4, name  # near-ties alone
        else:
            np.testing.assert_allclose(
                eight[name].astype(np.float32), wanted.astype(np.float32), rtol=2e-3, atol=1e-6)


@pytest.mark.more
def test_scores_are_those_of_one_device(folders):
    one, eight = (json.loads((folders[n] / "summary.json").read_text()) for n in ("one", "eight"))
    for model in ("teacher", "packed"):
        assert eight[model]["ppl"] == pytest.approx(one[model]["ppl"], rel=1e-4)


@pytest.mark.more
def test_tuning_and_distillation_run_on_a_mesh(place, ptq):
    options = ("tune.epochs=1", "tune.sequences=12", "tune.held_out=4", "tune.batch_size=4",
               "tune.length=24", "end_to_end.steps=2", "end_to_end.batch_size=4",
               "end_to_end.length=24", "evaluate.models=[packed]")
    found = []
    for name, mesh in (("tuned-one", ()), ("tuned-eight", MESH)):
        assert ptq(f"name={name}", *options, *mesh) == 0
        found.append(json.loads((place / "runs" / name / "summary.json").read_text()))
    one, eight = found
    # Before the first step both are the same start; what follows is a trajectory of its own.
    assert eight["tune"]["before"][0] == pytest.approx(one["tune"]["before"][0], rel=1e-3)
    assert eight["packed"]["ppl"] == pytest.approx(one["packed"]["ppl"], rel=0.05)
