"""`allocate` against the size asked for, brute force over the settings, and what it is built of."""
# SPDX-License-Identifier: BSD-3-Clause

import copy
import itertools
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import skfactor
from skfactor import Calibration, UniformQuantizer
from skfactor.bridge.allocation import TensorFacts, UniformSteps
from skfactor.bridge.assumed import LONGEST_ROW
from skfactor.bridge.calibrate import thinned
from skfactor.solvers.feedback import assumed_gram
from tests._data import data_dir, needs_data
from tests._nets import ResNet, TinyLM
from tests.bridge.test_calibrate import Recorder, randn


class Net(nn.Module):
    """Convolution, batch normalisation, and linear layers of which the first hardly reaches the output."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.weak, self.strong = nn.Linear(24, 96), nn.Linear(24, 96)
        self.head = nn.Linear(192, 10)

    def forward(self, x):
        u = F.relu(self.norm(self.conv(x))).mean(dim=(2, 3))
        return self.head(torch.cat([0.02 * F.relu(self.weak(u)), F.relu(self.strong(u))], 1))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = Net()
    for _ in range(20):
        model(randn(32, 3, 8, 8))
    nn.init.normal_(model.norm.weight, 1, 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def allocation(net):
    return skfactor.allocate(net, budget="10x", calibration=randn(200, 3, 8, 8), progress=False)


def tensor_bytes(state):
    return sum(v.numel() * v.element_size() for v in state.values())


def divergence(model, other, x):
    """KL of the predictions of two networks."""
    with torch.no_grad():
        return F.kl_div(F.log_softmax(other(x), 1), F.log_softmax(model(x), 1), log_target=True,
                        reduction="batchmean").item()


def test_file_has_the_size_asked_for(net, allocation, tmp_path):
    target = tensor_bytes(net.state_dict()) / 10
    size = os.path.getsize(allocation.result.save(tmp_path / "net.skf"))
    assert 0.98 * target <= size <= target
    assert size == allocation.n_bytes == allocation.history[-1]["bytes"]
    assert [h["final"] for h in allocation.history] == sorted(h["final"] for h in allocation.history)


def test_network_is_untouched_and_the_file_gives_the_result(net, allocation, tmp_path):
    before = copy.deepcopy(net.state_dict())
    budget = tensor_bytes(before) // 6
    found = skfactor.allocate(net, budget=budget, calibration=randn(100, 3, 8, 8), progress=False)
    result = found.result
    assert 0.98 * budget <= found.n_bytes <= budget
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    restored = skfactor.load_into(Net(), result.save(tmp_path / "net.skf")).eval()
    x = randn(8, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(restored(x), result.model(x))


def test_rules_give_the_result_again(net, allocation):
    """The settings found are plain rules; calibrated the same way they give the same tensors."""
    calibration = Calibration(randn(200, 3, 8, 8), sequential=True, fold_batch_norm=True, balance_rows=True,
                              max_vectors=8192)
    result = skfactor.compress(net, allocation.rules, calibration=calibration, progress=False)
    found = allocation.result.state_dict()
    for name, value in result.state_dict().items():
        torch.testing.assert_close(value, found[name], rtol=1e-6, atol=0)
    assert isinstance(allocation.rules["conv.weight"], UniformQuantizer)


def test_bytes_go_where_the_output_needs_them(net, allocation):
    """Less KL than one relative step for all layers at the same size, both fitted to the same inputs."""
    steps = {n: rule.step for n, rule in allocation.rules.items() if isinstance(rule, UniformQuantizer)}
    assert steps["weak.weight"] > 10 * steps["strong.weight"]
    calibration = Calibration(randn(200, 3, 8, 8), sequential=True, fold_batch_norm=True, balance_rows=True)
    rules = {name: rule for name, rule in allocation.rules.items() if name not in steps}
    for step in (0.4, 0.6, 0.8, 1.0, 1.2, 1.4):
        even = skfactor.compress(net, rules | {"*": UniformQuantizer(step)}, calibration=calibration, progress=False)
        if even.report.total["bytes_after"] <= allocation.n_bytes:
            break
    x = randn(500, 3, 8, 8)
    assert even.report.total["bytes_after"] > 0.9 * allocation.n_bytes
    assert divergence(net, allocation.result.model, x) < 0.8 * divergence(net, even.model, x)


def test_equal_slopes_are_the_best_of_all_pairs_of_steps():
    """Two layers of different scale and sensitivity: no pair of steps of a fine grid has less cost in as many bytes."""
    rng = np.random.default_rng(0)
    layers = [TensorFacts("a", 40_000, rng.laplace(0, 1.0, 40_000), 20.0, 0.5),
              TensorFacts("b", 20_000, rng.normal(0, 0.1, 20_000), 0.6, 900.0)]
    method = UniformSteps(entropy_weight=0.0)

    def figures(facts, step):
        error = np.square(facts.sample - step * np.rint(facts.sample / step)).sum()
        base = step * np.sqrt(facts.sensitivity)
        return method.estimated_bytes(facts, base), facts.sensitivity * error

    base = 0.4
    ours = [figures(f, method.estimator(f, base).step) for f in layers]
    n_bytes, cost = map(sum, zip(*ours, strict=True))
    steps = [[figures(f, s * base / np.sqrt(f.sensitivity)) for s in np.geomspace(0.4, 2.5, 60)] for f in layers]
    best = min(c1 + c2 for (b1, c1), (b2, c2) in itertools.product(*steps) if b1 + b2 <= n_bytes)
    assert cost <= 1.02 * best


def test_without_data_state_dict_and_file_agree(net, tmp_path):
    state = net.state_dict()
    save_file(state, tmp_path / "net.safetensors")
    budget = int(tensor_bytes(state) / 8)
    from_module, from_state, from_file = (
        skfactor.allocate(source, budget=budget, progress=False)
        for source in (net, state, tmp_path / "net.safetensors"))
    assert from_module.rules.keys() == from_state.rules.keys() == from_file.rules.keys()
    assert "norm.running_var" in from_state.rules
    weights = [name for name, rule in from_state.rules.items() if isinstance(rule, UniformQuantizer)]
    assert len(weights) == 4
    for found in (from_module, from_file):  # tensors may stand in another order, which moves the size by some bytes
        ratios = [found.rules[name].step / from_state.rules[name].step for name in weights]
        assert max(ratios) / min(ratios) == pytest.approx(1, abs=1e-12)
        assert ratios[0] == pytest.approx(1, abs=0.05)
    for found in (from_module, from_state, from_file):
        assert 0.98 * budget <= found.n_bytes <= budget


def test_calibration_without_sequence_and_a_network_without_normalisation():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    x = randn(300, 40)
    for sequential in (False, True):
        found = skfactor.allocate(model, budget="8x", calibration=Calibration(x, sequential=sequential),
                                  progress=False)
        assert found.n_bytes <= tensor_bytes(model.state_dict()) / 8
        assert all(h["final"] for h in found.history) is not sequential
        assert divergence(model, found.result.model, x) < 0.05


def test_tied_language_model_from_a_loader():
    torch.manual_seed(2)
    tokens = [torch.randint(1, 50, (16, 12)) for _ in range(4)]
    found = skfactor.allocate(TinyLM(), budget="4x", calibration=iter(tokens), progress=False)
    assert found.result.model.head.weight is found.result.model.wte.weight
    assert {"wte.weight", "fc.weight", "proj.weight"} <= found.rules.keys()


@pytest.mark.parametrize("budget", ["", "17", "x", "0x", "-3x", 0, -5, 1.5, True])
def test_wrong_budget(budget):
    with pytest.raises(ValueError, match="budget must be a positive number of bytes or a ratio"):
        skfactor.allocate(nn.Linear(4, 4), budget=budget)


def test_what_cannot_be_met_or_meant(net):
    with pytest.raises(ValueError, match=r"file of 100 bytes cannot be met; the smallest reached has \d+"):
        skfactor.allocate(net, budget=100, progress=False)
    with pytest.raises(ValueError, match="calibration runs the network"):
        skfactor.allocate(net.state_dict(), budget="4x", calibration=torch.zeros(3, 3, 8, 8))
    with pytest.raises(TypeError, match="got str 'asumed'"):
        skfactor.allocate(net, budget="4x", calibration="asumed")
    with pytest.raises(ValueError, match="nothing to compress"):
        skfactor.allocate(nn.BatchNorm1d(4), budget="4x")
    with pytest.raises(TypeError, match="model must be"):
        skfactor.allocate(3, budget="4x")


def test_a_generous_budget_ends_at_the_finest_steps(net):
    found = skfactor.allocate(net, budget="1x", progress=False)
    assert all(r.relative_error < 1e-4 for r in found.result.records)


def test_assumed_gram_reaches_the_estimators(tmp_path):
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6, 5))
    result = skfactor.compress(conv, Recorder(), calibration="assumed", progress=False)
    np.testing.assert_array_equal(result.estimators_["0.weight"].given_["input_gram"], assumed_gram((4, 3, 3)))
    np.testing.assert_array_equal(result.estimators_["2.weight"].given_["input_gram"], assumed_gram((6,)))
    assert result.uncalibrated == {}
    of_state = skfactor.compress(conv.state_dict(), Recorder(), calibration="assumed", progress=False)
    np.testing.assert_array_equal(of_state.estimators_["0.weight"].given_["input_gram"], assumed_gram((4, 3, 3)))


def test_assumed_calibration_of_a_file(tmp_path):
    torch.manual_seed(0)
    save_file({"a": torch.randn(16, 8, 3, 3), "b": torch.randn(16, 40)}, tmp_path / "in.safetensors")
    skfactor.compress_file(tmp_path / "in.safetensors", tmp_path / "out.skf", UniformQuantizer(), progress=False,
                           calibration="assumed")
    in_memory = skfactor.compress(tmp_path / "in.safetensors", UniformQuantizer(), calibration="assumed",
                                  progress=False).state_dict()
    assert all(torch.equal(v, in_memory[k]) for k, v in skfactor.load(tmp_path / "out.skf").items())
    plain = skfactor.compress(tmp_path / "in.safetensors", UniformQuantizer(), progress=False).state_dict()
    assert not torch.equal(plain["a"], in_memory["a"])
    with pytest.raises(ValueError, match="calibration of a file must be 'assumed' or None"):
        skfactor.compress_file(tmp_path / "in.safetensors", tmp_path / "x.skf", UniformQuantizer(), calibration=3)


def test_what_has_no_inputs_to_assume_is_listed():
    model = nn.ModuleDict({"table": nn.Embedding(9, 4), "wide": nn.Linear(LONGEST_ROW + 1, 2), "one": nn.Linear(4, 1)})
    result = skfactor.compress(model, UniformQuantizer(), calibration="assumed", progress=False)
    assert result.uncalibrated.keys() == {"table.weight", "wide.weight", "one.weight"}
    assert "rows of more than" in result.uncalibrated["wide.weight"]


def test_thinned_vectors_are_the_same_of_both_and_all_when_few():
    u = torch.arange(60.0).reshape(2, 10, 3)
    v = -u
    a, b = thinned((u, v), 4, seed=3)
    assert a.shape == (2, 4, 3)
    assert torch.equal(a, -b)
    assert len({tuple(row) for row in a[0].tolist()}) == 4
    assert thinned((u, v), None, seed=0)[0] is thinned((u, v), 10, seed=0)[0] is u


@needs_data
@pytest.mark.slow
def test_resnet20_without_data_is_near_the_original():
    """On calibration images of the data folder the predictions of a 10x smaller file agree with the original's."""
    from safetensors.torch import load_file

    model = ResNet(3)
    model.load_state_dict(load_file(data_dir() / "weights" / "cifar10_resnet20.safetensors"), strict=False)
    with np.load(data_dir() / "cifar10_train.npz") as file:
        x = torch.from_numpy(file["X"][:300]).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    x = (x - mean) / std
    found = skfactor.allocate(model.eval(), budget="10x", progress=False)
    restored = ResNet(3).eval()
    restored.load_state_dict(found.result.state_dict())
    with torch.no_grad():
        assert (model(x).argmax(1) == restored(x).argmax(1)).float().mean() > 0.97
