"""Layouts against the layers' own forward pass; ties, prefixes, and the layers that are refused."""
# SPDX-License-Identifier: BSD-3-Clause

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from skfactor import KMeansWeightSharer, LayerError, register_layer
from skfactor.bridge.calibrate import input_vectors
from skfactor.bridge.layers import entries_of_module, entries_of_state_dict, layer_specs, rows_last
from skfactor.bridge.rules import resolve_rules
from tests._nets import Conv1D, SmallCNN, TinyLM

CONVOLUTIONS = [
    (nn.Conv1d(6, 4, 3, stride=2, padding=1, dilation=2, groups=2), (2, 6, 17)),
    (nn.Conv1d(3, 4, 4, padding="same", dilation=3), (2, 3, 16)),
    (nn.Conv2d(6, 9, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=3), (2, 6, 9, 8)),
    (nn.Conv2d(4, 6, 4, padding="same"), (2, 4, 7, 9)),
    (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 7, 9)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 9)),
    (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular", stride=2), (2, 4, 7, 9)),
    (nn.Conv2d(4, 8, 3, padding="same", padding_mode="replicate", groups=4), (2, 4, 7, 9)),
    (nn.Conv2d(4, 6, 1), (4, 5, 5)),
    (nn.Conv3d(2, 4, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 0), groups=2), (2, 2, 5, 6, 4)),
    (nn.ConvTranspose1d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 6, 9)),
    (nn.ConvTranspose1d(3, 4, 3, stride=1, padding=4, dilation=3), (2, 3, 9)),
    (nn.ConvTranspose2d(6, 9, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), groups=3), (2, 6, 5, 4)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, dilation=(2, 3)), (4, 5, 5)),
    (nn.ConvTranspose3d(4, 6, 2, stride=2, padding=1, groups=2), (2, 4, 3, 4, 3)),
]
LINEARS = [
    (nn.Linear(7, 5), (2, 3, 7)),
    (nn.Linear(7, 5), (7,)),
    (Conv1D(5, 7), (2, 3, 7)),
]


def matrix(module, parameter="weight"):
    weight = getattr(module, parameter).detach()
    layout = next(s for s in layer_specs(module) if s.parameter == parameter).layout(module, tuple(weight.shape))
    X = layout.to_matrix(weight.numpy())
    np.testing.assert_array_equal(layout.to_tensor(X, tuple(weight.shape)), weight.numpy())
    assert X.shape == (layout.n_rows, np.prod(layout.kernel_shape))
    return torch.from_numpy(np.ascontiguousarray(X))


def without_bias(module):
    module = copy.deepcopy(module).double()
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def outputs_of_matrix(X, u):
    """y (positions, c_out) from the matrix X and vectors u (g, n, d): each block of rows reads its own vectors."""
    return torch.cat([u_g @ X_g.T for u_g, X_g in zip(u, X.chunk(len(u)), strict=True)], dim=1)


@pytest.mark.parametrize(("module", "shape"), CONVOLUTIONS + LINEARS, ids=str)
def test_matrix_times_input_vectors_is_the_layer(module, shape):
    module = without_bias(module)
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = torch.cat(list(input_vectors(module, x)), dim=1)
    y = module(x)
    if isinstance(module, nn.modules.conv._ConvNd):
        y = y if y.dim() == len(module.kernel_size) + 2 else y[None]
        y = y.movedim(1, -1)  # (N, *positions, c_out)
    expected = y.reshape(-1, y.shape[-1])
    torch.testing.assert_close(outputs_of_matrix(matrix(module), u), expected, rtol=1e-12, atol=1e-12)


def test_pieces_do_not_change_the_vectors(monkeypatch):
    module, shape = CONVOLUTIONS[2]
    x = torch.randn(5, *shape[1:])
    whole = torch.cat(list(input_vectors(module, x)), dim=1)
    monkeypatch.setattr("skfactor.bridge.calibrate.CHUNK", 1)
    pieces = list(input_vectors(module, x))
    assert len(pieces) == 5
    assert torch.equal(torch.cat(pieces, dim=1), whole)


def test_bilinear():
    module = without_bias(nn.Bilinear(3, 4, 5))
    a, b = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    (u,) = input_vectors(module, a, input2=b)
    torch.testing.assert_close(outputs_of_matrix(matrix(module), u), module(a, b))


def test_attention_projection():
    """Queries, keys and values as the attention layer computes them: rows of three blocks."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    q, kv = (torch.randn(2, n, 8, dtype=torch.float64) for n in (3, 3))
    X = matrix(attention, "in_proj_weight")
    (u,) = input_vectors(attention, q, kv, kv, parameter="in_proj_weight")
    assert u.shape == (3, 6, 8)
    blocks = attention.in_proj_weight.detach().chunk(3)
    expected = torch.cat([x.reshape(-1, 8) @ w.T for x, w in zip((q, kv, kv), blocks, strict=True)], dim=1)
    torch.testing.assert_close(outputs_of_matrix(X, u), expected)
    (u,) = input_vectors(attention, q, q, q, parameter="in_proj_weight")
    assert u.shape == (1, 6, 8)


def test_attention_with_more_keys_than_queries_keeps_each_second_moment():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    q, kv = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    (u,) = input_vectors(attention, query=q, key=kv, value=kv, parameter="in_proj_weight")
    for block, x in zip(u, (q, kv, kv), strict=True):
        x = x.reshape(-1, 8)
        torch.testing.assert_close(block.T @ block / len(block), x.T @ x / len(x))


def test_layers_of_a_network():
    network = entries_of_module(SmallCNN())
    layouts = {e.name: e.layout for e in network.entries}
    assert layouts["conv2.weight"].kernel_shape == (4, 3, 3)
    assert layouts["bn1.weight"].n_rows == 1
    labels = [e.label for e in network.entries]
    assert labels[:2] == ["layer 'conv1' (Conv2d 8x3x3x3)", "tensor 'conv1.bias' (Conv2d 8)"]
    assert list(network.names) == list(SmallCNN().state_dict())


def test_padding_row_stays_zero_only_where_it_is_zero():
    model = TinyLM()
    assert entries_of_module(model).entries[1].layout.zero_rows == (0,)
    with torch.no_grad():
        model.wte.weight[0] = 1.0
    assert entries_of_module(model).entries[1].layout.zero_rows == ()


def test_ties_in_modules_and_state_dicts():
    model = TinyLM()
    for network in (entries_of_module(model), entries_of_state_dict(model.state_dict())):
        assert network.names["head.weight"] == "wte.weight"
        tied = next(e for e in network.entries if e.name == "wte.weight")
        assert [a.name for a in tied.aliases] == ["wte.weight", "head.weight"]
        assert len(network.entries) == len(network.names) - 1
    # equal values are no tie
    separate = {k: v.clone() for k, v in model.state_dict().items()}
    assert entries_of_state_dict(separate).names["head.weight"] == "head.weight"


def test_module_under_two_names():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    network = entries_of_module(model)
    assert network.names == {"a.weight": "a.weight", "a.bias": "a.bias", "b.0.weight": "a.weight", "b.0.bias": "a.bias"}
    assert network.owners["a.weight"][0][0] is shared
    assert len(network.owners["a.weight"]) == 1


def test_wrappers_leave_no_trace_in_the_names():
    names = list(SmallCNN().state_dict())
    wrapped = [nn.DataParallel(SmallCNN()), torch.compile(SmallCNN()), torch.compile(nn.DataParallel(SmallCNN()))]
    for model in wrapped:
        assert list(entries_of_module(model).names) == names
        assert list(entries_of_state_dict(model.state_dict()).names) == names
    inner = nn.Sequential(torch.compile(nn.Linear(3, 3)))
    network = entries_of_module(inner)
    assert list(network.names) == ["0.weight", "0.bias"]
    assert network.entries[0].type_name == "Linear"


def refusals():
    yield parametrizations.weight_norm(nn.Linear(4, 4)), "remove_parametrizations"
    yield parametrizations.orthogonal(nn.Linear(4, 4)), "remove_parametrizations"
    pruned = nn.Linear(4, 4)
    prune.l1_unstructured(pruned, "weight", 0.5)
    yield pruned, "prune.remove"
    with pytest.warns(FutureWarning):
        old = nn.utils.weight_norm(nn.Linear(4, 4))
    yield old, "remove_weight_norm"
    yield nn.utils.spectral_norm(nn.Linear(4, 4)), "remove_spectral_norm"


def test_recomputed_weights_are_refused_by_name_with_the_remedy():
    sharer = KMeansWeightSharer(n_clusters=2)
    for layer, remedy in refusals():
        model = nn.ModuleDict({"good": nn.Linear(4, 4), "bad": layer})
        entries = entries_of_module(model).entries
        for rules in (sharer, {"bad": sharer, "*": None}, {"bad.weight": sharer, "*": None}):
            with pytest.raises(LayerError, match=rf"layer 'bad' \(\w+ 4x4\): .*{remedy}"):
                resolve_rules(rules, entries)
        assert "good.weight" in resolve_rules({"bad": None, "*": sharer}, entries).taken
    assert not parametrize.is_parametrized(nn.Linear(4, 4))


class Wrapped(torch.Tensor):
    """A tensor subclass, as torchao or DTensor have."""


@pytest.mark.parametrize(("make", "message"), [
    (lambda: nn.Linear(3, 3, device="meta"), "on the meta device"),
    (lambda: nn.LazyLinear(3), "not initialised yet"),
    (lambda: nn.LazyConv2d(3, 3), "not initialised yet"),
])
def test_tensors_without_values_are_refused(make, message):
    with pytest.raises(LayerError, match=rf"layer 'net.0' \(\w+\): net.0.\w+ is {message}"):
        entries_of_module(nn.ModuleDict({"net": nn.Sequential(make())}))


def test_tensor_subclass_sparse_and_foreign_dtypes_are_refused():
    state = {"w": torch.randn(3, 3).as_subclass(Wrapped)}
    with pytest.raises(LayerError, match="tensor 'w': w is a Wrapped, a tensor subclass"):
        entries_of_state_dict(state)
    with pytest.raises(LayerError, match="sparse"):
        entries_of_state_dict({"w": torch.eye(3).to_sparse()})
    with pytest.raises(LayerError, match="dtype complex128"):
        entries_of_state_dict({"w": torch.eye(3, dtype=torch.complex128)})
    with pytest.raises(TypeError, match="names of a state dict must be strings"):
        entries_of_state_dict({1: torch.eye(3)})


def test_register_layer():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 6))

    sharer = KMeansWeightSharer(n_clusters=2)
    model = nn.Sequential(Table())
    with pytest.raises(ValueError, match="nothing to compress"):
        resolve_rules(sharer, entries_of_module(model).entries)
    register_layer(Table, parameter="table", layout=rows_last)
    entries = entries_of_module(model).entries
    assert list(resolve_rules(sharer, entries).taken) == ["0.table"]
    assert entries[0].layout.n_rows == 6
    with pytest.raises(TypeError, match=r"subclass of torch\.nn\.Module"):
        register_layer(int)
    with pytest.raises(TypeError, match="layout must be callable"):
        register_layer(Table, layout="rows")


def test_state_dict_items_that_are_no_tensors_are_listed():
    network = entries_of_state_dict({"w": torch.eye(3), "epoch": 7})
    assert network.not_stored == {"epoch": "int, not a tensor: not stored"}
