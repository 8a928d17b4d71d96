# SPDX-License-Identifier: BSD-3-Clause
"""Block-term decomposition: a sum of Tucker blocks, by alternating least squares from several starts."""

import numpy as np

from skfactor.solvers._tensors import mode_product, tucker_ranks
from skfactor.solvers.multilinear import contract, refit_networks
from skfactor.solvers.tucker import tucker, tucker_network

__all__ = ["block_terms"]

_SCREENING = 10  # sweeps after which the best start alone goes on


def block_terms(T, n_blocks, ranks, axes, *, n_init=3, tol=1e-3, max_iter=100, rng):
    r"""Minimise :math:`\|T - \sum_b D_b \times_k U_{b,k}\|^2` over cores and factors of all blocks.

    With the axes of rows and of one column axis these are the terms of type (L, M, .) [1]_. Alternating least squares
    over all codes, all cores, all factors of one axis: the error never rises. The decomposition has local optima. The
    first start takes one Tucker block after the other from what the blocks before leave; the others cut the core of
    one large Tucker decomposition into diagonal blocks after a random rotation.

    Parameters
    ----------
    T : ndarray of shape (n, d_1, ..., d_m), float64
    n_blocks : int
    ranks : sequence of int
        Ranks of every block for each of `axes`; those that no block can use are lowered.
    axes : sequence of int
        Axes that have factors; the first is 0, the rows, whose factors are the codes.
    n_init : int, default=3
        Number of starts.
    tol, max_iter
        As in `skfactor.solvers.multilinear.refit_networks`.
    rng : RandomState or Generator

    Returns
    -------
    result : MultilinearResult
        One `tucker_network` for each block.

    References
    ----------
    .. [1] L. De Lathauwer, "Decompositions of a higher-order tensor in block terms", parts II and III, SIAM J. Matrix
       Anal. Appl. 30 (2008), doi:10.1137/070690729, doi:10.1137/070690730

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.block_term import block_terms
    >>> T = np.zeros((4, 4, 2))
    >>> T[:2, :2], T[2:, 2:] = 1.0, [[[1, 2], [3, 4]], [[5, 6], [7, 9]]]
    >>> result = block_terms(T, 2, (2, 2), (0, 1), rng=np.random.default_rng(0))
    >>> bool(result.error < 1e-12), [network.shape for network in result.networks]
    (True, [(2, 4, 2), (2, 4, 2)])
    """
    X = T.reshape(len(T), -1)
    ranks = tucker_ranks(T.shape, ranks, axes)
    starts = [_by_deflation(T, n_blocks, ranks, axes)]
    if n_init > 1 and n_blocks > 1:
        whole = tucker(T, [n_blocks * rank for rank in ranks], axes, max_iter=2)
        starts += [_from_rotation(whole, n_blocks, ranks, rng) for _ in range(n_init - 1)]
    screened = [refit_networks(X, start, tol=tol, max_iter=min(_SCREENING, max_iter)) for start in starts]
    best = min(screened, key=lambda result: result.error)
    rest = refit_networks(X, best.networks, tol=tol, max_iter=max_iter - best.n_iter)
    return rest._replace(errors=np.append(best.errors, rest.errors[1:]), n_iter=best.n_iter + rest.n_iter)


def _by_deflation(T, n_blocks, ranks, axes):
    networks, residual = [], T
    for _ in range(n_blocks):
        block = tucker(residual, ranks, axes, max_iter=5)
        modes = [axis - 1 for axis in axes[1:]]
        networks.append(block_network(block.core, block.frames[1:], modes))
        rows = block.frames[0] @ contract(networks[-1:])
        residual = residual - rows.reshape(T.shape)
    return networks


def block_network(core, factors, modes):
    """`tucker_network` with modes counted from the first column axis."""
    return tucker_network(core, factors, [mode + 1 for mode in modes])


def _from_rotation(whole, n_blocks, ranks, rng):
    """Blocks of a Tucker decomposition along randomly rotated axes."""
    bases = []
    for axis, rank in zip(whole.axes, ranks, strict=True):
        extent = whole.core.shape[axis]
        # blocks share directions where there are not enough for all
        turns = [np.linalg.qr(rng.standard_normal((extent, extent)))[0] for _ in range(-(-n_blocks * rank // extent))]
        bases.append(np.hstack(turns))
    networks = []
    for b in range(n_blocks):
        core, factors = whole.core, []
        for axis, rank, frame, basis in zip(whole.axes, ranks, whole.frames, bases, strict=True):
            turn = basis[:, b * rank : (b + 1) * rank]
            core = mode_product(core, turn.T, axis)
            factors.append(frame @ turn)
        networks.append(tucker_network(core, factors[1:], whole.axes[1:]))
    return networks
