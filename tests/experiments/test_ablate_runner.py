"""Cells as processes: order, stopping and going on, failing, several at once; and a real one.

The cells are those of `ablation_cell.py`, which writes what a run would; see there for its orders.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rabit_jax.experiments import ablate
from rabit_jax.experiments.ablation.runner import Runner

ROOT = Path(__file__).parents[2]
FAKE = [sys.executable, str(Path(__file__).with_name("ablation_cell.py"))]
CONFIG = {
    "name": "abl",
    "seeds": [0, 1],
    "run": {"qat": {"steps": 40, "optimizer": {"lr": 1e-2}}, "init": {"spec": {"rounds": 10}}},
    "rows": {"plain": [], "greedy": ["init.spec.rounds=0"]},
    "single": {"gentle": ["qat.optimizer.lr=1e-4"]},
    "search": {"values": [1e-3, 3e-3]},
    "compare": {"start": ["plain", "greedy"]},
}
TABLES = ("ablation.csv", "ablation.md", "ablation.html")
TRIALS = [f"search/{row}/{value}" for row in ("plain", "greedy") for value in ("0.001", "0.003")]
CELLS = [f"cells/{row}/seed-{seed}" for seed in (0, 1) for row in ("plain", "greedy")]
CELLS.append("cells/gentle/seed-0")


class Place:
    """A working folder with an ablation of fake cells."""

    def __init__(self, folder):
        self.folder, self.made = folder, folder / "runs" / "abl"
        self.write(CONFIG)

    def write(self, config):
        (self.folder / "ablation.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    def order(self, **orders):
        (self.folder / "orders.json").write_text(json.dumps(orders))

    def run(self, *arguments):
        return ablate.main(["--config", "ablation.yaml", *arguments], FAKE)

    def started(self):
        """What was started since the last look: (folder below the ablation's, arguments)."""
        file = self.folder / "started.txt"
        lines = file.read_text().splitlines() if file.exists() else []
        file.write_text("")
        found = [line.removeprefix("runs/abl/").split(" ", 1) for line in lines]
        return [(folder, rest.rsplit(" ", 1)[0]) for folder, rest in found]

    def tables(self):
        return [(self.made / name).read_bytes() for name in TABLES]


@pytest.fixture(scope="module", autouse=True)
def _no_figures():
    """Drawing takes longer than these cells; test_ablate_table.py draws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablate, "figures", lambda results: {})
        yield


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Tables of the ablation that nothing disturbed."""
    place, before = Place(tmp_path_factory.mktemp("whole")), os.getcwd()
    os.chdir(place.folder)
    try:
        assert place.run() == 0
    finally:
        os.chdir(before)
    return place


def test_teacher_then_search_then_seed_by_seed_and_nothing_twice(whole, here):
    assert whole.started() == [
        ("teacher", "--resume --until teacher"),
        *((name, "--resume") for name in TRIALS + CELLS),
    ]
    for name in ("config.yaml", *TABLES, "teacher/log.txt"):
        assert (whole.made / name).exists(), name
    os.chdir(whole.folder)
    before = whole.tables()
    assert whole.run() == 0 and whole.started() == []
    assert whole.run("--table") == 0 and whole.started() == []
    assert whole.tables() == before


def test_two_at_once_give_the_same_tables_each_on_its_cores(whole, here):
    assert here.run("--jobs", "2") == 0
    cores = {line.rsplit(" ", 1)[1] for line in Path("started.txt").read_text().splitlines()}
    if hasattr(os, "sched_getaffinity"):
        assert cores == {str(max(1, len(os.sched_getaffinity(0)) // 2))}
    assert sorted(name for name, _ in here.started()) == sorted(["teacher", *TRIALS, *CELLS])
    assert here.tables() == whole.tables()


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize("where", ["teacher", "search/greedy/0.001", "cells/greedy/seed-1"])
def test_stopped_and_started_again_is_the_undisturbed_ablation(whole, here, capsys, where, jobs):
    here.order(**{where: "stop"})
    assert here.run("--jobs", jobs) == 75
    err = capsys.readouterr().err
    assert err.count("the same command goes on from there") == 1
    assert f"{where}/log.txt" in err and "stopped; --resume continues" in err
    done = {name for name, _ in here.started()} - {where}
    here.order()
    assert here.run("--jobs", jobs) == 0
    again = here.started()
    assert (where, "--resume" + " --until teacher" * (where == "teacher")) in again
    assert not done & {name for name, _ in again}
    assert here.tables() == whole.tables()


def test_a_terminal_that_closes_is_no_second_signal(monkeypatch):
    runner, told = Runner(), []
    monkeypatch.setattr(runner, "_interrupt", lambda: told.append(1))
    with runner.signals():
        for number, wanted in ((signal.SIGHUP, 1), (signal.SIGHUP, 1), (signal.SIGTERM, 2)):
            signal.raise_signal(number)
            assert runner.stopped and len(told) == wanted


def test_killed_without_notice_it_goes_on_and_no_cell_is_worked_on_twice(whole, here, capsys):
    here.order(**{"cells/plain/seed-1": "kill"})
    start = f"ablate.main(sys.argv[1:], {FAKE!r})"
    code = f"import sys; from rabit_jax.experiments import ablate; {start}"
    killed = subprocess.run(
        [sys.executable, "-c", code, "--config", "ablation.yaml"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    here.order()
    # The cell that was being run is still there, and holds the folder.
    assert here.run() == 2
    assert "or by a process that it started" in " ".join(capsys.readouterr().err.split())
    assert len(here.started()) == 1 + len(TRIALS) + 3
    (here.folder / "go").touch()
    for _ in range(2000):
        time.sleep(0.05)
        if (code := here.run()) != 2:
            break
    assert code == 0
    # It was completed by then, and is not run again.
    assert [name for name, _ in here.started()] == CELLS[3:]
    assert here.tables() == whole.tables()


@pytest.mark.parametrize(
    "order, code, said",
    [("crash", 1, "ZeroDivisionError: a | bug"), ("refuse", 2, "error: the mesh does not fit")],
)
def test_a_failing_cell_is_shown_and_the_others_go_on(whole, here, capsys, order, code, said):
    here.order(**{"cells/greedy/seed-0": order})
    assert here.run() == code
    err = capsys.readouterr().err
    assert f"greedy, seed 0: failed, exit code {code}: {said}" in err
    assert [name for name, _ in here.started()] == ["teacher", *TRIALS, *CELLS]
    text = (here.made / "ablation.md").read_text()
    assert "1 of 9 cells are missing" in text and "| greedy | 1 of 2 |" in text
    assert f"greedy, seed 0: runs/abl/cells/greedy/seed-0 ends with: {said}".replace(
        "|", "\\|"
    ) in (text)
    here.order()
    assert here.run() == 0
    assert here.started() == [("cells/greedy/seed-0", "--resume")]
    assert here.tables() == whole.tables()


def test_a_failing_teacher_ends_it(here, capsys):
    here.order(teacher="refuse")
    assert here.run() == 2
    assert [name for name, _ in here.started()] == ["teacher"]
    assert "the mesh does not fit" in capsys.readouterr().err


def test_rows_without_any_trial_are_not_run_and_named(here):
    here.order(**{"greedy/0.001": "crash", "greedy/0.003": "refuse"})
    assert here.run() == 1
    assert "cells/greedy/seed-0" not in [name for name, _ in here.started()]
    assert "greedy, seed 1: its search has no result" in (here.made / "ablation.md").read_text()


def test_what_a_change_affects_is_run_again_and_not_resumed(here):
    here.write(CONFIG | {"search": None})
    assert here.run() == 0
    here.started()
    rows = {"plain": ["qat.gamma=2"], "greedy": CONFIG["rows"]["greedy"]}
    here.write(CONFIG | {"search": None, "rows": rows})
    assert here.run("--table") == 0
    assert "2 of 5 cells are missing" in (here.made / "ablation.md").read_text()
    assert here.run() == 0
    assert here.started() == [("cells/plain/seed-0", ""), ("cells/plain/seed-1", "")]
    # Another teacher at the same place: the cells' configs are what they were.
    assert here.run("run.seed=5") == 0
    assert [name for name, _ in here.started()] == ["teacher", *CELLS]


@pytest.mark.parametrize("content", ["", '{"qat": {"ppl": ', "[]"])
def test_a_cell_with_a_damaged_summary_is_run_again(here, content):
    here.write(CONFIG | {"search": None, "single": {}, "seeds": [0]})
    assert here.run() == 0
    here.started()
    tables = here.tables()
    (here.made / "cells/plain/seed-0/summary.json").write_text(content)
    assert here.run() == 0
    assert here.started() == [("cells/plain/seed-0", "--resume")] and here.tables() == tables


def test_cells_of_a_later_version_are_refused_and_stay(here, capsys):
    here.write(CONFIG | {"search": None, "single": {}, "seeds": [0]})
    assert here.run() == 0
    cell = here.made / "cells/plain/seed-0"
    (cell / "stages").mkdir()
    (cell / "stages/qat.json").write_text('{"versions": {"rabit_jax": "9.1"}}')
    (cell / "config.yaml").write_text("of tomorrow: 1")
    before = here.tables()
    for more in ([], ["--table"]):
        assert here.run(*more) == 2
        assert "plain/seed-0 was written by version 9.1" in capsys.readouterr().err
    assert here.tables() == before and (cell / "summary.json").exists()


@pytest.mark.parametrize(
    "arguments, said", [(["--jobs", "0"], "--jobs is 0"), (["--table"], "there is no folder")]
)
def test_arguments_that_cannot_be(here, capsys, arguments, said):
    assert here.run(*arguments) == 2
    assert said in capsys.readouterr().err and not here.made.exists()


def test_a_folder_that_cannot_be_written(here, capsys):
    assert here.run("output=/dev/null/runs") == 2
    assert "/dev/null/runs/abl" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_ablation_stopped_once(place):
    """Two rows x one seed through real runs: `place` has their text, see conftest.py."""
    config = {
        "name": "real",
        "output": str(place / "runs"),
        "seeds": [0],
        "run": yaml.safe_load((place / "config.yaml").read_text()),
        "rows": {"fitted": [], "greedy": ["init.spec.rounds=0"]},
        "compare": {"start": ["fitted", "greedy"]},
    }
    (place / "ablation.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    command = [
        sys.executable, "-m", "rabit_jax.experiments.ablate",
        "--config", str(place / "ablation.yaml"),
    ]
    folder = place / "runs" / "real"
    first = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        for _ in range(6000):
            time.sleep(0.1)
            if (folder / "cells/greedy/seed-0/stages/calibrate.json").exists() or first.poll():
                break
    finally:
        first.terminate()
    assert first.wait() == 75
    text = (folder / "ablation.md").read_text()
    assert "1 of 2 cells are missing" in text and "greedy, seed 0" in text
    before = (folder / "cells" / "fitted" / "seed-0" / "summary.json").stat().st_mtime_ns
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    assert (folder / "cells" / "fitted" / "seed-0" / "summary.json").stat().st_mtime_ns == before
    text = (folder / "ablation.md").read_text()
    assert "all 2 are complete" in text and "| fitted | 1 |" in text
    found = [
        json.loads((folder / "cells" / row / "seed-0" / "summary.json").read_text())
        for row in ("fitted", "greedy")
    ]
    assert found[0]["teacher"]["ppl"] == found[1]["teacher"]["ppl"]
    assert found[0]["tokens"]["teacher"] == 0 and found[0]["init"]["ppl"] != found[1]["init"]["ppl"]
    assert (folder / "figures" / "perplexity.svg").exists()
