"""Low-rank bases against numpy's singular value decomposition and the certificate of Eckart and Young."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import pytest

from skfactor.solvers import low_rank
from skfactor.solvers.feedback import output_error
from skfactor.solvers.low_rank import low_rank_basis
from skfactor.solvers.whitening import damped_grams, linear_codes


def gram_of(rng, d, n_inputs):
    Z = rng.standard_normal((n_inputs, d)) * np.geomspace(1, 0.05, d)
    return Z.T @ Z / n_inputs


def tail(X, rank):
    return float(np.square(np.linalg.svd(X, compute_uv=False)[rank:]).sum())


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (7, 7), (1, 6), (6, 1)])
@pytest.mark.parametrize("rank", [1, 3, None])
def test_error_is_the_tail(shape, rank):
    X = np.random.default_rng(0).standard_normal(shape)
    found = low_rank_basis(X, rank)
    r = min(*shape, rank or 99)
    assert found.basis.shape == (r, shape[1])
    np.testing.assert_allclose(found.singular_values, np.linalg.svd(X, compute_uv=False)[:r], rtol=1e-12)
    np.testing.assert_allclose(found.basis @ found.basis.T, np.eye(r), atol=1e-12)
    error = np.square(X - linear_codes(X, found.basis) @ found.basis).sum()
    np.testing.assert_allclose(error, tail(X, r), atol=1e-12 * found.total)


@pytest.mark.parametrize("shape", [(15, 24), (40, 12)])
@pytest.mark.parametrize("n_inputs", [100, 6])
def test_error_of_the_output_is_the_tail(shape, n_inputs):
    rng = np.random.default_rng(1)
    X, w = rng.standard_normal(shape), rng.random(shape[0]) + 0.1
    G = gram_of(rng, shape[1], n_inputs)
    found = low_rank_basis(X, 4, weights=w, gram=G, damping=0.01)
    X_hat = linear_codes(X, found.basis, G, damping=0.01) @ found.basis
    (damped,) = damped_grams(G, 0.01)
    values, vectors = np.linalg.eigh(damped)  # another root than the solver's
    expected = tail(np.sqrt(w)[:, None] * X @ (vectors * np.sqrt(values)), 4)
    np.testing.assert_allclose(output_error(X, X_hat, damped, row_weight=w), expected, rtol=1e-9)
    np.testing.assert_allclose(found.basis @ damped @ found.basis.T, np.eye(4), atol=1e-9)
    # and nothing of that rank is better: the plain basis with its best codes
    plain = low_rank_basis(X, 4).basis
    other = output_error(X, linear_codes(X, plain, G, damping=0.01) @ plain, damped, row_weight=w)
    assert output_error(X, X_hat, damped, row_weight=w) <= other


def test_small_singular_values_are_exact():
    rng = np.random.default_rng(2)
    U, V = (np.linalg.qr(rng.standard_normal((30, 8)))[0] for _ in range(2))
    s = np.geomspace(1, 1e-11, 8)  # their squares are lost in the small gram
    X = (U * s) @ V.T
    found = low_rank_basis(X)
    np.testing.assert_allclose(found.singular_values[:8], s, atol=1e-15)
    np.testing.assert_allclose(X @ found.basis.T @ found.basis, X, atol=1e-15)


def test_rank_of_the_matrix_is_noticed():
    rng = np.random.default_rng(3)
    X = rng.standard_normal((30, 4)) @ rng.standard_normal((4, 50))
    assert len(low_rank_basis(X).basis) == len(low_rank_basis(X.T).basis) == 4
    assert low_rank_basis(np.zeros((3, 5))).basis.shape == (1, 5)


@pytest.mark.parametrize("energy", [0.2, 0.7, 0.99, 1.0])
def test_energy(energy):
    X = np.random.default_rng(4).standard_normal((12, 30))
    r = len(low_rank_basis(X, energy=energy).basis)
    total = np.square(X).sum()
    assert total - tail(X, r) >= energy * total * (1 - 1e-12)
    assert r == 1 or total - tail(X, r - 1) < energy * total


def test_row_weights_count_rows():
    rng = np.random.default_rng(5)
    X, w = rng.standard_normal((9, 6)), np.array([0, 1, 2, 3, 1, 1, 1, 0, 2])
    weighted, repeated = low_rank_basis(X, 3, weights=w), low_rank_basis(np.repeat(X, w, axis=0), 3)
    np.testing.assert_allclose(weighted.basis, repeated.basis, atol=1e-10)
    np.testing.assert_allclose(weighted.total, repeated.total)


def test_lanczos_finds_the_same(monkeypatch):
    X = np.random.default_rng(6).standard_normal((90, 200))
    full = low_rank_basis(X, 3)
    monkeypatch.setattr(low_rank, "_LANCZOS_FROM", 50)
    fast = low_rank_basis(X, 3)
    np.testing.assert_allclose(fast.singular_values, full.singular_values, rtol=1e-12)
    np.testing.assert_allclose(fast.basis, full.basis, atol=1e-8)
