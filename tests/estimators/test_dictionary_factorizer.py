"""`DictionaryFactorizer`: its objective, units of alpha, certificates, output metric, streams and storage."""
# SPDX-License-Identifier: BSD-3-Clause

import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.decomposition import sparse_encode
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import Pipeline

from skfactor import DictionaryFactorizer, KMeansWeightSharer
from skfactor.estimators import compressed_tensor


def digits(n=300):
    X = load_digits().data[:n]
    return (X - X.mean(axis=0)) / X.std()


def reconstruct(estimator, X):
    return estimator.inverse_transform(estimator.transform(X))


def gram_of(rng, d, n, seed):
    """Second moment of n correlated inputs."""
    mix = np.random.default_rng(seed).normal(size=(d, d)) * np.geomspace(1, 0.02, d)[:, None]
    U = rng.normal(size=(n, d)) @ mix
    return U.T @ U / n


def output_error(X, X_hat, grams):
    parts = zip(np.split(X - X_hat, len(grams)), grams)
    return sum(float(np.einsum("nd,de,ne->", E, G, E)) for E, G in parts)


def test_attributes_are_those_of_the_definition():
    X = digits()
    fitted = DictionaryFactorizer(24, random_state=0).fit(X)
    codes = sparse_encode(X, fitted.components_, algorithm="lasso_cd", alpha=fitted.alpha_, max_iter=5000)
    norm = np.linalg.norm(X - codes @ fitted.components_)
    objective = 0.5 * norm**2 + fitted.alpha_ * np.abs(codes).sum()
    assert fitted.alpha_ == pytest.approx(np.sqrt(np.mean(X**2)))
    assert fitted.alpha_max_ == pytest.approx(np.linalg.norm(X, axis=1).max())
    assert fitted.objective_ == pytest.approx(objective, rel=1e-5)
    assert fitted.objective_ <= fitted.objective_trace_[-1] * (1 + 1e-6)
    assert fitted.course_alpha_ == pytest.approx(fitted.alpha_ / norm, rel=1e-4)
    assert fitted.course_objective_ == pytest.approx(norm + fitted.course_alpha_ * np.abs(codes).sum(), rel=1e-4)
    assert fitted.density_ == pytest.approx(np.mean(codes != 0), rel=0.01)
    assert 0 <= fitted.duality_gap_ < 1e-5
    assert 0 < fitted.stationarity_ < 5e-3
    assert len(fitted.objective_trace_) == fitted.n_iter_
    assert (np.diff(fitted.objective_trace_) <= 0).all()
    np.testing.assert_allclose(np.linalg.norm(fitted.components_, axis=1), 1)


def test_the_gap_bounds_what_better_codes_could_gain():
    X = digits(100)
    fitted = DictionaryFactorizer(24, random_state=0).fit(X)
    coder = fitted._coder
    codes = fitted.transform(X) * 0.9  # not optimal
    costs = coder.costs(X, codes)
    now = 0.5 * costs.squared_error + fitted.alpha_ * costs.norm
    exact = sparse_encode(X, fitted.components_, algorithm="lasso_cd", alpha=fitted.alpha_, max_iter=10000)
    best = 0.5 * np.square(X - exact @ fitted.components_).sum(axis=1) + fitted.alpha_ * np.abs(exact).sum(axis=1)
    assert (costs.gap >= (now - best) * (1 - 1e-6)).all()


@pytest.mark.parametrize(("unit", "factor"), [("rms", 1.0), ("max", 1.0), ("absolute", 100.0)])
def test_alpha_at_another_scale(unit, factor):
    X, alpha = digits(100), 0.3
    small, large = (DictionaryFactorizer(10, alpha=a, alpha_unit=unit, random_state=0).fit(Y)
                    for a, Y in ((alpha, X), (alpha * factor, 100 * X)))
    assert large.alpha_ == pytest.approx(100 * small.alpha_)
    assert large.objective_ == pytest.approx(1e4 * small.objective_, rel=0.02)


def test_alpha_max_makes_all_codes_zero_and_less_does_not():
    X = digits(60)  # with 80 atoms every row is one
    for loss in ("squared", "root"):
        at, below = (DictionaryFactorizer(80, alpha=a, alpha_unit="max", loss=loss, random_state=0).fit(X)
                     for a in (1.0, 0.9))
        assert at.density_ == 0
        assert at.objective_ == pytest.approx(0.5 * np.square(X).sum())
        assert below.density_ > 0


def test_root_loss_minimises_the_courses_error():
    """At the alpha it reports, the squared loss cannot do better in the course's error than the root loss itself."""
    X = digits()
    root = DictionaryFactorizer(16, alpha=0.015, loss="root", tol=1e-7, random_state=0).fit(X)
    assert root.course_alpha_ == 0.015
    squared = DictionaryFactorizer(16, alpha=root.alpha_, alpha_unit="absolute", tol=1e-7, random_state=0).fit(X)
    assert squared.course_alpha_ == pytest.approx(0.015, rel=0.02)
    assert squared.course_objective_ == pytest.approx(root.course_objective_, rel=0.01)
    assert root.course_objective_ == pytest.approx(root.objective_trace_[-1], rel=1e-4)


def test_constant_matrix_is_shrunk_by_its_price():
    X = np.full((6, 16), 2.0)  # each row of norm 8; one atom serves all
    fitted = DictionaryFactorizer(1, alpha=2.0, alpha_unit="absolute").fit(X)
    np.testing.assert_allclose(reconstruct(fitted, X), X * (8 - 2) / 8, rtol=1e-6)


def test_sub_vectors_share_the_atoms():
    X = digits()
    whole = DictionaryFactorizer(12, alpha=0.5, alpha_unit="absolute", random_state=0).fit(X.reshape(-1, 16))
    parts = DictionaryFactorizer(12, alpha=0.5, alpha_unit="absolute", vector_size=16, random_state=0).fit(X)
    np.testing.assert_array_equal(parts.components_, whole.components_)
    np.testing.assert_array_equal(parts.transform(X).reshape(-1, 12), whole.transform(X.reshape(-1, 16)))
    assert parts.get_feature_names_out().shape == (48,)


def test_omp_codes_have_their_number_of_non_zeros():
    X = digits(120)
    errors = []
    for n_nonzero in (1, 3, 500):
        fitted = DictionaryFactorizer(70, code_solver="omp", n_nonzero_coefs=n_nonzero, random_state=0).fit(X)
        codes = fitted.transform(X)
        assert (codes != 0).sum(axis=1).max() <= min(n_nonzero, 64)
        greedy = sparse_encode(X, fitted.components_, algorithm="omp", n_nonzero_coefs=min(n_nonzero, 64))
        ours, theirs = (np.square(X - U @ fitted.components_).sum() for U in (codes, greedy))
        assert ours <= theirs * 1.02
        errors.append(-fitted.score(X))
        assert np.isnan(fitted.duality_gap_)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-12


def test_signs():
    X = digits()
    fitted = DictionaryFactorizer(12, positive_code=True, positive_dict=True, random_state=0).fit(X - X.min())
    assert fitted.components_.min() >= 0
    assert fitted.transform(X - X.min()).min() >= 0


def test_path_is_that_of_single_solves_and_falls_in_sparsity():
    X = digits(100)
    fitted = DictionaryFactorizer(24, random_state=0).fit(X)
    alphas = [3.0, 1.0, 0.3]
    path = list(fitted.alpha_path(X, alphas))
    np.testing.assert_allclose(path[1], fitted.transform(X), atol=2e-3)
    for alpha, codes in zip(alphas, path):
        price = alpha * fitted.alpha_  # alpha is 1
        exact = sparse_encode(X, fitted.components_, algorithm="lasso_cd", alpha=price, max_iter=5000)
        values = [0.5 * np.square(X - U @ fitted.components_).sum() + price * np.abs(U).sum() for U in (codes, exact)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert np.count_nonzero(path[0]) < np.count_nonzero(path[1]) < np.count_nonzero(path[2])
    with pytest.raises(ValueError, match="alphas must be finite"):
        fitted.alpha_path(X, [-1.0])


@pytest.mark.parametrize("n_groups", [1, 2])
@pytest.mark.parametrize("options", [
    {"vector_size": 9, "code_solver": "omp", "n_nonzero_coefs": 1},
    {"vector_size": 9, "alpha": 0.5},
    {"code_solver": "omp", "n_nonzero_coefs": 3},
], ids=str)
def test_input_gram_lowers_the_output_error(options, n_groups):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(40, 18))
    seen, held_back = (np.stack([gram_of(rng, 18, 2000, seed) for seed in range(n_groups)]) for _ in range(2))
    plain = DictionaryFactorizer(8, random_state=0, **options).fit(X)
    output = clone(plain).fit(X, input_gram=seen if n_groups > 1 else seen[0])
    for grams in (seen, held_back):
        before, after = (output_error(X, reconstruct(f, X), grams) for f in (plain, output))
        assert after < before
    assert output.output_error_ == pytest.approx(output_error(X, reconstruct(output, X), seen), rel=1e-6)
    assert plain.output_error_ is None


def test_price_with_a_gram_of_inputs_that_do_not_depend_on_each_other():
    """Directions of scales 1 and 4: the price is that of X times 2 over the root mean square of the scales."""
    X = np.random.default_rng(0).normal(size=(40, 8))
    scales = np.tile([1.0, 4.0], 4)
    plain = DictionaryFactorizer(8, random_state=0).fit(X)
    output = DictionaryFactorizer(8, random_state=0).fit(X, input_gram=np.diag(scales**2))
    assert output.alpha_ == pytest.approx(plain.alpha_ * 2 / np.sqrt(np.mean(scales**2)), rel=0.01)  # damped


def test_codes_of_sub_vectors_are_optimal_for_the_output():
    """The lasso over all sub-vectors at once, solved by scikit-learn on the whitened row."""
    rng = np.random.default_rng(1)
    X, gram = rng.normal(size=(10, 8)), gram_of(rng, 8, 100, 0)
    fitted = DictionaryFactorizer(5, vector_size=4, alpha=0.5, alpha_unit="absolute", random_state=0)
    fitted.fit(X, input_gram=gram)
    metric = fitted._coder.grams[0]
    root = np.linalg.cholesky(metric)
    atoms = np.kron(np.eye(2), fitted.components_) @ root
    exact = sparse_encode(X @ root, atoms, algorithm="lasso_cd", alpha=fitted.alpha_, max_iter=100_000)

    def value(U):
        return 0.5 * np.square(X @ root - U @ atoms).sum() + fitted.alpha_ * np.abs(U).sum()

    assert value(fitted.transform(X)) == pytest.approx(value(exact), rel=1e-3)
    assert value(fitted.transform(X)) == pytest.approx(fitted.objective_, rel=1e-6)


def test_grams_of_groups_need_their_rows():
    rng = np.random.default_rng(1)
    X = rng.normal(size=(8, 6))
    grams = np.stack([gram_of(rng, 6, 50, seed) for seed in (0, 1)])
    fitted = DictionaryFactorizer(4, random_state=0).fit(X, input_gram=grams)
    with pytest.raises(ValueError, match="each of the 2 groups"):
        fitted.transform(X[:3])


def test_mini_batches_come_close_to_all_rows():
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(12, 9))
    X = np.where(rng.random((20_000, 12)) < 0.2, rng.normal(size=(20_000, 12)), 0) @ atoms
    batches, whole = (DictionaryFactorizer(16, alpha=0.3, batch_size=b, random_state=0).fit(X[:n])
                      for b, n in (("auto", 20_000), (None, 4000)))
    other = X[10_000:]
    assert batches.score(other) > whole.score(other) - 0.02
    assert (np.diff(batches.objective_trace_) <= 0).all()


def test_stream():
    X = digits(1000)
    stream = DictionaryFactorizer(24, random_state=0)
    for start in range(0, 1000, 100):
        stream.partial_fit(X[start : start + 100])
    assert stream.n_iter_ == 10
    start, whole = (DictionaryFactorizer(24, random_state=0, max_iter=n) for n in (1, 100))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        start.fit(X)
    whole.fit(X)

    def objective(V):
        U = sparse_encode(X, V, algorithm="lasso_cd", alpha=1.0)
        return 0.5 * np.square(X - U @ V).sum() + np.abs(U).sum()

    first, streamed, best = (objective(f.components_) for f in (start, stream, whole))
    assert best < streamed < first * 1.05
    again = stream.partial_fit(X[:100])
    assert again.n_iter_ == 11
    assert reconstruct(again, X).shape == X.shape


def test_warm_start_goes_on():
    X = digits()
    short = DictionaryFactorizer(24, max_iter=3, warm_start=True, random_state=0)
    with pytest.warns(ConvergenceWarning, match="max_iter=3"):
        first = short.fit(X).objective_
    with pytest.warns(ConvergenceWarning):
        assert short.fit(X).objective_ < first


def test_more_starts_are_never_worse():
    X = digits()
    one, four = (DictionaryFactorizer(12, n_init=n, random_state=3).fit(X).objective_ for n in (1, 4))
    assert four <= one * (1 + 1e-6)


def test_order_and_repetition_of_rows_do_not_matter():
    X = digits(60).astype(np.float32)
    counts = np.random.default_rng(0).integers(1, 4, 60)
    repeated = np.repeat(X, counts, axis=0)
    one = DictionaryFactorizer(12, random_state=0).fit(X, sample_weight=counts)
    other = DictionaryFactorizer(12, random_state=0).fit(repeated[np.random.default_rng(1).permutation(len(repeated))])
    np.testing.assert_array_equal(one.components_, other.components_)
    assert one.objective_ == pytest.approx(other.objective_)


def test_codes_are_shared_after_the_dictionary():
    """Codes in a Pipeline: zeros stay zero, the rest are shared values, and the whole is stored."""
    X = digits(100).astype(np.float32)
    pipe = Pipeline([("dict", DictionaryFactorizer(16, random_state=0)),
                     ("share", KMeansWeightSharer(16, preserve_zeros=True))]).fit(X)
    codes = pipe[:-1].transform(X)
    shared = pipe[-1].inverse_transform(pipe.transform(X))
    assert (shared[codes == 0] == 0).all()
    tensor = compressed_tensor(pipe, X)
    np.testing.assert_array_equal(tensor.to_array(), pipe.inverse_transform(pipe.transform(X)))
    assert tensor.nbytes < X.nbytes / 2


@pytest.mark.parametrize(("params", "message"), [
    ({"vector_size": 5}, "vector_size must divide the 64 columns of X, got 5"),
    ({"code_solver": "omp", "loss": "root"}, "loss='root' needs code_solver='lasso', got 'omp'"),
])
def test_bad_parameters(params, message):
    with pytest.raises(ValueError, match=message):
        DictionaryFactorizer(**params).fit(digits(20))


def test_path_needs_the_lasso():
    fitted = DictionaryFactorizer(4, code_solver="omp").fit(digits(20))
    with pytest.raises(ValueError, match="alpha_path needs code_solver='lasso'"):
        fitted.alpha_path(digits(20), [1.0])
