"""Decoder of CP-decomposed filters: every row of codes holds the factors of one filter."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from skfactor.codec.decoders import Decoder, register_decoder
from skfactor.solvers.cp import cp_matrix

__all__ = ["CPDecoder"]

_BLOCK_ELEMENTS = 1 << 20


@register_decoder
@dataclass(frozen=True, eq=False)
class CPDecoder(Decoder):
    """Filters `W[n, c, i, j] = sum_r A[n, c, r] * B[n, i, r] * C[n, j, r]`.

    A row of codes is A of the filter, (c_in, rank) flattened, then the factor of each spatial axis, (k, rank)
    flattened.
    A filter that was pruned is a row of zeros.

    Parameters
    ----------
    kernel_shape : tuple of int
        (c_in, *spatial); without spatial axes the codes are the rows themselves.
    rank : int
    dtype : {"float32", "float64"}
        Dtype of the decoded matrix.
    """

    name: ClassVar[str] = "cp"

    kernel_shape: tuple[int, ...]
    rank: int
    dtype: str = "float32"

    def __post_init__(self):
        shape = self.kernel_shape
        if not (isinstance(shape, tuple) and shape and all(isinstance(k, int) and 1 <= k < 1 << 31 for k in shape)):
            raise ValueError(f"kernel_shape must be a tuple of positive integers, got {shape!r}")
        if not (isinstance(self.rank, int) and 1 <= self.rank < 1 << 20):
            raise ValueError(f"rank must be an integer of at least 1, got {self.rank!r}")
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64, got {self.dtype!r}")

    def factors(self, codes: np.ndarray) -> list[np.ndarray]:
        """Factors of every filter: (n, c_in, rank), then (n, k, rank) for each spatial axis."""
        ends = np.cumsum([k * self.rank for k in self.kernel_shape])[:-1]
        parts = np.split(np.asarray(codes), ends, axis=1)
        return [part.reshape(len(part), -1, self.rank) for part in parts]

    def decode(self, codes):
        codes = np.asarray(codes)
        n_rows, n_columns = self.decoded_shape(codes.shape)
        if len(self.kernel_shape) == 1:
            return codes.astype(self.dtype)
        out = np.empty((n_rows, n_columns), dtype=self.dtype)
        step = max(1, _BLOCK_ELEMENTS // n_columns)
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, n_rows, step):
                pointwise, *spatial = self.factors(codes[start : start + step])
                out[start : start + step] = cp_matrix(pointwise, spatial)
        return out

    def decoded_shape(self, codes_shape):
        n_rows, n_codes = codes_shape
        expected = self.kernel_shape[0] if len(self.kernel_shape) == 1 else sum(self.kernel_shape) * self.rank
        if n_codes != expected:
            raise ValueError(f"codes must have {expected} columns, got {n_codes}")
        return n_rows, math.prod(self.kernel_shape)

    def workspace(self, codes_shape):
        n_rows, n_columns = self.decoded_shape(codes_shape)
        rows = min(n_rows, max(1, _BLOCK_ELEMENTS // n_columns))
        return 2 * rows * n_columns + rows * self.rank * math.prod(self.kernel_shape[1:])
