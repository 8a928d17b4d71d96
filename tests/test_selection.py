"""Sizes, errors, scorers, rules and the search, each beside a second way to the same answer."""
# SPDX-License-Identifier: BSD-3-Clause

import io
import os
import pickle
import warnings
from numbers import Real

import joblib
import numpy as np
import pytest
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import FitFailedWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold
from sklearn.pipeline import Pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from skfactor import (
    BaseCompressor,
    CompressionSearchCV,
    DictionaryFactorizer,
    KMeansWeightSharer,
    LowRankFactorizer,
    MagnitudePruner,
    MantissaRounder,
    UniformQuantizer,
)
from skfactor._sklearn import Interval, fit_context
from skfactor._validation import check_matrix
from skfactor.codec.container import SkfFile, SkfWriter
from skfactor.codec.decoders import IdentityDecoder
from skfactor.selection import (
    WholeMatrixSplit,
    best_under,
    compression_scorer,
    distortion,
    distortion_scorer,
    elbow,
    load_tensor,
    measure,
    rate,
    rate_distortion_scorer,
    rate_scorer,
    save_tensor,
    smallest_within,
)
from skfactor.selection._candidates import plan_tasks

SCORERS = [rate_scorer, distortion_scorer, rate_distortion_scorer(0.01), compression_scorer]
GRID = {"round__n_bits": [2, 6], "share__n_clusters": [2, 4, 8, 16]}


@pytest.fixture(scope="module")
def X():
    return np.random.default_rng(0).laplace(size=(60, 18)).astype(np.float32)


def two_steps():
    # one named coder: the tests need no time for the choice among all
    return Pipeline([("round", MantissaRounder()), ("share", KMeansWeightSharer(coder="packed"))])


class Counting(BaseCompressor):
    """Values times `gain`; counts the fits of this process and reports three iterations."""

    codes_are_values = True
    fits = []
    _parameter_constraints = {"gain": [Interval(Real, 0, None, closed="neither")]}

    def __init__(self, gain=1.0):
        self.gain = gain

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None, sample_weight=None):
        check_matrix(self, X, reset=True)
        report = self._iteration_reporter(3)
        self.n_iter_ = 0
        for i in range(3):
            self.n_iter_ = i + 1
            if report and report(lambda i=i: {"decoder_": IdentityDecoder(), "share_": (i + 1) / 3}):
                break
        self.fits.append(self.gain)
        self.share_, self.decoder_ = self.n_iter_ / 3, IdentityDecoder()
        return self

    def transform(self, X):
        return check_matrix(self, X, reset=False) * np.float32(self.gain * self.share_)


class Broken(MantissaRounder):
    """Fails for two bits."""

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None):
        if self.n_bits == 2:
            raise RuntimeError("two bits are too few")
        return super().fit(X)


# --- splits and measures -----------------------------------------------------------------------------


def test_whole_matrix_split():
    split = WholeMatrixSplit()
    assert split.get_n_splits() == 1
    for X in (np.zeros((4, 2)), [[1.0], [2.0], [3.0], [4.0]]):
        ((fit, score),) = split.split(X)
        assert fit.tolist() == score.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("estimator", [
    KMeansWeightSharer(5), KMeansWeightSharer(4, granularity="row"), UniformQuantizer(), MantissaRounder(4),
    two_steps(), Pipeline([("skip", "passthrough"), ("share", KMeansWeightSharer(3, vector_size=2, random_state=0))])])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_rate_is_the_size_of_the_file(X, tmp_path, estimator, dtype):
    X = X.astype(dtype)
    fitted = clone(estimator).fit(X)
    path = tmp_path / "X.skf"
    save_tensor(path, fitted, X)
    assert rate(fitted, X) == measure(fitted, X)["bytes"] == os.path.getsize(path)
    restored = load_tensor(path)
    assert restored.dtype == X.dtype
    assert np.array_equal(restored, fitted.inverse_transform(fitted.transform(X)).astype(dtype))


def test_a_file_object_gets_the_bytes_of_the_file(X, tmp_path):
    fitted = KMeansWeightSharer(5).fit(X)
    save_tensor(tmp_path / "X.skf", fitted, X)
    file = io.BytesIO()
    save_tensor(file, fitted, X)
    assert file.getvalue() == (tmp_path / "X.skf").read_bytes()
    assert np.array_equal(load_tensor(file), load_tensor(tmp_path / "X.skf"))


def test_an_aborted_writer_empties_its_file_object():
    file = io.BytesIO()
    with pytest.raises(ZeroDivisionError), SkfWriter(file):
        1 / 0  # noqa: B018
    assert file.getvalue() == b""
    assert not file.closed
    with SkfWriter(file) as writer:
        writer.metadata["k"] = 1
    assert SkfFile(file).metadata == {"k": 1}


def test_distortion_by_its_formula(X):
    fitted = two_steps().set_params(round__n_bits=2).fit(X)
    X_hat = fitted.inverse_transform(fitted.transform(X)).astype(float)
    E = X - X_hat
    assert distortion(fitted, X) == pytest.approx((E**2).sum() / (X.astype(float) ** 2).sum(), rel=1e-9)

    importance = np.random.default_rng(1).random(X.shape)
    expected = (importance * E**2).sum() / (importance * X.astype(float) ** 2).sum()
    assert distortion(fitted, X, importance=importance) == pytest.approx(expected, rel=1e-9)


def test_sample_weight_counts_rows(X):
    fitted = KMeansWeightSharer(4).fit(X)
    counts = np.arange(len(X)) % 3
    assert distortion(fitted, X, sample_weight=counts) == pytest.approx(
        distortion(fitted, np.repeat(X, counts, axis=0)), rel=1e-9)


@pytest.mark.parametrize("n_groups", [1, 3])
def test_input_gram_is_the_error_of_the_output(X, n_groups):
    rng = np.random.default_rng(2)
    inputs = rng.normal(size=(n_groups, 200, X.shape[1])) * rng.random(X.shape[1])  # (g, samples, d)
    gram = np.einsum("gsi,gsj->gij", inputs, inputs) / 200
    fitted = KMeansWeightSharer(4).fit(X)
    X_hat = fitted.inverse_transform(fitted.transform(X))
    weight = rng.random(len(X))

    def power(M):
        outputs = inputs @ M.reshape(n_groups, -1, X.shape[1]).transpose(0, 2, 1)  # (g, samples, rows)
        return ((outputs**2).mean(axis=1).reshape(-1) * weight).sum()

    got = distortion(fitted, X, input_gram=gram if n_groups > 1 else gram[0], sample_weight=weight)
    assert got == pytest.approx(power(X.astype(float) - X_hat) / power(X.astype(float)), rel=1e-9)


def test_measures_of_some_rows(X):
    fitted = KMeansWeightSharer(4).fit(X)
    found = measure(fitted, X, rows=[3, 5, 7])
    assert found["bytes"] == rate(fitted, X)
    assert found["distortion"] == pytest.approx(distortion(fitted, X[[3, 5, 7]]), rel=1e-9)


def test_kappa_is_that_of_the_course(X):
    for sharer in (KMeansWeightSharer(4), KMeansWeightSharer(3, vector_size=2, random_state=0),
                   KMeansWeightSharer(2, granularity="row")):
        assert measure(sharer.fit(X), X)["kappa"] == pytest.approx(sharer.kappa_)


def test_all_zeros_cost_nothing():
    X = np.zeros((5, 4))
    assert distortion(KMeansWeightSharer(1).fit(X), X) == 0.0


def test_measures_refuse_what_they_cannot_weigh(X):
    fitted = KMeansWeightSharer(4).fit(X)
    with pytest.raises(ValueError, match="one number per row"):
        distortion(fitted, X, importance=np.ones(X.shape), input_gram=np.eye(X.shape[1]))
    with pytest.raises(NotFittedError):
        rate(KMeansWeightSharer(4), X)


# --- scorers ------------------------------------------------------------------------------------------


def test_scorers_follow_the_measures(X):
    fitted = two_steps().fit(X)
    m = measure(fitted, X)
    expected = [-m["bytes"], -m["distortion"], -(m["distortion"] + 0.01 * m["bits_per_weight"]), m]
    assert [scorer(fitted, X) for scorer in SCORERS] == expected
    weight = np.arange(1.0, len(X) + 1)
    assert distortion_scorer(fitted, X, sample_weight=weight) == -distortion(fitted, X, sample_weight=weight)


@pytest.mark.parametrize("scorer", SCORERS)
def test_scorers_are_plain_values(scorer):
    assert pickle.loads(pickle.dumps(scorer)) == scorer
    assert clone(scorer, safe=False) == scorer


@pytest.mark.parametrize("lam", [-1.0, "much", None, float("nan")])
def test_a_price_is_a_number(lam):
    with pytest.raises(ValueError, match=r"lam must be a number of at least 0, got"):
        rate_distortion_scorer(lam)


def test_pipeline_score_sees_the_last_step_alone(X):
    """Two bits leave few values, which are cheap to share without error: Pipeline.score prefers them."""
    grid = {"round__n_bits": [1, 8], "share__n_clusters": [64]}
    naive = GridSearchCV(two_steps(), grid, cv=WholeMatrixSplit()).fit(X)
    honest = GridSearchCV(two_steps(), grid, cv=WholeMatrixSplit(), scoring=distortion_scorer).fit(X)
    assert naive.best_params_["round__n_bits"] == 1
    assert honest.best_params_["round__n_bits"] == 8
    assert distortion(honest, X) < 0.1 * distortion(naive, X)


# --- rules --------------------------------------------------------------------------------------------


def results(size, error, **more):
    return {"mean_test_bytes": np.asarray(size, float), "mean_test_distortion": np.asarray(error, float),
            "mean_test_bits_per_weight": np.asarray(size, float) / 100, "params": [{"k": i} for i in range(len(size))],
            **more}


@pytest.mark.parametrize("seed", range(20))
def test_constraints_by_brute_force(seed):
    rng = np.random.default_rng(seed)
    size, error = rng.integers(1, 20, 15), rng.integers(0, 10, 15) / 10
    cv_results = results(size, error)
    for limit in np.unique(error):
        index = smallest_within(distortion=limit)(cv_results)
        assert (size[index], error[index]) == min((s, e) for s, e in zip(size, error) if e <= limit)
    for limit in np.unique(size):
        best = min((e, s) for s, e in zip(size, error) if s <= limit)
        for rule in (best_under(rate=limit), best_under(bits_per_weight=limit / 100)):
            index = rule(cv_results)
            assert (error[index], size[index]) == best


@pytest.mark.parametrize("seed", range(20))
def test_elbow_is_the_farthest_from_the_chord(seed):
    rng = np.random.default_rng(seed)
    size = np.sort(rng.choice(1000, 12, replace=False)) + 1.0
    error = np.sort(size ** -rng.uniform(0.3, 2) * rng.uniform(1, 1.2, 12))[::-1]  # falls: the front holds all
    ends = np.array([[0.0, 1.0], [1.0, 0.0]])
    points = np.c_[(size - size[0]) / np.ptp(size), (error - error[-1]) / np.ptp(error)]
    along = (ends[1] - ends[0]) / np.sqrt(2)
    offset = points - ends[0]
    below = offset[:, 0] * along[1] - offset[:, 1] * along[0]  # distance to the left of the chord
    assert below.max() > 0.01
    assert elbow(results(size, error)) == below.argmax()


def test_elbow_leaves_out_what_is_beaten():
    #          front     beaten     front     beaten     front
    cv_results = results([100, 150, 200, 900, 400], [1.0, 1.5, 0.1, 0.5, 0.05])
    assert elbow(cv_results) == 2
    assert "3 candidates on the front from 100 bytes (distortion 1) to 400 bytes (0.05)" in elbow.explain(cv_results, 2)


def test_elbow_without_one_takes_the_smaller_error():
    assert elbow(results([1, 2, 3], [0.9, 0.8, 0.0])) == 2
    assert elbow(results([1, 2], [0.9, 0.1])) == 1
    assert elbow(results([5], [0.9])) == 0
    assert elbow(results([5, 5], [0.9, 0.9])) == 0


def test_rules_read_single_scorers():
    cv_results = {"mean_test_rate": np.array([-300.0, -100.0]), "mean_test_distortion": np.array([-0.1, -0.3])}
    assert best_under(rate=200)(cv_results) == 1
    assert smallest_within(0.2)(cv_results) == 0


def test_rules_leave_failures_out():
    nan = np.nan
    cv_results = results([nan, 10, 20, 30], [nan, 0.5, 0.1, nan])
    assert smallest_within(1.0)(cv_results) == 1
    assert best_under(1000)(cv_results) == 2
    assert elbow(cv_results) in (1, 2)
    with pytest.raises(ValueError, match="every candidate of the search failed"):
        elbow(results([nan], [nan]))


def test_rules_say_what_is_nearest():
    cv_results = results([100, 200, 300], [0.5, 0.2, 0.1])
    with pytest.raises(ValueError, match=r"at most 0.01; the nearest has 0.1 in 300 bytes: \{'k': 2\}"):
        smallest_within(0.01)(cv_results)
    with pytest.raises(ValueError, match=r"0.3 in at most 150 bytes; the nearest has 0.5 in 100 bytes: \{'k': 0\}"):
        smallest_within(0.3, rate=150)(cv_results)
    with pytest.raises(ValueError, match=r"at most 50 bytes; the smallest takes 100: \{'k': 0\}"):
        best_under(50)(cv_results)
    with pytest.raises(ValueError, match=r"at most 0.5 bits per weight; the smallest takes 1:"):
        best_under(bits_per_weight=0.5)(cv_results)
    with pytest.raises(ValueError, match=r"needs 'mean_test_bytes' or 'mean_test_rate' .* got \['mean_test_score'\]"):
        elbow({"mean_test_score": [1.0]})


def test_rules_check_their_limits():
    for bad in (-1, "small", None, True, float("nan")):
        with pytest.raises(ValueError, match=r"distortion must be a number of at least 0, got"):
            smallest_within(bad)
    with pytest.raises(ValueError, match="give either rate or bits_per_weight"):
        best_under()
    with pytest.raises(ValueError, match="give either rate or bits_per_weight"):
        best_under(3, bits_per_weight=2)


@pytest.mark.parametrize("rule", [elbow, smallest_within(0.2), best_under(300)])
def test_rules_are_plain_values(rule):
    assert pickle.loads(pickle.dumps(rule)) == rule == clone(rule, safe=False)


# --- the search ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [elbow, smallest_within(distortion=0.05), best_under(rate=500)])
def test_same_answer_as_grid_search(X, rule):
    ours = CompressionSearchCV(two_steps(), GRID, refit=rule).fit(X)
    theirs = GridSearchCV(two_steps(), GRID, cv=WholeMatrixSplit(), scoring=compression_scorer, refit=rule).fit(X)
    assert ours.best_params_ == theirs.best_params_
    assert ours.cv_results_.keys() == theirs.cv_results_.keys()
    for key, column in theirs.cv_results_.items():
        if not key.startswith("rank") and "time" not in key:
            assert np.array_equal(column, ours.cv_results_[key]), key
    assert np.array_equal(ours.transform(X), theirs.transform(X))
    assert ours.score(X) == ours.best_score_ == -distortion(theirs, X)


def test_costs_are_ranked_from_the_least(X):
    found = CompressionSearchCV(two_steps(), GRID).fit(X).cv_results_
    for name in ("bytes", "distortion", "bits_per_weight"):
        assert found[f"mean_test_{name}"][found[f"rank_test_{name}"] == 1][0] == found[f"mean_test_{name}"].min()


def prune_decompose_share():
    return Pipeline([("prune", MagnitudePruner(0.3)), ("dict", DictionaryFactorizer(12, vector_size=9, tol=1e-3)),
                     ("share", KMeansWeightSharer(preserve_zeros=True, coder="ans"))])


@pytest.fixture(scope="module")
def kernels():
    """Rows of two 3 x 3 kernels, each a few of nine smooth patterns."""
    rng = np.random.default_rng(4)
    patterns = np.outer(*np.linalg.qr(rng.normal(size=(9, 2)))[0].T) + np.linalg.qr(rng.normal(size=(9, 9)))[0]
    codes = rng.normal(size=(800, 9)) * (rng.random((800, 9)) < 0.25)
    return (codes @ patterns + 0.02 * rng.normal(size=(800, 9))).reshape(400, 18).astype(np.float32)


def test_grid_search_over_k_and_alpha(kernels, tmp_path):
    grid = {"share__n_clusters": [4, 16, 32], "dict__alpha": [0.05, 0.4, 3.0]}
    ours = CompressionSearchCV(prune_decompose_share(), grid, random_state=0).fit(kernels)
    seeded = prune_decompose_share().set_params(dict__random_state=ours.best_estimator_["dict"].random_state)
    theirs = GridSearchCV(seeded, grid, cv=WholeMatrixSplit(), scoring=compression_scorer, refit=elbow).fit(kernels)
    naive = GridSearchCV(seeded, grid, cv=WholeMatrixSplit()).fit(kernels)
    for search in (ours, theirs):
        save_tensor(tmp_path / "X.skf", search, kernels)
        assert os.path.getsize(tmp_path / "X.skf") == search.cv_results_["mean_test_bytes"][search.best_index_]
        assert np.array_equal(load_tensor(tmp_path / "X.skf"), search.inverse_transform(search.transform(kernels)))
    assert ours.best_params_ == theirs.best_params_
    for name in ("bytes", "distortion"):
        assert np.array_equal(ours.cv_results_[f"mean_test_{name}"], theirs.cv_results_[f"mean_test_{name}"])
    # the codes of a high price are easy to share, and little of the matrix is left in them
    end_to_end = -theirs.cv_results_["mean_test_distortion"]
    assert end_to_end[naive.best_index_] < end_to_end.max() - 0.1


@pytest.mark.parametrize("estimator", [
    KMeansWeightSharer(vector_size=3), two_steps(),
    Pipeline([("low", LowRankFactorizer(4)), ("share", UniformQuantizer())]).set_params(share__step=0.1),
    Pipeline([("round", MantissaRounder()), ("share", KMeansWeightSharer(vector_size=3))])])
def test_the_file_is_as_large_as_the_search_said(X, tmp_path, estimator):
    grid = {"n_clusters": [3, 7, 20]}
    if isinstance(estimator, Pipeline):
        grid = {"low__rank": [1, 2, 3]} if "low" in estimator.named_steps else {"share__n_clusters": [3, 7, 20]}
    search = CompressionSearchCV(estimator, grid, max_bytes=600).fit(X)
    for i, source in enumerate((search, search.best_estimator_)):
        save_tensor(tmp_path / f"{i}.skf", source, X)
        assert os.path.getsize(tmp_path / f"{i}.skf") == search.best_bytes_
    assert search.best_bytes_ == search.cv_results_["mean_test_bytes"][search.best_index_] <= 600
    assert np.array_equal(search.best_tensor_.to_array(), load_tensor(tmp_path / "0.skf"))
    assert search.best_distortion_ == search.cv_results_["mean_test_distortion"][search.best_index_]


def test_missing_seeds_are_drawn_once(X):
    search = CompressionSearchCV(KMeansWeightSharer(vector_size=3), {"n_clusters": [5, 5]}, random_state=7).fit(X)
    assert np.ptp(search.cv_results_["mean_test_distortion"]) == 0
    assert isinstance(search.best_estimator_.random_state, int)
    again = clone(search).fit(X)
    assert np.array_equal(again.best_estimator_.cluster_centers_, search.best_estimator_.cluster_centers_)
    assert search.estimator.random_state is None


def test_shared_steps_are_fitted_once(X):
    steps = Pipeline([("a", Counting()), ("b", Counting()), ("share", KMeansWeightSharer(coder="packed"))])
    grid = {"a__gain": [1.0, 2.0], "b__gain": [1.5, 3.0], "share__n_clusters": [2, 3, 4]}
    Counting.fits.clear()
    search = CompressionSearchCV(steps, grid, refit=False).fit(X)
    assert sorted(Counting.fits) == [1.0, 1.5, 1.5, 2.0, 3.0, 3.0]
    Counting.fits.clear()
    plain = GridSearchCV(steps, grid, cv=WholeMatrixSplit(), scoring=compression_scorer, refit=False).fit(X)
    assert len(Counting.fits) == 24
    assert np.array_equal(search.cv_results_["mean_test_distortion"], plain.cv_results_["mean_test_distortion"])


@pytest.mark.parametrize("seed", range(20))
def test_tasks_cover_every_candidate_once(seed):
    rng = np.random.default_rng(seed)
    keys = [tuple(rng.integers(0, 3, rng.integers(0, 3))) for _ in range(rng.integers(1, 30))]
    n_splits, n_jobs = (int(n) for n in rng.integers(1, 5, 2))
    tasks = plan_tasks(keys, n_splits, n_jobs)
    assert sorted((split, c) for split, members in tasks for c in members) == [
        (split, c) for split in range(n_splits) for c in range(len(keys))]
    assert len(tasks) >= min(n_jobs, len(keys) * n_splits)


def test_tasks_keep_what_is_shared_together():
    keys = [(a, b) for b in "xyz" for a in "pqrs"] * 2
    for _, members in plan_tasks(keys, 1, 4):
        assert len({keys[c][0] for c in members}) == 1
        seconds = [keys[c][1] for c in members]
        assert seconds == sorted(seconds)
    assert len(plan_tasks(keys, 1, 4)) == 4
    assert len(plan_tasks(keys, 1, 8)) == 12


def test_a_step_may_be_another_estimator(X):
    grid = [{"round": ["passthrough", MantissaRounder(2)]}, {"share": [UniformQuantizer()], "share__step": [0.5, 1.0]}]
    ours = CompressionSearchCV(two_steps(), grid, refit=elbow).fit(X)
    theirs = GridSearchCV(two_steps(), grid, cv=WholeMatrixSplit(), scoring=compression_scorer, refit=elbow).fit(X)
    for name in ("bytes", "distortion", "kappa"):
        assert np.array_equal(ours.cv_results_[f"mean_test_{name}"], theirs.cv_results_[f"mean_test_{name}"])


@pytest.mark.parametrize(("cv", "groups"), [(KFold(3), None), (GroupKFold(4), np.arange(60) // 15)])
def test_held_out_rows_give_the_error_and_all_rows_the_size(X, cv, groups):
    search = CompressionSearchCV(two_steps(), GRID, cv=cv, refit=elbow).fit(X, groups=groups)
    for i, (train, test) in enumerate(cv.split(X, None, groups)):
        for c, params in enumerate(search.cv_results_["params"]):
            fitted = two_steps().set_params(**params).fit(X[train])
            assert search.cv_results_[f"split{i}_test_bytes"][c] == rate(fitted, X)
            assert search.cv_results_[f"split{i}_test_distortion"][c] == pytest.approx(distortion(fitted, X[test]))
    assert search.best_bytes_ == rate(search, X)


def test_weights_reach_steps_and_measures(X):
    rng = np.random.default_rng(3)
    gram, weight = np.cov(rng.normal(size=(50, X.shape[1])) @ rng.normal(size=(18, 18)), rowvar=False), rng.random(60)
    search = CompressionSearchCV(KMeansWeightSharer(coder="packed"), {"n_clusters": [2, 4]}, max_bytes=10_000)
    search.fit(X, sample_weight=weight, input_gram=gram)
    direct = KMeansWeightSharer(4, random_state=search.best_estimator_.random_state)
    direct.fit(X, sample_weight=weight, input_gram=gram)
    assert np.array_equal(direct.cluster_centers_, search.best_estimator_.cluster_centers_)
    assert search.best_distortion_ == distortion(direct, X, sample_weight=weight, input_gram=gram)
    assert -search.best_score_ == search.best_distortion_ < distortion(KMeansWeightSharer(4).fit(X), X,
                                                                       sample_weight=weight, input_gram=gram)
    folds = clone(search).set_params(cv=KFold(2)).fit(X, sample_weight=weight, input_gram=gram)
    train, test = next(KFold(2).split(X))
    direct.fit(X[train], sample_weight=weight[train], input_gram=gram)
    assert folds.cv_results_["split0_test_distortion"][1] == pytest.approx(
        distortion(direct, X[test], sample_weight=weight[test], input_gram=gram))
    with pytest.raises(ValueError, match="several groups needs all rows"):
        folds.fit(X, input_gram=np.stack([gram, gram]))


def test_fit_parameters_by_step(X):
    weight = np.r_[np.ones(10), np.zeros(50)]
    search = CompressionSearchCV(two_steps(), {"share__n_clusters": [2, 3]}, refit=elbow)
    search.fit(X, share__sample_weight=weight)
    direct = two_steps().set_params(**search.best_params_).fit(X, share__sample_weight=weight)
    assert np.array_equal(direct["share"].cluster_centers_, search.best_estimator_["share"].cluster_centers_)


def test_limits(X):
    loose = CompressionSearchCV(two_steps(), GRID, max_distortion=0.1).fit(X)
    assert loose.best_index_ == smallest_within(0.1)(loose.cv_results_)
    assert loose.choice_ == "the fewest bytes with a distortion of at most 0.1"
    small = CompressionSearchCV(two_steps(), GRID, max_bytes=500).fit(X)
    assert small.best_index_ == best_under(500)(small.cv_results_)
    both = CompressionSearchCV(two_steps(), GRID, max_bytes=loose.best_bytes_, max_distortion=0.1).fit(X)
    assert both.best_index_ == loose.best_index_
    plain = CompressionSearchCV(two_steps(), GRID).fit(X)
    assert plain.best_index_ == elbow(plain.cv_results_)
    assert plain.choice_ == elbow.explain(plain.cv_results_, plain.best_index_)
    with pytest.raises(ValueError, match="no candidate reaches a distortion of at most 1e-06"):
        CompressionSearchCV(two_steps(), GRID, max_distortion=1e-6).fit(X)
    with pytest.raises(ValueError, match=r"only with refit='auto', got refit=elbow and max_bytes=500"):
        CompressionSearchCV(two_steps(), GRID, max_bytes=500, refit=elbow).fit(X)
    with pytest.raises(ValueError, match="max_distortion"):
        CompressionSearchCV(two_steps(), GRID, max_distortion=-1.0).fit(X)


def test_other_scorings(X):
    one = CompressionSearchCV(two_steps(), GRID, scoring=rate_distortion_scorer(0.02)).fit(X)
    assert one.best_index_ == one.cv_results_["mean_test_score"].argmax()
    assert one.best_score_ == one.score(X) == one.cv_results_["mean_test_score"].max()
    assert one.choice_ == "the best score"

    two = CompressionSearchCV(two_steps(), GRID, scoring={"rate": rate_scorer, "distortion": distortion_scorer},
                              max_bytes=500).fit(X)
    full = CompressionSearchCV(two_steps(), GRID, max_bytes=500).fit(X)
    assert np.array_equal(-two.cv_results_["mean_test_rate"], full.cv_results_["mean_test_bytes"])
    assert two.best_index_ == full.best_index_
    assert two.best_score_ == full.best_score_ == two.score(X)

    named = CompressionSearchCV(two_steps(), GRID, refit="distortion").fit(X)
    assert named.best_distortion_ == named.cv_results_["mean_test_distortion"].min()
    own = CompressionSearchCV(two_steps(), GRID, scoring=last_step_alone).fit(X)
    naive = GridSearchCV(two_steps(), GRID, scoring=None, cv=WholeMatrixSplit()).fit(X)
    assert np.allclose(own.cv_results_["mean_test_score"], naive.cv_results_["mean_test_score"])
    with pytest.raises(ValueError, match=r"refit must be set to a scorer key|refit must be a rule"):
        CompressionSearchCV(two_steps(), GRID, refit="size").fit(X)


def last_step_alone(estimator, X, y=None):
    return estimator.score(X)


def test_search_without_refit(X):
    search = CompressionSearchCV(two_steps(), GRID, refit=False).fit(X)
    assert len(search.cv_results_["params"]) == 8
    assert not hasattr(search, "best_estimator_")
    with pytest.raises(AttributeError):
        search.transform(X)
    with pytest.raises(AttributeError, match="refit=False"):
        search.score(X)


@pytest.mark.filterwarnings("ignore:One or more of the test scores are non-finite")
def test_failing_candidates(X):
    steps = Pipeline([("round", Broken()), ("share", KMeansWeightSharer(coder="packed"))])
    search = CompressionSearchCV(steps, GRID)
    with pytest.warns(FitFailedWarning, match="two bits are too few"):
        search.fit(X)
    assert np.isnan(search.cv_results_["mean_test_bytes"]).tolist() == [True] * 4 + [False] * 4
    assert search.best_params_["round__n_bits"] == 6
    assert set(search.cv_results_["rank_test_bytes"][:4]) == {5}
    with pytest.raises(RuntimeError, match="two bits are too few"):
        CompressionSearchCV(steps, GRID, error_score="raise").fit(X)
    with pytest.raises(ValueError, match="All the 4 fits failed"):
        CompressionSearchCV(steps, {"round__n_bits": [2], "share__n_clusters": [2, 3, 4, 5]}).fit(X)


def test_before_and_after_fit(X):
    search = CompressionSearchCV(two_steps(), GRID, max_bytes=500)
    with pytest.raises(NotFittedError):
        search.transform(X)
    with pytest.raises(NotFittedError):
        search.score(X)
    assert search.set_params(max_bytes=400, estimator__round__n_bits=3).get_params()["max_bytes"] == 400
    search.fit(X)
    copy = pickle.loads(pickle.dumps(search))
    assert np.array_equal(copy.inverse_transform(copy.transform(X)), search.inverse_transform(search.transform(X)))
    assert copy.score(X) == search.score(X)
    assert copy.best_tensor_.nbytes == search.best_tensor_.nbytes
    assert search.n_features_in_ == X.shape[1]
    assert not hasattr(clone(search), "cv_results_")
    assert search.estimator.steps[0][1].n_bits == 3
    assert search.best_estimator_.memory is None
    assert np.array_equal(clone(search).fit_transform(X), search.transform(X))


@parametrize_with_checks([
    CompressionSearchCV(KMeansWeightSharer(), {"n_clusters": [2, 3]}, error_score="raise"),
    CompressionSearchCV(two_steps(), {"share__n_clusters": [2, 3]}, error_score="raise"),
])
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def test_a_pipeline_keeps_its_own_memory(X, tmp_path):
    steps = two_steps().set_params(memory=str(tmp_path))
    search = CompressionSearchCV(steps, GRID).fit(X)
    assert search.best_estimator_.memory == str(tmp_path)
    assert any(tmp_path.iterdir())


# --- parallel -----------------------------------------------------------------------------------------


def assert_same_in_parallel(X, n_jobs=None):
    alone = CompressionSearchCV(two_steps(), GRID, max_bytes=500, n_jobs=1, random_state=0).fit(X)
    together = clone(alone).set_params(n_jobs=n_jobs).fit(X)
    for name in ("bytes", "distortion", "kappa"):
        assert np.array_equal(alone.cv_results_[f"mean_test_{name}"], together.cv_results_[f"mean_test_{name}"])
    assert alone.best_bytes_ == together.best_bytes_
    assert np.array_equal(alone.transform(X), together.transform(X))


def test_threads(X):
    with joblib.parallel_config(backend="threading"):
        assert_same_in_parallel(X, n_jobs=3)


@pytest.mark.slow
def test_processes(X):
    assert_same_in_parallel(X, n_jobs=2)


@pytest.mark.distributed
def test_dask(X):
    distributed = pytest.importorskip("distributed")
    with (distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
          distributed.Client(cluster), joblib.parallel_config(backend="dask")):
        assert_same_in_parallel(X)


@pytest.mark.distributed
def test_ray(X):
    ray = pytest.importorskip("ray")
    from ray.util.joblib import register_ray

    ray.init(num_cpus=2, include_dashboard=False)
    try:
        register_ray()
        with joblib.parallel_config(backend="ray"):
            assert_same_in_parallel(X)
    finally:
        ray.shutdown()


# --- callbacks ----------------------------------------------------------------------------------------


class Recorder:
    """Callback that every level passes on; `events` is shared by its copies."""

    max_propagation_depth = None

    def __init__(self, stop_after=None):
        self.events, self.stop_after = [], stop_after

    def setup(self, estimator, context):
        self.events.append(("setup", context.estimator_name))

    def teardown(self, estimator, context):
        self.events.append(("teardown", context.estimator_name))

    def on_fit_task_begin(self, estimator, context):
        self.events.append(("begin", context.estimator_name, context.task_name))

    def on_fit_task_end(self, estimator, context, *, fitted_estimator=None):
        share = getattr(fitted_estimator, "share_", None)
        self.events.append(("end", context.estimator_name, context.task_name, share))
        return context.task_name == "iteration" and context.task_id + 1 == self.stop_after


def count(events, *start):
    return sum(event[: len(start)] == start for event in events)


def test_iterations_are_reported(X):
    pytest.importorskip("sklearn.callback")
    recorder = Recorder()
    estimator = Counting().set_callbacks(recorder).fit(X)
    assert [e[3] for e in recorder.events if e[0] == "end"] == [1 / 3, 2 / 3, 1.0, 1.0]
    assert count(recorder.events, "setup") == count(recorder.events, "teardown") == 1
    assert not [k for k in vars(estimator) if "callback" in k and k != "_skl_callbacks"]

    stopped = Counting().set_callbacks(Recorder(stop_after=2)).fit(X)
    assert stopped.n_iter_ == 2
    assert Counting().fit(X).n_iter_ == 3


def test_a_fit_without_iterations_is_one_task(X):
    pytest.importorskip("sklearn.callback")
    recorder = Recorder()
    MantissaRounder().set_callbacks(recorder).fit(X)
    assert recorder.events == [("setup", "MantissaRounder"), ("begin", "MantissaRounder", "fit"),
                               ("end", "MantissaRounder", "fit", None), ("teardown", "MantissaRounder")]


def test_a_failing_fit_is_torn_down(X):
    pytest.importorskip("sklearn.callback")
    recorder = Recorder()
    estimator = KMeansWeightSharer(vector_size=7).set_callbacks(recorder)
    with pytest.raises(ValueError, match="vector_size"):
        estimator.fit(X)
    assert not [k for k in vars(estimator) if "callback" in k and k != "_skl_callbacks"]
    estimator.set_params(vector_size=1).fit(X)
    assert count(recorder.events, "end") == 1


@pytest.mark.parametrize("make", [
    lambda steps, grid: GridSearchCV(steps, grid, cv=WholeMatrixSplit(), scoring=compression_scorer, refit=elbow),
    CompressionSearchCV])
def test_one_callback_serves_search_pipeline_and_estimator(X, make):
    pytest.importorskip("sklearn.callback")
    steps = Pipeline([("a", Counting()), ("share", KMeansWeightSharer(coder="packed"))])
    recorder = Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no step is said not to support callbacks
        search = make(steps, {"share__n_clusters": [2, 3]}).set_callbacks(recorder).fit(X)
    name = type(search).__name__
    assert count(recorder.events, "setup") == count(recorder.events, "teardown") == 1
    assert recorder.events[0] == ("setup", name)
    assert recorder.events[-1] == ("teardown", name)
    for task in ("fit", "search"):
        assert count(recorder.events, "begin", name, task) == count(recorder.events, "end", name, task) == 1
    # two candidates and the refit; what comes from memory has no iterations of its own
    assert count(recorder.events, "end", "Pipeline", "fit") == 3
    assert count(recorder.events, "end", "KMeansWeightSharer", "fit") == 3
    assert count(recorder.events, "end", "Counting", "iteration") == (9 if name == "GridSearchCV" else 6)


@pytest.mark.parametrize("depth", [1, None])
def test_progress_bar(X, capsys, depth):
    pytest.importorskip("sklearn.callback")
    pytest.importorskip("rich")
    from sklearn.callback import ProgressBar

    steps = Pipeline([("a", Counting()), ("share", KMeansWeightSharer(coder="packed"))])
    for search in (GridSearchCV(steps, {"share__n_clusters": [2, 3]}, cv=WholeMatrixSplit(), scoring=distortion_scorer),
                   CompressionSearchCV(steps, {"share__n_clusters": [2, 3]})):
        search.set_callbacks(ProgressBar(max_propagation_depth=depth)).fit(X)
        lines = capsys.readouterr().out.splitlines()
        assert any(type(search).__name__ in line for line in lines)
        bars = [line for line in lines if "%" in line]
        assert len(bars) >= 5
        assert all("100%" in bar for bar in bars)


def test_scoring_monitor(X):
    callback = pytest.importorskip("sklearn.callback")
    monitor = callback.ScoringMonitor(scoring=compression_scorer)
    Counting().set_callbacks(monitor).fit(X, sample_weight=np.ones(len(X)))
    errors = [row["distortion"] for row in monitor.get_logs().data if row["task_name"] == "iteration"]
    assert errors == pytest.approx([4 / 9, 1 / 9, 0.0], abs=1e-6)


def test_a_step_that_is_no_compressor(X):
    class Plain(BaseEstimator):
        def fit(self, X, y=None):
            self.fitted_ = True
            return self

        def transform(self, X):
            return X

    search = CompressionSearchCV(Pipeline([("p", Plain()), ("s", KMeansWeightSharer())]), {"s__n_clusters": [2]},
                                 error_score="raise")
    with pytest.raises(TypeError, match="step 'p' cannot be stored: Plain is not a skfactor compressor"):
        search.fit(X)
