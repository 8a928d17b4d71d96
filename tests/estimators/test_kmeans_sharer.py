"""`KMeansWeightSharer`: optimal by certificate, equal to independent computations, clear about wrong use."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import pytest
from _data import needs_data, real_layers
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline

from skfactor import KMeansWeightSharer
from skfactor.codec.container import SkfWriter
from skfactor.estimators import compressed_tensor
from skfactor.solvers.feedback import output_error


def matrix(n=24, d=36, seed=0, dtype=np.float64):
    return (np.random.default_rng(seed).standard_t(4, size=(n, d)) * 0.05).astype(dtype)


def gram_of(d, seed=1, n=400):
    rng = np.random.default_rng(seed)
    inputs = np.maximum(rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) / np.sqrt(d), 0)
    return inputs.T @ inputs / n


def error(sharer, X, weights=1.0):
    return float((weights * (X - sharer.inverse_transform(sharer.labels_)) ** 2).sum())


@pytest.mark.parametrize("k", [1, 2, 5, 16])
def test_certified_optimum_is_below_every_lloyd(k):
    X = matrix()
    sharer = KMeansWeightSharer(k, certify=True).fit(X)
    assert sharer.inertia_ == pytest.approx(sharer.lower_bound_, rel=1e-9)
    assert sharer.inertia_ == pytest.approx(error(sharer, X), rel=1e-9)
    assert sharer.inertia_ <= KMeans(k, n_init=5, random_state=0).fit(X.reshape(-1, 1)).inertia_ * (1 + 1e-9)
    for init in ("linear", "density", "random"):
        assert KMeansWeightSharer(k, init=init, random_state=0).fit(X).inertia_ >= sharer.lower_bound_ * (1 - 1e-9)


def test_starts_of_deep_compression_as_they_are():
    X = matrix()
    linear = KMeansWeightSharer(5, init="linear", max_iter=0).fit(X).cluster_centers_[:, 0]
    np.testing.assert_allclose(linear, np.linspace(X.min(), X.max(), 5))
    random = KMeansWeightSharer(5, init="random", max_iter=0, random_state=0).fit(X).cluster_centers_[:, 0]
    assert np.isin(random, X).all()


def test_granularity_is_a_fit_per_part():
    X = matrix(7, 20)
    parts = {
        ("row", None): [X[i : i + 1] for i in range(7)],
        ("column", None): [X[:, j : j + 1] for j in range(20)],
        ("group", 3): [X[0:3], X[3:6], X[6:7]],
    }
    for (granularity, size), pieces in parts.items():
        whole = KMeansWeightSharer(4, granularity=granularity, group_size=size).fit(X)
        alone = [KMeansWeightSharer(4, certify=True).fit(p) for p in pieces]
        assert whole.inertia_ == pytest.approx(sum(a.inertia_ for a in alone), rel=1e-6)
        assert whole.kappa_ == pytest.approx(1 - 4 * len(pieces) / X.size)


def test_sub_vectors_are_kmeans_on_rows():
    rng = np.random.default_rng(0)
    planted = rng.standard_normal((4, 6))
    X = planted[rng.integers(4, size=200)] + 0.01 * rng.standard_normal((200, 6))
    sharer = KMeansWeightSharer(4, vector_size=6, random_state=0).fit(X)
    assert sharer.labels_.shape == (200, 1)
    nearest = np.linalg.norm(sharer.cluster_centers_[:, None] - planted, axis=2).min(axis=0)
    assert nearest.max() < 0.01


def test_zeros_are_preserved():
    X = matrix()
    X[np.abs(X) < 0.03] = 0
    sharer = KMeansWeightSharer(6, preserve_zeros=True).fit(X)
    X_hat = sharer.inverse_transform(sharer.labels_)
    assert (X_hat[X == 0] == 0).all()
    assert sharer.decoder_.codebooks.shape[1] == 6
    assert sharer.inertia_ >= KMeansWeightSharer(6, certify=True).fit(X).lower_bound_ * (1 - 1e-9)


def test_price_of_bits_trades_error_for_rate():
    X = matrix(64, 64)
    fits = [KMeansWeightSharer(64, entropy_weight=w).fit(X) for w in (0.0, 1e-4, 1e-3, 1e-2, 1e-1)]
    errors = [f.inertia_ for f in fits]
    rates = [f.rate_ for f in fits]
    assert errors == sorted(errors)
    assert rates == sorted(rates, reverse=True)
    # at its own price each beats the others: error + price * ideal bits
    for fit, weight in zip(fits[1:], (1e-4, 1e-3, 1e-2, 1e-1)):
        price = weight * np.square(X).mean()
        costs = [f.inertia_ + price * ideal_bits(f.labels_) for f in fits]
        assert fit.inertia_ + price * ideal_bits(fit.labels_) <= min(costs) * (1 + 1e-2)


def ideal_bits(codes):
    counts = np.unique(codes, return_counts=True)[1]
    return float((counts * np.log2(codes.size / counts)).sum())


def test_elbow_curve_is_the_error_of_every_k():
    X = matrix()
    grouped = {"granularity": "group", "group_size": 10}
    for kwargs, weights in (({}, None), (grouped, None), ({}, np.linspace(1, 3, 24))):
        curve = KMeansWeightSharer(**kwargs).elbow_curve(X, 12, sample_weight=weights)
        fits = [KMeansWeightSharer(k, certify=True, **kwargs).fit(X, sample_weight=weights) for k in range(1, 13)]
        np.testing.assert_allclose(curve, [f.inertia_ for f in fits], rtol=2e-3)
        assert (np.diff(curve) <= 0).all()


def test_rate_is_the_growth_of_the_file(tmp_path):
    X = matrix(40, 90, dtype=np.float32)
    sharer = KMeansWeightSharer(16).fit(X)
    sizes = []
    for names in ("", "x"):
        with SkfWriter(tmp_path / "a.skf") as writer:
            for name in names:
                writer.add(name, compressed_tensor(sharer, X))
        sizes.append((tmp_path / "a.skf").stat().st_size)
    assert abs(sharer.rate_ - (sizes[1] - sizes[0])) <= 64
    assert sharer.bits_per_weight_ == pytest.approx(8 * sharer.rate_ / X.size)


def test_course_error_is_a_sum_of_norms():
    X = matrix()
    for v in (1, 4):
        sharer = KMeansWeightSharer(8, vector_size=v, random_state=0).fit(X)
        difference = (X - sharer.inverse_transform(sharer.labels_)).reshape(-1, v)
        assert sharer.course_error(X) == pytest.approx(sum(np.linalg.norm(e) for e in difference))


@pytest.mark.parametrize("kwargs", [{}, {"entropy_weight": 0.01, "n_clusters": 40}, {"granularity": "row"}], ids=str)
def test_sample_weight_counts_rows(kwargs):
    X = matrix(6, 30)
    counts = np.array([1, 3, 0, 2, 1, 1])
    if "granularity" in kwargs:  # a codebook per row: a weight changes nothing but the inertia
        weighted = KMeansWeightSharer(4, **kwargs).fit(X, sample_weight=np.maximum(counts, 1))
        assert weighted.inertia_ == pytest.approx(error(weighted, X, np.maximum(counts, 1)[:, None]), rel=1e-6)
        return
    weighted = KMeansWeightSharer(**kwargs).fit(X, sample_weight=counts)
    repeated = KMeansWeightSharer(**kwargs).fit(np.repeat(X, counts, axis=0))
    np.testing.assert_allclose(weighted.cluster_centers_, repeated.cluster_centers_, rtol=1e-9)
    assert weighted.inertia_ == pytest.approx(repeated.inertia_, rel=1e-9)


def test_importance_weighs_elements():
    X, importance = matrix(), np.random.default_rng(3).uniform(0.1, 5, (24, 36))
    sharer = KMeansWeightSharer(5, certify=True).fit(X, importance=importance)
    assert sharer.inertia_ == pytest.approx(error(sharer, X, importance), rel=1e-9)
    assert sharer.inertia_ == pytest.approx(sharer.lower_bound_, rel=1e-9)
    assert sharer.inertia_ < error(KMeansWeightSharer(5, certify=True).fit(X), X, importance)


GRAM_CASES = [
    {"n_clusters": 8},
    {"n_clusters": 6, "granularity": "row"},
    {"n_clusters": 6, "granularity": "group", "group_size": 5},
    {"n_clusters": 8, "preserve_zeros": True},
    {"n_clusters": 12, "vector_size": 3, "random_state": 0},
]


@pytest.mark.parametrize("kwargs", GRAM_CASES, ids=str)
@pytest.mark.parametrize("n_groups", [1, 2])
def test_output_is_never_worse_with_the_gram(kwargs, n_groups):
    X = matrix()
    X[np.abs(X) < 0.01] = 0
    gram = np.stack([gram_of(36, seed) for seed in range(n_groups)])
    plain, kept = KMeansWeightSharer(**kwargs).fit(X), KMeansWeightSharer(**kwargs).fit(X, input_gram=gram)
    errors = [output_error(X, s.inverse_transform(s.labels_), gram) for s in (plain, kept)]
    assert kept.output_error_ == pytest.approx(errors[1], rel=1e-9)
    assert errors[1] < 0.95 * errors[0]
    np.testing.assert_array_equal(kept.transform(X), kept.labels_)
    if kwargs.get("preserve_zeros"):
        assert (kept.inverse_transform(kept.labels_)[X == 0] == 0).all()


def test_gram_of_independent_inputs_changes_nothing():
    X = matrix()
    plain, kept = KMeansWeightSharer(8).fit(X), KMeansWeightSharer(8).fit(X, input_gram=3.0 * np.eye(36))
    np.testing.assert_allclose(kept.inertia_, plain.inertia_, rtol=1e-5)
    priced = KMeansWeightSharer(32, entropy_weight=0.01).fit(X)
    priced_kept = KMeansWeightSharer(32, entropy_weight=0.01).fit(X, input_gram=3.0 * np.eye(36))
    assert priced_kept.rate_ == pytest.approx(priced.rate_, rel=0.05)
    assert priced_kept.inertia_ == pytest.approx(priced.inertia_, rel=0.1)


@pytest.mark.parametrize("weight", [1e-3, 1e-2, 1e-1])
def test_price_and_gram_never_cost_more_than_the_price_alone(weight):
    X, gram = matrix(64, 36), gram_of(36)
    plain, kept = (KMeansWeightSharer(40, entropy_weight=weight).fit(X, input_gram=g) for g in (None, gram))
    price = weight * output_error(X, 0 * X, gram) / X.size
    costs = [output_error(X, s.inverse_transform(s.labels_), gram) + price * ideal_bits(s.labels_)
             for s in (plain, kept)]
    assert costs[1] <= costs[0] * 1.02


def test_importance_of_rows_with_a_gram():
    X, gram = matrix(), gram_of(36)
    importance = np.logspace(-2, 2, 24)[:, None]
    plain = KMeansWeightSharer(6).fit(X, importance=importance)
    kept = KMeansWeightSharer(6).fit(X, input_gram=gram, importance=importance)
    weighted = [output_error(X, s.inverse_transform(s.labels_), gram, row_weight=importance[:, 0])
                for s in (plain, kept)]
    assert kept.output_error_ == pytest.approx(weighted[1], rel=1e-9)
    assert weighted[1] < weighted[0]
    with pytest.raises(ValueError, match=r"one number per row, \(n_rows, 1\)"):
        KMeansWeightSharer().fit(X, input_gram=gram, importance=np.random.default_rng(0).uniform(1, 2, X.shape))


def test_grid_search_and_pipeline():
    X = matrix(60, 12)
    search = GridSearchCV(Pipeline([("share", KMeansWeightSharer())]), {"share__n_clusters": [2, 8]},
                          cv=[(np.arange(60), np.arange(60))]).fit(X)
    assert search.best_params_ == {"share__n_clusters": 8}
    restored = search.best_estimator_.inverse_transform(search.best_estimator_.transform(X))
    np.testing.assert_allclose(restored, X, atol=np.abs(X).max())


def test_fewer_distinct_values_than_clusters():
    X = np.float32([[0, 1, 2], [2, 1, 0]])
    with pytest.warns(ConvergenceWarning, match="only 3 distinct values to share for n_clusters=16; 3 clusters"):
        sharer = KMeansWeightSharer(16).fit(X)
    assert sharer.inertia_ == 0
    with pytest.warns(ConvergenceWarning, match="only 2 distinct sub-vectors"):
        KMeansWeightSharer(16, vector_size=3).fit(X)


WRONG = [
    ({"n_clusters": 0}, "'n_clusters' parameter of KMeansWeightSharer must be an int in the range"),
    ({"granularity": "layer"}, "'granularity' parameter of KMeansWeightSharer must be a str among"),
    ({"granularity": "group"}, "group_size must be given with granularity='group' and only then"),
    ({"group_size": 2}, "group_size must be given with granularity='group' and only then"),
    ({"vector_size": 5}, "vector_size must divide the 36 columns of X, got 5"),
    ({"vector_size": 4, "preserve_zeros": True}, "preserve_zeros needs vector_size=1, got vector_size=4"),
    ({"vector_size": 4, "entropy_weight": 1.0}, "entropy_weight needs vector_size=1"),
    ({"vector_size": 4, "init": "linear"}, "init must be 'auto' or 'k-means\\+\\+' with vector_size=4, got 'linear'"),
    ({"init": "k-means++"}, "init must be 'auto', 'optimal', 'linear', 'density' or 'random' with vector_size=1"),
    ({"init": "linear", "entropy_weight": 0.1}, "entropy_weight needs init='auto' or 'optimal', got 'linear'"),
    ({"init": "linear", "certify": True}, "certify needs init='auto' or 'optimal', got 'linear'"),
]


@pytest.mark.parametrize(("kwargs", "message"), WRONG, ids=lambda p: str(p)[:40])
def test_wrong_parameters(kwargs, message):
    with pytest.raises(ValueError, match=message) as caught:
        KMeansWeightSharer(**kwargs).fit(matrix())
    assert "\n" not in str(caught.value)


def test_wrong_weights_and_grams():
    X, sharer = matrix(), KMeansWeightSharer(4)
    for params, message in (
        ({"sample_weight": np.ones(5)}, r"sample_weight must have shape \(24,\), got \(5,\)"),
        ({"sample_weight": -np.ones(24)}, "sample_weight must not be negative, got a minimum of -1.0"),
        ({"sample_weight": np.zeros(24)}, "at least one sample_weight must be positive"),
        ({"importance": np.ones((24, 7))}, r"importance must have shape \(24, 36\), got \(24, 7\)"),
        ({"importance": np.full((24, 36), np.nan)}, "importance must be finite, got 864 NaN or inf"),
        ({"input_gram": np.eye(7)}, r"input_gram must have shape \(36, 36\) or \(n_groups, 36, 36\), got \(7, 7\)"),
        ({"input_gram": np.stack([np.eye(36)] * 7)}, "input_gram has 7 groups, which must divide the 24 rows of X"),
        ({"input_gram": np.triu(np.ones((36, 36)))}, "input_gram must be a second moment"),
    ):
        with pytest.raises(ValueError, match=message):
            sharer.fit(X, **params)
    with pytest.raises(ValueError, match="input_gram needs granularity='tensor', 'row' or 'group', got 'column'"):
        KMeansWeightSharer(granularity="column").fit(X, input_gram=np.eye(36))
    with pytest.raises(ValueError, match="k_max must be an integer of at least 1, got 0"):
        sharer.elbow_curve(X, 0)
    with pytest.raises(ValueError, match="X must have the 24 rows of fit, got 3"):
        KMeansWeightSharer(granularity="row").fit(X).transform(X[:3])


@needs_data
def test_real_layers_against_the_certificate():
    for name, X in real_layers("cifar10_resnet20").items():
        for k in (4, 16):
            sharer = KMeansWeightSharer(k).fit(X)
            bound = KMeansWeightSharer(k, certify=True).fit(X).lower_bound_
            assert sharer.inertia_ <= bound * (1 + 1e-6), name
