"""Sphinx configuration: `make docs` writes the site to build/docs."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
# The packages are documented as they are imported, so nothing has to be installed.
sys.path[:0] = [str(HERE), str(HERE.parent)]

import rabit_jax  # noqa: E402

project = "rabit_jax"
author = "The rabit_jax developers"
copyright = author
version = release = rabit_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # equations without a network
    "sphinx.ext.viewcode",
    "generated",
]
smartquotes = False  # "" is a value here
html_theme = "furo"
html_title = f"rabit_jax {version}"
html_show_copyright = False
html_static_path = []

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks are shown as they were run

# Docstrings have code in single backticks, and Google's sections.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "exclude-members": "replace"}
# A type such as `Engine` in a signature may have two namesakes here.
suppress_warnings = ["ref.python"]
# Not nitpicky: the types of other libraries in the signatures have no pages here.
