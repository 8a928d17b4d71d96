"""`TensorFactorizer`: what the tensor decompositions of rows share; the shape, the ranks a budget allows, the refit."""
# SPDX-License-Identifier: BSD-3-Clause

import math
from numbers import Integral

import numpy as np

from skfactor._sklearn import Interval, RealNotInt
from skfactor.estimators._linear import Factors, LinearFactorizer
from skfactor.solvers._tensors import balanced_shape, left_singular
from skfactor.solvers.multilinear import fit_networks, principal_codes

__all__ = ["RANK", "SHAPE", "TensorFactorizer", "checked_ranks", "least_harm"]

RANK = [Interval(Integral, 1, None, closed="left"), Interval(RealNotInt, 0, 1, closed="right"), tuple, list, None]
SHAPE = ["array-like", None]


class TensorFactorizer(LinearFactorizer):
    """Base of estimators that decompose the rows of `X` as tensors.

    A subclass has the parameters `kernel_shape`, `tensor_shape` and `max_iter`, and defines

    * `_decomposer(T, n) -> decompose`: from the tensor (rows, *shape), whose rows stand for n, a function that gives
      for such a tensor a sequence of `Network`, the bound of its squared error or None, and the number of its sweeps;
    * `_decoder(networks, dtype) -> LinearDecoder`;
    * `_ranks(decoder) -> tuple of int`.

    `_refits` says whether the refit of all operands is of use without a gram, `_random` whether starts are random.
    """

    _refits = True
    _random = False

    def _factorize(self, X, weights, gram):
        shape = self._row_shape(X.shape[1])
        n = len(X) if weights is None else weights.sum()
        grouped = gram is not None and len(gram) > 1
        rows, unit = _rows(X, weights, grouped, principal=not grouped and (self._random or len(X) > X.shape[1]))
        decompose = self._decomposer(rows.reshape(-1, *shape), n)
        networks, bound, n_iter = decompose(rows.reshape(-1, *shape))
        if gram is not None or self._refits:
            result = fit_networks(rows, shape, networks, lambda T: decompose(T)[0], gram=gram, max_iter=self.max_iter,
                                  callback=self._iteration_reporter(self.max_iter))
            networks, n_iter = result.networks, n_iter + result.n_iter
        networks = principal_codes(rows, networks, gram)
        decoder = self._decoder([_as_dtype(n, X.dtype) for n in networks], X.dtype.name)
        return Factors(decoder, None if gram is not None or bound is None else bound * unit**2, {
            "tensor_shape_": shape, "n_iter_": n_iter, "ranks_": self._ranks(decoder)})

    def _row_shape(self, d):
        """Axes of a row, those of length 1 left out."""
        for name in ("tensor_shape", "kernel_shape"):
            shape = getattr(self, name)
            if shape is None:
                continue
            shape = tuple(shape)
            if not all(isinstance(s, Integral) and s >= 1 for s in shape) or math.prod(shape) != d:
                raise ValueError(f"{name} must be positive integers whose product is the {d} columns of X, got {shape}")
            shape = tuple(int(s) for s in shape if s > 1) or (1,)
            if len(shape) > 8:
                raise ValueError(f"{name} must have at most 8 axes longer than 1, got {len(shape)}")
            return shape
        return balanced_shape(d)


def _as_dtype(network, dtype):
    return network._replace(operands=tuple(np.ascontiguousarray(a, dtype=dtype) for a in network.operands))


def _rows(X, weights, grouped, principal):
    """Rows in float64, scaled by the roots of their weights and by a power of two, and this unit.

    `principal` puts the principal directions in their place, each times its singular value: every basis fits both
    equally well, they are never more than the columns, and depend on the second moment of the rows only. Rows that are
    grouped keep their places.
    """
    rows = X.astype(np.float64)
    if weights is not None:
        rows *= np.sqrt(weights)[:, None]
        rows = rows if grouped else rows[weights > 0]
    largest = np.abs(rows).max()
    unit = 2.0 ** np.frexp(largest)[1] if largest > 0 else 1.0
    rows /= unit
    if principal:
        U, s = left_singular(rows)
        rows = U[:, : max(1, int((s > 1e-13 * s[0]).sum()))].T @ rows
        extreme = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)
        rows *= np.where(extreme < 0, -1.0, 1.0)
    return rows, unit


def checked_ranks(rank, n_ranks, of):
    """A tuple or list of ranks as a tuple of `n_ranks` integers, an integer as that many times itself."""
    if isinstance(rank, Integral):
        return (int(rank),) * n_ranks
    rank = tuple(rank)
    if len(rank) != n_ranks or not all(isinstance(r, Integral) and r >= 1 for r in rank):
        raise ValueError(f"rank must be an integer, a fraction or {n_ranks} integers of at least 1, one for {of}, "
                         f"got {rank}")
    return tuple(int(r) for r in rank)


def least_harm(tails, numbers, budget):
    """Ranks that keep to a budget and leave out little.

    From full ranks down: the rank is lowered that loses the least squared error for the numbers it saves, until they
    fit the budget or all ranks are 1.

    Parameters
    ----------
    tails : list of ndarray
        For each rank the squared error of leaving out all behind it: ``tails[k][r]`` for rank r, the last is that of
        the full rank.
    numbers : callable
        ``numbers(ranks) -> int`` stored.
    budget : float

    Returns
    -------
    ranks : tuple of int

    Examples
    --------
    >>> import numpy as np
    >>> least_harm([np.array([9.0, 1, 0]), np.array([9.0, 8, 7, 0])], lambda ranks: 10 * sum(ranks), 40)
    (1, 3)
    """
    ranks = [len(t) - 1 for t in tails]
    held = numbers(ranks)
    while held > budget * (1 + 1e-12) and max(ranks) > 1:
        best = None
        for k, rank in enumerate(ranks):
            if rank == 1:
                continue
            fewer = numbers([*ranks[:k], rank - 1, *ranks[k + 1 :]])
            price = (tails[k][rank - 1] - tails[k][rank]) / max(held - fewer, 1e-3)
            if best is None or price < best[0]:
                best = price, k, fewer
        ranks[best[1]] -= 1
        held = best[2]
    return tuple(ranks)


def singular_tails(values):
    """Squared error of every rank from 0 to full, of singular values that fall."""
    return np.append(np.cumsum(np.square(values[::-1]))[::-1], 0.0)
