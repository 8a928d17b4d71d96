"""`AutoencoderCompressor`: against PCA, autograd, MLPRegressor, and itself continued."""
# SPDX-License-Identifier: BSD-3-Clause

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import Pipeline

from skfactor import AutoencoderCompressor, KMeansWeightSharer
from skfactor.codec.container import SkfFile, SkfWriter
from skfactor.estimators import compressed_tensor
from skfactor.estimators.autoencoder import _Optimizer, _Trainer
from skfactor.solvers.mlp_start import random_start

ACTIVATIONS = ["relu", "tanh", "logistic", "identity"]


@pytest.fixture(scope="module")
def digits():
    return load_digits().data[:600]


def curve(n=300, seed=0):
    t = np.random.default_rng(seed).uniform(-1, 1, n)
    return np.c_[t, t**2, t**3, np.sin(4 * t)]


def lost(estimator, X):
    X_hat = estimator.inverse_transform(estimator.transform(X))
    return np.square(X - X_hat).sum() / np.square(X - X.mean(axis=0)).sum()


def lost_by_pca(X, n):
    return 1.0 - PCA(n, svd_solver="full").fit(X).explained_variance_ratio_.sum()


@pytest.mark.parametrize("hidden", [(), (40,), (40, 20)])
@pytest.mark.parametrize("init", ["pca", "random"])
def test_linear_autoencoder_reaches_pca_and_no_less(digits, hidden, init):
    """Eckart and Young: nothing linear lies below PCA."""
    autoencoder = AutoencoderCompressor(hidden, 8, activation="identity", init=init, random_state=0).fit(digits)
    bound = lost_by_pca(digits, 8)
    assert bound * (1 - 1e-6) <= lost(autoencoder, digits) <= bound * 1.01
    assert autoencoder.loss_ == pytest.approx(lost(autoencoder, digits), rel=1e-4)


@pytest.mark.parametrize("latent_dim", [4, 16])
def test_relu_ends_below_pca(digits, latent_dim):
    autoencoder = AutoencoderCompressor((64,), latent_dim, max_iter=20, random_state=0).fit(digits)
    assert lost(autoencoder, digits) < 0.9 * lost_by_pca(digits, latent_dim)


def test_training_that_only_harms_ends_at_the_start(digits):
    with pytest.warns(ConvergenceWarning, match="diverged"):
        autoencoder = AutoencoderCompressor((32,), 8, learning_rate_init=1e18, random_state=0).fit(digits)
    assert lost(autoencoder, digits) == pytest.approx(lost_by_pca(digits, 8), rel=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_curve_needs_one_code(activation):
    X = curve()
    autoencoder = AutoencoderCompressor((32,), 1, activation=activation, max_iter=150, random_state=0).fit(X)
    bound = lost_by_pca(X, 1)
    if activation == "identity":
        assert lost(autoencoder, X) == pytest.approx(bound, rel=1e-2)
    else:
        assert lost(autoencoder, X) < 0.5 * bound


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_gradients_are_those_of_autograd(activation, weighted, decay):
    rng = np.random.RandomState(0)
    S = rng.standard_normal((9000, 5)).astype(np.float32)  # more rows than go through at once
    weights = rng.uniform(0, 2, 9000) if weighted else None
    layers = random_start([5, 7, 6, 3, 6, 7, 5], activation, rng)
    trainer = _Trainer(layers, activation, S, weights, 9000, _Optimizer("sgd", 0.0, decay, None), torch.device("cpu"))
    loss = trainer.run_pass(torch.arange(9000))

    parameters = [[torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in part] for part in layers]
    functions = {"relu": torch.relu, "tanh": torch.tanh, "logistic": torch.sigmoid, "identity": lambda h: h}
    h = torch.from_numpy(S).double()
    for i, (W, b) in enumerate(zip(*parameters)):
        h = h @ W + b
        h = h if i in (2, 5) else functions[activation](h)
    w = 1.0 if weights is None else torch.from_numpy(weights / weights.mean())[:, None]
    expected = (w * (h - torch.from_numpy(S).double()) ** 2).mean()
    (expected + decay / 2 * sum((W**2).sum() for W in parameters[0])).backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for found, part in zip((trainer.weight_grads, trainer.bias_grads), parameters):
        for a, p in zip(found, part):
            np.testing.assert_allclose(a.numpy(), p.grad.numpy(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_weights_mean_what_they_mean_in_mlp_regressor(digits, activation):
    autoencoder = AutoencoderCompressor((20, 10), 4, activation=activation, max_iter=5, random_state=0).fit(digits)
    S = (digits - autoencoder.mean_) / autoencoder.scale_
    encoder = MLPRegressor(hidden_layer_sizes=(20, 10), activation=activation, max_iter=1)
    decoder = MLPRegressor(hidden_layer_sizes=(10, 20), activation=activation, max_iter=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        encoder.fit(S, S[:, :4])
        decoder.fit(S[:, :4], S)
    encoder.coefs_, encoder.intercepts_ = autoencoder.coefs_[:3], autoencoder.intercepts_[:3]
    decoder.coefs_, decoder.intercepts_ = autoencoder.coefs_[3:], autoencoder.intercepts_[3:]
    codes = autoencoder.transform(digits)
    np.testing.assert_allclose(codes, encoder.predict(S), rtol=1e-9, atol=1e-9)
    expected = decoder.predict(codes) * autoencoder.scale_ + autoencoder.mean_
    np.testing.assert_allclose(autoencoder.inverse_transform(codes), expected, rtol=1e-9, atol=1e-9)
    assert [W.dtype for W in autoencoder.coefs_] == [np.float32] * 6
    assert autoencoder.n_layers_ == 6


def same_weights(a, b):
    assert len(a.coefs_) == len(b.coefs_)
    for x, y in zip([*a.coefs_, *a.intercepts_], [*b.coefs_, *b.intercepts_]):
        np.testing.assert_array_equal(x, y)


def test_random_state_decides_and_torch_does_not(digits):
    fits = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        estimator = AutoencoderCompressor((16,), 3, max_iter=3, early_stopping=True, random_state=5)
        fits.append(estimator.fit(digits).partial_fit(digits))
        assert torch.equal(torch.get_rng_state(), before)
    same_weights(*fits)
    other = AutoencoderCompressor((16,), 3, max_iter=3, random_state=6).fit(digits)
    assert not np.array_equal(other.coefs_[0], fits[0].coefs_[0])


def test_default_dtype_of_torch_does_not_matter(digits):
    fits = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            fits.append(AutoencoderCompressor((16,), 3, max_iter=3, random_state=5).fit(digits))
        finally:
            torch.set_default_dtype(torch.float32)
    same_weights(*fits)


@pytest.mark.parametrize("solver", ["adam", "sgd"])
def test_warm_start_and_partial_fit_continue(solver):
    """Rows that fit into one batch: passes add up, in whatever calls they are made."""
    X = curve(150)
    settings = {"learning_rate": "constant", "n_iter_no_change": 100, "solver": solver, "learning_rate_init": 0.01,
                "random_state": 0}
    once = AutoencoderCompressor((16,), 1, max_iter=9, **settings).fit(X)
    warm = AutoencoderCompressor((16,), 1, max_iter=3, warm_start=True, **settings)
    parts = AutoencoderCompressor((16,), 1, **settings)
    for _ in range(3):
        warm.fit(X)
    for _ in range(9):
        parts.partial_fit(X)
    for continued in (warm, parts):
        for a, b in zip(once.coefs_, continued.coefs_):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert parts.n_iter_ == 9
    np.testing.assert_allclose(parts.loss_curve_, once.loss_curve_, rtol=1e-4)
    assert once.loss_curve_[-1] < once.loss_curve_[0]


def test_partial_fit_on_parts_learns(digits):
    autoencoder = AutoencoderCompressor((64,), 8, random_state=0)
    autoencoder.partial_fit(digits[:200])
    first = lost(autoencoder, digits)
    for _ in range(10):
        for start in (0, 200, 400):
            autoencoder.partial_fit(digits[start : start + 200])
    assert lost(autoencoder, digits) < 0.8 * first


def test_partial_fit_waits_for_rows_that_differ():
    X = curve(50)
    autoencoder = AutoencoderCompressor((16,), 2, random_state=0).partial_fit(X[:1])
    np.testing.assert_allclose(autoencoder.inverse_transform(autoencoder.transform(X[:1])), X[:1], rtol=1e-12)
    same_weights(autoencoder.partial_fit(X), AutoencoderCompressor((16,), 2, random_state=0).partial_fit(X))


def test_early_stopping_keeps_the_best_weights(digits):
    X = digits[:60]  # few rows and a large network: it overfits
    settings = {"early_stopping": True, "validation_fraction": 0.3, "learning_rate": "constant", "random_state": 0,
                "n_iter_no_change": 15, "learning_rate_init": 0.01, "init": "random"}
    full = AutoencoderCompressor((100,), 30, max_iter=150, **settings).fit(X)
    best = int(np.argmax(full.validation_scores_))
    assert best < full.n_iter_ - 1
    assert full.best_validation_score_ == full.validation_scores_[best]
    assert full.loss_ < 0.5 * full.loss_curve_[0]  # not those of the start
    same_weights(full, AutoencoderCompressor((100,), 30, max_iter=best + 1, **settings).fit(X))


@pytest.mark.parametrize("n_rows", [1, 2, 3])
def test_early_stopping_on_few_rows(n_rows):
    X = curve(n_rows)
    autoencoder = AutoencoderCompressor((8,), 2, early_stopping=True, max_iter=5, random_state=0).fit(X)
    assert autoencoder.inverse_transform(autoencoder.transform(X)).shape == X.shape


def test_zero_weights_remove_rows_also_from_batches(digits):
    weights = np.tile([1.0, 0.0, 2.5], 200)
    settings = {"batch_size": 32, "max_iter": 3, "random_state": 0}
    weighted = AutoencoderCompressor((16,), 3, **settings).fit(digits, sample_weight=weights)
    removed = AutoencoderCompressor((16,), 3, **settings).fit(digits[weights > 0], sample_weight=weights[weights > 0])
    same_weights(weighted, removed)


def test_weights_draw_the_error_to_heavy_rows(digits):
    weights = np.where(np.arange(600) < 100, 50.0, 1.0)
    plain, weighted = (AutoencoderCompressor((32,), 4, max_iter=30, random_state=0).fit(digits, sample_weight=w)
                       for w in (None, weights))
    assert weighted.score(digits[:100]) > plain.score(digits[:100])


def test_large_offset_and_tiny_spread():
    X = 1e9 + 1e-3 * curve(200)
    autoencoder = AutoencoderCompressor((32,), 2, max_iter=100, random_state=0).fit(X)
    assert np.abs(autoencoder.inverse_transform(autoencoder.transform(X)) - X).max() < 5e-4
    assert np.isfinite(AutoencoderCompressor((4,), 2, max_iter=2).fit(curve(30) * 1e200).loss_)


def test_sub_vectors_are_rows():
    X = np.random.default_rng(0).standard_normal((40, 12)).astype(np.float32)
    split = AutoencoderCompressor((8,), 2, vector_size=4, max_iter=4, random_state=0).fit(X)
    rows = AutoencoderCompressor((8,), 2, max_iter=4, random_state=0).fit(X.reshape(120, 4))
    same_weights(split, rows)
    codes = split.transform(X)
    np.testing.assert_array_equal(codes, rows.transform(X.reshape(120, 4)).reshape(40, 6))
    np.testing.assert_array_equal(split.inverse_transform(codes),
                                  rows.inverse_transform(codes.reshape(120, 2)).reshape(40, 12))
    assert len(split.get_feature_names_out()) == 6


def test_quantised_codes_in_a_file(tmp_path, digits):
    pipeline = Pipeline([("encode", AutoencoderCompressor((32,), 8, max_iter=20, random_state=0)),
                         ("share", KMeansWeightSharer(16, granularity="column"))]).fit(digits)
    tensor = compressed_tensor(pipeline, digits)
    with SkfWriter(tmp_path / "x.skf") as writer:
        writer.add("x", tensor)
    found = SkfFile(tmp_path / "x.skf").read("x").to_array()
    np.testing.assert_array_equal(found, tensor.to_array())
    np.testing.assert_array_equal(found, pipeline.inverse_transform(pipeline.transform(digits)).astype(np.float32))


class Recorder:
    """A callback of scikit-learn that keeps what every pass could reconstruct."""

    def __init__(self, stop_after=None):
        self.stop_after = stop_after
        self.scores = []

    max_propagation_depth = None

    def setup(self, estimator, context):
        pass

    def teardown(self, estimator, context):
        pass

    def on_fit_task_begin(self, estimator, context):
        pass

    def on_fit_task_end(self, estimator, context, *, X=None, fitted_estimator=None):
        if context.task_name != "iteration":
            return False
        self.scores.append(fitted_estimator.score(X))
        return len(self.scores) == self.stop_after


def test_callbacks_follow_the_passes_and_may_stop_them(digits):
    pytest.importorskip("sklearn.callback")
    recorder = Recorder(stop_after=4)
    autoencoder = AutoencoderCompressor((16,), 3, max_iter=9, random_state=0).set_callbacks(recorder).fit(digits)
    assert autoencoder.n_iter_ == len(recorder.scores) == 4
    assert autoencoder.score(digits) == pytest.approx(recorder.scores[-1], rel=1e-6)
    assert recorder.scores[-1] > recorder.scores[0]


def test_progress_bar_is_off_unless_asked_for(capsys):
    for verbose, shown in ((False, False), (True, True)):
        AutoencoderCompressor((4,), 1, max_iter=2, verbose=verbose, random_state=0).fit(curve(30))
        assert ("autoencoder" in capsys.readouterr().err) == shown


@pytest.mark.parametrize(
    ("params", "X", "message"),
    [
        ({"hidden_layer_sizes": (3, 0)}, curve(20), "hidden_layer_sizes must be integers of at least 1"),
        ({"hidden_layer_sizes": (3.5,)}, curve(20), "hidden_layer_sizes must be integers of at least 1"),
        ({"vector_size": 3}, curve(20), "vector_size must divide the 4 columns of X, got 3"),
        ({"device": "abacus"}, curve(20), "device must be 'auto' or a torch device, got 'abacus'"),
        ({"activation": "swish"}, curve(20), "activation"),
        ({"latent_dim": 0}, curve(20), "latent_dim"),
    ],
)
def test_wrong_parameters(params, X, message):
    estimator = AutoencoderCompressor(**({"max_iter": 1} | params))
    with pytest.raises(ValueError, match=message) as caught:
        estimator.fit(X)
    assert "\n" not in str(caught.value)


def test_weight_decay_shrinks_weights(digits):
    free, decayed = (AutoencoderCompressor((16,), 4, alpha=a, max_iter=20, init="random", random_state=0).fit(digits)
                     for a in (0.0, 50.0))
    assert sum(np.square(W).sum() for W in decayed.coefs_) < 0.8 * sum(np.square(W).sum() for W in free.coefs_)


def test_one_hidden_layer_may_be_an_int():
    fits = [AutoencoderCompressor(h, 1, max_iter=2, random_state=0).fit(curve(30)) for h in (6, (6,))]
    same_weights(*fits)


def test_warm_start_with_other_layers_is_refused():
    autoencoder = AutoencoderCompressor((4,), 1, max_iter=1, warm_start=True).fit(curve(30))
    with pytest.raises(ValueError, match=r"the layers must be those of the fit before, \[4, 4, 1, 4, 4\]"):
        autoencoder.set_params(latent_dim=2).fit(curve(30))


def test_absent_gpu_is_named():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        AutoencoderCompressor(device="cuda").fit(curve(30))


def test_other_estimators_do_not_import_torch():
    code = ("import sys, skfactor.estimators as e; from skfactor import KMeansWeightSharer; "
            "print('torch' in sys.modules, 'AutoencoderCompressor' in e.__all__)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).resolve().parents[2])
    assert done.stdout.split() == ["False", "True"]
