"""The benchmark harness on tiny data, with scikit-learn as the only peer."""
# SPDX-License-Identifier: BSD-3-Clause

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "examples" / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the examples are not beside the tests")


def run(script, *arguments):
    """Run a script of the benchmarks as a user would; returns what it printed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, BENCHMARKS / script, *arguments], capture_output=True, text=True,
                          timeout=300, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Results of three solvers on the tiny scalar case, in the folder that `tables.py` reads."""
    folder = tmp_path_factory.mktemp("results")
    chosen = ("skfactor solver", "skfactor certified", "scikit-learn KMeans")
    solvers = [a for name in chosen for a in ("--solver", name)]
    run("kmeans_scalar.py", "--tiny", "--repeat", "2", "--threads", "1", *solvers,
        "--output", folder / "kmeans_scalar_1t.json")
    return folder


def test_results_hold_time_memory_and_error(measured):
    found = json.loads((measured / "kmeans_scalar_1t.json").read_text())
    assert found["settings"] == {"threads": 1, "repeat": 2, "budget_s": 20.0, "tiny": True}
    runs = {r["solver"]: r for r in found["runs"]}
    assert [r["status"] for r in runs.values()] == ["ok"] * 3
    for r in runs.values():
        assert len(r["wall_s"]) == len(r["cpu_s"]) == 2
        assert min(r["wall_s"]) > 0
    bound = runs["skfactor certified"]["objective"]["lower_bound"]
    ours, sklearn = (runs[name]["objective"]["inertia"] for name in ("skfactor solver", "scikit-learn KMeans"))
    assert bound * (1 - 1e-9) <= ours <= sklearn * (1 + 1e-6)


def test_results_name_no_machine(measured):
    text = (measured / "kmeans_scalar_1t.json").read_text()
    assert platform.node() not in text
    assert str(Path.home()) not in text
    assert str(ROOT) not in text


def test_tables_take_their_numbers_from_the_results(measured, tmp_path):
    page = tmp_path / "benchmarks.md"
    run("tables.py", "--results", measured, "--output", page)
    found = json.loads((measured / "kmeans_scalar_1t.json").read_text())
    text = page.read_text()
    assert "### gauss, K = 16" in text
    for r in found["runs"]:
        line = next(line for line in text.splitlines() if line.startswith(f"| {r['solver']} |"))
        assert f"{min(r['wall_s']):.3g}" in line


def test_missing_package_is_reported(tmp_path):
    """A solver whose import fails is left out with the name of what is missing."""
    script = tmp_path / "broken.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import numpy as np\n"
        "from harness import Benchmark\n"
        "bench = Benchmark('broken', 'x', cases=[], tiny_cases=[{'dataset': 'zeros'}])\n"
        "bench.datasets = {'zeros': lambda tiny: np.zeros(4)}\n"
        "@bench.objective\n"
        "def nothing(x, result): return {}\n"
        "@bench.solver('absent')\n"
        "def absent():\n"
        "    import no_such_package\n"
        "@bench.solver('failing')\n"
        "def failing():\n"
        "    def run(x): raise ValueError('as planned')\n"
        "    return run\n"
        "bench.main()\n")
    output = tmp_path / "broken.json"
    run(script, "--tiny", "--output", output)
    absent, failing = json.loads(output.read_text())["runs"]
    assert (absent["status"], absent["missing"]) == ("not installed", "no_such_package")
    assert failing["status"] == "failed: ValueError: as planned"


def test_memory_script(tmp_path):
    output = tmp_path / "memory.json"
    run("memory_1gb.py", "--tiny", "--bytes", "1.5e8", "--coder", "ans", "--output", output)
    found = json.loads(output.read_text())
    assert found["source_bytes"] > found["largest_tensor_bytes"]
    assert 0 < found["worst_relative_error"] < 0.02  # 16 levels of a Gaussian: 0.0095 at the optimum
    assert found["file_bytes"] < found["source_bytes"] / 7
