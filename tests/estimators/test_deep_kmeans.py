# SPDX-License-Identifier: BSD-3-Clause
"""`DeepKMeansRegularizer`: planted clusters, closed forms of value and gradient, the published relaxation's flaw."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from skfactor import DeepKMeansRegularizer, KMeansWeightSharer
from skfactor.solvers.kmeans import kmeans, lloyd


def planted(n, d, k, seed=0, spread=0.02):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(k), rng.integers(0, k, n - k)])
    return rng.permutation(4 * k)[:k, None][labels] + rng.uniform(-1, 1, (k, d))[labels] \
        + spread * rng.standard_normal((n, d)), labels


def kernels(seed=0, shape=(16, 8, 3, 3)):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


@pytest.mark.parametrize(("n", "d", "k"), [(80, 5, 4), (600, 9, 12), (50, 1, 6)])
def test_planted_rows_are_found(n, d, k):
    X, labels = planted(n, d, k)
    regularizer = DeepKMeansRegularizer(k, n_init=8, random_state=0).fit(X)
    assert adjusted_rand_score(labels, regularizer.labels_[:, 0]) == 1
    theirs = KMeans(k, n_init=20, random_state=0).fit(X)
    np.testing.assert_allclose(regularizer.inertia_, theirs.inertia_, rtol=1e-6)
    np.testing.assert_allclose(np.sort(regularizer.cluster_centers_, axis=0), np.sort(theirs.cluster_centers_, axis=0),
                               rtol=1e-6)


@pytest.mark.parametrize(("options", "length"), [
    ({"kernel_shape": (8, 3, 3)}, 3),
    ({"kernel_shape": (8, 3, 3), "vector_size": "kernel"}, 9),
    ({"kernel_shape": (8, 3, 3), "vector_size": "row"}, 72),
    ({"vector_size": 6}, 6),
    ({}, 72),
    ({"kernel_shape": (24, 3), "vector_size": "kernel"}, 3),
])
def test_samples(options, length):
    """The rows of kernels are those that `weight.reshape(-1, kw)` gives."""
    W = kernels()
    regularizer = DeepKMeansRegularizer(5, random_state=0, **options).fit(W.reshape(16, -1))
    assert regularizer.vector_size_ == length
    assert regularizer.labels_.shape == (16, 72 // length)
    restored = regularizer.inverse_transform(regularizer.labels_).reshape(-1, length)
    assert len(np.unique(restored, axis=0)) == 5


def test_it_is_the_sharer_where_samples_are_rows():
    X, _ = planted(100, 6, 5, spread=0.5)
    ours = DeepKMeansRegularizer(5, random_state=3).fit(X)
    theirs = KMeansWeightSharer(5, vector_size=6, random_state=3).fit(np.unique(X, axis=0))
    np.testing.assert_allclose(ours.inertia_, theirs.inertia_, rtol=1e-6)


@pytest.mark.parametrize("zero_fraction", [0.0, 0.4])
def test_penalty_and_its_gradient_in_closed_form(zero_fraction):
    """λ/2 Σ‖w − c‖² and λ (W − C[a]), C the means of the moved weight under the clusters of the fit."""
    lam, W = 0.7, kernels().double()
    regularizer = DeepKMeansRegularizer(6, lam=lam, zero_fraction=zero_fraction, random_state=0)
    regularizer.refresh(W)
    moved = (W + 0.1 * kernels(1)).requires_grad_()
    penalty = regularizer.penalty(moved)
    penalty.backward()
    rows, labels = moved.detach().numpy().reshape(-1, 3), regularizer.labels_.reshape(-1)
    C = np.stack([rows[labels == k].mean(axis=0) for k in range(6)])
    if zero_fraction:
        C[0] = 0
        assert (regularizer.cluster_centers_[0] == 0).all()
    np.testing.assert_allclose(penalty.item(), lam / 2 * ((rows - C[labels]) ** 2).sum(), rtol=1e-12)
    np.testing.assert_allclose(moved.grad.reshape(-1, 3).numpy(), lam * (rows - C[labels]), rtol=1e-9, atol=1e-12)


def test_penalty_is_half_lambda_times_the_inertia_at_a_refresh():
    W = kernels().double()
    regularizer = DeepKMeansRegularizer(8, lam=3.0, random_state=0)
    penalty = regularizer.penalty(W)  # fits by itself
    np.testing.assert_allclose(penalty.item(), 1.5 * regularizer.inertia_, rtol=1e-6)


@pytest.mark.parametrize("n_clusters", [1, 2])
def test_spectral_penalty_is_the_trace_formula(n_clusters):
    """tr WᵀW − tr FᵀWᵀWF with W of shape (s, N) and F its leading right singular vectors, by numpy's full SVD."""
    lam, W = 0.3, kernels().double().requires_grad_()
    regularizer = DeepKMeansRegularizer(n_clusters, lam=lam, relaxation="spectral", random_state=0)
    penalty = regularizer.penalty(W)
    penalty.backward()
    S = W.detach().numpy().reshape(-1, 3).T
    F = np.linalg.svd(S)[2][:n_clusters].T
    np.testing.assert_allclose(penalty.item(), lam / 2 * (np.trace(S.T @ S) - np.trace(F.T @ S.T @ S @ F)), rtol=1e-9)
    np.testing.assert_allclose(W.grad.numpy().reshape(-1, 3).T, lam * S @ (np.eye(S.shape[1]) - F @ F.T), atol=1e-9)
    # no partition has a lower cost than its relaxation
    clusters = kmeans(np.ascontiguousarray(S.T), n_clusters, rng=np.random.default_rng(0), n_init=5)
    assert penalty.item() <= lam / 2 * clusters.inertia


@pytest.mark.parametrize("n_clusters", [3, 8])
def test_spectral_penalty_vanishes_from_the_length_of_a_sample_on(n_clusters):
    W = kernels()
    regularizer = DeepKMeansRegularizer(n_clusters, lam=1.0, relaxation="spectral", kernel_shape=(8, 3, 3),
                                        random_state=0)
    with pytest.warns(UserWarning, match=rf"n_clusters={n_clusters}.*identically zero from n_clusters=3 on"):
        regularizer.fit(W.reshape(16, -1))
    assert abs(regularizer.penalty(W).item()) < 1e-9 * W.square().sum()
    unrelaxed = DeepKMeansRegularizer(n_clusters, lam=1.0, kernel_shape=(8, 3, 3), random_state=0)
    assert unrelaxed.penalty(W).item() > 0.01 * W.square().sum()


def test_zero_cluster():
    """The smallest samples, by their number, are exactly zero; the others are nearest of the remaining centres."""
    W = kernels(3)
    regularizer = DeepKMeansRegularizer(4, zero_fraction=0.25, kernel_shape=(8, 3, 3), tol=0, random_state=0)
    restored = regularizer.inverse_transform(regularizer.fit_transform(W.reshape(16, -1))).reshape(-1, 3)
    norms = W.reshape(-1, 3).norm(dim=1).numpy()
    is_zero = (restored == 0).all(axis=1)
    assert is_zero.sum() == len(norms) // 4
    assert norms[is_zero].max() < norms[~is_zero].min()
    distances = np.linalg.norm(W.reshape(-1, 1, 3).numpy() - regularizer.cluster_centers_[1:], axis=2)
    labels = regularizer.labels_.reshape(-1)
    np.testing.assert_array_equal(labels[~is_zero], distances[~is_zero].argmin(axis=1) + 1)
    for k in (1, 2, 3):
        members = W.reshape(-1, 3).numpy()[labels == k]
        np.testing.assert_allclose(regularizer.cluster_centers_[k], members.mean(axis=0), atol=1e-6)


def test_refresh_goes_on_from_the_clusters():
    """Clusters keep their numbers while the weight moves a little, and a refresh never raises the inertia."""
    W = kernels(4)
    regularizer = DeepKMeansRegularizer(10, random_state=0).refresh(W)
    before = regularizer.labels_.copy()
    moved = W + 0.02 * kernels(5)
    stale = regularizer.penalty(moved).item() / (regularizer.lam / 2)
    regularizer.refresh(moved)
    assert (regularizer.labels_ == before).mean() > 0.9
    assert regularizer.inertia_ <= stale * (1 + 1e-6)
    assert regularizer.refresh(kernels(6, (4, 8, 3, 3))).labels_.shape == (4, 24)  # another weight is fitted anew


def test_init_is_where_lloyd_starts():
    X, _ = planted(200, 4, 6, spread=1.0)
    start = X[:6]
    regularizer = DeepKMeansRegularizer(6, init=start, tol=0).fit(X)
    found = lloyd(X, start, tol=0)
    np.testing.assert_allclose(regularizer.cluster_centers_, found.centers, rtol=1e-6)
    means = np.stack([X[found.labels == k].mean(axis=0) for k in range(len(found.centers))])
    np.testing.assert_allclose(found.centers, means, rtol=1e-9)  # a fixed point


def test_errors():
    W = kernels().reshape(16, -1).numpy()
    for options, message in (
        ({"vector_size": 7}, "vector_size must divide the 72 columns"),
        ({"kernel_shape": (8, 3, 4)}, "kernel_shape must be"),
        ({"n_clusters": 1, "zero_fraction": 0.5}, "at least two clusters"),
        ({"init": np.zeros((3, 5)), "kernel_shape": (8, 3, 3)}, "init must be 'k-means\\+\\+' or at most"),
        ({"relaxation": "cosine"}, "relaxation"),
    ):
        with pytest.raises(ValueError, match=message):
            DeepKMeansRegularizer(**{"n_clusters": 4} | options).fit(W)
    fitted = DeepKMeansRegularizer(4, random_state=0).fit(W)
    with pytest.raises(ValueError, match="must have the 1152 elements of fit, got 72"):
        fitted.penalty(torch.zeros(1, 72))
