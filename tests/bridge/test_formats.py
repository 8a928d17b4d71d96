"""choose_formats: budgets kept, choices checked against brute force over made-up times."""
# SPDX-License-Identifier: BSD-3-Clause

from itertools import product

import pytest
import torch
from torch import nn

import skfactor
from skfactor.bridge import formats as module
from skfactor.bridge import replace
from skfactor.bridge.formats import LayerFormat

SHAPE = (1, 8, 9, 9)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1))


@pytest.fixture
def made_up_times(monkeypatch):
    """Chains take a time that follows from their number of weights, dense layers twice the longest."""
    def seconds(layers, inputs):
        sizes = [sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Conv2d) and m is not layer)
                 for layer in layers[1:]]
        return [4000.0, *(float(s) for s in sizes)]

    monkeypatch.setattr(replace, "layer_latencies", seconds)


def test_every_layer_keeps_to_the_budget_and_runs(made_up_times):
    x = torch.randn(SHAPE)
    choice = skfactor.choose_formats(net(), 0.4, calibration=torch.randn(20, *SHAPE[1:]), progress=False)
    assert set(choice.rules) == {"0", "2", "*"}  # the layer of one pixel has no format
    assert max(row.share for row in choice.rows) <= 0.4
    for tensor in ("0.weight", "2.weight"):
        found = [row for row in choice.rows if row.tensor == tensor]
        (chosen,) = [row for row in found if row.chosen]
        assert chosen.error == min(row.error for row in found)
    result = skfactor.compress(net(), choice.rules, mode="factorized", execute="auto", example_inputs=x, progress=False)
    assert result.model(x).shape == (1, 4, 5, 5)
    assert "coupled CP" in str(choice)


def test_a_latency_is_kept_to_with_the_least_errors(made_up_times):
    inputs = torch.randn(SHAPE)
    free = skfactor.choose_formats(net(), 0.6, example_inputs=inputs, progress=False)
    tensors = sorted({row.tensor for row in free.rows})
    options = [[row for row in free.rows if row.tensor == t] for t in tensors]
    for share in (0.1, 0.15, 0.2):
        allowed = [c for c in product(*options) if sum(r.seconds for r in c) <= share * 8000]
        if not allowed:
            with pytest.raises(ValueError, match="max_latency must be at least"):
                skfactor.choose_formats(net(), 0.6, example_inputs=inputs, max_latency=share, progress=False)
            continue
        best = min(sum(r.error for r in c) for c in allowed)
        found = skfactor.choose_formats(net(), 0.6, example_inputs=inputs, max_latency=share, progress=False)
        chosen = [row for row in found.rows if row.chosen]
        assert sum(row.seconds for row in chosen) <= share * 8000
        assert sum(row.error for row in chosen) == pytest.approx(best, rel=1e-6)


def test_of_formats_that_are_not_faster_none_is_preferred_for_its_speed():
    rows = {"w": [LayerFormat("w", "a", 0.5, 0.3, 1.0, 2.0), LayerFormat("w", "b", 0.5, 0.1, 2.0, 2.0)]}
    assert module._least_errors(rows) == {"w": 0}  # b has less error but is no faster than the dense layer
    rows = {"w": [LayerFormat("w", "a", 0.5, 0.3, 2.0, 2.0), LayerFormat("w", "b", 0.5, 0.1, 2.0, 2.0)]}
    assert module._least_errors(rows) == {"w": 1}


def test_mistakes():
    with pytest.raises(ValueError, match="budget must be"):
        skfactor.choose_formats(net(), 1.5, example_inputs=torch.randn(SHAPE))
    with pytest.raises(ValueError, match="more than one pixel"):
        skfactor.choose_formats(nn.Linear(3, 3), example_inputs=torch.randn(1, 3))
