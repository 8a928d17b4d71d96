"""Dictionary learning from many rows: mini-batches, codes close to optimal, statistics that forget."""
# SPDX-License-Identifier: BSD-3-Clause

import math
from typing import NamedTuple

import numpy as np

from skfactor.solvers._atoms import draw_rows, unit_rows, update_atoms
from skfactor.solvers.lasso import lasso_codes
from skfactor.solvers.omp import omp_codes

__all__ = ["Coding", "OnlineState", "learn_online", "online_step", "start_online"]

# Weight of the past after step t is (t / (t + 1)) ** _FORGETTING: only the last twentieth of the steps counts much.
_FORGETTING = 20.0
# Duality gaps of the codes of a batch, which teach as well when they are a little off, and of those that are judged.
_GAP, _JUDGED_GAP = 2e-2, 1e-4
# Rows on which the objective is followed, the step of its first evaluation (the steps between double), and the step
# from which it may end the iterations: before, statistics are of few rows and the objective may rise.
_N_PROBE, _FIRST_PROBE, _EARLIEST_END = 2048, 16, 64
# Steps end when one lowers the objective by less than this many times `tol`: a step costs little.
_COARSER = 10
# An atom used less than this part of the mean use is replaced.
_DEAD = 1e-7


class Coding(NamedTuple):
    """How codes are found for given atoms.

    Attributes
    ----------
    alpha : float
        Price of the lasso; with `n_nonzero` it is 0.
    n_nonzero : int or None
        Codes by orthogonal matching pursuit instead, with at most so many non-zeros.
    positive : bool
    """

    alpha: float = 0.0
    n_nonzero: int | None = None
    positive: bool = False

    def encode(self, X, V, gap=_JUDGED_GAP):
        """Codes (n, K) of the rows of X, those of the lasso to this duality gap."""
        if self.n_nonzero is not None:
            return omp_codes(X, V, self.n_nonzero, positive=self.positive).toarray()
        return lasso_codes(X, V, self.alpha, positive=self.positive, tol=gap).codes


class OnlineState(NamedTuple):
    """What a stream of mini-batches leaves behind.

    Attributes
    ----------
    V : ndarray of shape (K, d)
        Unit-norm rows.
    A : ndarray of shape (K, K)
    B : ndarray of shape (K, d)
        Discounted sums of ``U'WU`` and ``U'WX``.
    n_steps : int
    """

    V: np.ndarray
    A: np.ndarray
    B: np.ndarray
    n_steps: int


def start_online(V):
    """State before the first batch."""
    V = unit_rows(np.array(V))
    return OnlineState(V, np.zeros((len(V), len(V)), V.dtype), np.zeros_like(V), 0)


def online_step(state, X, coding, *, rng, weights=None, positive_dict=False):
    """The state after one mini-batch X: codes for the present atoms, one pass over the atoms.

    Parameters
    ----------
    state : OnlineState
    X : ndarray of shape (n, d)
    coding : Coding
    rng : numpy.random.Generator or RandomState
        Draws the rows that replace atoms without use.
    weights : ndarray of shape (n,), default=None
    positive_dict : bool, default=False

    Returns
    -------
    OnlineState
    """
    X = X.astype(state.V.dtype, copy=False)
    codes = coding.encode(X, state.V, _GAP)
    weighted = (codes if weights is None else codes * weights[:, None].astype(X.dtype)).T
    keep = X.dtype.type((state.n_steps / (state.n_steps + 1)) ** _FORGETTING)
    A, B, V = keep * state.A + weighted @ codes, keep * state.B + weighted @ X, state.V.copy()
    update_atoms(V, A, B, positive=positive_dict)
    use = np.diagonal(A)
    dead = np.flatnonzero(use <= _DEAD * use.mean())
    if len(dead):
        residual = X - codes @ state.V
        if positive_dict:
            np.maximum(residual, 0, out=residual)
        residual[np.einsum("nd,nd->n", residual, residual) <= coding.alpha**2] = 0  # too short for a code
        atoms = draw_rows(residual, len(dead), rng, weights=weights)
        dead = dead[: len(atoms)]
        V[dead], A[dead], A[:, dead], B[dead] = atoms, 0, 0, 0
    return OnlineState(V, A, B, state.n_steps + 1)


def learn_online(X, V, alpha, *, rng, sample_weight=None, options, callback=None):
    """Learn from mini-batches in the order of the rows, as long as the objective of a sample of them falls.

    Parameters
    ----------
    X : ndarray of shape (n, d)
        In random order.
    V : ndarray of shape (K, d)
        Start of the atoms.
    alpha : float
    rng : numpy.random.Generator or RandomState
    sample_weight : ndarray of shape (n,), default=None
    options : DictionaryOptions
        `max_iter` counts passes over all rows. The objective is evaluated after 16, 32, 64, ... steps, on at most 2048
        rows; the iterations end when it fell by less than ten times `tol` for each step in between.
    callback : callable, default=None
        ``callback(V)`` at each evaluation; True ends the fit.

    Returns
    -------
    V : ndarray of shape (K, d)
        The atoms with the lowest objective on the sample.
    price : float
        alpha of the squared objective.
    trace : list of float
        Objectives of the sample, scaled to all rows, of the best atoms so far.
    converged : bool
    """
    size = options.batch_size
    n_batches = math.ceil(len(X) / size)
    sample = _Sample(X[:_N_PROBE], sample_weight, len(X))
    state, price = start_online(V), sample.price(alpha, options, None)
    best, trace, evaluate_at = (V, price), [], _FIRST_PROBE
    last = options.max_iter * n_batches
    for step in range(1, last + 1):
        first = (step - 1) % n_batches * size
        rows = slice(first, first + size)
        coding = Coding(price, options.n_nonzero, options.positive_code)
        state = online_step(state, X[rows], coding, rng=rng, positive_dict=options.positive_dict,
                            weights=None if sample_weight is None else sample_weight[rows])
        if step not in (evaluate_at, last):
            continue
        codes = coding.encode(sample.X, state.V)
        objective = sample.objective(alpha, options, state.V, codes)
        price = sample.price(alpha, options, (state.V, codes))
        if not trace or objective <= trace[-1]:
            best = state.V, price
        trace.append(min([objective, *trace]))
        if callback and callback(state.V):
            return *best, trace, False
        if step >= _EARLIEST_END and trace[-2] - trace[-1] <= _COARSER * options.tol * (step // 2) * trace[-1]:
            return *best, trace, True
        evaluate_at *= 2
    return *best, trace, False


class _Sample:
    """Rows on which the objective of all is estimated."""

    def __init__(self, X, sample_weight, n_rows):
        self.X = X
        if sample_weight is None:
            self.weights = np.full(len(X), n_rows / len(X))
        else:
            self.weights = sample_weight[: len(X)] * (sample_weight.sum() / sample_weight[: len(X)].sum())

    def price(self, alpha, options, solution):
        """alpha of the squared objective; `solution` is (V, codes), or None before there is one."""
        if not options.root:
            return alpha
        residual = self.X if solution is None else self.X - solution[1] @ solution[0]
        return alpha * math.sqrt(self._total(residual))

    def objective(self, alpha, options, V, codes):
        error = self._total(self.X - codes @ V)
        norm = float(self.weights @ np.abs(codes).sum(axis=1, dtype=np.float64))
        return (math.sqrt(error) if options.root else 0.5 * error) + alpha * norm

    def _total(self, residual):
        return float(self.weights @ np.einsum("nd,nd->n", residual, residual, dtype=np.float64))
