# SPDX-License-Identifier: BSD-3-Clause
"""The pruned network against the original one with hooks that zero channels: written apart from the package's graph."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _nets import LeNet5, ResNet, SmallCNN
from _zoo import FULL, ZOO, Lambda, build, trained_alike
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import skfactor
from skfactor import LayerError
from skfactor.bridge.calls import rewritten_calls
from skfactor.bridge.surgery import TOLERANCE


def difference(a, b):
    return float((a - b).abs().max() / b.abs().max())


def masked_by_readers(model, removed, x):
    """Output of the network in which whoever reads a removed filter gets a zero: found by marking, not by a graph.

    A reader's input channel belongs to a filter when making the filter NaN makes this channel NaN.
    """
    model = copy.deepcopy(model).double()
    x = x.double()
    layers = dict(model.named_modules())
    readers = [m for m in layers.values() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d,
                                                            nn.ConvTranspose3d, nn.Linear))]
    marks = dict.fromkeys(readers)

    def plant(indices):
        def hook(module, args, output):
            output = output.clone()
            axis = -1 if isinstance(module, nn.Linear) else 1
            output.index_fill_(axis, torch.tensor(indices), float("nan"))
            return output

        return hook

    def look(module, args):
        u = args[0].movedim(-1 if isinstance(module, nn.Linear) else 1, 0).flatten(1)
        found = u.isnan().any(1)
        marks[module] = found if marks[module] is None else marks[module] | found
        # the mark ends at a reader, so that it does not colour everything behind it
        return (torch.nan_to_num(args[0]),)

    hooks = [layers[name].register_forward_hook(plant(list(i))) for name, i in removed.items()]
    hooks += [m.register_forward_pre_hook(look) for m in readers]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()

    def zero(found, axis):
        def hook(module, args):
            return (args[0].index_fill(axis, found.nonzero().flatten(), 0),)

        return hook

    for m, found in marks.items():
        if found is not None and found.any():
            m.register_forward_pre_hook(zero(found, -1 if isinstance(m, nn.Linear) else 1))
    with torch.no_grad():
        return model(x)


def random_filters(groups, data):
    """Any units of any groups, a unit left in every layer."""
    chosen = {}
    for group in groups:
        units = data.draw(st.sets(st.integers(0, len(group.units) - 1), max_size=len(group.units)))
        left = {layer: sum(layer in dict(u) for u in group.units) for layer in group.layers}
        for u in sorted(units):
            members = group.filters([u])
            if all(left[layer] > 1 for layer in members):
                for layer, indices in members.items():
                    left[layer] -= 1
                    chosen.setdefault(layer, []).extend(indices)
    return chosen


@pytest.mark.parametrize("name", ZOO)
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_pruned_equals_masked(name, data):
    model, x = build(name)
    groups = skfactor.filter_groups(model, x)
    filters = random_filters(groups, data)
    if not filters:
        return
    try:
        pruned = skfactor.remove_filters(model, filters, x)
    except LayerError as error:  # a shortcut's channels can all go while the sum keeps others
        assert "would be left" in str(error)  # noqa: PT017
        return
    expected = masked_by_readers(model, pruned.removed, x)
    with torch.no_grad():
        assert difference(pruned.model(x), expected) < TOLERANCE
        assert difference(pruned.model.double()(x.double()), expected) < 1e-12
    assert pruned.difference < 1e-12
    n = sum(p.numel() for p in pruned.model.parameters())
    assert n == pruned.parameters_after < pruned.parameters_before


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_networks(name, tmp_path):
    """A third of all units at random, against the masked network, and through a file into a fresh network."""
    model, x = trained_alike(FULL[name]()), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rng, filters = np.random.default_rng(0), {}
    for group in skfactor.filter_groups(model, x):
        units = rng.permutation(len(group.units))[: len(group.units) // 3]
        for layer, indices in group.filters(units).items():
            filters.setdefault(layer, []).extend(indices)
    pruned = skfactor.remove_filters(model, filters, x)
    assert pruned.parameters_after < 0.75 * pruned.parameters_before
    expected = masked_by_readers(model, pruned.removed, x)
    fresh = skfactor.load_into(FULL[name]().eval(), pruned.save(tmp_path / "pruned.skf"))
    with torch.no_grad():
        found = pruned.model(x)
        assert torch.equal(fresh(x), found)
        assert difference(found, expected) < TOLERANCE


@pytest.mark.parametrize("name", ZOO)
def test_a_plan_is_replayed_on_a_fresh_network(name, tmp_path):
    model, x = build(name)
    group = skfactor.filter_groups(model, x)[0]
    pruned = skfactor.remove_filters(model, group.filters(range(0, len(group.units), 2)), x)
    assert json.loads(json.dumps(pruned.plan)) == pruned.plan
    path = pruned.save(tmp_path / "pruned.skf")
    fresh = ZOO[name][0]().eval()
    names = list(fresh.state_dict())
    assert skfactor.load_into(fresh, path) is fresh
    with torch.no_grad():
        assert torch.equal(fresh(x), pruned.model(x))
        assert torch.equal(fresh(x[:1]), pruned.model(x[:1]))  # nothing of the batch is written into the network
    assert list(fresh.state_dict()) == names
    again = skfactor.load_into(copy.deepcopy(pruned.model), path)  # a network that has lost them already
    with torch.no_grad():
        assert torch.equal(again(x), pruned.model(x))


class Halves(nn.Module):
    """Counts channels in a split."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 5, 1)

    def forward(self, x):
        left, right = torch.split(self.a(x), [4, 4], 1)
        return self.b(left * torch.tanh(right))


@pytest.mark.parametrize(("name", "kind"), [("ResNet-8", "pad"), ("ResNet-8 lambda", "pad"), ("Conv1d", "view"),
                                            ("split", "split")])
def test_rewritten_calls_compile(name, kind):
    model, x = (Halves().eval(), torch.randn(2, 3, 5, 5)) if name == "split" else build(name)
    filters = {}
    for group in skfactor.filter_groups(model, x):
        for layer, indices in group.filters(range(0, len(group.units), 2)).items():
            filters.setdefault(layer, []).extend(indices)
    small = skfactor.remove_filters(model, filters, x).model
    assert {spec["function"] for m in small.modules() for spec in rewritten_calls(m)} == {kind}
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(small, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), small(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["dense", "factorized"])
def test_prune_share_save_load(mode, tmp_path):
    model, x = build("VGG-16-BN")
    pruned = skfactor.remove_filters(model, {"features.3": [0, 5], "features.40": range(8), "classifier.0": [3]}, x)
    rules = {"features.3": skfactor.KMeansWeightSharer(8), "classifier.0": skfactor.LowRankFactorizer(4), "*": None}
    result = skfactor.compress(pruned.model, rules, mode=mode, progress=False)
    twice = skfactor.remove_filters(result.model, {"features.0": [1]}, x) if mode == "dense" else None
    path = result.save(tmp_path / "small.skf")
    fresh = skfactor.load_into(ZOO["VGG-16-BN"][0]().eval(), path)
    with torch.no_grad():
        assert torch.equal(fresh(x), result.model(x))
    if twice is not None:
        fresh = skfactor.load_into(ZOO["VGG-16-BN"][0]().eval(), twice.save(tmp_path / "twice.skf"))
        with torch.no_grad():
            assert torch.equal(fresh(x), twice.model(x))


def test_coupled_filters_are_named():
    model, x = build("ResNet-8")
    with pytest.raises(LayerError, match=r"'layer1.0.conv2', 'layer2.0.conv2', 'layer3.0.conv2' \(such as filter 3"):
        skfactor.remove_filters(model, {"conv1": [3]}, x)
    pruned = skfactor.remove_filters(model, {"conv1": [3]}, x, coupled="remove")
    # the shortcut pads 8 and 16 channels on each side
    assert pruned.removed == {"conv1": (3,), "layer1.0.conv2": (3,), "layer2.0.conv2": (11,), "layer3.0.conv2": (27,)}
    groups = skfactor.filter_groups(model, x)
    assert pruned.removed == {k: tuple(v) for k, v in groups["conv1"].filters([3]).items()}


def test_groups_of_a_convolution_go_together():
    model, x = build("ResNeXt")
    pruned = skfactor.remove_filters(model, {"blocks.0.conv1": [0, 1, 2, 3]}, x)
    conv = pruned.model.blocks[0].conv2
    assert (conv.groups, conv.in_channels, conv.out_channels, conv.weight.shape) == (3, 12, 12, (12, 4, 3, 3))
    with pytest.raises(LayerError, match=r"such as filter 1 of 'blocks.0.conv1'"):
        skfactor.remove_filters(model, {"blocks.0.conv1": [0]}, x)


def test_attributes_follow_the_tensors():
    model, x = build("MobileNetV1")
    pruned = skfactor.remove_filters(model, {"features.0": [1, 2, 7]}, x).model
    assert pruned.features[0].out_channels == 5
    assert pruned.features[1].num_features == len(pruned.features[1].running_var) == 5
    assert (pruned.features[3].groups, pruned.features[3].in_channels, pruned.features[6].in_channels) == (5, 5, 5)


def test_the_network_is_unchanged_after_an_error_and_after_success():
    model, x = build("ResNet-8")
    before = pickle.dumps(model.state_dict())
    for filters in ({"conv1": [99]}, {"linear": [0]}, {"layer1.0.conv1": range(16)}, {"nothing": [1]},
                    {"bn1": [1]}, {"layer1.0.conv1": [-1]}, {"layer1.0.conv1": [0.5]}, {}):
        with pytest.raises(ValueError):
            skfactor.remove_filters(model, filters, x)
    skfactor.remove_filters(model, {"layer1.0.conv1": [3]}, x)
    assert pickle.dumps(model.state_dict()) == before
    assert model.layer1[0].conv1.out_channels == 16


@pytest.mark.parametrize(("filters", "message"), [
    ({"linear": [0]}, "filter 0 of layer 'linear' cannot be removed: they are outputs of the network"),
    ({"layer1.0.conv1": range(16)}, "would be left"),
    ({"layer1.0.convl": [0]}, "did you mean"),
    ({"layer1.0.conv1": [16]}, "must be from 0 to 15, got 16 to 16"),
])
def test_messages(filters, message):
    model, x = build("ResNet-8")
    with pytest.raises(ValueError, match=message):
        skfactor.remove_filters(model, filters, x)


class Odd(nn.Module):
    """One odd thing between two convolutions."""

    def __init__(self, middle, n=8):
        super().__init__()
        self.first, self.second, self.middle = nn.Conv2d(3, 8, 3), nn.Conv2d(n, 4, 3), middle

    def forward(self, x):
        return self.second(self.middle(self.first(x)))


def shuffled(x):
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


@pytest.mark.parametrize(("middle", "n", "reason"), [
    (nn.GroupNorm(2, 8), 8, "group normalisation takes its statistics over several channels"),
    (nn.Softmax(1), 8, "softmax runs over the channels"),
    (nn.LayerNorm([8, 6, 6]), 8, "layer_norm is not understood"),
    (nn.PixelShuffle(2), 2, "pixel_shuffle is not understood"),
    (Lambda(lambda x: x[:, :4]), 4, "takes channels by their place"),
    (Lambda(lambda x: x - x.mean(1, keepdim=True)), 8, "mean runs over the channels"),
    (Lambda(lambda x: F.normalize(x, dim=1)), 8, "is not understood"),
    (Lambda(lambda x: x[:, [3, 1, 0, 2, 4, 5, 7, 6]]), 8, "is not understood"),
    (Lambda(lambda x: x * torch.arange(8.0)[:, None, None]), 8, "values whose channels are not known"),
    (Lambda(lambda x: F.local_response_norm(x, 3)), 8, ""),
    (nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)), 8, "weight of a convolution is computed"),
])
def test_what_is_not_understood_is_frozen(middle, n, reason):
    model = trained_alike(Odd(middle, n))
    groups = skfactor.filter_groups(model, torch.randn(2, 3, 8, 8))
    assert reason in groups.frozen["first"]
    with pytest.raises(LayerError, match="cannot be removed"):
        skfactor.remove_filters(model, {"first": [0]}, torch.randn(2, 3, 8, 8))


def test_channel_shuffle_loses_whole_groups():
    model, x = trained_alike(Odd(Lambda(shuffled))), torch.randn(2, 3, 8, 8)
    (group,) = skfactor.filter_groups(model, x)
    assert [sorted(i for _, i in unit) for unit in group.units] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    pruned = skfactor.remove_filters(model, group.filters([0]), x)
    expected = masked_by_readers(model, pruned.removed, x)
    assert difference(pruned.model(x).detach(), expected) < TOLERANCE
    assert pruned.model(x[:1]).shape == (1, 4, 4, 4)


def test_code_that_counts_channels_itself_is_refused():
    """What no graph shows is found by running the result."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            x = self.first(x)
            return self.second(x) * (x.shape[1] / 8)

    model = trained_alike(Counts())
    with pytest.raises(LayerError, match="outputs differ by"):
        skfactor.remove_filters(model, {"first": [0]}, torch.randn(2, 3, 8, 8))


def test_one_module_used_twice_and_tied_weights():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.shared, self.tied = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3)
            self.tied.weight, self.head = self.shared.weight, nn.Conv2d(6, 2, 1)

        def forward(self, x):
            return self.head(self.tied(self.shared(F.relu(self.shared(self.conv(x))))))

    model, x = trained_alike(Twice()), torch.randn(2, 3, 8, 8)
    (group,) = skfactor.filter_groups(model, x)
    pruned = skfactor.remove_filters(model, group.filters([1, 4]), x)
    assert pruned.model.tied.weight is pruned.model.shared.weight
    assert pruned.model.tied.weight.shape == (4, 4, 3, 3)
    expected = masked_by_readers(model, pruned.removed | {"tied": pruned.removed["shared"]}, x)
    assert difference(pruned.model(x).detach(), expected) < TOLERANCE


def test_a_weight_that_something_else_reads_is_frozen():
    class Penalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            return self.second(self.first(x)) + self.first.weight.square().sum()

    groups = skfactor.filter_groups(trained_alike(Penalised()), torch.randn(1, 3, 8, 8))
    assert len(groups) == 0
    assert "reads the parameter" in groups.frozen["first"]


def test_networks_that_export_refuses_are_traced_by_fx():
    class Stateful(nn.Module):
        """Writes to itself during the forward pass through a type that torch.export does not know."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            y = self.first(x)
            if torch.compiler.is_exporting():
                raise RuntimeError("no export")
            return self.second(y)

    model, x = trained_alike(Stateful()), torch.randn(2, 3, 8, 8)
    pruned = skfactor.remove_filters(model, {"first": [0, 3]}, x)
    assert difference(pruned.model(x).detach(), masked_by_readers(model, pruned.removed, x)) < TOLERANCE


def test_a_network_that_cannot_be_traced():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.first(x) if x.sum() > 0 else x

    with pytest.raises(LayerError, match=r"cannot be traced: torch.export says"):
        skfactor.filter_groups(Branches(), torch.randn(1, 3, 8, 8))


def test_dtypes_formats_gradients_and_modes_stay():
    model, x = build("ResNet-8")
    model = model.to(memory_format=torch.channels_last).to(torch.bfloat16).train()
    model.conv1.weight.requires_grad_(False)
    pruned = skfactor.remove_filters(model, {"layer2.0.conv1": range(10)}, x).model
    weight = pruned.layer2[0].conv1.weight
    assert (weight.dtype, weight.is_contiguous(memory_format=torch.channels_last)) == (torch.bfloat16, True)
    assert pruned.training
    assert not pruned.conv1.weight.requires_grad
    assert weight.requires_grad
    pruned(x.bfloat16()).sum().backward()
    assert weight.grad.shape == weight.shape


def test_constant_inputs_verify_as_well():
    model = trained_alike(LeNet5())
    assert skfactor.remove_filters(model, {"conv1": [0]}, torch.zeros(1, 1, 28, 28)).difference < 1e-12


def test_copies_pickles_and_exports_of_rewritten_calls():
    model, x = build("ResNet-8")
    pruned = skfactor.remove_filters(model, {"conv1": [0, 9]}, x, coupled="remove").model
    with torch.no_grad():
        expected = pruned(x)
        assert torch.equal(copy.deepcopy(pruned)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(pruned))(x), expected)
        exported = torch.export.export(pruned, (x,)).module()
        assert torch.allclose(exported(x), expected, atol=1e-6)
    assert isinstance(pruned.layer2[0], type(model.layer2[0]))
    # a shortcut that is rewritten is frozen from then on, the rest is not
    groups = skfactor.filter_groups(pruned, x)
    assert "conv1" in groups.frozen
    assert groups["layer2.0.conv1"].layers == ("layer2.0.conv1",)


def test_files_that_do_not_fit_leave_the_network(tmp_path):
    model, x = build("ResNet-8")
    pruned = skfactor.remove_filters(model, {"conv1": [3]}, x, coupled="remove")
    path = pruned.save(tmp_path / "a.skf")
    other = SmallCNN()
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match="conv1"):
        skfactor.load_into(other, path)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    deeper = ResNet(2)  # all edits fit, the names do not
    with pytest.raises(ValueError, match="does not fit the network"):
        skfactor.load_into(deeper, path)
    assert deeper.layer2[0].conv1.in_channels == 16
    assert type(deeper.layer2[0]).__name__ == "Block"
    assert deeper(x).shape == (2, 10)
    lost = skfactor.remove_filters(model, {"layer1.0.conv1": [1]}, x).model
    with pytest.raises(LayerError, match="fresh instance"):
        skfactor.load_into(lost, path)


@pytest.mark.parametrize("damage", [
    lambda p: p | {"version": 9}, lambda p: p | {"sets": ["16:zz"]}, lambda p: p | {"sets": ["900:ff"]},
    lambda p: {k: v for k, v in p.items() if k != "modules"}, lambda p: p | {"modules": {"conv1": {"out": 77}}},
    lambda p: p | {"calls": {"layer2.0": [{"function": "exec", "call": 0, "axis": 1}]}}, lambda p: 3,
])
def test_damaged_plans(damage, tmp_path):
    model, x = build("ResNet-8")
    pruned = skfactor.remove_filters(model, {"conv1": [3]}, x, coupled="remove")
    result = skfactor.compress(pruned.model, {"*": None}, progress=False)
    result.removals = [damage(pruned.plan)]
    path = result.save(tmp_path / "a.skf")
    fresh = ResNet(1)
    with pytest.raises(skfactor.FormatError, match=r"removed|removals of version"):
        skfactor.load_into(fresh, path)
    assert fresh.conv1.out_channels == 16


def test_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = build("ResNet-8")
    pruned = skfactor.remove_filters(model, {"conv1": [0, 9], "layer3.0.conv1": range(20)}, x, coupled="remove").model
    torch.onnx.export(pruned, (x,), str(tmp_path / "a.onnx"), dynamo=True)
    session = runtime.InferenceSession(str(tmp_path / "a.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert np.abs(found - pruned(x).numpy()).max() < 1e-5
