"""CP solver: planted tensors, the bound of the SVD, the textbook algorithm, and the metric of the output."""
# SPDX-License-Identifier: BSD-3-Clause

import warnings

import numpy as np
import pytest

from skfactor.solvers.cp import cp_filters, cp_matrix
from skfactor.solvers.cp_output import _conjugate_gradients, _khatri_rao_rows, refit_cp
from skfactor.solvers.low_rank import low_rank_basis


def planted(rng, n, shape, rank):
    return cp_matrix(rng.standard_normal((n, shape[0], rank)), [rng.standard_normal((n, k, rank)) for k in shape[1:]])


def one_filter_als(W, rank, rng, n_iter=300):
    """CP of one filter (C, h, w) by textbook alternating least squares from a random start, with lstsq."""
    B, C = (rng.standard_normal((k, rank)) for k in W.shape[1:])
    for _ in range(n_iter):
        KR = (B[:, None] * C[None]).reshape(-1, rank)
        A = np.linalg.lstsq(KR, W.reshape(len(W), -1).T, rcond=None)[0].T
        KR = (A[:, None] * C[None]).reshape(-1, rank)
        B = np.linalg.lstsq(KR, W.transpose(1, 0, 2).reshape(W.shape[1], -1).T, rcond=None)[0].T
        KR = (A[:, None] * B[None]).reshape(-1, rank)
        C = np.linalg.lstsq(KR, W.transpose(2, 0, 1).reshape(W.shape[2], -1).T, rcond=None)[0].T
    return np.linalg.norm(W - np.einsum("ar,br,cr->abc", A, B, C)) / np.linalg.norm(W)


@pytest.mark.parametrize(("shape", "rank"), [((6, 3, 3), 1), ((16, 3, 3), 2), ((10, 7), 3), ((5, 3, 2, 2), 2),
                                             ((4, 5, 1), 2)])
def test_planted_filters_come_back(shape, rank):
    X = planted(np.random.default_rng(0), 9, shape, rank)
    cp = cp_filters(X, shape, rank, tol=1e-10, max_iter=3000)
    assert np.median(cp.rel_error) < 1e-6
    np.testing.assert_allclose(cp_matrix(cp.pointwise, cp.spatial)[cp.rel_error < 1e-6], X[cp.rel_error < 1e-6],
                               atol=1e-5 * np.abs(X).max())
    assert (cp.svd_bound < 1e-7).all()


def test_error_is_that_of_the_factors_and_no_less_than_the_bound():
    X = np.random.default_rng(0).standard_normal((20, 8 * 9)).astype(np.float32)
    for rank in (1, 2, 4, 8):
        cp = cp_filters(X, (8, 3, 3), rank)
        E = X - cp_matrix(cp.pointwise, cp.spatial)
        np.testing.assert_allclose(cp.rel_error, np.linalg.norm(E, axis=1) / np.linalg.norm(X, axis=1), rtol=1e-6)
        singular = np.linalg.svd(X.reshape(20, 8, 9).astype(float), compute_uv=False)
        bound = np.sqrt((singular[:, rank:] ** 2).sum(axis=1)) / np.linalg.norm(X, axis=1)
        np.testing.assert_allclose(cp.svd_bound, bound, atol=1e-7)
        assert (cp.rel_error >= bound - 1e-7).all()
        for F in cp.spatial:
            np.testing.assert_allclose(np.linalg.norm(F, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rank", [1, 3, 6, 8])
def test_filters_of_less_rank_than_terms_and_of_none(rank, dtype):
    """Surplus terms may grow without end: no warning, no infinite number, and no more error than without them."""
    rng = np.random.default_rng(0)
    images = np.zeros((3, 4, 3, 3))
    images[0, 0] = np.eye(3)
    images[1, 0, 0, 1] = images[1, 0, 1, 0] = 1
    X = np.concatenate([planted(rng, 5, (4, 3, 3), 1), images.reshape(3, 36), np.ones((1, 36))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cp = cp_filters(X, (4, 3, 3), rank, dtype=dtype)
    assert all(np.isfinite(F).all() for F in (cp.pointwise, *cp.spatial))
    E = X - cp_matrix(cp.pointwise, cp.spatial)
    norms = np.linalg.norm(X, axis=1)
    np.testing.assert_allclose(np.linalg.norm(E, axis=1), cp.rel_error * norms, atol=1e-6)
    exact = np.array([1, 1, 1, 1, 1, 3, 2, 0, 1]) <= rank  # ranks of the filters; the third image is zero
    assert (cp.rel_error[exact] < 1e-3).all()


def test_sweeps_are_those_of_the_textbook_from_the_same_start():
    """Least squares for A, B and C by turns, filter by filter, from the leading terms of the leading images."""
    X, rank, errors = np.random.default_rng(0).standard_normal((5, 7, 3, 4)), 3, []
    for W in X:
        images = np.linalg.svd(W.reshape(7, 12))[2][:rank].reshape(rank, 3, 4)
        u, _, vt = np.linalg.svd(images)
        B, C = u[:, :, 0].T, vt[:, 0].T
        for sweep in range(8):
            A = np.linalg.lstsq((B[:, None] * C).reshape(-1, rank), W.reshape(7, -1).T, rcond=None)[0].T
            E = W - np.einsum("ar,br,cr->abc", A, B, C)
            if sweep < 7:
                B = np.linalg.lstsq((A[:, None] * C).reshape(-1, rank), W.transpose(0, 2, 1).reshape(-1, 3))[0].T
                C = np.linalg.lstsq((A[:, None] * B).reshape(-1, rank), W.reshape(-1, 4))[0].T
        errors.append(np.linalg.norm(E) / np.linalg.norm(W))
    found = cp_filters(X.reshape(5, -1), (7, 3, 4), rank, tol=0.0, max_iter=8, dtype=np.float64)
    np.testing.assert_allclose(found.rel_error, errors, rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_filters_of_one_channel_are_truncated_singular_value_decompositions(rank):
    X = np.random.default_rng(0).standard_normal((40, 9))
    singular = np.linalg.svd(X.reshape(-1, 3, 3), compute_uv=False)
    best = np.sqrt((singular[:, rank:] ** 2).sum(axis=1)) / np.linalg.norm(X, axis=1)
    np.testing.assert_allclose(cp_filters(X, (1, 3, 3), rank).rel_error, best, atol=2e-3)


def test_no_worse_than_a_random_start_of_the_textbook_method():
    rng = np.random.default_rng(1)
    X = rng.standard_normal((12, 16 * 9))
    peer = np.array([one_filter_als(x.reshape(16, 3, 3), 3, rng) for x in X])
    ours = cp_filters(X, (16, 3, 3), 3, tol=1e-8, max_iter=1000).rel_error
    assert ours.mean() <= peer.mean()


def test_one_spatial_axis_is_the_truncated_svd():
    X = np.random.default_rng(2).standard_normal((5, 12 * 5))
    cp = cp_filters(X, (12, 5), 2, tol=1e-12, max_iter=500)
    np.testing.assert_allclose(cp.rel_error, cp.svd_bound, rtol=1e-5)


def test_all_pixels_are_exact_and_filters_do_not_see_each_other():
    X = np.random.default_rng(3).standard_normal((7, 4 * 9))
    X[2] = 0
    full = cp_filters(X, (4, 3, 3), 20)
    np.testing.assert_allclose(cp_matrix(full.pointwise, full.spatial), X, atol=1e-10)
    together, alone = cp_filters(X, (4, 3, 3), 2), cp_filters(X[3:4], (4, 3, 3), 2)
    np.testing.assert_allclose(together.rel_error[3], alone.rel_error[0], rtol=1e-5)
    assert together.rel_error[2] == together.svd_bound[2] == 0


def output_errors(X, A, spatial, G):
    E = X - cp_matrix(A, spatial)
    return np.einsum("nd,nd->n", E @ G, E)


def gram_of(rng, d):
    Z = rng.standard_normal((3 * d, d)) @ (np.eye(d) + 0.3 * rng.standard_normal((d, d)))
    return Z.T @ Z / len(Z)


def test_refit_lowers_the_output_error_and_ends_where_no_factor_can_be_better():
    rng = np.random.default_rng(4)
    X, G = rng.standard_normal((6, 5 * 9)), gram_of(rng, 45)
    cp = cp_filters(X, (5, 3, 3), 2)
    fits = [refit_cp(X, cp.pointwise, cp.spatial, G[None], n_rounds=r, damping=0.0) for r in (0, 1, 3, 60)]
    errors = [output_errors(X, cp.pointwise, cp.spatial, G)] + [f.errors for f in fits]
    for worse, better in zip(errors, errors[1:]):
        assert (better <= worse * (1 + 1e-9)).all()
    assert refit_cp(X, cp.pointwise, cp.spatial, G[None], damping=0.0).errors.sum() < errors[3].sum()
    # the pointwise factor against plain least squares in the metric, from a root of G
    R = np.linalg.cholesky(G)
    K = _khatri_rao_rows(cp.spatial)
    for n in range(len(X)):
        design = np.kron(np.eye(5), K[n]).T @ R
        best = np.linalg.lstsq(design.T, R.T @ X[n], rcond=None)[0]
        np.testing.assert_allclose(fits[0].pointwise[n].ravel(), best, rtol=1e-5, atol=1e-7)
    # stationary in every factor: small changes of any entry do not help
    A, spatial = fits[-1].pointwise, fits[-1].spatial
    for F in (A, *spatial):
        for _ in range(5):
            step = 1e-4 * rng.standard_normal(F.shape)
            moved = [f + step if f is F else f for f in (A, *spatial)]
            assert (output_errors(X, moved[0], moved[1:], G) >= fits[-1].errors * (1 - 1e-5)).all()


def test_refit_with_a_gram_per_group_and_by_conjugate_gradients():
    rng = np.random.default_rng(5)
    X, grams = rng.standard_normal((8, 6 * 4)), np.stack([gram_of(rng, 24) for _ in range(2)])
    cp = cp_filters(X, (6, 2, 2), 2)
    both = refit_cp(X, cp.pointwise, cp.spatial, grams, n_rounds=2)
    for g, rows in enumerate((slice(0, 4), slice(4, 8))):
        one = refit_cp(X[rows], cp.pointwise[rows], [F[rows] for F in cp.spatial], grams[g : g + 1], n_rounds=2)
        np.testing.assert_allclose(both.pointwise[rows], one.pointwise, rtol=1e-9)
    direct = refit_cp(X, cp.pointwise, cp.spatial, grams[:1], n_rounds=0, damping=0.0)
    K = _khatri_rao_rows(cp.spatial)
    rhs = np.matmul((X @ grams[0]).reshape(8, 6, 4), K)
    np.testing.assert_allclose(_conjugate_gradients(cp.pointwise, K, rhs, grams[0]), direct.pointwise, rtol=1e-4,
                               atol=1e-6)


def test_plain_metric_changes_nothing_at_the_optimum():
    X = np.random.default_rng(6).standard_normal((4, 5 * 9))
    cp = cp_filters(X, (5, 3, 3), 3, tol=1e-12, max_iter=3000, dtype=np.float64)
    fit = refit_cp(X, cp.pointwise, cp.spatial, np.eye(45)[None], n_rounds=1, damping=0.0)
    np.testing.assert_allclose(np.sqrt(fit.errors) / np.linalg.norm(X, axis=1), cp.rel_error, rtol=1e-4)


def test_lowest_rank_approximation_of_the_unfolding_bounds_it_too():
    X = np.random.default_rng(7).standard_normal((1, 6 * 9))
    low = low_rank_basis(X.reshape(6, 9), 2)
    left = 1 - (low.singular_values**2).sum() / low.total
    np.testing.assert_allclose(cp_filters(X, (6, 3, 3), 2).svd_bound[0], np.sqrt(left), rtol=1e-6)
