"""The small layers that a decoder stands for: a chain of weights whose composition is the decoded weight.

A layer whose weight is linear in its codes computes y = W u = U (V u) and can run as several smaller layers. Here the
weights of these are made, in numpy: `register_module` says how for a class of decoders, `skfactor.bridge.modules`
makes torch layers of them.
"""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from skfactor.codec.cp import CPDecoder
from skfactor.codec.decoders import Decoder, IdentityDecoder
from skfactor.codec.linear import LinearDecoder
from skfactor.codec.matmul import matmul
from skfactor.codec.separable import DepthwiseSeparableDecoder, SpatialSeparableDecoder
from skfactor.codec.tensor import CompressedTensor
from skfactor.codec.tensor_decoders import TuckerDecoder

__all__ = ["Factor", "LayerShape", "NoSmallerModule", "factors_of", "register_module"]


class NoSmallerModule(Exception):
    """A layer stays dense; the message is the reason that the report gives."""


@dataclass(frozen=True)
class LayerShape:
    """What a layer's weight is as rows.

    Attributes
    ----------
    n_rows : int
        Output channels or units N, over all groups.
    kernel_shape : tuple of int
        One row: (c_in / groups, *kernel) of a convolution, (d,) of a linear layer or an embedding.
    groups : int
        Of a convolution, equal blocks of rows that read equal blocks of input channels; otherwise 1.
    """

    n_rows: int
    kernel_shape: tuple[int, ...]
    groups: int = 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """Pixels of the kernel, axis by axis; empty for layers without pixels."""
        return self.kernel_shape[1:]

    @property
    def axes(self) -> tuple[int, ...]:
        """All spatial axes."""
        return tuple(range(len(self.kernel)))


@dataclass(frozen=True)
class Factor:
    """One layer of a chain.

    Attributes
    ----------
    weight : ndarray of shape (n_out, n_in / groups, *kernel)
        Without pixels (n_out, n_in).
    groups : int
    axes : tuple of int
        Spatial axes over which this layer slides: it takes the stride, padding and dilation of these. Every axis has
        one such layer in a chain; along the others a kernel has length 1.
    """

    weight: np.ndarray
    groups: int = 1
    axes: tuple[int, ...] = ()


#: `builder(decoder, codes, shape)` gives the chain in the order in which it runs, or None for the pair of `basis()`.
Builder = Callable[[Decoder, np.ndarray, LayerShape], "list[Factor] | None"]
_BUILDERS: dict[type[Decoder], Builder] = {}


def register_module(decoder_type: type[Decoder], builder: Builder) -> None:
    """Tell how a layer runs whose weight a class of decoders restores.

    Parameters
    ----------
    decoder_type : type
        Subclass of `Decoder`; its subclasses are meant too.
    builder : callable
        `builder(decoder, codes, shape)` with codes (n_rows, m) in float64 and a `LayerShape` gives a list of `Factor`
        whose composition is `decoder.decode(codes)`, or None where the pair of codes and `decoder.basis()` is the best
        there is. It raises `NoSmallerModule(reason)` where the layer has to stay dense.
    """
    if not (isinstance(decoder_type, type) and issubclass(decoder_type, Decoder)):
        raise TypeError(f"decoder_type must be a subclass of Decoder, got {decoder_type!r}")
    if not callable(builder):
        raise TypeError(f"builder must be callable as builder(decoder, codes, shape), got {builder!r}")
    _BUILDERS[decoder_type] = builder


def factors_of(tensor: CompressedTensor, shape: LayerShape) -> list[Factor]:
    """Chain of layers whose composition is `tensor.to_matrix()` (but for rounding).

    The first decoder that does something restores the weight; what the others give are its codes.

    Raises
    ------
    NoSmallerModule
        The decoder stands for no chain of layers.
    """
    first = next((i for i, d in enumerate(tensor.decoders) if not isinstance(d, IdentityDecoder)), 0)
    decoder = tensor.decoders[first]
    builder = next((_BUILDERS[c] for c in type(decoder).__mro__ if c in _BUILDERS), None)
    if builder is None:
        raise NoSmallerModule(f"{type(decoder).__name__} restores a dense weight only")
    codes = tensor.codes
    for later in reversed(tensor.decoders[first + 1 :]):
        codes = later.decode(codes)
    codes = np.array(codes, dtype=np.float64)
    codes[list(tensor.layout.zero_rows)] = 0.0
    chain = builder(decoder, codes, shape)
    return _pair(decoder, codes, shape) if chain is None else chain


def _pair(decoder: LinearDecoder, codes: np.ndarray, shape: LayerShape) -> list[Factor]:
    """Rows of the basis as filters C -> m, then the codes as a 1x1 convolution m -> N.

    Where rows are q sub-vectors of whole kernels, each with codes of its own, the filters are q groups that share one
    basis (q = C: the same m filters for every channel, a depthwise convolution). Atoms that no row uses are left out.
    """
    basis = decoder.basis()
    n_parts = codes.shape[1] // len(basis)
    used = codes.reshape(-1, len(basis)).any(axis=0)
    used[0] |= not used.any()
    basis, codes = basis[used], codes[:, np.tile(used, n_parts)]
    channels, *kernel = shape.kernel_shape
    if n_parts > 1 and (not kernel or channels % n_parts):
        basis, n_parts = np.kron(np.eye(n_parts), basis), 1
    filters = basis.reshape(len(basis), channels // n_parts, *kernel)
    return [_for_groups(filters, shape.groups * n_parts, shape.axes), _mix(codes, shape)]


def _tucker(decoder, codes, shape):
    """1x1 from C to s channels, the core as a convolution s -> r, 1x1 with the codes r -> N.

    Factors of spatial axes are multiplied into the core: a kernel has few pixels, and one convolution is faster than
    two. None, for the pair, where that has no more parameters.
    """
    core = decoder.core.astype(np.float64)
    factors = dict(zip(decoder.modes, decoder.factors, strict=True))
    for axis, factor in factors.items():
        if axis > 0:
            core = _times(core, factor, axis + 1)
    rank, n_inner, *kernel = core.shape
    if 0 not in factors or len(shape.kernel) == 0 or (len(factors[0]), *kernel) != shape.kernel_shape:
        return None
    if n_inner * (shape.kernel_shape[0] + rank * math.prod(kernel)) >= rank * math.prod(shape.kernel_shape):
        return None
    narrow = factors[0].T.reshape(n_inner, -1, *(1 for _ in kernel))
    return [_for_groups(narrow, shape.groups), _for_groups(core, shape.groups, shape.axes), _mix(codes, shape)]


def _spatially_separable(decoder, codes, shape):
    """W[n,c,i,j] = Σ_r vertical[r,c,i] codes[n,(r,j)]: first axis of the kernel C -> rank, then the others -> N."""
    channels, *kernel = shape.kernel_shape
    rank = len(decoder.vertical)
    if decoder.vertical.shape[1:] != (channels, *kernel[:1]) or decoder.width != math.prod(kernel[1:]):
        return None
    vertical = decoder.vertical.reshape(rank, channels, kernel[0], *(1 for _ in kernel[1:]))
    others = codes.reshape(len(codes), rank, 1, *kernel[1:])
    return [_for_groups(vertical, shape.groups, (0,)), Factor(others, shape.groups, shape.axes[1:])]


def _depthwise_separable(decoder, codes, shape):
    """W[n,c,i,j] = Σ_m depthwise[c,m,i,j] codes[n,(c,m)]: m filters for every channel, then 1x1 C m -> N."""
    channels, _, *kernel = decoder.depthwise.shape
    if (channels, *kernel) != shape.kernel_shape:
        return None
    filters = np.tile(decoder.depthwise.reshape(-1, 1, *kernel), (shape.groups, *(1,) * (1 + len(kernel))))
    return [Factor(filters, shape.groups * channels, shape.axes), _mix(codes, shape)]


def _cp(decoder, codes, shape):
    """1x1 from C to N R channels, a depthwise convolution for each spatial axis, the last of which adds the terms up.

    The channel of filter n and term r is n R + r. A kernel of one term runs as two convolutions, 1 x 1 and h x w:
    depthwise stages write N R channels each, and that is what they cost.
    """
    if decoder.kernel_shape != shape.kernel_shape or len(shape.kernel) == 0:
        raise NoSmallerModule("a CP decomposition of rows without pixels is the weight itself")
    pointwise, *spatial = decoder.factors(codes)
    n, channels, rank = pointwise.shape
    ones = (1,) * len(spatial)
    chain = [Factor(pointwise.transpose(0, 2, 1).reshape(n * rank, channels, *ones), shape.groups)]
    if rank == 1:
        kernel = math.prod(F.reshape(n, 1, *(-1 if e == d else 1 for e in shape.axes)) for d, F in enumerate(spatial))
        return [*chain, Factor(kernel, n, shape.axes)]
    for d, F in enumerate(spatial):
        kernel = F.transpose(0, 2, 1).reshape(n, rank, *(-1 if e == d else 1 for e in shape.axes))
        if d < len(spatial) - 1:
            chain.append(Factor(kernel.reshape(n * rank, 1, *kernel.shape[2:]), n * rank, (d,)))
        else:
            chain.append(Factor(kernel, n, (d,)))
    return chain


def _for_groups(weight: np.ndarray, groups: int, axes: tuple[int, ...] = ()) -> Factor:
    """The same filters for every group of channels."""
    return Factor(np.tile(weight, (groups, *(1,) * (weight.ndim - 1))), groups, axes)


def _mix(codes: np.ndarray, shape: LayerShape) -> Factor:
    """Codes (n_rows, m) as the last layer: kernels of one pixel."""
    return Factor(codes.reshape(*codes.shape, *(1 for _ in shape.kernel)), shape.groups)


def _times(array: np.ndarray, matrix: np.ndarray, axis: int) -> np.ndarray:
    """Multiply axis s of an array by a matrix (d, s)."""
    moved = np.moveaxis(array, axis, -1)
    product = matmul(moved.reshape(-1, moved.shape[-1]), matrix.T, "float64")
    return np.moveaxis(product.reshape(*moved.shape[:-1], len(matrix)), -1, axis)


register_module(LinearDecoder, lambda decoder, codes, shape: None)
register_module(CPDecoder, _cp)
register_module(TuckerDecoder, _tucker)
register_module(SpatialSeparableDecoder, _spatially_separable)
register_module(DepthwiseSeparableDecoder, _depthwise_separable)
