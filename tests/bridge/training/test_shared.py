"""`TrainedSharing`: gradients per centroid, ties, pinned zeros, and what is stored at the end."""
# SPDX-License-Identifier: BSD-3-Clause

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.pipeline import Pipeline
from torch import nn

import skfactor
from skfactor import KMeansWeightSharer, LayerError, MagnitudePruner, MantissaRounder, TrainedSharing, UniformQuantizer
from tests._nets import SmallCNN, TinyLM

PRUNE_SHARE = Pipeline([("prune", MagnitudePruner(0.6)), ("share", KMeansWeightSharer(6, preserve_zeros=True))])
SHARERS = {
    "tensor": KMeansWeightSharer(5),
    "row": KMeansWeightSharer(3, granularity="row"),
    "column": KMeansWeightSharer(2, granularity="column"),
    "group": KMeansWeightSharer(4, granularity="group", group_size=5),
    "vectors": KMeansWeightSharer(4, vector_size=3, random_state=0),
    "uniform": UniformQuantizer(0.5),
    "pruned": PRUNE_SHARE,
}


def conv_net():
    torch.manual_seed(0)
    return SmallCNN()


def batch(n=16):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.arange(n) % 5


def train(method, n_steps=4, lr=0.05, optimizer=torch.optim.SGD):
    x, y = batch()
    optimizer = optimizer(method.parameter_groups(lr), lr=lr)
    for _ in range(n_steps):
        optimizer.zero_grad()
        (F.cross_entropy(method.model(x), y) + method.penalty()).backward()
        optimizer.step()
        method.after_step()
    return method


def books_of(method, name):
    return method._originals(name)[0]


@pytest.mark.parametrize("grad", ["sum", "mean"])
@pytest.mark.parametrize("kind", SHARERS)
def test_the_gradient_of_a_centroid_is_that_of_its_members(kind, grad):
    """Against the dense gradient of the same network with plain weights, summed by code in float64."""
    result = skfactor.compress(conv_net(), {"conv2": SHARERS[kind], "*": None}, progress=False)
    method = TrainedSharing(result, grad=grad, codebook="free", pin_zeros=False)
    dense = copy.deepcopy(result.model)
    x, y = batch()
    for model in (dense, method.model):
        F.cross_entropy(model.train()(x), y).backward()
    tensor = result.tensors["conv2.weight"]
    books = tensor.decoders[-1].codebooks
    n_books, n_clusters, size = books.shape
    G = tensor.layout.to_matrix(dense.conv2.weight.grad.numpy()).reshape(*tensor.codes.shape, size).astype(np.float64)
    rows, columns = np.indices(tensor.codes.shape)
    book = {"row": rows, "column": columns, "group": rows // 5}.get(kind, np.zeros_like(rows))
    expected, counts = np.zeros((n_books, n_clusters, size)), np.zeros((n_books, n_clusters, 1))
    np.add.at(expected, (book, tensor.codes), G)
    np.add.at(counts, (book, tensor.codes), 1)
    if grad == "mean":
        expected /= np.maximum(counts, 1)
    found = books_of(method, "conv2.weight").grad.numpy().reshape(expected.shape)
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def test_the_gradient_of_many_members_is_exact():
    """Where float32 sums would be off by 1e-5: 2 million members with one large gradient and many small ones."""
    layer = nn.Linear(2000, 1000, bias=False)
    method = TrainedSharing(layer, KMeansWeightSharer(2))
    g = torch.full((1000, 2000), 1e-3)
    g[0, 0] = 1000.0
    method.model.weight.backward(g)
    found = books_of(method, "weight").grad.double().sum().item()
    assert found == pytest.approx(g.double().sum().item(), rel=1e-6)


def test_the_gradient_of_a_step_is_the_chain_rule():
    result = skfactor.compress(conv_net(), {"conv2": UniformQuantizer(0.5), "*": None}, progress=False)
    method, dense = TrainedSharing(result), copy.deepcopy(result.model)
    x, y = batch()
    for model in (dense, method.model):
        F.cross_entropy(model.train()(x), y).backward()
    step = result.estimators_["conv2.weight"].step_
    multiples = np.rint(dense.conv2.weight.detach().numpy() / step)
    expected = (dense.conv2.weight.grad.double().numpy() * multiples).sum()
    assert books_of(method, "conv2.weight").shape == (1,)
    assert books_of(method, "conv2.weight").grad.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", SHARERS)
def test_start_and_end_are_what_is_stored(kind, tmp_path):
    rules = {"*": SHARERS[kind], "linear": KMeansWeightSharer(3), "*.bias": MantissaRounder(4),
             "linear.bias": MantissaRounder(4)}
    if kind == "vectors":
        rules["conv1"] = KMeansWeightSharer(4)
    result = skfactor.compress(conv_net(), rules, progress=False)
    before = {k: v.clone() for k, v in result.model.state_dict().items()}
    method = TrainedSharing(result)
    assert torch.equal(method.model.conv2.weight, result.model.conv2.weight)
    after = train(method).finish()
    assert not torch.equal(after.model.conv2.weight, result.model.conv2.weight)
    assert all(torch.equal(before[k], v) for k, v in result.model.state_dict().items())
    assert type(after.model.conv2) is nn.Conv2d
    assert list(after.model.state_dict()) == list(before)
    method.model.eval(), after.model.eval()
    x, _ = batch()
    fresh = skfactor.load_into(conv_net(), after.save(tmp_path / "a.skf")).eval()
    assert torch.equal(fresh(x), after.model(x))
    # biases were rounded at the end; weights are those of the training
    assert torch.equal(after.model.conv2.weight, method.model.conv2.weight)
    assert torch.equal(after.model.bn1.running_mean, method.model.bn1.running_mean)
    n_values = len(result.model.conv2.weight.unique())
    assert len(after.model.conv2.weight.unique()) <= n_values
    assert after.tensors["conv2.weight"].decoders[-1].codebooks.shape == \
        result.tensors["conv2.weight"].decoders[-1].codebooks.shape


def test_biases_are_stored_as_the_rules_say():
    rules = {"*": KMeansWeightSharer(4), "linear.bias": MantissaRounder(4)}
    result = train(TrainedSharing(conv_net(), rules)).finish()
    mantissa, _ = np.frexp(result.model.linear.bias.detach().numpy())
    assert np.array_equal(mantissa * 16, np.rint(mantissa * 16))
    assert result.skipped["conv2.bias"]


@pytest.mark.parametrize("options", [{}, {"reassign_every": 1}, {"soft": True}])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_pruned_weights_stay_zero(optimizer, options):
    result = skfactor.compress(conv_net(), {"conv2": PRUNE_SHARE, "linear": MagnitudePruner(0.5), "*": None},
                               progress=False)
    method = TrainedSharing(result, **options)
    train(method, optimizer=optimizer).after_epoch()
    end = train(method, optimizer=optimizer).finish().model
    for name in ("conv2", "linear"):
        was, now = getattr(result.model, name).weight == 0, getattr(end, name).weight == 0
        assert was.any()
        assert (now | ~was).all()


def test_zeros_move_where_they_are_not_pinned():
    method = TrainedSharing(skfactor.compress(conv_net(), {"conv2": PRUNE_SHARE, "*": None}, progress=False),
                            pin_zeros=False)
    assert not (train(method).finish().model.conv2.weight == 0).any()


@pytest.mark.parametrize("options", [{}, {"reassign_every": 1}, {"soft": True}])
def test_ties_stay(options, tmp_path):
    torch.manual_seed(0)
    model = TinyLM()
    method = TrainedSharing(model, {"*": KMeansWeightSharer(8), "position": None}, **options)
    inner = method.model
    assert inner.wte.weight.shape == inner.head.weight.shape == (50, 16)
    assert len(books_of(method, "wte.weight")) == 8
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    tokens = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(inner(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        method.after_step()
    method.after_epoch()
    assert torch.equal(inner.wte.weight, inner.head.weight)
    result = method.finish()
    assert result.model.wte.weight is result.model.head.weight
    assert result.ties == {"head.weight": "wte.weight"}
    assert (result.model.wte.weight[0] == 0).all() == (model.wte.weight[0] == 0).all()
    fresh = skfactor.load_into(TinyLM(), result.save(tmp_path / "a.skf")).eval()
    assert torch.equal(fresh(tokens), result.model.eval()(tokens))


def test_codes_follow_the_weights_values():
    """Against the nearest centroid by brute force."""
    method = TrainedSharing(conv_net(), {"conv2": KMeansWeightSharer(6), "*": None}, reassign_every=2)
    start = method._weights["conv2.weight"].codes.clone()
    train(method, n_steps=20, lr=0.3)
    method.after_epoch()
    assert torch.equal(method._weights["conv2.weight"].codes, start)
    method.after_epoch()
    book, latent = (p.detach().numpy() for p in method._originals("conv2.weight"))
    expected = np.abs(latent.reshape(12, -1)[:, :, None] - book[:, 0]).argmin(2)
    assert np.array_equal(method._weights["conv2.weight"].codes.numpy(), expected)
    assert not np.array_equal(expected, start.numpy())
    result = method.finish()
    assert np.array_equal(result.model.conv2.weight.detach().numpy().reshape(12, -1), book[:, 0][expected])


def test_own_values_get_the_gradient_of_the_shared_ones():
    result = skfactor.compress(conv_net(), {"conv2": KMeansWeightSharer(6), "*": None}, progress=False)
    method, dense = TrainedSharing(result, reassign_every=1), copy.deepcopy(result.model)
    x, y = batch()
    for model in (dense, method.model):
        F.cross_entropy(model.train()(x), y).backward()
    assert torch.equal(method._originals("conv2.weight")[1].grad, dense.conv2.weight.grad)


@pytest.mark.parametrize("kind", ["tensor", "row", "column", "group", "vectors"])
def test_soft_assignment_is_attention(kind):
    """Against the formula, element by element; nearly hard when it is cold."""
    result = skfactor.compress(conv_net(), {"conv2": SHARERS[kind], "*": None}, progress=False)
    method = TrainedSharing(conv_net(), {"conv2": SHARERS[kind], "*": None}, soft=True, temperature=0.5)
    shared = method._weights["conv2.weight"]
    X = conv_net().conv2.weight.detach().double().numpy().reshape(12, -1)
    books = result.tensors["conv2.weight"].decoders[-1].codebooks.astype(np.float64)
    size, T = books.shape[2], float(shared.temperature)
    expected = np.empty_like(X)
    for i in range(12):
        for j in range(0, X.shape[1], size):
            book = books[{"row": i, "column": j // size, "group": i // 5}.get(kind, 0)]
            p = np.exp(-np.square(X[i, j : j + size] - book).sum(1) / T)
            expected[i, j : j + size] = p @ book / p.sum()
    soft = method.model.train().conv2.weight.detach().numpy().reshape(12, -1)
    np.testing.assert_allclose(soft, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(method.model.eval().conv2.weight, result.model.conv2.weight)
    for _ in range(60):
        method.after_epoch()
    np.testing.assert_allclose(method.model.train().conv2.weight.detach(), result.model.conv2.weight.detach(),
                               atol=1e-6)


def test_unordered_centroids_are_stored_in_order():
    method = TrainedSharing(conv_net(), {"conv2": KMeansWeightSharer(4, granularity="row"), "*": None})
    with torch.no_grad():
        books_of(method, "conv2.weight").mul_(-1)
    result = method.finish()
    assert (np.diff(result.tensors["conv2.weight"].decoders[-1].codebooks[:, :, 0]) >= 0).all()
    assert torch.equal(result.model.conv2.weight, method.model.conv2.weight)


def test_a_uniform_codebook_stays_two_numbers():
    """The file of a trained step is as large as before; that of free levels is larger."""
    sizes = {}
    for codebook in ("auto", "free"):
        method = TrainedSharing(conv_net(), {"conv2": UniformQuantizer(0.5), "*": None}, codebook=codebook)
        sizes[codebook] = train(method, lr=1e-3).finish().tensors["conv2.weight"].nbytes
    before = skfactor.compress(conv_net(), {"conv2": UniformQuantizer(0.5), "*": None}, progress=False)
    assert abs(sizes["auto"] - before.tensors["conv2.weight"].nbytes) <= 2
    assert sizes["free"] > sizes["auto"]


def test_assigning_a_weight_sets_the_means():
    """What k-means would have as centroids for these codes."""
    method = TrainedSharing(conv_net(), {"conv2": KMeansWeightSharer(3), "*": None})
    value = torch.randn(12, 4, 3, 3, generator=torch.Generator().manual_seed(3))
    codes = method._weights["conv2.weight"].codes.numpy()
    method.model.conv2.weight = value
    expected = [value.numpy().reshape(12, -1)[codes == k].mean() for k in range(3)]
    np.testing.assert_allclose(books_of(method, "conv2.weight").detach()[:, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"reassign_every": 1}, {"reassign_every": 2}, {"soft": True}])
def test_state_goes_on_in_another_method(options):
    """Stopped after one epoch, between two reassignments where there is one every two epochs."""
    rules = {"*": KMeansWeightSharer(4, granularity="row")}
    method, other = (TrainedSharing(conv_net(), rules, grad="mean", **options) for _ in range(2))
    train(method, lr=0.3).after_epoch()
    other.load_state_dict(method.state_dict())
    for m in (method, other):
        train(m, lr=0.3).after_epoch()
    assert method._epoch == other._epoch == 2
    ends = [train(m, lr=0.3).finish().model.state_dict() for m in (method, other)]
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_compiled_networks_train():
    method = TrainedSharing(conv_net(), {"*": KMeansWeightSharer(4)})
    plain = TrainedSharing(conv_net(), {"*": KMeansWeightSharer(4)})
    x, y = batch()
    for model in (torch.compile(method.model, backend="aot_eager", fullgraph=True), plain.model):
        F.cross_entropy(model(x), y).backward()
    for name in ("conv1.weight", "conv2.weight", "linear.weight"):
        torch.testing.assert_close(books_of(method, name).grad, books_of(plain, name).grad, rtol=1e-5, atol=1e-6)


def test_half_precision_keeps_its_dtype():
    method = TrainedSharing(conv_net().bfloat16(), {"conv2": KMeansWeightSharer(4), "*": None})
    result = train(method, n_steps=0).finish()
    assert result.model.conv2.weight.dtype == torch.bfloat16
    assert len(result.model.conv2.weight.unique()) <= 4


@pytest.mark.parametrize(("make", "message"), [
    (lambda: TrainedSharing(conv_net()), "needs rules"),
    (lambda: TrainedSharing(conv_net(), MagnitudePruner(0.5)), "nothing is shared"),
    (lambda: TrainedSharing(conv_net(), KMeansWeightSharer(4), grad="max"), "grad must be 'sum' or 'mean', got 'max'"),
    (lambda: TrainedSharing(conv_net(), KMeansWeightSharer(4), reassign_every=0), "reassign_every must be None or"),
    (lambda: TrainedSharing(skfactor.compress(conv_net().state_dict(), KMeansWeightSharer(4), progress=False)),
     "training runs the network"),
])
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_has_no_codebook_is_refused_by_name():
    rules = {"conv2": skfactor.LowRankFactorizer(2), "*": KMeansWeightSharer(4)}
    with pytest.raises(LayerError, match=r"conv2.weight is stored by .*: training keeps codebooks alone"):
        TrainedSharing(conv_net(), rules)
    with pytest.raises(LayerError, match="codebook='step' needs one uniform codebook"):
        TrainedSharing(conv_net(), KMeansWeightSharer(4), codebook="step")
