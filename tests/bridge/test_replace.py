"""compress(mode="factorized"): networks, files, ties, what stays dense and why, atomic replacement."""
# SPDX-License-Identifier: BSD-3-Clause

import copy
import json

import numpy as np
import pytest
import torch
from sklearn.pipeline import Pipeline
from torch import nn

import skfactor
from skfactor import Calibration, FormatError, KMeansWeightSharer, LayerError, LowRankFactorizer
from skfactor.bridge import dense_copy, register_module
from skfactor.bridge.factors import _BUILDERS, Factor
from skfactor.bridge.layers import entries_of_module
from skfactor.bridge.modules import FactorizedConv1D, FactorizedConv2d, FactorizedLayer, FactorizedLinear
from skfactor.codec.container import SkfFile, SkfWriter
from skfactor.codec.linear import ComponentsDecoder
from skfactor.codec.tensor import RawTensor
from skfactor.report import FACTORIZED, Report
from tests._nets import Block, ResNet, SmallCNN, TinyLM
from tests.bridge.test_apply import checksum, same

LOW = LowRankFactorizer(rank=2)


def factorize(model, rules=LOW, **options):
    return skfactor.compress(model, rules, mode="factorized", progress=False, **options)


def executions(result):
    return {e.layer: e for e in result.executions}


def agree(a, b, *inputs, tolerance=1e-5):
    with torch.no_grad():
        x, y = a(*inputs), b(*inputs)
    assert (x - y).abs().max() <= tolerance * y.abs().max()


class Dense(nn.Module):
    """Layers of many kinds, one of them twice, two of them tied."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.twice = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.again = self.twice
        self.up = nn.ConvTranspose2d(16, 12, 2, stride=2)
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)
        self.b.weight = self.a.weight
        self.heads = nn.ModuleDict({"small": nn.Linear(12, 3), "wide": nn.Linear(12, 24)})

    def forward(self, x):
        x = self.again(torch.relu(self.twice(torch.relu(self.stem(x)))))
        x = self.b(torch.relu(self.a(self.up(x).mean(dim=(2, 3)))))
        return torch.cat([self.heads["small"](x), self.heads["wide"](x)], dim=1)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Dense().eval()


def test_factorised_network_is_the_dense_reconstruction(net, tmp_path):
    x = torch.randn(2, 3, 8, 8)
    before = checksum(net)
    result = factorize(net)
    assert checksum(net) == before
    assert isinstance(result.model, Dense)
    dense = Dense().eval()
    dense.load_state_dict(result.state_dict())
    agree(result.model, dense, x)
    assert list(result.state_dict()) == list(net.state_dict())
    assert same(result.state_dict(), skfactor.compress(net, LOW, progress=False).state_dict())
    runs = executions(result)
    assert runs["stem"].execution == "factorized"
    assert runs["stem"].modules == "Conv2d 3>2 3x3, Conv2d 2>16 1x1"
    assert (runs["stem"].parameters_dense, runs["stem"].parameters) == (3 * 16 * 9, 2 * (27 + 16))
    assert runs["heads.small"].reason == ""
    assert runs["heads.small"].parameters == 2 * (12 + 3)
    assert result.model.again is result.model.twice
    assert runs["twice, again"].execution == "factorized"
    assert result.model.a[0].weight is result.model.b[0].weight
    assert result.model.a[1].weight is result.model.b[1].weight
    assert result.model.a.bias is not result.model.b.bias
    assert not any(module.training for module in result.model.modules())
    # every parameter that counts is in the chains or was never compressed
    size = sum(p.numel() for p in result.model.parameters())
    rest = sum(p.numel() for name, p in net.named_parameters() if "bias" in name)
    assert size == rest + sum(e.parameters for e in result.executions)


def test_float64_exactly(net):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    result = factorize(net.double())
    dense = Dense().double().eval()
    dense.load_state_dict(result.state_dict())
    agree(result.model, dense, x, tolerance=1e-12)


@pytest.mark.parametrize("rules", [
    LOW,
    Pipeline([("rank", LowRankFactorizer(rank=2)), ("share", KMeansWeightSharer(n_clusters=8))]),
    {"stem": LOW, "*": None},
], ids=["low rank", "shared codes", "one layer"])
def test_round_trip_through_the_file(net, rules, tmp_path):
    result = factorize(net, rules)
    path = result.save(tmp_path / "net.skf", {"accuracy": 0.9})
    fresh = Dense().train()
    for p in fresh.parameters():
        p.requires_grad_(False)
    bias = fresh.stem.bias
    assert skfactor.load_into(fresh, path) is fresh
    assert same(fresh.state_dict(), result.model.state_dict())
    assert fresh.stem.bias is bias
    assert fresh.again is fresh.twice
    assert isinstance(fresh.stem, FactorizedConv2d)
    assert all(module.training for module in fresh.modules())
    assert not any(p.requires_grad for p in fresh.parameters())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(fresh(x), result.model.train()(x))
    assert same(skfactor.load(path), result.state_dict())
    names = [e.tensor for e in result.executions if e.execution == "factorized"]
    assert f"load_into runs {len(names)} layers factorised: {names[0]}" in str(Report.from_file(path))
    dense = skfactor.load_into(Dense(), path, mode="dense")
    assert not any(isinstance(module, FactorizedLayer) for module in dense.modules())
    assert same(dense.state_dict(), result.state_dict())
    with SkfFile(path) as file:
        assert file.metadata["accuracy"] == 0.9


@pytest.mark.parametrize(("estimator", "modules"), [
    (skfactor.TuckerFactorizer(rank=4), "Conv2d 16>4 1x1, Conv2d 4>4 3x3, Conv2d 4>16 1x1"),
    (skfactor.TuckerFactorizer(rank=2, modes="full"), "Conv2d 16>2 1x1, Conv2d 2>2 3x3, Conv2d 2>16 1x1"),
    (skfactor.SeparableFactorizer(rank=3), "Conv2d 16>3 3x1, Conv2d 3>16 1x3"),
    (skfactor.SeparableFactorizer(rank=2, kind="depthwise"), "Conv2d 16>32 3x3 groups=16, Conv2d 32>16 1x1"),
    (skfactor.TensorTrainFactorizer(rank=2), "Conv2d 16>2 3x3, Conv2d 2>16 1x1"),
    (skfactor.HierarchicalTuckerFactorizer(rank=2), "Conv2d 16>2 3x3, Conv2d 2>16 1x1"),
    (skfactor.DictionaryFactorizer(n_components=6, alpha=0.1), "Conv2d 16>6 3x3, Conv2d 6>16 1x1"),
], ids=lambda value: type(value).__name__ if not isinstance(value, str) else "")
@pytest.mark.filterwarnings("ignore:.*converge")
def test_every_linear_factorizer(net, estimator, modules, tmp_path):
    """Fitted for real layers, kernel shapes included, and restored from the file."""
    rules = {"twice": estimator, "up": estimator, "*": None}
    result = factorize(net, rules)
    assert executions(result)["twice, again"].modules == modules
    assert {e.execution for e in result.executions} == {"factorized"}
    dense = Dense().eval()
    dense.load_state_dict(result.state_dict())
    agree(result.model, dense, torch.randn(2, 3, 8, 8))
    fresh = skfactor.load_into(Dense(), result.save(tmp_path / "net.skf"))
    assert same(fresh.state_dict(), result.model.state_dict())


def test_layer_list_is_small(tmp_path):
    """Beside the same codes, a file of a factorised ResNet-20 has a few bytes more per layer than a dense one."""
    torch.manual_seed(0)
    model = ResNet(3)
    paths = [skfactor.compress(model, LOW, mode=mode, progress=False).save(tmp_path / f"{mode}.skf")
             for mode in ("dense", "factorized")]
    dense, factorized = (path.stat().st_size for path in paths)
    assert dense < factorized < dense + 8 * 20


def test_loading_is_all_or_nothing(net, tmp_path, monkeypatch):
    path = factorize(net).save(tmp_path / "net.skf")

    def untouched(model, error, match, **options):
        before, kinds = checksum(model), [type(m) for m in model.modules()]
        with pytest.raises(error, match=match):
            skfactor.load_into(model, path, **options)
        assert checksum(model) == before
        assert [type(m) for m in model.modules()] == kinds

    untouched(SmallCNN(), ValueError, "does not fit the network")
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    other = Dense()
    other.heads["wide"] = Doubling(12, 24)
    untouched(other, LayerError, "'heads.wide' cannot run factorised.*forward of its own; mode='dense' loads")
    untouched(Dense(), ValueError, "mode must be 'dense'", mode="factorized")

    class Stubborn(Dense):
        def __setattr__(self, name, value):
            if name == "up" and isinstance(value, FactorizedLayer):
                raise RuntimeError("no")
            super().__setattr__(name, value)

    untouched(Stubborn(), RuntimeError, "no")
    assert skfactor.load_into(Stubborn(), path, mode="dense")


@pytest.mark.parametrize("names", [3, ["nothing"], [7], ["stem.bias"], {"stem.weight": 1}])
def test_damaged_list_of_layers(net, names, tmp_path):
    result = factorize(net)
    path = tmp_path / "net.skf"
    with SkfWriter(path, metadata={FACTORIZED: names}) as writer:
        for name, stored in result.names.items():
            if name == stored:
                writer.add(name, result.tensors[name])
            else:
                writer.tie(name, stored)
    fresh = Dense()
    before = checksum(fresh)
    with pytest.raises(FormatError, match=FACTORIZED):
        skfactor.load_into(fresh, path)
    assert checksum(fresh) == before
    assert skfactor.load_into(fresh, path, mode="dense") is fresh


def test_reserved_metadata(net, tmp_path):
    with pytest.raises(ValueError, match="must not have the key"):
        factorize(net).save(tmp_path / "net.skf", {FACTORIZED: []})


# ---------------------------------------------------------------------------------------------- what stays dense
def test_reasons():
    torch.manual_seed(0)
    model = nn.ModuleDict({
        "shared": nn.Linear(8, 8), "narrow": nn.Linear(8, 2), "bilinear": nn.Bilinear(4, 4, 8),
        "attention": nn.MultiheadAttention(8, 2), "deep": nn.Conv2d(8, 8, 3, groups=8),
    })
    rules = {"shared": KMeansWeightSharer(n_clusters=4), "*": LowRankFactorizer(rank=2)}
    reasons = {layer: e.reason for layer, e in executions(factorize(model, rules)).items()}
    assert reasons == {
        "shared": "CodebookDecoder restores a dense weight only",
        "narrow": "the chain would have 20 weights, no fewer than the dense layer",
        "bilinear": "Bilinear has no factorised form",
        "attention": "in_proj_weight belongs to a layer that does more",
        "attention.out_proj": "",
        "deep": "the chain would have 160 weights, no fewer than the dense layer",
    }


def test_ties_that_cannot_share_factors():
    torch.manual_seed(0)
    model = TinyLM()
    result = factorize(model)
    runs = executions(result)
    assert "tied between layers (Embedding and Linear)" in runs["wte, head"].reason
    assert result.model.head.weight is result.model.wte.weight
    assert isinstance(result.model.fc, FactorizedConv1D)
    tokens = torch.randint(0, 50, (2, 7))
    dense = TinyLM()
    dense.load_state_dict(result.state_dict())
    agree(result.model, dense, tokens)
    untied = TinyLM()
    untied.head.weight = nn.Parameter(untied.wte.weight.detach().clone())
    result = factorize(untied)
    assert [type(m).__name__ for m in (result.model.wte, result.model.head)] == ["FactorizedEmbedding",
                                                                                 "FactorizedLinear"]
    assert not result.model.wte(torch.tensor([0])).any() or untied.wte.weight[0].any()


def test_a_bare_parameter_tied_to_a_layer():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.alone = self.layer.weight

    (execution,) = factorize(Bare()).executions
    assert execution.reason == "not the weight of a layer alone"


def test_a_network_of_one_layer():
    (execution,) = factorize(nn.Linear(8, 8)).executions
    assert execution.reason == "the network is this one layer"


def test_compiled_and_wrapped_networks(net):
    x = torch.randn(2, 3, 8, 8)
    net.up = torch.compile(net.up)
    result = factorize(nn.DataParallel(net))
    inner = result.model.module
    assert executions(result)["up"].reason == "torch.compile wraps the layer itself"
    assert isinstance(inner.stem, FactorizedConv2d)
    inner.up = inner.up._orig_mod
    dense = Dense().eval()
    dense.load_state_dict(result.state_dict())
    agree(inner, dense, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(LayerError, match="TorchScript"):
        factorize(scripted)


def test_a_wrong_builder_is_noticed(net):
    builder = lambda decoder, codes, shape: [Factor(np.ones((2, *shape.kernel_shape)), shape.groups, shape.axes),  # noqa: E731
                                             Factor(np.ones((shape.n_rows, 2, *(1 for _ in shape.kernel))))]
    register_module(ComponentsDecoder, builder)
    before = checksum(net)
    try:
        with pytest.raises(LayerError, match=r"layer 'stem' \(Conv2d 16x3x3x3\).*differs from the decoded weight"):
            factorize(net)
    finally:
        del _BUILDERS[ComponentsDecoder]
    assert checksum(net) == before


@pytest.mark.parametrize(("options", "match"), [
    ({"mode": "small"}, "mode must be 'dense' or 'factorized', got 'small'"),
    ({"mode": "factorized", "execute": "fast"}, "execute must be 'factorized' or 'auto', got 'fast'"),
    ({"execute": "auto"}, "needs mode='factorized'"),
    ({"mode": "factorized", "execute": "auto"}, "execute='auto' runs the network: give example_inputs"),
    ({"measure": True}, "measure=True runs the network"),
    ({"mode": "factorized", "execute": "auto", "calibration": "assumed"}, "give example_inputs"),
])
def test_options_that_cannot_be_meant(net, options, match):
    with pytest.raises(ValueError, match=match):
        skfactor.compress(net, LOW, progress=False, **options)


def test_only_modules_have_layers(net):
    with pytest.raises(ValueError, match="need the module"):
        factorize(net.state_dict())
    result = skfactor.compress(net.state_dict(), LOW, progress=False)
    with pytest.raises(ValueError, match="compress the module"):
        result.measure(torch.zeros(1))


# ---------------------------------------------------------------------------------------------------- measuring
def test_auto_keeps_the_faster(net, monkeypatch):
    """By planted times: chains of the stem are slow, all others fast."""
    import skfactor.bridge.replace as replace

    asked = []

    def planted(layers, inputs):
        asked.append((type(layers[0]).__name__, [(kind.shape, n) for kind, n in inputs.items()]))
        slow = isinstance(layers[1], FactorizedConv2d) and layers[1].in_channels == 3
        return [1e-3, 2e-3 if slow else 5e-4]

    monkeypatch.setattr(replace, "layer_latencies", planted)
    monkeypatch.setattr(replace, "network_latencies", lambda model, choices, batch: [1.0] + [0.5] * (len(choices) - 1))
    x = torch.randn(2, 3, 8, 8)
    result = factorize(net, execute="auto", example_inputs=x)
    runs = executions(result)
    assert runs["stem"].reason == "the dense layer is faster"
    assert isinstance(result.model.stem, nn.Conv2d)
    assert (runs["stem"].seconds_dense, runs["stem"].seconds_factorized) == (1e-3, 2e-3)
    assert runs["stem"].inputs == "2x3x8x8 float32"
    assert runs["stem"].threads == torch.get_num_threads()
    assert runs["twice, again"].execution == "factorized"
    assert runs["a, b"].seconds_dense == pytest.approx(2e-3)  # two layers
    assert ("Conv2d", [((2, 16, 8, 8), 2)]) in asked  # one layer, called twice
    assert "stem.weight" not in executions_in_file(result)
    agree(result.model, dense_copy(result.model), x)
    by_calibration = factorize(net, execute="auto", calibration=x)
    assert executions(by_calibration)["stem"].inputs == "2x3x8x8 float32"


def executions_in_file(result):
    return [e.tensor for e in result.executions if e.execution == "factorized"]


def test_auto_measures_really(net):
    result = factorize(net, execute="auto", example_inputs=torch.randn(1, 3, 8, 8))
    for e in result.executions:
        assert e.seconds_dense > 0
        assert e.seconds_factorized > 0
        by_layer = "factorized" if e.seconds_factorized < e.seconds_dense else "dense"
        assert e.execution == by_layer or "whole network" in e.reason


@pytest.mark.parametrize(("times", "expected"), [
    ([1.0, 0.9, 0.95], {"twice, again": "factorized", "a, b": "factorized"}),  # dense, all, those that gain much
    ([1.0, 0.94, 0.8], {"twice, again": "factorized", "a, b": "dense"}),
    ([1.0, 1.1, 1.2], {"twice, again": "dense", "a, b": "dense"}),
    ([1.0, 0.96, 0.96], {"twice, again": "dense", "a, b": "dense"}),  # noise
])
def test_auto_keeps_what_makes_the_network_faster(net, monkeypatch, times, expected):
    import skfactor.bridge.replace as replace

    seen = []

    def planted(layers, inputs):  # "a, b" gain little, all others much
        return [1.0, 0.95 if layers[0] in (copied["a"], copied["b"]) else 0.5]

    def whole(model, choices, batch):
        seen.append([[plan.record.layer for plan in plans] for plans in choices])
        return times

    def remember(model, plans, batch):
        copied.update(model.named_children())
        return keep_faster(model, plans, batch)

    copied, keep_faster = {}, replace.keep_faster
    monkeypatch.setattr("skfactor.bridge.apply.keep_faster", remember)
    monkeypatch.setattr(replace, "layer_latencies", planted)
    monkeypatch.setattr(replace, "network_latencies", whole)
    x = torch.randn(2, 3, 8, 8)
    result = factorize(net, execute="auto", example_inputs=x)
    ((dense, every, much),) = seen
    assert dense == []
    assert set(every) - set(much) == {"a, b"}
    runs = executions(result)
    assert {name: runs[name].execution for name in expected} == expected
    for e in result.executions:
        assert e.execution == "factorized" or "whole network" in e.reason or e.layer not in every
    agree(result.model, dense_copy(result.model), x)


def test_network_latencies_puts_dense_layers_back(net, monkeypatch):
    """Chains run while the network is measured; afterwards, and after an error, the layers are the dense ones."""
    import skfactor.bridge.replace as replace

    before, ran = dict(net.named_modules()), []
    network = entries_of_module(net)
    tensors = {n: t for n, t in factorize(net).tensors.items() if not isinstance(t, RawTensor)}
    plans = [p for p in replace.plan_replacements(net, network, tensors) if p.layers]
    hooks = [chain.register_forward_hook(lambda m, *_: ran.append(m)) for p in plans for chain in p.chains]
    batch = ((torch.randn(2, 3, 8, 8),), {})
    times = replace.network_latencies(net, [[], plans, plans[:1]], batch)
    assert len(times) == 3
    chains, layers = ({m for p in plans for m in getattr(p, kind)} for kind in ("chains", "layers"))
    assert set(ran) == chains | layers  # a chain has the hooks of its layer
    assert dict(net.named_modules()) == before
    for hook in hooks:
        hook.remove()
    monkeypatch.setattr(type(plans[0].chains[0]), "forward", lambda self, x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        replace.network_latencies(net, [plans], batch)
    assert dict(net.named_modules()) == before


def test_layers_that_are_not_called_stay_dense_under_auto():
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    result = factorize(model, execute="auto", example_inputs=torch.randn(1, 4, 16))
    assert "do not call it" in executions(result)["0.self_attn.out_proj"].reason


def test_report_shows_how_layers_run(net):
    x = torch.randn(2, 3, 8, 8)
    result = factorize(net, execute="auto", measure=True, example_inputs=x)
    report = result.report
    figures = json.loads(report.to_json())
    assert figures["cost"]["inputs"] == ["2x3x8x8 float32"]
    assert figures["cost"]["threads"] == torch.get_num_threads()
    assert {layer["layer"] for layer in figures["layers"]} == set(executions(result))
    frame = report.to_frame()
    assert frame.attrs["cost"]["macs_before"] == figures["cost"]["macs_before"]
    assert frame.loc["stem.weight", "execution"] == executions(result)["stem"].execution
    for text in (str(report), report.to_html()):
        assert "latency, ms" in text
        assert "2x3x8x8 float32" in text
        assert f"{torch.get_num_threads()} thread" in text
        for e in result.executions:
            assert e.layer in text
            assert (e.modules if e.execution == "factorized" else e.reason).split(",")[0].replace(">", "") in (
                text.replace("&gt;", "").replace(">", ""))
    assert result.measure(x).parameters_after == sum(p.numel() for p in result.model.parameters())
    plain = skfactor.compress(net, LOW, progress=False).report
    assert "layers" in plain.to_dict()
    assert "latency" not in str(plain)


# --------------------------------------------------------------------------------------- networks that read weights
@pytest.mark.parametrize("grad", [False, True])
def test_transformer_encoder(grad):
    """Its fast path in eval mode reads `weight` and `bias` of its layers; in training it calls them."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(grad)
    result = factorize(model, LowRankFactorizer(rank=3))
    runs = executions(result)
    names = ("layers.0.linear1", "layers.0.linear2", "layers.0.self_attn.out_proj")
    assert {runs[name].execution for name in names} == {"factorized"}
    x = torch.randn(2, 5, 16)
    dense = copy.deepcopy(model)
    dense.load_state_dict(result.state_dict())
    with torch.set_grad_enabled(grad):
        y = result.model(x)
        assert (y - dense(x)).abs().max() < 1e-5 * y.abs().max()
    if grad:
        y.sum().backward()
        assert all(p.grad is not None for p in result.model.parameters())


def test_fine_tuning_lowers_the_loss():
    torch.manual_seed(0)
    model = SmallCNN()
    x, y = torch.randn(32, 3, 8, 8), torch.randint(0, 5, (32,))
    tuned = factorize(model).model.train()
    optimizer = torch.optim.Adam(tuned.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(tuned(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


# ------------------------------------------------------------------------------------------- layer after layer
@pytest.mark.parametrize("mode", ["dense", "factorized"])
def test_sequential_calibration(mode):
    """Each layer sees what the compressed layers before it give, and the network's error is smaller by that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), Block(12, 12, 1), Block(12, 12, 1)).eval()
    x, held_back = torch.randn(64, 3, 10, 10), torch.randn(64, 3, 10, 10)

    def error(sequential):
        result = skfactor.compress(model, LowRankFactorizer(rank=6), mode=mode, progress=False,
                                   calibration=Calibration(x, sequential=sequential))
        if mode == "factorized":
            assert {e.execution for e in result.executions} == {"factorized"}
        with torch.no_grad():
            return float((result.model(held_back) - model(held_back)).square().mean())

    assert error(True) < error(False)


def test_sequential_is_the_same_in_both_modes(tmp_path):
    torch.manual_seed(0)
    model = SmallCNN().eval()
    x = torch.randn(32, 3, 8, 8)
    calibration = Calibration(x, sequential=True, fold_batch_norm=True)
    dense, chained = (skfactor.compress(model, LOW, mode=mode, calibration=calibration, progress=False)
                      for mode in ("dense", "factorized"))
    assert same(dense.state_dict(), chained.state_dict())
    agree(chained.model, dense.model, x)
    fresh = skfactor.load_into(SmallCNN().eval(), chained.save(tmp_path / "net.skf"))
    assert same(fresh.state_dict(), chained.model.state_dict())


# ------------------------------------------------------------------------------------------------------- export
def test_torch_export(net):
    result = factorize(net)
    x = torch.randn(2, 3, 8, 8)
    exported = torch.export.export(result.model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    agree(exported.module(), result.model, torch.randn(5, 3, 8, 8))


@pytest.mark.slow
def test_onnx(net, tmp_path):
    """The exported chains run in onnxruntime, for another size of the batch too."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    result = factorize(net)
    path = str(tmp_path / "net.onnx")
    x = torch.randn(2, 3, 8, 8)
    torch.onnx.export(result.model, (x,), path, dynamo=True, verbose=False,
                      dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    other = torch.randn(5, 3, 8, 8)
    (y,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    with torch.no_grad():
        expected = result.model(other).numpy()
    assert np.abs(y - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.slow
def test_torch_compile(net):
    result = factorize(net)
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(result.model, fullgraph=True)
    agree(compiled, result.model, x)
    loss = compiled(x).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in result.model.parameters())
    assert isinstance(result.model.a, FactorizedLinear)
