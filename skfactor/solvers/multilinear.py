# SPDX-License-Identifier: BSD-3-Clause
"""Bases that are contractions of small tensors, fitted to the output of a layer by alternating least squares.

A basis B (n_codes, d) is a stack of networks, each of which contracts operands that share bonds, in the form of a tree,
to an array (codes, column axes): the decoders of Tucker, tensor train, block-term and hierarchical Tucker are all such.
B is linear in each operand, so ``tr((X - C B) G (X - C B)ᵀ)`` is a quadratic of each operand and of the codes.
"""

import math
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

import numpy as np

from skfactor.solvers._tensors import mode_product
from skfactor.solvers.whitening import damped_grams, row_groups, whiten

__all__ = ["MultilinearResult", "Network", "contract", "fit_networks", "principal_codes",
           "refit_networks"]

_CG_STEPS = 12  # most steps for one operand in one sweep
_CG_TOL = 1e-2  # relative residual, in the norm of the preconditioner, at which they stop


class Network(NamedTuple):
    """A contraction of operands; each letter of `output` belongs to one operand, each other letter to two.

    Attributes
    ----------
    operands : tuple of ndarray
    labels : tuple of str
        A letter for each axis of each operand.
    output : str
        Letter of the codes, then those of the column axes.
    """

    operands: tuple
    labels: tuple
    output: str

    @property
    def shape(self):
        """(codes, column axes)."""
        extents = {x: n for a, labels in zip(self.operands, self.labels) for x, n in zip(labels, a.shape)}
        return tuple(extents[x] for x in self.output)

    @property
    def codes(self):
        """Number of codes."""
        return self.shape[0]


class MultilinearResult(NamedTuple):
    """Fitted networks.

    Attributes
    ----------
    networks : tuple of Network
    error : float
        tr((X − C B) G (X − C B)ᵀ) with the best codes C and the damped gram.
    errors : ndarray of shape (n_iter + 1,)
        The same before the first and after each sweep; never rises.
    n_iter : int
    """

    networks: tuple
    error: float
    errors: np.ndarray
    n_iter: int


class _Data(NamedTuple):
    """X G and G for each group of rows, and tr(X G Xᵀ); a None among the grams is the identity."""

    XG: list
    grams: list
    total: float


def contract(networks):
    """Basis (n_codes, d) of a sequence of networks.

    >>> import numpy as np
    >>> contract([Network((np.ones((2, 1)), np.ones((3, 1))), ("xa", "ya"), "xy")]).shape
    (2, 3)
    """
    return np.vstack([_contracted(n.operands, n.labels, n.output) for n in networks])


def _contracted(operands, labels, output):
    array = _einsum(labels, output, operands)
    return array.reshape(len(array), -1)


def _einsum(labels, output, operands):
    """Contraction of a tree: every letter belongs to two operands, or to one and the output."""
    operands = list(operands)
    pairs, order = _plan(tuple(labels), output, tuple(a.shape for a in operands))
    for i, j, axes in pairs:
        b, a = operands.pop(j), operands.pop(i)
        operands.append(np.tensordot(a, b, axes))
    return operands[0].transpose(order)


@lru_cache(maxsize=4096)
def _plan(labels, output, shapes):
    """Pairs (i, j, axes to sum over) to contract, those first that take the least work; the order of the axes then."""
    extents = {x: n for letters, shape in zip(labels, shapes) for x, n in zip(letters, shape)}
    labels, pairs = list(labels), []
    while len(labels) > 1:
        def work(pair):
            together = set(labels[pair[0]]) | set(labels[pair[1]])
            return math.prod(extents[x] for x in together), pair

        i, j = min(combinations(range(len(labels)), 2), key=work)
        b, a = labels.pop(j), labels.pop(i)
        shared = [x for x in a if x in b]
        pairs.append((i, j, ([a.index(x) for x in shared], [b.index(x) for x in shared])))
        labels.append("".join(x for x in a + b if x not in shared))
    return pairs, [labels[0].index(x) for x in output]


def fit_networks(X, shape, networks, decompose, *, gram=None, tol=1e-3, max_iter=20, callback=None):
    """Refit a decomposition of the rows of X, as tensors of `shape`, for the output of the layer.

    With a gram, the work is done in coordinates in which it is near the identity: every column axis is multiplied by
    the root of the gram's partial trace over all others, which changes operands and not their structure. Where there
    is one column axis this is the whole gram, and a decomposition that is optimal without a gram is so with it. It
    starts from the decomposition in these coordinates or from the one given, whichever has the smaller error.

    Parameters
    ----------
    X : ndarray of shape (n, d), float64
    shape : tuple of int
        Column axes; their product is d.
    networks : sequence of Network
        Decomposition of X itself.
    decompose : callable
        ``decompose(T) -> sequence of Network`` for a tensor (n, *shape).
    gram : ndarray of shape (g, d, d), optional
    tol, max_iter, callback
        As in :func:`refit_networks`.

    Returns
    -------
    result : MultilinearResult
    """
    if gram is None:
        return refit_networks(X, networks, tol=tol, max_iter=max_iter, callback=callback)
    grams = damped_grams(gram)
    scales = [whiten(partial, damping=0.0) for partial in _partial_traces(grams.mean(axis=0), shape)]
    # rows x R, gram R⁻¹ G R⁻ᵀ, with G near the Kronecker product of R Rᵀ
    roots, inverses = [w.root.T for w in scales], [w.inverse for w in scales]
    X = _scaled(X, shape, roots)
    grams = np.stack([_scaled(_scaled(G, shape, inverses).T, shape, inverses) for G in grams])
    starts = [tuple(decompose(X.reshape(-1, *shape))), _scaled_networks(networks, roots)]
    data = _data(X, grams)
    start = min(starts, key=lambda networks: _best_codes(data, contract(networks))[1])
    result = _refit(data, start, tol, max_iter, callback)
    return result._replace(networks=_scaled_networks(result.networks, [R.T for R in inverses]))


def refit_networks(X, networks, *, gram=None, tol=1e-3, max_iter=20, callback=None):
    r"""Minimise :math:`\operatorname{tr}\,(X - C B) G (X - C B)^T` over the codes and all operands of B.

    Alternating least squares: the codes in closed form, each operand by conjugate gradients. Without a gram and with
    one network the preconditioner is the inverse of the quadratic, and one step is the closed form.

    Parameters
    ----------
    X : ndarray of shape (n, d), float64
    networks : sequence of Network
        Start.
    gram : ndarray of shape (g, d, d), optional
        The identity when not given; with g matrices the rows split evenly over g groups. Used as it is.
    tol : float, default=1e-3
        Stop when a sweep lowers the error by less than this part of it.
    max_iter : int, default=20
        Most sweeps.
    callback : callable, optional
        Called after every sweep; True stops.

    Returns
    -------
    result : MultilinearResult
    """
    return _refit(_data(X, [None] if gram is None else gram), tuple(networks), tol, max_iter, callback)


def principal_codes(X, networks, gram=None):
    """Networks of the same basis whose codes are uncorrelated and fall in size, each network for itself.

    The rows of the basis become orthonormal in the metric of the damped gram, and the largest number of each positive:
    codes that do not depend on how the basis was found.

    Parameters
    ----------
    X : ndarray of shape (n, d), float64
    networks : sequence of Network
    gram : ndarray of shape (g, d, d), optional

    Returns
    -------
    networks : tuple of Network
    """
    grams = [None] if gram is None else damped_grams(gram)
    metric = None if gram is None else grams.mean(axis=0)
    codes = np.vstack(_best_codes(_data(X, grams), contract(networks))[0])
    found = []
    for network, C in zip(networks, np.split(codes, np.cumsum([n.codes for n in networks])[:-1], axis=1)):
        B = contract([network])
        values, vectors = np.linalg.eigh((B if metric is None else B @ metric) @ B.T)
        keep = values > 1e-14 * max(values[-1], 0.0)
        roots = np.sqrt(np.where(keep, values, 1.0))
        _, turned = np.linalg.eigh((vectors * roots).T @ (C.T @ C) @ (vectors * roots))
        turn = turned[:, ::-1].T @ (vectors / roots).T  # rows of turn @ B are orthonormal, codes C turn⁻¹ uncorrelated
        basis = turn @ B
        largest = np.take_along_axis(basis, np.abs(basis).argmax(axis=1)[:, None], axis=1)
        turn *= np.where(largest < 0, -1.0, 1.0)
        place = next(i for i, labels in enumerate(network.labels) if network.output[0] in labels)
        axis = network.labels[place].index(network.output[0])
        found.append(_with_operand(network, place, mode_product(network.operands[place], turn, axis)))
    return tuple(found)


def _refit(data, networks, tol, max_iter, callback):
    C, error = _best_codes(data, contract(networks))
    errors, n_iter = [error], 0
    while n_iter < max_iter and errors[-1] > 1e-13 * data.total:
        for place in range(len(networks[0].operands)):
            networks = _best_operand(data, C, networks, place)
        C, error = _best_codes(data, contract(networks))
        n_iter += 1
        errors.append(min(error, errors[-1]))
        if (callback and callback()) or errors[-2] - errors[-1] <= tol * errors[-2]:
            break
    return MultilinearResult(networks, errors[-1], np.array(errors), n_iter)


def _data(X, grams):
    groups = [X[rows] for rows in row_groups(len(X), len(grams))]
    XG = [x if G is None else x @ G for x, G in zip(groups, grams)]
    return _Data(XG, list(grams), sum(float(np.ravel(x) @ np.ravel(y)) for x, y in zip(groups, XG)))


def _best_codes(data, B):
    """Codes of each group of rows, and the error."""
    codes, kept = [], 0.0
    for XG, G in zip(data.XG, data.grams):
        A, b = (B if G is None else B @ G) @ B.T, XG @ B.T
        codes.append(b @ _inverse(A, 1e-13))
        kept += float(np.ravel(codes[-1]) @ np.ravel(b))
    return codes, max(data.total - kept, 0.0)


def _inverse(A, floor):
    """Inverse of a positive semi-definite matrix without the directions below `floor` times the largest eigenvalue."""
    values, vectors = np.linalg.eigh((A + A.T) / 2)
    inverses = np.divide(1.0, values, out=np.zeros_like(values), where=values > max(floor * values[-1], 0.0))
    return (vectors * inverses) @ vectors.T


def _best_operand(data, codes, networks, place):
    """Lower the error over the operands at one place of all networks, codes and other operands fixed."""
    moments = [C.T @ C for C in codes]
    start = [n.operands[place] for n in networks]
    B = _stacked(networks, place, start)
    cuts = np.cumsum([n.codes for n in networks])[:-1]

    def gradient(W):
        return [_adjoint(n, place, w) for n, w in zip(networks, np.split(W, cuts))]

    def normal(operands):
        return gradient(_applied(data, moments, _stacked(networks, place, operands)))

    blocks = [sum(moments)[i : i + n.codes, i : i + n.codes] for i, n in zip((0, *cuts), networks)]
    inverses = [_environments(n, place, S) for n, S in zip(networks, blocks)]
    residual = gradient(sum(C.T @ XG for C, XG in zip(codes, data.XG)) - _applied(data, moments, B))
    step = _conjugate_gradients(normal, residual, lambda r: [_multiplied(a, e) for a, e in zip(r, inverses)])
    return tuple(_with_operand(n, place, a + s) for n, a, s in zip(networks, start, step))


def _conjugate_gradients(normal, residual, precondition):
    """Solve a positive semi-definite system in lists of arrays; every step lowers the quadratic."""
    x = [np.zeros_like(r) for r in residual]
    z = precondition(residual)
    p, rho = z, _dot(residual, z)
    stop = _CG_TOL**2 * rho
    for _ in range(_CG_STEPS):
        if not rho > stop:
            break
        q = normal(p)
        curvature = _dot(p, q)
        if not curvature > 0:
            break
        alpha = rho / curvature
        x = [a + alpha * b for a, b in zip(x, p)]
        residual = [a - alpha * b for a, b in zip(residual, q)]
        z = precondition(residual)
        rho, before = _dot(residual, z), rho
        p = [a + (rho / before) * b for a, b in zip(z, p)]
    return x


def _dot(a, b):
    return sum(float(np.ravel(x) @ np.ravel(y)) for x, y in zip(a, b))


def _applied(data, moments, B):
    """Σ_g CᵀC B G: what the quadratic makes of a basis."""
    return sum(S @ B if G is None else (S @ B) @ G for S, G in zip(moments, data.grams))


def _with_operand(network, place, operand):
    operands = (*network.operands[:place], operand, *network.operands[place + 1 :])
    return network._replace(operands=operands)


def _stacked(networks, place, operands):
    return contract([_with_operand(n, place, a) for n, a in zip(networks, operands)])


def _adjoint(network, place, W):
    """Gradient of <W, B> with respect to one operand."""
    operands = (W.reshape(network.shape), *network.operands[:place], *network.operands[place + 1 :])
    labels = (network.output, *network.labels[:place], *network.labels[place + 1 :])
    return _einsum(labels, network.labels[place], operands)


def _environments(network, place, S):
    """For each axis of an operand the inverse of the quadratic along it, if the gram were the identity; None is I.

    The network is a tree: what lies behind different bonds of the operand is independent.
    """
    found = []
    for letter in network.labels[place]:
        if letter == network.output[0]:
            E = S
        elif letter in network.output:
            found.append(None)
            continue
        else:
            E = _subtree_gram(network, place, letter, S)
        found.append(_inverse(E, 1e-12))
    return found


def _subtree_gram(network, place, bond, S):
    """Second moment (r, r) of what lies behind a bond of the operand, the codes' moment S included where they do."""
    behind, letters = [], {bond}
    while True:
        more = [i for i, labels in enumerate(network.labels)
                if i != place and i not in behind and letters & (set(labels) - set(network.output))]
        if not more:
            break
        behind += more
        letters |= {x for i in more for x in network.labels[i]}
    columns = network.output[1:]
    operands, labels = [], []
    for i in behind:
        operands += [network.operands[i]] * 2
        # the conjugate copy has letters of its own but for the column axes, which are summed
        labels += [network.labels[i], "".join(x if x in columns else x.swapcase() for x in network.labels[i])]
    if network.output[0] in letters:
        operands, labels = [*operands, S], [*labels, network.output[0] + network.output[0].swapcase()]
    return _einsum(labels, bond + bond.swapcase(), operands)


def _multiplied(array, matrices):
    """Every axis of an array multiplied by its matrix, where it has one."""
    for axis, matrix in enumerate(matrices):
        if matrix is not None:
            array = mode_product(array, matrix, axis)
    return array


def _partial_traces(gram, shape):
    """Second moment of each column axis, averaged over all others; their mean diagonals multiply to the gram's."""
    found, letters = [], "abcdefghijklmnopqrstuvwx"[: len(shape)]
    tensor = gram.reshape(*shape, *shape)
    for k, letter in enumerate(letters):
        traced = np.einsum(f"{letters}{letters.replace(letter, letter.upper())}->{letter}{letter.upper()}", tensor)
        traced = traced / (np.prod(shape) // shape[k])
        mean = np.trace(traced) / shape[k]
        found.append(traced / mean if k and mean > 0 else traced)
    return found


def _scaled(X, shape, matrices):
    """Rows of X as tensors, each axis multiplied by its matrix."""
    return _multiplied(X.reshape(-1, *shape), (None, *matrices)).reshape(len(X), -1)


def _scaled_networks(networks, matrices):
    """Networks of the basis whose column axes are multiplied by these matrices."""
    found = []
    for network in networks:
        by_letter = dict(zip(network.output[1:], matrices, strict=True))
        operands = tuple(_multiplied(a, [by_letter.get(x) for x in labels])
                         for a, labels in zip(network.operands, network.labels))
        found.append(network._replace(operands=operands))
    return tuple(found)
