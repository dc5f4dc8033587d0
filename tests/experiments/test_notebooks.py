"""The teaching notebooks: what is stored is clean and true, and each runs from top to bottom."""

import copy
import json
import math
import os
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

from rabit_jax.experiments.fetch_models import FOLDER as MODELS_FOLDER
from rabit_jax.experiments.fetch_models import MODELS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Pretrained models that a notebook reads.
MODEL = {"real_model": ROOT / MODELS_FOLDER / MODELS["smollm2-135m"].file}
ABSOLUTE = re.compile(r"(?<![\w.~])/(work|root|home|tmp|usr|opt|Users)\b|[A-Z]:\\\\")

# Jupyter, zmq and asyncio warn of their own affairs; the kernel is a process of its own.
pytestmark = pytest.mark.filterwarnings("ignore")


def names(paths):
    return [path.stem for path in paths]


def sign_bits(i, o, k):
    return k + 16 * k * (i + o) / (i * o)


def low_rank_bits(i, o, rank):
    return 2 * (rank * (i + o + 16) + 16 * (i + o)) / (i * o)


def low_rank(i, o, bits):
    """The largest multiple of 8, at least 8, that the bits pay for."""
    return max(r for r in range(8, min(i, o), 8) if r == 8 or low_rank_bits(i, o, r) <= bits)


def check_compose_transforms(found):
    i, o = found["shape"]
    assert found["bits"] == pytest.approx(sign_bits(i, o, found["k"]), rel=1e-9)
    assert found["loss_full"] < 0.5 * math.log(10)
    assert found["loss_full"] < found["loss_trained"] < found["loss_init"]
    assert found["loss_packed"] == pytest.approx(found["loss_trained"], rel=5e-3)
    assert 0 < found["pack_error"] < 2e-3  # two scales of 11 bits
    assert found["stats_apart"] < 1e-4
    assert found["nnx_init"] == pytest.approx(found["loss_calibrated"], rel=1e-3)
    assert found["nnx_trained"] < found["nnx_init"]
    rank = low_rank(i, o, 1.0)
    bits = {
        "two sign paths": sign_bits(i, o, 2),
        "groups of 64": 2 + 2 * 16 / 64,
        "groups of 64, scaled": 2 + 2 * 16 / 64 + 16 * (i + o) / (i * o),
        "one sign path": sign_bits(i, o, 1),
        "low rank + one sign path": low_rank_bits(i, o, rank) + sign_bits(i, o, 1),
    }
    assert {name: row[0] for name, row in found["compositions"].items()} == pytest.approx(bits)
    for _, start, end in found["compositions"].values():
        assert found["loss_full"] < end < start


def check_inter_path_adaptation(found):
    assert found["start_apart"] == 0
    assert set(found["points"].values()) == {11}
    start, end = found["start"], found["end"]
    for name in ("loss", "path_correlation", "residual_alignment", "slope", "relative_mse"):
        assert start["coupled"][name] == pytest.approx(start["independent"][name], rel=1e-4)
    for name, last in end.items():
        assert last["loss"] < 0.5 * start[name]["loss"]
        assert -1 < last["path_correlation"] < 1 and 0 < last["residual_alignment"] < 1
    assert end["coupled"]["path_correlation"] < 0 < end["independent"]["path_correlation"]
    assert end["coupled"]["residual_alignment"] > end["independent"]["residual_alignment"]
    assert end["coupled"]["relative_mse"] < 0.8 * end["independent"]["relative_mse"]
    assert abs(end["coupled"]["slope"] - 1) < abs(end["independent"]["slope"] - 1)
    best = found["best"]
    assert best["coupled"] < 0.9 * min(v for name, v in best.items() if name != "coupled")


def check_freezing_against_hierarchy(found):
    width = found["width"]
    bits = sign_bits(width, width, found["k"])
    assert found["bits"] == pytest.approx(dict.fromkeys(("frozen", "coupled", "uniform"), bits))
    assert found["start"]["frozen"] == pytest.approx(found["start"]["coupled"], rel=1e-5)
    for name, rows in found["ends"].items():
        assert max(max(row) for row in rows) < 0.5 * found["start"][name]
        assert found["best"][name] == pytest.approx(min(sum(row) / 2 for row in rows))
    assert found["best"]["coupled"] < found["best"]["frozen"] - found["noise"] / 2
    assert found["flips"]["frozen"][0] == 0
    for name, (first, second) in found["flips"].items():
        assert first <= second and 0 < second < 0.5
        assert first > 0 or name == "frozen"


def check_littlebit(found):
    for name, (rank, spent) in found["ranks"].items():
        (i, o), bits = map(int, name.split("@")[0].split("x")), float(name.split("@")[1])
        assert rank == low_rank(i, o, bits)
        assert spent == pytest.approx(low_rank_bits(i, o, rank))
    size = found["size"]
    wanted = {
        f"LittleBit {b}": low_rank_bits(size, size, low_rank(size, size, b))
        for b in (1.0, 0.55, 0.3)
    }
    wanted |= {
        "one sign path": sign_bits(size, size, 1),
        "two sign paths": sign_bits(size, size, 2),
    }
    wanted["LittleBit 0.55 + one sign path"] = wanted["LittleBit 0.55"] + wanted["one sign path"]
    assert {name: row[0] for name, row in found["table"].items()} == pytest.approx(wanted)
    for _, start, end in found["table"].values():
        assert 0 < end < 0.6 * start < 0.6
    ends = [found["table"][f"LittleBit {bits}"][2] for bits in (1.0, 0.55, 0.3)]
    assert ends == sorted(ends)
    gaussian = [error for _, error in found["errors"]["Gaussian|twin"]]
    assert gaussian == sorted(gaussian, reverse=True) and 0 < gaussian[-1] < gaussian[0] < 1
    blocks, matrices = llama2_13b(0.1)
    assert found["llama_kept"] == 2 * (2 * 32000 * 5120 + (2 * 40 + 1) * 5120)
    assert found["llama_bytes"] == found["llama_kept"] + blocks
    assert found["llama_bytes"] == pytest.approx(0.81e9, rel=0.01)
    assert found["llama_bits"] == pytest.approx(matrices) and matrices <= 0.1


def check_real_model(found):
    teacher, ppl, vocabulary = found["teacher"], found["ppl"], found["vocabulary"]
    assert 10 < teacher < ppl["4"] < 2 * teacher < ppl["3"] < 0.3 * vocabulary < ppl["2"]
    d, kv, hidden = 576, 192, 1536  # SmolLM2-135M; all are whole blocks of 64 signs
    shapes = [(d, d), (d, kv), (d, kv), (d, d), (d, hidden), (d, hidden), (hidden, d)]
    sizes = [i * o for i, o in shapes]
    for k, (blocks, whole) in found["bits"].items():
        stored = sum(sign_bits(i, o, int(k)) * i * o for i, o in shapes)
        assert blocks == pytest.approx(stored / sum(sizes))
        rest = found["parameters"] - 30 * sum(sizes)  # in 16 bits
        assert whole == pytest.approx((30 * stored + 16 * rest) / found["parameters"])
    assert set(found["errors"]) == {"2|0", "2|1", "4|0", "4|1"}
    for losses in found["errors"].values():
        assert 0 < min(losses) < 0.8 * losses[0] < 0.3
    assert found["tuned"] < ppl["4"]
    assert found["packed"] == pytest.approx(found["tuned"], rel=5e-3)
    tensors = found["bits"]["4"][1] * found["parameters"] / 8
    assert tensors < found["file_bytes"] < 1.01 * tensors
    assert "Paris" in found["answer"]


def llama2_13b(bits):
    """Bytes of the blocks and bits per weight, counted from the published shapes."""
    shapes = 4 * [(5120, 5120)] + 3 * [(5120, 13824)]
    stored = nominal = weights = 0
    for i, o in shapes:
        rank = low_rank(i, o, bits)
        packed = rank * 32 * (math.ceil(i / 256) + math.ceil(o / 256))
        stored += 40 * 2 * (packed + 2 * (i + o + rank))
        nominal += low_rank_bits(i, o, rank) * i * o
        weights += i * o
    return stored, nominal / weights


CHECKS = {
    "compose_transforms": check_compose_transforms,
    "inter_path_adaptation": check_inter_path_adaptation,
    "freezing_against_hierarchy": check_freezing_against_hierarchy,
    "littlebit": check_littlebit,
    "real_model": check_real_model,
}


# Run behind each notebook: what its check looks at.
FACTS = {
    "compose_transforms": """
found = {
    "loss_full": loss_full,
    "loss_init": loss_init,
    "loss_trained": loss_trained,
    "loss_packed": loss_packed,
    "loss_calibrated": loss_calibrated,
    "bits": bits,
    "shape": [256, 256],
    "k": 2,
    "pack_error": pack_error,
    "stats_apart": apart,
    "nnx_init": nnx_init,
    "nnx_trained": nnx_after,
    "compositions": table,
}
""",
    "freezing_against_hierarchy": """
found = {
    "bits": bits,
    "start": starts,
    "best": best,
    "ends": ends,
    "flips": flips,
    "width": WIDTH,
    "k": 2,
    "noise": noise,
}
""",
    "inter_path_adaptation": """
found = {
    "start_apart": apart,
    "start": {name: points[0] for name, points in history.items()},
    "end": {name: points[-1] for name, points in history.items()},
    "points": {name: len(points) for name, points in history.items()},
    "best": {name: min(end["loss"] for end in ends) for name, ends in sweep.items()},
}
""",
    "real_model": """
found = {
    "teacher": teacher_ppl,
    "ppl": {k: rows[f"{k} paths"][2] for k in students},
    "bits": {k: rows[f"{k} paths"][:2] for k in students},
    "parameters": sum(a.size for a in jax.tree.leaves(params)),
    "vocabulary": model.config.vocab_size,
    "errors": {f"{k}|{n}": losses for (k, n), losses in errors.items()},
    "tuned": tuned_ppl,
    "packed": packed_ppl,
    "file_bytes": file_bytes,
    "answer": answers[1]["content"],
}
""",
    "littlebit": """
found = {
    "ranks": ranks,
    "table": table,
    "llama_bytes": total,
    "llama_kept": kept,
    "llama_bits": abstract[0.1].bits_per_weight,
    "size": SIZE,
    "errors": {f"{n}|{'twin' if t else 'one'}": e for (n, t), e in errors.items()},
}
""",
}


def outputs(notebook):
    return [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]


def facts(notebook):
    """What the cell that was put behind the others printed, one JSON line."""
    (output,) = notebook.cells[-1].outputs
    return json.loads(output.text)


def assert_ran(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for o in outputs(notebook) if o.output_type == "error"]


def test_every_notebook_is_known():
    assert NOTEBOOKS and set(names(NOTEBOOKS)) == set(CHECKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_what_is_stored_is_clean_and_true(path):
    assert path.stat().st_size < 250_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert notebook.metadata == {"kernelspec": kernel, "language_info": {"name": "python"}}
    assert not any(cell.metadata for cell in notebook.cells)

    assert notebook.cells[0].source.startswith("# ")
    assert notebook.cells[-1].source.startswith("**Try next.**")
    assert_ran(notebook)
    kinds = {kind for o in outputs(notebook) for kind in o.get("data", {o.get("name"): None})}
    assert "image/png" in kinds and "stdout" in kinds and "stderr" not in kinds
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    assert "image/png" in {kind for o in last.outputs for kind in o.get("data", ())}

    words = copy.deepcopy(notebook)
    for output in outputs(words):
        output.get("data", {}).pop("image/png", None)  # base64 has slashes of its own
    assert ABSOLUTE.search(json.dumps(words)) is None


@pytest.mark.more
@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_it_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    if path.stem in MODEL and not MODEL[path.stem].exists():
        pytest.skip(f"{MODEL[path.stem]} is missing: `make models` downloads it")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    checked = f"{FACTS[path.stem]}import json\nprint(json.dumps(found))"
    notebook.cells.append(nbformat.v4.new_code_cell(checked))
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    # The one device that a reader has, not the eight that this suite simulates.
    client.execute(env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"})
    assert_ran(notebook)
    CHECKS[path.stem](facts(notebook))
