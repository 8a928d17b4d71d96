"""EntropyTraining: rounded weights, prices that follow the coder, steps that learn, files as large as estimated."""

import copy
import os

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import skfactor
from skfactor.bridge.training.entropy import EntropyTraining
from skfactor.bridge.training.groups import group_log_penalty
from skfactor.exceptions import LayerError


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))


def blobs(n=300, seed=1):
    """Three classes that two of twenty inputs tell."""
    rng = np.random.RandomState(seed)
    y = rng.randint(0, 3, n)
    x = rng.randn(n, 20)
    x[:, :2] += 4 * np.array([[0, 1], [1, -1], [-1, -1]])[y]
    return torch.from_numpy(x).float(), torch.from_numpy(y)


def steps_of_training(method, n, x, y, optimizer=None):
    optimizer = optimizer or torch.optim.Adam(method.parameter_groups(lr=5e-3))
    for _ in range(n):
        loss = F.cross_entropy(method.model(x), y) + method.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step()
    return optimizer


def trained(n=400, **params):
    x, y = blobs()
    method = EntropyTraining(net(), **{"rate_weight": 1e-3, "group_weight": 1e-4, **params})
    steps_of_training(method, n, x, y)
    return method, x, y


def test_group_penalty_against_loops_and_its_gradient():
    w = torch.randn(3, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    size = w.detach().abs().numpy() / 0.5
    expected = sum(np.log2(1 + size[i].sum()) for i in range(3)) + sum(np.log2(1 + size[:, j].sum()) for j in range(4))
    np.testing.assert_allclose(group_log_penalty(w, 0.5).item(), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda v: group_log_penalty(v, 0.5), (w,))
    with pytest.raises(ValueError, match="at least 2 dimensions, got 1"):
        group_log_penalty(torch.ones(3))


def test_weights_are_multiples_of_the_step_and_gradients_pass_through():
    method = EntropyTraining(net(), rate_weight=0.0)
    layer, step = method.model[0], method.steps()["0.weight"]
    codes = layer.weight.detach().numpy() / step
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-4)
    original = layer.parametrizations.weight.original
    np.testing.assert_allclose(np.rint(codes), np.rint(original.detach().numpy() / step))
    layer.weight.sum().backward()
    np.testing.assert_allclose(original.grad.numpy(), 1.0, rtol=1e-6)
    log_step = layer.parametrizations.weight[0].log_step
    error = float((layer.weight - original).sum().detach())  # d(step q)/d log step = step (q - w / step)
    np.testing.assert_allclose(float(log_step.grad), error, rtol=1e-3)


def test_penalty_is_the_formula():
    method = EntropyTraining(net(), rate_weight=8e-3, group_weight=2e-3)
    bits = groups = 0.0
    for coded in method._coded:
        u = (coded.original / coded.codes.step()).detach().double().numpy()
        bits += (coded.margin.numpy() * np.log(1 + 2 * np.abs(u)) / np.log(3)).sum()
        if u.ndim > 1:
            groups += np.log2(1 + np.abs(u).sum(1)).sum() + np.log2(1 + np.abs(u).sum(0)).sum()
    np.testing.assert_allclose(float(method.penalty().detach()), 1e-3 * bits + 2e-3 * groups, rtol=1e-5)


def test_gradients_of_the_penalty_are_those_of_the_formula_by_autograd():
    method = EntropyTraining(net(), rate_weight=8e-3, group_weight=2e-3)
    expected = torch.zeros(())
    for coded in method._coded:
        u = coded.original / (coded.codes.log_step.exp() * coded.codes.factor)
        expected = expected + 1e-3 * (coded.margin * torch.log1p(2 * u.abs())).sum() / np.log(3)
        if u.dim() > 1:
            expected = expected + 2e-3 * group_log_penalty(u)
    parameters = list(method.model.parameters())
    got = torch.autograd.grad(3 * method.penalty(), parameters)
    for a, b in zip(got, torch.autograd.grad(3 * expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_codes_in_busy_rows_and_columns_are_cheaper():
    layer = nn.Linear(40, 30, bias=False)
    with torch.no_grad():
        layer.weight.mul_(1e-3)
        layer.weight[0], layer.weight[:, 0] = 1.0, 1.0
    method = EntropyTraining(layer, step=1.0)
    margin = method._coded[0].margin
    assert margin[0, 0] < margin[0, 5] < margin[5, 5]
    assert margin[0, 0] < margin[5, 0] < margin[5, 5]


def test_prices_are_read_off_the_codes_every_hundred_steps():
    method = EntropyTraining(net(), rate_weight=1e-3)
    before = method._coded[0].margin.clone()
    with torch.no_grad():
        method._coded[0].original[10:] = 0.0
    for _ in range(99):
        method.after_step()
    assert torch.equal(method._coded[0].margin, before)
    method.after_step()
    after = method._coded[0].margin
    assert (after[10:] > before[10:]).all()  # a code in a row of zeros is dear
    assert (after[:10].mean() < after[10:].mean())


def test_training_keeps_the_answer_and_shrinks_the_file(tmp_path):
    method, x, y = trained()
    result = method.finish()
    path = result.save(tmp_path / "small.skf")
    fresh = skfactor.load_into(net(seed=9), path)
    assert (fresh(x).argmax(1) == y).float().mean() > 0.95
    assert torch.equal(fresh(x), method.model(x))
    raw = 4 * sum(p.numel() for p in fresh.parameters())
    assert os.path.getsize(path) < raw / 25
    # only the two inputs that tell the classes matter: most of the others have vanished as whole columns
    dead = (fresh[0].weight == 0).all(0)
    assert dead[2:].float().mean() > 0.5
    assert not dead[:2].any()


@pytest.mark.parametrize("rate_weight", [1e-5, 1e-3])
def test_estimate_is_within_a_quarter_of_the_file(tmp_path, rate_weight):
    method, _, _ = trained(rate_weight=rate_weight)
    size = os.path.getsize(method.finish().save(tmp_path / "small.skf"))
    assert abs(method.estimated_bytes() - size) < 0.25 * size


def test_steps_learn_and_a_higher_price_gives_a_smaller_file():
    cheap, _, _ = trained(rate_weight=1e-5, group_weight=0.0)
    dear, _, _ = trained(rate_weight=1e-2, group_weight=0.0)
    assert dear.estimated_bytes() < 0.7 * cheap.estimated_bytes()
    before = EntropyTraining(net()).steps()
    assert all(dear.steps()[name] != before[name] for name in before if name.endswith("weight"))


def test_two_runs_give_one_file(tmp_path):
    files = []
    for k in range(2):
        method, _, _ = trained(n=150)
        files.append((method.finish().save(tmp_path / f"{k}.skf")).read_bytes())
    assert files[0] == files[1]


def test_interrupted_training_goes_on_to_the_same_result():
    x, y = blobs()
    whole = EntropyTraining(net(), rate_weight=1e-3)
    steps_of_training(whole, 250, x, y)

    first = EntropyTraining(net(), rate_weight=1e-3)
    optimizer = steps_of_training(first, 130, x, y)
    state, optimizer_state = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    second = EntropyTraining(net(seed=5), rate_weight=1e-3)
    second.load_state_dict(state)
    other = torch.optim.Adam(second.parameter_groups(lr=5e-3))
    other.load_state_dict(optimizer_state)
    steps_of_training(second, 120, x, y, other)
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_users_network_is_never_changed_and_skipped_tensors_stay():
    model = net()
    before = copy.deepcopy(model.state_dict())
    method = EntropyTraining(model, skip=("4.*",))
    x, y = blobs()
    steps_of_training(method, 3, x, y)
    result = method.finish()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert set(result.skipped) == {"4.weight", "4.bias"}
    assert list(result.model.state_dict()) == list(before)


def test_errors():
    with pytest.raises(ValueError, match="rate_weight must be a number of at least 0, got -1"):
        EntropyTraining(net(), rate_weight=-1)
    with pytest.raises(ValueError, match="step must be a positive number, got 0"):
        EntropyTraining(net(), step=0)
    with pytest.raises(TypeError, match="group_weight must be a number of at least 0, got str"):
        EntropyTraining(net(), group_weight="much")
    with pytest.raises(LayerError, match="no weight of the network is left"):
        EntropyTraining(net(), skip=("*",))
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(LayerError, match="is tied to"):
        EntropyTraining(tied)
