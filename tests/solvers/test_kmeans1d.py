"""Tests of the one-dimensional k-means solvers."""
# SPDX-License-Identifier: BSD-3-Clause

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from skfactor.solvers import _chain1d, _optimal1d, _prefix, _windows1d
from skfactor.solvers._optimal1d import prepare
from skfactor.solvers._prefix import build_prefix, sums_at
from skfactor.solvers._windows1d import compander_borders, interlaced, refine, settle
from skfactor.solvers.kmeans1d import (
    INIT_METHODS,
    assign_1d,
    assign_1d_entropy,
    elbow_1d,
    entropy_kmeans_1d,
    init_1d,
    kmeans_1d,
    lloyd_1d,
)
from tests._data import needs_data, real_layers


def cost_of(x, w, borders):
    return sum(
        float(np.dot(w[a:b], (x[a:b] - np.average(x[a:b], weights=w[a:b])) ** 2))
        for a, b in zip(borders[:-1], borders[1:], strict=True)
    )


def brute_force(x, k, w=None):
    """Smallest inertia over all partitions of the distinct values into k intervals."""
    x, inverse = np.unique(np.asarray(x, dtype=np.float64), return_inverse=True)
    w = np.bincount(inverse, weights=w).astype(float)
    x, w = x[w > 0], w[w > 0]
    if k >= x.size:
        return 0.0
    x = x - x.mean()
    return min(cost_of(x, w, (0, *c, x.size)) for c in combinations(range(1, x.size), k - 1))


def inertia_of(x, centers, w=None):
    d = np.abs(np.asarray(x, dtype=np.float64)[:, None] - centers).min(axis=1) ** 2
    return float(d.sum() if w is None else np.dot(d, w))


def exact_inertia(x, k, w=None):
    """Optimum by the textbook O(K n^2) dynamic programme on distinct values."""
    x, inverse = np.unique(np.asarray(x, dtype=np.float64), return_inverse=True)
    w = np.bincount(inverse, weights=w).astype(float)
    x, w = x[w > 0], w[w > 0]
    n = x.size
    cost = np.full((n + 1, n + 1), np.inf)
    for a in range(n):
        y = x[a:] - x[a]
        t, s, q = np.cumsum(w[a:]), np.cumsum(w[a:] * y), np.cumsum(w[a:] * y * y)
        cost[a, a + 1 :] = np.maximum(q - s * s / t, 0)
    best = cost[0].copy()
    for _ in range(1, min(k, n)):
        best = np.min(best[:, None] + cost, axis=0)
    return best[-1]


def uneven_weights(rng, n):
    w = 10.0 ** rng.uniform(-6, 0, n)
    w[rng.random(n) < 0.2] = 0.0
    w[0] = 1.0
    return w


DATA = {
    "gauss": lambda rng, n: rng.normal(0, 0.05, n),
    "heavy": lambda rng, n: rng.standard_t(2, n),
    "uniform": lambda rng, n: rng.random(n),
    "half": lambda rng, n: rng.normal(0, 1, n).astype(np.float16).astype(np.float64),
    "sparse": lambda rng, n: np.where(rng.random(n) < 0.99, 0.0, rng.normal(0, 1, n)),
    "groups": lambda rng, n: rng.integers(0, 9, n) ** 2 + rng.normal(0, 1e-3, n),
    "few": lambda rng, n: rng.choice([-2.0, 0.5, 0.75, 7.0], n),
    "outlier": lambda rng, n: np.append(rng.normal(0, 1, n - 1), 1e6),
    "offset": lambda rng, n: 1e3 + rng.normal(0, 1e-3, n),
    "steps": lambda rng, n: np.arange(n, dtype=np.float64),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", range(15))
def test_optimal_against_all_partitions(seed, weighted):
    rng = np.random.default_rng(seed)
    x = rng.choice([rng.normal(size=11), rng.integers(0, 6, 11) / 4.0])
    w = uneven_weights(rng, 11) if weighted else None
    for k in (1, 2, 3, 5):
        result = kmeans_1d(x, k, weights=w)
        expected = brute_force(x, k, w)
        assert result.inertia == pytest.approx(expected, rel=1e-9, abs=1e-20)
        assert inertia_of(x, result.centers, w) == pytest.approx(result.inertia, rel=1e-9, abs=1e-20)
        assert result.lower_bound <= result.inertia


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", DATA)
def test_optimal_against_textbook_programme(name, weighted):
    rng = np.random.default_rng(7)
    x = DATA[name](rng, 400)
    w = uneven_weights(rng, 400) if weighted else None
    for k in (2, 4, 16, 64):
        result = kmeans_1d(x, k, weights=w, certify=True)
        expected = exact_inertia(x, k, w)
        assert result.inertia == pytest.approx(expected, rel=1e-8, abs=1e-16 * expected + 1e-20)
        assert result.lower_bound == pytest.approx(result.inertia, rel=1e-10)
        centers = result.centers
        assert (np.diff(centers) > 0).all()
        assert centers.size == min(k, np.unique(x if w is None else x[w > 0]).size)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", DATA)
def test_default_is_certified_optimal_beyond_the_exact_sizes(name, dtype):
    rng = np.random.default_rng(3)
    x = DATA[name](rng, 40_000).astype(dtype)
    for k in (2, 4, 16, 64):
        default, proven = kmeans_1d(x, k), kmeans_1d(x, k, certify=True)
        assert proven.lower_bound == pytest.approx(proven.inertia, rel=1e-10)
        assert default.inertia <= proven.inertia * (1 + 1e-6)
        assert default.lower_bound <= proven.inertia


@pytest.mark.parametrize("seed", [0, 1])
def test_weighted_default_is_certified_optimal(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, 40_000).astype(np.float32)
    w = uneven_weights(rng, x.size)
    for k in (2, 16, 64):
        default, proven = kmeans_1d(x, k, weights=w), kmeans_1d(x, k, weights=w, certify=True)
        assert proven.lower_bound == pytest.approx(proven.inertia, rel=1e-10)
        assert default.inertia <= proven.inertia * (1 + 1e-6)


@needs_data
@pytest.mark.parametrize("net", ["cifar10_resnet20", "mnist_lenet5_sparse"])
def test_real_layers_are_certified_optimal(net):
    layers = [w.ravel() for w in real_layers(net).values()]
    for x in layers[1::5]:
        for k in (4, 16, 64):
            default, proven = kmeans_1d(x, k), kmeans_1d(x, k, certify=True)
            assert proven.lower_bound == pytest.approx(proven.inertia, rel=1e-10)
            assert default.inertia <= proven.inertia * (1 + 1e-6)


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("net", ["cifar10_resnet20", "mnist_lenet5_original", "mnist_lenet300100_sparse"])
def test_all_real_layers_are_certified_optimal(net, weighted):
    rng = np.random.default_rng(0)
    for x in real_layers(net).values():
        w = uneven_weights(rng, x.size) if weighted else None
        for k in (2, 4, 16, 64, 256):
            default, proven = kmeans_1d(x, k, weights=w), kmeans_1d(x, k, weights=w, certify=True)
            assert default.inertia <= proven.lower_bound * (1 + 1e-6)


@pytest.mark.parametrize("k", [4, 16])
def test_never_worse_than_scikit_learn(k):
    x = np.random.default_rng(0).laplace(size=3000)
    peer = KMeans(k, n_init=3, random_state=0).fit(x[:, None])
    assert kmeans_1d(x, k).inertia <= peer.inertia_ * (1 + 1e-9)


@pytest.mark.parametrize("scale", [1e-300, 1e-40, 1e-8, 1e8, 1e150])
def test_scale_free(scale):
    x = np.random.default_rng(0).normal(size=3000)
    one, other = kmeans_1d(x, 16), kmeans_1d(x * scale, 16)
    np.testing.assert_allclose(other.centers / scale, one.centers, rtol=1e-9, atol=1e-12)
    if 1e-100 < scale < 1e100:
        assert other.inertia / scale**2 == pytest.approx(one.inertia, rel=1e-9)


def test_permutation_and_duplicates_as_weights():
    rng = np.random.default_rng(0)
    x, count = rng.normal(size=2000), rng.integers(1, 5, 2000)
    weighted = kmeans_1d(x, 16, weights=count)
    repeated = kmeans_1d(rng.permutation(np.repeat(x, count)), 16)
    np.testing.assert_allclose(weighted.centers, repeated.centers, rtol=1e-10, atol=1e-12)
    assert weighted.inertia == pytest.approx(repeated.inertia, rel=1e-10)


def test_input_untouched_and_deterministic():
    x = np.random.default_rng(0).normal(5, 1, 30_000).astype(np.float32)
    x.flags.writeable = False
    w = np.ones(x.size)
    w.flags.writeable = False
    a, b = kmeans_1d(x, 8), kmeans_1d(x, 8, weights=w)
    np.testing.assert_array_equal(a.centers, b.centers)
    assert a.n_iter >= 1


def test_trivial_inputs():
    assert kmeans_1d(np.full(10, 3.0), 4) == (pytest.approx([3.0]), 0.0, 0.0, 1)
    assert kmeans_1d(np.array([1.0, 2.0]), 2).inertia == 0.0
    assert kmeans_1d(np.array([4.0]), 1).centers.tolist() == [4.0]
    result = kmeans_1d(np.array([1.0, 5.0, 9.0]), 3, weights=np.array([1.0, 0.0, 2.0]))
    assert result.centers.tolist() == [1.0, 9.0]


@pytest.mark.parametrize(
    ("x", "k", "weights", "message"),
    [
        ([], 2, None, "empty"),
        ([1.0, np.nan], 2, None, "finite"),
        ([1.0, np.inf], 2, None, "finite"),
        ([1.0, 2.0], 0, None, "n_clusters must be at least 1, got 0"),
        ([1.0, 2.0], 1, [1.0], "one entry per value"),
        ([1.0, 2.0], 1, [1.0, -1.0], "not negative"),
        ([1.0, 2.0], 1, [0.0, 0.0], "positive"),
    ],
)
def test_bad_input(x, k, weights, message):
    with pytest.raises(ValueError, match=message):
        kmeans_1d(np.array(x), k, weights=weights)


def test_refinement_repairs_a_shifted_start():
    x = np.sort(np.random.default_rng(0).normal(size=50_000))
    data, _ = prepare(x, None)
    best = kmeans_1d(x, 32, certify=True).inertia
    start = compander_borders(data, 32)
    start[1:-1] += 20
    borders, _ = refine(data, start, best, tau=1 / 8, half=16)
    assert settle(data, borders)[1] <= best * (1 + 1e-3)


def test_spliced_chain_is_optimal_on_ties():
    # Equally spaced samples: many prices make chains of very different lengths equally cheap.
    x = np.arange(24.0)
    for k in range(2, 24):
        data, _ = prepare(x, None)
        borders, bound, _ = _chain1d.best_chain(data, k, 1.0)
        assert bound == pytest.approx(exact_inertia(x, k), rel=1e-9, abs=1e-12)
        assert cost_of(x, np.ones(24), borders) == pytest.approx(bound, rel=1e-9, abs=1e-12)


def test_prefix_sums_inside_blocks():
    rng = np.random.default_rng(0)
    x, w = np.sort(rng.normal(size=20_011)), rng.random(20_011)
    p = np.append(rng.integers(0, x.size, 500), [0, x.size])
    for weights in (None, w):
        data = build_prefix(x, weights)
        s, t = sums_at(data, p)
        ones = np.ones(x.size) if weights is None else w
        np.testing.assert_allclose(t, np.append(0, np.cumsum(ones))[p], rtol=1e-12)
        np.testing.assert_allclose(s, np.append(0, np.cumsum(ones * (x - data.origin)))[p], atol=1e-9)


# ---------------------------------------------------------------------------------------------- labels


def labels_by_comparison(x, centers):
    borders = (centers[:-1] + centers[1:]) / 2
    return (np.asarray(x, dtype=np.float64)[:, None] > borders).sum(axis=1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 2, 16, 300])
@pytest.mark.parametrize("n", [1000, 40_000])
def test_assign_equals_comparison_with_every_border(dtype, k, n):
    rng = np.random.default_rng(k)
    centers = np.unique(rng.standard_t(2, k) * 10.0 ** rng.integers(-3, 3))
    borders = ((centers[:-1] + centers[1:]) / 2).astype(dtype)
    near = np.concatenate([borders, np.nextafter(borders, dtype(-np.inf)), np.nextafter(borders, dtype(np.inf))])
    tiny = np.finfo(dtype).smallest_subnormal
    special = [0.0, -0.0, tiny, -tiny, np.finfo(dtype).max, np.finfo(dtype).min, np.inf, -np.inf]
    x = np.concatenate([near, special, rng.standard_t(2, n)]).astype(dtype)
    labels = assign_1d(x, centers)
    assert labels.dtype == (np.uint8 if centers.size <= 256 else np.uint16)
    np.testing.assert_array_equal(labels, labels_by_comparison(x, centers))


def test_assign_at_zero_and_in_crowded_buckets():
    x = np.tile(np.array([-1e-45, -0.0, 0.0, 1e-45, 1.0, 1.0001, 1.0002, 1.0003], dtype=np.float32), 4000)
    for centers in ([-1.0, 1.0], [1.0, 1.0001, 1.0002, 1.0003], [-3e-45, 0.0, 3e-45, 1.0]):
        centers = np.array(centers)
        np.testing.assert_array_equal(assign_1d(x, centers), labels_by_comparison(x, centers))


@needs_data
def test_a_whole_network_in_one_codebook():
    """Few samples in many cells: the sampling noise of each cell moves the optimum."""
    x = np.concatenate([w.ravel() for w in real_layers("cifar10_resnet20").values()])
    assert kmeans_1d(x, 256).inertia <= kmeans_1d(x, 256, certify=True).lower_bound * (1 + 1e-6)


@pytest.mark.parametrize("n_threads", [2, 3, 8])
def test_sorting_in_threads(n_threads):
    x = np.random.default_rng(n_threads).normal(size=(1 << 21) + n_threads).astype(np.float32)
    before = x.copy()
    assert np.array_equal(_prefix._sorted(x, n_threads), np.sort(x))
    assert np.array_equal(x, before)
    with pytest.raises(ValueError, match="x must be finite"):
        kmeans_1d(np.append(x, np.float32(np.nan)), 4, n_threads=n_threads)
    one, some = (kmeans_1d(x, 4, n_threads=n) for n in (1, n_threads))
    assert np.array_equal(one.centers, some.centers)


def test_assign_shapes_and_threads():
    x = np.random.default_rng(0).normal(size=(3, 5, 50_000)).astype(np.float32)
    centers = np.linspace(-2, 2, 16)
    labels = assign_1d(x, centers, n_threads=2)
    assert labels.shape == x.shape
    np.testing.assert_array_equal(labels, assign_1d(x, centers))
    np.testing.assert_array_equal(labels[:, ::2, 7], assign_1d(x[:, ::2, 7], centers))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=30),
    st.integers(1, 6),
)
def test_labels_reproduce_the_inertia(values, k):
    x = np.array(values, dtype=np.float32)
    result = kmeans_1d(x, k)
    d = x - result.centers[assign_1d(x, result.centers)]
    assert np.dot(d, d) == pytest.approx(result.inertia, rel=1e-9, abs=1e-9 * float(np.ptp(x)) ** 2 + 1e-300)


def test_values_over_fifty_decades_end():
    """No price is felt by the smallest of these values beside the cost of the others: the search must give up."""
    x = np.array([-1e-1, -1e-1, -1e-2, -1e-10, -1e-18, -1e-20, -1e-30, 1e-29, 1e-26, 1e-21, 1e-19, 1e-8, 1e2])
    for k in range(2, 12):
        result = kmeans_1d(x, k)
        assert result.centers.size == k
        nearest = np.abs(x[:, None] - result.centers).min(axis=1)
        assert np.dot(nearest, nearest) <= result.inertia + 1e-14 * np.var(x) * x.size
    assert result.inertia <= 1e-38


@pytest.mark.parametrize("name", DATA)
def test_partition_between_two_optimal_ones(name, monkeypatch):
    monkeypatch.setattr(_windows1d, "_PAIRS", 10**6)
    data, _ = prepare(np.unique(DATA[name](np.random.default_rng(4), 600)), None)
    if data.size < 40:
        pytest.skip("too few distinct values")
    borders = {k: _chain1d.best_chain(data, k, 1.0)[0] for k in (8, 10, 13)}
    exact = settle(data, borders[10], 0)[1]
    for fewer, more in ((borders[8], borders[13]), (borders[8], None), (None, borders[13])):
        found = interlaced(data, 10, fewer, more)
        assert found is not None
        assert settle(data, found, 0)[1] == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("name", ["gauss", "heavy", "half", "sparse", "few"])
def test_means_that_stand_for_many_samples(name, monkeypatch):
    x = DATA[name](np.random.default_rng(5), 150_000).astype(np.float32)
    plain = {k: kmeans_1d(x, k).inertia for k in (3, 8)}
    monkeypatch.setattr(_optimal1d, "_LARGE", 100_000)
    monkeypatch.setattr(_optimal1d, "_PART", 40_000)
    monkeypatch.setattr(_optimal1d, "_MEANS", 30_000)
    for k, expected in plain.items():
        result = kmeans_1d(x, k)
        assert result.inertia <= expected * (1 + 1e-6)
        assert inertia_of(x, result.centers) == pytest.approx(result.inertia, rel=1e-6)


# ----------------------------------------------------------------------------------- elbow, Lloyd, starts


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", DATA)
def test_elbow_follows_the_optimum_of_every_k(name, weighted):
    rng = np.random.default_rng(5)
    x = DATA[name](rng, 20_000)
    w = uneven_weights(rng, x.size) if weighted else None
    curve = elbow_1d(x, 40, weights=w)
    assert curve.shape == (40,)
    assert (np.diff(curve) <= 0).all()
    for k in (1, 2, 3, 5, 12, 40):
        best = kmeans_1d(x, k, weights=w, certify=True).inertia
        rounding = (1e-12 if w is None else 1e-8) * curve[0]  # prefix sums of weights over six decades
        assert best * (1 - 1e-6) - rounding <= curve[k - 1] <= best * 1.01 + rounding


def test_elbow_is_exact_when_every_value_is_a_candidate():
    x = np.random.default_rng(0).normal(size=150)
    curve = elbow_1d(x, 160)
    np.testing.assert_allclose(curve[:20], [exact_inertia(x, k) for k in range(1, 21)], rtol=1e-9)
    assert (curve[149:] == 0).all()


@pytest.mark.parametrize("method", INIT_METHODS)
def test_lloyd_falls_from_every_start_to_a_fixed_point(method):
    rng = np.random.default_rng(0)
    x = rng.laplace(size=4000)
    start = init_1d(x, 16, method=method, rng=rng)
    assert start.shape == (16,)
    previous = inertia_of(x, start)
    for max_iter in (1, 2, 5, 20, 10_000):
        result = lloyd_1d(x, start, max_iter=max_iter)
        assert result.inertia <= previous * (1 + 1e-12)
        assert inertia_of(x, result.centers) <= result.inertia * (1 + 1e-12)
        previous = result.inertia
    labels = assign_1d(x, result.centers)
    np.testing.assert_allclose(result.centers, [x[labels == k].mean() for k in range(16)], rtol=1e-9)
    assert result.inertia >= kmeans_1d(x, 16).inertia * (1 - 1e-12)


def test_starts_of_deep_compression():
    x = np.arange(101.0)
    np.testing.assert_allclose(init_1d(x, 5, method="linear"), [0, 25, 50, 75, 100])
    np.testing.assert_allclose(init_1d(x, 4, method="density"), np.quantile(x, [0.125, 0.375, 0.625, 0.875]), atol=1)
    w = np.where(x < 50, 0.0, 1.0)
    assert init_1d(x, 4, method="random", weights=w, rng=np.random.default_rng(0)).min() >= 50
    with pytest.raises(ValueError, match="linear, density, random"):
        init_1d(x, 4, method="kmeans++")


def test_lloyd_repairs_empty_cells():
    x = np.random.default_rng(0).normal(size=500)
    result = lloyd_1d(x, [-50.0, -49.0, 0.0, 60.0, 61.0])
    assert result.centers.size == 5
    assert result.inertia < lloyd_1d(x, [-1.0, 0.0, 1.0]).inertia


# --------------------------------------------------------------------------------- entropy-constrained


def objective_of(x, labels, price, w=None):
    w = np.ones(x.size) if w is None else w
    counts = np.bincount(labels)
    bits = -np.log2(counts[labels] / x.size).sum()
    centers = np.array([np.average(x[labels == k], weights=w[labels == k]) if c else 0 for k, c in enumerate(counts)])
    return np.dot(w, (x - centers[labels]) ** 2) + price * bits


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("price", [1e-4, 1e-2, 0.1, 1.0])
def test_entropy_objective_is_what_it_says_and_beats_plain(price, weighted):
    rng = np.random.default_rng(0)
    x = rng.laplace(size=3000)
    w = rng.uniform(0.1, 1, 3000) if weighted else None
    result = entropy_kmeans_1d(x, 16, entropy_weight=price, weights=w)
    labels = assign_1d_entropy(x, result.centers, result.code_lengths, price, weights=w)
    assert result.objective == pytest.approx(result.inertia + price * result.rate_bits)
    assert objective_of(x, labels, price, w) <= result.objective * (1 + 1e-9)
    plain = assign_1d(x, kmeans_1d(x, 16, weights=w).centers)
    assert result.objective <= objective_of(x, plain, price, w) * (1 + 1e-12)
    assert np.sum(2.0**-result.code_lengths) == pytest.approx(1.0)
    assert (np.diff(result.centers) > 0).all()


def test_entropy_objective_falls_with_iterations_and_rate_with_price():
    x = np.random.default_rng(0).laplace(size=3000)
    objectives = [entropy_kmeans_1d(x, 32, entropy_weight=0.05, max_iter=m).objective for m in (1, 2, 4, 16, 500)]
    assert (np.diff(objectives) <= 1e-9 * objectives[0]).all()
    rates = [entropy_kmeans_1d(x, 32, entropy_weight=p).rate_bits for p in (0.0, 0.01, 0.1, 1.0, 100.0)]
    assert (np.diff(rates) < 0).all()
    assert rates[-1] == 0.0


def test_entropy_weight_zero_is_plain_kmeans():
    x = np.random.default_rng(0).laplace(size=3000)
    free = entropy_kmeans_1d(x, 16, entropy_weight=0.0)
    np.testing.assert_allclose(free.centers, kmeans_1d(x, 16).centers, rtol=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
def test_entropy_labels_are_the_brute_force_argmin(weighted):
    rng = np.random.default_rng(0)
    centers = np.sort(rng.normal(size=40))
    bits = rng.uniform(1, 12, 40)
    bits[3] = np.inf
    x = rng.normal(size=30_000)
    w = rng.random(30_000) if weighted else np.ones(30_000)
    cost = w[:, None] * (x[:, None] - centers) ** 2 + 0.02 * bits
    labels = assign_1d_entropy(x, centers, bits, 0.02, weights=w if weighted else None)
    rows = np.arange(x.size)
    np.testing.assert_allclose(cost[rows, labels], cost.min(axis=1), rtol=1e-9)
    assert labels.dtype == np.uint8


def test_entropy_rejects_a_negative_price():
    with pytest.raises(ValueError, match="entropy_weight must be finite and at least 0, got -1"):
        entropy_kmeans_1d(np.arange(5.0), 2, entropy_weight=-1)
