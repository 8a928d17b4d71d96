# SPDX-License-Identifier: BSD-3-Clause
"""`DeepKMeansTraining`: its penalty is the sum over layers, training gathers samples, interrupted runs go on."""

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skfactor
from skfactor import DeepKMeansRegularizer, DeepKMeansTraining, KMeansWeightSharer, LayerError
from tests._nets import SmallCNN, TinyLM
from tests.bridge.training._runs import files_of_two_runs, whole_and_resumed


def network(seed=0):
    torch.manual_seed(seed)
    return SmallCNN()


def data(n=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 3, 8, 8, generator=generator)
    return X, (X.mean(dim=(1, 2, 3)) > 0).long()


def train(method, epochs, lr=0.05):
    """A user's loop."""
    X, y = data()
    optimizer = torch.optim.SGD(method.parameter_groups(lr), lr=lr)
    for _ in range(epochs):
        for x, t in zip(X.split(16), y.split(16), strict=True):
            optimizer.zero_grad()
            (F.cross_entropy(method.model(x), t) + method.penalty()).backward()
            optimizer.step()
            method.after_step()
        method.after_epoch()
    return method


def rules(n_clusters=6, **options):
    return {"Conv2d": DeepKMeansRegularizer(n_clusters, random_state=0, **options)}


def test_penalty_is_the_sum_over_layers():
    """By the estimator alone, on each weight as it is."""
    model = network()
    method = DeepKMeansTraining(model, rules(lam=0.5) | {"linear": DeepKMeansRegularizer(2, lam=2.0, random_state=0)})
    method.penalty().backward()
    total = 0.0
    for name, n_clusters, lam in (("conv1", 6, 0.5), ("conv2", 6, 0.5), ("linear", 2, 2.0)):
        weight = getattr(model, name).weight.detach().clone().requires_grad_()
        part = DeepKMeansRegularizer(n_clusters, lam=lam, random_state=0).penalty(weight)
        part.backward()
        total += part.item()
        torch.testing.assert_close(getattr(method.model, name).weight.grad, weight.grad)
    assert method.penalty().item() == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("weight", [
    nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv1d(5, 7, 3), nn.Conv3d(2, 3, 3), nn.Embedding(9, 4),
])
def test_layouts(weight):
    """The samples are those of `compress`: hard codes of an untrained network leave what the penalty measures."""
    model = nn.Sequential(weight)
    method = DeepKMeansTraining(model, DeepKMeansRegularizer(3, lam=2.0, tol=0, random_state=0))
    result = method.finish()
    difference = (result.model[0].weight - model[0].weight).square().sum().item()
    assert method.penalty().item() == pytest.approx(difference, rel=1e-3)


def test_sharing_without_training_is_compress():
    """The rows "without re-training" of the paper."""
    model = network()
    result = DeepKMeansTraining(model, rules()).finish()
    plain = skfactor.compress(model, rules(), progress=False)
    assert sum(r.info["inertia"] for r in result.records if r.info) <= \
        sum(r.info["inertia"] for r in plain.records if r.info) * (1 + 1e-6)
    assert [r.estimator for r in result.records] == [r.estimator for r in plain.records]
    assert result.skipped == plain.skipped
    for name in ("conv1", "conv2"):
        assert len(getattr(result.model, name).weight.reshape(-1, 3).unique(dim=0)) == 6


def test_training_gathers_the_samples():
    """With the penalty hard codes change the weights far less than without; the network given is not touched."""
    model = network()
    before = copy.deepcopy(model.state_dict())
    changed = {}
    for lam in (0.0, 1.0):
        method = train(DeepKMeansTraining(model, rules(lam=lam)), 12)
        result = method.finish()
        changed[lam] = [r.relative_error for r in result.records if r.estimator]
    assert all(b < 0.2 * a for a, b in zip(changed[0.0], changed[1.0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_hard_codes_start_from_the_clusters_of_the_training():
    """With one Lloyd iteration each, twenty refreshes converge, and the end goes on from there."""
    method = DeepKMeansTraining(network(), rules(lam=1.0, max_iter=1, tol=0))
    first = method.penalty().item()
    for _ in range(20):
        method.after_epoch()
    last = method.penalty().item()
    result = method.finish()
    assert last < 0.97 * first
    assert sum(r.info["inertia"] for r in result.records if r.info) <= 2 * last * (1 + 1e-5)


def test_two_runs_give_one_file(tmp_path):
    first, second = files_of_two_runs(lambda: DeepKMeansTraining(network(), rules(lam=0.3)), data(), tmp_path, epochs=2)
    assert first == second


def test_zero_cluster_and_file(tmp_path):
    model = network()
    method = train(DeepKMeansTraining(model, rules(lam=1.0, zero_fraction=0.5)), 3)
    result = method.finish()
    rows = result.model.conv2.weight.reshape(-1, 3)
    assert (rows == 0).all(dim=1).float().mean() == 0.5
    restored = skfactor.load_into(network(3), result.save(tmp_path / "x.skf"))
    assert all(torch.equal(a, b) for a, b in
               zip(restored.state_dict().values(), result.model.state_dict().values(), strict=True))


@pytest.mark.parametrize(("schedule", "growth", "expected"), [
    ("constant", 7.0, [1, 1, 1, 1]), ("linear", 0.5, [1, 1.5, 2, 2.5]), ("exponential", 2.0, [1, 2, 4, 8]),
    (lambda epoch: 10.0 * epoch, 1.0, [0, 10, 20, 30]),
])
def test_schedule(schedule, growth, expected):
    method = DeepKMeansTraining(network(), rules(lam=0.1), schedule=schedule, growth=growth)
    base = DeepKMeansTraining(network(), rules(lam=0.1)).penalty().item()
    found = []
    for _ in range(4):
        found.append(method.penalty().item() / base)
        method.after_epoch()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_clusters_are_refreshed_every_few_epochs():
    """Until then those of the start count, whatever the weights are."""
    method = DeepKMeansTraining(network(), rules(update_every=3, lam=1.0))
    labels = method._clusters["conv1.weight"].labels.clone()
    with torch.no_grad():
        method.model.conv1.weight.copy_(torch.randn(8, 3, 3, 3))
    costs = []
    for _ in range(3):
        assert torch.equal(method._clusters["conv1.weight"].labels, labels)
        costs.append(method.penalty().item())
        method.after_epoch()
    assert not torch.equal(method._clusters["conv1.weight"].labels, labels)
    assert costs[0] == costs[1] == costs[2] > method.penalty().item()


@pytest.mark.parametrize("options", [{}, {"zero_fraction": 0.3}, {"relaxation": "spectral", "n_clusters": 2}])
def test_interrupted_training_goes_on(options):
    """State through torch.save: the same weights and the same file as without the interruption."""
    whole = train(DeepKMeansTraining(network(), rules(**options), schedule="linear"), 4)
    first = train(DeepKMeansTraining(network(), rules(**options), schedule="linear"), 2)
    second = DeepKMeansTraining(network(5), rules(**options), schedule="linear")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, 2)
    assert second.epoch == 4
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(np.array_equal(a.codes, b.codes) for a, b in
               zip(whole.finish().tensors.values(), second.finish().tensors.values(), strict=True)
               if a.kind == "compressed")


def test_finetune_resumes_from_its_checkpoint(tmp_path):
    def method():
        return DeepKMeansTraining(network(), rules(lam=0.3), schedule="exponential", growth=1.5)

    whole, again = whole_and_resumed(method, data(), tmp_path, stop_after=1, epochs=3)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))


def test_other_rules_wait_for_the_end_and_ties_are_kept():
    model = TinyLM()
    sharer = KMeansWeightSharer(4)
    method = DeepKMeansTraining(model, {"wte": DeepKMeansRegularizer(8, lam=0.1, random_state=0), "fc": sharer})
    method.penalty().backward()
    assert method.model.fc.weight.grad is None
    assert method.model.head.weight.grad is not None
    result = method.finish()
    assert result.model.head.weight is result.model.wte.weight
    assert len(result.model.fc.weight.unique()) == 4
    assert "rule" in result.skipped["proj.weight"]


def test_spectral_warns_once_and_does_nothing():
    with pytest.warns(UserWarning, match="does nothing for 2 of 2 layers") as caught:
        method = DeepKMeansTraining(network(), rules(relaxation="spectral", lam=1.0))
    assert len(caught) == 1
    assert method.penalty().item() < 1e-8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.after_epoch()
        DeepKMeansTraining(network(), rules(2, relaxation="spectral"))


def test_errors():
    with pytest.raises(ValueError, match="at least one layer a DeepKMeansRegularizer"):
        DeepKMeansTraining(network(), KMeansWeightSharer(4))
    with pytest.raises(ValueError, match="schedule must be"):
        DeepKMeansTraining(network(), rules(), schedule="cosine")
    with pytest.raises(ValueError, match="growth must be positive"):
        DeepKMeansTraining(network(), rules(), growth=0)
    with pytest.raises(LayerError, match=r"layer 'conv1' \(Conv2d 8x3x3x3\).*vector_size must divide the 27"):
        DeepKMeansTraining(network(), rules(vector_size=4))
    with pytest.raises(ValueError, match="the state has clusters of"):
        DeepKMeansTraining(network(), rules()).load_state_dict(
            DeepKMeansTraining(network(), {"conv1": DeepKMeansRegularizer(3)}).state_dict())
