# SPDX-License-Identifier: BSD-3-Clause
"""Which filters go, against brute force, and refits against least squares on the data themselves."""

import copy
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _data import needs_data, real_weights
from _nets import Conv1D, ResNet
from _zoo import ZOO, build, trained_alike
from torch import nn

import skfactor
from skfactor.bridge import prune_filters
from skfactor.solvers.pruning import Readers, eliminate_units


class Two(nn.Module):
    """Two linear layers; `redundant` hidden units are sums of others."""

    def __init__(self, n=6, redundant=0):
        super().__init__()
        self.first, self.second = nn.Linear(5, n), nn.Linear(n, 4)
        with torch.no_grad():
            for i in range(redundant):
                self.first.weight[i] = self.first.weight[i + redundant : i + redundant + 2].sum(0)
                self.first.bias[i] = self.first.bias[i + redundant : i + redundant + 2].sum(0) + 1

    def forward(self, x):
        return self.second(self.first(x))


def hidden(model, x):
    with torch.no_grad():
        return model.first(x).double().numpy(), model(x).double().numpy()


def least_squares_error(H, Y, kept):
    """Residual of Y on the kept columns and a constant, by numpy.linalg.lstsq."""
    A = np.column_stack([H[:, list(kept)], np.ones(len(H))])
    return np.square(Y - A @ np.linalg.lstsq(A, Y, rcond=None)[0]).sum()


def test_refit_is_the_least_squares_solution_on_the_data():
    torch.manual_seed(0)
    model, x = Two(), torch.randn(300, 5)
    model.first.weight.data[:, 0] *= 3
    pruned = prune_filters(model, 3, criterion="norm", calibration=x, damping=1e-12, progress=False)
    H, Y = hidden(model, x)
    gone = pruned.removed["first"]
    norms = model.first.weight.detach().norm(dim=1).numpy()
    assert sorted(gone) == sorted(np.argsort(norms)[:3])
    kept = [i for i in range(6) if i not in gone]
    with torch.no_grad():
        error = np.square(Y - pruned.model(x).double().numpy()).sum()
    assert error == pytest.approx(least_squares_error(H, Y, kept), rel=1e-3)
    assert pruned.refitted == ("second",)


def test_least_squares_finds_the_redundant_units():
    torch.manual_seed(1)
    model, x = Two(7, redundant=2), torch.randn(200, 5)
    pruned = prune_filters(model, 2, criterion="least_squares", calibration=x, damping=1e-9, progress=False)
    H, Y = hidden(model, x)
    best = min(combinations(range(7), 2), key=lambda gone: least_squares_error(H, Y, set(range(7)) - set(gone)))
    assert least_squares_error(H, Y, set(range(7)) - set(best)) < 1e-6 * np.square(Y).sum()  # it is planted
    with torch.no_grad():
        assert (pruned.model(x) - model(x)).abs().max() < 1e-3


def test_elimination_is_greedy_brute_force():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 12)) @ rng.normal(size=(12, 12))
    W = [rng.normal(size=(4, 12)), rng.normal(size=(3, 12))]
    G = X.T @ X / len(X) + 0.01 * np.eye(12)
    blocks = [np.array(b) for b in ([0, 1], [2, 3], [4, 5, 6], [7, 8, 9], [10, 11])]
    second = [np.empty(0, int) if i == 1 else b for i, b in enumerate(blocks)]
    readers = [Readers(W[0].copy(), np.linalg.inv(G), blocks, 1.0), Readers(W[1].copy(), np.linalg.inv(G), second, 2.0)]

    def refit(w, kept):
        return np.linalg.solve(G[np.ix_(kept, kept)], G[kept] @ w.T).T

    def error(gone):
        total = 0.0
        for w, columns, scale in ((W[0], blocks, 1.0), (W[1], second, 2.0)):
            kept = np.setdiff1d(np.arange(12), np.concatenate([[], *(columns[u] for u in gone)]).astype(int))
            z = np.zeros_like(w)
            z[:, kept] = refit(w, kept)
            total += scale * np.trace((w - z) @ G @ (w - z).T)
        return total

    removed, costs = eliminate_units(readers, 3, lambda unit: True)
    gone = []
    for unit, cost in zip(removed, costs, strict=True):
        rises = {u: error([*gone, u]) - error(gone) for u in range(5) if u not in gone}
        assert unit == min(rises, key=rises.get)
        assert cost == pytest.approx(rises[unit], rel=1e-8)
        gone.append(unit)
    kept = np.setdiff1d(np.arange(12), np.concatenate([blocks[u] for u in removed]))
    assert np.allclose(readers[0].weight[:, kept], refit(W[0], kept))
    assert not readers[0].weight[:, np.setdiff1d(np.arange(12), kept)].any()


def test_no_unit_goes_that_may_not():
    reader = Readers(np.eye(3), np.eye(3), [np.array([i]) for i in range(3)], 1.0)
    assert eliminate_units([reader], 3, lambda unit: unit != 1)[0] == [0, 2]


@pytest.mark.parametrize("name", ["LeNet-5", "VGG-16-BN", "ResNet-8", "DenseNet", "U-Net", "MobileNetV2", "SE",
                                  "SqueezeNet", "Conv3d"])
@pytest.mark.parametrize("criterion", ["norm", "least_squares"])
def test_every_kind_of_network(name, criterion, tmp_path):
    model, x = build(name)
    x = torch.randn(24, *x.shape[1:], generator=torch.Generator().manual_seed(3))
    before = copy.deepcopy(model.state_dict())
    plain = prune_filters(model, 0.3, criterion=criterion, calibration=x, refit=False, progress=False)
    refit = prune_filters(model, 0.3, criterion=criterion, calibration=x, progress=False)
    with torch.no_grad():
        expected = model(x)
        errors = [float((net(x) - expected).square().sum()) for net in (plain.model, refit.model)]
    assert errors[1] < 0.75 * errors[0]
    assert plain.removed == refit.removed
    assert plain.refitted == ()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    fresh = skfactor.load_into(ZOO[name][0]().eval(), refit.save(tmp_path / "a.skf"))
    with torch.no_grad():
        assert torch.equal(fresh(x), refit.model(x))


def test_sequential_makes_up_for_errors_before():
    model, _ = build("VGG-16-BN")
    x = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    nets = [prune_filters(model, 0.25, calibration=x, sequential=s, progress=False).model for s in (False, True)]
    with torch.no_grad():
        at_once, in_order = (float((net(x) - model(x)).square().sum()) for net in nets)
    assert in_order < at_once


def test_wide_layers_come_in_pieces(monkeypatch):
    """Inputs of both networks are unfolded in pieces of different sizes."""
    model, x = build("ResNet-8")
    x = torch.randn(16, *x.shape[1:], generator=torch.Generator().manual_seed(3))
    whole = prune_filters(model, {"layer*": 0.4}, criterion="norm", calibration=x, progress=False).model
    monkeypatch.setattr("skfactor.bridge.calibrate.CHUNK", 150_000)
    pieces = prune_filters(model, {"layer*": 0.4}, criterion="norm", calibration=x, progress=False).model
    with torch.no_grad():
        assert torch.allclose(whole(x), pieces(x), rtol=1e-3, atol=1e-3)


def test_amounts():
    model, x = build("ResNet-8")

    def sizes(amount, **options):
        pruned = prune_filters(model, amount, criterion="norm", example_inputs=x, **options)
        return {layer: len(filters) for layer, filters in pruned.removed.items()}

    assert sizes({"layer*.conv1": 0.4}) == {"layer1.0.conv1": 7, "layer2.0.conv1": 13, "layer3.0.conv1": 26}
    assert sizes({"layer1.*": 0, "layer*.conv1": 3}) == {"layer2.0.conv1": 3, "layer3.0.conv1": 3}
    assert sizes({"layer1.0.conv1": 99}) == {"layer1.0.conv1": 15}  # one stays
    # of the residual stream only what leaves a channel in every layer
    left = 64 - sizes({"conv1": 64})["layer3.0.conv2"]
    assert left >= 1
    for wrong in (1.0, -0.1, 1.5, True, "0.5"):
        with pytest.raises(ValueError, match="amount must be a share from 0 to 1 or a number"):
            sizes(wrong)
    with pytest.raises(ValueError, match=r"matches 'layer9\.\*'"):
        sizes({"layer9.*": 0.5})
    with pytest.raises(ValueError, match="removes no filter"):
        sizes(0)


def test_criteria():
    torch.manual_seed(0)
    model, x = build("ResNet-8")
    name = "layer1.0.conv1"

    def removed(criterion, **options):
        return prune_filters(model, {name: 5}, criterion=criterion, example_inputs=x, **options).removed[name]

    block = model.layer1[0]
    norms = block.conv1.weight.detach().flatten(1).norm(dim=1)
    scale = block.bn1.weight.abs() / (block.bn1.running_var + block.bn1.eps).sqrt()
    assert removed("norm") == tuple(norms.argsort()[:5].sort().values.tolist())
    assert removed("batchnorm") == tuple((norms * scale).argsort()[:5].sort().values.tolist())
    assert removed("random", random_state=3) == removed("random", random_state=3)
    assert len({removed("random", random_state=s) for s in range(5)}) > 1
    seen = []
    assert removed(lambda W, layer: seen.append((W.shape, layer)) or -np.arange(16.0)) == (11, 12, 13, 14, 15)
    assert seen == [((16, 16, 3, 3), name)]
    for wrong, message in (("norn", "did you mean 'norm'"), ("least_squares", "needs calibration"),
                           (lambda W, layer: np.zeros(3), "a finite score for each of the 16 filters")):
        with pytest.raises(ValueError, match=message):
            removed(wrong)
    with pytest.raises(ValueError, match="needs example_inputs or calibration"):
        prune_filters(model, 0.5)


@pytest.mark.parametrize("criterion", ["principal_angles", "norton-2024", "vbd"])
def test_criteria_of_factors(criterion):
    from skfactor import estimators

    model, x = build("ResNet-8")
    if not hasattr(estimators, "CPDFilterPruner"):
        with pytest.raises(ValueError, match=r"needs skfactor\.CPDFilterPruner"):
            prune_filters(model, {"layer1.0.conv1": 0.4}, criterion=criterion, example_inputs=x)
        return
    pruned = prune_filters(model, {"layer1.0.conv1": 0.4}, criterion=criterion, rank=2, example_inputs=x)
    W = model.layer1[0].conv1.weight.detach().flatten(1).numpy()
    support = estimators.CPDFilterPruner(rank=2, kernel_shape=(16, 3, 3), prune_ratio=7 / 16, criterion=criterion).fit(
        W).support_
    assert pruned.removed == {"layer1.0.conv1": tuple(np.flatnonzero(~support).tolist())}
    with pytest.raises(ValueError, match="are coupled"):
        prune_filters(model, {"conv1": 0.4}, criterion=criterion, example_inputs=x)


def test_hidden_units_of_a_transformer_of_conv1d():
    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc, self.proj = nn.LayerNorm(8), Conv1D(32, 8), Conv1D(8, 32)

        def forward(self, x):
            return x + self.proj(F.gelu(self.fc(self.norm(x))))

    torch.manual_seed(0)
    model, x = MLP().eval(), torch.randn(40, 6, 8)
    groups = skfactor.filter_groups(model, x)
    assert [g.layers for g in groups] == [("fc",)]
    pruned = prune_filters(model, 0.5, criterion="least_squares", calibration=x, progress=False)
    plain = prune_filters(model, 0.5, criterion="random", random_state=0, example_inputs=x)
    assert (pruned.model.fc.nf, pruned.model.proj.nf, pruned.model.proj.weight.shape) == (16, 8, (16, 8))
    with torch.no_grad():
        errors = [float((net(x) - model(x)).square().sum()) for net in (pruned.model, plain.model)]
    assert errors[0] < 0.3 * errors[1]


@needs_data
@pytest.mark.slow
def test_least_squares_beats_the_norm_on_resnet20():
    """On real weights and inputs: closer to the original network's outputs."""
    from _data import data_dir

    model = ResNet(3)
    model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in real_weights("cifar10_resnet20").items()})
    model.eval()
    with np.load(data_dir() / "cifar10_train.npz") as file:
        x = torch.from_numpy(file["X"][:768]).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    errors = []
    with torch.no_grad():
        expected = model(x[256:])
    for criterion in ("norm", "least_squares"):
        pruned = prune_filters(model, {"layer*.conv1": 0.4}, criterion=criterion, calibration=x[:256], progress=False)
        with torch.no_grad():
            errors.append(float((pruned.model(x[256:]) - expected).square().sum()))
    assert errors[1] < errors[0]


def test_depthwise_and_grouped_layers_keep_their_weights():
    """A grouped convolution behind removed filters loses groups; its weights have nothing to make up with."""
    model, x = trained_alike(ZOO["MobileNetV1"][0]()), torch.randn(16, 3, 32, 32)
    pruned = prune_filters(model, {"features.0": 0.5}, calibration=x, progress=False)
    kept = [i for i in range(8) if i not in pruned.removed["features.0"]]
    assert torch.equal(pruned.model.features[3].weight, model.features[3].weight[kept])
    assert "features.6" in pruned.refitted
