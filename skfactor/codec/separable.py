"""Decoders of separable kernels: a column of positions and then a row of them, or positions and then channels."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from skfactor.codec.decoders import register_decoder
from skfactor.codec.linear import LinearDecoder, check_float_arrays
from skfactor.codec.matmul import matmul
from skfactor.solvers.separable import expand_depthwise, expand_vertical

__all__ = ["DepthwiseSeparableDecoder", "SpatialSeparableDecoder"]

_BLOCK_ELEMENTS = 1 << 20


@register_decoder
@dataclass(frozen=True, eq=False)
class SpatialSeparableDecoder(LinearDecoder):
    """Kernels of the form `W[n, c, i, j] = sum_r vertical[r, c, i] * codes[n, (r, j)]`.

    A convolution with kernel (kh, 1) to `rank` channels, then one with kernel (1, kw): the codes of a filter are its
    row of kernels of the second.

    Parameters
    ----------
    vertical : ndarray of shape (rank, c_in, kh)
        Stored in the dtype it has here.
    width : int
        kw, positions in a row of the kernel.
    dtype : {"float32", "float64"}
        Dtype of the decoded matrix.
    """

    name: ClassVar[str] = "spatial_separable"

    vertical: np.ndarray
    width: int
    dtype: str = "float32"

    def __post_init__(self):
        check_float_arrays(self.dtype, vertical=self.vertical)
        if self.vertical.ndim != 3:
            raise ValueError(f"vertical must have 3 dimensions, got {self.vertical.ndim}")
        if not (isinstance(self.width, int) and 1 <= self.width < 1 << 20):
            raise ValueError(f"width must be an integer of at least 1, got {self.width!r}")

    def basis(self):
        return expand_vertical(self.vertical.astype(np.float64), self.width)

    def decode(self, codes):
        codes = np.asarray(codes)
        n_rows, n_columns = self.decoded_shape(codes.shape)
        rank, c_in, height = self.vertical.shape
        flat = codes.reshape(n_rows, rank, self.width).transpose(0, 2, 1).reshape(-1, rank)
        kernels = matmul(flat, self.vertical.reshape(rank, -1), self.dtype)
        kernels = kernels.reshape(n_rows, self.width, c_in, height)
        return np.ascontiguousarray(kernels.transpose(0, 2, 3, 1)).reshape(n_rows, n_columns)

    def decoded_shape(self, codes_shape):
        n_rows, n_codes = codes_shape
        rank, c_in, height = self.vertical.shape
        if n_codes != rank * self.width:
            raise ValueError(f"codes must have {rank * self.width} columns, got {n_codes}")
        return n_rows, c_in * height * self.width

    def workspace(self, codes_shape):
        return math.prod(self.decoded_shape(codes_shape))


@register_decoder
@dataclass(frozen=True, eq=False)
class DepthwiseSeparableDecoder(LinearDecoder):
    """Kernels of the form `W[n, c, i, j] = sum_m depthwise[c, m, i, j] * codes[n, (c, m)]`.

    A depthwise convolution with m kernels for each input channel, then one of 1 x 1: the codes of a filter are its
    weights in the second.

    Parameters
    ----------
    depthwise : ndarray of shape (c_in, m, *kernel)
        Stored in the dtype it has here.
    dtype : {"float32", "float64"}
        Dtype of the decoded matrix.
    """

    name: ClassVar[str] = "depthwise_separable"

    depthwise: np.ndarray
    dtype: str = "float32"

    def __post_init__(self):
        check_float_arrays(self.dtype, depthwise=self.depthwise)
        if self.depthwise.ndim < 3:
            raise ValueError(f"depthwise must have 3 dimensions at least, got {self.depthwise.ndim}")

    def basis(self):
        return expand_depthwise(_flat(self.depthwise).astype(np.float64))

    def decode(self, codes):
        codes = np.asarray(codes)
        out = np.empty(self.decoded_shape(codes.shape), dtype=self.dtype)
        kernels = _flat(self.depthwise).astype(np.float64)
        c_in, m, size = kernels.shape
        step = max(1, _BLOCK_ELEMENTS // (c_in * size))
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(codes), step):
                block = codes[start : start + step].reshape(-1, c_in, m).astype(np.float64)
                total = block[:, :, 0, None] * kernels[:, 0]
                for k in range(1, m):
                    total += block[:, :, k, None] * kernels[:, k]
                out[start : start + step] = total.reshape(len(block), -1)
        return out

    def decoded_shape(self, codes_shape):
        n_rows, n_codes = codes_shape
        c_in, m, size = _flat(self.depthwise).shape
        if n_codes != c_in * m:
            raise ValueError(f"codes must have {c_in * m} columns, got {n_codes}")
        return n_rows, c_in * size

    def workspace(self, codes_shape):
        return math.prod(self.decoded_shape(codes_shape))


def _flat(depthwise: np.ndarray) -> np.ndarray:
    """(c_in, m, positions)."""
    return depthwise.reshape(*depthwise.shape[:2], -1)
