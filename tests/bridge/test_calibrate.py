"""Second moments of layer inputs against brute force, and what calibration leaves as it was."""
# SPDX-License-Identifier: BSD-3-Clause

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import skfactor
from skfactor import KMeansWeightSharer
from skfactor.bridge.calibrate import collect_moments, input_vectors, model_batches, register_input_vectors
from skfactor.bridge.layers import entries_of_module
from skfactor.estimators.base import BaseCompressor
from tests._nets import SmallCNN, TinyLM


class Recorder(BaseCompressor):
    """Keeps what fit was given."""

    def fit(self, X, y=None, importance=None, input_gram=None):
        self.given_ = {"importance": importance, "input_gram": input_gram}
        self.inner_ = KMeansWeightSharer(n_clusters=2).fit(X)
        self.decoder_ = self.inner_.decoder_
        return self

    def transform(self, X):
        return self.inner_.transform(X)


def given(model, calibration, rules=None):
    result = skfactor.compress(model, rules or Recorder(), calibration=calibration, progress=False)
    return {n: e.given_ for n, e in result.estimators_.items()}, result.uncalibrated


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gram(u):
    """Brute force: the mean of the outer products, one by one, in float64."""
    u = u.reshape(-1, u.shape[-1]).double()
    return sum(torch.outer(v, v) for v in u).numpy() / len(u)


def test_grams_of_a_network_against_unfold():
    model, x = SmallCNN().eval(), randn(3, 3, 6, 6)
    found, missing = given(model, x)
    assert missing == {}
    with torch.no_grad():
        h = F.relu(model.bn1(model.conv1(x)))
        features = F.relu(model.conv2(h)).mean(dim=(2, 3))
    patches = F.unfold(x, 3, padding=1).transpose(1, 2)
    np.testing.assert_allclose(found["conv1.weight"]["input_gram"], gram(patches), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found["linear.weight"]["input_gram"], gram(features), rtol=1e-5, atol=1e-7)
    grouped = found["conv2.weight"]["input_gram"]
    assert grouped.shape == (2, 36, 36)
    for g, part in zip(grouped, h.chunk(2, dim=1), strict=True):
        np.testing.assert_allclose(g, gram(F.unfold(part, 3, stride=2).transpose(1, 2)), rtol=1e-5, atol=1e-7)


def test_gram_measures_the_error_of_the_output():
    """tr(E G Eᵀ) is the mean squared change of the layer's output, for convolutions of every kind."""
    for layer, x in [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), randn(3, 4, 7, 7)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), randn(3, 4, 5, 5)),
        (nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular"), randn(3, 4, 9)),
    ]:
        result = skfactor.compress(layer, KMeansWeightSharer(n_clusters=3), calibration=x, progress=False)
        (record,) = [r for r in result.records if r.output_error is not None]
        with torch.no_grad():
            bias = layer.bias.reshape(-1, *[1] * (x.dim() - 2))
            expected = (result.model(x) - layer(x)).square().sum() / (layer(x) - bias).square().sum()
        assert record.output_error == pytest.approx(float(expected), rel=1e-4)


def test_calibrated_sharing_keeps_the_output_better():
    """Inputs that hardly vary in most directions: the error goes where it does not show."""
    torch.manual_seed(0)
    layer, x = nn.Linear(20, 30), randn(200, 3) @ randn(3, 20, seed=1)
    with torch.no_grad():
        errors = [(skfactor.compress(layer, KMeansWeightSharer(n_clusters=4), calibration=c, progress=False).model(x)
                   - layer(x)).square().sum() for c in (None, x)]
    assert errors[1] < errors[0]


def test_every_form_of_calibration_is_the_same():
    model, x, y = SmallCNN(), randn(8, 3, 6, 6), torch.arange(8)
    expected = given(model, x)[0]
    forms = {
        "array": x.numpy(),
        "tuple": (x,),
        "dict": {"x": x},
        "list": [x[:3], x[3:]],
        "list of arrays": [x[:3].numpy(), x[3:].numpy()],
        "pairs": [(x[:5], y[:5]), [x[5:], y[5:]]],
        "dicts": [{"x": x[:5]}, {"x": x[5:]}],
        "loader": DataLoader(TensorDataset(x, y), batch_size=3),
        "generator": (part for part in x.split(4)),
        "float64": x.double(),
    }
    for name, form in forms.items():
        found = given(model, form)[0]
        for layer, side in expected.items():
            np.testing.assert_allclose(found[layer]["input_gram"], side["input_gram"], 1e-5, 1e-7, err_msg=name)


def test_forward_of_two_inputs_takes_two_of_a_batch():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.bilinear = nn.Bilinear(3, 4, 2)

        def forward(self, a, b, scale=1.0):
            return self.bilinear(a, b) * scale

    a, b, y = randn(6, 3), randn(6, 4, seed=1), torch.zeros(6)
    expected = gram(torch.einsum("ni,nj->nij", a, b).flatten(1))
    for calibration in ((a, b), [(a, b, y)], {"a": a, "b": b}):
        found, _ = given(Two(), calibration)
        np.testing.assert_allclose(found["bilinear.weight"]["input_gram"], expected, rtol=1e-5, atol=1e-6)


def test_big_batches_run_in_pieces(monkeypatch):
    model, x = SmallCNN(), randn(9, 3, 6, 6)
    expected = given(model, x)[0]
    monkeypatch.setattr("skfactor.bridge.calibrate.BATCH", 2)
    monkeypatch.setattr("skfactor.bridge.calibrate.CHUNK", 100)
    assert [len(args[0]) for args, _ in model_batches(model, x)] == [2, 2, 2, 2, 1]
    found = given(model, x)[0]
    for layer, side in expected.items():
        np.testing.assert_allclose(found[layer]["input_gram"], side["input_gram"], rtol=1e-5, atol=1e-7)


def test_module_used_twice_adds_up():
    shared = nn.Linear(4, 4)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = shared

        def forward(self, x):
            return self.b(F.relu(self.a(x)))

    x = randn(10, 4)
    found, _ = given(Twice(), x)
    with torch.no_grad():
        both = torch.cat([x, F.relu(shared(x))])
    np.testing.assert_allclose(found["a.weight"]["input_gram"], gram(both), rtol=1e-5, atol=1e-7)


def test_tied_layers_of_one_kind_add_up_and_of_two_kinds_are_listed():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(F.relu(self.a(x)))

    x, model = randn(10, 4), Tied()
    with torch.no_grad():
        both = torch.cat([x, F.relu(model.a(x))])
    np.testing.assert_allclose(given(model, x)[0]["a.weight"]["input_gram"], gram(both), rtol=1e-5, atol=1e-7)
    found, missing = given(TinyLM(), torch.randint(50, (4, 7)))
    assert missing == {"wte.weight": "tied between layers of different kinds"}
    assert found["fc.weight"]["input_gram"].shape == (16, 16)


def test_embedding_rows_are_weighted_by_their_use():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    tokens = torch.tensor([[0, 1], [1, 3], [1, 1]])
    found, _ = given(model, tokens)
    counts = np.array([1, 4, 0, 1, 0]) + 1.0
    np.testing.assert_allclose(found["0.weight"]["importance"][:, 0], counts / counts.mean())
    assert found["0.weight"]["input_gram"] is None


def test_layers_that_are_not_reached_or_not_known_are_listed():
    class Unused(SmallCNN):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(3, 3)
            self.free = nn.Parameter(torch.randn(4, 4))

    result = skfactor.compress(Unused(), {"free": KMeansWeightSharer(n_clusters=2), "*": Recorder()},
                               calibration=randn(2, 3, 6, 6), progress=False)
    assert result.uncalibrated == {
        "spare.weight": "not reached by the calibration inputs",
        "free": "the inputs of this kind of layer are not known to calibration",
    }
    assert result.estimators_["spare.weight"].given_["input_gram"] is None


def test_attention_and_the_fused_encoder_are_seen():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True, dropout=0.0).eval()
    x = randn(3, 5, 8)
    found, missing = given(layer, x)
    np.testing.assert_allclose(found["self_attn.in_proj_weight"]["input_gram"], gram(x), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        h = layer.norm1(x + layer.self_attn(x, x, x, need_weights=False)[0])
    np.testing.assert_allclose(found["linear1.weight"]["input_gram"], gram(h), rtol=1e-4, atol=1e-5)
    assert list(missing) == ["self_attn.out_proj.weight"]  # read by the attention without a call


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype):
    model, x = nn.Linear(6, 4).to(dtype), randn(50, 6)
    found, _ = given(model, x)
    np.testing.assert_allclose(found["weight"]["input_gram"], gram(x.to(dtype)), rtol=1e-5, atol=1e-6)


def test_modes_hooks_statistics_and_inputs_stay_also_after_an_error():
    model = SmallCNN()
    model.bn1.eval()
    network = entries_of_module(model)
    owners = {n: network.owners[n] for n in ("conv1.weight", "conv2.weight")}
    before = (copy.deepcopy(model.state_dict()), [m.training for m in model.modules()])
    with pytest.raises(RuntimeError):
        collect_moments(model, owners, model_batches(model, [randn(2, 3, 6, 6), randn(2, 4, 6, 6)]))
    moments = collect_moments(model, owners, model_batches(model, randn(2, 3, 6, 6)))
    assert list(moments.grams) == list(owners)
    assert [m.training for m in model.modules()] == before[1]
    assert all(torch.equal(v, before[0][k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.is_grad_enabled()


def test_inputs_that_are_not_finite_are_listed():
    x = randn(4, 3, 6, 6)
    x[0, 0, 0, 0] = float("nan")
    found, missing = given(SmallCNN(), x)
    assert found["conv1.weight"]["input_gram"] is None
    assert missing["conv1.weight"] == "its inputs are not finite"


@pytest.mark.parametrize(("calibration", "error", "message"), [
    ([], ValueError, "calibration holds no inputs"),
    (torch.empty(0, 3, 6, 6), ValueError, "calibration holds no inputs"),
    (torch.tensor(1.0), ValueError, "got a scalar"),
    ("images", TypeError, "got str"),
    (3, TypeError, "got int"),
])
def test_wrong_calibration(calibration, error, message):
    with pytest.raises(error, match=message):
        skfactor.compress(SmallCNN(), KMeansWeightSharer(n_clusters=2), calibration=calibration)


def test_register_input_vectors():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return 2 * x @ self.weight.T

    with pytest.raises(TypeError, match="not known to calibration"):
        input_vectors(Doubled(), randn(2, 4))
    skfactor.register_layer(Doubled)
    register_input_vectors(Doubled, lambda module, args, kwargs, parameter: iter([2 * args[0][None]]))
    x = randn(5, 4)
    found, _ = given(nn.Sequential(Doubled()), x)
    np.testing.assert_allclose(found["0.weight"]["input_gram"], gram(2 * x), rtol=1e-5)


def test_moments_measured_once_give_what_the_inputs_give():
    torch.manual_seed(0)
    net, x = SmallCNN().eval(), torch.randn(20, 3, 8, 8)
    moments = skfactor.bridge.calibration_moments(net, x)
    rules = {"*": skfactor.LowRankFactorizer(2), "linear": skfactor.KMeansWeightSharer(4)}
    once = skfactor.compress(net, rules, calibration=moments, progress=False)
    again = skfactor.compress(net, rules, calibration=x, progress=False)
    plain = skfactor.compress(net, rules, progress=False)
    for name, tensor in again.state_dict().items():
        assert torch.equal(once.state_dict()[name], tensor)
    assert not torch.equal(once.state_dict()["conv2.weight"], plain.state_dict()["conv2.weight"])
    assert once.uncalibrated == again.uncalibrated
