"""Start of an autoencoder: the principal components in a network."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import pytest
from sklearn.decomposition import PCA

from skfactor.codec.mlp import dense_layers
from skfactor.solvers.mlp_start import pca_start, principal_axes, random_start


def planted(n=80, d=12, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)) @ np.diag(1.5 ** -np.arange(d)) @ np.linalg.qr(rng.standard_normal((d, d)))[0]
    return X - X.mean(axis=0)


def reconstruct(layers, X, activation):
    half = len(layers.weights) // 2
    codes = dense_layers(X, layers.weights[:half], layers.biases[:half], activation)
    return dense_layers(codes, layers.weights[half:], layers.biases[half:], activation)


def start(X, hidden, latent, activation, n_axes=None):
    rng = np.random.RandomState(0)
    sizes = [X.shape[1], *hidden, latent, *hidden[::-1], X.shape[1]]
    axes = principal_axes(X, n_axes or min(latent, X.shape[1]), None, rng)
    return pca_start(random_start(sizes, activation, rng), axes, np.abs(X @ axes).max(axis=0), activation,
                     len(hidden) + 1)


@pytest.mark.parametrize("weighted", [False, True])
def test_axes_are_those_of_pca(weighted):
    X = planted()
    weights = np.random.default_rng(1).integers(1, 4, len(X)).astype(float) if weighted else None
    if weighted:
        X -= np.average(X, axis=0, weights=weights)
    repeated = X.repeat(weights.astype(int), axis=0) if weighted else X
    expected = PCA(4).fit(repeated).components_
    found = principal_axes(X, 4, weights, None).T
    np.testing.assert_allclose(np.abs((found * expected).sum(axis=1)), 1.0, rtol=1e-9)


def test_axes_of_many_columns_are_nearly_those_of_pca():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((60, 5)) @ rng.standard_normal((5, 1100)) + 1e-3 * rng.standard_normal((60, 1100))
    X -= X.mean(axis=0)
    expected = PCA(5, svd_solver="full").fit(X).components_
    found = principal_axes(X, 5, None, np.random.RandomState(0)).T
    np.testing.assert_allclose(np.linalg.svd(found @ expected.T)[1], 1.0, rtol=1e-5)
    assert principal_axes(X[:3], 5, None, np.random.RandomState(0)).shape == (1100, 5)


@pytest.mark.parametrize("hidden", [(), (8,), (20, 9), (9, 8, 30)])
@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_start_is_pca_exactly(hidden, activation):
    X = planted()
    pca = PCA(4).fit(X)
    found = reconstruct(start(X, hidden, 4, activation), X, activation)
    np.testing.assert_allclose(found, pca.inverse_transform(pca.transform(X)), atol=1e-10)


@pytest.mark.parametrize("activation", ["tanh", "logistic"])
def test_start_of_a_curved_activation_is_pca_nearly(activation):
    X = planted()
    pca = PCA(4).fit(X)
    expected = np.square(X - pca.inverse_transform(pca.transform(X))).sum()
    found = np.square(X - reconstruct(start(X, (10,), 4, activation), X, activation)).sum()
    assert expected <= found <= expected + 0.02 * np.square(X).sum()


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_narrow_layers_carry_as_many_components_as_fit(activation):
    X = planted()
    carried = 5 // (2 if activation == "relu" else 1)
    pca = PCA(carried).fit(X)
    found = reconstruct(start(X, (16, 5), 6, activation), X, activation)
    np.testing.assert_allclose(found, pca.inverse_transform(pca.transform(X)), atol=1e-10)


def test_more_codes_than_columns():
    X = planted(d=5)
    np.testing.assert_allclose(reconstruct(start(X, (16,), 7, "relu"), X, "relu"), X, atol=1e-10)


def test_every_unit_can_learn():
    """No unit is cut off on both sides: random weights come in where nothing goes out yet."""
    layers = start(planted(), (20,), 4, "relu")
    for W in layers.weights[0], layers.weights[2]:
        assert np.abs(W).max(axis=0).min() > 0
