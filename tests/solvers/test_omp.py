"""Order-recursive matching pursuit against a naive one, planted codes and scikit-learn."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.decomposition import sparse_encode

from skfactor.solvers.omp import omp_codes


def problem(n, K, d, seed=0, dtype=np.float64):
    """Rows of very different size, and atoms of different norms."""
    rng = np.random.default_rng(seed)
    V = rng.normal(size=(K, d)) * rng.lognormal(size=(K, 1))
    return (rng.normal(size=(n, d)) * rng.lognormal(0, 2, (n, 1))).astype(dtype), V.astype(dtype)


def naive(x, V, n_nonzero):
    """Try every further atom with all codes fitted again; keep the best."""
    chosen = []
    for _ in range(n_nonzero):
        errors = [np.inf if j in chosen else
                  np.square(x - np.linalg.lstsq(V[[*chosen, j]].T, x, rcond=None)[0] @ V[[*chosen, j]]).sum()
                  for j in range(len(V))]
        chosen.append(int(np.argmin(errors)))
    u = np.zeros(len(V))
    u[chosen] = np.linalg.lstsq(V[chosen].T, x, rcond=None)[0]
    return u


@pytest.mark.parametrize(("K", "d", "n_nonzero"), [(20, 8, 3), (6, 12, 4), (15, 5, 4), (1, 4, 1), (9, 2, 1)])
def test_codes_are_those_of_the_naive_search(K, d, n_nonzero):
    X, V = problem(25, K, d)
    codes = omp_codes(X, V, n_nonzero)
    assert isinstance(codes, csr_array)
    assert codes.has_sorted_indices
    np.testing.assert_allclose(codes.toarray(), [naive(x, V, n_nonzero) for x in X], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_codes_are_fitted_and_the_error_falls_with_their_number(dtype):
    X, V = problem(200, 40, 16, dtype=dtype)
    last = np.square(X, dtype=np.float64).sum(axis=1)
    for n_nonzero in range(1, 10):
        codes = omp_codes(X, V, n_nonzero)
        assert codes.dtype == dtype
        assert (np.diff(codes.indptr) == n_nonzero).all()
        residual = X.astype(np.float64) - codes.toarray().astype(np.float64) @ V
        c = residual @ V.T / (np.linalg.norm(X, axis=1)[:, None] * np.linalg.norm(V, axis=1))
        assert np.abs(c[codes.toarray() != 0]).max() <= 1e4 * np.finfo(dtype).eps
        error = np.square(residual).sum(axis=1)
        assert (error <= last * (1 + 1e-5)).all()
        last = error


def test_error_is_below_that_of_scikit_learn():
    """Plain matching pursuit chooses by the correlation alone; with one atom the two are the same."""
    X, V = problem(300, 60, 8, dtype=np.float64)
    V /= np.linalg.norm(V, axis=1, keepdims=True)
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    for n_nonzero in (1, 3):
        theirs = sparse_encode(X, V, algorithm="omp", n_nonzero_coefs=n_nonzero)
        ours = omp_codes(X, V, n_nonzero).toarray()
        if n_nonzero == 1:
            np.testing.assert_allclose(ours, theirs, atol=1e-12)
        else:
            assert np.square(X - ours @ V).sum() < 0.95 * np.square(X - theirs @ V).sum()


def test_planted_codes_are_found_and_no_more():
    rng = np.random.default_rng(0)
    V = np.linalg.qr(rng.normal(size=(24, 24)))[0]
    planted = np.zeros((40, 24))
    for row in planted:
        row[rng.choice(24, 4, replace=False)] = rng.choice([-1, 1], 4) * rng.uniform(1, 2, 4)
    codes = omp_codes(planted @ V, V, 10)
    assert (np.diff(codes.indptr) == 4).all()
    np.testing.assert_allclose(codes.toarray(), planted, atol=1e-12)


def test_tolerance_ends_a_row_at_the_first_error_below_it():
    X, V = problem(50, 30, 10)
    norms = np.linalg.norm(X, axis=1)
    codes = omp_codes(X, V, 10, tol=0.3)
    counts = np.diff(codes.indptr)
    assert len(set(counts.tolist())) > 1
    assert (np.linalg.norm(X - codes @ V, axis=1) <= 0.3 * norms).all()
    for n_nonzero in set(counts.tolist()):
        fewer = omp_codes(X, V, n_nonzero - 1)
        assert (np.linalg.norm(X - fewer @ V, axis=1) > 0.3 * norms)[counts == n_nonzero].all()


def test_number_of_non_zeros_is_clipped():
    X, V = problem(10, 4, 6)
    np.testing.assert_allclose(omp_codes(X, V, 99).toarray(), X @ np.linalg.pinv(V), atol=1e-8)
    assert omp_codes(X, V, 0).nnz == 0
    X, V = problem(10, 9, 3)
    np.testing.assert_allclose(omp_codes(X, V, 99) @ V, X, atol=1e-8)


@pytest.mark.parametrize("n_nonzero", [1, 3, 6])
def test_positive_codes(n_nonzero):
    """Never negative, and optimal for the atoms that are left."""
    X, V = problem(200, 30, 6, seed=4)
    codes = omp_codes(X, V, n_nonzero, positive=True).toarray()
    assert (codes >= 0).all()
    residual = X - codes @ V
    scale = np.linalg.norm(X, axis=1)[:, None] * np.linalg.norm(V, axis=1)
    assert np.abs((residual @ V.T / scale)[codes > 0]).max() <= 1e-9
    assert (np.square(residual).sum(axis=1) < np.square(X).sum(axis=1)).mean() > 0.9


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("positive", [False, True])
def test_repeated_and_zero_atoms_and_rows(dtype, positive):
    X, V = problem(60, 10, 5, dtype=dtype)
    V = np.vstack([V, V, V * (1 + 1e-7), np.zeros((2, 5))]).astype(dtype)
    X[7] = 0
    codes = omp_codes(X, V, 5, positive=positive).toarray()
    assert np.isfinite(codes).all()
    assert not codes[7].any()
    assert not codes[:, -2:].any()
    if not positive:
        np.testing.assert_allclose(codes.astype(np.float64) @ V, X, rtol=1e-3, atol=1e-3 * np.abs(X).max())
    assert omp_codes(X, np.zeros((3, 5)), 2).nnz == 0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_codes_follow_the_scale(scale):
    X, V = problem(40, 12, 6, dtype=np.float32)
    X /= np.abs(X).max(axis=1, keepdims=True)
    codes = omp_codes(X, V, 3).toarray()
    np.testing.assert_allclose(omp_codes(X * np.float32(scale), V, 3).toarray() / scale, codes, rtol=1e-3, atol=1e-6)


def test_blocks_and_threads_do_not_change_the_codes():
    X, V = problem(12000, 50, 4, dtype=np.float32)
    whole = omp_codes(X, V, 2, n_threads=1)
    assert (whole != omp_codes(X, V, 2, n_threads=3)).nnz == 0
    part = omp_codes(X[7000:7100], V, 2)
    np.testing.assert_allclose(part.toarray(), whole[7000:7100].toarray(), rtol=1e-4, atol=1e-6)


def test_inputs_are_not_written_to_and_no_rows_are_allowed():
    X, V = problem(30, 10, 5)
    X.flags.writeable = V.flags.writeable = False
    omp_codes(X, V, 3, positive=True)
    assert omp_codes(X[:0], V, 3).shape == (0, 10)


@pytest.mark.parametrize(("arguments", "message"), [
    ((np.ones(3), np.ones((2, 3)), 1), "number of columns"),
    ((np.ones((2, 3)), np.ones((2, 4)), 1), "number of columns"),
    ((np.full((2, 3), np.nan), np.ones((2, 3)), 1), "X must be finite"),
    ((np.ones((2, 3)), np.full((2, 3), np.inf), 1), "V must be finite"),
    ((np.ones((2, 3)), np.ones((2, 3)), -1), "n_nonzero must be"),
])
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        omp_codes(*arguments)
    with pytest.raises(ValueError, match="tol must be"):
        omp_codes(np.ones((2, 3)), np.ones((2, 3)), 1, tol=-1.0)
