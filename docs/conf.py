"""Sphinx: `sphinx-build -W docs build/docs` makes the site (pip install '.[docs]')."""

import re
from pathlib import Path

project = "pysplice"
author = "the pysplice contributors"
copyright = author
release = re.search(r'__version__ = "(.*)"', Path("../pysplice/__init__.py").read_text())[1]
version = release

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["man"]
myst_heading_anchors = 3
nitpicky = True
html_theme = "furo"
html_title = f"pysplice {release}"
