"""The reproduction of NORTON: costs of its rows, the published algorithm, and the whole script on a tiny network."""
# SPDX-License-Identifier: BSD-3-Clause

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import skfactor
from skfactor.solvers.cp import cp_filters

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "reproduce"))
import norton_authors
import norton_cifar10
from networks import ResNet, fresh
from norton_authors import CPConv2d, cp_random, selected


@pytest.mark.parametrize("name", norton_cifar10.ROWS)
def test_every_row_has_the_published_macs_and_parameters(name):
    row = norton_cifar10.ROWS[name]
    model = norton_cifar10.structure(row)
    assert norton_cifar10.counted(model, "published") / 1e6 == pytest.approx(row.mmacs, rel=0.002)
    if not row.note:  # the tables cut digits off instead of rounding
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(row.mparams, abs=0.012)


@pytest.mark.parametrize(("network", "parameters", "mmacs"), [
    ("cifar10_vgg16", 14_991_946, 313.464), ("cifar10_resnet56", 853_018, 125.486),
    ("cifar10_densenet40", 1_059_298, 282.917)])
def test_networks_have_the_known_size(network, parameters, mmacs):
    model = fresh(network)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert norton_cifar10.counted(model) / 1e6 == pytest.approx(mmacs, abs=0.001)


def test_random_start_is_no_better_than_the_bound_and_finds_a_planted_tensor():
    rng = np.random.default_rng(0)
    W = rng.standard_normal((6, 8, 3, 3)).astype(np.float32)
    A, B, C = cp_random(W, 2, rng)
    ours = cp_filters(W.reshape(6, -1), (8, 3, 3), 2)
    errors = np.linalg.norm((W - np.einsum("rni,rna,rnb->niab", A, B, C)).reshape(6, -1), axis=1)
    errors /= np.linalg.norm(W.reshape(6, -1), axis=1)
    assert (errors >= ours.svd_bound - 1e-5).all()
    assert errors.mean() == pytest.approx(ours.rel_error.mean(), abs=0.03)
    planted = np.einsum("rni,rna,rnb->niab", *(rng.standard_normal((1, 6, n)) for n in (8, 3, 3)))
    A, B, C = cp_random(planted, 1, rng)
    np.testing.assert_allclose(np.einsum("rni,rna,rnb->niab", A, B, C), planted, atol=1e-4)


def test_a_zero_filter_stays_zero():
    W = np.random.default_rng(0).standard_normal((2, 4, 3, 3)).astype(np.float32)
    W[1] = 0
    factors = cp_random(W, 2, np.random.default_rng(1))
    assert all(np.isfinite(f).all() for f in factors)


def test_composed_block_is_the_chain_and_has_its_gradients():
    torch.manual_seed(0)
    block = CPConv2d(4, 5, 3, stride=2, bias=True).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    found = []
    for composed in (False, True):
        block.composed = composed
        block.zero_grad()
        y = block(x)
        (y * y).sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in block.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_selection_is_that_of_the_compatible_criterion():
    """Rank 1, where the published distances are not all rounding noise: our restatement and skfactor's agree."""
    W = np.random.default_rng(0).standard_normal((12, 6, 3, 3))
    pruner = skfactor.CPDFilterPruner(rank=1, kernel_shape=(6, 3, 3), n_filters=7, criterion="norton-2024")
    pruner.fit(W.reshape(12, -1))
    whole = skfactor.CPDFilterPruner(rank=1, kernel_shape=(6, 3, 3)).fit(W.reshape(12, -1))
    factors = [np.asarray(f, np.float32).reshape(12, -1, 1).transpose(2, 0, 1) for f in whole.factors_]
    np.testing.assert_array_equal(selected(factors, 7), np.flatnonzero(pruner.support_))


def test_inner_channels_fill_the_budgets_of_the_published_network():
    row = norton_cifar10.ROWS["r56-73"]
    removed = norton_cifar10.inner_channels(row)
    kept = [c - removed[f"layer{i}.*.conv1"] for i, c in ((1, 16), (2, 32), (3, 64))]
    ours, theirs = ResNet(9, mids=[k for k in kept for _ in range(9)]), norton_cifar10.structure(row)
    for cost in (norton_cifar10.counted, lambda m: sum(p.numel() for p in m.parameters())):
        assert 0.97 * cost(theirs) <= cost(ours) <= cost(theirs)


@pytest.mark.parametrize("network", ["cifar10_vgg16", "cifar10_densenet40"])
def test_published_pruning_runs_on_every_network(network):
    removed = norton_authors.rates("[0.1]*3+[0.]*36" if network == "cifar10_vgg16" else "[0.]*35+[0.1]*4")
    decomposed = norton_authors.with_cp(fresh(network), 1)
    pruned = norton_authors.pruned(decomposed, network, 1, removed)
    assert pruned.eval()(torch.randn(1, 3, 32, 32)).isfinite().all()
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in decomposed.parameters())


def test_script_runs_from_end_to_end(tmp_path, monkeypatch):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    (tmp_path / "weights").mkdir()
    save_file(fresh("cifar10_resnet8").state_dict(), tmp_path / "weights" / "cifar10_resnet8.safetensors")
    for part, n in (("train", 96), ("test", 40)):
        np.savez(tmp_path / f"cifar10_{part}.npz", X=rng.integers(0, 256, (n, 32, 32, 3), np.uint8),
                 y=rng.integers(0, 10, n))
    monkeypatch.setattr(norton_cifar10, "ROWS", {
        "whole": norton_cifar10.Row("cifar10_resnet8", 2, "", 1.0, 1.0, 1.0),
        "pruned": norton_cifar10.Row("cifar10_resnet8", 1, "[0.]+[0.2]*2+[0.4]*3", 1.0, 1.0, 1.0)})
    monkeypatch.setitem(norton_cifar10.PUBLISHED_BASELINES, "cifar10_resnet8", 1.0)
    monkeypatch.setattr(norton_cifar10, "N_HELD_BACK", 20)
    path = tmp_path / "rows.json"
    norton_cifar10.main(["--data", str(tmp_path), "--json", str(path), "--scale", "tiny", "--scratch", str(tmp_path),
                         "--rows", "whole", "pruned"])
    rows = json.loads(path.read_text())["rows"]
    assert [(r["row"], r["method"]) for r in rows] == [(n, m) for n in ("whole", "pruned") for m in ("ours", "authors")]
    for row in rows:
        assert row["file_bytes"] < row["file_bytes_before"]
        assert row["images_seen"] == 16
        assert np.isfinite(row["losses"]).all()
        assert row["train_images"] == 76
    for choice, row in zip(json.loads(path.read_text())["chosen"], rows, strict=True):
        assert choice["held_back"][str(choice["rate"])] == max(choice["held_back"].values())
        assert choice["rate"] == row["lr"]
    assert rows[0]["macs_conv_linear"] == rows[1]["macs_conv_linear"]  # one structure, two ways to fill it
    assert rows[0]["parameters"] == rows[1]["parameters"]
    assert norton_cifar10.table(rows).count("| cifar10_resnet8 |") == 4
