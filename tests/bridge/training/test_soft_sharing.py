# SPDX-License-Identifier: BSD-3-Clause
"""`SoftSharingTraining`: cost and gradients against dense sums by autograd, learning, hard sharing, resuming."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from torch import nn

import skfactor
from skfactor import KMeansWeightSharer, SoftSharingTraining, SoftWeightSharer
from skfactor.bridge.training.soft_sharing import MixturePrior
from tests._nets import LeNet300, TinyLM
from tests.bridge.training._runs import files_of_two_runs, whole_and_resumed


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 3))


def data(n=120, seed=1):
    X = torch.randn(n, 20, generator=torch.Generator().manual_seed(seed))
    return X, X[:, :3].argmax(dim=1)


def train(method, epochs, lr=0.01):
    """A user's loop."""
    X, y = data()
    optimizer = torch.optim.SGD(method.parameter_groups(lr), lr=lr)
    for _ in range(epochs):
        for x, t in zip(X.split(30), y.split(30), strict=True):
            optimizer.zero_grad()
            (F.cross_entropy(method.model(x), t) + method.penalty()).backward()
            optimizer.step()
            method.after_step()
        method.after_epoch()
    return method


def dense_cost(prior, weights):
    """The formula, one density for each weight and component."""
    log_pi, mu, t = prior.mixture()
    v = weights.double() / prior.unit
    log_joint = log_pi + 0.5 * t.log() - 0.5 * t * (v[:, None] - mu) ** 2
    hyper = ((prior.prior_shape - 1) * prior.log_precisions - prior.prior_rate * t).sum()
    return -torch.logsumexp(log_joint, 1).sum() - hyper


@pytest.mark.parametrize("zero_weight", [0.9, None])
def test_cost_and_gradients(zero_weight):
    weights = (0.05 * torch.randn(5000, generator=torch.Generator().manual_seed(0))).requires_grad_()
    prior = MixturePrior(SoftWeightSharer(7, zero_weight=zero_weight), weights)
    found, expected = prior(weights), dense_cost(prior, weights)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0.0)
    inputs = [weights, *prior.parameters()]
    for a, b in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


def test_gradient_of_what_is_computed():
    """The gradient is that of the interpolated cost itself, by finite differences inside a cell of the grid."""
    weights = torch.tensor([0.3, -0.71, 1.13, -1.0], dtype=torch.float64, requires_grad=True)
    prior = MixturePrior(SoftWeightSharer(3), weights)
    (gradient,) = torch.autograd.grad(prior(weights), weights)
    low, high = (weights.detach() + e * torch.tensor([1.0, 0, 0, 0]) for e in (-1e-6, 1e-6))
    assert gradient[0].item() == pytest.approx(((prior(high) - prior(low)) / 2e-6).item(), rel=1e-4)


def test_mixture_is_a_density():
    prior = MixturePrior(SoftWeightSharer(5, zero_weight=0.7), torch.randn(100))
    log_pi, mu, t = (p.detach().numpy() for p in prior.mixture())
    assert np.exp(log_pi).sum() == pytest.approx(1)
    assert (np.exp(log_pi[0]), mu[0]) == (pytest.approx(0.7), 0)
    grid = np.linspace(-20, 20, 40001)
    density = np.exp(log_pi) @ norm.pdf(grid, mu[:, None], t[:, None] ** -0.5)
    assert density.sum() * (grid[1] - grid[0]) == pytest.approx(1, rel=1e-6)


def test_any_scale():
    """Weights a thousand times smaller have the same cost, up to nothing, and the same learned numbers."""
    w = torch.randn(300, generator=torch.Generator().manual_seed(0))
    large, small = (MixturePrior(SoftWeightSharer(5), s * w) for s in (1.0, 2.0**-10))
    assert large(w).item() == pytest.approx(small(2.0**-10 * w).item(), rel=1e-6)


def test_one_rule_is_one_mixture():
    sharer = SoftWeightSharer(5)
    one = SoftSharingTraining(network(), {"*": sharer, "*.bias": sharer})
    assert len(one.mixtures) == 1
    assert sum(len(group["params"]) for group in one.parameter_groups(0.1)) == 4 + 3
    two = SoftSharingTraining(network(), {"0": SoftWeightSharer(5), "2": SoftWeightSharer(4)}, tau=0.5)
    assert [len(m.means) for m in two.mixtures] == [4, 3]
    total = sum(m(w.reshape(-1)).item() for m, w in zip(two.mixtures, (two.model[0].weight, two.model[2].weight)))
    assert two.penalty().item() == pytest.approx(0.5 * total, rel=1e-6)
    groups = two.parameter_groups(0.1)
    assert (groups[0]["lr"], groups[1]["lr"], groups[1]["weight_decay"]) == (0.1, two.mixture_lr, 0.0)


def test_training_gathers_the_weights_and_prunes():
    """Hard sharing hurts the loss far less after training under the mixture; many weights are exactly zero."""
    model = network()
    X, y = data()
    plain = train(SoftSharingTraining(model, SoftWeightSharer(9), tau=0.0, mixture_lr=0.0), 30, lr=0.2)
    before = copy.deepcopy(plain.model.state_dict())
    method = SoftSharingTraining(plain.model, SoftWeightSharer(9, zero_weight=0.9), tau=3e-4)
    optimizer = torch.optim.Adam(method.parameter_groups(0.02))
    start = method.penalty().item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.cross_entropy(method.model(X), y)
        (loss + method.penalty()).backward()
        optimizer.step()
    assert method.penalty().item() < start
    result = method.finish()
    hard = F.cross_entropy(result.model(X), y).item()
    unprepared = SoftSharingTraining(plain.model, SoftWeightSharer(9, zero_weight=0.9)).finish()
    assert hard < 0.5 * F.cross_entropy(unprepared.model(X), y).item()
    weights = torch.cat([m.weight.reshape(-1) for m in (result.model[0], result.model[2])])
    assert (weights == 0).float().mean() > 0.3
    assert len(result.model[0].weight.unique()) <= 9
    assert all(torch.equal(a, b) for a, b in zip(before.values(), plain.model.state_dict().values(), strict=True))


def test_finish_is_the_largest_responsibility(tmp_path):
    sharer = SoftWeightSharer(6, zero_weight=0.5, merge_divergence=0.0)
    method = train(SoftSharingTraining(network(), {"0": sharer}, tau=1e-3), 3)
    result = method.finish()
    log_pi, mu, t = (p.detach().numpy() for p in method.mixtures[0].mixture())
    w = method.model[0].weight.detach().double().numpy().reshape(-1) / method.mixtures[0].unit
    best = (log_pi + norm.logpdf(w[:, None], mu, t**-0.5)).argmax(axis=1)
    shared = result.model[0].weight.detach().numpy().reshape(-1)
    for k in np.unique(best):
        mean = 0.0 if k == 0 else w[best == k].mean() * method.mixtures[0].unit
        np.testing.assert_allclose(shared[best == k], mean, rtol=1e-5)
    assert "means_init" not in result.records[0].estimator
    restored = skfactor.load_into(network(3), result.save(tmp_path / "x.skf"))
    assert torch.equal(restored[0].weight, result.model[0].weight)


def test_two_runs_give_one_file(tmp_path):
    def method():
        return SoftSharingTraining(network(), SoftWeightSharer(5), tau=1e-3)

    first, second = files_of_two_runs(method, data(), tmp_path, epochs=2)
    assert first == second


def test_interrupted_training_goes_on():
    sharer = SoftWeightSharer(5)
    whole = train(SoftSharingTraining(network(), sharer, tau=1e-3), 4)
    first = train(SoftSharingTraining(network(), sharer, tau=1e-3), 2)
    second = SoftSharingTraining(network(4), sharer, tau=1e-3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, 2)
    assert whole.mixtures[0].unit == second.mixtures[0].unit
    for a, b in zip([*whole.model.parameters(), *whole.mixtures[0].parameters()],
                    [*second.model.parameters(), *second.mixtures[0].parameters()], strict=True):
        assert torch.equal(a, b)


def test_finetune_resumes_from_its_checkpoint(tmp_path):
    def method():
        return SoftSharingTraining(network(), SoftWeightSharer(5), tau=1e-3)

    whole, again = whole_and_resumed(method, data(), tmp_path, stop_after=1, epochs=3)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    assert torch.equal(whole.mixtures[0].means, again.mixtures[0].means)


def test_ties_count_once_and_other_rules_wait():
    method = SoftSharingTraining(TinyLM(), {"wte": SoftWeightSharer(5), "fc": KMeansWeightSharer(4)}, tau=1.0)
    prior = method.mixtures[0]
    assert method.penalty().item() == pytest.approx(prior(method.model.wte.weight.reshape(-1)).item(), rel=1e-6)
    result = method.finish()
    assert result.model.head.weight is result.model.wte.weight
    assert len(result.model.fc.weight.unique()) == 4


def test_one_step_of_a_large_network_is_a_histogram():
    """The grid has far fewer nodes than there are weights, so that a step costs little beside the loss."""
    method = SoftSharingTraining(LeNet300(), SoftWeightSharer())
    prior, weights = method.mixtures[0], method._flat(method._groups[0]).detach()
    step = prior._step(*(float(v) / prior.unit for v in torch.aminmax(weights)),
                       float(prior.mixture()[2].detach().max()))
    spread = float(weights.max() - weights.min()) / prior.unit
    assert spread / step < 0.01 * weights.numel()


def test_errors():
    with pytest.raises(ValueError, match="at least one layer a SoftWeightSharer"):
        SoftSharingTraining(network(), KMeansWeightSharer(4))
    with pytest.raises(ValueError, match="tau must be a number of at least 0"):
        SoftSharingTraining(network(), SoftWeightSharer(), tau=-1.0)
    with pytest.raises(ValueError, match="zero_weight"):
        SoftSharingTraining(network(), SoftWeightSharer(zero_weight=2.0))
    one = SoftSharingTraining(network(), SoftWeightSharer())
    two = SoftSharingTraining(network(), {"0": SoftWeightSharer(), "2": SoftWeightSharer()})
    with pytest.raises(ValueError, match="the state has 2 mixtures, this method 1"):
        one.load_state_dict(two.state_dict())
