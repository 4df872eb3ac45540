"""How the documentation becomes a site: `make docs`. The pages are the Markdown files beside this one."""

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

project = "tamis"
author = "The tamis authors"
copyright = "2026, the tamis authors"
release = metadata.version("tamis")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

myst_heading_anchors = 3  # so that pages can point at one another's headings
myst_enable_extensions = ["dollarmath"]

# Public names are documented under the name a user imports them by, and types as they are written.
add_module_names = False
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "tamis"

# The tables of settings, methods and combinations are made from the code anew for every build.
sys.path.insert(0, str(Path(__file__).parent))
from api_fields import explain  # noqa: E402
from generate_tables import fill  # noqa: E402


def setup(app: Sphinx) -> None:
    """Fill the generated parts of every page before it is read, and explain the fields of every class."""

    def fresh(app: Sphinx, name: str, source: list[str]) -> None:
        source[0] = fill(source[0])

    def explained(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
        if what == "class":
            lines[:] = explain(thing, lines)

    app.connect("source-read", fresh)
    app.connect("autodoc-process-docstring", explained)
