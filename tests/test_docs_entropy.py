"""The example of docs/entropy_training.md runs as printed and does what the page says."""

import os
import re
from pathlib import Path

import torch

import skfactor

PAGE = Path(__file__).resolve().parents[1] / "docs" / "entropy_training.md"


def test_example_with_the_users_own_loop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    torch.manual_seed(0)
    names = {}
    exec(compile(code, str(PAGE), "exec"), names)
    net, x, y = names["net"], names["x"], names["y"]
    raw = 4 * sum(p.numel() for p in net.parameters())
    assert os.path.getsize("small.skf") < raw / 4
    restored = skfactor.load_into(net, "small.skf")
    assert (restored(x).argmax(1) == y).float().mean() > 0.9
