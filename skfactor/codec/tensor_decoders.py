"""Decoders of tensor decompositions: rows are tensors, the basis is a contraction of small arrays.

A row of codes is multiplied by one small matrix after the other; each product replaces one axis of what there is so far
by another one. Where there are many rows, the same chain makes the basis first.
"""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from skfactor.codec.decoders import register_decoder
from skfactor.codec.linear import LinearDecoder, check_float_arrays
from skfactor.codec.matmul import matmul
from skfactor.solvers.hierarchical_tucker import Node, dimension_tree

__all__ = ["BlockTermDecoder", "HierarchicalTuckerDecoder", "TensorTrainDecoder", "TuckerDecoder"]

_BLOCK_ELEMENTS = 1 << 22


class _Step(NamedTuple):
    """Axes (left, k, right) of every row become (left, l, right) by a matrix (k, l)."""

    left: int
    matrix: np.ndarray
    right: int

    @property
    def width(self) -> int:
        """Elements of one row of the result."""
        return self.left * self.matrix.shape[1] * self.right

    @property
    def work(self) -> int:
        """Multiplications for one row."""
        return self.width * self.matrix.shape[0]

    def apply(self, rows: np.ndarray) -> np.ndarray:
        before, after = self.matrix.shape
        state = np.swapaxes(rows.reshape(-1, before, self.right), 1, 2)
        product = matmul(state.reshape(-1, before), self.matrix, "float64").reshape(-1, self.right, after)
        return np.swapaxes(product, 1, 2).reshape(len(rows), self.width)


@dataclass(frozen=True, eq=False)
class TensorDecoder(LinearDecoder):
    """Base: a subclass has the method `chains`, for each block of codes its steps, whose results are added."""

    name: ClassVar[str] = ""

    def chains(self) -> list[list[_Step]]:
        """Steps of every block of codes; the first matrix of a chain has a row for each of its codes."""
        raise TypeError(f"{type(self).__name__} does not define chains()")

    def basis(self):
        return np.vstack([_run(np.eye(len(chain[0].matrix)), chain) for chain in self.chains()])

    def decode(self, codes):
        codes = np.asarray(codes)
        n, d = self.decoded_shape(codes.shape)
        if self._through_basis(n):
            return matmul(codes, self.basis(), self.dtype)
        out = np.empty((n, d), dtype=self.dtype)
        chains = self.chains()
        step = self._block(chains)
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, n, step):
                block = codes[start : start + step].astype(np.float64)
                parts = np.split(block, np.cumsum([len(chain[0].matrix) for chain in chains])[:-1], axis=1)
                out[start : start + step] = sum(_run(part, chain) for part, chain in zip(parts, chains, strict=True))
        return out

    def decoded_shape(self, codes_shape):
        n_rows, n_codes = codes_shape
        chains = self.chains()
        expected = sum(len(chain[0].matrix) for chain in chains)
        if n_codes != expected:
            raise ValueError(f"codes must have {expected} columns, got {n_codes}")
        return n_rows, chains[0][-1].width

    def workspace(self, codes_shape):
        n_rows, n_codes = codes_shape
        chains = self.chains()
        widest = max(step.width for chain in chains for step in chain)
        if self._through_basis(n_rows):
            most_codes = max(len(chain[0].matrix) for chain in chains)
            return max(most_codes * widest, n_codes * chains[0][-1].width)
        return min(n_rows, self._block(chains)) * widest

    def _through_basis(self, n_rows: int) -> bool:
        """Whether making the basis and one product are less work than the chain for every row."""
        chains = self.chains()
        works = [sum(step.work for step in chain) for chain in chains]
        n_codes = [len(chain[0].matrix) for chain in chains]
        once = sum(n * work for n, work in zip(n_codes, works, strict=True))
        return once + n_rows * sum(n_codes) * chains[0][-1].width < n_rows * sum(works)

    @staticmethod
    def _block(chains: list[list[_Step]]) -> int:
        return max(1, _BLOCK_ELEMENTS // max(step.width for chain in chains for step in chain))


def _run(rows: np.ndarray, chain: list[_Step]) -> np.ndarray:
    for step in chain:
        rows = step.apply(rows)
    return rows


def _tucker_chain(core: np.ndarray, factors: dict[int, np.ndarray]) -> list[_Step]:
    """Codes to the core's axes, then one axis after the other, those first that grow least."""
    extents = list(core.shape[1:])
    chain = [_Step(1, core.reshape(len(core), -1), 1)]
    for axis in sorted(factors, key=lambda k: (factors[k].shape[0] / factors[k].shape[1], k)):
        chain.append(_Step(math.prod(extents[:axis]), factors[axis].T, math.prod(extents[axis + 1 :])))
        extents[axis] = len(factors[axis])
    return chain


def _check_tucker(core: np.ndarray, factors: dict[int, np.ndarray], of: str = "") -> None:
    if core.ndim < 2:
        raise ValueError(f"the core{of} must have at least 2 dimensions, got {core.ndim}")
    for mode, factor in factors.items():
        if factor.ndim != 2 or factor.shape[1] != core.shape[1 + mode]:
            raise ValueError(f"the factor{of} of mode {mode} must have shape (d, {core.shape[1 + mode]}), "
                             f"got {factor.shape}")


def _check_modes(modes: tuple, n_axes: int) -> None:
    valid = all(isinstance(m, int) and not isinstance(m, bool) and 0 <= m < n_axes for m in modes)
    if not valid or len(set(modes)) != len(modes):
        raise ValueError(f"modes must be different integers in 0..{n_axes - 1}, got {modes}")


def _check_arrays(dtype: str, **tuples: tuple) -> None:
    for name, arrays in tuples.items():
        if not isinstance(arrays, tuple) or not all(isinstance(a, np.ndarray) for a in arrays):
            raise ValueError(f"{name} must be a tuple of arrays, got {type(arrays).__name__}")
        check_float_arrays(dtype, **{f"{name}[{i}]": a for i, a in enumerate(arrays)})


@register_decoder
@dataclass(frozen=True, eq=False)
class TuckerDecoder(TensorDecoder):
    """A core whose column axes are multiplied by factors.

    Parameters
    ----------
    core : ndarray of shape (r, s_1, ..., s_m)
        First axis: the codes.
    factors : tuple of ndarray of shape (d_k, s_k)
        One for each of `modes`.
    modes : tuple of int
        Column axes, from 0, that have a factor; the others have s_k = d_k.
    dtype : {"float32", "float64"}
        Dtype of the decoded matrix.
    """

    name: ClassVar[str] = "tucker"

    core: np.ndarray
    factors: tuple[np.ndarray, ...] = ()
    modes: tuple[int, ...] = ()
    dtype: str = "float32"

    def __post_init__(self):
        check_float_arrays(self.dtype, core=self.core)
        _check_arrays(self.dtype, factors=self.factors)
        _check_modes(self.modes, self.core.ndim - 1)
        if len(self.factors) != len(self.modes):
            raise ValueError(f"{len(self.modes)} modes need as many factors, got {len(self.factors)}")
        _check_tucker(self.core, dict(zip(self.modes, self.factors, strict=True)))

    def chains(self):
        return [_tucker_chain(self.core, dict(zip(self.modes, self.factors, strict=True)))]


@register_decoder
@dataclass(frozen=True, eq=False)
class TensorTrainDecoder(TensorDecoder):
    """A chain of cores.

    Parameters
    ----------
    cores : tuple of ndarray of shape (r_{k-1}, d_k, r_k)
        The first rank is the number of codes, the last one 1.
    dtype : {"float32", "float64"}
        Dtype of the decoded matrix.
    """

    name: ClassVar[str] = "tensor_train"

    cores: tuple[np.ndarray, ...]
    dtype: str = "float32"

    def __post_init__(self):
        _check_arrays(self.dtype, cores=self.cores)
        shapes = [core.shape for core in self.cores]
        if not shapes or any(len(s) != 3 for s in shapes) or shapes[-1][2] != 1 \
                or any(a[2] != b[0] for a, b in zip(shapes, shapes[1:])):
            raise ValueError(f"cores must have shapes (r_0, d_1, r_1), (r_1, d_2, r_2), ..., (., d_m, 1), got {shapes}")

    def chains(self):
        chain, left = [], 1
        for core in self.cores:
            chain.append(_Step(left, core.reshape(len(core), -1), 1))
            left *= core.shape[1]
        return [chain]


@register_decoder
@dataclass(frozen=True, eq=False)
class BlockTermDecoder(TensorDecoder):
    """A sum of Tucker blocks, each with codes of its own.

    Parameters
    ----------
    cores : tuple of ndarray of shape (r, s_1, ..., s_m)
        One for each block; the codes of the blocks stand side by side.
    factors : tuple of ndarray of shape (d_k, s_k)
        Those of the first block for all `modes`, then those of the second, and so on.
    modes : tuple of int
        Column axes, from 0, that have a factor.
    dtype : {"float32", "float64"}
        Dtype of the decoded matrix.
    """

    name: ClassVar[str] = "block_term"

    cores: tuple[np.ndarray, ...]
    factors: tuple[np.ndarray, ...] = ()
    modes: tuple[int, ...] = ()
    dtype: str = "float32"

    def __post_init__(self):
        _check_arrays(self.dtype, cores=self.cores, factors=self.factors)
        if not self.cores or len({core.ndim for core in self.cores}) != 1:
            raise ValueError("cores must be at least one, all of as many dimensions, got "
                             f"{[core.shape for core in self.cores]}")
        _check_modes(self.modes, self.cores[0].ndim - 1)
        if len(self.factors) != len(self.modes) * len(self.cores):
            raise ValueError(f"{len(self.cores)} blocks of {len(self.modes)} modes need "
                             f"{len(self.modes) * len(self.cores)} factors, got {len(self.factors)}")
        for i, (core, factors) in enumerate(self._blocks()):
            _check_tucker(core, factors, of=f" of block {i}")
        shapes = {tuple(len(f[k]) if k in f else core.shape[1 + k] for k in range(core.ndim - 1))
                  for core, f in self._blocks()}
        if len(shapes) != 1:
            raise ValueError(f"all blocks must decode to rows of one shape, got {sorted(shapes)}")

    def _blocks(self):
        n = len(self.modes)
        for i, core in enumerate(self.cores):
            yield core, dict(zip(self.modes, self.factors[i * n : (i + 1) * n], strict=True))

    def chains(self):
        return [_tucker_chain(core, factors) for core, factors in self._blocks()]


@register_decoder
@dataclass(frozen=True, eq=False)
class HierarchicalTuckerDecoder(TensorDecoder):
    """A balanced binary tree of transfer tensors over the codes and the column axes.

    Parameters
    ----------
    frames : tuple of ndarray of shape (d_k, r_k)
        Of the column axes k = 1..m, the leaves behind the codes.
    transfers : tuple of ndarray of shape (r_left, r_right, r)
        Of the inner nodes of `dimension_tree(m + 1)`, children before parents, without the root: the two halves of the
        root have one rank, and are summed over it.
    dtype : {"float32", "float64"}
        Dtype of the decoded matrix.
    """

    name: ClassVar[str] = "hierarchical_tucker"

    frames: tuple[np.ndarray, ...]
    transfers: tuple[np.ndarray, ...] = ()
    dtype: str = "float32"

    def __post_init__(self):
        _check_arrays(self.dtype, frames=self.frames, transfers=self.transfers)
        if not 1 <= len(self.frames) <= 64:
            raise ValueError(f"frames must be 1 to 64, got {len(self.frames)}")
        n_inner = len(self.frames) - 1
        if len(self.transfers) != n_inner:
            raise ValueError(f"{len(self.frames)} frames need {n_inner} transfers, got {len(self.transfers)}")
        if any(a.ndim != 2 for a in self.frames) or any(a.ndim != 3 for a in self.transfers):
            raise ValueError("frames must have 2 dimensions and transfers 3, got "
                             f"{[a.shape for a in (*self.frames, *self.transfers)]}")
        tree, held = self._tree()
        for node in tree.walk():
            if node.left is None:
                continue
            ranks = [held[child].shape[-1] if child in held else None for child in (node.left, node.right)]
            expected = [ranks[1], ranks[1]] if node == tree else list(held[node].shape[:2])
            if any(r is not None and r != e for r, e in zip(ranks, expected, strict=True)):
                raise ValueError(f"the arrays below axes {node.start} to {node.stop - 1} have ranks {ranks}, "
                                 f"expected {expected}")

    def _tree(self) -> tuple[Node, dict[Node, np.ndarray]]:
        """The tree, and the array of every node but the root and the codes."""
        tree = dimension_tree(len(self.frames) + 1)
        nodes = list(tree.walk())
        leaves = [node for node in nodes if node.left is None][1:]
        inner = [node for node in nodes if node.left is not None and node != tree]
        return tree, dict(zip(leaves, self.frames, strict=True)) | dict(zip(inner, self.transfers, strict=True))

    def chains(self):
        tree, held = self._tree()
        path = [tree]
        while path[-1].left.left is not None:
            path.append(path[-1].left)
        # from the codes up to the root: every node on the way adds the axis of its right child
        chain, siblings, left = [], [], 1
        for node in reversed(path[1:]):
            transfer = held[node]  # (r of the left child, r of the right child, r)
            chain.append(_Step(left, transfer.reshape(len(transfer), -1), 1))
            left *= transfer.shape[1]
            siblings.append(node.right)
        siblings.append(tree.right)
        extents = [held[node].shape[-1] for node in siblings]
        right = 1
        for place in range(len(siblings) - 1, -1, -1):
            steps = list(_expansion(siblings[place], held, math.prod(extents[:place]), right))
            chain += steps
            right = steps[-1].width // math.prod(extents[:place])
        return [chain]


def _expansion(node: Node, held: dict[Node, np.ndarray], left: int, right: int) -> Iterator[_Step]:
    """Steps that turn the axis of a node into all column axes below it."""
    if node.left is None:
        yield _Step(left, held[node].T, right)
        return
    transfer = held[node]
    yield _Step(left, transfer.reshape(-1, transfer.shape[2]).T, right)
    last = None
    for last in _expansion(node.right, held, left * transfer.shape[0], right):
        yield last
    yield from _expansion(node.left, held, left, last.width // (left * transfer.shape[0]))
