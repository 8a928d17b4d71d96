"""Coupled CP decomposition: planted clusters, bounds from singular values, errors recomputed."""
# SPDX-License-Identifier: BSD-3-Clause

from itertools import combinations

import numpy as np
import pytest

from skfactor.solvers.coupled_cp import _start, coupled_cp, encode_coupled, most_terms, refit_coupled
from skfactor.solvers.whitening import damped_grams

LETTERS = "ijk"


def planted(kernel, rank, n=20, channels=9, n_clusters=2, seed=0):
    """Filters of clusters with channel factors of their own, and the cluster of each."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((n_clusters, channels, rank))
    labels = np.arange(n) % n_clusters
    S = [rng.standard_normal((n, k, rank)) for k in kernel]
    return rebuilt(A, S, labels), labels


def rebuilt(A, S, labels):
    letters = LETTERS[: len(S)]
    spec = ",".join(["ncr", *(f"n{x}r" for x in letters)]) + "->nc" + letters
    return np.einsum(spec, A[labels], *S).reshape(len(labels), -1)


@pytest.mark.parametrize("kernel", [(4,), (3, 3), (3, 2), (2, 2, 3)])
def test_planted_clusters_are_found(kernel):
    X, labels = planted(kernel, rank=2)
    found = coupled_cp(X, (9, *kernel), 2, 2, tol=1e-14, max_iter=3000)
    np.testing.assert_array_equal(found.labels, labels)
    assert found.errors.sum() < 1e-8 * np.square(X).sum()
    np.testing.assert_allclose(np.linalg.norm(found.channels, axis=1), 1.0)


@pytest.mark.parametrize("kernel", [(3,), (3, 3), (2, 3, 2)])
def test_errors_are_those_of_the_factors(kernel):
    X = np.random.default_rng(1).standard_normal((15, 6 * int(np.prod(kernel))))
    found = coupled_cp(X, (6, *kernel), 3, 3, max_iter=30)
    difference = X - rebuilt(found.channels, found.spatial, found.labels)
    np.testing.assert_allclose(found.errors, np.square(difference).sum(axis=1), rtol=1e-9)
    # the terms' norms are spread evenly over the spatial factors
    norms = [np.linalg.norm(F, axis=1) for F in found.spatial]
    for other in norms[1:]:
        np.testing.assert_allclose(other, norms[0], rtol=1e-9, atol=1e-12)


def test_one_cluster_of_vectors_is_the_singular_value_decomposition():
    X = np.random.default_rng(2).standard_normal((30, 12))
    found = coupled_cp(X, (12,), 4, 1, tol=1e-13, max_iter=2000)
    tail = np.square(np.linalg.svd(X, compute_uv=False)[4:]).sum()
    assert tail * (1 - 1e-12) <= found.errors.sum() <= tail * (1 + 1e-6)


def test_no_error_is_below_that_of_subspaces_and_more_terms_never_hurt():
    X = np.random.default_rng(3).standard_normal((16, 8 * 9))
    previous = np.inf
    for rank in (1, 2, 4, 8, 24):
        found = coupled_cp(X, (8, 3, 3), rank, 1)
        flat = X.reshape(16, 8, 9).transpose(1, 0, 2).reshape(8, -1)
        bound = np.square(np.linalg.svd(flat, compute_uv=False)[rank:]).sum()
        assert bound - 1e-9 <= found.errors.sum() < previous
        previous = found.errors.sum()
    assert previous < 1e-12  # 24 = 8 channels times the 3 pixels of an axis


def test_most_terms_are_exact_for_any_kernel():
    for kernel in [(5,), (2, 3), (2, 2, 2)]:
        shape = (4, *kernel)
        X = np.random.default_rng(4).standard_normal((7, int(np.prod(shape))))
        errors = coupled_cp(X, shape, most_terms(shape), 1, tol=1e-16, max_iter=500).errors
        assert errors.sum() < 1e-5 * np.square(X).sum()


def test_clusters_beat_one_channel_factor_on_clustered_filters():
    X, _ = planted((3, 3), rank=2, n_clusters=3)
    one, three = (coupled_cp(X, (9, 3, 3), 2, k).errors.sum() for k in (1, 3))
    assert three < 0.1 * one


def test_filters_that_were_not_fitted_are_encoded():
    X, labels = planted((3, 3), rank=2, n=40)
    found = coupled_cp(X[:30], (9, 3, 3), 2, 2, tol=1e-14, max_iter=3000)
    new, spatial, errors = encode_coupled(X[30:], (9, 3, 3), found.channels)
    np.testing.assert_array_equal(new, labels[30:])
    difference = X[30:] - rebuilt(found.channels, spatial, new)
    np.testing.assert_allclose(errors, np.square(difference).sum(axis=1), atol=1e-9)
    assert errors.sum() < 0.02 * np.square(X[30:]).sum()


def test_zeros_and_single_filters():
    found = coupled_cp(np.zeros((3, 18)), (2, 3, 3), 2, 2)
    assert not any(F.any() for F in found.spatial)
    assert np.isfinite(found.channels).all()
    X = np.random.default_rng(5).standard_normal((3, 18))
    X[1] = 0
    found = coupled_cp(X, (2, 3, 3), 3, 5)
    assert not any(F[1].any() for F in found.spatial)
    assert np.isfinite(found.errors).all()


def gram(d, seed, n=200):
    rng = np.random.default_rng(seed)
    Z = rng.standard_normal((n, d)) @ rng.standard_normal((d, d))
    return Z.T @ Z / n


@pytest.mark.parametrize("groups", [1, 2])
def test_refit_lowers_the_output_error_round_after_round(groups):
    X = np.random.default_rng(6).standard_normal((12, 5 * 6))
    G = np.stack([gram(30, i) for i in range(groups)])
    found = coupled_cp(X, (5, 2, 3), 3, 2)
    damped = damped_grams(G)

    def output(c):
        E = X - rebuilt(c.channels, c.spatial, c.labels)
        return sum(np.einsum("nd,nd->", e @ g, e) for e, g in zip(np.split(E, groups), damped, strict=True))

    previous = output(found)
    for n_rounds in (1, 2, 4):
        refitted = refit_coupled(X, found, G, n_rounds=n_rounds)
        np.testing.assert_allclose(refitted.errors.sum(), output(refitted), rtol=1e-9)
        assert output(refitted) < previous
        previous = output(refitted)


def test_refit_of_vectors_reaches_the_whitened_singular_values():
    X, G = np.random.default_rng(7).standard_normal((25, 8)), gram(8, 9)[None]
    refitted = refit_coupled(X, coupled_cp(X, (8,), 3, 1), G, n_rounds=300)
    values = np.linalg.svd(X @ np.linalg.cholesky(damped_grams(G)[0]), compute_uv=False)
    tail = np.square(values[3:]).sum()
    assert tail * (1 - 1e-9) <= refitted.errors.sum() <= tail * (1 + 1e-4)


def test_large_channel_factors_are_refitted_by_gradients(monkeypatch):
    from skfactor.solvers import coupled_cp as module

    X, G = np.random.default_rng(8).standard_normal((10, 4 * 4)), gram(16, 3)[None]
    found = coupled_cp(X, (4, 2, 2), 2, 2)
    direct = refit_coupled(X, found, G)
    monkeypatch.setattr(module, "_DIRECT", 0)
    monkeypatch.setattr(module, "_CG_STEPS", 100)
    np.testing.assert_allclose(refit_coupled(X, found, G).errors, direct.errors, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_filters_of_one_channel_are_truncated_singular_value_decompositions(rank):
    X = np.random.default_rng(0).standard_normal((20, 9))
    singular = np.linalg.svd(X.reshape(-1, 3, 3), compute_uv=False)
    found = coupled_cp(X, (1, 3, 3), rank, 1)
    np.testing.assert_allclose(found.errors, (singular[:, rank:] ** 2).sum(axis=1), atol=1e-3)


def test_filters_that_move_to_a_better_cluster_lower_the_error(monkeypatch):
    X = np.random.default_rng(1).standard_normal((60, 6 * 9))
    moved = coupled_cp(X, (6, 3, 3), 4, 3)
    monkeypatch.setattr("skfactor.solvers.coupled_cp._REASSIGNMENTS", 0)
    stayed = coupled_cp(X, (6, 3, 3), 4, 3)
    assert (moved.labels != stayed.labels).any()
    assert moved.errors.sum() < 0.995 * stayed.errors.sum()


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_the_start_holds_the_most_that_terms_of_principal_directions_can(rank):
    """Against every choice of (direction, place): their terms are orthogonal, so that energies add up."""
    rng = np.random.default_rng(4)
    W = rng.standard_normal((7, 3, 9))
    W[:, 0] *= 4  # two terms of this direction hold more than the first one of another
    basis, factors = _start(W, (3, 3), rank)
    held = np.square(W).sum() - np.square(W - rebuilt(basis[None], factors, np.zeros(7, int)).reshape(W.shape)).sum()
    flat = W.transpose(1, 0, 2).reshape(3, -1)
    images = np.einsum("cd,ncp->ndp", np.linalg.svd(flat)[0], W).reshape(7, 3, 3, 3)
    energies = np.square(np.linalg.svd(images, compute_uv=False)).sum(axis=0).ravel()
    np.testing.assert_allclose(held, max(map(sum, combinations(energies, rank))), rtol=1e-9)
