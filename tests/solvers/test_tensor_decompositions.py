"""Tucker, tensor train, hierarchical Tucker, block terms: planted ranks, bounds, TensorLy, falling errors."""
# SPDX-License-Identifier: BSD-3-Clause

import functools
import math

import numpy as np
import pytest

from skfactor.solvers._tensors import left_singular, tucker_ranks, unfold
from skfactor.solvers.block_term import block_terms
from skfactor.solvers.hierarchical_tucker import (
    behind_codes,
    hierarchical_ranks,
    hierarchical_tucker,
    tree_network,
)
from skfactor.solvers.multilinear import contract
from skfactor.solvers.tensor_train import tensor_train
from skfactor.solvers.tucker import tucker


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def squares(A):
    return float(np.square(A).sum())


def planted_tucker(shape, ranks, seed=0):
    """A core times factors, by one einsum; all unfoldings have these ranks."""
    rng = np.random.default_rng(seed)
    core = rng.standard_normal(ranks)
    factors = [rng.standard_normal((d, r)) for d, r in zip(shape, ranks)]
    low, high = "abcdef"[: len(shape)], "nopqrs"[: len(shape)]
    return np.einsum(f"{low},{','.join(h + x for h, x in zip(high, low))}->{high}", core, *factors)


# --- Tucker ----------------------------------------------------------------------------------------


def rebuilt(result):
    T = result.core
    for axis, U in zip(result.axes, result.frames):
        T = np.moveaxis(np.einsum("ds,s...->d...", U, np.moveaxis(T, axis, 0)), 0, axis)
    return T


@pytest.mark.parametrize("axes", [(0, 1), (0, 1, 2, 3)])
def test_tucker_of_planted_ranks_is_exact(axes):
    T = planted_tucker((9, 8, 7, 6), (3, 2, 4, 3))
    result = tucker(T, [(3, 2, 4, 3)[a] for a in axes], axes)
    np.testing.assert_allclose(rebuilt(result), T, atol=1e-11)
    assert result.error < 1e-22 * squares(T)


@pytest.mark.parametrize("axes", [(0,), (0, 1), (1, 2), (0, 1, 2, 3)])
def test_tucker_error_falls_and_keeps_to_its_bound(axes):
    T = gaussian(10, 9, 4, 5)
    result = tucker(T, (4,) * len(axes), axes, tol=0.0, max_iter=30)
    np.testing.assert_allclose(result.error, squares(T - rebuilt(result)))
    np.testing.assert_allclose(result.error, result.errors[-1], rtol=1e-9)
    assert (np.diff(result.errors) <= 0).all()
    assert result.error <= result.bound * (1 + 1e-12)
    # the best of all decompositions of these ranks cannot lose less than one unfolding alone
    alone = [squares(np.linalg.svd(unfold(T, axis), compute_uv=False)[4:]) for axis in axes]
    np.testing.assert_allclose(result.bound, sum(alone))
    assert result.error >= max(alone) * (1 - 1e-12)
    for U in result.frames:
        np.testing.assert_allclose(U.T @ U, np.eye(U.shape[1]), atol=1e-12)


def test_tucker_is_stationary():
    """At the end each frame spans leading singular vectors of the tensor projected on the others."""
    T = gaussian(10, 9, 8)
    result = tucker(T, (3, 3, 3), tol=0.0, max_iter=2000)
    for axis in range(3):
        projected = T
        for other in set(range(3)) - {axis}:
            projected = np.moveaxis(np.tensordot(result.frames[other].T, projected, (1, other)), 0, other)
        best = squares(np.linalg.svd(unfold(projected, axis), compute_uv=False)[:3])
        np.testing.assert_allclose(squares(result.core), best, rtol=1e-6)


@pytest.mark.parametrize("axes", [(0, 1), (0, 1, 2, 3)])
def test_tucker_not_above_tensorly(axes):
    pytest.importorskip("tensorly")
    from tensorly.decomposition import partial_tucker

    T = planted_tucker((20, 16, 3, 3), (6, 5, 3, 3)) + 0.5 * gaussian(20, 16, 3, 3, seed=1)
    ranks = [(6, 5, 2, 2)[a] for a in axes]
    (core, factors), _ = partial_tucker(T, ranks, modes=list(axes), n_iter_max=200, tol=1e-10)
    for axis, U in zip(axes, factors):
        core = np.moveaxis(np.tensordot(U, core, (1, axis)), 0, axis)
    assert tucker(T, ranks, axes, tol=1e-9, max_iter=200).error <= squares(T - core) * (1 + 1e-6)


def test_ranks_that_no_core_can_use():
    assert tucker_ranks((100, 2, 3), (100, 100, 100), (0, 1, 2)) == (6, 2, 3)
    assert tucker_ranks((100, 8, 9), (100, 4), (0, 1)) == (36, 4)
    T = gaussian(100, 2, 3)
    assert tucker(T, (100, 100, 100)).error < 1e-25 * squares(T)


def test_small_singular_values_are_right():
    """A spectrum over 12 decades: a Gram matrix alone would know half of them."""
    Q, _ = np.linalg.qr(gaussian(20, 20))
    P, _ = np.linalg.qr(gaussian(50, 20, seed=1))
    s = np.geomspace(1, 1e-12, 20)
    U, found = left_singular(Q * s @ P.T)
    np.testing.assert_allclose(found, s, rtol=1e-3)
    np.testing.assert_allclose(np.abs(np.einsum("ij,ij->j", U, Q)), 1, rtol=1e-6)


# --- tensor train ----------------------------------------------------------------------------------


def train_to_tensor(cores):
    found = cores[0]
    for core in cores[1:]:
        found = np.einsum("...a,adb->...db", found, core)
    return found[0, ..., 0]


def test_train_of_planted_ranks_is_exact():
    rng = np.random.default_rng(0)
    cores = [rng.standard_normal(s) for s in ((1, 6, 2), (2, 5, 4), (4, 7, 3), (3, 4, 1))]
    T = train_to_tensor(cores)
    result = tensor_train(T, tol=1e-8)
    assert result.ranks == (2, 4, 3)
    np.testing.assert_allclose(train_to_tensor(result.cores), T, atol=1e-10)


@pytest.mark.parametrize("tol", [0.9, 0.5, 0.1, 1e-3, 1e-6])
@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])
def test_train_keeps_to_the_tolerance(tol, decay):
    T = gaussian(6, 5, 4, 7) / (1 + sum(np.ogrid[:6, :5, :4, :7])) ** decay
    result = tensor_train(T, tol=tol)
    error = squares(T - train_to_tensor(result.cores))
    assert error <= tol**2 * squares(T)
    np.testing.assert_allclose(error, result.bound, rtol=1e-6, atol=1e-25 * squares(T))
    if max(result.ranks) > 1:  # the tolerance is used: with one rank less everywhere it would be missed
        fewer = tensor_train(T, [max(1, r - 1) for r in result.ranks])
        assert fewer.bound > tol**2 * squares(T)


def test_train_as_tensorly_has_it():
    pytest.importorskip("tensorly")
    from tensorly.decomposition import tensor_train as peer

    T = gaussian(8, 6, 5, 4)
    theirs = train_to_tensor([np.asarray(core) for core in peer(T, (1, 5, 9, 3, 1))])
    np.testing.assert_allclose(train_to_tensor(tensor_train(T, (5, 9, 3)).cores), theirs, atol=1e-10)


# --- hierarchical Tucker ---------------------------------------------------------------------------


def tree_to_tensor(result):
    """Nested frames by Kronecker products, independent of networks."""

    def frame(node):
        if node.left is None:
            return result.frames[node]
        transfer = result.frames[node]
        return np.kron(frame(node.left), frame(node.right)) @ transfer.reshape(-1, transfer.shape[-1])

    return frame(result.tree)[:, 0]


def unfolding(T, node):
    return np.moveaxis(T, range(node.start, node.stop), range(node.stop - node.start)).reshape(
        math.prod(T.shape[node.start : node.stop]), -1)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 4), (6, 5, 4, 3), (4, 3, 4, 3, 2), (3, 2, 3, 2, 3, 2, 2)])
def test_tree_is_exact_at_full_ranks_and_has_its_bound_below(shape):
    T = gaussian(*shape)
    full = hierarchical_tucker(T)
    np.testing.assert_allclose(tree_to_tensor(full), T.ravel(), atol=1e-11)
    result = hierarchical_tucker(T, hierarchical_ranks(shape, lambda node: 2))
    error = squares(T.ravel() - tree_to_tensor(result))
    np.testing.assert_allclose(error, result.bound, rtol=1e-9)
    # never more than all unfoldings of T itself leave out, those of the root's halves counted once
    tree, tails = result.tree, 0.0
    for node in tree.walk():
        if node not in (tree, tree.right):
            tails += squares(np.linalg.svd(unfolding(T, node), compute_uv=False)[result.frames[node].shape[-1] :])
    tails += squares(np.linalg.svd(unfolding(T, tree.right), compute_uv=False)[result.frames[tree.right].shape[-1] :]) \
        if tree.right.left is None else 0.0
    assert error <= tails * (1 + 1e-12)


@pytest.mark.parametrize("tol", [0.7, 0.2, 1e-3, 1e-6])
def test_tree_keeps_to_the_tolerance(tol):
    T = gaussian(6, 5, 4, 7) / (1.0 + sum(np.ogrid[:6, :5, :4, :7])) ** 2
    result = hierarchical_tucker(T, tol=tol)
    assert squares(T.ravel() - tree_to_tensor(result)) <= tol**2 * squares(T)


def test_tree_of_planted_ranks():
    """A sum of one function per axis has rank 2 at every node."""
    axes = [np.random.default_rng(d).standard_normal(d) for d in (3, 4, 5, 6, 3)]
    T = functools.reduce(np.add.outer, axes)
    result = hierarchical_tucker(T, tol=1e-9)
    assert {frame.shape[-1] for node, frame in result.frames.items() if node != result.tree} == {2}


@pytest.mark.parametrize("m", range(1, 8))
def test_tree_without_its_root_is_the_basis_of_the_codes(m):
    T = gaussian(5, *(3, 2, 4, 2, 3, 2, 2)[:m])
    result = hierarchical_tucker(T)
    basis = contract([tree_network(*behind_codes(result))])
    codes = result.frames[next(iter(result.tree.walk()))]
    np.testing.assert_allclose(codes @ basis, T.reshape(5, -1), atol=1e-11)


# --- block terms -----------------------------------------------------------------------------------


def planted_blocks(n_blocks, ranks, shape, seed):
    return sum(planted_tucker(shape, (*ranks, shape[2]), 100 * seed + b) for b in range(n_blocks))


@pytest.mark.parametrize("seed", range(3))
def test_planted_blocks_are_found(seed):
    T = planted_blocks(3, (2, 2), (14, 12, 6), seed)
    result = block_terms(T, 3, (2, 2), (0, 1), n_init=10, tol=1e-5, max_iter=200, rng=np.random.default_rng(seed))
    assert result.error < 1e-9 * squares(T)
    assert (np.diff(result.errors) <= 0).all()


def test_blocks_lie_between_their_tucker_decompositions():
    """Better than one block; worse than the Tucker decomposition that holds all blocks' frames."""
    T = gaussian(16, 12, 5)
    result = block_terms(T, 3, (3, 2), (0, 1), rng=np.random.default_rng(0))
    assert tucker(T, (9, 6), (0, 1)).error < result.error < tucker(T, (3, 2), (0, 1)).error
    B = contract(result.networks)
    X = T.reshape(16, -1)
    np.testing.assert_allclose(result.error, squares(X - X @ np.linalg.pinv(B) @ B), rtol=1e-9)


def test_more_starts_are_not_worse_and_seeds_decide():
    T = gaussian(12, 10, 4)
    errors = [block_terms(T, 3, (2, 2), (0, 1), n_init=n, max_iter=10, rng=np.random.default_rng(0)).error
              for n in (1, 4, 4)]
    assert errors[1] <= errors[0]
    assert errors[1] == errors[2]
