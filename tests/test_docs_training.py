"""The examples of docs/training.md run, in the order in which they stand on the page."""
# SPDX-License-Identifier: BSD-3-Clause

import re
from pathlib import Path

import skfactor

PAGE = Path(__file__).resolve().parents[1] / "docs" / "training.md"


def test_examples_run_as_they_stand(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), namespace)
    loss, n_bytes = map(float, capsys.readouterr().out.split())
    assert loss > 0
    assert n_bytes > 0
    state = skfactor.load(tmp_path / "deep_compression.skf")
    weights = [state["0.weight"], state["2.weight"]]
    assert sum(int((w == 0).sum()) for w in weights) >= 0.8 * sum(w.numel() for w in weights)
    assert len(skfactor.load(tmp_path / "shared.skf")["0.weight"].unique()) <= 8


def test_the_own_loop_is_short():
    own = PAGE.read_text(encoding="utf-8").partition("## Your own loop")[2]
    block = re.search(r"```python\n(.*?)```", own, re.S)[1].strip().splitlines()
    start = next(i for i, line in enumerate(block) if line.startswith("method"))
    assert len(block[start:]) <= 15
