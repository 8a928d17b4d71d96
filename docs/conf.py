"""Sphinx configuration: `sphinx-build docs docs/_build`."""
# SPDX-License-Identifier: BSD-3-Clause

import skfactor

project = "skfactor"
author = "The skfactor developers"
release = skfactor.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.extlinks", "numpydoc", "myst_parser"]
autosummary_generate = True
numpydoc_show_class_members = False
extlinks = {"doi": ("https://doi.org/%s", "doi:%s"), "arxiv": ("https://arxiv.org/abs/%s", "arXiv:%s")}
exclude_patterns = ["_build"]
html_theme = "alabaster"
suppress_warnings = ["myst.header"]
