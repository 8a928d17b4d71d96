"""CP and coupled CP convolutions run as smaller layers: every form is the dense layer, whatever the layer's options."""
# SPDX-License-Identifier: BSD-3-Clause

import io

import numpy as np
import pytest
import torch
from torch import nn

import skfactor
from skfactor import CoupledCPDFactorizer, CPDFilterPruner, KMeansWeightSharer
from skfactor.bridge.factors import NoSmallerModule, factors_of, forms_of
from skfactor.bridge.layers import layer_specs
from skfactor.bridge.modules import composed_weight, dense_copy, factorized_layer, layer_shape, stock_modules
from skfactor.bridge.tensors import from_bits
from skfactor.codec.coupled_cp import CoupledCPDecoder
from skfactor.codec.cp import CPDecoder
from skfactor.codec.tensor import CompressedTensor
from tests.bridge.test_modules import LAYERS, close

CONVOLUTIONS = [name for name in LAYERS if name.startswith(("1-d", "2-d", "3-d", "transposed"))]
FORMS = {"cp": ("", "fused", "split"), "coupled": ("", "fused", "core")}


def compressed(layer, family, rank):
    """A layer's weight of random factors; of the coupled ones, in three clusters."""
    layout = layer_specs(layer)[0].layout(layer, tuple(layer.weight.shape))
    channels, *kernel = shape = layout.kernel_shape
    n, rng = layout.n_rows, np.random.default_rng(0)
    if family == "cp":
        return CompressedTensor((CPDecoder(shape, rank, "float64"),), rng.normal(size=(n, sum(shape) * rank)),
                                tuple(layer.weight.shape), "float64", layout)
    decoder = CoupledCPDecoder(rng.normal(size=(3, channels, rank)), tuple(kernel), "float64")
    codes = np.zeros((n, 3, sum(kernel) * rank))
    codes[np.arange(n), rng.integers(0, 3, size=n)] = rng.normal(size=(n, sum(kernel) * rank))
    return CompressedTensor((decoder,), codes.reshape(n, -1), tuple(layer.weight.shape), "float64", layout)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_form_is_the_dense_layer(name, family, rank):
    make, size = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make().double(), torch.randn(size, dtype=torch.float64)
    tensor = compressed(layer, family, rank)
    assert forms_of(tensor) == FORMS[family]
    with torch.no_grad():
        layer.weight.copy_(from_bits(tensor.to_array(), "float64"))
    ran = []
    for form in forms_of(tensor):
        try:
            chain = factorized_layer(layer, factors_of(tensor, layer_shape(layer), form))
        except NoSmallerModule:  # the same as another form, or a sum of transposed convolutions
            continue
        close(chain(x), layer(x), 1e-12)
        close(chain.weight, layer.weight, 1e-12)
        assert chain.bias is layer.bias
        ran.append(form)
    expected = {""} if family == "cp" and rank == 1 else set(FORMS[family])
    expected -= {"fused"} if len(layer.kernel_size) == 1 else set()
    assert set(ran) == expected - ({"split"} if layer.transposed else set())


def test_number_of_weights_is_that_of_the_papers():
    layer = nn.Conv2d(16, 12, 3)  # C = 16 to N = 12, R = 2, K = 3 clusters
    expected = {("cp", ""): 2 * 12 * (16 + 3 + 3), ("cp", "fused"): 2 * 12 * (16 + 9),
                ("cp", "split"): 2 * 12 * (16 + 9), ("coupled", ""): 3 * 16 * 2 + 12 * 2 * (3 + 3),
                ("coupled", "fused"): 3 * 16 * 2 + 12 * 2 * 9, ("coupled", "core"): 3 * 16 * 2 + 12 * 3 * 2 * 9}
    for (family, form), size in expected.items():
        chain = factorized_layer(layer, factors_of(compressed(layer, family, 2), layer_shape(layer), form))
        assert sum(m.weight.numel() for m in stock_modules(chain)) == size, (family, form)


def test_a_linear_layer_of_clusters_is_a_pair():
    layer = nn.Linear(12, 30)
    decoder = CoupledCPDecoder(np.random.default_rng(1).normal(size=(2, 12, 3)), (), "float64")
    codes = np.random.default_rng(2).normal(size=(30, 6))
    codes[:15, :3] = codes[15:, 3:] = 0
    tensor = CompressedTensor((decoder,), codes, (30, 12), "float64")
    np.testing.assert_allclose(composed_weight(factors_of(tensor, layer_shape(layer))), tensor.to_array(), atol=1e-12)


def test_codes_in_several_clusters_run_only_as_a_core():
    layer = nn.Conv2d(4, 6, 3)
    tensor = compressed(layer, "coupled", 2)
    mixed = CompressedTensor(tensor.decoders, tensor.codes + 1.0, tensor.shape, tensor.dtype, tensor.layout)
    for form in ("", "fused"):
        with pytest.raises(NoSmallerModule, match="keep zeros"):
            factors_of(mixed, layer_shape(layer), form)
    np.testing.assert_allclose(composed_weight(factors_of(mixed, layer_shape(layer), "core")), mixed.to_array(),
                               atol=1e-10)


def test_hooks_of_the_layer_run_once_for_a_sum():
    layer = nn.Conv2d(4, 6, 3).double()
    calls = []
    layer.register_forward_hook(lambda *args: calls.append(1))
    tensor = compressed(layer, "cp", 3)
    chain = factorized_layer(layer, factors_of(tensor, layer_shape(layer), "split"))
    chain(torch.zeros(1, 4, 5, 5, dtype=torch.float64))
    assert calls == [1]
    dense = dense_copy(nn.Sequential(chain))[0]
    assert type(dense) is nn.Conv2d
    close(dense.weight, chain.weight, 1e-13)


def test_gradients_flow_to_all_factors():
    layer = nn.Conv2d(4, 6, 3).double()
    for family, forms in FORMS.items():
        for form in forms:
            chain = factorized_layer(layer, factors_of(compressed(layer, family, 2), layer_shape(layer), form))
            chain(torch.randn(2, 4, 6, 6, dtype=torch.float64)).square().sum().backward()
            assert all(m.weight.grad.abs().sum() > 0 for m in stock_modules(chain))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1, groups=2),
                         nn.ReLU(), nn.Conv2d(24, 32, (3, 5), stride=2)).eval()


RULES = {
    "cp": {"2": CPDFilterPruner(rank=2), "4": CPDFilterPruner(rank=3), "*": None},
    "rank 1": {"*": CPDFilterPruner(rank=1)},
    "coupled": {"2": CoupledCPDFactorizer(rank=4), "4": CoupledCPDFactorizer(rank=0.4, n_clusters=3), "*": None},
}


@pytest.mark.parametrize("name", RULES)
def test_factorized_network_and_its_file(name, tmp_path):
    x = torch.randn(2, 3, 12, 14)
    for execute in ("factorized", "auto"):
        result = skfactor.compress(net(), RULES[name], mode="factorized", execute=execute, example_inputs=x,
                                   progress=False)
        dense = skfactor.compress(net(), RULES[name], progress=False)
        close(result.model(x), dense.model(x), 1e-5)
        result.save(tmp_path / "x.skf")
        again = skfactor.load_into(net(), tmp_path / "x.skf")
        assert torch.equal(again(x), result.model(x))
        if execute == "factorized":
            assert {e.execution for e in result.executions} == {"factorized"}
        for e in result.executions:
            assert e.execution == "dense" or execute != "auto" or e.seconds_factorized < e.seconds_dense


@pytest.mark.parametrize("form", ["fused", "split", "core"])
def test_the_form_that_was_measured_comes_back_from_the_file(form, tmp_path, monkeypatch):
    """Times are made up so that this form wins: the file must say so, since each form rounds in its own way."""
    from skfactor.bridge import replace

    family = "coupled" if form == "core" else "cp"
    others = FORMS[family][1:]
    place = 2 + others.index(form)
    monkeypatch.setattr(replace, "layer_latencies",
                        lambda layers, inputs: [0.5 if i == place else 1.0 + i for i in range(len(layers))])
    monkeypatch.setattr(replace, "network_latencies", lambda model, choices, batch: [1.0, 0.5])
    rule = CPDFilterPruner(rank=2) if family == "cp" else CoupledCPDFactorizer(rank=4, n_clusters=2)
    x = torch.randn(2, 3, 12, 14)
    result = skfactor.compress(net(), {"4": rule, "*": None}, mode="factorized", execute="auto", example_inputs=x,
                               progress=False)
    assert [e.form for e in result.executions] == [form]
    result.save(tmp_path / "x.skf")
    again = skfactor.load_into(net(), tmp_path / "x.skf")
    assert torch.equal(again(x), result.model(x))
    assert [type(m) for m in again.modules()] == [type(m) for m in result.model.modules()]
    assert result.report.to_dict()


def test_a_rank_that_does_not_pay_stays_dense_and_says_so():
    with pytest.warns(UserWarning, match="rank 12 does not pay"):
        result = skfactor.compress(net(), {"4": CPDFilterPruner(rank=12), "*": None}, mode="factorized", progress=False)
    (execution,) = result.executions
    assert execution.execution == "dense"
    assert "no fewer than the dense layer" in execution.reason


def test_shared_codes_keep_their_clusters():
    from sklearn.pipeline import make_pipeline

    chain = make_pipeline(CoupledCPDFactorizer(rank=4), KMeansWeightSharer(32, preserve_zeros=True))
    result = skfactor.compress(net(), {"4": chain, "*": None}, mode="factorized", progress=False)
    assert [e.execution for e in result.executions] == ["factorized"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", ["cp", "coupled"])
def test_export_and_onnx(name, dynamo):
    model, x = skfactor.compress(net(), RULES[name], mode="factorized", progress=False).model, torch.randn(2, 3, 12, 14)
    close(torch.export.export(model, (x,)).module()(x), model(x), 1e-6)
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=dynamo)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, model(x).detach().numpy(), atol=1e-5)
