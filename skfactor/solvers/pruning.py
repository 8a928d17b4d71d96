# SPDX-License-Identifier: BSD-3-Clause
"""Which weights to set to zero, and what the others become so that the layer's output stays.

References
----------
.. [1] Hassibi, Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 1992.
.. [2] Mishra et al., "Accelerating sparse deep neural networks", 2021. arXiv:2104.08378
.. [3] He, Zhang, Sun, "Channel pruning for accelerating very deep neural networks", ICCV 2017.
   arXiv:1707.06168
.. [4] Kurtic, Frantar, Alistarh, "ZipLM: inference-aware structured pruning of language models", 2023.
   arXiv:2302.04089
"""

from typing import NamedTuple

import numpy as np

from skfactor.solvers.whitening import DAMPING, damped_grams, row_groups, whiten

__all__ = ["Readers", "eliminate_units", "keep_largest", "keep_pattern", "prune_by_steps", "refit_kept",
           "surgeon_scale"]

_BLOCK_ELEMENTS = 1 << 20


def keep_largest(saliency, n_pruned):
    """Mask of all elements but the `n_pruned` of least saliency; of equal ones the first in the array go first.

    Parameters
    ----------
    saliency : ndarray
    n_pruned : int

    Returns
    -------
    mask : ndarray of bool
    threshold : float
        The largest saliency that was pruned; -1 if none was.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.pruning import keep_largest
    >>> keep_largest(np.array([2.0, 1.0, 2.0, 3.0]), 2)
    (array([False, False,  True,  True]), 2.0)
    """
    flat = saliency.reshape(-1)
    if n_pruned <= 0:
        return np.ones(saliency.shape, dtype=bool), -1.0
    threshold = np.partition(flat, n_pruned - 1)[n_pruned - 1]
    mask = flat >= threshold
    mask[np.flatnonzero(flat == threshold)[: n_pruned - int((~mask).sum())]] = False
    return mask.reshape(saliency.shape), float(threshold)


def keep_pattern(saliency, n_kept, m):
    """Mask of the `n_kept` largest of every `m` neighbouring columns; the last columns may be fewer.

    Of equal ones the last stay.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.pruning import keep_pattern
    >>> keep_pattern(np.array([[1.0, 4.0, 3.0, 2.0, 1.0, 1.0]]), 2, 4)
    array([[False,  True,  True, False,  True,  True]])
    """
    n, d = saliency.shape
    mask = np.zeros((n, d), dtype=bool)
    step = max(1, _BLOCK_ELEMENTS // d)
    whole = d - d % m
    for start in range(0, n, step):
        block = saliency[start : start + step]
        for columns, size in ((slice(0, whole), m), (slice(whole, d), d - whole)):
            parts = block[:, columns].reshape(len(block), -1, size) if size else block[:, :0, None]
            order = np.argsort(parts, axis=2, kind="stable")[:, :, max(0, size - n_kept) :]
            kept = np.zeros(parts.shape, dtype=bool)
            np.put_along_axis(kept, order, True, axis=2)
            mask[start : start + step, columns] = kept.reshape(len(block), -1)
    return mask


def surgeon_scale(gram, damping=DAMPING):
    """√(1 / [(G + δI)⁻¹]_jj): times ``|x_j|``, the root of what removing x_j costs once the others make up for it.

    >>> import numpy as np
    >>> surgeon_scale(np.array([[2.0, 0.0], [0.0, 8.0]]), damping=0.0).round(6)
    array([1.414214, 2.828427])
    """
    inverse = whiten(gram, damping).inverse
    return 1.0 / np.sqrt(np.einsum("ij,ij->j", inverse, inverse))


def prune_by_steps(X, gram, choose, n_steps, *, row_scale=None, damping=DAMPING):
    """Prune a little at a time; after every step the kept weights make up for the pruned ones.

    A weight is judged by what its removal costs once all others have made up for it, as Optimal Brain Surgeon judges
    it [1]_, and by its value after the steps before.

    Parameters
    ----------
    X : ndarray of shape (n, d)
    gram : ndarray of shape (d, d) or (g, d, d)
    choose : callable
        `choose(saliency, t)` gives the mask of what is kept when the share t of the steps is done.
    n_steps : int
    row_scale : ndarray of shape (n, 1), optional
        Root of the importance of every row's output.
    damping : float, default=DAMPING

    Returns
    -------
    Z : ndarray of shape (n, d), float64
    mask : ndarray of bool of shape (n, d)
    """
    grams = np.reshape(gram, (-1, *np.shape(gram)[-2:]))
    scale = np.concatenate([np.tile(surgeon_scale(G, damping), (rows.stop - rows.start, 1))
                            for rows, G in zip(row_groups(len(X), len(grams)), grams, strict=True)])
    if row_scale is not None:
        scale = scale * row_scale
    Z = np.asarray(X, dtype=np.float64)
    for i in range(1, n_steps + 1):
        mask = choose(np.abs(Z) * scale, i / n_steps)
        Z = refit_kept(X, mask, gram, start=Z, damping=damping, tol=3e-2 if i < n_steps else 1e-4)
    return Z, mask


def refit_kept(X, mask, gram, *, start=None, damping=DAMPING, tol=1e-4, max_iter=60):
    """Kept weights of least output error: ``argmin_Z tr((X - Z) (G + δI) (X - Z)ᵀ)``, Z zero off the mask.

    Conjugate gradients for all rows at once; the error of no row rises over that of the start.

    Parameters
    ----------
    X : ndarray of shape (n, d)
    mask : ndarray of bool of shape (n, d)
        What is kept.
    gram : ndarray of shape (d, d) or (g, d, d)
    start : ndarray of shape (n, d), optional
        Values to start from, taken as zero off the mask; X when not given.
    damping : float, default=DAMPING
    tol : float, default=1e-4
        Norm of a row's gradient, relative to the first, at which the row is done.
    max_iter : int, default=60

    Returns
    -------
    Z : ndarray of shape (n, d), float64

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.pruning import refit_kept
    >>> refit_kept(np.array([[1.0, 1.0]]), np.array([[True, False]]), np.ones((2, 2)), damping=0.0)  # one input twice
    array([[2., 0.]])
    """
    grams = damped_grams(gram, damping)
    Z = np.where(mask, X if start is None else start, 0).astype(np.float64)
    step = max(1, _BLOCK_ELEMENTS // X.shape[1])
    for rows, G in zip(row_groups(len(X), len(grams)), grams, strict=True):
        for first in range(rows.start, rows.stop, step):
            block = slice(first, min(first + step, rows.stop))
            Z[block] += _conjugate_gradients((X[block] - Z[block]) @ G, mask[block], G, tol, max_iter)
    return Z


def _conjugate_gradients(right, mask, G, tol, max_iter):
    """V, zero off the mask, with ``V G = right`` on it."""
    inverse = mask / np.diag(G)  # preconditioner
    V, R = np.zeros(right.shape), right * mask
    D = Q = R * inverse
    power = np.einsum("ij,ij->i", R, Q)
    goal = tol**2 * power
    for _ in range(max_iter):
        if not (power > goal).any():
            break
        GD = (D @ G) * mask
        curvature = np.einsum("ij,ij->i", D, GD)
        step = np.divide(power, curvature, out=np.zeros_like(power), where=curvature > 0)[:, None]
        V += step * D
        R = R - step * GD
        Q = R * inverse
        before, power = power, np.einsum("ij,ij->i", R, Q)
        D = Q + np.divide(power, before, out=np.zeros_like(power), where=before > 0)[:, None] * D
    return V


class Readers(NamedTuple):
    """A layer that reads what is to be removed.

    Attributes
    ----------
    weight : ndarray of shape (n, d)
    inverse : ndarray of shape (d, d)
        ``(G + δI)⁻¹`` with G the second moment of its inputs.
    columns : list of ndarray of int
        For each unit the columns that go with it, none for a unit that this layer does not read.
    scale : float
        What a squared error of its outputs costs, compared with that of the other layers.
    """

    weight: np.ndarray
    inverse: np.ndarray
    columns: list
    scale: float


def eliminate_units(readers, n_removed, take):
    """Remove units one by one, each time the one that costs the layers' outputs least once the weights have made up.

    The removal of the columns J raises the least error of a layer by ``tr(Z_J (P_JJ)⁻¹ Z_Jᵀ)`` with Z the weights that
    are best without what was removed before and P the inverse of what is left of ``G + δI`` (the blockwise form [4]_ of
    the surgeon [1]_, for the criterion of [3]_); both are kept up to date in closed form.

    Parameters
    ----------
    readers : list of Readers
        Their weights and inverses are changed in place: they become those after the removal, zero where it cut.
    n_removed : int
    take : callable
        `take(unit)`: whether a unit may go; if it may, it does. Asked in the order of the costs.

    Returns
    -------
    removed : list of int
        In order; fewer than `n_removed` where no other may go.
    costs : list of float
        Rise of the scaled error with each.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.pruning import Readers, eliminate_units
    >>> G = np.array([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])  # the second input is almost the first
    >>> reader = Readers(np.array([[2.0, 2.0, 1.0]]), np.linalg.inv(G), [np.array([i]) for i in range(3)], 1.0)
    >>> removed, costs = eliminate_units([reader], 1, lambda unit: True)
    >>> removed, np.round(costs, 2), reader.weight.round(2)
    ([0], array([0.76]), array([[0. , 3.8, 1. ]]))
    """
    n_units = len(readers[0].columns)
    left, removed, costs = np.ones(n_units, dtype=bool), [], []
    while len(removed) < n_removed and left.any():
        price = np.where(left, sum(r.scale * _prices(r, left) for r in readers), np.inf)
        order = np.argsort(price, kind="stable")[: int(left.sum())]
        unit = next((int(u) for u in order if take(int(u))), None)
        if unit is None:
            break
        for reader in readers:
            _eliminate(reader, reader.columns[unit])
        left[unit] = False
        removed.append(unit)
        costs.append(float(price[unit]))
    return removed, costs


def _prices(reader, left):
    """``tr(Z_J (P_JJ)⁻¹ Z_Jᵀ)`` of every unit that is left; units with as many columns are done at once."""
    prices = np.zeros(len(left))
    sizes = np.array([len(c) for c in reader.columns])
    for size in np.unique(sizes[left & (sizes > 0)]):
        units = np.flatnonzero(left & (sizes == size))
        J = np.stack([reader.columns[u] for u in units])  # (units, size)
        P = reader.inverse[J[:, :, None], J[:, None, :]]
        Z = reader.weight[:, J].transpose(1, 2, 0)  # (units, size, n)
        prices[units] = np.einsum("usn,usn->u", Z, np.linalg.solve(P, Z))
    return prices


def _eliminate(reader, J):
    if len(J):
        rows = np.linalg.solve(reader.inverse[np.ix_(J, J)], reader.inverse[J])  # (|J|, d)
        reader.weight[...] -= reader.weight[:, J] @ rows
        reader.inverse[...] -= reader.inverse[:, J] @ rows
        reader.weight[:, J] = 0.0
        reader.inverse[J] = 0.0
        reader.inverse[:, J] = 0.0
