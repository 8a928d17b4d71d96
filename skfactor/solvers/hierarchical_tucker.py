# SPDX-License-Identifier: BSD-3-Clause
"""Hierarchical Tucker: a binary tree of transfer tensors, by successive singular value decompositions."""

import math
from typing import NamedTuple

import numpy as np

from skfactor.solvers._tensors import axis_letters, left_singular, squared_sum, unfold
from skfactor.solvers.multilinear import Network

__all__ = ["HierarchicalResult", "Node", "behind_codes", "dimension_tree", "hierarchical_ranks", "hierarchical_tucker",
           "tree_network"]


class Node(NamedTuple):
    """Node of a dimension tree: axes `start` to `stop - 1`, and its two halves unless it is a leaf."""

    start: int
    stop: int
    left: "Node | None" = None
    right: "Node | None" = None

    def walk(self):
        """All nodes below and this one, children before parents."""
        for child in (self.left, self.right):
            if child is not None:
                yield from child.walk()
        yield self


class HierarchicalResult(NamedTuple):
    """Frames and transfer tensors by node.

    Attributes
    ----------
    tree : Node
    frames : dict of Node to ndarray
        Of a leaf (d_k, r); of an inner node the transfer tensor (r_left, r_right, r). The root has r = 1. As matrices
        with r columns they are orthonormal, but for the root.
    bound : float
        Sum of the squared singular values left out, equal to ‖T − T̂‖² up to rounding.
    """

    tree: Node
    frames: dict
    bound: float


def dimension_tree(m, start=0):
    """Balanced binary tree of m axes; the left half is the larger one.

    >>> tree = dimension_tree(3)
    >>> [(node.start, node.stop) for node in tree.walk()]
    [(0, 1), (1, 2), (0, 2), (2, 3), (0, 3)]
    """
    if m == 1:
        return Node(start, start + 1)
    half = (m + 1) // 2
    return Node(start, start + m, dimension_tree(half, start), dimension_tree(m - half, start + half))


def hierarchical_ranks(shape, ranks):
    """Rank of every node but the root, none above its unfolding's size or what its children give.

    Parameters
    ----------
    shape : tuple of int
    ranks : callable
        ``ranks(node) -> int``.

    Returns
    -------
    found : dict of Node to int
    """
    tree = dimension_tree(len(shape))
    found = {}
    for node in tree.walk():
        size = math.prod(shape[node.start : node.stop])
        most = min(size, math.prod(shape) // size)
        if node.left is not None:
            most = min(most, found[node.left] * found[node.right])
        found[node] = 1 if node == tree else max(1, min(int(ranks(node)), most))
    if tree.left is not None:
        # the unfoldings of the root's two halves are transposes of each other
        found[tree.left] = found[tree.right] = min(found[tree.left], found[tree.right])
    return found


def hierarchical_tucker(T, ranks=None, *, tol=None):
    """Hierarchical singular value decomposition, from the leaves to the root of a balanced tree.

    Each frame holds the leading left singular vectors of the tensor as the frames below it have left it. These are
    nested orthogonal projections: their squared errors add up, and the error is at most sqrt(2 m - 3) times that of the
    best decomposition of the same ranks.

    Parameters
    ----------
    T : ndarray of shape (d_1, ..., d_m), float64, m >= 2
    ranks : dict of Node to int, optional
        As `hierarchical_ranks` gives them; as large as `tol` asks for when not given.
    tol : float, optional
        Largest relative error ‖T − T̂‖ / ‖T‖ that leaving out singular values may give, where `ranks` do not ask for
        less.

    Returns
    -------
    result : HierarchicalResult

    References
    ----------
    Grasedyck: Hierarchical singular value decomposition of tensors, SIAM J. Matrix Anal. Appl. 31 (2010),
    doi:10.1137/090764189.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.hierarchical_tucker import hierarchical_tucker
    >>> i, j, k, l = np.ogrid[:4, :5, :6, :3]
    >>> result = hierarchical_tucker(i + j + k + l + 0.0, tol=1e-10)
    >>> [frame.shape[-1] for frame in result.frames.values()]
    [2, 2, 2, 2, 2, 2, 1]
    """
    tree = dimension_tree(T.ndim)
    most = ranks or hierarchical_ranks(T.shape, lambda node: math.prod(T.shape))
    nodes = list(tree.walk())
    axes = [node for node in nodes if node.left is None]  # axis k of the core is expressed in the frame of axes[k]
    steps = axes + [node for node in nodes if node.left is not None and node != tree]
    allowed, bound, frames, core = (tol or 0.0) ** 2 * squared_sum(T), 0.0, {}, T
    for done, node in enumerate(steps):
        if node.left is not None:
            core, axes = _joined(core, axes, node)
        place = axes.index(node)
        A = unfold(core, place)
        U, s = left_singular(A)
        tails = np.append(np.cumsum(s[::-1] ** 2)[::-1], 0.0)  # of rank 0, 1, ..., all
        share = max(allowed - bound, 0.0) / (len(steps) - done)
        rank = min(most[node], max(1, int(np.argmax(tails <= share))))
        if node == tree.right and tree.left in frames:
            rank = min(rank, frames[tree.left].shape[-1])  # the same unfolding, transposed
        bound += float(tails[rank])
        frames[node] = U[:, :rank].reshape(*_ranks_below(node, frames), rank)
        rest = core.shape[:place] + core.shape[place + 1 :]
        core = np.moveaxis((U[:, :rank].T @ A).reshape(rank, *rest), 0, place)
    frames[tree] = core[..., None]
    return HierarchicalResult(tree, {node: frames[node] for node in nodes}, bound)


def _joined(core, axes, node):
    """Core with the axes of the two children of a node as one."""
    place = axes.index(node.left)
    a, b = core.shape[place : place + 2]
    core = core.reshape(*core.shape[:place], a * b, *core.shape[place + 2 :])
    return core, [*axes[:place], node, *axes[place + 2 :]]


def _ranks_below(node, frames):
    """First extents of the frame of a node: what is below it."""
    return (-1,) if node.left is None else (frames[node.left].shape[-1], frames[node.right].shape[-1])


def behind_codes(result):
    """What decodes the codes along axis 0: frames of the other leaves, transfers of the inner nodes without the root.

    The root's matrix (r, r) is multiplied into its right half, whose rank is then that of the left half.

    Parameters
    ----------
    result : HierarchicalResult

    Returns
    -------
    frames : tuple of ndarray of shape (d_k, r_k)
    transfers : tuple of ndarray of shape (r_left, r_right, r)
    """
    tree, frames = result.tree, dict(result.frames)
    frames[tree.right] = frames[tree.right] @ frames[tree][..., 0].T
    inner = [node for node in frames if node.left is not None and node != tree]
    leaves = [node for node in frames if node.left is None and node.start > 0]
    return tuple(frames[node] for node in leaves), tuple(frames[node] for node in inner)


def tree_network(frames, transfers):
    """Basis of the codes along axis 0, of what `behind_codes` gives.

    >>> import numpy as np
    >>> tree_network([np.ones((5, 3)), np.ones((4, 6))], [np.ones((2, 3, 6))]).shape
    (2, 5, 4)
    """
    tree = dimension_tree(len(frames) + 1)
    bonds, columns = axis_letters(len(frames) + 1)
    free = iter(bonds + "wxyz")
    letters, leaves, inner = {}, [], []
    for node in tree.walk():
        if node == tree:
            continue
        first = node.start == 0 and node.left is None
        # the root is gone: its two halves share a bond
        letters[node] = columns[0] if first else letters[tree.left] if node == tree.right else next(free)
        if node.left is not None:
            inner.append(letters[node.left] + letters[node.right] + letters[node])
        elif not first:
            leaves.append(columns[node.start] + letters[node])
    return Network((*transfers, *frames), (*inner, *leaves), columns)
