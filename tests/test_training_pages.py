# SPDX-License-Identifier: BSD-3-Clause
"""The examples of the pages on training methods run as they are printed, in a user's own loop."""

import os
import re
from pathlib import Path

import pytest
import torch

import skfactor
from tests._nets import SmallCNN

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.parametrize("page", ["deep_kmeans.md", "soft_sharing.md"])
def test_example_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S).group(1)
    assert len(code.strip().splitlines()) <= 17  # two of them are imports
    torch.manual_seed(0)
    model = SmallCNN()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loader = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 5) for _ in range(3)]
    names = {"model": model, "train_loader": loader}
    exec(code, names)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    restored = skfactor.load_into(SmallCNN(), "small.skf")
    for name, value in names["result"].model.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name])
    assert os.path.getsize("small.skf") > 0
