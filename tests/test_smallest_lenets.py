"""The committed LeNets of a few kB: sizes as in the JSON, errors measured again where MNIST is present."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import skfactor
from tests._data import data_dir, needs_data

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "reproduce"
ROWS = [row for net in ("300", "5") if (FOLDER / f"results/smallest_lenets_{net}.json").exists()
        for row in json.loads((FOLDER / f"results/smallest_lenets_{net}.json").read_text())["rows"]]


def script():
    spec = importlib.util.spec_from_file_location("smallest_lenets", FOLDER / "smallest_lenets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fresh(net):
    return script().LeNet300() if net == "300" else script().LeNet5()


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r["file"])
def test_files_are_as_large_as_the_json_says_and_restore_full_networks(row):
    path = FOLDER / "results" / "lenets" / row["file"]
    assert path.stat().st_size == row["bytes"]
    model = skfactor.load_into(fresh(row["net"]), path)
    assert sum(int((p != 0).sum()) for p in model.parameters()) == row["nonzero"]
    n_params = {"300": 266_610, "5": 431_080}[row["net"]]
    assert sum(p.numel() for p in model.parameters()) == n_params
    assert row["ratio"] == pytest.approx(4 * n_params / row["bytes"], abs=0.06)


@needs_data
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r["file"])
def test_errors_on_the_test_images(row):
    with np.load(data_dir() / "mnist.npz") as d:
        x, y = torch.from_numpy(d["X_test"].reshape(-1, 784)).float() / 256, torch.from_numpy(d["y_test"])
    model = skfactor.load_into(fresh(row["net"]), FOLDER / "results" / "lenets" / row["file"])
    with torch.no_grad():
        wrong = sum(int((model(x[i : i + 1000]).argmax(1) != y[i : i + 1000]).sum()) for i in range(0, len(y), 1000))
    # another machine may round a tie of two logits the other way
    assert 100 * wrong / len(y) == pytest.approx(row["test_error"], abs=0.02)


def test_compiled_convolution_is_convolution_then_pooling():
    """conv_pool.c against torch's own layers: values and gradients, odd numbers of filters and images."""
    module = script()
    module.ConvPool.compiled = module._compiled()
    if module.ConvPool.compiled is None:
        pytest.skip("no C compiler")
    for a, b, n in ((3, 4, 5), (6, 5, 17)):
        narrow = module.NarrowLeNet5((a, b, 6))
        x = torch.rand(n, 784)
        out = narrow(x)
        grads = torch.autograd.grad(out.square().sum(), list(narrow.parameters()))
        h = torch.nn.functional.max_pool2d(narrow.conv1(x.view(-1, 1, 28, 28)), 2)
        h = torch.nn.functional.max_pool2d(narrow.conv2(h), 2).flatten(1)
        expected = narrow.ip2(torch.relu(narrow.ip1(h)))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        wanted = torch.autograd.grad(expected.square().sum(), list(narrow.parameters()))
        for got, right in zip(grads, wanted, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-4)


def test_narrow_network_in_full_size_answers_the_same_from_its_file(tmp_path):
    module = script()
    torch.manual_seed(0)
    pixels = np.flatnonzero(np.arange(784) % 3)
    for narrow, kept in ((module.NarrowLeNet5((3, 4, 6)), None), (module.LeNet300((12, 7), len(pixels)), pixels)):
        module.initialise(narrow)
        method = module.EntropyTraining(narrow, step=0.3)
        result = method.finish()
        module.in_full_size(result.model, method.steps(), kept).save(tmp_path / "net.skf")
        full = skfactor.load_into(module.LeNet5() if kept is None else module.LeNet300(), tmp_path / "net.skf")
        x = torch.rand(20, 784)
        with torch.no_grad():
            wanted = result.model(x if kept is None else x[:, kept])
            assert (full(x) - wanted).abs().max() < 0.05 * wanted.abs().max()  # steps are rounded to 8 bits
            assert (full(x) - wanted).abs().max() > 0


def test_price_follows_the_size_of_the_file():
    module = script()
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 10, 500))
    pool = rng.integers(0, 256, (8, 500, 40)).astype(np.uint8)
    sizes = {}
    for limit in (200, 600):
        torch.manual_seed(1)
        model = module.LeNet300((16, 12), 40)
        module.initialise(model)
        settings = (None, limit, None, 0.05, 0.0, 12, 0.5)
        method = module.train(model, pool, labels, settings, 0, lambda m: m.estimated_bytes(), batch=50)
        sizes[limit] = method.estimated_bytes()
        assert (method.rate_weight > 8 * 0.05 / 500) == (sizes[limit] > limit)
    assert sizes[200] < sizes[600]


@pytest.mark.slow
@pytest.mark.parametrize("net", ["300", "5"])
def test_run_keeps_the_best_network_within_the_limit(net, tmp_path, monkeypatch):
    """Limits between the sizes of the last networks: the row and the file are those of one of them below the limit."""
    module = script()
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 10, 800))
    centres = rng.integers(0, 200, (10, 784))
    pool = np.clip(centres[labels] + rng.normal(0, 40, (8, 800, 784)), 0, 255).astype(np.uint8)
    X = torch.from_numpy(pool[1, :100]).float() / 256
    data = (pool, labels, X, labels[:100], X[:50], labels[:50])
    widths = (12, 8) if net == "300" else (3, 4, 8)
    first = None
    for limit in (10_000_000, None):
        limit = limit or int(np.median(first["sizes"][-3:])) + 1
        monkeypatch.setitem(module.POINTS, net, {"t": (limit, 1000, widths, 2.0, 1.0, 10, 0.5)})
        row = module.run(net, "t", 0, data, tmp_path)
        first = first or row
        model = skfactor.load_into(fresh(net), tmp_path / row["file"])
        assert (tmp_path / row["file"]).stat().st_size == row["bytes"] <= limit
        assert row["bytes"] in row["sizes"][-3:]
        assert row["validation_error"] == module.error_of(model, X, labels[:100])
    assert row["sizes"] == first["sizes"]  # what is kept does not change the training
