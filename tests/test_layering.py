"""Imports inside skfactor/ point down the order of layers, also inside functions."""
# SPDX-License-Identifier: BSD-3-Clause

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ORDER = [
    {"exceptions", "_validation", "_sklearn"},
    {"solvers"},
    {"codec"},
    {"estimators"},
    {"selection", "plotting", "report"},
    {"bridge"},
    {"demo", "cli"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
TORCH_FROM = LEVEL["bridge"]
TORCH_TRAINED = {"estimators/autoencoder.py", "estimators/deep_kmeans.py"}  # may import torch below the bridge


def imported_names(tree):
    """Every dotted name imported anywhere in a file, function bodies included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def violations(root):
    for path in sorted((root / "skfactor").rglob("*.py")):
        inside = path.relative_to(root / "skfactor").as_posix()
        me = inside.split("/")[0].removesuffix(".py")
        if me == "__init__":
            continue
        if me not in LEVEL:
            yield f"{inside}: {me} is not a known layer"
            continue
        for name in imported_names(ast.parse(path.read_text())):
            head, _, rest = name.partition(".")
            you = rest.partition(".")[0]
            if name.startswith("."):
                yield f"{inside}: relative import {name}"
            if head == "skfactor" and you in LEVEL and LEVEL[you] > LEVEL[me]:
                yield f"{inside}: {me} imports {you}"
            if head == "torch" and LEVEL[me] < TORCH_FROM and inside not in TORCH_TRAINED:
                yield f"{inside}: {me} imports torch"
            private = any(part.startswith("_") and not part.startswith("__") for part in rest.split("."))
            if head == "sklearn" and private and me != "_sklearn":
                yield f"{inside}: {me} imports private {name}"


def test_imports_point_down():
    assert list(violations(ROOT)) == []


def test_violations_are_found(tmp_path):
    package = tmp_path / "skfactor"
    files = {
        "exceptions.py": "def f():\n    from skfactor.bridge import compress\n",
        "solvers/a.py": "import torch\nimport skfactor.codec.tensor\n",
        "codec/b.py": "from sklearn.base import _fit_context\nfrom . import tensor\n",
        "nowhere.py": "",
        "cli.py": "import torch\nfrom skfactor.solvers import a\n",
    }
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    found = list(violations(tmp_path))
    assert len(found) == 6
    assert not any(line.startswith("cli.py") for line in found)


def test_import_is_light():
    code = "import sys, skfactor; print([m for m in ('torch', 'matplotlib', 'pandas', 'numba') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
