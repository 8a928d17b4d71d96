"""`CPDFilterPruner`: what it removes, what it reports, and that the output's error falls with calibration."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import pytest
import torch
from torch import nn

import skfactor
from skfactor import CPDFilterPruner
from skfactor.solvers.cp import cp_matrix

SHAPE = (8, 3, 3)


def filters(n=10, seed=0):
    return np.random.default_rng(seed).standard_normal((n, 72))


def test_factors_codes_and_reconstruction_agree():
    X = filters()
    pruner = CPDFilterPruner(rank=3, kernel_shape=SHAPE, prune_ratio=0.3).fit(X)
    X_hat = pruner.inverse_transform(pruner.transform(X))
    expected = cp_matrix(pruner.factors_[0], pruner.factors_[1:])
    np.testing.assert_array_equal(X_hat[pruner.support_], expected[pruner.support_])
    assert not X_hat[~pruner.support_].any()
    assert pruner.support_.sum() == 7
    np.testing.assert_allclose(pruner.rel_error_, np.linalg.norm(X - expected, axis=1) / np.linalg.norm(X, axis=1))
    np.testing.assert_allclose(pruner.relative_error_, ((X - X_hat) ** 2).sum() / (X**2).sum())
    np.testing.assert_allclose(pruner.component_norm_.shape, (10, 3))


def test_norm_drops_the_smallest_and_angles_drop_one_of_each_twin():
    X = filters()
    X[4] *= 0.01
    X[7] = 3 * X[2]
    assert np.flatnonzero(~CPDFilterPruner(rank=2, kernel_shape=SHAPE, n_filters=9).fit(X).support_) == [4]
    angles = CPDFilterPruner(rank=2, kernel_shape=SHAPE, n_filters=9, criterion="principal_angles").fit(X)
    assert np.flatnonzero(~angles.support_)[0] in (2, 7)
    assert angles.distances_[2, 7] < 1e-4


def test_a_factor_that_fills_its_space_is_left_out_with_a_warning():
    with pytest.warns(UserWarning, match=r"rank 3 fills the space of a spatial factor with 3 entries"):
        fitted = CPDFilterPruner(rank=3, kernel_shape=SHAPE, n_filters=5, criterion="principal_angles").fit(filters())
    channel_only = CPDFilterPruner(rank=3, kernel_shape=SHAPE, n_filters=5, criterion="principal_angles",
                                   weights=(1 / 3, 0.0)).fit(filters())
    np.testing.assert_array_equal(fitted.support_, channel_only.support_)


@pytest.mark.parametrize("criterion", ["norton-2024", "vbd", "random"])
def test_other_criteria_keep_as_many_as_asked(criterion):
    pruner = CPDFilterPruner(rank=1, kernel_shape=SHAPE, n_filters=4, criterion=criterion, random_state=0)
    fitted = pruner.fit(filters())
    assert fitted.support_.sum() == 4


def test_auto_is_the_least_rank_within_the_error():
    X = filters()
    fitted = CPDFilterPruner(rank="auto", target_error=0.15, kernel_shape=SHAPE).fit(X)
    assert fitted.relative_error_ <= 0.15
    below = CPDFilterPruner(rank=fitted.rank_ - 1, kernel_shape=SHAPE).fit(X)
    assert below.relative_error_ > 0.15


def test_a_rank_that_does_not_pay_is_said():
    with pytest.warns(UserWarning, match=r"rank 6 does not pay for kernels of 8x3x3: .* 84 numbers, the filter 72"):
        fitted = CPDFilterPruner(rank=6, kernel_shape=SHAPE).fit(filters())
    assert not fitted.pays_
    assert CPDFilterPruner(rank=5, kernel_shape=SHAPE).fit(filters()).pays_


def test_input_gram_lowers_the_error_of_the_output_on_other_inputs():
    rng = np.random.default_rng(1)
    mix = np.eye(72) + 0.3 * rng.standard_normal((72, 72))
    U, V = (rng.standard_normal((2000, 72)) @ mix for _ in range(2))
    X = filters()
    plain = CPDFilterPruner(rank=2, kernel_shape=SHAPE).fit(X)
    fitted = CPDFilterPruner(rank=2, kernel_shape=SHAPE).fit(X, input_gram=U.T @ U / 2000)
    errors = [((V @ (X - e.inverse_transform(e.transform(X))).T) ** 2).mean() for e in (plain, fitted)]
    assert errors[1] < 0.9 * errors[0]
    np.testing.assert_allclose(fitted.output_error_, np.trace((X - fitted.inverse_transform(fitted.transform(X)))
                               @ (U.T @ U / 2000) @ (X - fitted.inverse_transform(fitted.transform(X))).T), rtol=1e-6)


def test_errors_say_what_is_wrong():
    X = filters()
    with pytest.raises(ValueError, match=r"kernel_shape must be .* product 72"):
        CPDFilterPruner(kernel_shape=(8, 3, 4)).fit(X)
    with pytest.raises(ValueError, match=r"n_filters must be at most the 10 rows of X, got 11"):
        CPDFilterPruner(kernel_shape=SHAPE, n_filters=11).fit(X)
    with pytest.raises(ValueError, match=r"weights must be non-negative numbers"):
        CPDFilterPruner(kernel_shape=SHAPE, weights=(-1, 1, 1)).fit(X)
    with pytest.raises(ValueError, match=r"X must have the 10 rows of fit"):
        CPDFilterPruner(kernel_shape=SHAPE, prune_ratio=0.5).fit(X).transform(X[:3])


@pytest.mark.parametrize("layer", [
    nn.Conv2d(16, 6, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    nn.Conv2d(16, 8, 3, groups=2, padding=1, padding_mode="reflect"),
    nn.Conv1d(16, 6, 5, padding="same"),
    nn.Conv3d(12, 6, (2, 3, 2)),
    nn.ConvTranspose2d(16, 6, 3, stride=2),
], ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("rank", [1, 2])
def test_chains_of_convolutions_are_the_decomposed_layer(layer, rank):
    torch.manual_seed(0)
    network = nn.Sequential(layer).eval()
    x = torch.randn(2, layer.in_channels, *[9] * len(layer.kernel_size))
    dense = skfactor.compress(network, CPDFilterPruner(rank=rank), progress=False)
    chain = skfactor.compress(network, CPDFilterPruner(rank=rank), mode="factorized", progress=False)
    assert chain.executions[0].execution == "factorized"
    expected = dense.model(x)
    assert (chain.model(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_file_brings_the_chain_back(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(2, 8, 5, 5)
    network(x)
    result = skfactor.compress(network, {"0": CPDFilterPruner(rank=2)}, mode="factorized", progress=False)
    result.save(tmp_path / "net.skf")
    fresh = nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3))
    skfactor.load_into(fresh, tmp_path / "net.skf")
    assert torch.equal(fresh.eval()(x), result.model.eval()(x))
