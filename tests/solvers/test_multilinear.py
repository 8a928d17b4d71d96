"""Bases that are networks: contraction, least squares of one operand, refit for a layer's output."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import pytest

from skfactor.solvers import multilinear
from skfactor.solvers.multilinear import Network, contract, fit_networks, principal_codes, refit_networks
from skfactor.solvers.tensor_train import tensor_train, train_network
from skfactor.solvers.tucker import tucker, tucker_network

SHAPE = (4, 3, 2)
rng = np.random.default_rng(0)


def network(n_codes=3):
    """A tree with a leaf, an inner operand and a branch."""
    operands = tuple(rng.standard_normal(s) for s in ((n_codes, 2, 3), (4, 2), (3, 3, 2), (2, 2)))
    return Network(operands, ("nab", "oa", "bpc", "qc"), "nopq")


def gram_of(d, seed=0, correlated=True):
    local = np.random.default_rng(seed)
    Z = local.standard_normal((300, d)) @ (local.standard_normal((d, d)) if correlated else np.eye(d))
    return Z.T @ Z / 300


def output_error(X, B, grams):
    """With the best codes, each group by an ordinary least-squares solver in coordinates of its own."""
    error = 0.0
    for x, G in zip(np.split(X, len(grams)), grams):
        R = np.linalg.cholesky(G)
        C = np.linalg.lstsq((B @ R).T, (x @ R).T, rcond=None)[0].T
        error += np.square((x - C @ B) @ R).sum()
    return error


def test_contraction_is_an_einsum():
    one, other = network(), network(2)
    expected = [np.einsum("nab,oa,bpc,qc->nopq", *n.operands).reshape(-1, 24) for n in (one, other)]
    np.testing.assert_allclose(contract([one, other]), np.vstack(expected))
    assert one.shape == (3, 4, 3, 2)


@pytest.mark.parametrize("n_groups", [0, 1, 2])
@pytest.mark.parametrize("place", range(4))
def test_one_operand_is_fitted_by_least_squares(place, n_groups, monkeypatch):
    """Against a dense least-squares problem whose columns are the basis for unit operands."""
    monkeypatch.setattr(multilinear, "_CG_STEPS", 500)
    monkeypatch.setattr(multilinear, "_CG_TOL", 1e-12)
    X, net = rng.standard_normal((10, 24)), network()
    grams = [gram_of(24, seed=g) for g in range(n_groups)] or [None]
    data = multilinear._data(X, grams)
    codes, before = multilinear._best_codes(data, contract([net]))
    found = contract(multilinear._best_operand(data, codes, (net,), place))

    columns = []
    for i in range(net.operands[place].size):
        unit = np.zeros(net.operands[place].size)
        unit[i] = 1.0
        columns.append(contract([multilinear._with_operand(net, place, unit.reshape(net.operands[place].shape))]))
    roots = [np.eye(24) if G is None else np.linalg.cholesky(G) for G in grams]
    blocks = list(zip(np.split(X, len(grams)), codes, roots))
    A = np.stack([np.concatenate([(C @ B @ R).ravel() for _, C, R in blocks]) for B in columns], axis=1)
    b = np.concatenate([(x @ R).ravel() for x, _, R in blocks])
    best = np.square(b - A @ np.linalg.lstsq(A, b, rcond=None)[0]).sum()
    error = sum(np.square((x - C @ found) @ R).sum() for x, C, R in blocks)
    np.testing.assert_allclose(error, best, rtol=1e-9)
    assert error <= before


def test_without_a_gram_one_step_solves(monkeypatch):
    """The preconditioner is then the inverse of the quadratic."""
    calls = []
    monkeypatch.setattr(multilinear, "_CG_TOL", 1e-9)
    apply = multilinear._applied
    monkeypatch.setattr(multilinear, "_applied", lambda *a: calls.append(1) or apply(*a))
    X, net = rng.standard_normal((10, 24)), network()
    data = multilinear._data(X, [None])
    for place in range(4):
        codes, _ = multilinear._best_codes(data, contract([net]))
        multilinear._best_operand(data, codes, (net,), place)
    assert len(calls) == 8  # one residual and one step for each operand


@pytest.mark.parametrize("n_groups", [0, 1, 3])
@pytest.mark.parametrize("n_networks", [1, 2])
def test_refit_error_falls_and_is_what_it_says(n_groups, n_networks):
    X, nets = rng.standard_normal((12, 24)), [network(2) for _ in range(n_networks)]
    grams = np.stack([gram_of(24, seed=g) for g in range(n_groups)]) if n_groups else None
    copies = [a.copy() for n in nets for a in n.operands]
    result = refit_networks(X, nets, gram=grams, tol=0.0, max_iter=15)
    assert (np.diff(result.errors) <= 0).all()
    assert result.errors[-1] < 0.9 * result.errors[0]
    metric = [np.eye(24)] if grams is None else grams
    np.testing.assert_allclose(result.errors[0], output_error(X, contract(nets), metric))
    np.testing.assert_allclose(result.error, output_error(X, contract(result.networks), metric))
    for mine, copy in zip((a for n in nets for a in n.operands), copies):
        np.testing.assert_array_equal(mine, copy)


def test_callback_stops():
    result = refit_networks(rng.standard_normal((12, 24)), [network()], tol=0.0, callback=lambda: True)
    assert result.n_iter == 1


def decompositions():
    def by_tucker(T):
        found = tucker(T, (3, 2), (0, 1))
        return [tucker_network(found.core, found.frames[1:], found.axes[1:])]

    def by_train(T):
        return [train_network(tensor_train(T, (3, 3, 2)).cores[1:])]

    return [by_tucker, by_train]


@pytest.mark.parametrize("decompose", decompositions())
@pytest.mark.parametrize("n_groups", [1, 2])
def test_fit_is_never_above_the_refit_of_the_plain_decomposition(decompose, n_groups):
    for seed in range(5):
        X = np.random.default_rng(seed).standard_normal((8, 24))
        grams = np.stack([gram_of(24, seed=10 * seed + g) for g in range(n_groups)])
        plain = decompose(X.reshape(-1, *SHAPE))
        result = fit_networks(X, SHAPE, plain, decompose, gram=grams)
        damped = [G + 0.003 * np.trace(G) / 24 * np.eye(24) for G in grams]
        error = output_error(X, contract(result.networks), damped)
        np.testing.assert_allclose(error, result.error, rtol=1e-6)
        assert error <= output_error(X, contract(plain), damped)


def test_a_gram_of_one_axis_each_is_decomposed_in_its_metric():
    """With G a Kronecker product, whitening the axes whitens all: the start is the decomposition of the output."""
    parts = [gram_of(d, seed=d) for d in SHAPE]
    G = np.kron(np.kron(parts[0], parts[1]), parts[2])
    X = rng.standard_normal((8, 24))
    roots = [np.linalg.cholesky(p) for p in parts]
    whitened = (X @ np.kron(np.kron(roots[0], roots[1]), roots[2])).reshape(8, *SHAPE)
    decompose = decompositions()[1]
    expected = np.square(whitened.reshape(8, -1)
                         - whitened.reshape(8, -1) @ np.linalg.pinv(contract(decompose(whitened)))
                         @ contract(decompose(whitened))).sum()
    seen = []
    multilinear_refit = multilinear._refit

    def recording(data, networks, *rest):
        seen.append(multilinear._best_codes(data, contract(networks))[1])
        return multilinear_refit(data, networks, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multilinear, "_refit", recording)
        patch.setattr(multilinear, "damped_grams", lambda gram: gram)
        fit_networks(X, SHAPE, decompose(X.reshape(8, *SHAPE)), decompose, gram=G[None])
    np.testing.assert_allclose(seen[0], expected, rtol=1e-9)


def test_one_column_axis_is_the_best_low_rank_output():
    X, G = rng.standard_normal((9, 12)), gram_of(12)

    def decompose(T):
        found = tucker(T, (4,), (0,))
        return [tucker_network(found.core, [], [])]

    result = fit_networks(X, (12,), decompose(X), decompose, gram=G[None])
    damped = G + 0.003 * np.trace(G) / 12 * np.eye(12)
    best = np.square(np.linalg.svd(X @ np.linalg.cholesky(damped), compute_uv=False)[4:]).sum()
    np.testing.assert_allclose(result.error, best, rtol=1e-9)


@pytest.mark.parametrize("with_gram", [False, True])
def test_principal_codes_keep_the_basis(with_gram):
    X, nets = rng.standard_normal((12, 24)), [network(3), network(2)]
    grams = gram_of(24)[None] if with_gram else None
    found = principal_codes(X, nets, grams)
    metric = np.eye(24) if grams is None else grams[0] + 0.003 * np.trace(grams[0]) / 24 * np.eye(24)
    for before, after in zip(nets, found):
        B, old = contract([after]), contract([before])
        np.testing.assert_allclose(B @ metric @ B.T, np.eye(len(B)), atol=1e-10)  # orthonormal
        np.testing.assert_allclose(old @ np.linalg.pinv(B) @ B, old, atol=1e-10)  # the same span
        assert (np.take_along_axis(B, np.abs(B).argmax(axis=1)[:, None], axis=1) > 0).all()
    single = principal_codes(X, nets[:1], grams)
    B = contract(single)
    C = X @ metric @ B.T
    moment = C.T @ C
    np.testing.assert_allclose(moment, np.diag(np.diag(moment)), atol=1e-9 * moment.max())
    assert (np.diff(np.diag(moment)) <= 0).all()


def test_rows_of_zeros():
    result = refit_networks(np.zeros((4, 24)), [network()])
    assert result.error == 0
    assert np.isfinite(contract(principal_codes(np.zeros((4, 24)), result.networks))).all()
