# SPDX-License-Identifier: BSD-3-Clause
"""Error feedback of sub-vectors: the scalar solver for v = 1, all codes of a small problem, stationarity."""

import itertools

import numpy as np
import pytest

from skfactor.solvers.feedback import feedback_quantize, output_error, refit_centers
from skfactor.solvers.feedback_vectors import feedback_quantize_vectors, refit_vector_centers


def make_problem(seed, n=6, d=6, k=4, v=2):
    rng = np.random.default_rng(seed)
    Z = np.maximum(rng.normal(size=(50, d)) @ rng.normal(size=(d, d)), 0)
    return rng.normal(size=(n, d)), rng.normal(size=(k, v)), Z.T @ Z / 50, rng


def test_scalars_are_the_case_of_one():
    X, centers, gram, _ = make_problem(0, v=1)
    codes = feedback_quantize_vectors(X, centers, gram)
    np.testing.assert_array_equal(codes, feedback_quantize(X, centers[:, 0], gram))
    np.testing.assert_allclose(refit_vector_centers(X, codes, centers, gram)[:, 0],
                               refit_centers(X, codes, centers[:, 0], gram), rtol=1e-5)


def test_independent_inputs_give_nearest_codes():
    X, centers, _, _ = make_problem(1)
    codes = feedback_quantize_vectors(X, centers, np.eye(6))
    distance = ((X.reshape(6, 3, 1, 2) - centers) ** 2).sum(-1)
    np.testing.assert_array_equal(codes, distance.argmin(-1))


@pytest.mark.parametrize("seed", range(6))
def test_between_nearest_codes_and_the_best_of_all(seed):
    X, centers, gram, _ = make_problem(seed, n=8)
    every = np.array(list(itertools.product(range(4), repeat=3)))
    errors = X[:, None] - centers[every].reshape(1, len(every), -1)
    best = np.einsum("nsi,ij,nsj->ns", errors, gram, errors).min(axis=1).sum()
    mine = output_error(X, centers[feedback_quantize_vectors(X, centers, gram)].reshape(X.shape), gram)
    nearest = output_error(X, centers[feedback_quantize_vectors(X, centers, np.eye(6))].reshape(X.shape), gram)
    assert best * (1 - 1e-9) <= mine
    assert mine <= nearest * 1.05  # one greedy sweep: rarely and hardly worse than nearest codes on so small a problem


def test_refit_is_stationary():
    X, centers, gram, rng = make_problem(2)
    gram = np.stack([gram, np.eye(6)])  # two groups
    codes, r = rng.integers(4, size=(6, 3)), rng.uniform(0.5, 2, 6)
    fitted = refit_vector_centers(X, codes, centers, gram, row_weight=r, n_iter=200)

    def error(c):
        return output_error(X, c[codes].reshape(X.shape), gram, row_weight=r)

    for index in np.ndindex(*centers.shape):
        for h in (1e-3, -1e-3):
            moved = fitted.copy()
            moved[index] += h
            assert error(moved) >= error(fitted) * (1 - 1e-9)
