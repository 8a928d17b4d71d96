"""The Fisher diagonal against its formula for logistic regression and against one gradient after the other."""
# SPDX-License-Identifier: BSD-3-Clause

import copy

import numpy as np
import pytest
import torch
from torch import nn

import skfactor
from skfactor.bridge import fisher_diagonal
from skfactor.bridge.calibrate import prediction_probe
from tests._nets import SmallCNN
from tests.bridge.test_calibrate import Recorder, randn


def test_formula_of_logistic_regression():
    """diag(F) of W[c, j] is E x_j^2 p_c (1 - p_c)."""
    model, x = nn.Linear(5, 3, dtype=torch.float64), randn(20_000, 5, dtype=torch.float64) * torch.arange(1.0, 6.0)
    found = fisher_diagonal(model, x).importances["weight"]
    with torch.no_grad():
        p = torch.softmax(model(x), 1)
    expected = ((p * (1 - p)).t() @ x**2 / len(x)).numpy()
    np.testing.assert_allclose(found, expected / expected.mean(), rtol=0.06)


def test_one_gradient_after_the_other():
    model, x = SmallCNN().double().train(), randn(6, 3, 8, 8, dtype=torch.float64)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    found = fisher_diagonal(model, x, temperature=2.0, random_state=3)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        v = prediction_probe(model(x), 2.0, torch.Generator().manual_seed(3))
    for name, p in model.named_parameters():
        if p.dim() < 2:
            assert name not in found.importances
            continue
        squares = sum(torch.autograd.grad((model(x[i : i + 1]) * v[i]).sum(), p)[0] ** 2 for i in range(len(x)))
        expected = squares.reshape(len(p), -1).numpy()
        np.testing.assert_allclose(found.importances[name], expected / expected.mean(), rtol=1e-9)


def test_probe_has_the_covariance_of_the_prediction():
    logits, generator = randn(1, 4, dtype=torch.float64), torch.Generator().manual_seed(0)
    v = prediction_probe(logits.expand(200_000, 4), 1.5, generator)
    p = torch.softmax(logits[0] / 1.5, 0)
    torch.testing.assert_close(v.t() @ v / len(v), (torch.diag(p) - torch.outer(p, p)) / 1.5**2, rtol=0, atol=2e-3)


def test_every_layer_gets_its_own_and_codes_follow_it():
    model, x = SmallCNN(), randn(8, 3, 8, 8)
    importance = fisher_diagonal(model, x)
    result = skfactor.compress(model, Recorder(), calibration=importance, progress=False)
    for name, value in importance.importances.items():
        given = result.estimators_[name].given_["importance"]
        np.testing.assert_array_equal(given, value)
    sharer = skfactor.KMeansWeightSharer(8)  # optimal for the weights it is given
    weighted = skfactor.compress(model, sharer, calibration=importance, progress=False)
    plain = skfactor.compress(model, sharer, progress=False)

    def cost(result):
        return sum(float((importance.importances[n] * (before - after).reshape(len(before), -1).numpy() ** 2).sum())
                   for n, before in model.state_dict().items() if n in importance.importances
                   for after in [result.state_dict()[n]])

    assert cost(weighted) < cost(plain)


def test_weights_without_influence_and_networks_that_do_not_split():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    found = fisher_diagonal(Half(), randn(5, 3))
    assert list(found.importances) == ["used.weight"]
    assert found.missing == {"unused.weight": "the outputs do not depend on it"}

    class Reads(Half):
        def forward(self, x):
            return self.used(x) * (1.0 if float(x.sum()) > 0 else 2.0)

    with pytest.raises(ValueError, match="one example at a time"):
        fisher_diagonal(Reads(), randn(5, 3))
