"""Roots of grams, and codes that are best for a basis: against least squares and the conditions of a minimum."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import pytest

from skfactor.solvers.whitening import code_operators, damped_grams, linear_codes, refit_basis, row_groups, whiten


def gram_of(rng, d, n_inputs):
    Z = rng.standard_normal((n_inputs, d)) * np.geomspace(1, 1e-2, d)
    return Z.T @ Z


@pytest.mark.parametrize("n_inputs", [50, 5])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_root(n_inputs, damping):
    G = gram_of(np.random.default_rng(0), 12, n_inputs)
    root, inverse = whiten(G, damping)
    damped = G + damping * np.trace(G) / 12 * np.eye(12)
    np.testing.assert_allclose(root @ root.T, damped, atol=1e-12 * damped.max())
    np.testing.assert_allclose(damped_grams(G, damping)[0], damped)
    if damping or n_inputs > 12:
        np.testing.assert_allclose(root @ inverse, np.eye(12), atol=1e-8)
    else:
        # the pseudo-inverse: root inverse is the projection on the inputs that were seen
        P = root @ inverse
        np.testing.assert_allclose(P @ P, P, atol=1e-8)
        assert round(np.trace(P), 6) == n_inputs


def test_a_gram_of_zeros_is_the_identity():
    np.testing.assert_array_equal(whiten(np.zeros((3, 3))).root, np.eye(3))
    np.testing.assert_array_equal(damped_grams(np.zeros((3, 3)))[0], np.eye(3))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("m", [1, 4, 9])
def test_codes_without_a_gram_are_least_squares(dtype, m):
    rng = np.random.default_rng(m)
    X, B = rng.standard_normal((20, 9)).astype(dtype), rng.standard_normal((m, 9))
    codes = linear_codes(X, B)
    assert codes.dtype == dtype
    expected = np.linalg.lstsq(B.T, X.T.astype(float), rcond=None)[0].T
    np.testing.assert_allclose(codes, expected, rtol=1e-4 if dtype == np.float32 else 1e-8, atol=1e-5)


def test_codes_with_grams_are_a_minimum():
    rng = np.random.default_rng(1)
    X, B = rng.standard_normal((6, 8)), rng.standard_normal((3, 8))
    grams = np.stack([gram_of(rng, 8, 30), gram_of(rng, 8, 4)])
    codes = linear_codes(X, B, grams, damping=0.01)
    for rows, G in zip(row_groups(6, 2), damped_grams(grams, 0.01)):
        # the gradient of a convex function
        np.testing.assert_allclose((X[rows] - codes[rows] @ B) @ G @ B.T, 0, atol=1e-9 * np.abs(G).max())


def test_dependent_rows_of_the_basis():
    rng = np.random.default_rng(2)
    B = rng.standard_normal((3, 7))
    dependent = np.vstack([B, 2 * B[:1], np.zeros((1, 7)), 1e-13 * rng.standard_normal((1, 7)) + B[1:2]])
    X = rng.standard_normal((5, 3)) @ B
    codes = linear_codes(X, dependent)
    np.testing.assert_allclose(codes @ dependent, X, atol=1e-9)
    assert np.abs(codes).max() < 10
    # more rows than columns
    many = rng.standard_normal((20, 7))
    np.testing.assert_allclose(linear_codes(X, many) @ many, X, atol=1e-9)


def test_a_badly_conditioned_basis_is_not_squared():
    rng = np.random.default_rng(3)
    Q = np.linalg.qr(rng.standard_normal((30, 5)))[0].T
    B = np.vstack([Q[:4], Q[0] + 1e-7 * Q[4]])  # condition 1e7: its square is singular in double precision
    X = rng.standard_normal((10, 5)) @ Q
    np.testing.assert_allclose(linear_codes(X, B) @ B, X, atol=1e-7)


def test_scale_of_atoms_and_grams_does_not_matter():
    rng = np.random.default_rng(4)
    X, B, G = rng.standard_normal((4, 6)), rng.standard_normal((3, 6)), gram_of(rng, 6, 20)
    scale = np.array([1e-9, 1.0, 1e9])[:, None]
    plain, scaled = linear_codes(X, B, G), linear_codes(X, scale * B, 1e-20 * G)
    np.testing.assert_allclose(scaled @ (scale * B), plain @ B, atol=1e-9)


def test_operator_reads_no_more_than_the_basis_spans():
    (P,) = code_operators(np.eye(4)[:2])
    np.testing.assert_allclose(P, np.eye(4)[:, :2], atol=1e-15)


def test_groups_must_divide_the_rows():
    with pytest.raises(ValueError, match="split evenly over the 2 groups of the gram, got 3 rows"):
        linear_codes(np.ones((3, 2)), np.eye(2), np.stack([np.eye(2)] * 2))


def test_refit_lowers_the_error_of_every_round():
    rng = np.random.default_rng(7)
    X, grams = rng.standard_normal((12, 8)), np.stack([gram_of(rng, 8, 20) for _ in range(3)])
    grams = np.stack([G[np.ix_(p, p)] for G, p in zip(grams, (rng.permutation(8) for _ in grams))])
    start = np.linalg.svd(X)[2][:2]

    def error(B):
        codes = linear_codes(X, B, grams)
        E = X - codes @ B
        return sum(float(np.trace(E[r] @ G @ E[r].T)) for r, G in zip(row_groups(12, 3), damped_grams(grams)))

    errors = [error(refit_basis(X, start, grams, n_rounds=i)) for i in range(6)]
    assert all(b <= a * (1 + 1e-9) for a, b in zip(errors, errors[1:]))
    assert errors[-1] < 0.9 * errors[0]
