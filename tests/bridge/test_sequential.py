"""Folding of batch normalisation, layer-after-layer fitting, and importance, each against what it must equal."""
# SPDX-License-Identifier: BSD-3-Clause

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skfactor
from skfactor import KMeansWeightSharer
from skfactor.bridge import Calibration, output_importance
from skfactor.bridge.balance import balance_rows
from skfactor.bridge.batchnorm import fold_batch_norm, normalisation_after
from skfactor.bridge.layers import layer_specs
from skfactor.estimators.base import BaseCompressor
from tests._nets import SmallCNN, TinyLM
from tests.bridge.test_calibrate import Recorder, randn

SHARE = KMeansWeightSharer(n_clusters=4)


class Keeping(BaseCompressor):
    """Stores a matrix exactly."""

    def fit(self, X, y=None, input_gram=None):
        self.inner_ = KMeansWeightSharer(n_clusters=X.size).fit(X)
        self.decoder_ = self.inner_.decoder_
        return self

    def transform(self, X):
        return self.inner_.transform(X)


class Normalised(nn.Module):
    """Layers of several kinds with a batch normalisation behind each."""

    def __init__(self):
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 8, 3, groups=1), nn.BatchNorm2d(8)
        self.b, self.bn_b = nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2, bias=False), nn.BatchNorm2d(6)
        self.c, self.bn_c = nn.Linear(6, 5), nn.BatchNorm1d(5)
        self.d = nn.Linear(5, 4)

    def forward(self, x):
        x = F.relu(self.bn_a(self.a(x)))
        x = F.relu(self.bn_b(self.b(x))).mean(dim=(2, 3))
        return self.d(F.relu(self.bn_c(self.c(x))))


@pytest.fixture
def normalised():
    torch.manual_seed(0)
    model = Normalised().double()
    for _ in range(5):
        model(randn(16, 3, 8, 8, dtype=torch.float64) * 2 + 1)
    for norm in (model.bn_a, model.bn_b, model.bn_c):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return model.eval()


def layers_of(model):
    return [(m, layer_specs(m)[0]) for m in model.modules() if layer_specs(m)]


def test_fold_keeps_the_function_and_empties_the_normalisation(normalised):
    model, x = copy.deepcopy(normalised), randn(4, 3, 8, 8, dtype=torch.float64)
    pairs = normalisation_after(model, [m for m, _ in layers_of(model)], (x,), {})
    assert pairs == {model.a: model.bn_a, model.b: model.bn_b, model.c: model.bn_c}
    assert fold_batch_norm(model, layers_of(model), (x,), {}) == 3
    with torch.no_grad():
        torch.testing.assert_close(model(x), normalised(x), rtol=1e-10, atol=1e-12)
    for norm in (model.bn_a, model.bn_b, model.bn_c):
        assert (norm.weight == 1).all()
        assert not norm.running_mean.any()
        torch.testing.assert_close(norm.running_var + norm.eps, torch.ones_like(norm.running_var))


def test_balanced_rows_keep_the_function_and_count_the_same(normalised):
    model, x = copy.deepcopy(normalised), randn(40, 3, 8, 8, dtype=torch.float64)
    specs = dict(layers_of(model))
    fold_batch_norm(model, specs.items(), (x,), {})
    pairs = normalisation_after(model, specs, (x,), {})
    layers = {str(i): layer for i, layer in enumerate(pairs)}
    before, told = output_importance(model, layers, x), {}
    for name, r in before.items():
        layer = layers[name]
        told[name] = balance_rows(layer, specs[layer], pairs[layer], r)
        # 8 significant bits, so that the file keeps the scales as they are
        mantissa, _ = np.frexp(pairs[layer].weight.detach().numpy())
        assert (mantissa * 2**8 % 1 == 0).all()
    with torch.no_grad():
        torch.testing.assert_close(model(x), normalised(x), rtol=1e-9, atol=1e-11)
    for name, r in output_importance(model, layers, x).items():
        np.testing.assert_allclose(r, told[name], rtol=1e-9)
        alive = before[name] > 0.01 * before[name].mean()
        assert alive.sum() > 1
        assert r[alive].max() <= 2 * r[alive].min()


def test_fold_refuses_an_output_with_a_second_reader_and_skips_a_layer_that_runs_twice(normalised):
    class SecondReader(Normalised):
        def forward(self, x):
            self.a.register_forward_hook(lambda m, args, y: outputs.append(y))
            return super().forward(x) + outputs.pop().mean()

    class RunsTwice(Normalised):
        def forward(self, x):
            return super().forward(x) + self.a(x).mean()

    outputs, x = [], randn(4, 3, 8, 8, dtype=torch.float64)
    for kind in (SecondReader, RunsTwice):
        model = kind().double()
        model.load_state_dict(normalised.state_dict())
        if kind is RunsTwice:
            assert fold_batch_norm(model, layers_of(model), (x,), {}) == 2
        else:
            with pytest.raises(ValueError, match="something else reads"):
                fold_batch_norm(model, layers_of(model), (x,), {})


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("fold", [False, True])
def test_exact_estimators_give_the_same_function(normalised, sequential, fold):
    x = randn(20, 3, 8, 8, dtype=torch.float64)
    before = copy.deepcopy(normalised.state_dict())
    result = skfactor.compress(normalised, Keeping(), progress=False,
                               calibration=Calibration(x, sequential=sequential, fold_batch_norm=fold))
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), normalised(x), rtol=1e-8, atol=1e-10)
    assert all(torch.equal(v, before[k]) for k, v in normalised.state_dict().items())
    assert list(result.estimators_) == ["a.weight", "b.weight", "c.weight", "d.weight"]
    assert result.uncalibrated == {}
    for name, value in result.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[name])


def test_sequential_biases_keep_the_mean_of_every_output(normalised):
    """The shift t makes E[Ŵ û + t] = E[W u], layer by layer, whatever the codes are."""
    x = randn(40, 3, 8, 8, dtype=torch.float64)
    result = skfactor.compress(normalised, SHARE, calibration=Calibration(x, sequential=True), progress=False)

    def means(model):
        seen = {}
        for name in ("bn_a", "bn_b", "bn_c", "d"):
            module = getattr(model, name)
            module.register_forward_hook(lambda m, a, y, name=name: seen.__setitem__(
                name, y.transpose(0, 1).flatten(1).mean(1)))
        with torch.no_grad():
            model(x)
        return seen

    before, after = means(copy.deepcopy(normalised)), means(result.model)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-6, atol=1e-8)


def test_sequential_target_is_the_best_weight_for_the_inputs_it_gets():
    """Two linear layers: the second one's target is the least-squares answer to what the first one does now."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 3, bias=False)).double()
    x = randn(200, 6, dtype=torch.float64)
    result = skfactor.compress(model, {"0": KMeansWeightSharer(n_clusters=5), "1": Keeping()},
                               calibration=Calibration(x, sequential=True), progress=False)
    with torch.no_grad():
        u, u_hat = model[0](x), result.model[0](x)
        best = torch.linalg.lstsq(u_hat, model[1](u)).solution.T
        plain = (model[1](u_hat) - model[1](u)).square().sum()
        found = (result.model[1](u_hat) - model[1](u)).square().sum()
        least = (u_hat @ best.T - model[1](u)).square().sum()
    assert least <= found < plain
    assert found < least + 0.02 * (plain - least)  # the ridge δ keeps it from the minimum


def test_sequential_is_better_than_one_pass_on_a_deep_network():
    torch.manual_seed(2)
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(24, 24), nn.ReLU())))
    x = randn(400, 24) @ randn(24, 24, seed=1)
    errors = []
    for calibration in (x, Calibration(x, sequential=True)):
        result = skfactor.compress(model, SHARE, calibration=calibration, progress=False)
        with torch.no_grad():
            errors.append(float((result.model(x) - model(x)).square().sum()))
    assert errors[1] < errors[0]


def test_sequential_with_embeddings_ties_and_layers_out_of_reach():
    class WithSpare(TinyLM):
        def __init__(self):
            super().__init__()
            self.kind = nn.Embedding(3, 16)
            self.spare = nn.Linear(3, 3)

        def forward(self, tokens):
            return super().forward(tokens) + self.kind(tokens % 3).mean()

    rules = {"*.bias": KMeansWeightSharer(n_clusters=1), "*": Recorder()}
    model, tokens = WithSpare(), torch.randint(50, (6, 9))
    result = skfactor.compress(model, rules, calibration=Calibration([tokens], sequential=True), progress=False)
    given = {n: e.given_ for n, e in result.estimators_.items() if isinstance(e, Recorder)}
    assert given["kind.weight"]["importance"].shape == (3, 1)
    assert given["fc.weight"]["input_gram"].shape == (16, 16)
    assert result.uncalibrated["spare.weight"] == "not reached by the calibration inputs"
    assert "different kinds" in result.uncalibrated["wte.weight"]
    assert result.model.head.weight is result.model.wte.weight
    # biases are fitted last, on what the shifts made of them
    assert len(result.model.fc.bias.unique()) == 1
    assert all(torch.equal(v, result.model.state_dict()[k]) for k, v in result.state_dict().items())


def test_importance_against_the_full_jacobian():
    """With all classes' gradients written out: r_c = Σ_positions (J diag(p) − p pᵀ J)_cc, averaged over images."""
    torch.manual_seed(0)
    model, x = SmallCNN().double().eval(), randn(2, 3, 6, 6, dtype=torch.float64)
    found = output_importance(model, {"conv1": model.conv1}, x.repeat(400, 1, 1, 1))["conv1"]  # 400 draws of v
    with torch.no_grad():
        y = model.conv1(x)
    expected = torch.zeros(8, dtype=torch.float64)
    for image in y:
        def rest(z):
            h = F.relu(model.conv2(F.relu(model.bn1(z[None])))).mean(dim=(2, 3))
            return model.linear(h)[0]

        J = torch.autograd.functional.jacobian(rest, image)  # (classes, channels, h, w)
        p = torch.softmax(rest(image), 0).detach()
        H = torch.diag(p) - torch.outer(p, p)
        expected += torch.einsum("kchw,kl,lchw->c", J, H, J) / len(x)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0.2)


def test_importance_leaves_model_and_inputs_alone():
    model, x = SmallCNN(), randn(3, 3, 6, 6)
    model.conv1.requires_grad_(False)
    state = torch.get_rng_state()
    found = output_importance(model, {"conv2": model.conv2, "linear": model.linear}, x)
    assert found["conv2"].shape == (12,)
    assert found["linear"].shape == (5,)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not x.requires_grad
    assert not model.conv2._forward_hooks
    assert torch.equal(torch.get_rng_state(), state)


def test_a_pass_ends_at_the_layer_that_is_fitted():
    """The last layer runs only where the order and the normalisations are looked for, whatever the number of inputs."""
    runs = []

    class Last(nn.Linear):
        def forward(self, x):
            runs.append(len(x))
            return super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), Last(4, 3))
    for n_batches in (2, 5):
        runs.clear()
        skfactor.compress(model, SHARE, progress=False,
                          calibration=Calibration([randn(8, 6, seed=i) for i in range(n_batches)], sequential=True))
        assert len(runs) == 2
