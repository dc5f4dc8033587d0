"""The documentation's generated pages leave nothing out, and links between files lead somewhere."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from rabit_jax.experiments.engine.config import load_config
from rabit_jax.experiments.engine.settings import RunConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PAGES = [page for page in PAGES if "_generated" not in page.parts]
LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)")


@pytest.fixture(scope="module")
def generated():
    spec = importlib.util.spec_from_file_location("docs_generated", ROOT / "docs" / "generated.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_module_has_its_place_in_the_api(generated):
    pages = "\n".join(generated.package_page(name) for name in generated.PACKAGES)
    pages += (ROOT / "docs" / "api.md").read_text()
    for room in ("rabit_jax", "kernels", "experiments"):
        for file in (ROOT / room).rglob("*.py"):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            name = name if room == "rabit_jax" else f"rabit_jax.{name}"
            assert file.name == "__init__.py" or f".. automodule:: {name}\n" in pages, name
    assert ".. autofunction:: rabit_jax.signs.ste.effective_weight\n" in pages


def test_every_setting_is_told_with_its_default(generated):
    of_a_run, _, _ = generated.config_page().partition("(settings-of-an-ablation)=")
    rows = re.findall(r"^\| `([\w.\[\]]+)` \| (.*) \|$", of_a_run, re.M)
    found = {key: [text for name, text in rows if name == key] for key, _ in rows}

    def scalars(config, key=""):
        for field in dataclasses.fields(config):
            value, dotted = getattr(config, field.name), f"{key}{field.name}"
            if dataclasses.is_dataclass(value):
                yield from scalars(value, f"{dotted}.")
            else:
                yield dotted, value

    for key, value in scalars(load_config(RunConfig, None)):
        defaults = [re.split(r"(?<!\\) \| ", text)[1] for text in found[key]]
        wanted = list(value) if isinstance(value, tuple) else value
        assert f"`{wanted!r}`".replace("|", "\\|") in defaults, key
    assert all(len(re.split(r"(?<!\\)\|", text)) == 3 for _, text in rows)
    assert "peak learning rate" in found["qat.optimizer.lr"][0]


def test_text_of_docstrings_keeps_its_signs(generated):
    lines = ["`a|b` and c*d, W_ |x|", "", "    y = x * W_hat_ |x|", "", "Back", "", "* a *b*"]
    generated.plain_docstring(None, "", "", None, None, lines)
    assert lines == [
        r"`a|b` and c\*d, W\_ \|x\|", "", "::", "", "    y = x * W_hat_ |x|", "", "Back", "",
        r"* a \*b\*",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(page):
    # Included pages are read from docs/, where their links must hold as well.
    for target, _ in LINK.findall(page.read_text()):
        assert "_generated" in target or (page.parent / target).exists(), target
