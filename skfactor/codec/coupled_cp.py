"""Decoder of coupled CP decompositions: clusters of filters share a channel factor."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from skfactor.codec.decoders import Decoder, register_decoder
from skfactor.codec.linear import check_float_arrays
from skfactor.solvers.cp import cp_matrix

__all__ = ["CoupledCPDecoder"]

_BLOCK_ELEMENTS = 1 << 20


@register_decoder
@dataclass(frozen=True, eq=False)
class CoupledCPDecoder(Decoder):
    """Filters `W[n, c, i, j] = sum_k sum_r channels[k, c, r] * B[n, k, i, r] * C[n, k, j, r]`.

    A row of codes has a block for each cluster k: the factor of each spatial axis, (length, rank) flattened, one behind
    the other. A filter has numbers in the block of its own cluster and zeros in the others, so that a row says by
    itself which cluster it is of; codes that are not zero in several blocks are summed.

    Parameters
    ----------
    channels : ndarray of shape (n_clusters, c_in, rank)
        Stored in the dtype it has here.
    kernel : tuple of int
        Spatial axes; empty for rows that are vectors, whose codes are then coordinates in the cluster's subspace.
    dtype : {"float32", "float64"}
        Dtype of the decoded matrix.
    """

    name: ClassVar[str] = "coupled_cp"

    channels: np.ndarray
    kernel: tuple[int, ...] = ()
    dtype: str = "float32"

    def __post_init__(self):
        check_float_arrays(self.dtype, channels=self.channels)
        if self.channels.ndim != 3:
            raise ValueError(f"channels must have 3 dimensions, got {self.channels.ndim}")
        kernel = self.kernel
        if not (isinstance(kernel, tuple) and all(isinstance(k, int) and 1 <= k < 1 << 31 for k in kernel)):
            raise ValueError(f"kernel must be a tuple of positive integers, got {kernel!r}")

    @property
    def axes(self) -> tuple[int, ...]:
        """Spatial axes, one of length 1 where there are none."""
        return self.kernel or (1,)

    def blocks(self, codes: np.ndarray) -> np.ndarray:
        """Codes (n, n_clusters, numbers of a filter)."""
        return np.asarray(codes).reshape(len(codes), len(self.channels), -1)

    def factors(self, block: np.ndarray) -> list[np.ndarray]:
        """Spatial factors (n, length, rank) of one block of codes (n, numbers of a filter)."""
        rank = self.channels.shape[2]
        ends = np.cumsum([k * rank for k in self.axes])[:-1]
        return [part.reshape(len(part), -1, rank) for part in np.split(block, ends, axis=1)]

    def decode(self, codes):
        codes = np.asarray(codes)
        n_rows, n_columns = self.decoded_shape(codes.shape)
        out = np.empty((n_rows, n_columns), dtype=self.dtype)
        step = max(1, _BLOCK_ELEMENTS // n_columns)
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, n_rows, step):
                blocks = self.blocks(codes[start : start + step])
                total = np.zeros((len(blocks), n_columns))
                for k, A in enumerate(self.channels):
                    member = np.flatnonzero(blocks[:, k].any(axis=1))
                    if len(member):
                        shared = np.broadcast_to(A.astype(np.float64), (len(member), *A.shape))
                        total[member] += cp_matrix(shared, self.factors(blocks[member, k]))
                out[start : start + step] = total
        return out

    def decoded_shape(self, codes_shape):
        n_rows, n_codes = codes_shape
        n_clusters, c_in, rank = self.channels.shape
        expected = n_clusters * rank * sum(self.axes)
        if n_codes != expected:
            raise ValueError(f"codes must have {expected} columns, got {n_codes}")
        return n_rows, c_in * math.prod(self.axes)

    def workspace(self, codes_shape):
        n_rows, n_columns = self.decoded_shape(codes_shape)
        rows = min(n_rows, max(1, _BLOCK_ELEMENTS // n_columns))
        return 3 * rows * n_columns + rows * self.channels.shape[2] * math.prod(self.axes)
