"""Factorised layers compute what the layer with the decoded weight computes, in every variant of every layer."""
# SPDX-License-Identifier: BSD-3-Clause

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from skfactor.bridge.factors import Factor, LayerShape, NoSmallerModule, factors_of, register_module
from skfactor.bridge.modules import FactorizedLayer, composed_weight, dense_copy, factorized_layer, layer_shape
from skfactor.bridge.tensors import from_bits
from skfactor.codec.decoders import CodebookDecoder, Decoder
from skfactor.codec.linear import ComponentsDecoder
from skfactor.codec.separable import DepthwiseSeparableDecoder, SpatialSeparableDecoder
from skfactor.codec.tensor import CompressedTensor, Layout
from skfactor.codec.tensor_decoders import TuckerDecoder
from tests._nets import Conv1D
from tests.bridge._chains import FAMILIES, compressed, families_of

LAYERS = {
    "linear": (lambda: nn.Linear(6, 10), (3, 4, 6)),
    "linear without bias": (lambda: nn.Linear(6, 10, bias=False), (6,)),
    "transformers": (lambda: Conv1D(10, 6), (3, 6)),
    "1-d": (lambda: nn.Conv1d(4, 6, 5, stride=3, padding=2, dilation=2), (2, 4, 20)),
    "1-d same": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=3), (2, 4, 20)),
    "2-d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 8)),
    "2-d one image": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 8)),
    "2-d uneven": (lambda: nn.Conv2d(4, 6, (3, 5), (2, 1), (1, 3), (1, 2), bias=False), (2, 4, 12, 13)),
    "2-d same": (lambda: nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(1, 2)), (2, 4, 7, 8)),
    "2-d valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 7, 8)),
    "2-d groups": (lambda: nn.Conv2d(8, 6, 3, 2, 1, groups=2), (2, 8, 7, 8)),
    "2-d one pixel": (lambda: nn.Conv2d(8, 6, 1, stride=2), (2, 8, 7, 8)),
    "2-d circular": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular", stride=2), (2, 4, 7, 8)),
    "2-d reflect same": (lambda: nn.Conv2d(4, 6, (5, 2), padding="same", padding_mode="reflect"), (2, 4, 7, 8)),
    "2-d replicate": (lambda: nn.Conv2d(8, 6, 3, padding=2, padding_mode="replicate", groups=2), (2, 8, 7, 8)),
    "3-d": (lambda: nn.Conv3d(4, 6, (2, 3, 2), (1, 2, 1), (0, 1, 1)), (2, 4, 5, 6, 5)),
    "transposed 1-d": (lambda: nn.ConvTranspose1d(4, 6, 5, 3, 1, output_padding=1, dilation=2), (2, 4, 9)),
    "transposed 2-d": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), 1, output_padding=(1, 0)), (2, 4, 5, 6)),
    "transposed groups": (lambda: nn.ConvTranspose2d(8, 6, 3, 2, groups=2, bias=False), (2, 8, 5, 6)),
    "transposed 3-d": (lambda: nn.ConvTranspose3d(4, 6, (2, 3, 2), 2), (2, 4, 3, 3, 3)),
}
CASES = [(layer, name) for layer, (make, _) in LAYERS.items() for name in families_of(layer_shape(make()).kernel_shape)]


def dense_and_chain(make, name, dtype=torch.float64, **options):
    """A layer with the weight that a decoder gives, and the chain of its factors."""
    torch.manual_seed(0)
    layer = make().to(dtype)
    tensor = compressed(layer, name, **options)
    with torch.no_grad():
        layer.weight.copy_(from_bits(tensor.to_array(), tensor.dtype))
    return layer, factorized_layer(layer, factors_of(tensor, layer_shape(layer)))


def close(a, b, tolerance):
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize(("layer", "name"), CASES)
def test_chain_is_the_dense_layer(layer, name):
    make, size = LAYERS[layer]
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        dense, chain = dense_and_chain(make, name, dtype)
        x = torch.randn(size, dtype=dtype)
        close(chain(x), dense(x), tolerance)
        close(chain.weight, dense.weight, tolerance)
        assert chain.bias is dense.bias
        assert all(type(module).__module__.startswith("torch.nn") for module in chain)
        assert type(chain).__name__ == f"Factorized{type(dense).__name__}"
        assert {m.weight.dtype for m in chain} == {dtype}


@pytest.mark.parametrize("name", ["low_rank", "shared_low_rank", "tucker", "tensor_train"])
def test_embedding(name):
    dense, chain = dense_and_chain(lambda: nn.Embedding(12, 6, padding_idx=3), name)
    tokens = torch.tensor([[0, 3, 5], [11, 11, 3]])
    close(chain(tokens), dense(tokens), 1e-13)
    close(chain.weight, dense.weight, 1e-13)
    chain(tokens).sum().backward()
    assert not chain[0].weight.grad[3].any()
    assert not hasattr(chain, "bias")


def test_padding_row_is_zero_exactly():
    layer = nn.Embedding(12, 6, padding_idx=3)
    tensor = compressed(layer, "low_rank")
    layout = Layout(12, (6,), zero_rows=(3,))
    tensor = CompressedTensor(tensor.decoders, tensor.codes, (12, 6), layout=layout)
    chain = factorized_layer(layer, factors_of(tensor, layer_shape(layer)))
    assert not chain(torch.tensor([3])).any()
    assert chain(torch.tensor([2])).any()


@pytest.mark.parametrize("name", ["low_rank", "tucker2", "spatial", "depthwise"])
def test_output_size_of_a_transposed_convolution(name):
    dense, chain = dense_and_chain(lambda: nn.ConvTranspose2d(4, 6, 3, (2, 3), 1), name)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    for size in ([9, 16], [10, 17], (2, 6, 10, 18)):
        close(chain(x, output_size=size), dense(x, output_size=size), 1e-13)


def n_weights(chain):
    return sum(module.weight.numel() for module in chain)


def test_number_of_weights():
    """The formulas of the literature, for 3 x 3 kernels of C = 8 to N = 12 channels."""
    expected = {
        "low_rank": 2 * (9 * 8 + 12),
        "shared_low_rank": 2 * (9 * 8 + 12),
        "tensor_train": 2 * (9 * 8 + 12),
        "tucker2": 8 * 2 + 9 * 2 * 2 + 12 * 2,
        "tucker": 8 * 2 + 9 * 2 * 2 + 12 * 2,
        "spatial": 2 * (3 * 8 + 3 * 12),
        "depthwise": 8 * 2 * (9 + 12),
        "kernels": 8 * 2 * (9 + 12),
        "half_filters": 2 * 2 * (4 * 9 + 12),
    }
    for name, size in expected.items():
        _, chain = dense_and_chain(lambda: nn.Conv2d(8, 12, 3), name)
        assert n_weights(chain) == size, name


def test_tucker_with_as_many_channels_is_a_pair():
    layer = nn.Conv2d(2, 12, 3)  # two channels stay two: the 1x1 convolution before the core would be for nothing
    assert len(factors_of(compressed(layer, "tucker2"), layer_shape(layer))) == 2
    wider = nn.Conv2d(3, 12, 3)
    assert len(factors_of(compressed(wider, "tucker2"), layer_shape(wider))) == 3


@pytest.mark.parametrize("n_parts", [1, 4])
def test_atoms_that_no_row_uses_are_left_out(n_parts):
    layer = nn.Conv2d(4, 6, 3)
    rng = np.random.default_rng(0)
    decoder = ComponentsDecoder(rng.normal(size=(5, 36 // n_parts)), "float64")
    codes = rng.normal(size=(6, n_parts, 5))
    codes[:, :, [1, 4]] = 0
    for some, left in ((codes, 3), (np.zeros_like(codes), 1)):
        tensor = CompressedTensor((decoder,), some.reshape(6, -1), (6, 4, 3, 3), "float64")
        factors = factors_of(tensor, layer_shape(layer))
        assert factors[0].weight.shape == (n_parts * left, 4 // n_parts, 3, 3)
        np.testing.assert_allclose(composed_weight(factors), tensor.to_array(), atol=1e-12)


def test_rows_of_another_shape_run_as_a_pair():
    """A decoder whose kernel shape is not the layer's stands for the pair of its basis."""
    layer = nn.Conv2d(4, 60, 3)
    rng = np.random.default_rng(0)
    core, factors = rng.normal(size=(2, 2, 6)), (rng.normal(size=(6, 2)),)
    for decoder, n_codes in ((TuckerDecoder(core, factors, (0,), "float64"), 2),
                             (SpatialSeparableDecoder(rng.normal(size=(2, 3, 4)), 3, "float64"), 6),
                             (DepthwiseSeparableDecoder(rng.normal(size=(6, 2, 6)), "float64"), 12)):
        tensor = CompressedTensor((decoder,), rng.normal(size=(60, n_codes)), (60, 4, 3, 3), "float64")
        chain = factors_of(tensor, layer_shape(layer))
        assert [f.weight.shape for f in chain] == [(n_codes, 4, 3, 3), (60, n_codes, 1, 1)]
        np.testing.assert_allclose(composed_weight(chain), tensor.to_array(), atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"pruned_low_rank"}))
def test_gradients_flow_to_every_factor(name):
    """Through `forward` and through the composed `weight` alike."""
    _, chain = dense_and_chain(lambda: nn.Conv2d(4, 6, 3, padding=1), name)
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    parameters = list(chain.parameters())
    by_forward = torch.autograd.grad(chain(x).square().sum(), parameters)
    by_weight = torch.autograd.grad(nn.functional.conv2d(x, chain.weight, chain.bias, padding=1).square().sum(),
                                    parameters)
    for a, b in zip(by_forward, by_weight, strict=True):
        assert a.abs().max() > 0
        close(a, b, 1e-12)


def test_answers_as_the_layer():
    dense, chain = dense_and_chain(lambda: nn.Conv2d(4, 6, (3, 5), (2, 1), (1, 2), (1, 2), 2), "low_rank")
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
                 "padding_mode", "transposed", "output_padding"):
        assert getattr(chain, name) == getattr(dense, name), name
    linear, pair = dense_and_chain(lambda: nn.Linear(6, 10), "low_rank")
    assert (pair.in_features, pair.out_features) == (linear.in_features, linear.out_features)
    linear.note = "of the user"
    assert factorized_layer(linear, [Factor(np.ones((1, 6))), Factor(np.ones((10, 1)))]).note == "of the user"


def test_mode_gradients_and_hooks_are_the_layers():
    calls = []
    layer = nn.Conv2d(4, 6, 3).eval()
    layer.weight.requires_grad_(False)
    layer.register_forward_hook(lambda module, args, output: calls.append(("after", type(module).__name__)))
    handle = layer.register_forward_pre_hook(lambda module, args: calls.append(("before", type(module).__name__)))
    layer.register_full_backward_hook(lambda module, before, after: calls.append(("back", type(module).__name__)))
    tensor = compressed(layer, "tucker2")
    chain = factorized_layer(layer, factors_of(tensor, layer_shape(layer)))
    assert not any(module.training for module in chain.modules())
    assert [p.requires_grad for p in chain.parameters()] == [False, False, False, True]
    chain(torch.randn(1, 4, 5, 5, requires_grad=True)).sum().backward()
    assert calls == [(when, "FactorizedConv2d") for when in ("before", "after", "back")]
    handle.remove()
    calls.clear()
    chain(torch.randn(1, 4, 5, 5))
    assert calls == [("after", "FactorizedConv2d")]
    assert all(module.training for module in factorized_layer(layer.train(), factors_of(tensor, layer_shape(layer)))
               .modules())


def test_bfloat16():
    dense, chain = dense_and_chain(lambda: nn.Conv2d(4, 6, 3, padding=1), "tucker2", torch.bfloat16)
    x = torch.randn(2, 4, 7, 8, dtype=torch.bfloat16)
    assert {p.dtype for p in chain.parameters()} == {torch.bfloat16}
    close(chain(x), dense(x), 0.05)  # three roundings of the factors and of what runs between them, 2^-8 each


def test_factors_that_overflow_keep_the_layer_dense():
    layer = nn.Linear(6, 4).half()
    decoder = ComponentsDecoder(np.full((1, 6), 1e6), "float32")
    tensor = CompressedTensor((decoder,), np.full((4, 1), 1e-6, dtype=np.float32), (4, 6), "float16")
    with pytest.raises(NoSmallerModule, match="overflow float16"):
        factorized_layer(layer, factors_of(tensor, layer_shape(layer)))


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(4, 6, 3, padding=1), lambda: nn.ConvTranspose2d(4, 6, 3)])
def test_channels_last(make):
    layer = make().to(memory_format=torch.channels_last)
    tensor = compressed(layer, "low_rank", rank=3)
    chain = factorized_layer(layer, factors_of(tensor, layer_shape(layer)))
    assert chain[0].weight.is_contiguous(memory_format=torch.channels_last)
    y = chain(torch.randn(2, 4, 7, 8).to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not factorized_layer(make(), factors_of(tensor, layer_shape(layer)))[0].weight.is_contiguous(
        memory_format=torch.channels_last)


def test_global_random_numbers_are_left_alone():
    layer = nn.Conv2d(4, 6, 3)
    tensor = compressed(layer, "tucker2")
    before = torch.get_rng_state()
    factorized_layer(layer, factors_of(tensor, layer_shape(layer)))
    assert torch.equal(before, torch.get_rng_state())


def test_copies_and_pickles():
    dense, chain = dense_and_chain(lambda: nn.Conv2d(4, 6, 3), "spatial")
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    for twin in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        assert torch.equal(twin(x), chain(x))
        close(twin.dense()(x), dense(x), 1e-13)
        assert twin.bias is not chain.bias


def test_dense_again():
    """The layer's own class with the composed weight; tied factors give tied weights."""
    layer, chain = dense_and_chain(lambda: nn.Conv2d(4, 6, (3, 5), padding="same", groups=2), "low_rank")
    layer.note = "of the user"
    chain = factorized_layer(layer, [Factor(m.weight.detach().numpy(), m.groups, (0, 1) if i == 0 else ())
                                     for i, m in enumerate(chain)]).eval()
    net = nn.Sequential(chain, nn.ReLU(), chain)
    other = factorized_layer(layer, [Factor(np.ones((2, 2, 3, 5)), 2, (0, 1)), Factor(np.ones((6, 1, 1, 1)), 2)])
    for mine, first in zip(other, chain, strict=True):
        mine.weight = first.weight
    net.append(other)
    dense = dense_copy(net)
    assert [type(m) for m in dense] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.Conv2d]
    assert dense[0] is dense[2]
    assert dense[3].weight is dense[0].weight
    assert dense[0].note == "of the user"
    assert not dense[0].training
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    close(dense[0](x), chain(x), 1e-13)
    assert isinstance(net[0], FactorizedLayer)
    assert type(dense_copy(chain)) is nn.Conv2d


def test_chains_of_chains():
    """A module of a chain may be factorised again."""
    _, chain = dense_and_chain(lambda: nn.Conv2d(8, 12, 3, padding=1), "low_rank", rank=6)
    tensor = compressed(chain[1], "low_rank", rank=2)
    with torch.no_grad():
        chain[1].weight.copy_(torch.from_numpy(tensor.to_array()))
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    y, weight = chain(x), chain.weight
    chain[1] = factorized_layer(chain[1], factors_of(tensor, layer_shape(chain[1])))
    close(chain(x), y, 1e-13)
    close(chain.weight, weight, 1e-13)
    again = dense_copy(nn.Sequential(chain))
    assert [type(m) for m in again.modules()] == [nn.Sequential, nn.Conv2d]
    close(again(x), y, 1e-13)


# ------------------------------------------------------------------------------------------- what stays dense
class WithOwnForward(nn.Conv2d):
    def forward(self, input):
        return super().forward(2 * input)


class WithScale(nn.Linear):
    def __init__(self, *size):
        super().__init__(*size)
        self.scale = nn.Parameter(torch.ones(1))


def patched():
    layer = nn.Linear(4, 6)
    layer.forward = lambda x: x
    return layer


def hooked_state():
    layer = nn.Linear(4, 6)
    layer._register_state_dict_hook(lambda *args: None)
    return layer


@pytest.mark.parametrize(("make", "reason"), [
    (lambda: WithOwnForward(4, 6, 3), "WithOwnForward has a forward of its own"),
    (lambda: WithScale(4, 6), "more than weight and bias: scale"),
    (patched, "Linear has a forward of its own"),
    (hooked_state, "hooks on its state dict"),
    (lambda: nn.Embedding(6, 4, max_norm=1.0), "max_norm"),
])
def test_layers_that_do_more_stay_dense(make, reason):
    layer = make()
    tensor = compressed(layer, "low_rank")
    with pytest.raises(NoSmallerModule, match=reason):
        factorized_layer(layer, factors_of(tensor, layer_shape(layer)))


def test_kinds_without_a_form():
    with pytest.raises(NoSmallerModule, match="Bilinear has no factorised form"):
        layer_shape(nn.Bilinear(3, 4, 5))
    tensor = CompressedTensor((CodebookDecoder(np.ones((1, 2, 1))),), np.zeros((4, 6), dtype=int), (4, 6))
    with pytest.raises(NoSmallerModule, match="CodebookDecoder restores a dense weight only"):
        factors_of(tensor, LayerShape(4, (6,)))


def test_a_new_family():
    class Scaled(Decoder):
        """Codes twice."""

        name = "scaled of a test"

        def decode(self, codes):
            return 2 * codes

    tensor = CompressedTensor((Scaled(),), np.ones((4, 6)), (4, 6))
    with pytest.raises(NoSmallerModule):
        factors_of(tensor, LayerShape(4, (6,)))
    register_module(Scaled, lambda decoder, codes, shape: [Factor(2 * np.eye(6)), Factor(codes)])
    first, second = factors_of(tensor, LayerShape(4, (6,)))
    np.testing.assert_array_equal(second.weight @ first.weight, tensor.to_matrix())
    with pytest.raises(TypeError, match="subclass of Decoder"):
        register_module(nn.Linear, lambda *args: None)
    with pytest.raises(TypeError, match="callable"):
        register_module(Scaled, None)
