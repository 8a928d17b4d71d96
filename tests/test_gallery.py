"""Every script of the gallery runs from beginning to end without a screen."""
# SPDX-License-Identifier: BSD-3-Clause

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from _data import data_dir

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("plot_*.py"))
pytestmark = pytest.mark.skipif(not SCRIPTS, reason="the examples are not beside the tests")

# every figure that is open at the end must have been drawn on
RUNNER = """
import runpy, sys
import matplotlib.pyplot as plt
plt.show = lambda *a, **k: None
runpy.run_path(sys.argv[1], run_name="__main__")
figures = [plt.figure(n) for n in plt.get_fignums()]
for figure in figures:
    figure.canvas.draw()
assert figures and all(any(ax.has_data() for ax in figure.axes) for figure in figures)
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("real", [False, True], ids=["without data", "with data"])
def test_script_runs(script, real, tmp_path):
    pytest.importorskip("matplotlib")
    folder = data_dir() if real else tmp_path
    if folder is None:
        pytest.skip("real data not found")
    if real and "SKFACTOR_DATA" not in script.read_text():
        pytest.skip("this script needs no data")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {"PYTHONPATH": path, "MPLBACKEND": "Agg", "SKFACTOR_DATA": str(folder)}
    done = subprocess.run([sys.executable, "-c", RUNNER, script], capture_output=True, text=True, timeout=600,
                          env={**os.environ, **variables}, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_begins_with_its_story_and_is_in_the_gallery(script):
    story = ast.get_docstring(ast.parse(script.read_text())).splitlines()
    assert set(story[0]) == set(story[2]) == {"="}
    assert len(story[0]) == len(story[1]) == len(story[2])
    page = ROOT / "docs" / "gallery.md"
    if page.exists():
        assert script.name in page.read_text()
