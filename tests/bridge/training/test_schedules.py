"""`GradualPruning` follows its schedule and keeps its zeros; `sensitivity` measures what it says."""
# SPDX-License-Identifier: BSD-3-Clause

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.pipeline import Pipeline
from torch import nn

import skfactor
from skfactor import GradualPruning, KMeansWeightSharer, MagnitudePruner, sensitivity
from skfactor.bridge import Sensitivity
from tests._nets import SmallCNN, TinyLM
from tests.bridge.training._runs import whole_and_resumed


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 4))


def data(n=40):
    X = torch.randn(n, 10, generator=torch.Generator().manual_seed(1))
    return X, X[:, :4].argmax(1)


def steps(method, n, lr=0.1):
    X, y = data()
    optimizer = torch.optim.SGD(method.parameter_groups(lr), lr=lr, momentum=0.9)
    for _ in range(n):
        optimizer.zero_grad()
        (F.cross_entropy(method.model(X), y) + method.penalty()).backward()
        optimizer.step()
        method.after_step()
        yield method


@pytest.mark.parametrize("regrow", [False, True])
def test_the_share_of_zeros_follows_the_cubic(regrow):
    method = GradualPruning(net(), 0.8, n_steps=20, begin=4, update_every=1, start_amount=0.2, regrow=regrow,
                            margin=0.0)
    for t, _ in enumerate(steps(method, 30), 1):
        done = min(max((t - 4) / 20, 0), 1)
        expected = 0.8 - 0.6 * (1 - done) ** 3
        zeros = int((method.model[0].weight == 0).sum())
        assert zeros == round(expected * 200)
        assert method.sparsity == pytest.approx(expected, abs=0.01)


def test_the_smallest_go_and_never_return():
    method = GradualPruning(net(), 0.7, n_steps=12, update_every=3)
    before = torch.zeros(20, 10, dtype=torch.bool)
    for _ in steps(method, 20):
        zeros = method.model[0].weight == 0
        assert (zeros | ~before).all()
        before = zeros
    assert int(before.sum()) == 140


def test_regrown_weights_return():
    method = GradualPruning(net(), 0.7, n_steps=60, update_every=2, regrow=True)
    history = [(m.model[0].weight == 0).clone() for m in steps(method, 60, lr=0.5)]
    assert any((a & ~b).any() for a, b in itertools.pairwise(history))
    assert int(history[-1].sum()) == 140
    # the last choice: the smallest of the weights' own values
    own = method._weights["0.weight"].detach().abs()
    assert own[history[-1]].max() <= own[~history[-1]].min()


def test_weights_near_the_threshold_stay_as_they_are():
    """Hysteresis: pruned up to 1 - margin of the threshold, back above 1 + margin, in between as before."""
    layer = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 9.0))
    method = GradualPruning(layer, 0.5, n_steps=100, update_every=1, start_amount=0.5, regrow=True, margin=0.25)
    own = method._weights["weight"]
    assert torch.equal(method.model.weight == 0, torch.tensor([[True] * 3 + [False] * 5]))
    with torch.no_grad():
        own[0] = torch.tensor([9.0, 4.5, 3.6, 3.4, 3.5, 1.0, 3.0, 8.0])  # threshold 3.5: 2.625 and 4.375
    method.after_step()
    assert (method.model.weight != 0)[0].tolist() == [True, True, False, True, True, False, True, True]


def test_one_threshold_for_all_layers():
    method = GradualPruning(net(), 0.5, n_steps=1, update_every=1, scope="global", start_amount=0.5)
    weights = torch.cat([m.weight.detach().flatten() for m in (net()[0], net()[2])])
    kept = torch.cat([m.weight.detach().flatten() for m in (method.model[0], method.model[2])]) != 0
    threshold = np.median(weights.abs().numpy())
    assert torch.equal(kept, weights.abs() > threshold)


def test_amounts_by_name():
    method = GradualPruning(SmallCNN(), {"conv1.weight": 0.25, "conv*": 0.5}, start_amount=1.0)
    share = {n: float((p == 0).float().mean()) for n, p in method.model.named_parameters() if n.endswith("weight")}
    assert share["conv1.weight"] == pytest.approx(0.25, abs=0.005)
    assert share["conv2.weight"] == pytest.approx(0.5, abs=0.005)
    assert share["linear.weight"] == 0


@pytest.mark.parametrize("regrow", [False, True])
def test_the_result_is_plain_and_goes_on(regrow, tmp_path):
    model = net()
    before = copy.deepcopy(model.state_dict())
    method = GradualPruning(model, 0.75, n_steps=10, update_every=2, regrow=regrow)
    list(steps(method, 12))
    result = method.finish()
    assert list(result.model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in before)
    X, _ = data()
    assert torch.equal(result.model(X), method.model(X))
    zeros = result.model[0].weight == 0
    assert int(zeros.sum()) == 150
    fresh = skfactor.load_into(net(), result.save(tmp_path / "pruned.skf"))
    assert torch.equal(fresh(X), result.model(X))
    chain = Pipeline([("prune", MagnitudePruner(threshold=0.0)), ("share", KMeansWeightSharer(8, preserve_zeros=True))])
    shared = skfactor.compress(result.model, chain, progress=False)
    assert (shared.model[0].weight[zeros] == 0).all()
    again = skfactor.finetune(skfactor.TrainedSharing(shared), data(), epochs=2).model
    assert (again[0].weight[zeros] == 0).all()


def test_ties_are_pruned_once():
    method = GradualPruning(TinyLM(), 0.5, regrow=True, start_amount=1.0)
    assert torch.equal(method.model.wte.weight, method.model.head.weight)
    method.model(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
    result = method.finish()
    assert result.model.wte.weight is result.model.head.weight


@pytest.mark.parametrize("regrow", [False, True])
def test_interrupted_pruning_resumes_to_the_same_result(regrow, tmp_path):
    def method():
        return GradualPruning(net(), 0.8, n_steps=20, update_every=3, regrow=regrow)

    methods = whole_and_resumed(method, data(), tmp_path, stop_after=2, epochs=5, batch_size=8, lr=0.1)
    files = [m.finish().save(tmp_path / f"{i}.skf").read_bytes() for i, m in enumerate(methods)]
    assert files[0] == files[1]


def test_sensitivity_is_the_divergence_of_one_pruned_layer():
    """Against the formula, with the layer pruned by `compress`."""
    model, (X, _) = net(), data()
    found = sensitivity(model, X, amounts=[0.5, 0.9])
    assert found.names == ["0.weight", "2.weight"]
    assert found.n_weights == [200, 80]
    assert found.grid.tolist() == [0, 0.5, 0.9]
    p = model(X).detach().double().softmax(1)
    for i, name in enumerate(found.names):
        for j, amount in enumerate(found.grid):
            pruned = skfactor.compress(model, {name: MagnitudePruner(float(amount)), "*": None}, progress=False).model
            q = pruned(X).detach().double().softmax(1)
            assert found.damage[i, j] == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-5, abs=1e-12)
    same = sensitivity(model, evaluate=lambda m: float(m[0].weight.detach().abs().sum()), amounts=[0.5])
    gone = model[0].weight.detach().abs().flatten().sort()[0][:100].sum()
    assert same.damage[0].tolist() == pytest.approx([0, float(gone)], rel=1e-5)
    assert same.damage[1].tolist() == [0, 0]


def test_amounts_are_the_best_of_all_choices():
    """Brute force over all combinations of a planted table."""
    rng = np.random.default_rng(0)
    grid = np.array([0, 0.5, 0.8, 0.95])
    found = Sensitivity(["a", "b", "c"], [1000, 300, 4000], grid, np.sort(rng.random((3, 4)) ** 3, axis=1))
    sizes = np.array(found.n_weights)
    for amount in (0.4, 0.7, 0.9):
        def total(choice, amount=amount):
            share = (grid[list(choice)] * sizes).sum() / sizes.sum()
            return found.damage[range(3), choice].sum() if share >= amount - 1e-9 else np.inf

        best = min(map(total, itertools.product(range(4), repeat=3)))
        chosen = [int(np.flatnonzero(grid == a)[0]) for a in found.amounts(amount).values()]
        assert total(chosen) <= best * 1.0001 + 1e-12
    with pytest.raises(ValueError, match=r"at most the largest share tried, 0\.95, got 0\.99"):
        found.amounts(0.99)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: GradualPruning(net(), 1.5), r"amount must be in \[0, 1\], got 1.5"),
    (lambda: GradualPruning(net(), {"1.weight": 0.5}), "matches no weight; there are 0.weight, 2.weight"),
    (lambda: GradualPruning(net(), {"0.*": 2}), r"got 2 for '0\.\*'"),
    (lambda: GradualPruning(nn.ReLU(), 0.5), "nothing to prune"),
    (lambda: GradualPruning(net(), n_steps=0), "n_steps must be an integer of at least 1, got 0"),
    (lambda: GradualPruning(net(), scope="row"), "scope must be 'layer' or 'global'"),
    (lambda: sensitivity(net()), "give either calibration or evaluate"),
])
def test_errors_are_clear(make, message):
    with pytest.raises(ValueError, match=message):
        make()
