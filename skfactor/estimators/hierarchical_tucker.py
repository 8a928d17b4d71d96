"""`HierarchicalTuckerFactorizer`: rows as tensors, decoded by a balanced tree of small arrays."""
# SPDX-License-Identifier: BSD-3-Clause

import math
from numbers import Integral, Real

from skfactor._sklearn import Interval
from skfactor.codec.tensor_decoders import HierarchicalTuckerDecoder
from skfactor.estimators._tensor_factorizer import (
    RANK,
    SHAPE,
    TensorFactorizer,
    checked_ranks,
    least_harm,
    singular_tails,
)
from skfactor.solvers._tensors import left_singular
from skfactor.solvers.hierarchical_tucker import (
    behind_codes,
    dimension_tree,
    hierarchical_ranks,
    hierarchical_tucker,
    tree_network,
)

__all__ = ["HierarchicalTuckerFactorizer"]


class HierarchicalTuckerFactorizer(TensorFactorizer):
    r"""Hierarchical Tucker decomposition of the weights of a layer.

    The rows of `X` are tensors, so that `X` is a tensor T of shape :math:`(n, d_1, \dots, d_m)`. A balanced binary tree
    splits the axes in halves; every node t has a frame :math:`U_t` of :math:`r_t` columns for its axes, which for a
    leaf is stored and for a node with children l and r is :math:`(U_l \otimes U_r) B_t` with a stored transfer tensor.
    The frame of the rows is the codes. For many axes it takes far fewer numbers than Tucker's core. Hierarchical SVD
    [1]_ finds the frames from the leaves to the root and keeps to a prescribed error; alternating least squares then
    lowers the error further.

    With `input_gram` the error is that of the layer's output. The tree is made in coordinates that whiten each axis,
    and the sweeps fit all arrays to the whole gram. Where rows are vectors this is the best approximation of the output
    of its rank, in closed form.

    Parameters
    ----------
    rank : int, float or tuple of int, default=None
        Ranks of the nodes of the tree: one for all, or one for each but the root, children before parents and left
        before right; larger ones are lowered to what the unfoldings have. A float in (0, 1] is the share of the
        numbers of `X` that codes and decoder may hold together: from full ranks down, the rank is lowered that loses
        least for what it saves. None: as many as `tol` asks for, or all.
    tol : float, default=None
        Take the ranks that keep :math:`\|T - \hat T\| \le tol\,\|T\|`, instead of `rank`. With `input_gram` these are
        the ranks, and the promise is that of the weights before the refit.
    kernel_shape : tuple of int, default=None
        Shape (c_in, kh, kw) of the kernel that a row is.
    tensor_shape : tuple of int, default=None
        Shape of a row as a tensor; `kernel_shape` when None, and without that two factors of the number of columns as
        near to each other as there are. Axes of length 1 are left out.
    max_iter : int, default=20
        Most sweeps of alternating least squares.

    Attributes
    ----------
    ranks_ : tuple of int
        Of the nodes, in the order of `rank`.
    tensor_shape_ : tuple of int
    error_bound_ : float or None
        Sum of the squared singular values that hierarchical SVD leaves out, which the squared error does not exceed but
        for rounding; None with `input_gram`.
    relative_error_ : float
        Squared error of `X` relative to its squared norm.
    output_error_ : float or None
        Squared error of the layer's output, when `input_gram` was given.
    n_iter_ : int
        Sweeps, hierarchical SVD counted.
    decoder_ : HierarchicalTuckerDecoder
    n_features_in_ : int

    References
    ----------
    .. [1] L. Grasedyck, "Hierarchical singular value decomposition of tensors", SIAM J. Matrix Anal. Appl. 31 (2010),
       :doi:`10.1137/090764189`

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor import HierarchicalTuckerFactorizer
    >>> X = np.random.default_rng(0).standard_normal((32, 256))
    >>> factorizer = HierarchicalTuckerFactorizer(rank=4, tensor_shape=(4, 8, 8)).fit(X)
    >>> [a.shape for a in factorizer.decoder_.frames], [a.shape for a in factorizer.decoder_.transfers]
    ([(4, 4), (8, 4), (8, 4)], [(4, 4, 4), (4, 4, 4)])
    """

    _parameter_constraints: dict = {
        "rank": RANK,
        "tol": [Interval(Real, 0, None, closed="left"), None],
        "kernel_shape": SHAPE,
        "tensor_shape": SHAPE,
        "max_iter": [Interval(Integral, 0, None, closed="left")],
    }

    def __init__(self, rank=None, *, tol=None, kernel_shape=None, tensor_shape=None, max_iter=20):
        self.rank = rank
        self.tol = tol
        self.kernel_shape = kernel_shape
        self.tensor_shape = tensor_shape
        self.max_iter = max_iter

    def _decomposer(self, T, n):
        if self.rank is not None and self.tol is not None:
            raise ValueError(f"rank and tol exclude each other, got rank={self.rank} and tol={self.tol}")
        nodes = list(dimension_tree(T.ndim).walk())[:-1]
        ranks = None
        if self.tol is not None:
            found = hierarchical_tucker(T, tol=self.tol).frames
            ranks = {node: found[node].shape[-1] for node in nodes}
        elif not isinstance(self.rank, float):
            full = [math.prod(T.shape)] * len(nodes)
            given = full if self.rank is None else checked_ranks(self.rank, len(nodes), "each node but the root")
            ranks = dict(zip(nodes, given, strict=True))

        def decompose(T):
            chosen = ranks or dict(zip(nodes, self._ranks_within_share(T, n, nodes), strict=True))
            found = hierarchical_tucker(T, hierarchical_ranks(T.shape, chosen.get))
            return [tree_network(*behind_codes(found))], found.bound, 1

        return decompose

    def _ranks_within_share(self, T, n, nodes):
        full = hierarchical_ranks(T.shape, lambda node: math.prod(T.shape))
        tree = dimension_tree(T.ndim)
        tied = nodes.index(tree.left)  # the root's right half has the rank of its left half
        free = [node for node in nodes if node != tree.right]
        tails = [singular_tails(left_singular(_unfolded(T, node))[1])[: full[node] + 1] for node in free]

        def by_node(ranks):
            found = dict(zip(free, ranks, strict=True))
            return found | {tree.right: found[nodes[tied]]}

        def numbers(ranks):
            rank = by_node(ranks)
            held = n * rank[nodes[0]]
            for node in nodes[1:]:
                below = T.shape[node.start] if node.left is None else rank[node.left] * rank[node.right]
                held += below * rank[node]
            return held

        found = by_node(least_harm(tails, numbers, self.rank * n * math.prod(T.shape[1:])))
        return [found[node] for node in nodes]

    def _decoder(self, networks, dtype):
        arrays = networks[0].operands
        n_transfers = sum(len(labels) == 3 for labels in networks[0].labels)
        return HierarchicalTuckerDecoder(arrays[n_transfers:], arrays[:n_transfers], dtype)

    def _ranks(self, decoder):
        tree = dimension_tree(len(decoder.frames) + 1)
        frames, transfers = iter(decoder.frames), iter(decoder.transfers)
        n_codes = decoder.chains()[0][0].matrix.shape[0]
        return tuple(n_codes if node.stop == 1 else (next(transfers) if node.left else next(frames)).shape[-1]
                     for node in tree.walk() if node != tree)



def _unfolded(T, node):
    """Unfolding whose rows are the axes of a node."""
    size = math.prod(T.shape[node.start : node.stop])
    return T.reshape(math.prod(T.shape[: node.start]), size, -1).swapaxes(0, 1).reshape(size, -1)
