# SPDX-License-Identifier: BSD-3-Clause
"""Per-row scalar k-means against brute force, an independent dynamic programme, and planted answers."""

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from skfactor.solvers.kmeans1d_rows import EXACT_LENGTH, RowKMeansResult, assign_1d_rows, kmeans_1d_rows
from tests._data import needs_data, real_layers


def brute_force(x, w, n_clusters):
    """Optimal inertia over all partitions of the sorted values into consecutive groups."""
    order = np.argsort(x)
    x, w = x[order], w[order]
    best = np.inf
    for cuts in combinations(range(1, len(x)), n_clusters - 1):
        cost = 0.0
        for part in np.split(np.arange(len(x)), cuts):
            if w[part].sum() > 0:
                cost += (w[part] * (x[part] - np.average(x[part], weights=w[part])) ** 2).sum()
        best = min(best, cost)
    return best


def optimal_inertia(x, n_clusters, w=None):
    """Optimum by the quadratic dynamic programme on the full cost matrix of the sorted values."""
    order = np.argsort(x)
    x = x[order].astype(np.float64)
    w = np.ones(len(x)) if w is None else w[order].astype(np.float64)
    x = x - np.average(x, weights=w)
    s0, s1, s2 = (np.concatenate([[0.0], np.cumsum(w * x**p)]) for p in (0, 1, 2))
    mass = s0[None] - s0[:, None]
    first = s1[None] - s1[:, None]
    cost = s2[None] - s2[:, None] - first**2 / np.where(mass > 0, mass, 1.0)
    cost = np.where(np.tri(len(x) + 1, dtype=bool), np.inf, np.maximum(cost, 0.0))
    best = cost[0]
    for _ in range(n_clusters - 1):
        best = np.minimum(best, (best[:, None] + cost).min(axis=0))
    return best[-1]


def inertia_of(X, centers, weights=1.0):
    labels = assign_1d_rows(X, centers).astype(np.intp)
    return (weights * (X.astype(np.float64) - np.take_along_axis(centers, labels, axis=1)) ** 2).sum(axis=1)


def sample(name, n_rows, n, seed):
    rng = np.random.default_rng(seed)
    if name == "gaussian":
        return rng.normal(0, 0.05, (n_rows, n))
    if name == "heavy":
        X = rng.laplace(0, 0.03, (n_rows, n))
        tail = rng.random(X.shape) < 0.1
        X[tail] = 0.05 * rng.standard_t(3, tail.sum())
        return X
    if name == "very heavy":
        return rng.standard_t(1.5, (n_rows, n))
    return np.where(rng.random((n_rows, n)) < 0.7, 0.0, rng.normal(size=(n_rows, n)))  # "sparse"


@pytest.mark.parametrize("n_clusters", [1, 2, 3, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_short_rows_reach_the_brute_force_optimum(n_clusters, weighted):
    rng = np.random.default_rng(n_clusters)
    X = np.round(rng.normal(size=(40, 9)), 1)
    w = rng.integers(0, 3, X.shape) + (rng.random(X.shape) < 0.5) if weighted else np.ones(X.shape)
    w[w.sum(axis=1) == 0] = 1
    result = kmeans_1d_rows(X, n_clusters, weights=w if weighted else None)
    expected = [brute_force(x, v, n_clusters) for x, v in zip(X, w)]
    np.testing.assert_allclose(result.inertia, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("n_clusters", [2, 16, 60])
def test_rows_up_to_the_exact_length_are_exact(n_clusters):
    X = sample("very heavy", 20, EXACT_LENGTH, 0)
    expected = np.array([optimal_inertia(x, n_clusters) for x in X])
    # The reference subtracts prefix sums of squares: it is exact to rounding of the row's sum of squares only.
    assert (np.abs(kmeans_1d_rows(X, n_clusters).inertia - expected) <= 1e-13 * (X**2).sum(axis=1)).all()


@pytest.mark.parametrize("name", ["gaussian", "heavy", "very heavy", "sparse"])
@pytest.mark.parametrize("n_clusters", [2, 4, 16, 64])
@pytest.mark.parametrize("weighted", [False, True])
def test_long_rows_are_within_a_thousandth_of_the_optimum(name, n_clusters, weighted):
    X = sample(name, 16, 576, n_clusters)
    w = np.random.default_rng(7).gamma(0.5, size=X.shape) if weighted else None
    result = kmeans_1d_rows(X, n_clusters, weights=w)
    w = np.ones(X.shape) if w is None else w
    expected = np.array([optimal_inertia(x, n_clusters, v) for x, v in zip(X, w)])
    assert result.inertia.sum() <= 1.001 * expected.sum()
    assert (result.inertia >= expected - 1e-13 * (w * X**2).sum(axis=1)).all()
    np.testing.assert_allclose(result.inertia, inertia_of(X, result.centers, w), rtol=1e-10)


@needs_data
@pytest.mark.parametrize("n_clusters", [4, 16])
def test_real_rows_are_within_a_thousandth_of_the_optimum(n_clusters):
    X = real_layers("cifar10_resnet56")["layer3.4.conv1.weight"]
    assert X.shape == (64, 576)
    result = kmeans_1d_rows(X, n_clusters)
    expected = np.array([optimal_inertia(x, n_clusters) for x in X[:32]])
    assert result.inertia[:32].sum() <= 1.001 * expected.sum()


def test_every_row_is_a_fixed_point_of_lloyd():
    X = sample("heavy", 8, 400, 1)
    centers = kmeans_1d_rows(X, 12).centers
    labels = assign_1d_rows(X, centers)
    for x, c, label in zip(X, centers, labels):
        np.testing.assert_allclose([x[label == k].mean() for k in range(12)], c, rtol=1e-12, atol=1e-15)


def test_planted_clusters_are_found_exactly():
    rng = np.random.default_rng(0)
    planted = np.arange(10) * 8.0
    labels = rng.integers(0, 10, (30, 300))
    labels[:, :10] = np.arange(10)
    X = planted[labels] + rng.uniform(-1, 1, labels.shape)
    np.testing.assert_array_equal(assign_1d_rows(X, kmeans_1d_rows(X, 10).centers), labels)


def test_more_clusters_than_values_repeats_the_last_centre():
    X = np.array([[3.0, 1.0, 3.0, 1.0], [0.1, 0.1, 0.1, 0.1], [4.0, 3.0, 2.0, 1.0]])
    result = kmeans_1d_rows(X, 6)
    assert isinstance(result, RowKMeansResult)
    np.testing.assert_array_equal(
        result.centers, [[1, 3, 3, 3, 3, 3], [0.1, 0.1, 0.1, 0.1, 0.1, 0.1], [1, 2, 3, 4, 4, 4]]
    )
    np.testing.assert_array_equal(result.inertia, np.zeros(3))


def test_rows_of_all_kinds_share_a_block():
    """A constant, a two-valued, a short-valued and a continuous row give what each gives alone."""
    rng = np.random.default_rng(2)
    X = np.stack([np.full(300, 0.3), rng.choice([-1.0, 2.0], 300), rng.integers(0, 40, 300) / 7, rng.normal(size=300)])
    together = kmeans_1d_rows(X, 8)
    for i in range(4):
        alone = kmeans_1d_rows(X[i : i + 1], 8)
        np.testing.assert_allclose(alone.centers[0], together.centers[i], rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(alone.inertia[0], together.inertia[i], rtol=1e-12)
    assert (together.inertia[:2] == 0).all()
    np.testing.assert_allclose(together.inertia[2], optimal_inertia(X[2], 8), rtol=1e-9)


def test_many_blocks_equal_single_rows():
    X = sample("gaussian", 2100, 120, 3)  # three blocks
    together = kmeans_1d_rows(X, 5)
    alone = np.concatenate([kmeans_1d_rows(x[None], 5).centers for x in X[::137]])
    np.testing.assert_allclose(together.centers[::137], alone, rtol=1e-12, atol=1e-16)


def test_integer_weights_are_repeated_values():
    rng = np.random.default_rng(4)
    X = sample("heavy", 6, 250, 4)
    w = rng.integers(0, 4, X.shape)
    weighted = kmeans_1d_rows(X, 8, weights=w)
    for x, v, c, inertia in zip(X, w, *weighted[:2]):
        repeated = kmeans_1d_rows(np.repeat(x, v)[None], 8)
        np.testing.assert_allclose(repeated.centers[0], c, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(repeated.inertia[0], inertia, rtol=1e-10)


def test_row_without_weight_costs_nothing():
    X = sample("gaussian", 2, 20, 5)
    w = np.ones(X.shape)
    w[0] = 0
    result = kmeans_1d_rows(X, 3, weights=w)
    assert result.inertia[0] == 0
    np.testing.assert_array_equal(result.centers, kmeans_1d_rows(X, 3).centers)


def test_values_of_weight_zero_take_no_cluster():
    X = np.array([[1.0, 2.0, 3.0, 4.0]])
    result = kmeans_1d_rows(X, 3, weights=np.array([[1.0, 0.0, 1.0, 0.0]]))
    np.testing.assert_array_equal(result.centers, [[1.0, 3.0, 3.0]])
    assert result.inertia[0] == 0


def test_single_values_are_met_exactly():
    X = sample("very heavy", 20, 200, 12)
    centers = kmeans_1d_rows(X, 30).centers
    labels = assign_1d_rows(X, centers)
    n_single = 0
    for x, c, label in zip(X, centers, labels):
        single = np.flatnonzero(np.bincount(label, minlength=30) == 1)
        n_single += len(single)
        np.testing.assert_array_equal(c[single], [x[label == k][0] for k in single])
    assert n_single > 20


@pytest.mark.parametrize("exponent", [-400, -60, 60, 400])
def test_scaling_by_a_power_of_two_changes_nothing(exponent):
    X = sample("heavy", 5, 300, 6)
    plain, scaled = kmeans_1d_rows(X, 16), kmeans_1d_rows(np.ldexp(X, exponent), 16)
    np.testing.assert_array_equal(np.ldexp(plain.centers, exponent), scaled.centers)
    np.testing.assert_array_equal(np.ldexp(plain.inertia, 2 * exponent), scaled.inertia)


def test_large_offset_keeps_the_optimum():
    """Values far from zero are centred first, so that prefix sums do not cancel."""
    X = np.round(sample("gaussian", 5, 200, 8) * 2**20) / 2**20
    np.testing.assert_allclose(kmeans_1d_rows(X + 2.0**20, 6).inertia, kmeans_1d_rows(X, 6).inertia, rtol=1e-8)


def test_float32_and_float64_agree():
    X = sample("heavy", 10, 300, 9).astype(np.float32)
    single, double = kmeans_1d_rows(X, 16), kmeans_1d_rows(X.astype(np.float64), 16)
    np.testing.assert_array_equal(single.centers, double.centers)
    np.testing.assert_array_equal(
        assign_1d_rows(X, single.centers), assign_1d_rows(X.astype(np.float64), single.centers)
    )


def test_inputs_are_not_written():
    X = sample("sparse", 4, 200, 10)
    w = np.abs(X)
    for array in (X, w):
        array.flags.writeable = False
    centers = kmeans_1d_rows(X, 5, weights=w).centers
    centers.flags.writeable = False
    assign_1d_rows(X, centers)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_assignment_is_exact_with_ties_to_the_lower_centre(dtype):
    """Compared with rational arithmetic, on values that lie on and next to every midpoint."""
    rng = np.random.default_rng(11)
    centers = np.sort(rng.normal(size=(4, 7)).astype(np.float32).astype(np.float64), axis=1)
    centers[1] = np.sort(rng.normal(size=7))
    middle = ((centers[:, 1:] + centers[:, :-1]) / 2).astype(dtype)
    X = np.concatenate(
        [middle, np.nextafter(middle, dtype(9)), np.nextafter(middle, dtype(-9)), centers.astype(dtype)], axis=1
    )
    expected = [
        [min(range(7), key=lambda k: (abs(Fraction(float(v)) - Fraction(float(c[k]))), k)) for v in x]
        for x, c in zip(X, centers)
    ]
    np.testing.assert_array_equal(assign_1d_rows(X, centers), expected)


def test_assignment_skips_repeated_centres():
    centers = np.array([[0.0, 1.0, 1.0, 2.0, 2.0]])
    X = np.array([[-3.0, 0.5, 0.6, 1.0, 1.5, 1.6, 2.0, 9.0]])
    np.testing.assert_array_equal(assign_1d_rows(X, centers), [[0, 0, 1, 1, 1, 3, 3, 3]])


@pytest.mark.parametrize(("n_clusters", "dtype"), [(256, np.uint8), (257, np.uint16)])
def test_label_type_holds_every_index(n_clusters, dtype):
    X = np.arange(300.0)[None]
    labels = assign_1d_rows(X, np.arange(float(n_clusters))[None])
    assert labels.dtype == dtype
    np.testing.assert_array_equal(labels[0], np.minimum(np.arange(300), n_clusters - 1))


@pytest.mark.parametrize(
    ("X", "n_clusters", "weights", "message"),
    [
        (np.ones(3), 2, None, "matrix"),
        (np.ones((0, 3)), 2, None, "at least one row"),
        (np.ones((2, 3)), 0, None, "n_clusters must be at least 1, got 0"),
        (np.array([[1.0, np.nan]]), 1, None, "finite"),
        (np.array([[1.0, np.inf]]), 1, None, "finite"),
        (np.ones((2, 3)), 2, np.ones((3, 2)), "shape of X"),
        (np.ones((1, 2)), 2, np.array([[1.0, -1.0]]), "not negative"),
        (np.ones((1, 2)), 2, np.array([[1.0, np.nan]]), "finite"),
    ],
)
def test_bad_input_is_refused(X, n_clusters, weights, message):
    with pytest.raises(ValueError, match=message):
        kmeans_1d_rows(X, n_clusters, weights=weights)


def test_bad_centres_are_refused():
    with pytest.raises(ValueError, match="number of rows"):
        assign_1d_rows(np.ones((2, 3)), np.ones((1, 2)))
    with pytest.raises(ValueError, match="ascend"):
        assign_1d_rows(np.ones((1, 3)), np.array([[2.0, 1.0]]))
