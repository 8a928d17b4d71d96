# SPDX-License-Identifier: BSD-3-Clause
"""Codes that keep a layer's output: error feedback, coordinate descent and the codebook that fits them.

For weights ``X`` (one filter per row), inputs with second moment ``G`` and the reconstruction ``X̂ = centers[codes]``
the solvers lower

    Σ_i r_i (x_i - x̂_i) G (x_i - x̂_i)ᵀ  +  λ Σ_ij L[codes_ij],

the weighted squared error of the layer's output plus the rate of the codes. Rows do not interact, so the codes of a row
depend on that row, the codebook, the code lengths and the gram alone.

References
----------
.. [1] Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
   Transformers", 2022. arXiv:2210.17323
.. [2] Hassibi, Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 1992.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.linalg import solve, solve_triangular
from scipy.sparse.linalg import LinearOperator, cg

_BLOCK = 64  # columns whose updates are applied to the rest of the matrix in one product


class ClassLengths(NamedTuple):
    """Code lengths that depend on where a weight stands: ``table[classes[i, j]]`` holds the lengths at ``(i, j)``."""

    table: np.ndarray  # (n_classes, k) bits
    classes: np.ndarray  # (n, d) integer


def feedback_quantize(X, centers, gram, *, code_lengths=None, entropy_weight=0.0, row_weight=None, damping=0.01):
    """Choose codes column by column and pass each column's error on to the columns still open.

    With ``G + δI = (UᵀU)⁻¹``, ``U`` upper triangular in the order of falling input power, the choice at column j lowers
    ``r_i (w_ij - c)² / U_jj² + λ L[c]``, and the remaining weights absorb the error: ``w_i -= (w_ij - c) U_j / U_jj``.
    One sweep, not the optimum; :func:`refine_codes` improves on it.

    Parameters
    ----------
    X : ndarray of shape (n, d)
        Weights, one filter per row.
    centers : ndarray of shape (k,) or (n, k)
        Codebook, in any order; or one codebook per row, ascending.
    gram : ndarray of shape (d, d) or (g, d, d)
        Second moment (or covariance, if a bias takes up the mean) of the layer's inputs. With ``g`` matrices the rows
        are split evenly over ``g`` groups, as in a grouped convolution.
    code_lengths : ndarray of shape (k,) or ClassLengths, optional
        Bits of every code.
    entropy_weight : float, default=0.0
        λ, output error per bit.
    row_weight : ndarray of shape (n,), optional
        Importance r of every row's output; 1 when not given. All positive.
    damping : float, default=0.01
        δ as a multiple of the mean of the gram's diagonal.

    Returns
    -------
    codes : ndarray of shape (n, d), int64

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.feedback import feedback_quantize
    >>> X = np.array([[0.4, 0.4]])
    >>> feedback_quantize(X, np.array([0.0, 1.0]), np.eye(2))
    array([[0, 0]])
    >>> feedback_quantize(X, np.array([0.0, 1.0]), np.ones((2, 2)))  # one input seen twice: 0.8 is near 0 + 1
    array([[0, 1]])
    """
    X, centers = np.asarray(X, dtype=np.float64), np.asarray(centers, dtype=np.float64)
    codes = np.empty(X.shape, dtype=np.int64)
    for rows, G in _groups(len(X), gram):
        table = centers if centers.ndim == 1 else centers[rows]
        choose = _Chooser(table, *_rate(code_lengths, entropy_weight, row_weight, X.shape, rows))
        codes[rows] = _sweep(X[rows], G, choose, damping)
    return codes


def refine_codes(X, codes, centers, gram, *, code_lengths=None, entropy_weight=0.0, row_weight=None, n_passes=2):
    """Coordinate descent on codes: every code in turn takes the best value for all others held fixed.

    With ``E = X - X̂`` the best real value at column j is ``t = x̂_ij + (E G)_ij / G_jj`` and the code lowers
    ``r_i G_jj (t - c)² + λ L[c]``. The objective of the module never rises; columns that carry no input keep the code
    of least rate among equals.

    Parameters
    ----------
    X, centers, gram, code_lengths, entropy_weight, row_weight
        As in :func:`feedback_quantize`.
    codes : ndarray of shape (n, d), integer
        Where to start.
    n_passes : int, default=2
        Sweeps over the columns; stops when one changes nothing.

    Returns
    -------
    codes : ndarray of shape (n, d), int64

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.feedback import refine_codes
    >>> refine_codes(np.array([[0.4, 0.4]]), np.array([[0, 0]]), np.array([0.0, 1.0]), np.ones((2, 2)))
    array([[1, 0]])
    """
    X, centers = np.asarray(X, dtype=np.float64), np.asarray(centers, dtype=np.float64)
    out = np.array(codes, dtype=np.int64)
    for rows, G in _groups(len(X), gram):
        table = centers if centers.ndim == 1 else centers[rows]
        choose = _Chooser(table, *_rate(code_lengths, entropy_weight, row_weight, X.shape, rows))
        out[rows] = _descend(X[rows], out[rows], G, choose, n_passes)
    return out


def refit_centers(X, codes, centers, gram, *, row_weight=None, tol=1e-10, max_iter=None):
    """Codebook of least output error for given codes: ``argmin_c Σ_i r_i (x_i - c[codes_i]) G (x_i - c[codes_i])ᵀ``.

    The normal equations ``A c = b`` have ``A = Σ_i r_i S_iᵀ G S_i`` with the one-hot ``S_i`` of row i. They are solved
    by conjugate gradients from the old centers, with products that cost one ``(n, d) @ (d, d)`` each, so that memory
    stays linear in the weights.

    Parameters
    ----------
    X, codes, gram, row_weight
        As in :func:`refine_codes`.
    centers : ndarray of shape (k,)
        Starting point; a center that no code uses is returned as it came.
    tol : float, default=1e-10
        Residual of the normal equations relative to their right-hand side.
    max_iter : int, optional
        Limit of iterations; ``10 k`` when not given.

    Returns
    -------
    centers : ndarray of shape (k,)
        Never of larger output error than the ``centers`` given.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.feedback import refit_centers
    >>> refit_centers(np.array([[1.0, 2.0, 9.0]]), np.array([[0, 0, 1]]), np.zeros(2), np.eye(3)).round(6)
    array([1.5, 9. ])
    """
    X, codes, start = np.asarray(X, dtype=np.float64), np.asarray(codes), np.asarray(centers, dtype=np.float64)
    k, r = len(start), np.ones(len(X)) if row_weight is None else np.asarray(row_weight, dtype=np.float64)
    groups = list(_groups(len(X), gram))

    def gather(E):
        # Σ_i r_i S_iᵀ G e_i
        total = np.zeros(k)
        for rows, G in groups:
            total += np.bincount(codes[rows].ravel(), ((E[rows] @ G) * r[rows, None]).ravel(), minlength=k)
        return total

    diagonal = np.zeros(k)
    for rows, G in groups:
        weight = r[rows, None] * np.diag(G)
        diagonal += np.bincount(codes[rows].ravel(), weight.ravel(), minlength=k)
    precondition = np.where(diagonal > 0, 1.0 / np.where(diagonal > 0, diagonal, 1.0), 1.0)
    # b - A c0 is the gather of the error, so a small step is solved for and unused centers get a step of zero.
    residual = gather(X - start[codes])
    if not residual.any():
        return start.copy()
    A = LinearOperator((k, k), matvec=lambda v: gather(np.ravel(v)[codes]), dtype=np.float64)
    M = LinearOperator((k, k), matvec=lambda v: precondition * np.ravel(v), dtype=np.float64)
    step, _ = cg(A, residual, rtol=tol, atol=0.0, maxiter=max_iter or 10 * k, M=M)
    new = start + step
    better = output_error(X, new[codes], gram, row_weight=r) <= output_error(X, start[codes], gram, row_weight=r)
    return new if better else start.copy()


def feedback_target(X, gram, cross, *, residual=None, damping=0.01):
    """Weights that give the original output from inputs that compression upstream has already changed.

    Minimises ``E‖W z - X x - s‖² + δ‖W - X‖²`` over W for the original inputs x, the inputs z seen now and an optional
    shift s of the wanted output (what the other branch of a residual sum already lost):
    ``W = X + (X (C - G) + R)(G + δI)⁻¹`` with ``G = E[z zᵀ]``, ``C = E[x zᵀ]``, ``R = E[s zᵀ]``.

    Parameters
    ----------
    X : ndarray of shape (n, d)
    gram : ndarray of shape (d, d) or (g, d, d)
        G, of the inputs seen now.
    cross : ndarray of the same shape as gram
        C, original inputs against the inputs seen now.
    residual : ndarray of shape (n, d), optional
        R.
    damping : float, default=0.01
        δ as a multiple of the mean of the gram's diagonal.

    Returns
    -------
    W : ndarray of shape (n, d)

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.feedback import feedback_target
    >>> z = np.array([[1.0, 2.0], [0.0, 1.0], [3.0, 1.0]])
    >>> x = 2 * z  # inputs have lost half their size, so the weights double
    >>> feedback_target(np.array([[1.0, -1.0]]), z.T @ z, x.T @ z, damping=0.0).round(6)
    array([[ 2., -2.]])
    """
    X = np.asarray(X, dtype=np.float64)
    W = np.empty_like(X)
    cross = np.asarray(cross, dtype=np.float64).reshape((-1, *np.shape(cross)[-2:]))
    for (rows, G), C in zip(_groups(len(X), gram), cross, strict=True):
        right = X[rows] @ (C - G)
        if residual is not None:
            right += np.asarray(residual, dtype=np.float64)[rows]
        G = _damped(G, damping)
        W[rows] = X[rows] + solve(G, right.T, assume_a="sym").T
    return W


def assumed_gram(kernel_shape, *, correlation=0.5, mean_square=0.5):
    """Second moment of a layer's inputs when no calibration data are at hand.

    Channels are taken as uncorrelated with equal variance, neighbouring positions as correlated (feature maps are
    smooth), and all inputs as having one positive mean, as they have behind a rectifier:
    ``G[(c, p), (c', p')] = 1[c = c'] correlation^|p - p'| + mean_square``. Error feedback under it spends the rounding
    error of a kernel on its rough patterns, and keeps the sum of every row: the mean of the output.

    Parameters
    ----------
    kernel_shape : tuple of int
        What one row is: (c_in, *spatial); (d,) for a linear layer.
    correlation : float in [0, 1), default=0.5
        Of two inputs of one channel at distance 1; it falls exponentially with the Euclidean distance.
    mean_square : float, default=0.5
        Square of the inputs' mean in units of their variance; a rectified centred Gaussian has 0.47.

    Returns
    -------
    gram : ndarray of shape (d, d)

    Examples
    --------
    >>> from skfactor.solvers.feedback import assumed_gram
    >>> assumed_gram((2, 2), correlation=0.5, mean_square=0.0)
    array([[1. , 0.5, 0. , 0. ],
           [0.5, 1. , 0. , 0. ],
           [0. , 0. , 1. , 0.5],
           [0. , 0. , 0.5, 1. ]])
    """
    if not 0 <= correlation < 1:
        raise ValueError(f"correlation must be at least 0 and below 1, got {correlation}")
    if mean_square < 0:
        raise ValueError(f"mean_square must not be negative, got {mean_square}")
    channels, *spatial = kernel_shape
    positions = np.indices(spatial).reshape(len(spatial), math.prod(spatial)).T  # (kh*kw, 2)
    distance = np.sqrt(((positions[:, None] - positions) ** 2).sum(-1))
    return np.kron(np.eye(channels), np.float64(correlation) ** distance) + mean_square


def conditional_power(gram, *, damping=0.003):
    """Geometric mean of the input power that is left once the inputs after it have absorbed what they can.

    ``exp(mean_j log U_jj⁻²)`` with ``G + δI = (UᵀU)⁻¹``, the determinant of the damped gram to the power 1/d. A
    uniform step Δ then costs about ``Δ²/12`` times this per weight in output error (averaged over groups).

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.feedback import conditional_power
    >>> round(conditional_power(np.diag([4.0, 1.0]), damping=0.0), 6)
    2.0
    """
    gram = np.asarray(gram, dtype=np.float64)
    gram = gram.reshape((-1, *gram.shape[-2:]))
    return float(np.exp(np.mean([np.linalg.slogdet(_damped(G, damping))[1] / len(G) for G in gram])))


def output_error(X, X_hat, gram, *, row_weight=None):
    """Weighted squared error of the layer's output, ``Σ_i r_i (x_i - x̂_i) G (x_i - x̂_i)ᵀ``.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.feedback import output_error
    >>> output_error(np.array([[1.0, 1.0]]), np.array([[0.0, 2.0]]), np.ones((2, 2)))
    0.0
    """
    E = np.asarray(X, dtype=np.float64) - np.asarray(X_hat, dtype=np.float64)
    per_row = np.concatenate([np.einsum("ij,ij->i", E[rows] @ G, E[rows]) for rows, G in _groups(len(E), gram)])
    return float(per_row.sum() if row_weight is None else per_row @ row_weight)


class _Chooser:
    """Best code of every row at one column: argmin over k of ``precision_i (t_i - c_ik)² + cost[class_ij, k]``."""

    def __init__(self, centers, cost, classes, row_weight):
        self.centers, self.cost, self.classes, self.row_weight = centers, cost, classes, row_weight
        self.shared = centers.ndim == 1
        if self.shared:
            self.order = np.argsort(centers, kind="stable")
            self.middles = (centers[self.order][1:] + centers[self.order][:-1]) / 2
        else:
            self.middles = (centers[:, 1:] + centers[:, :-1]) / 2

    def values(self, codes):
        """The centers that codes (n,) or (n, d) stand for."""
        if self.shared:
            return self.centers[codes]
        return np.take_along_axis(self.centers, codes.reshape(len(codes), -1), axis=1).reshape(codes.shape)

    def __call__(self, t, precision, j):
        if self.cost is None:
            # a tie goes to the smaller center, as in an argmin over sorted centers
            if self.shared:
                return self.order[np.searchsorted(self.middles, t, side="left")]
            return (t[:, None] > self.middles).sum(axis=1)
        distortion = t[:, None] - self.centers
        distortion *= distortion
        distortion *= (precision * self.row_weight)[:, None]
        distortion += self.cost[0] if self.classes is None else self.cost[self.classes[:, j]]
        return distortion.argmin(axis=1)


def _groups(n, gram):
    """Pairs of a slice of rows and their (d, d) gram."""
    gram = np.asarray(gram, dtype=np.float64)
    gram = gram.reshape((-1, *gram.shape[-2:]))
    if n % len(gram):
        raise ValueError(f"rows must split evenly over the {len(gram)} groups of the gram, got {n} rows")
    size = n // len(gram)
    return [(slice(g * size, (g + 1) * size), G) for g, G in enumerate(gram)]


def _rate(code_lengths, entropy_weight, row_weight, shape, rows):
    """Cost table (n_classes, k) or None, classes of the rows or None, and the rows' weights."""
    r = np.ones(shape[0]) if row_weight is None else np.asarray(row_weight, dtype=np.float64)
    if code_lengths is None or entropy_weight == 0:
        return None, None, r[rows]
    if isinstance(code_lengths, ClassLengths):
        return entropy_weight * np.asarray(code_lengths.table, dtype=np.float64), code_lengths.classes[rows], r[rows]
    return entropy_weight * np.asarray(code_lengths, dtype=np.float64)[None], None, r[rows]


def _damped(G, damping):
    """``G + δI``, never singular: an input that is always zero gets the identity's row, a zero gram the identity."""
    mean = np.trace(G) / len(G)
    if mean <= 0:
        return np.eye(len(G))
    G = G + damping * mean * np.eye(len(G))
    dead = np.diag(G) <= 0
    G[dead, dead] = mean
    return G


def _inverse_root(G, damping, order):
    """U, upper triangular, with ``(G + δI)⁻¹ = UᵀU`` for the columns in the order given."""
    G = _damped(G[np.ix_(order, order)], damping)
    jitter = 1e-12 * np.trace(G) / len(G)
    for _ in range(6):
        try:
            # Cholesky of the reversed matrix gives G = R Rᵀ with R upper triangular, so U = R⁻¹ is upper triangular
            L = np.linalg.cholesky(G[::-1, ::-1])
        except np.linalg.LinAlgError:
            G = G + jitter * np.eye(len(G))
            jitter *= 100
        else:
            return solve_triangular(L, np.eye(len(G)), lower=True)[::-1, ::-1]
    raise ValueError("gram must be symmetric and positive semi-definite")


def _sweep(X, gram, choose, damping):
    order = np.argsort(-np.diag(gram), kind="stable")
    U = _inverse_root(gram, damping, order)
    W = X[:, order]
    codes = np.empty(X.shape, dtype=np.int64)
    d = X.shape[1]
    for start in range(0, d, _BLOCK):
        stop = min(start + _BLOCK, d)
        errors = np.empty((len(X), stop - start))  # (w - c) / U_jj, the block's part of the lazy update
        for j in range(start, stop):
            chosen = choose(W[:, j], U[j, j] ** -2, order[j])
            codes[:, order[j]] = chosen
            errors[:, j - start] = (W[:, j] - choose.values(chosen)) / U[j, j]
            W[:, j + 1 : stop] -= errors[:, j - start, None] * U[j, j + 1 : stop]
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return codes


def _descend(X, codes, G, choose, n_passes):
    codes, values = codes.copy(), choose.values(codes)
    d = X.shape[1]
    for _ in range(n_passes):
        slope = (X - values) @ G  # afresh in every pass, so that rounding does not add up
        changed = False
        for start in range(0, d, _BLOCK):
            stop = min(start + _BLOCK, d)
            local, inner = slope[:, start:stop].copy(), G[start:stop, start:stop]
            moved = np.zeros((len(X), stop - start))
            for j in range(start, stop):
                power = G[j, j]
                target = values[:, j] + local[:, j - start] / power if power > 0 else values[:, j]
                chosen = choose(target, power, j) if power > 0 or choose.cost is not None else codes[:, j]
                new = choose.values(chosen)
                move = new - values[:, j]
                if not np.array_equal(chosen, codes[:, j]):
                    changed = True
                    codes[:, j], values[:, j] = chosen, new
                    moved[:, j - start] = move
                    local -= move[:, None] * inner[j - start]
            slope[:, stop:] -= moved @ G[start:stop, stop:]
        if not changed:
            break
    return codes
