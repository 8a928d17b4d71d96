# SPDX-License-Identifier: BSD-3-Clause
"""`SoftWeightSharer`: planted values, the certificate, brute-force responsibilities, exact zeros."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from skfactor import MagnitudePruner, SoftWeightSharer
from skfactor.codec.container import SkfFile, SkfWriter
from skfactor.estimators import compressed_tensor
from skfactor.estimators.soft_sharer import precision_prior

VALUES = np.array([-0.4, 0.0, 0.2, 0.5])


def planted(shape=(60, 50), seed=0, sd=0.01):
    rng = np.random.default_rng(seed)
    labels = rng.choice(4, shape, p=[0.05, 0.85, 0.05, 0.05])
    return VALUES[labels] + sd * rng.standard_normal(shape), labels


def test_planted_values_are_found():
    X, labels = planted()
    sharer = SoftWeightSharer(n_components=12, zero_weight=None, prior_std=0.1, zero_prior_std=0.1,
                              merge_divergence=0.5).fit(X)
    np.testing.assert_allclose(sharer.cluster_centers_[:, 0], VALUES, atol=0.003)
    np.testing.assert_array_equal(sharer.labels_, labels)
    np.testing.assert_allclose(sharer.sparsity_, 0.85, atol=0.02)


@pytest.mark.parametrize("zero_weight", [0.5, 0.999, None])
@pytest.mark.parametrize("shape", [(40, 30), (300, 200)])
def test_likelihood_never_falls(zero_weight, shape):
    X = np.random.default_rng(1).standard_t(4, shape)
    trace = SoftWeightSharer(9, zero_weight=zero_weight, tol=0, max_iter=50).fit(X).log_likelihood_trace_
    assert len(trace) == 51 or np.ptp(trace[-2:]) == 0
    assert (np.diff(trace) >= -1e-9 * abs(trace[0])).all()
    assert trace[-1] > trace[0]


def test_the_end_is_a_stationary_point():
    """By autograd of the penalised likelihood, written out; priors as strong as the few data there are."""
    x = np.random.default_rng(3).standard_t(4, (6, 10))
    sharer = SoftWeightSharer(3, zero_weight=None, prior_std=0.4, prior_shape=3.0, zero_prior_std=0.3,
                              zero_prior_shape=2.0, merge_divergence=0.0, tol=0, max_iter=5000).fit(x)
    prior = precision_prior(sharer, np.sqrt(np.mean(x**2)))
    pi, mu, log_t = (torch.tensor(v, requires_grad=True)
                     for v in (sharer.weights_, sharer.means_, np.log(sharer.precisions_)))
    joint = pi.log() + 0.5 * (log_t - log_t.exp() * (torch.tensor(x.reshape(-1, 1)) - mu) ** 2 - np.log(2 * np.pi))
    hyper = torch.tensor(prior.shape - 1) * log_t - torch.tensor(prior.rate) * log_t.exp()
    objective = torch.logsumexp(joint, 1).sum() + hyper.sum()
    assert objective.item() == pytest.approx(sharer.log_likelihood_trace_[-1], rel=1e-9)
    by_pi, by_mu, by_log_t = torch.autograd.grad(objective, (pi, mu, log_t))
    np.testing.assert_allclose(by_pi, x.size, rtol=1e-4)  # Lagrange multiplier of weights that sum to 1
    np.testing.assert_allclose(by_mu[1:], 0, atol=1e-3)
    np.testing.assert_allclose(by_log_t, 0, atol=1e-3)


def test_bins_keep_second_moments():
    """One far outlier makes the bins wider than the other weights' standard deviation; their precision stays exact."""
    X = np.random.default_rng(7).standard_normal((200, 200))
    X[0, 0] = 2e4
    options = {"prior_std": 1e-3, "prior_shape": 1.0, "zero_prior_std": 1e-3, "zero_prior_shape": 1.0}
    sharer = SoftWeightSharer(2, zero_weight=None, merge_divergence=0.0, tol=0, **options).fit(X)
    others = X.reshape(-1)[1:]
    expected = others.size / (np.square(others).sum() + 2 * 1e-6 * np.mean(X**2))
    assert sharer.precisions_[0] == pytest.approx(expected, rel=1e-6)


def test_codes_are_the_largest_responsibilities():
    X = np.random.default_rng(2).standard_t(4, (30, 40))
    sharer = SoftWeightSharer(8, zero_weight=0.8).fit(X)
    pi, mu, t = sharer.weights_, sharer.means_, sharer.precisions_
    best = (np.log(pi) + norm.logpdf(X.reshape(-1, 1), mu, t**-0.5)).argmax(axis=1)
    restored = sharer.inverse_transform(sharer.labels_).reshape(-1)
    for k in np.unique(best):
        members = X.reshape(-1)[best == k]
        np.testing.assert_allclose(restored[best == k], 0.0 if k == 0 else members.mean(), rtol=1e-12)


def test_fixed_mixture():
    """With max_iter=0 the mixture given is taken as it is; values are those of an equal-variance nearest mean."""
    X = np.array([[0.1, 0.9, 1.2, -0.2], [2.0, 1.6, 1.4, 0.0]])
    mixture = {"weights_init": [1 / 3] * 3, "means_init": [0.0, 1.0, 2.0], "precisions_init": [25.0] * 3}
    sharer = SoftWeightSharer(3, zero_weight=None, max_iter=0, **mixture).fit(X)
    np.testing.assert_array_equal(sharer.labels_, [[0, 1, 1, 0], [2, 2, 1, 0]])
    np.testing.assert_allclose(sharer.cluster_centers_[:, 0], [0, (0.9 + 1.2 + 1.4) / 3, 1.8])
    np.testing.assert_array_equal(sharer.means_, [0, 1, 2])


def test_prior_is_the_mean_precision():
    """A prior far stronger than the data decides the precisions: mode (a - 1) / b of the Gamma density."""
    X, _ = planted((10, 10))
    sharer = SoftWeightSharer(4, prior_std=0.3, zero_prior_std=0.2, prior_shape=1e9, zero_prior_shape=1e9).fit(X)
    unit = np.sqrt(np.mean(X**2))
    assert precision_prior(sharer, unit).rate[0] == pytest.approx(1e9 * (0.2 * unit) ** 2)
    np.testing.assert_allclose(sharer.precisions_[0] ** -0.5 / unit, 0.2, rtol=1e-3)


def test_zeros_stay_zero():
    """Pruned weights, whatever the mixture makes of small ones."""
    X, _ = planted(seed=3, sd=0.05)
    pruned = MagnitudePruner(0.5).fit_transform(X)
    sharer = SoftWeightSharer(9, zero_weight=0.01, zero_prior_std=0.01).fit(pruned)
    assert (sharer.inverse_transform(sharer.labels_)[pruned == 0] == 0).all()
    assert 0.0 in sharer.cluster_centers_


def test_pinned_weight_prunes():
    X = np.random.default_rng(4).standard_normal((50, 50)) * 0.05
    shares = [SoftWeightSharer(9, zero_weight=z).fit(X).sparsity_ for z in (0.1, 0.9, 0.999)]
    assert shares[0] < shares[1] < shares[2]


def test_merging_leaves_fewer_values():
    X = np.random.default_rng(5).standard_normal((50, 50))
    plain, merged = (SoftWeightSharer(33, zero_weight=0.1, merge_divergence=d).fit(X) for d in (0.0, 1.0))
    assert len(plain.weights_) == 33
    assert len(merged.cluster_centers_) < len(plain.cluster_centers_)
    np.testing.assert_allclose(merged.weights_.sum(), 1)


def test_file_and_rate(tmp_path):
    X, _ = planted()
    sharer = SoftWeightSharer(8).fit(X.astype(np.float32))
    tensor = compressed_tensor(sharer, X.astype(np.float32))
    assert sharer.rate_ == tensor.nbytes
    with SkfWriter(tmp_path / "x.skf") as writer:
        writer.add("x", tensor)
    np.testing.assert_array_equal(SkfFile(tmp_path / "x.skf").read("x").to_array(), tensor.to_array())


def test_a_million_weights_are_a_histogram():
    """Codes of a fit on bins are the largest responsibilities of single weights all the same."""
    X = np.random.default_rng(6).standard_t(5, (1000, 1000)).astype(np.float32)
    sharer = SoftWeightSharer(17, zero_weight=0.5, max_iter=20).fit(X)
    rows = X[::100].astype(np.float64)
    joint = np.log(sharer.weights_) + norm.logpdf(rows.reshape(-1, 1), sharer.means_, sharer.precisions_**-0.5)
    value_of = [sharer.inverse_transform(sharer.labels_[::100]).reshape(-1)[joint.argmax(axis=1) == k]
                for k in range(len(sharer.means_))]
    assert all(np.ptp(values) == 0 for values in value_of if len(values))
    assert len({values[0] for values in value_of if len(values)}) == sum(len(values) > 0 for values in value_of)


def test_errors():
    X, _ = planted((5, 5))
    with pytest.raises(ValueError, match="must be given together"):
        SoftWeightSharer(means_init=[0.0, 1.0]).fit(X)
    with pytest.raises(ValueError, match="one number for each of at most n_components=2"):
        SoftWeightSharer(2, weights_init=np.ones(3), means_init=np.zeros(3), precisions_init=np.ones(3)).fit(X)
    with pytest.raises(ValueError, match="zero_weight"):
        SoftWeightSharer(zero_weight=1.0).fit(X)
