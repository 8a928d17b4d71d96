# SPDX-License-Identifier: BSD-3-Clause
"""One-dimensional mixtures against scipy, scikit-learn, planted components, and their certificate."""

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm
from sklearn.mixture import GaussianMixture

from skfactor.solvers import gaussian_mixture1d as module
from skfactor.solvers.gaussian_mixture1d import (
    PrecisionPrior,
    gaussian_mixture_1d,
    hard_borders,
    hard_labels,
    merge_components,
    spread_start,
)

PLANTED = np.array([0.0, -1.5, 0.8, 2.5])


def sample(n, seed, sd=0.1):
    rng = np.random.default_rng(seed)
    return rng.choice(PLANTED, n, p=[0.7, 0.1, 0.1, 0.1]) + sd * rng.standard_normal(n)


def prior(k, shape=1.0, rate=1e-6):
    return PrecisionPrior(np.full(k, shape), np.full(k, rate))


def log_density(x, pi, mu, precision):
    return np.log(norm.pdf(x[:, None], mu, precision**-0.5) @ pi)


@pytest.mark.parametrize("n", [3000, 200_000])
@pytest.mark.parametrize("zero_weight", [None, 0.7])
def test_planted_components_are_found(n, zero_weight):
    x = sample(n, 0)
    start = spread_start(x, 4, zero_weight=zero_weight, zero_std=0.3)
    result = gaussian_mixture_1d(x, start, prior(4), zero_weight=zero_weight)
    order = np.argsort(result.means)
    np.testing.assert_allclose(result.means[order], np.sort(PLANTED), atol=0.05)
    np.testing.assert_allclose(result.precisions**-0.5, 0.1, rtol=0.15)
    np.testing.assert_allclose(result.weights[0], 0.7, atol=0.03)
    assert result.converged


@pytest.mark.parametrize("n", [500, 60_000])
@pytest.mark.parametrize("shape", [1.0, 400.0])
def test_objective_never_falls(n, shape):
    x = np.random.default_rng(1).standard_t(3, n)
    w = np.random.default_rng(2).uniform(0, 2, n)
    start = spread_start(x, 9, zero_std=0.2)
    result = gaussian_mixture_1d(x, start, prior(9, shape, 0.04 * shape), weights=w, max_iter=60, tol=0)
    rises = np.diff(result.trace)
    assert (rises >= -1e-9 * abs(result.trace[0])).all()
    assert rises.max() > 0


def test_objective_is_the_penalised_likelihood():
    """Distinct values: exactly that of scipy. Bins: a bound from below, as near as the bins are narrow."""
    for n in (2000, 100_000):
        x = sample(n, 3)
        p = prior(4, 50.0, 0.5)
        start = spread_start(x, 4, zero_weight=0.7, zero_std=0.1)
        result = gaussian_mixture_1d(x, start, p, zero_weight=0.7, max_iter=7)
        t = result.precisions
        exact = log_density(x, result.weights, result.means, t).sum() + (49 * np.log(t) - 0.5 * t).sum()
        assert result.trace[-1] <= exact + 1e-9 * abs(exact)
        np.testing.assert_allclose(result.trace[-1], exact, rtol=1e-9 if n == 2000 else 1e-5)


def test_one_step_is_that_of_scikit_learn():
    """Without prior and with learned weights, EM is GaussianMixture's, when its component at zero stays there."""
    x = np.concatenate([sample(400, 4), -sample(400, 4)])  # symmetric: the mean of a symmetric start stays at 0
    start = np.array([0.4, 0.3, 0.3]), np.array([0.0, -1.4, 1.4]), np.array([4.0, 4.0, 4.0])
    ours = gaussian_mixture_1d(x, start, prior(3, rate=1e-12), zero_weight=None, max_iter=5, tol=0)
    theirs = GaussianMixture(3, weights_init=start[0], means_init=start[1][:, None],
                             precisions_init=start[2][:, None, None], max_iter=5, tol=0, reg_covar=0)
    with pytest.warns(match="did not converge"):
        theirs.fit(x[:, None])
    np.testing.assert_allclose(ours.means, theirs.means_[:, 0], atol=1e-9)
    np.testing.assert_allclose(ours.weights, theirs.weights_, rtol=1e-9)
    np.testing.assert_allclose(ours.precisions, theirs.precisions_[:, 0, 0], rtol=1e-9)
    np.testing.assert_allclose(ours.trace[-1], theirs.score(x[:, None]) * len(x), rtol=1e-9)


def test_weights_are_repetitions():
    x = sample(300, 5)
    counts = np.random.default_rng(0).integers(0, 4, 300)
    start = spread_start(x, 5, zero_std=0.2)
    weighted = gaussian_mixture_1d(x, start, prior(5, 20.0, 0.2), weights=counts.astype(float))
    repeated = gaussian_mixture_1d(np.repeat(x, counts), start, prior(5, 20.0, 0.2))
    np.testing.assert_allclose(weighted.means, repeated.means, rtol=1e-9, atol=1e-12)


def test_bins_keep_mass_mean_and_square():
    x = np.random.default_rng(6).standard_cauchy(50_000)
    x[:1000] = 0
    points = module._as_points(x, None)
    assert len(points.x) <= module._BINS + 1
    np.testing.assert_allclose(points.mass.sum(), len(x))
    np.testing.assert_allclose(points.mass @ points.x, x.sum(), rtol=1e-9)
    np.testing.assert_allclose(points.mass @ (points.x**2 + points.scatter), (x**2).sum(), rtol=1e-9)
    assert points.mass[points.x == 0] == 1000


def test_borders_are_those_of_the_largest_responsibility():
    """Brute force over random mixtures: components that are wide, narrow, nested, and one that owns nothing."""
    rng = np.random.default_rng(7)
    x = rng.uniform(-4, 4, 4000)
    for _ in range(30):
        k = rng.integers(1, 9)
        pi, mu, precision = rng.dirichlet(np.ones(k)), rng.uniform(-3, 3, k), rng.gamma(0.5, 20, k) + 0.05
        mu[0] = 0
        borders, owners = hard_borders(pi, mu, precision)
        joint = np.log(pi) + norm.logpdf(x[:, None], mu, precision**-0.5)
        best = joint.argmax(axis=1)
        clear = np.diff(np.sort(joint, axis=1)[:, -2:], axis=1)[:, 0] > 1e-9 if k > 1 else np.ones(len(x), bool)
        np.testing.assert_array_equal(hard_labels(x, borders, owners)[clear], best[clear])
        assert (np.diff(borders) > 0).all()
        assert (owners[1:] != owners[:-1]).all()


def test_merging():
    """Divergence by numerical integration; moments of the mixture are kept unless the zero component takes part."""
    pi, mu = np.array([0.4, 0.2, 0.3, 0.1]), np.array([0.0, 1.0, 1.02, 3.0])
    precision = np.array([25.0, 16.0, 20.0, 9.0])

    def kl(i, j):
        a, b = norm(mu[i], precision[i] ** -0.5), norm(mu[j], precision[j] ** -0.5)
        return quad(lambda t: a.pdf(t) * (a.logpdf(t) - b.logpdf(t)), mu[i] - 3, mu[i] + 3)[0]

    divergence = (kl(1, 2) + kl(2, 1)) / 2
    assert len(merge_components(pi, mu, precision, divergence * 0.999)[0]) == 4
    merged = merge_components(pi, mu, precision, divergence * 1.001)
    assert len(merged[0]) == 3

    def moments(pi, mu, precision):
        return pi.sum(), pi @ mu, pi @ (mu**2 + 1 / precision)

    np.testing.assert_allclose(moments(*merged), moments(pi, mu, precision), rtol=1e-12)
    everything = merge_components(pi, mu, precision, np.inf)
    np.testing.assert_allclose([everything[0][0], everything[1][0]], [1, 0])


def test_pinned_mixing_weight_and_mean():
    x = sample(1000, 8) + 0.3
    result = gaussian_mixture_1d(x, spread_start(x, 6, zero_weight=0.9, zero_std=0.1), prior(6), zero_weight=0.9)
    assert result.weights[0] == 0.9
    assert result.means[0] == 0
    np.testing.assert_allclose(result.weights.sum(), 1)


@pytest.mark.parametrize(("start", "message"), [
    ((np.ones(2) / 2, np.array([1.0, 2.0]), np.ones(2)), "must have the mean 0"),
    ((np.ones(2) / 2, np.zeros(2), np.zeros(2)), "positive precisions"),
    ((np.ones(3) / 3, np.zeros(3), np.ones(3)), "one number for each component"),
])
def test_bad_start(start, message):
    with pytest.raises(ValueError, match=message):
        gaussian_mixture_1d(np.ones(4), start, prior(2))


def test_inputs_are_not_written_to():
    x = sample(100, 9)
    start = spread_start(x, 4, zero_std=0.1)
    for array in (x, *start):
        array.flags.writeable = False
    gaussian_mixture_1d(x, start, prior(4))
