"""`allocate` among candidates: measured bytes and damage, one choice for each layer."""
# SPDX-License-Identifier: BSD-3-Clause

import itertools
import os

import numpy as np
import pytest
import torch
from _data import data_dir, needs_data
from _nets import ResNet
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from torch import nn

import skfactor
from skfactor import (
    Calibration,
    DictionaryFactorizer,
    KMeansWeightSharer,
    LowRankFactorizer,
    TuckerFactorizer,
    UniformQuantizer,
)

SHARING = (KMeansWeightSharer(), {"n_clusters": [2, 4, 8, 16, 32]})


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def net():
    """Layers of different size and scale, one of them without much influence."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Flatten(),
                          nn.Linear(128, 40), nn.ReLU(), nn.Linear(40, 10))
    with torch.no_grad():
        model[2].weight.mul_(5)
        model[5].weight[20:] *= 0.01
    return model.eval()


@pytest.fixture(scope="module")
def even(net):
    return uniform(net)


def uniform(net, calibration=None):
    return [skfactor.compress(net, KMeansWeightSharer(k), calibration=calibration, progress=False)
            for k in SHARING[1]["n_clusters"]]


def size(result, tmp_path):
    return os.path.getsize(result.save(tmp_path / "net.skf"))


def test_beats_every_uniform_setting_of_the_same_size(net, even, tmp_path):
    for setting, share in ((even[0], 1.0), (even[2], 0.95)):
        budget = size(setting, tmp_path)
        found = skfactor.allocate(net, SHARING, budget=budget, progress=False)
        assert found.n_bytes == size(found.result, tmp_path) <= budget
        error = setting.report.total["relative_error"]
        assert found.result.report.total["relative_error"] <= share * error * (1 + 1e-9)


@pytest.mark.parametrize(("estimator", "name", "values"), [
    (LowRankFactorizer(), "rank", [0.2, 0.4, 0.6]),
    (TuckerFactorizer(), "rank", [0.2, 0.4, 0.6]),
    (DictionaryFactorizer(8, random_state=0), "alpha", [0.3, 0.6, 1.2]),
], ids=["low rank", "Tucker", "dictionary"])
def test_beats_every_rank_and_price_of_the_same_size(net, estimator, name, values):
    better = 0
    for value in values:
        setting = skfactor.compress(net, clone(estimator).set_params(**{name: value}), progress=False).report.total
        found = skfactor.allocate(net, (estimator, {name: values}), budget=setting["bytes_after"], progress=False)
        error = found.result.report.total["relative_error"]
        assert found.n_bytes <= setting["bytes_after"]
        assert error <= setting["relative_error"] * (1 + 1e-9)
        better += error < 0.99 * setting["relative_error"]
    assert better


def test_choice_is_the_best_of_all_choices(net):
    """All 5^4 choices, from the measured table."""
    found = skfactor.allocate(net, SHARING, budget="9x", progress=False)
    table = found.table
    choice = {n: SHARING[1]["n_clusters"].index(found.rules[n].n_clusters) for n in table.names}
    n_bytes = table.bytes_of(choice)
    best = min(table.damage_of(dict(zip(table.names, c))) for c in itertools.product(range(5), repeat=4)
               if table.bytes_of(dict(zip(table.names, c))) <= n_bytes)
    assert table.damage_of(choice) == pytest.approx(best)


def test_error_of_the_weights_is_met(net, even, tmp_path):
    found = skfactor.allocate(net, SHARING, max_error=0.15, progress=False)
    assert found.result.report.total["relative_error"] <= 0.15
    for setting in even:
        if setting.report.total["relative_error"] <= 0.15:
            assert found.n_bytes <= size(setting, tmp_path)
    with pytest.raises(ValueError, match=r"error of 0.001 cannot be met with these candidates"):
        skfactor.allocate(net, SHARING, max_error=0.001, progress=False)


def test_error_of_the_output_is_met_and_less_is_lost_than_by_uniform_settings(net, tmp_path):
    x = randn(60, 3, 8, 8)
    found = skfactor.allocate(net, SHARING, max_error=0.1, calibration=x, progress=False)

    def error(model):
        with torch.no_grad():
            return float((model(x) - net(x)).norm() / net(x).norm())

    assert error(found.result.model) == pytest.approx(found.history[-1]["error"]) or len(found.history) > 1
    assert error(found.result.model) <= 0.1
    sizes = [size(setting, tmp_path) for setting in uniform(net, x) if error(setting.model) <= 0.1]
    assert found.n_bytes < min(sizes)


def test_families_mix_and_rules_decide(net):
    mixed = [SHARING, UniformQuantizer(0.5), UniformQuantizer(1.0)]
    found = skfactor.allocate(net, {"0": None, "Linear": mixed, "*": SHARING}, budget="9x", progress=False)
    assert found.rules.keys() == {"2.weight", "5.weight", "7.weight"}
    assert len(found.table.candidates["5.weight"]) == 7
    again = skfactor.compress(net, found.rules, progress=False)
    for name, value in again.state_dict().items():
        assert torch.equal(value, found.result.state_dict()[name])
    assert torch.equal(found.result.state_dict()["0.weight"], net[0].weight)


def test_state_dict_file_and_network_agree(net, tmp_path):
    state = net.state_dict()
    save_file(state, tmp_path / "net.safetensors")
    found = [skfactor.allocate(x, SHARING, budget="9x", progress=False)
             for x in (net, state, tmp_path / "net.safetensors")]
    assert len({tuple(r.n_clusters for r in f.rules.values()) for f in found}) == 1


def test_steps_meet_an_error(net):
    found = skfactor.allocate(net, max_error=0.08, progress=False)
    assert 0.06 < found.result.report.total["relative_error"] <= 0.08
    x = randn(60, 3, 8, 8)
    found = skfactor.allocate(net, max_error=0.08, calibration=Calibration(x, sequential=True), progress=False)
    with torch.no_grad():
        error = float((found.result.model(x) - net(x)).norm() / net(x).norm())
    assert 0.05 < error <= 0.08


def test_wrong_use(net):
    for given in ({}, {"budget": 1000, "max_error": 0.1}):
        with pytest.raises(ValueError, match=r"give either budget or max_error, got (neither|both)"):
            skfactor.allocate(net, SHARING, **given)
    with pytest.raises(ValueError, match="max_error must be a positive number, got -1"):
        skfactor.allocate(net, max_error=-1)
    with pytest.raises(ValueError, match="at least one estimator, got an empty list"):
        skfactor.allocate(net, [], budget="9x")
    with pytest.raises(ValueError, match="file of 100 bytes cannot be met with these candidates"):
        skfactor.allocate(net, SHARING, budget=100, progress=False)
    with pytest.raises(TypeError, match="must be an estimator of skfactor"):
        skfactor.allocate(net, "kmeans", budget="9x")


@needs_data
@pytest.mark.slow
def test_real_network():
    """ResNet-20: less error in the same file than any number of clusters for all layers."""
    net = ResNet(3)
    net.load_state_dict(load_file(data_dir() / "weights" / "cifar10_resnet20.safetensors"), strict=False)
    for k in (4, 8, 16):
        even = skfactor.compress(net, KMeansWeightSharer(k), progress=False)
        found = skfactor.allocate(net, (KMeansWeightSharer(), {"n_clusters": [2, 3, 4, 6, 8, 12, 16, 24, 32, 64]}),
                                  budget=even.report.total["bytes_after"], progress=False)
        assert found.n_bytes <= even.report.total["bytes_after"]
        assert found.result.report.total["relative_error"] < even.report.total["relative_error"]
    assert np.isfinite(found.table.total)
