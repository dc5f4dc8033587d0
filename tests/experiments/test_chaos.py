"""The short form of `make chaos`: a training and a block-wise run, killed a few times each."""

import pytest

from tests.chaos.__main__ import main


@pytest.mark.more
def test_killed_and_torn_runs_end_as_undisturbed_ones(tmp_path, capfd):
    arguments = ["--kills", "6", "--seed", "1", "--only", "training", "--only", "blockwise"]
    assert main([*arguments, "--folder", str(tmp_path / "place")]) == 0, capfd.readouterr().err
    assert "equal to the undisturbed ones to the bit" in capfd.readouterr().err
