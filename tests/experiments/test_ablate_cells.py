"""Rows, cells and configs of an ablation, and every input that is refused before a run starts."""

import sys
from pathlib import Path

import pytest
import yaml

from rabit_jax import BadInput
from rabit_jax.experiments import ablate
from rabit_jax.experiments.ablation.cells import differing, make_plan
from rabit_jax.experiments.engine.config import load_config
from rabit_jax.experiments.engine.settings import RunConfig

CONFIGS = Path(ablate.__file__).parent / "configs"
SMALL = {
    "name": "small",
    "seeds": [3, 1],
    "run": {"qat": {"steps": 41, "optimizer": {"lr": 1e-2}}, "init": {"spec": {"rounds": 10}}},
    "rows": {"plain": [], "greedy start": ["init.spec.rounds=0"]},
}


@pytest.fixture
def plan(tmp_path):
    def make(overrides=(), **changes):
        file = tmp_path / "ablation.yaml"
        file.write_text(yaml.safe_dump(SMALL | changes, sort_keys=False))
        return make_plan(file, overrides)

    return make


def test_cells_go_seed_by_seed_then_the_single_rows(plan):
    found = plan(single={"gentle": ["qat.optimizer.lr=1e-4"]}).cells({})
    assert [(cell.row, cell.seed) for cell in found] == [
        ("plain", 3), ("greedy start", 3), ("plain", 1), ("greedy start", 1), ("gentle", 3),
    ]  # fmt: skip
    assert [str(cell.folder) for cell in found[1:3]] == [
        "runs/small/cells/greedy-start/seed-3", "runs/small/cells/plain/seed-1",
    ]  # fmt: skip


def test_a_cell_is_the_run_with_its_overrides_place_seed_and_teacher(plan):
    made = plan(["run.qat.steps=7"])
    cell = made.cells({})[1]
    assert cell.config.init.spec.rounds == 0 and cell.config.qat.steps == 7
    assert cell.config.seed == 3 and cell.config.qat.optimizer.lr == 1e-2
    assert cell.config.teacher.path == "runs/small/teacher/teacher"
    for run in (cell, made.teacher):
        assert Path(run.config.output) / run.config.name == run.folder
    assert made.teacher.config.teacher.path == "" and made.teacher.config.seed == 0
    assert cell.file == Path("runs/small/cells/greedy-start/seed-3.yaml")


def test_a_given_teacher_is_that_of_every_cell(plan):
    made = plan(["run.teacher.path=/models/a"], single={"b": ["teacher.path=/models/b"]})
    assert made.teacher is None
    paths = [cell.config.teacher.path for cell in made.cells({})]
    assert paths == ["/models/a"] * 4 + ["/models/b"]


def test_the_grid_is_the_product_of_its_axes(plan):
    grid = {
        "start": {"fitted": [], "greedy": ["init.spec.rounds=0"]},
        "loss": {"KL": ["qat.gamma=0"], "both": ["qat.gamma=2"]},
    }
    made = plan(rows={}, grid=grid)
    assert [row.label for row in made.rows] == [
        "fitted, KL", "fitted, both", "greedy, KL", "greedy, both",
    ]  # fmt: skip
    found = made.rows[3].config
    assert found.init.spec.rounds == 0 and found.qat.gamma == 2
    assert differing(made, made.rows[1]) == ["qat.gamma: 1.0 -> 2.0"]


def test_a_search_is_made_for_each_row_that_is_not_single(plan):
    made = plan(
        search={"values": [1e-3, 3e-3], "steps": 0.5},
        single={"gentle": ["qat.optimizer.lr=1e-4"], "as it is": []},
    )
    trials = made.trials()
    assert [(cell.row, cell.value, cell.seed) for cell in trials] == [
        ("plain", 1e-3, 4), ("plain", 3e-3, 4), ("greedy start", 1e-3, 4), ("greedy start", 3e-3, 4)
    ]  # fmt: skip
    # Neither a seed nor a window of the tables takes part in the search.
    assert 4 not in made.ablation.seeds
    assert {cell.config.evaluate.part for cell in trials} == {"search"}
    every = [cell for cell in made.cells({"plain": 1e-3, "greedy start": 1e-3}) if cell.config]
    assert {cell.config.evaluate.part for cell in every} == {"report"}
    assert {cell.config.qat.steps for cell in trials} == {20}
    assert [cell.config.qat.optimizer.lr for cell in trials[:2]] == [1e-3, 3e-3]
    assert str(trials[1].folder) == "runs/small/search/plain/0.003"
    cells = made.cells({"plain": 3e-3})
    assert [c.config and c.config.qat.optimizer.lr for c in cells] == [
        3e-3, None, 3e-3, None, 1e-4, 1e-2,
    ]  # fmt: skip
    assert cells[0].config.qat.steps == 41
    assert differing(made, made.rows[0]) == ["qat.optimizer.lr: searched"]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"rows": {}}, "there is no row"),
        ({"grid": {"loss": {}}}, "the axis 'loss' of the grid has no choices"),
        ({"seeds": []}, "seeds are []"),
        ({"seeds": [0, 1, 0]}, "none twice"),
        ({"seeds": [-1]}, "none negative"),
        ({"single": {"plain": ["qat.gamma=0"]}}, "two rows are called 'plain'"),
        ({"rows": {"a": [], "b": []}}, "'a' and 'b' are the same run"),
        ({"single": {"same": ["init.spec.rounds=0"]}}, "'greedy start' and 'same' are the same"),
        ({"rows": {"A b": [], "a-b": ["qat.gamma=0"]}}, "share the folder a-b"),
        ({"rows": {"??": []}}, "'??' gives no name for a folder"),
        ({"rows": {"a": ["qat.stepz=3"]}}, "row 'a': unknown config key 'qat.stepz': the nearest "
         "key is 'qat.steps'"),
        ({"rows": {"a": ["qat.steps=many"]}}, "row 'a': the config key 'qat.steps' is 'many'"),
        ({"rows": {"a": ["qat.steps"]}}, "row 'a': the override 'qat.steps' is not of the form"),
        ({"rows": {"a": ["qat.steps=0"]}}, "row 'a': the config key 'qat.steps' is 0"),
        ({"rows": {"a": ["seed=3"]}}, "row 'a' sets seed"),
        ({"rows": {"a": ["teacher.steps=3"]}}, "the teacher is shared"),
        ({"rows": {"a": ["model.n_layers=3"]}}, "the teacher is shared"),
        ({"compare": {"x": ["plain", "greedy"]}}, "nearest row is 'greedy start'"),
        ({"compare": {"x": ["plain"]}}, "wanted 2 values"),
        ({"search": {"values": [1e-3]}}, "two or more different"),
        ({"search": {"values": [1e-3, 1e-3]}}, "two or more different"),
        ({"search": {"values": [1e-3, 3e-3], "steps": 0}}, "a share of qat.steps"),
        ({"search": {"values": [1, 2], "key": "qat.gama"}}, "search: unknown config key 'qat.gama'"
         ": the nearest key is 'qat.gamma'"),
        ({"search": {"values": [1, 2], "key": "qat.gamma"}, "rows": {"a": ["qat.gamma=3"]}},
         "row 'a' sets qat.gamma, which the search chooses"),
        ({"name": "a/b"}, "no '/'"),
        ({"run": {"qat": {"stepz": 1}}}, "'run.qat.stepz'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_exit_2_and_nothing_written(
    tmp_path, monkeypatch, capsys, changes, said
):
    monkeypatch.chdir(tmp_path)
    Path("ablation.yaml").write_text(yaml.safe_dump(SMALL | changes, sort_keys=False))
    assert ablate.main(["--config", "ablation.yaml"], [sys.executable, "-c", "1/0"]) == 2
    err = capsys.readouterr().err
    assert said in " ".join(err.split()) and err.count("error: ") == 1 and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["ablation.yaml"]


def test_the_shipped_ablation_is_two_starts_of_the_quickstarts_model():
    made = make_plan(CONFIGS / "ablation_small.yaml")
    quickstart = load_config(RunConfig, CONFIGS / "quickstart.yaml")
    assert len(made.cells({})) == 4 and made.ablation.search is None
    for row in made.rows:
        assert row.config.model == quickstart.model and row.config.data == quickstart.data
        assert row.config.init.spec.rounds == 0


def test_dry_run_prints_the_cells_and_refuses_what_a_run_would(place, monkeypatch, capsys):
    """`place` has text for real: see conftest.py."""
    monkeypatch.chdir(place)
    run = yaml.safe_load((place / "config.yaml").read_text())
    config = {
        "name": "dry",
        "seeds": [0, 1],
        "run": run,
        "rows": {"plain": [], "greedy": ["init.spec.rounds=0"]},
        "search": {"values": [1e-3, 3e-3]},
    }
    Path("ablation.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert ablate.main(["--config", "ablation.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "8 cells" in out and "init.spec.rounds: 10 -> 0" in out and "2,048" in out
    assert "training tokens of all cells: 12,288" in out
    config["rows"]["none"] = ["init.quantise=[layers/nothing/kernel]"]
    Path("ablation.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert ablate.main(["--config", "ablation.yaml", "--dry-run"]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "row 'none'" in err and "matches no parameter" in err
    assert not (place / "runs").exists()


def test_without_a_search_all_windows_are_reported(plan):
    assert {cell.config.evaluate.part for cell in plan().cells({})} == {"all"}


def test_the_config_of_a_run_is_not_taken_for_an_ablation():
    with pytest.raises(BadInput, match="quickstart is the config of a run .* in its section run"):
        make_plan("quickstart")
