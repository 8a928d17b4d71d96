"""Lasso codes against brute force, scikit-learn, scipy and the optimality conditions."""
# SPDX-License-Identifier: BSD-3-Clause

from itertools import product

import numpy as np
import pytest
from _data import needs_data, real_weights
from scipy.optimize import nnls
from scipy.sparse import csr_array
from sklearn.decomposition import sparse_encode

from skfactor.solvers import _active_set
from skfactor.solvers._coordinate import descend
from skfactor.solvers.lasso import (
    alpha_max,
    duality_gap,
    lasso_blocks,
    lasso_codes,
    lasso_codes_sparse,
    lasso_path,
    lasso_sweeps,
)

SHAPES = [(40, 20, 8), (40, 5, 20), (30, 40, 40), (10, 1, 3), (30, 100, 3), (20, 7, 1), (1, 3, 2)]  # n, K, d


def problem(n, K, d, seed=0, dtype=np.float64):
    """Rows, and atoms of very different norms."""
    rng = np.random.default_rng(seed)
    V = rng.normal(size=(K, d)) * rng.lognormal(size=(K, 1))
    return rng.normal(size=(n, d)).astype(dtype), V.astype(dtype)


def coherent(n, K, d, seed=0, dtype=np.float32):
    """Unit atoms, a third of them nearly or exactly repeated, one zero atom, one zero row."""
    rng = np.random.default_rng(seed)
    V = rng.normal(size=(K, d))
    V /= np.linalg.norm(V, axis=1, keepdims=True)
    V[1::3] = V[::3][: len(V[1::3])] + rng.choice([0, 1e-8, 1e-5, 1e-3], (len(V[1::3]), 1)) * rng.normal(size=d)
    V[-1] = 0
    X = rng.normal(size=(n, d)) * rng.lognormal(0, 2, (n, 1))
    X[n // 2] = 0
    return X.astype(dtype), V.astype(dtype)


def objective(X, V, alpha, codes):
    """Of every row, in float64."""
    X, V, codes = (np.asarray(a, dtype=np.float64) for a in (X, V, codes))
    return 0.5 * np.square(X - codes @ V).sum(axis=1) + alpha * np.abs(codes).sum(axis=1)


def half(X):
    return 0.5 * np.square(X, dtype=np.float64).sum(axis=1)


def brute_force(x, V, alpha, positive):
    """Least objective over the least-squares fits to all sets of atoms with all signs that agree with their signs."""
    best = 0.5 * x @ x
    for signs in product((0, 1) if positive else (-1, 0, 1), repeat=len(V)):
        signs = np.array(signs, dtype=float)
        A = np.flatnonzero(signs)
        if 0 < len(A) <= len(x):
            u = np.linalg.solve(V[A] @ V[A].T, V[A] @ x - alpha * signs[A])
            if (u * signs[A] >= 0).all():
                best = min(best, 0.5 * np.square(x - u @ V[A]).sum() + alpha * np.abs(u).sum())
    return best


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(("K", "d"), [(5, 3), (4, 6), (6, 2)])
def test_codes_reach_the_brute_force_optimum(K, d, positive):
    X, V = problem(12, K, d)
    for alpha in (0.05, 0.5, 2.0):
        result = lasso_codes(X, V, alpha, positive=positive, tol=1e-12)
        expected = [brute_force(x, V, alpha, positive) for x in X]
        np.testing.assert_allclose(objective(X, V, alpha, result.codes), expected, rtol=1e-9)
        assert (result.codes >= 0).all() or not positive


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_agree_with_scikit_learn(shape, positive):
    X, V = problem(*shape, seed=1)
    V /= np.linalg.norm(V, axis=1, keepdims=True)
    result = lasso_codes(X, V, 0.3, positive=positive, tol=1e-11)
    theirs = sparse_encode(X, V, algorithm="lasso_cd", alpha=0.3, max_iter=20000, positive=positive)
    np.testing.assert_allclose(objective(X, V, 0.3, result.codes), objective(X, V, 0.3, theirs), rtol=1e-6)


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_satisfy_the_optimality_conditions(shape, positive):
    """Correlations with the residual are alpha on the active atoms and no larger elsewhere."""
    X, V = problem(*shape, seed=2)
    alpha = 0.2
    codes = lasso_codes(X, V, alpha, positive=positive, tol=1e-13).codes
    c = (X - codes @ V) @ V.T
    np.testing.assert_allclose(c[codes != 0], alpha * np.sign(codes[codes != 0]), atol=1e-5)
    assert (c if positive else np.abs(c)).max() <= alpha + 1e-5


@pytest.mark.parametrize(("dtype", "tol"), [
    (np.float32, 1e-4), (np.float32, 1e-7), (np.float64, 1e-4), (np.float64, 1e-9),
])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("K", [30, 200])
def test_gap_bounds_the_distance_from_the_optimum(K, dtype, tol, positive):
    X, V = problem(60, K, 9, seed=3, dtype=dtype)
    result = lasso_codes(X, V, 0.1, positive=positive, tol=tol)
    exact = lasso_codes(X.astype(np.float64), V.astype(np.float64), np.float64(np.float32(0.1)) if dtype == np.float32
                        else 0.1, positive=positive, tol=1e-13).codes
    above = objective(X, V, 0.1, result.codes) - objective(X, V, 0.1, exact)
    assert result.codes.dtype == dtype
    assert result.gap.dtype == np.float64
    assert result.gap.max() <= tol
    assert (above <= result.gap * half(X) + 1e-7 * half(X)).all()


def test_gap_is_that_of_the_definition():
    """Primal minus dual objective at the scaled residual."""
    X, V = problem(20, 12, 5)
    codes = lasso_sweeps(X, V, 0.4, np.zeros((20, 12)), 2)
    residual = X - codes @ V
    theta = residual * np.minimum(1, 0.4 / np.abs(residual @ V.T).max(axis=1))[:, None]
    dual = half(X) - half(X - theta)
    expected = (objective(X, V, 0.4, codes) - dual) / half(X)
    np.testing.assert_allclose(duality_gap(X, V, 0.4, codes), expected, rtol=1e-10, atol=1e-14)


def test_float32_certificate_is_no_smaller_than_the_gap():
    """Rounding of correlations and residuals is part of the reported gap."""
    X, V = problem(3000, 60, 9, seed=5, dtype=np.float32)
    exact, atoms = X.astype(np.float64), V.astype(np.float64)
    part = _active_set.solve(_active_set.dictionary(atoms, np.float32, False), X, np.full(3000, 0.25),
                             1e-6 * half(X), 1000)
    codes = np.zeros((3000, 60))
    codes[part.rows, part.atoms] = part.values
    assert (part.gap >= (duality_gap(exact, atoms, 0.25, codes) - 1e-14) * half(X)).all()
    assert np.median(part.gap / half(X)) <= 1e-4


@pytest.mark.parametrize("positive", [False, True])
def test_active_sets_solve_every_row_in_float64(positive):
    """Sets that span the space exchange atoms; none is left to coordinate descent."""
    X, V = problem(3000, 100, 4, seed=6)
    part = _active_set.solve(_active_set.dictionary(V, np.float64, positive), X, np.full(3000, 1e-3), 1e-8 * half(X),
                             1000)
    assert len(part.failed) == 0
    assert np.bincount(part.rows).max() == 4


@pytest.mark.parametrize("seed", range(100))
def test_near_duplicate_atoms_in_float32(seed):
    """Every row gets its certificate and no code is NaN, however dependent the atoms are."""
    rng = np.random.default_rng(seed)
    K, d = int(rng.integers(1, 60)), int(rng.integers(1, 12))
    X, V = coherent(30, K, d, seed)
    positive, alpha = bool(seed % 2), float(np.float32(10.0 ** -(seed % 4)))
    result = lasso_codes(X, V, alpha, positive=positive)
    exact = lasso_codes(X.astype(np.float64), V.astype(np.float64), alpha, positive=positive, tol=1e-9)
    assert np.isfinite(result.codes).all()
    assert result.gap.max() <= 1e-4
    assert exact.gap.max() <= 1e-9
    above = objective(X, V, alpha, result.codes) - objective(X, V, alpha, exact.codes)
    assert (above <= 1.01e-4 * half(X)).all()
    assert not result.codes[15].any()


def test_planted_codes_are_found():
    rng = np.random.default_rng(0)
    V = np.linalg.qr(rng.normal(size=(30, 30)))[0][:20]
    planted = np.where(rng.random((50, 20)) < 0.2, rng.choice([-1, 1], (50, 20)) * rng.uniform(1, 2, (50, 20)), 0)
    codes = lasso_codes(planted @ V, V, 0.25, tol=1e-14).codes
    np.testing.assert_allclose(codes, planted - 0.25 * np.sign(planted), atol=1e-6)


@pytest.mark.parametrize("positive", [False, True])
def test_alpha_max_is_where_codes_begin(positive):
    X, V = problem(30, 12, 5)
    top = alpha_max(X, V, positive=positive)
    assert top == pytest.approx((X @ V.T).max() if positive else np.abs(X @ V.T).max())
    above = lasso_codes(X, V, top, positive=positive)
    assert not above.codes.any()
    assert above.n_iter == 0
    assert lasso_codes(X, V, 0.99 * top, positive=positive, tol=1e-12).codes.any()


@pytest.mark.parametrize(("K", "d"), [(5, 20), (20, 5), (8, 8)])
def test_alpha_zero_is_least_squares(K, d):
    X, V = problem(25, K, d)
    free, positive = (lasso_codes(X, V, 0, positive=p, tol=1e-7) for p in (False, True))
    np.testing.assert_allclose(half(X - free.codes @ V), half(X - X @ np.linalg.pinv(V) @ V), atol=1e-6)
    np.testing.assert_allclose(half(X - positive.codes @ V), [0.5 * nnls(V.T, x)[1] ** 2 for x in X], atol=1e-6)
    for result in (free, positive):
        assert np.count_nonzero(result.codes, axis=1).max() <= min(K, d)
        assert result.gap.max() <= 1e-7


def test_alpha_of_each_row():
    X, V = problem(20, 15, 6)
    alpha = np.geomspace(1e-3, 10, 20)
    together = lasso_codes(X, V, alpha, tol=1e-12).codes
    for i in range(20):
        np.testing.assert_allclose(together[i], lasso_codes(X[i : i + 1], V, alpha[i], tol=1e-12).codes[0], atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_codes_follow_the_scale_of_the_data(scale):
    X, V = problem(50, 20, 6, dtype=np.float32)
    codes = lasso_codes(X, V, 0.3).codes
    scaled = lasso_codes(X * np.float32(scale), V, 0.3 * scale)
    assert scaled.gap.max() <= 1e-4
    excess = objective(X, V, 0.3, scaled.codes.astype(np.float64) / scale) - objective(X, V, 0.3, codes)
    assert np.abs(excess / half(X)).max() <= 1.1e-4


def test_more_columns_than_atoms_and_dependent_columns():
    """Projected on the span of the atoms, the problem keeps its codes."""
    X, V = problem(30, 10, 200)
    deficient = V[:, :4] @ np.random.default_rng(1).normal(size=(4, 200))
    for atoms in (V, deficient):
        codes = lasso_codes(X, atoms, 0.5, tol=1e-10).codes
        assert duality_gap(X, atoms, 0.5, codes).max() <= 1e-9
        assert codes.any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_start_does_not_change_the_optimum(dtype):
    X, V = problem(200, 30, 9, dtype=dtype)
    cold = lasso_codes(X, V, 0.2)
    rng = np.random.default_rng(0)
    for start in (cold.codes, csr_array(cold.codes), rng.normal(size=cold.codes.shape),
                  lasso_sweeps(X, V, 0.2, np.zeros_like(cold.codes), 1)):
        warm = lasso_codes(X, V, 0.2, codes=start)
        assert warm.gap.max() <= 1e-4
        difference = objective(X, V, 0.2, warm.codes) - objective(X, V, 0.2, cold.codes)
        assert (np.abs(difference) <= 1.01e-4 * half(X)).all()
    assert lasso_codes(X, V, 0.2, codes=cold.codes).n_iter < cold.n_iter / 3


def test_path_is_monotone_and_the_same_as_single_runs():
    X, V = problem(60, 25, 8)
    alphas = np.geomspace(alpha_max(X, V), 1e-3, 12)
    parts = list(lasso_path(X, V, alphas, tol=1e-11))
    sizes = np.array([np.abs(p.codes).sum(axis=1) for p in parts])
    errors = np.array([half(X - p.codes @ V) for p in parts])
    assert not parts[0].codes.any()
    assert (np.diff(sizes, axis=0) >= -1e-5).all()
    assert (np.diff(errors, axis=0) <= 1e-5).all()
    for alpha, part in zip(alphas, parts, strict=True):
        cold = lasso_codes(X, V, alpha, tol=1e-11)
        np.testing.assert_allclose(objective(X, V, alpha, part.codes), objective(X, V, alpha, cold.codes), rtol=1e-9)
    sparse = list(lasso_path(X, V, alphas, tol=1e-11, sparse=True))
    assert all((s.codes.toarray() == p.codes).all() for s, p in zip(sparse, parts, strict=True))


@pytest.mark.parametrize("positive", [False, True])
def test_sweeps_lower_the_objective_down_to_the_optimum(positive):
    X, V = problem(40, 18, 30)
    codes = lasso_sweeps(X, V, 0.3, np.zeros((40, 18)), 1, positive=positive)
    before = objective(X, V, 0.3, codes)
    assert codes.T.flags.c_contiguous
    for _ in range(5):
        kept = codes.copy()
        following = lasso_sweeps(X, V, 0.3, codes, 3, gram=V @ V.T, positive=positive)
        assert (codes == kept).all()
        after = objective(X, V, 0.3, following)
        assert (after <= before + 1e-12).all()
        codes, before = following, after
    codes = lasso_sweeps(X, V, 0.3, codes, 500, positive=positive)
    exact = lasso_codes(X, V, 0.3, tol=1e-12, positive=positive).codes
    np.testing.assert_allclose(objective(X, V, 0.3, codes), objective(X, V, 0.3, exact), rtol=1e-7)


def test_sweeps_leave_atoms_of_norm_zero_out():
    X, V = problem(10, 6, 4)
    V[2] = 0
    codes = lasso_sweeps(X, V, 0.1, np.ones((10, 6)), 3)
    assert np.isfinite(codes).all()
    assert not codes[:, 2].any()


@pytest.mark.parametrize("positive", [False, True])
def test_last_resort_agrees_with_the_active_sets(positive):
    X, V = problem(30, 18, 30)
    alpha = np.full(30, 0.3)
    start = np.full((1, 30), 18), np.zeros((1, 30))
    codes, gap, n_sweeps = descend(V, X, alpha, start, 1e-8 * half(X), 5000, positive)
    exact = lasso_codes(X, V, alpha, positive=positive, tol=1e-12).codes
    assert 0 < n_sweeps < 5000
    assert (gap <= 1e-8 * half(X)).all()
    np.testing.assert_allclose(objective(X, V, 0.3, codes), objective(X, V, 0.3, exact), rtol=1e-7)


def test_rows_that_fail_reach_the_last_resort(monkeypatch):
    """Active sets that all fail leave the certificate to coordinate descent."""
    X, V = problem(30, 8, 20)
    expected = lasso_codes(X, V, 0.3, tol=1e-9).codes
    solve = _active_set.solve

    def failing(dic, rows, alpha, tol, max_iter, warm=None):
        part = solve(dic, rows, alpha, tol, 1, warm)
        return part._replace(failed=np.arange(len(rows)))

    monkeypatch.setattr(_active_set, "solve", failing)
    result = lasso_codes(X, V, 0.3, tol=1e-9)
    assert result.gap.max() <= 1e-9
    np.testing.assert_allclose(objective(X, V, 0.3, result.codes), objective(X, V, 0.3, expected), rtol=1e-7)


def test_sparse_and_blocked_codes_are_the_dense_ones():
    X, V = problem(20000, 12, 4, dtype=np.float32)
    alpha = np.random.default_rng(0).uniform(0.1, 1, len(X)).astype(np.float32)
    dense = lasso_codes(X, V, alpha, n_threads=1)
    sparse = lasso_codes_sparse(X, V, alpha, n_threads=3)
    assert isinstance(sparse.codes, csr_array)
    assert sparse.codes.has_sorted_indices
    assert sparse.codes.dtype == np.float32
    assert (sparse.codes.toarray() == dense.codes).all()
    assert (sparse.gap == dense.gap).all()
    blocks = list(lasso_blocks(X, V, alpha))
    assert len(blocks) > 1
    assert np.concatenate([np.arange(rows.start, rows.stop) for rows, _ in blocks]).tolist() == list(range(len(X)))
    assert (np.vstack([part.codes for _, part in blocks]) == dense.codes).all()


def test_too_few_steps_are_said_by_the_gap():
    X, V = problem(50, 30, 10)
    result = lasso_codes(X, V, 0.01, max_iter=1)
    assert result.gap.max() > 1e-4
    np.testing.assert_allclose(result.gap, duality_gap(X, V, 0.01, result.codes), rtol=1e-6, atol=1e-12)


def test_no_rows():
    V = np.eye(3)
    assert lasso_codes(np.zeros((0, 3)), V, 1.0).codes.shape == (0, 3)
    assert lasso_codes_sparse(np.zeros((0, 3)), V, 1.0).codes.shape == (0, 3)
    assert not lasso_codes(np.zeros((4, 3)), V, 0.0).codes.any()


def test_inputs_are_not_written_to():
    X, V = problem(30, 10, 5)
    start = np.random.default_rng(0).normal(size=(30, 10))
    arrays = [X, V, start]
    for array in arrays:
        array.flags.writeable = False
    lasso_codes(X, V, 0.1, codes=start, positive=True)
    lasso_sweeps(X, V, 0.1, start, 2, positive=True)


@pytest.mark.parametrize(("change", "message"), [
    ({"X": np.ones(3)}, "number of columns"),
    ({"V": np.ones((2, 4))}, "number of columns"),
    ({"X": np.full((2, 3), np.nan)}, "X must be finite"),
    ({"V": np.full((2, 3), np.inf)}, "V must be finite"),
    ({"alpha": -1.0}, "alpha must be finite"),
    ({"alpha": np.nan}, "alpha must be finite"),
    ({"alpha": np.ones(3)}, "shape"),
    ({"codes": np.ones((2, 5))}, "codes must have shape"),
    ({"tol": -1.0}, "tol must be"),
    ({"max_iter": 0}, "max_iter must be"),
])
def test_errors(change, message):
    arguments = {"X": np.ones((2, 3)), "V": np.ones((2, 3)), "alpha": 1.0} | change
    with pytest.raises(ValueError, match=message):
        lasso_codes(arguments.pop("X"), arguments.pop("V"), arguments.pop("alpha"), **arguments)


@needs_data
def test_real_kernels_are_certified():
    """3 x 3 kernels of a trained network with atoms that are kernels too: far more atoms than columns."""
    X = np.concatenate([w.reshape(-1, 9) for w in real_weights("cifar10_resnet56").values() if w.ndim == 4])
    rng = np.random.default_rng(0)
    X = X[rng.choice(len(X), 20000, replace=False)] / X.std()
    V = X[rng.choice(len(X), 128, replace=False, p=half(X) / half(X).sum())]
    V = V / np.linalg.norm(V, axis=1, keepdims=True)
    result = lasso_codes_sparse(X, V, 0.5)
    assert result.gap.max() <= 1e-4
    assert duality_gap(X, V, 0.5, result.codes.toarray()).max() <= 1.05e-4


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_real_kernels_in_100_draws(seed):
    """Float32, more than a quarter of the atoms drawn twice and shaken by 0.001 %: certified, no NaN."""
    X = np.concatenate([w.reshape(-1, 9) for w in real_weights("cifar10_resnet56").values() if w.ndim == 4])
    rng = np.random.default_rng(seed)
    X = X[rng.integers(0, len(X), 8192)] / X.std()
    X = (X + 0.05 * rng.normal(size=X.shape)).astype(np.float32)
    V = X[rng.choice(len(X), 180, p=half(X) / half(X).sum())]
    V = np.vstack([V, V[:76] + 1e-5 * rng.normal(size=(76, 9)).astype(np.float32)])
    V = V / np.linalg.norm(V, axis=1, keepdims=True)
    result = lasso_codes_sparse(X, V, 0.5, positive=seed % 4 == 3)
    assert np.isfinite(result.codes.data).all()
    assert result.gap.max() <= 1e-4
