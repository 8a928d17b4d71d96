"""Sparse dictionary learning by inexact alternation: a few sweeps over the codes, one pass over the atoms.

Solving every code before an atom moves is what makes dictionary learning slow. Here an iteration is two sweeps of
block coordinate descent over the codes from where they are, and one over the atoms from the statistics ``A = U'WU`` and
``B = U'WX``, from which the objective also follows without touching X. Atoms are prolonged by momentum; a prolonged
step that would raise the objective is taken back, so the objective never rises.
"""
# SPDX-License-Identifier: BSD-3-Clause

import math
from typing import NamedTuple

import numpy as np
from scipy.linalg import solve_triangular

from skfactor.solvers._atoms import canonical_rows, draw_rows, stationarity, unit_rows, update_atoms
from skfactor.solvers._dictionary_online import Coding, OnlineState, learn_online, online_step, start_online
from skfactor.solvers._sweep import sweep_codes
from skfactor.solvers.omp import omp_codes

__all__ = ["Coding", "Dictionary", "DictionaryOptions", "OnlineState", "canonical_rows", "learn_dictionary",
           "online_step", "start_atoms", "start_online", "stationarity"]

# Sweeps over the codes in one iteration, the most momentum, and what it grows by after a step that was kept.
_N_SWEEPS, _MOMENTUM, _GROWTH = 2, 0.9, 0.1
# Iterations over which the decrease is averaged for the stopping rule.
_WINDOW = 5
# Iterations after which unused atoms are replaced; a replacement needs some to find its place.
_REPLACE_EVERY, _DEAD = 10, 1e-7
# Codes up to which float64 costs nothing that could be noticed, and tolerance below which float32 is too coarse.
_SMALL, _FINE = 1 << 15, 1e-6
# Added to the diagonal of X X' before it is factored, relative to its mean.
_RIDGE = 1e-12


class DictionaryOptions(NamedTuple):
    """How `learn_dictionary` iterates.

    Attributes
    ----------
    max_iter : int
    tol : float
        Iterations end when the objective falls by less than this fraction in one, on average.
    n_init : int
        Starts, of which the best is kept; one with mini-batches.
    positive_code, positive_dict : bool
    root : bool
        Minimise ``|X - UV| + alpha |U|_1``, the norm not squared.
    batch_size : int or None
        Rows of a mini-batch; None: every row counts in every iteration.
    n_nonzero : int or None
        Codes of at most so many non-zeros by orthogonal matching pursuit, and alpha = 0.
    """

    max_iter: int = 500
    tol: float = 1e-5
    n_init: int = 1
    positive_code: bool = False
    positive_dict: bool = False
    root: bool = False
    batch_size: int | None = None
    n_nonzero: int | None = None


class Dictionary(NamedTuple):
    """A dictionary and how it was found.

    Attributes
    ----------
    components : ndarray of shape (K, d), dtype of X
        Unit-norm rows.
    alpha : float
        The price of the squared objective: for `root` the given one times ``|X - UV|``, else the given one.
    objective_trace : ndarray of shape (n_iter,), float64
        Objective after each iteration; it never rises.
    n_iter : int
    converged : bool
        Whether the last iterations lowered the objective by less than `tol`.
    """

    components: np.ndarray
    alpha: float
    objective_trace: np.ndarray
    n_iter: int
    converged: bool


class _Problem(NamedTuple):
    X: np.ndarray  # (n, d)
    X_t: np.ndarray  # (d, n), C-contiguous
    weights: np.ndarray | None  # (n,), dtype of X
    half: float  # 1/2 of the weighted sum of squares
    alpha: float
    options: DictionaryOptions


class _State(NamedTuple):
    V: np.ndarray  # (K, d)
    codes_t: np.ndarray  # (K, n)
    A: np.ndarray  # (K, K)
    objective: float
    residual: float  # weighted |X - UV|^2


def learn_dictionary(X, n_components, alpha, *, rng, sample_weight=None, init=None, options=None, callback=None):
    r"""Minimise ``sum_i w_i (1/2 |x_i - u_i V|^2 + alpha |u_i|_1)`` over codes U and a dictionary V of unit-norm rows.

    A matrix with more columns than rows is replaced by its triangular factor: optimal atoms lie in the span of the
    rows. For many rows there are mini-batches: codes of each are solved nearly, and the atoms follow statistics that
    forget.

    Parameters
    ----------
    X : ndarray of shape (n, d), float32 or float64
        In random order for mini-batches.
    n_components : int
        Atoms, K.
    alpha : float
    rng : numpy.random.Generator or RandomState
    sample_weight : ndarray of shape (n,), default=None
    init : ndarray of shape (K, d), default=None
        Start of the atoms; rows of X drawn with probability ``~ w |x|^2`` when None.
    options : DictionaryOptions, default=None
    callback : callable, default=None
        ``callback(V)`` after each iteration, with a function V that makes the present components; True ends the fit.

    Returns
    -------
    Dictionary

    Raises
    ------
    ValueError
        If X is not a non-empty matrix, a number is out of range, or `init` has another shape.

    References
    ----------
    J. Mairal, F. Bach, J. Ponce, G. Sapiro, "Online learning for matrix factorization and sparse coding", JMLR 11
    (2010), arXiv:0908.0050 (the statistics and the update of the atoms).
    B. O'Donoghue, E. Candes, "Adaptive restart for accelerated gradient schemes", Found. Comput. Math. 15 (2015),
    doi:10.1007/s10208-013-9150-3.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.dictionary import learn_dictionary
    >>> X = np.array([[3.0, 0.0], [5.0, 0.0], [0.0, 2.0]])
    >>> result = learn_dictionary(X, 2, 0.1, rng=np.random.default_rng(0))
    >>> abs(result.components[np.argsort(result.components[:, 0])]).round(6)
    array([[0., 1.],
           [1., 0.]])
    """
    options = options or DictionaryOptions()
    X, weights = _check(X, n_components, alpha, sample_weight, init)
    unit = _power_of_two(X)
    small = len(X) * n_components <= _SMALL
    dtype = np.float64 if small or (options.tol < _FINE and X.dtype == np.float64) else np.float32
    rows = X.astype(dtype) / dtype(unit)
    price = alpha if options.root else alpha / unit
    start = None if init is None else unit_rows(np.asarray(init, dtype=dtype))
    if options.batch_size is not None:
        V = start
        if V is None:
            V = start_atoms(rows, n_components, rng, weights=weights, positive=options.positive_dict)
        report = None if callback is None else lambda V: callback(lambda: V.astype(X.dtype))
        V, price, trace, converged = learn_online(rows, V, price, rng=rng, sample_weight=weights, options=options,
                                                  callback=report)
        price *= unit
    else:
        problem = rows, n_components, price, weights, start, options
        V, residual, trace, converged = _learn_in_full(*problem, rng, callback)
        price = alpha * math.sqrt(residual) * unit if options.root else float(alpha)
    return Dictionary(np.ascontiguousarray(V, dtype=X.dtype), price,
                      np.array(trace) * (unit if options.root else unit**2), len(trace), converged)


def _learn_in_full(X, n_components, alpha, weights, start, options, rng, callback):
    """The best of `n_init` alternations, in the coordinates of the triangular factor where there is one."""
    lower = None if options.positive_dict or X.shape[1] <= len(X) else _triangular_factor(X)
    problem = _problem(X if lower is None else lower.astype(X.dtype), weights, alpha, options)

    def outside(V):  # atoms as rows of the original space
        return V if lower is None else unit_rows(solve_triangular(lower, V.T.astype(np.float64), trans="T",
                                                                  lower=True).T @ X)

    if start is not None and lower is not None:  # inner products with the rows, in the coordinates of the factor
        start = unit_rows(solve_triangular(lower, X.astype(np.float64) @ start.T, lower=True).T.astype(X.dtype))
    report = None if callback is None else lambda V: callback(lambda: outside(V))
    best = None
    for _ in range(options.n_init):
        V = start
        if V is None:
            V = start_atoms(problem.X, n_components, rng, weights=weights, positive=options.positive_dict)
        state, trace, converged = _alternate(problem, V, rng, report)
        if best is None or state.objective < best[0].objective:
            best = state, trace, converged
    state, trace, converged = best
    return outside(state.V), state.residual, trace, converged


def _alternate(problem, V, rng, report):
    """Iterations from the dictionary V; returns the state, the trace of objectives, and whether it converged."""
    options, K = problem.options, len(V)
    codes_t = np.zeros((K, len(problem.X)), dtype=V.dtype)
    state = _State(V, codes_t, np.zeros((K, K), V.dtype), _objective(problem, 2 * problem.half, 0.0), 2 * problem.half)
    previous, momentum, trace = V, 0.0, []
    while len(trace) < options.max_iter:
        ahead = state.V if momentum == 0 else _prolonged(state.V, previous, momentum, options)
        new = _step(problem, ahead, state)
        if new.objective > state.objective and momentum > 0:
            momentum = 0.0
            new = _step(problem, state.V, state)
        if not new.objective <= state.objective:  # only rounding is left
            trace.append(state.objective)
            return state, trace, True
        previous, state = state.V, new
        if not options.n_nonzero:  # codes chosen greedily jump
            momentum = min(_MOMENTUM, momentum + _GROWTH)
        trace.append(state.objective)
        if len(trace) % _REPLACE_EVERY == 0:
            replaced = _replace_unused(problem, state, rng)
            if replaced is not state:
                state, momentum, previous = replaced, 0.0, replaced.V
        if report and report(state.V):
            return state, trace, False
        if len(trace) > _WINDOW and trace[-1 - _WINDOW] - trace[-1] <= options.tol * _WINDOW * trace[-1]:
            return state, trace, True
    return state, trace, False


def _step(problem, V, state):
    """Better codes at the atoms V, one pass over the atoms; the state that results."""
    codes_t = _matched_codes(problem, V, state) if problem.options.n_nonzero else _swept_codes(problem, V, state)
    weighted = codes_t if problem.weights is None else codes_t * problem.weights
    A, B = weighted @ codes_t.T, weighted @ problem.X
    V = V.copy()
    update_atoms(V, A, B, positive=problem.options.positive_dict)
    fit = np.vdot(B, V) - 0.5 * np.vdot(A, V @ V.T)
    residual = max(0.0, 2 * (problem.half - float(fit)))
    norm = float(np.abs(weighted).sum(dtype=np.float64))
    return _State(V, codes_t, A, _objective(problem, residual, norm), residual)


def _swept_codes(problem, V, state):
    codes_t, alpha = state.codes_t.copy(), _price(problem, state)
    sweep_codes(codes_t, V @ problem.X_t, V @ V.T, alpha, _N_SWEEPS, positive=problem.options.positive_code)
    return codes_t


def _matched_codes(problem, V, state):
    """Codes by matching pursuit; where those of before are better, they stay."""
    codes = omp_codes(problem.X, V, problem.options.n_nonzero, positive=problem.options.positive_code).toarray()
    old = state.codes_t.T
    errors = [np.square(problem.X - U @ V).sum(axis=1) for U in (codes, old)]
    return np.ascontiguousarray(np.where((errors[0] <= errors[1])[:, None], codes, old).T)


def _price(problem, state):
    """alpha of the squared objective whose stationary points are those of the objective here."""
    return problem.alpha * math.sqrt(state.residual) if problem.options.root else problem.alpha


def _objective(problem, residual, norm):
    if problem.options.root:
        return math.sqrt(residual) + problem.alpha * norm
    return 0.5 * residual + problem.alpha * norm


def _prolonged(V, previous, momentum, options):
    ahead = V + V.dtype.type(momentum) * (V - previous)
    if options.positive_dict:
        np.maximum(ahead, 0, out=ahead)
    return unit_rows(ahead)


def _replace_unused(problem, state, rng):
    """Put atoms that no code uses where the residual is; the objective stays as it is."""
    use = np.diagonal(state.A)
    dead = np.flatnonzero(use <= _DEAD * use.mean())
    if len(dead) == 0:
        return state
    residual = problem.X - state.codes_t.T @ state.V
    if problem.options.positive_dict:
        np.maximum(residual, 0, out=residual)
    # a residual no longer than alpha has the code zero
    residual[np.einsum("nd,nd->n", residual, residual) <= _price(problem, state) ** 2] = 0
    atoms = draw_rows(residual, len(dead), rng, weights=problem.weights)
    if len(atoms) == 0:
        return state
    V, codes_t, dead = state.V.copy(), state.codes_t.copy(), dead[: len(atoms)]
    V[dead], codes_t[dead] = atoms, 0
    return state._replace(V=V, codes_t=codes_t)


def start_atoms(X, n_components, rng, *, weights=None, positive=False):
    """Rows of X as unit-norm atoms, and random directions where there are not enough of them."""
    V = draw_rows(np.maximum(X, 0) if positive else X, n_components, rng, weights=weights)
    missing = n_components - len(V)
    if missing:
        extra = rng.standard_normal(size=(missing, X.shape[1]))
        V = np.concatenate([V, unit_rows(np.abs(extra) if positive else extra).astype(X.dtype)])
    return V


def _problem(X, weights, alpha, options):
    X = np.ascontiguousarray(X)
    squares = np.einsum("nd,nd->n", X, X, dtype=np.float64)
    half = 0.5 * float(squares.sum() if weights is None else squares @ weights)
    return _Problem(X, np.ascontiguousarray(X.T), None if weights is None else weights.astype(X.dtype), half, alpha,
                    options)


def _triangular_factor(X):
    """Lower L with ``L L' = X X'``: rows with the same inner products as those of X, in len(X) columns."""
    X = X.astype(np.float64)
    gram = X @ X.T
    gram[np.diag_indices(len(X))] += _RIDGE * np.trace(gram) / len(X) or 1.0
    return np.linalg.cholesky(gram)


def _power_of_two(X):
    """A power of two near the root mean square of X: dividing by it costs no bit."""
    top = float(np.abs(X).max())
    if top == 0:
        return 1.0
    rms = top * math.sqrt(float(np.square(X / X.dtype.type(top), dtype=np.float64).mean()))
    return 2.0 ** round(math.log2(rms))


def _check(X, n_components, alpha, sample_weight, init):
    X = np.asarray(X)
    X = X if X.dtype in (np.float32, np.float64) else X.astype(np.float64)
    if X.ndim != 2 or X.size == 0:
        raise ValueError(f"X must be a non-empty matrix, got shape {X.shape}")
    if n_components < 1:
        raise ValueError(f"n_components must be at least 1, got {n_components}")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must be a number of at least 0, got {alpha}")
    if init is not None and np.shape(init) != (n_components, X.shape[1]):
        raise ValueError(f"init must have shape {(n_components, X.shape[1])}, got {np.shape(init)}")
    if sample_weight is None:
        return X, None
    weights = np.asarray(sample_weight, dtype=np.float64)
    if weights.shape != X.shape[:1] or not (np.isfinite(weights) & (weights >= 0)).all() or not weights.any():
        raise ValueError(f"sample_weight must be {len(X)} finite numbers of at least 0, not all zero")
    return X, weights
