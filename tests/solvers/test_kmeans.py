# SPDX-License-Identifier: BSD-3-Clause
"""K-means of rows against planted clusters, brute force, exact invariants and scikit-learn."""

from itertools import product

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans

from skfactor.solvers import kmeans as module
from skfactor.solvers.kmeans import KMeansResult, assign, kmeans


def blobs(n, d, k, seed, spread=0.05):
    """Rows around k planted centres that are far apart, and their labels."""
    rng = np.random.default_rng(seed)
    planted = rng.permutation(4 * k)[:k, None] + rng.uniform(-0.1, 0.1, (k, d))
    labels = rng.integers(0, k, n)
    labels[:k] = np.arange(k)
    return planted[labels] + spread * rng.normal(size=(n, d)), labels


def weight_like(n, d, seed):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(d, d)) / np.sqrt(d)
    return rng.normal(size=(n, d)) @ mixing * np.exp(0.5 * rng.normal(size=(n, 1)))


def same_partition(a, b):
    pairs = np.unique(np.stack([a, b]), axis=1)
    return pairs.shape[1] == len(np.unique(a)) == len(np.unique(b))


def fit(X, k, seed=0, **kwargs):
    return kmeans(X, k, rng=np.random.default_rng(seed), **kwargs)


def brute_force(X, w, k):
    best = np.inf
    for labels in product(range(k), repeat=len(X)):
        labels = np.array(labels)
        cost = 0.0
        for c in range(k):
            part = labels == c
            if w[part].sum() > 0:
                cost += (w[part, None] * (X[part] - np.average(X[part], axis=0, weights=w[part])) ** 2).sum()
        best = min(best, cost)
    return best


@pytest.mark.parametrize(("n", "d", "k"), [(60, 2, 3), (500, 9, 20), (3000, 4, 150), (20000, 3, 7), (40, 200, 5)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_planted_clusters_are_recovered(n, d, k, dtype):
    """Several starts where there are many clusters; (40, 200) takes the path for more columns than rows."""
    X, planted = blobs(n, d, k, 0)
    X = X.astype(dtype)
    result = fit(X, k, n_init=10)
    assert isinstance(result, KMeansResult)
    assert result.converged
    assert same_partition(result.labels, planted)
    means = np.stack([X[result.labels == c].mean(axis=0, dtype=np.float64) for c in range(k)])
    np.testing.assert_allclose(result.centers, means, rtol=1e3 * np.finfo(dtype).eps)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_tiny_data_reach_the_brute_force_optimum(k, weighted):
    rng = np.random.default_rng(k)
    for _ in range(5):
        X = rng.normal(size=(7, 2))
        w = rng.integers(1, 5, 7).astype(float) if weighted else np.ones(7)
        found = kmeans(X, k, rng=rng, sample_weight=w if weighted else None, n_init=25, tol=0)
        np.testing.assert_allclose(found.inertia, brute_force(X, w, k), rtol=1e-12)


@pytest.mark.parametrize(
    ("n", "d", "k", "n_seeds"), [(1000, 9, 16, 8), (3000, 8, 140, 2), (4000, 4, 150, 2), (200, 500, 12, 30)]
)
def test_mean_inertia_is_at_most_a_percent_above_scikit_learn(n, d, k, n_seeds):
    X = weight_like(n, d, 1)
    reference = np.mean([KMeans(k, n_init=1, random_state=seed).fit(X).inertia_ for seed in range(n_seeds)])
    assert np.mean([fit(X, k, seed, tol=1e-5).inertia for seed in range(n_seeds)]) <= 1.01 * reference


def test_default_tolerance_costs_at_most_two_percent():
    X = weight_like(20000, 9, 2).astype(np.float32)
    assert fit(X, 32).inertia <= 1.02 * KMeans(32, n_init=1, random_state=0).fit(X).inertia_


@pytest.mark.parametrize("k", [5, 200])
@pytest.mark.parametrize("weighted", [False, True])
def test_inertia_labels_and_centres_agree(k, weighted):
    X = weight_like(3000, 6, 3)
    w = np.random.default_rng(4).gamma(1.0, size=3000) if weighted else None
    result = fit(X, k, sample_weight=w)
    squared = cdist(X, result.centers, "sqeuclidean")
    np.testing.assert_array_equal(result.labels, squared.argmin(axis=1))
    np.testing.assert_allclose(result.inertia, ((1 if w is None else w) * squared.min(axis=1)).sum(), rtol=1e-12)


@pytest.mark.parametrize("k", [10, 160])
def test_no_kept_step_raises_the_inertia(k):
    """The trace of one start, extended by one iteration at a time, never rises and ends at a fixed point."""
    X = weight_like(1500, 5, 5)
    space = module._space(X)
    points = module._points(space.rows, None)
    centers = space.rows[:k, :-1].copy()
    labels = module._assign(points.rows, module._augment(centers, X.dtype), None)
    first = module._group(points, labels, k)
    states = [module._lloyd(points, first, centers, (t, 0.0), None)[0] for t in range(1, 40)]
    trace = [state.inertia for state in states]
    means = states[-1].sums / states[-1].masses[:, None]
    exact = ((points.rows[:, :-1] - means[states[-1].labels]) ** 2).sum()
    np.testing.assert_allclose(trace[-1], exact, rtol=1e-12)
    assert (np.diff(trace) <= 1e-12 * trace[0]).all()
    assert trace[-1] < 0.95 * trace[0]


def test_convergence_without_tolerance_is_a_fixed_point():
    X = weight_like(1500, 4, 6)
    result = fit(X, 12, tol=0, max_iter=1000)
    assert result.converged
    means = np.stack([X[result.labels == c].mean(axis=0) for c in range(12)])
    np.testing.assert_allclose(result.centers, means, rtol=1e-10, atol=1e-12)
    assert not fit(X, 12, tol=0, max_iter=1).converged


def test_block_and_thread_numbers_do_not_change_the_result(monkeypatch):
    X = weight_like(20000, 7, 7)
    reference = fit(X, 150, n_threads=1)
    monkeypatch.setattr(module, "_WORK_PER_THREAD", 1)
    for n_threads, scores in ((3, module._SCORES), (1, 4000), (2, 9000)):
        monkeypatch.setattr(module, "_SCORES", scores)
        other = fit(X, 150, n_threads=n_threads)
        np.testing.assert_allclose(other.centers, reference.centers, rtol=1e-9, atol=1e-11)
        np.testing.assert_array_equal(other.labels, reference.labels)
        np.testing.assert_array_equal(assign(X, other.centers, n_threads=n_threads), other.labels)


def test_equal_generators_give_equal_results():
    X = weight_like(20000, 5, 8)
    first, second, other = fit(X, 30, 1), fit(X, 30, 1), fit(X, 30, 2)
    np.testing.assert_array_equal(first.centers, second.centers)
    assert not np.array_equal(first.centers, other.centers)


def test_integer_weights_are_repeated_rows():
    X, _ = blobs(300, 3, 6, 9, spread=0.2)
    w = np.random.default_rng(9).integers(0, 4, 300)
    weighted = fit(X, 6, sample_weight=w, n_init=10, tol=0)
    repeated = fit(np.repeat(X, w, axis=0), 6, n_init=10, tol=0)
    np.testing.assert_allclose(weighted.inertia, repeated.inertia, rtol=1e-12)
    assert same_partition(np.repeat(weighted.labels, w), repeated.labels)


def test_rows_of_weight_zero_are_labelled_but_do_not_count():
    X, planted = blobs(200, 2, 4, 10)
    far = np.vstack([X, X[:5] + 0.01, [[1e3, 1e3]]])
    w = np.concatenate([np.ones(200), np.zeros(6)])
    result = fit(far, 4, sample_weight=w, n_init=5)
    assert same_partition(result.labels[:200], planted)
    np.testing.assert_array_equal(result.labels[200:205], result.labels[:5])
    np.testing.assert_array_equal(result.labels, cdist(far, result.centers).argmin(axis=1))


def test_float32_and_float64_agree():
    X = weight_like(4000, 6, 11).astype(np.float32)
    single, double = fit(X, 20, tol=1e-6), fit(X.astype(np.float64), 20, tol=1e-6)
    assert single.centers.dtype == np.float32
    assert double.centers.dtype == np.float64
    np.testing.assert_allclose(single.inertia, double.inertia, rtol=1e-2)
    exact = cdist(X.astype(np.float64), single.centers.astype(np.float64), "sqeuclidean").min(axis=1).sum()
    np.testing.assert_allclose(single.inertia, exact, rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "exponent"), [(np.float32, -100), (np.float32, 55), (np.float64, -400), (np.float64, 400)]
)
def test_scaling_by_a_power_of_two_changes_nothing(dtype, exponent):
    X = weight_like(500, 4, 12).astype(dtype)
    plain, scaled = fit(X, 8), fit(np.ldexp(X, exponent).astype(dtype), 8)
    np.testing.assert_array_equal(scaled.labels, plain.labels)
    np.testing.assert_allclose(np.ldexp(plain.centers.astype(float), exponent), scaled.centers, rtol=1e-6)
    np.testing.assert_allclose(np.ldexp(plain.inertia, 2 * exponent), scaled.inertia, rtol=1e-6)


def test_an_offset_does_not_cancel_in_single_precision():
    """The expansion of the square loses all digits at this offset unless the rows are centred first."""
    X, planted = blobs(800, 3, 5, 13)
    X = (X + 3e4).astype(np.float32)
    result = fit(X, 5, n_init=5)
    assert same_partition(result.labels, planted)
    np.testing.assert_array_equal(assign(X, result.centers), result.labels)


@pytest.mark.parametrize("d", [3, 50])
def test_fewer_distinct_rows_than_clusters_gives_fewer_centres(d):
    rng = np.random.default_rng(14)
    distinct = rng.integers(-3, 4, (6, d)).astype(float)
    X = distinct[np.concatenate([np.arange(6), rng.integers(0, 6, 34)])]
    result = fit(X, 10)
    assert result.centers.shape == (6, d)
    assert result.inertia == pytest.approx(0, abs=1e-20)
    np.testing.assert_allclose(result.centers[result.labels], X, rtol=1e-12, atol=1e-12)


def test_start_takes_no_row_twice_in_single_precision():
    """The expansion of the square leaves equal rows a small distance, which must not draw a centre."""
    rng = np.random.default_rng(21)
    X = rng.normal(size=(6, 7)).astype(np.float32)[rng.integers(0, 6, 400)]
    points = module._points(module._space(X).rows, None)
    assert len(module._plus_plus(points, 10, rng, 1.0)) == 6


def test_near_centres_include_the_present_one():
    """Labels that are nearest already stay: restricted to 64 of 200 centres, nothing changes at a fixed point."""
    X = weight_like(4000, 5, 22)
    points = module._points(module._space(X).rows, None)
    columns = module._augment(points.rows[:200, :-1], X.dtype)
    labels = module._assign(points.rows, columns, None)
    state = module._group(points, labels, 200)
    np.testing.assert_array_equal(module._assign_near(points, state, columns, None), labels)


def test_separated_clusters_in_many_rows_are_found():
    """The start that hardly prefers distant rows misses clusters here; the other must win."""
    X, _ = blobs(80000, 3, 30, 23)
    optimum = 80000 * 3 * 0.05**2
    assert min(fit(X, 30, seed).inertia for seed in range(2)) <= 1.05 * optimum


def test_long_rows_start_in_a_sketch():
    X, planted = blobs(300, 1500, 6, 24, spread=0.5)
    assert same_partition(fit(X, 6, n_init=3).labels, planted)


def test_close_rows_beside_a_far_one_are_still_separated():
    X = np.concatenate([np.arange(8.0) * 1e-6, [1.0]])[:, None]
    result = fit(X, 9)
    np.testing.assert_allclose(np.sort(result.centers, axis=0), X, rtol=1e-9)
    assert result.inertia < 1e-30


def test_constant_single_row_and_single_column_data():
    constant = fit(np.full((20, 3), 0.1, dtype=np.float32), 4)
    np.testing.assert_allclose(constant.centers, np.full((1, 3), 0.1), rtol=1e-6)
    np.testing.assert_array_equal(constant.labels, np.zeros(20))
    row = fit(np.array([[1.0, 2.0]]), 3)
    np.testing.assert_array_equal(row.centers, [[1.0, 2.0]])
    column = fit(np.arange(10.0)[:, None], 10)
    assert column.inertia == 0


def test_empty_clusters_take_rows_of_the_worst_cluster():
    X, _ = blobs(400, 2, 4, 15)
    space = module._space(X)
    points = module._points(space.rows, None)
    state = module._group(points, np.zeros(400, dtype=np.uint8), 3)
    filled = module._refill(points, state)
    assert (filled.masses > 0).sum() == 2  # one donor gives one row to one empty cluster
    assert filled.inertia < state.inertia
    farthest = ((X - X.mean(axis=0)) ** 2).sum(axis=1).argmax()
    assert np.flatnonzero(filled.labels).tolist() == [farthest]


def test_more_starts_are_never_worse():
    X = weight_like(600, 3, 16)
    inertias = [fit(X, 25, 3, n_init=n).inertia for n in (1, 2, 5, 10)]
    assert (np.diff(inertias) <= 0).all()
    assert inertias[-1] < inertias[0]


@pytest.mark.parametrize(("k", "dtype"), [(256, np.uint8), (257, np.uint16)])
def test_label_type_holds_every_index(k, dtype):
    centers = np.arange(k, dtype=float)[:, None]
    labels = assign(centers[::-1], centers)
    assert labels.dtype == dtype
    np.testing.assert_array_equal(labels, np.arange(k)[::-1])


@pytest.mark.parametrize("k", [3, 64, 700])
def test_assign_equals_the_distance_matrix(k):
    X = weight_like(3000, 6, 17)
    centers = X[:k] + 0.01
    np.testing.assert_array_equal(assign(X, centers), cdist(X, centers).argmin(axis=1))


def test_inputs_and_global_generator_are_untouched():
    X = weight_like(300, 4, 18)
    w = np.ones(300)
    for array in (X, w):
        array.flags.writeable = False
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    centers = fit(X, 5, sample_weight=w).centers
    centers.flags.writeable = False
    assign(X, centers)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.parametrize(
    ("X", "k", "kwargs", "message"),
    [
        (np.ones(3), 1, {}, "matrix"),
        (np.ones((0, 3)), 1, {}, "at least one row"),
        (np.array([[np.nan]]), 1, {}, "finite"),
        (np.ones((2, 2)), 0, {}, "n_clusters must be at least 1, got 0"),
        (np.ones((2, 2)), 1, {"n_init": 0}, "n_init must be at least 1, got 0"),
        (np.ones((2, 2)), 1, {"max_iter": 0}, "max_iter must be at least 1, got 0"),
        (np.ones((2, 2)), 1, {"tol": -1.0}, "tol must be"),
        (np.ones((2, 2)), 1, {"sample_weight": np.ones(3)}, "shape"),
        (np.ones((2, 2)), 1, {"sample_weight": np.zeros(2)}, "not zero everywhere"),
        (np.ones((2, 2)), 1, {"sample_weight": np.array([1.0, -1.0])}, "not negative"),
    ],
)
def test_bad_input_is_refused(X, k, kwargs, message):
    with pytest.raises(ValueError, match=message):
        fit(X, k, **kwargs)


def test_assign_refuses_other_shapes():
    with pytest.raises(ValueError, match="number of columns"):
        assign(np.ones((2, 3)), np.ones((2, 2)))
