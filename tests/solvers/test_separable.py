"""Separable kernels against the SVD of explicit matrices, and the adjoints that refits need."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import pytest

from skfactor.solvers.separable import (
    collapse_depthwise,
    collapse_vertical,
    depthwise_kernels,
    expand_depthwise,
    expand_vertical,
    vertical_kernels,
)
from skfactor.solvers.whitening import linear_codes

SHAPE = (4, 3, 2)


def tail(X, rank):
    return float(np.square(np.linalg.svd(X, compute_uv=False)[rank:]).sum())


@pytest.mark.parametrize("rank", [1, 3, 12])
@pytest.mark.parametrize("weighted", [False, True])
def test_vertical_error_is_the_tail(rank, weighted):
    rng = np.random.default_rng(0)
    W = rng.standard_normal((10, *SHAPE))
    w = rng.random(10) if weighted else np.ones(10)
    found = vertical_kernels(W.reshape(10, -1), SHAPE, rank, weights=w if weighted else None)
    matrix = np.stack([np.sqrt(w[n]) * W[n, :, :, j].ravel() for n in range(10) for j in range(2)])
    np.testing.assert_allclose(found.error, tail(matrix, rank), atol=1e-10)
    basis = expand_vertical(found.kernels, 2)
    E = W.reshape(10, -1) - linear_codes(W.reshape(10, -1), basis) @ basis
    np.testing.assert_allclose((w[:, None] * E**2).sum(), found.error, atol=1e-10)


@pytest.mark.parametrize("m", [1, 2, 6])
@pytest.mark.parametrize("weighted", [False, True])
def test_depthwise_error_is_the_tail(m, weighted):
    rng = np.random.default_rng(1)
    W = rng.standard_normal((10, 4, 6))
    w = rng.random(10) if weighted else np.ones(10)
    found = depthwise_kernels(W.reshape(10, -1), 4, m, weights=w if weighted else None)
    expected = sum(tail(np.sqrt(w)[:, None] * W[:, c], m) for c in range(4))
    np.testing.assert_allclose(found.error, expected, atol=1e-10)
    basis = expand_depthwise(found.kernels)
    E = W.reshape(10, -1) - linear_codes(W.reshape(10, -1), basis) @ basis
    np.testing.assert_allclose((w[:, None] * E**2).sum(), found.error, atol=1e-10)


def test_separable_filters_are_found_exactly():
    rng = np.random.default_rng(2)
    A, P = rng.standard_normal((2, 4, 3)), rng.standard_normal((30, 2, 2))
    X = np.einsum("rci,nrj->ncij", A, P).reshape(30, -1)
    found = vertical_kernels(X, SHAPE, 5)
    assert len(found.kernels) == 2
    assert found.error < 1e-12 * np.square(X).sum()


@pytest.mark.parametrize("kind", ["spatial", "depthwise"])
def test_a_gram_that_the_closed_form_fits_is_exact(kind):
    """Inputs without correlation between rows of positions (or channels): no other kernels are better."""
    rng = np.random.default_rng(3)
    X = rng.standard_normal((8, 24))
    if kind == "spatial":
        Z = rng.standard_normal((12, 12))
        G = np.einsum("ab,ij->aibj", Z @ Z.T, np.eye(2)).reshape(24, 24)
        kernels = vertical_kernels(X, SHAPE, 3, gram=G).kernels
        expand = lambda k: expand_vertical(k, 2)  # noqa: E731
    else:
        G = np.zeros((4, 6, 4, 6))
        for c in range(4):
            Z = rng.standard_normal((6, 6))
            G[c, :, c] = Z @ Z.T
        G = G.reshape(24, 24)
        kernels = depthwise_kernels(X, 4, 2, gram=G).kernels
        expand = expand_depthwise
    def error(k):
        E = X - linear_codes(X, expand(k), G) @ expand(k)
        return np.trace(E @ (G + 0.003 * np.trace(G) / 24 * np.eye(24)) @ E.T)
    found = error(kernels)
    for _ in range(20):
        step = rng.standard_normal(kernels.shape)
        assert error(kernels + 1e-3 * np.abs(kernels).max() * step) >= found * (1 - 1e-6)


def test_collapse_is_the_adjoint_of_expand():
    rng = np.random.default_rng(4)
    for expand, collapse, shape in (
            (lambda k: expand_vertical(k, 2), lambda B: collapse_vertical(B, (5, 4, 3), 2), (5, 4, 3)),
            (expand_depthwise, lambda B: collapse_depthwise(B, (4, 2, 6)), (4, 2, 6))):
        kernels = rng.standard_normal(shape)
        B = rng.standard_normal(expand(kernels).shape)
        np.testing.assert_allclose((expand(kernels) * B).sum(), (kernels * collapse(B)).sum())
