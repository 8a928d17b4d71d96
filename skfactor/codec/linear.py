"""Decoders that are linear in the codes: `X_hat = codes @ basis()`."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from skfactor.codec.decoders import Decoder, register_decoder
from skfactor.codec.matmul import matmul

__all__ = ["ComponentsDecoder", "LinearDecoder", "check_float_arrays"]


def check_float_arrays(dtype: str, **arrays: np.ndarray) -> None:
    """ValueError unless all arrays are non-empty floats and `dtype` is that of a decoded matrix."""
    for name, array in arrays.items():
        if array.dtype.kind != "f" or array.size == 0:
            raise ValueError(f"{name} must be a non-empty float array, got {array.dtype} {array.shape}")
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype must be float32 or float64, got {dtype!r}")


@dataclass(frozen=True, eq=False)
class LinearDecoder(Decoder):
    """Base of decoders that are linear in the codes.

    A subclass has the field `dtype`, that of the decoded matrix, and the method `basis`; it may decode in a cheaper
    way, as long as the bits depend on nothing but its fields and the codes.
    """

    name: ClassVar[str] = ""

    def basis(self) -> np.ndarray:
        """Matrix (n_codes, n_columns) in float64 that one row of codes is multiplied with."""
        raise TypeError(f"{type(self).__name__} does not define basis()")

    def decode(self, codes):
        codes = np.asarray(codes)
        shape = self.decoded_shape(codes.shape)
        return matmul(codes, self.basis(), self.dtype).reshape(shape)


@register_decoder
@dataclass(frozen=True, eq=False)
class ComponentsDecoder(LinearDecoder):
    """Sums of components: a dictionary, or the right factor of a product of two matrices.

    Parameters
    ----------
    components : ndarray of shape (n_components, vector_size)
        Stored in the dtype it has here.
    dtype : {"float32", "float64"}
        Dtype of the decoded matrix.

    Notes
    -----
    Codes of shape (n_rows, q * n_components) decode to (n_rows, q * vector_size): a row is q sub-vectors, each with
    codes of its own.
    """

    name: ClassVar[str] = "components"

    components: np.ndarray
    dtype: str = "float32"

    def __post_init__(self):
        check_float_arrays(self.dtype, components=self.components)
        if self.components.ndim != 2:
            raise ValueError(f"components must have 2 dimensions, got {self.components.ndim}")

    def basis(self):
        return self.components.astype(np.float64)

    def decode(self, codes):
        codes = np.asarray(codes)
        shape = self.decoded_shape(codes.shape)
        return matmul(codes.reshape(-1, len(self.components)), self.components, self.dtype).reshape(shape)

    def decoded_shape(self, codes_shape):
        n_rows, n_codes = codes_shape
        n_components, vector_size = self.components.shape
        if n_codes % n_components:
            raise ValueError(f"codes must have a multiple of {n_components} columns, got {n_codes}")
        return n_rows, n_codes // n_components * vector_size
