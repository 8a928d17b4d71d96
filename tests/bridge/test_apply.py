"""compress, save, load: bit for bit, ties kept, the user's things untouched, the same for every backend."""
# SPDX-License-Identifier: BSD-3-Clause

import copy
import hashlib
import pickle
import warnings

import numpy as np
import pytest
import torch
from joblib import parallel_config
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import Pipeline
from torch import nn

import skfactor
from skfactor import KMeansWeightSharer, LayerError
from skfactor.codec.tensor import CompressedTensor, RawTensor
from skfactor.estimators.base import BaseCompressor
from tests._data import needs_data, real_weights
from tests._nets import LeNet5, LeNet300, ResNet, SmallCNN, TinyLM

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


class Failing(BaseCompressor):
    """Refuses matrices with a given number of columns."""

    def __init__(self, n_columns=None):
        self.n_columns = n_columns

    def fit(self, X, y=None):
        if X.shape[1] == self.n_columns:
            raise ArithmeticError("the matrix is too pretty")
        self.inner_ = KMeansWeightSharer(n_clusters=2).fit(X)
        self.decoder_ = self.inner_.decoder_
        return self

    def transform(self, X):
        return self.inner_.transform(X)


def bits(tensor):
    flat = tensor.detach().cpu().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def same(a, b):
    """Whether two state dicts hold the same bits under the same names."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and bits(a[k]) == bits(b[k]) for k in a)


def checksum(model):
    """Everything that compress must leave alone."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + bits(value))
    modes = [m.training for m in model.modules()]
    grads = [(p.requires_grad, p.grad is None, id(p), p._version) for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    numpy_state = np.random.get_state()  # noqa: NPY002  the legacy state is what must not change
    return digest.hexdigest(), modes, grads, hooks, torch.get_rng_state().tolist(), numpy_state[1].tolist()


@pytest.fixture
def cnn():
    torch.manual_seed(0)
    model = SmallCNN()
    model(torch.randn(8, 3, 8, 8))  # moves the running statistics
    return model


SHARE = KMeansWeightSharer(n_clusters=4)


def test_result_of_a_module(cnn, tmp_path):
    result = skfactor.compress(cnn, {"conv2": None, "*": SHARE}, progress=False)
    assert isinstance(result.model, SmallCNN)
    assert len(result.model.conv1.weight.unique()) <= 4
    assert torch.equal(result.model.conv2.weight, cnn.conv2.weight)
    assert list(result.state_dict()) == list(cnn.state_dict())
    assert same(result.state_dict(), result.model.state_dict())
    assert list(result.estimators_) == ["conv1.weight", "linear.weight"]
    assert set(result.skipped) == set(cnn.state_dict()) - set(result.estimators_)
    assert isinstance(result.tensors["conv1.weight"], CompressedTensor)
    assert isinstance(result.tensors["bn1.weight"], RawTensor)
    assert result.save(tmp_path / "net.skf") == tmp_path / "net.skf"
    assert same(skfactor.load(tmp_path / "net.skf"), result.state_dict())
    fresh = SmallCNN()
    assert skfactor.load_into(fresh, tmp_path / "net.skf") is fresh
    assert same(fresh.state_dict(), result.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(fresh.eval()(x), result.model.eval()(x))
    assert not hasattr(SHARE, "decoder_")


def test_records_tell_what_is_stored(cnn):
    result = skfactor.compress(cnn, SHARE, progress=False)
    records = {r.name: r for r in result.records}
    assert list(records) == list(result.tensors)
    for name, tensor in result.tensors.items():
        record, before = records[name], cnn.state_dict()[name]
        assert record.shape == tuple(before.shape) == tuple(tensor.shape)
        assert record.n_params == before.numel()
        assert record.bytes_before == before.numel() * before.element_size()
        error = (before.double() - result.state_dict()[name].double()).square().sum()
        expected = error / before.double().square().sum() if error else error
        assert record.relative_error == pytest.approx(float(expected), rel=1e-9)
        assert (record.skipped is None) == (name in result.estimators_)
    conv = records["conv2.weight"]
    assert (conv.type, conv.dtype, conv.n_clusters) == ("Conv2d", "float32", 4)
    assert conv.kappa == pytest.approx(1 - 4 / conv.n_params)
    assert "n_clusters=4" in conv.estimator
    assert conv.to_dict()["seconds"] > 0


def test_nothing_of_the_user_changes(cnn):
    cnn.conv1.requires_grad_(False)
    cnn.bn1.eval()
    cnn.register_forward_hook(lambda *a: None)
    x = torch.randn(8, 3, 8, 8)
    kept_x, before = x.clone(), checksum(cnn)
    rules = {"conv1": SHARE, "*": KMeansWeightSharer(n_clusters=3, random_state=0)}
    states = {k: pickle.dumps(v) for k, v in rules.items()}
    result = skfactor.compress(cnn, rules, calibration=x, progress=False)
    assert checksum(cnn) == before
    assert torch.equal(x, kept_x)
    assert {k: pickle.dumps(v) for k, v in rules.items()} == states
    assert [m.training for m in result.model.modules()] == [m.training for m in cnn.modules()]
    assert not result.model.conv1.weight.requires_grad
    assert result.model.conv2.weight.requires_grad
    # and later changes of the user's do not reach the result
    kept = {k: v.clone() for k, v in result.state_dict().items()}
    with torch.no_grad():
        for p in (*cnn.parameters(), *result.model.parameters()):
            p.add_(1.0)
    assert same(result.state_dict(), kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_bit_for_bit(dtype, tmp_path):
    torch.manual_seed(1)
    for model in (SmallCNN().to(dtype), TinyLM().to(dtype)):
        result = skfactor.compress(model, {"*": SHARE, "*.bias": KMeansWeightSharer(n_clusters=1)}, progress=False)
        path = result.save(tmp_path / "net.skf")
        loaded = skfactor.load(path)
        assert same(loaded, result.state_dict())
        assert same(result.model.state_dict(), loaded)
        assert {v.dtype for v in result.model.parameters()} == {dtype}
        fresh = copy.deepcopy(model)
        assert same(skfactor.load_into(fresh, path).state_dict(), loaded)


def test_integers_scalars_empty_and_special_values_are_stored_as_they_are(tmp_path):
    state = {
        "w": torch.randn(6, 5), "int": torch.arange(7), "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "byte": torch.arange(256, dtype=torch.uint8), "f8": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "bf16": torch.randn(3).bfloat16(),
    }
    result = skfactor.compress(state, SHARE, progress=False)
    assert result.model is None
    assert list(result.estimators_) == ["w"]
    assert "empty" in result.skipped["empty"]
    assert "int64" in result.skipped["int"]
    loaded = skfactor.load(result.save(tmp_path / "s.skf"))
    assert same(loaded, result.state_dict())
    assert same({k: v for k, v in loaded.items() if k != "w"}, {k: v for k, v in state.items() if k != "w"})


def test_ties_stay_tied_everywhere(tmp_path):
    torch.manual_seed(2)
    model = TinyLM()
    result = skfactor.compress(model, {"wte": SHARE, "*": KMeansWeightSharer(n_clusters=8)}, progress=False)
    assert result.model.head.weight is result.model.wte.weight
    assert result.model.head.weight is not model.head.weight
    assert result.ties == {"head.weight": "wte.weight"}
    assert "head.weight" not in result.tensors
    assert next(r for r in result.records if r.name == "wte.weight").tied_to == ("head.weight",)
    for state in (result.state_dict(), skfactor.load(result.save(tmp_path / "lm.skf"))):
        assert state["head.weight"] is state["wte.weight"]
        assert not state["wte.weight"][0].any()  # padding_idx
        assert len(state["wte.weight"][1:].unique()) <= 4
        assert len(state["fc.weight"].unique()) > 4
    fresh = TinyLM()
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
    skfactor.load_into(fresh, tmp_path / "lm.skf")
    assert fresh.head.weight is fresh.wte.weight
    assert optimizer.param_groups[0]["params"][1] is fresh.wte.weight
    assert same(fresh.state_dict(), result.state_dict())


def test_tied_state_dict(tmp_path):
    model = TinyLM()
    from_state = skfactor.compress(model.state_dict(), {"wte": SHARE, "*": None}, progress=False)
    assert from_state.ties == {"head.weight": "wte.weight"}
    state = skfactor.load(from_state.save(tmp_path / "lm.skf"))
    assert state["head.weight"] is state["wte.weight"]


def test_shared_module_and_wrappers(tmp_path):
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    result = skfactor.compress(model, SHARE, calibration=torch.randn(10, 6), progress=False)
    assert result.model[0] is result.model[2]
    assert list(result.estimators_) == ["0.weight"]
    for wrapped in (nn.DataParallel(SmallCNN()), torch.compile(SmallCNN())):
        result = skfactor.compress(wrapped, SHARE, progress=False)
        assert type(result.model) is type(wrapped)
        path = result.save(tmp_path / "w.skf")
        skfactor.load_into(SmallCNN(), path)
        skfactor.load_into(wrapped, path)
        assert same(wrapped.state_dict(), result.model.state_dict())


def test_channels_last_and_non_contiguous():
    torch.manual_seed(3)
    plain = nn.Conv2d(4, 6, 3)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    a, b = (skfactor.compress(m, SHARE, progress=False).model for m in (plain, last))
    assert torch.equal(a.weight, b.weight)
    assert b.weight.is_contiguous(memory_format=torch.channels_last)
    w = torch.randn(5, 7).t()
    a, b = (skfactor.compress({"w": v}, SHARE, progress=False).state_dict()["w"] for v in (w, w.contiguous()))
    assert torch.equal(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_network_on_a_gpu(cnn, tmp_path):
    x = torch.randn(4, 3, 8, 8)
    expected = skfactor.compress(cnn, SHARE, progress=False)
    result = skfactor.compress(copy.deepcopy(cnn).cuda(), SHARE, progress=False)
    assert result.model.conv1.weight.is_cuda
    assert same(result.state_dict(), expected.state_dict())
    fresh = skfactor.load_into(SmallCNN().cuda(), result.save(tmp_path / "g.skf"))
    assert same({k: v.cpu() for k, v in fresh.state_dict().items()}, expected.state_dict())
    assert skfactor.compress(copy.deepcopy(cnn).cuda(), SHARE, calibration=x, progress=False).uncalibrated == {}


def test_any_number_of_workers_and_any_backend_gives_the_same_bits(cnn):
    x = torch.randn(4, 3, 8, 8)

    def run(**kwargs):
        return skfactor.compress(cnn, SHARE, calibration=x, progress=False, **kwargs).state_dict()

    expected = run()
    assert same(run(n_jobs=2), expected)
    for backend in ("threading", "loky", "multiprocessing"):
        with parallel_config(backend=backend, n_jobs=2):
            assert same(run(), expected)


@pytest.mark.distributed
def test_dask_cluster_gives_the_same_bits(cnn):
    distributed = pytest.importorskip("distributed")
    x = torch.randn(4, 3, 8, 8)
    expected = skfactor.compress(cnn, SHARE, calibration=x, progress=False).state_dict()
    with (distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
          distributed.Client(cluster), parallel_config(backend="dask")):
        result = skfactor.compress(cnn, SHARE, calibration=x, progress=False)
        with pytest.raises(LayerError, match=r"layer .conv1..*too pretty") as error:
            skfactor.compress(cnn, Failing(n_columns=27), progress=False)
        assert isinstance(error.value.__cause__, ArithmeticError)
        with pytest.warns(ConvergenceWarning, match=r"layer 'linear' \(Linear 5x12\)"):
            skfactor.compress(cnn, {"linear": KMeansWeightSharer(n_clusters=1000), "*": None}, progress=False)
    assert same(result.state_dict(), expected)


@pytest.mark.parametrize("n_jobs", [None, 2])
def test_failing_layer_is_named_with_its_cause(cnn, n_jobs):
    before = checksum(cnn)
    with pytest.raises(LayerError) as error:
        skfactor.compress(cnn, Failing(n_columns=36), n_jobs=n_jobs, progress=False)
    assert str(error.value) == "layer 'conv2' (Conv2d 12x4x3x3) with Failing(n_columns=36): the matrix is too pretty"
    assert isinstance(error.value.__cause__, ArithmeticError)
    assert checksum(cnn) == before


@pytest.mark.parametrize("n_jobs", [None, 2])
def test_warnings_carry_the_layer(cnn, n_jobs):
    with torch.no_grad():
        cnn.linear.weight.fill_(1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        skfactor.compress(cnn, SHARE, n_jobs=n_jobs, progress=False)
    messages = [str(w.message) for w in caught if issubclass(w.category, ConvergenceWarning)]
    assert len(messages) == 1
    assert messages[0].startswith("layer 'linear' (Linear 5x12): ")


def test_warnings_in_threads_do_not_leak_the_filters(cnn):
    with torch.no_grad():
        for p in cnn.parameters():
            p.fill_(1.0)
    filters, show = list(warnings.filters), warnings.showwarning
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with parallel_config(backend="threading", n_jobs=3):
            skfactor.compress(cnn, SHARE, progress=False)
    assert len([w for w in caught if w.category is ConvergenceWarning]) == 3
    assert warnings.filters == filters
    assert warnings.showwarning is show


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("transposed", [False, True])
def test_weights_that_are_not_finite(value, transposed):
    layer = nn.ConvTranspose2d(3, 4, 2) if transposed else nn.Conv2d(3, 4, 2)
    with torch.no_grad():
        layer.weight[2, 1, 0, 1] = value
        layer.weight[2, 2, 1, 1] = value
    model = nn.ModuleDict({"good": nn.Linear(2, 2), "bad": layer})
    with pytest.raises(LayerError, match=r"layer 'bad' .*2 NaN or infinite values, the first at index \(2, 1, 0, 1\)"):
        skfactor.compress(model, SHARE, progress=False)
    skfactor.compress(model, {"bad": None, "*": SHARE}, progress=False)


def test_infinite_total_of_finite_weights_is_no_error():
    state = {"w": torch.full((4, 4), 3e38)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = skfactor.compress(state, KMeansWeightSharer(n_clusters=1), progress=False)
    assert torch.isfinite(result.state_dict()["w"]).all()


def test_vectors_on_request(cnn):
    result = skfactor.compress(cnn, {"bn1.weight": KMeansWeightSharer(n_clusters=1), "*": None}, progress=False)
    assert list(result.estimators_) == ["bn1.weight"]
    assert result.model.bn1.weight.unique().numel() == 1


def test_pipeline_of_estimators(cnn, tmp_path):
    rules = Pipeline([("nothing", "passthrough"), ("share", SHARE)])
    result = skfactor.compress(cnn, rules, progress=False)
    assert same(result.state_dict(), skfactor.compress(cnn, SHARE, progress=False).state_dict())
    assert isinstance(result.estimators_["conv1.weight"], Pipeline)
    assert same(skfactor.load(result.save(tmp_path / "p.skf")), result.state_dict())


def test_what_cannot_be_compressed_at_all():
    for wrong in (3, None, [SmallCNN()], nn.Linear):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, a state dict or the path"):
            skfactor.compress(wrong, SHARE)
    with pytest.raises(ValueError, match="give the module"):
        skfactor.compress(SmallCNN().state_dict(), SHARE, calibration=torch.zeros(1, 3, 8, 8))
    model = SmallCNN()
    model.cache = model.conv1.weight * 2  # not a leaf: torch cannot copy it
    with pytest.raises(ValueError, match=r"cannot be copied: .*state_dict"):
        skfactor.compress(model, SHARE)


def test_load_into_checks_before_it_writes(cnn, tmp_path):
    path = skfactor.compress(cnn, SHARE, progress=False).save(tmp_path / "net.skf")

    class Bigger(SmallCNN):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(2, 2)

    half, wide = SmallCNN().half(), SmallCNN()
    wide.linear = nn.Linear(12, 6)
    smaller = SmallCNN()
    del smaller.linear
    for model, message in [
        (Bigger(), r"2 are not in the file \(extra.weight, extra.bias\)"),
        (smaller, r"2 are not in the network \(linear.weight, linear.bias\)"),
        (half, r"differ in shape or dtype: conv1.weight: file float32 \(8, 3, 3, 3\), network float16"),
        (wide, r"2 tensors differ in shape or dtype: linear.weight: file float32 \(5, 12\), network float32 \(6, 12\)"),
    ]:
        before = checksum(model)
        with pytest.raises(ValueError, match=message):
            skfactor.load_into(model, path)
        assert checksum(model) == before
    bigger = skfactor.load_into(Bigger(), path, strict=False)
    assert torch.equal(bigger.conv1.weight, skfactor.load(path)["conv1.weight"])
    with pytest.raises(LayerError, match="to_empty"):
        skfactor.load_into(SmallCNN().to("meta"), path)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        skfactor.load_into(cnn.state_dict(), path)


def test_load_into_refuses_to_tie_what_the_file_holds_apart(tmp_path):
    state = {k: v.clone() for k, v in TinyLM().state_dict().items()}
    path = skfactor.compress(state, {"*": None, "fc": SHARE}, progress=False).save(tmp_path / "a.skf")
    assert skfactor.load_into(TinyLM(), path)  # two tensors of the same bits are fine
    state["head.weight"] += 1
    path = skfactor.compress(state, {"*": None, "fc": SHARE}, progress=False).save(tmp_path / "b.skf")
    with pytest.raises(ValueError, match=r"ties wte\.weight and head\.weight"):
        skfactor.load_into(TinyLM(), path)


@needs_data
@pytest.mark.parametrize(("name", "make"), [
    ("cifar10_resnet20", ResNet), ("mnist_lenet5_original", LeNet5), ("mnist_lenet300100_original", LeNet300)])
def test_real_networks_end_to_end(name, make, tmp_path):
    model = make()
    model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in real_weights(name).items()}, strict=False)
    result = skfactor.compress(model, KMeansWeightSharer(n_clusters=16), progress=False)
    path = result.save(tmp_path / "net.skf")
    assert same(skfactor.load(path), result.state_dict())
    fresh = skfactor.load_into(make(), path).eval()
    x = torch.randn(4, *((3, 32, 32) if "resnet" in name else (1, 28, 28)))
    assert torch.equal(fresh(x), result.model.eval()(x))
    assert all(len(result.state_dict()[n].unique()) <= 16 for n in result.estimators_)
    n_weights = sum(result.tensors[n].codes.size for n in result.estimators_)
    before = sum(p.numel() * 4 for p in model.parameters())
    assert path.stat().st_size < before / 5
    assert n_weights > 0.98 * sum(p.numel() for p in model.parameters())
