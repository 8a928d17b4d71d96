"""Dictionary learning against planted atoms, scikit-learn's objective and the optimality conditions."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.decomposition import DictionaryLearning, sparse_encode

from skfactor.solvers._atoms import draw_rows, unit_rows, update_atoms
from skfactor.solvers._coordinate import sweep_in_place
from skfactor.solvers._sweep import sweep_codes
from skfactor.solvers.dictionary import (
    Coding,
    DictionaryOptions,
    canonical_rows,
    learn_dictionary,
    online_step,
    start_online,
    stationarity,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def planted(n=400, d=12, K=8, n_nonzero=2, noise=0.0, seed=0):
    """Rows that are combinations of a few of K unit atoms."""
    r = rng(seed)
    V = unit_rows(r.normal(size=(K, d)))
    U = np.zeros((n, K))
    for row in U:
        row[r.permutation(K)[:n_nonzero]] = r.choice([-1, 1], n_nonzero) * (1 + r.random(n_nonzero))
    return U @ V + noise * r.normal(size=(n, d)), V


def objective(X, V, alpha, weights=None, positive=False):
    """With scikit-learn's codes: a second source for those of the solver."""
    codes = sparse_encode(X, V, algorithm="lasso_cd", alpha=alpha, max_iter=5000, positive=positive)
    costs = 0.5 * np.square(X - codes @ V).sum(axis=1) + alpha * np.abs(codes).sum(axis=1)
    return float(costs.sum() if weights is None else costs @ weights)


def assert_never_rises(trace):
    assert (np.diff(trace) <= 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_finds_planted_atoms(dtype):
    X, V = planted()
    best = max((learn_dictionary(X.astype(dtype), 8, 0.01, rng=rng(s)) for s in range(3)),
               key=lambda r: -r.objective_trace[-1])
    assert best.components.dtype == dtype
    match = np.abs(best.components @ V.T)
    assert (match.max(axis=0) > 0.999).all()
    assert_never_rises(best.objective_trace)


@pytest.mark.parametrize("options", [
    DictionaryOptions(),
    DictionaryOptions(positive_code=True),
    DictionaryOptions(positive_dict=True),
    DictionaryOptions(root=True),
    DictionaryOptions(n_nonzero=3),
    DictionaryOptions(tol=1e-9),
    DictionaryOptions(n_init=3),
], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_objective_never_rises_and_atoms_are_unit(options, weighted):
    X = load_digits().data[:300] / 5
    weights = rng(1).random(300) if weighted else None
    alpha = 0.0 if options.n_nonzero else 0.01 if options.root else 1.0
    result = learn_dictionary(X, 20, alpha, rng=rng(), sample_weight=weights, options=options)
    assert_never_rises(result.objective_trace)
    assert len(result.objective_trace) == result.n_iter
    np.testing.assert_allclose(np.linalg.norm(result.components, axis=1), 1, rtol=1e-6)
    assert not options.positive_dict or result.components.min() >= 0


def test_last_objective_is_that_of_the_atoms():
    X, _ = planted(noise=0.2)
    weights = rng(1).random(len(X)) + 0.1
    result = learn_dictionary(X, 8, 0.3, rng=rng(), sample_weight=weights, options=DictionaryOptions(tol=1e-10))
    np.testing.assert_allclose(result.objective_trace[-1], objective(X, result.components, 0.3, weights), rtol=1e-5)


@pytest.mark.parametrize("positive", [False, True])
def test_at_the_end_atoms_are_stationary(positive):
    X, _ = planted(noise=0.1, d=6, K=6)
    X = np.abs(X) if positive else X
    options = DictionaryOptions(tol=0.0, max_iter=5000, positive_dict=positive)
    V = learn_dictionary(X, 6, 0.5, rng=rng(), options=options).components
    codes = sparse_encode(X, V, algorithm="lasso_cd", alpha=0.5, max_iter=10000)
    A, B = codes.T @ codes, codes.T @ X
    assert stationarity(V, A, B, positive=positive) < 1e-3
    # the certificate is the derivative along the sphere: moving any atom a little does not help to first order
    value = 0.5 * np.square(X - codes @ V).sum()
    for k in range(len(V)):
        for step in 1e-4 * rng(k).normal(size=(5, V.shape[1])):
            moved = V.copy()
            moved[k] = np.maximum(V[k] + step, 0) if positive else V[k] + step
            moved[k] /= np.linalg.norm(moved[k])
            assert 0.5 * np.square(X - codes @ moved).sum() - value > -1e-3 * 1e-4 * np.linalg.norm(B) * 10


def test_stationarity_sees_what_moves():
    X, V = planted()
    codes = X @ np.linalg.pinv(V)
    A, B = codes.T @ codes, codes.T @ X
    assert stationarity(V, A, B) < 1e-12
    assert stationarity(unit_rows(V + 0.1 * rng(3).normal(size=V.shape)), A, B) > 1e-2


def test_not_above_scikit_learn():
    X = load_digits().data[:500]
    X = (X - X.mean(axis=0)) / X.std()
    sklearn = DictionaryLearning(24, alpha=1.0, fit_algorithm="cd", max_iter=30, random_state=0).fit(X).components_
    ours = learn_dictionary(X, 24, 1.0, rng=rng(), options=DictionaryOptions(n_init=3)).components
    assert objective(X, ours, 1.0) <= objective(X, unit_rows(sklearn), 1.0) * 1.002


def test_more_columns_than_rows_is_exact():
    """The triangular factor changes coordinates and nothing else: iterates are those of the rotated problem."""
    X, _ = planted(n=30, d=20, K=5, noise=0.3)
    Q = np.linalg.qr(rng(5).normal(size=(80, 20)))[0]
    options = DictionaryOptions(max_iter=30, tol=0.0)
    start = draw_rows(X, 5, rng(2))
    low = learn_dictionary(X, 5, 0.4, rng=rng(), init=start, options=options)
    high = learn_dictionary(X @ Q.T, 5, 0.4, rng=rng(), init=start @ Q.T, options=options)
    np.testing.assert_allclose(high.objective_trace, low.objective_trace, rtol=1e-6)
    np.testing.assert_allclose(high.components @ Q, low.components, atol=1e-5)


def test_root_has_the_stationary_points_of_the_squared_objective():
    X, _ = planted(noise=0.3)
    root = learn_dictionary(X, 8, 0.02, rng=rng(), options=DictionaryOptions(root=True, tol=1e-9))
    assert_never_rises(root.objective_trace)
    again = learn_dictionary(X, 8, root.alpha, rng=rng(), init=root.components, options=DictionaryOptions(tol=1e-9))
    np.testing.assert_allclose(np.abs((again.components * root.components).sum(axis=1)), 1, atol=1e-3)
    codes = sparse_encode(X, root.components, algorithm="lasso_cd", alpha=root.alpha, max_iter=5000)
    norm = np.linalg.norm(X - codes @ root.components)
    assert root.alpha == pytest.approx(0.02 * norm, rel=1e-3)
    assert root.objective_trace[-1] == pytest.approx(norm + 0.02 * np.abs(codes).sum(), rel=1e-5)


def test_dead_atoms_are_replaced_at_any_scale():
    X, V = planted()
    for scale in (2.0**-30, 1.0, 2.0**30):
        start = np.concatenate([V[:4], np.repeat(V[:1], 4, axis=0)])  # four of the atoms are copies of one
        options = DictionaryOptions(tol=1e-8)
        result = learn_dictionary(X * scale, 8, 0.05 * scale, rng=rng(), init=start, options=options)
        codes = sparse_encode(X, result.components, algorithm="lasso_cd", alpha=0.05, max_iter=5000)
        assert (np.abs(codes).sum(axis=0) > 1).all()
        assert_never_rises(result.objective_trace)


@pytest.mark.parametrize("positive", [False, True])
def test_sweep_is_that_of_the_plain_code(positive):
    X, V = planted(n=1000)
    start = rng(4).normal(size=(8, 1000))
    start = np.maximum(start, 0) if positive else start
    plain, fast = start.copy(), start.copy()
    sweep_in_place(plain, V @ X.T, V @ V.T, 0.3, 2, positive)
    sweep_codes(fast, V @ X.T, V @ V.T, 0.3, 2, positive=positive)
    np.testing.assert_allclose(fast, plain, atol=1e-12)


def test_one_pass_over_the_atoms_is_exact_minimisation():
    X, V = planted(d=5, K=3)
    codes = rng(6).normal(size=(len(X), 3))
    A, B = codes.T @ codes, codes.T @ X
    new = V.copy()
    update_atoms(new, A, B)

    def value(V):
        return 0.5 * np.square(X - codes @ V).sum()

    assert value(new) < value(V)
    last = new.copy()  # the last atom was minimised with the others in place
    for _ in range(200):
        last[2] = unit_rows(rng(_).normal(size=(1, 5)))[0]
        assert value(last) >= value(new)


class TestOnline:
    def test_learns_planted_atoms_in_one_pass(self):
        X, V = planted(n=20_000, noise=0.01)
        options = DictionaryOptions(batch_size=256, max_iter=1)
        result = learn_dictionary(X.astype(np.float32), 8, 0.05, rng=rng(), options=options)
        assert objective(X[:2000], result.components.astype(float), 0.05) <= 1.1 * objective(X[:2000], V, 0.05)
        assert_never_rises(result.objective_trace)

    def test_about_as_good_as_all_rows_at_once(self):
        X, _ = planted(n=6000, noise=0.2, K=10)
        batches = learn_dictionary(X, 10, 0.5, rng=rng(1), options=DictionaryOptions(batch_size=256)).components
        whole = learn_dictionary(X, 10, 0.5, rng=rng(1)).components
        assert objective(X, batches, 0.5) <= 1.01 * objective(X, whole, 0.5)

    def test_trace_is_the_objective_of_a_sample(self):
        X, _ = planted(n=3000, noise=0.2)  # fewer rows than the sample: all
        result = learn_dictionary(X, 8, 0.3, rng=rng(), options=DictionaryOptions(batch_size=500))
        assert result.objective_trace[-1] == pytest.approx(objective(X, result.components, 0.3), rel=1e-3)

    def test_a_step_keeps_statistics(self):
        X, V = planted(n=50)
        state = online_step(start_online(V), X, Coding(0.1), rng=rng())
        codes = sparse_encode(X, V, algorithm="lasso_cd", alpha=0.1, max_iter=10000)
        np.testing.assert_allclose(state.A, codes.T @ codes, atol=0.05 * np.abs(state.A).max())
        np.testing.assert_allclose(state.B, codes.T @ X, atol=0.05 * np.abs(state.B).max())
        assert state.n_steps == 1

    def test_weights_are_counts(self):
        X, V = planted(n=40)
        counts = rng(2).integers(0, 4, 40)
        once = online_step(start_online(V), X, Coding(0.1), rng=rng(), weights=counts.astype(float))
        often = online_step(start_online(V), np.repeat(X, counts, axis=0), Coding(0.1), rng=rng())
        np.testing.assert_allclose(once.V, often.V, atol=1e-8)


class TestCanonicalRows:
    def test_counts_and_order_do_not_matter(self):
        X = rng().normal(size=(30, 4)).astype(np.float32)
        counts = rng(1).integers(0, 4, 30)
        repeated = np.repeat(X, counts, axis=0)
        shuffled = rng(2).permutation(len(repeated))
        results = [canonical_rows(X, counts.astype(float)), canonical_rows(repeated),
                   canonical_rows(repeated[shuffled]), canonical_rows(repeated.astype(np.float64)),
                   canonical_rows(repeated * np.float32(2.0**-40))]
        expected = results[0][0].astype(np.float64) / np.abs(results[0][0]).max()
        for rows, weights in results:
            rows = rows.astype(np.float64)
            np.testing.assert_array_equal(rows / np.abs(rows).max(), expected)
            np.testing.assert_array_equal(weights, results[0][1])
        assert results[0][1].sum() == counts.sum()

    def test_the_two_zeros_are_one(self):
        rows, weights = canonical_rows(np.array([[0.0, 1.0], [-0.0, 1.0]]))
        assert len(rows) == 1
        assert weights[0] == 2


def test_callback_sees_every_iteration_and_stops():
    X, _ = planted(noise=0.1)
    seen = []

    def callback(V):
        seen.append(V())
        return len(seen) == 5

    result = learn_dictionary(X, 8, 0.1, rng=rng(), callback=callback)
    assert result.n_iter == len(seen) == 5
    np.testing.assert_allclose(seen[-1], result.components, atol=1e-7)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"n_components": 0}, "n_components must be at least 1, got 0"),
    ({"alpha": -1.0}, "alpha must be a number of at least 0, got -1"),
    ({"alpha": np.nan}, "alpha must be a number"),
    ({"init": np.ones((3, 3))}, r"init must have shape \(2, 4\), got \(3, 3\)"),
    ({"sample_weight": np.zeros(5)}, "sample_weight must be 5 finite numbers"),
    ({"X": np.zeros((0, 4))}, "X must be a non-empty matrix"),
])
def test_bad_arguments(arguments, message):
    given = {"X": np.ones((5, 4)), "n_components": 2, "alpha": 0.1} | arguments
    with pytest.raises(ValueError, match=message):
        learn_dictionary(given.pop("X"), given.pop("n_components"), given.pop("alpha"), rng=rng(), **given)
