"""docs/how-to/your-own-model.md: every example runs, and 2 bits come close to full precision."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "your-own-model.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^## ([^,\n]+)[^\n]*\n(?:(?!^## ).)*?^```python\n(.*?)^```", PAGE,
                           re.MULTILINE | re.DOTALL))

pytestmark = pytest.mark.more


def run(title, figures, folder):
    """What the expression `figures` is worth after the example, run as its reader runs it."""
    # One device: the eight of the tests make steps of many threads pile up on few cores.
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    code = f"import json\n{EXAMPLES[title]}\nprint(json.dumps({figures}))\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_example_of_the_page_is_run_here():
    assert list(EXAMPLES) == ["Linen", "A vision transformer", "NNX"]
    assert PAGE.count("```python") == 3


@pytest.mark.parametrize("title", ["Linen", "NNX"])
def test_a_perceptron(title, tmp_path):
    call = "with_params({})" if title == "NNX" else "{}"
    losses = [f"float(loss({call.format(n)}, held_out))" for n in ("params", "student", "trained")]
    full, start, trained = run(title, f"[{', '.join(losses)}]", tmp_path)
    assert full < trained < start
    assert trained - full < 0.3 * (start - full)


def test_a_vision_transformer(tmp_path):
    figures = "[accuracy(params), accuracy(student), accuracy(trained), accuracy(packed)]"
    shown = "[row.representation for row in describe(packed).quantised]"
    (full, start, trained, packed), kinds = run(
        "A vision transformer", f"[{figures}, {shown}]", tmp_path
    )
    assert full > 0.85  # of 8 classes, under noise
    assert max(start, full - 0.02) < trained
    assert abs(packed - trained) < 0.005
    assert kinds == 12 * ["PackedSign"]
