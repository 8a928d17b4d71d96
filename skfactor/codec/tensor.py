"""What is stored of one tensor: a chain of decoders with codes, or the bits themselves."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from skfactor.codec.decoders import Decoder
from skfactor.codec.dtypes import from_float, host_dtype, is_float

__all__ = ["CompressedTensor", "Layout", "RawTensor"]


@dataclass(frozen=True)
class Layout:
    """How a tensor becomes the matrix `X`, rows first, and back.

    `X = tensor.reshape(view).transpose(axes).reshape(n_rows, -1)`; None leaves a step out. A convolution weight
    (c_out, c_in, kh, kw) needs neither. A transposed convolution (c_in, c_out/g, kh, kw) has
    `view=(g, c_in/g, c_out/g, kh, kw)` and `axes=(0, 2, 1, 3, 4)`.

    Attributes
    ----------
    n_rows : int
        Rows of `X`: filters, output units or embedding rows.
    kernel_shape : tuple of int
        What one row is, e.g. (c_in, kh, kw); its product is the number of columns of `X`.
    zero_rows : tuple of int
        Rows that are exactly zero whatever the codes say (an embedding's `padding_idx`).
    """

    n_rows: int
    kernel_shape: tuple[int, ...]
    view: tuple[int, ...] | None = None
    axes: tuple[int, ...] | None = None
    zero_rows: tuple[int, ...] = ()

    @classmethod
    def rows_first(cls, shape: tuple[int, ...]) -> Layout:
        """Layout of a tensor whose first axis already counts rows; a 1-D tensor is one row."""
        if len(shape) < 2:
            return cls(1, (math.prod(shape),))
        return cls(shape[0], tuple(shape[1:]))

    def to_matrix(self, array: np.ndarray) -> np.ndarray:
        """The matrix `X` (n_rows, n_columns) of a tensor; a view where numpy can give one."""
        if self.view is not None:
            array = array.reshape(self.view)
        if self.axes is not None:
            array = array.transpose(self.axes)
        return array.reshape(self.n_rows, math.prod(self.kernel_shape))

    def to_tensor(self, X: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor of shape `shape` whose matrix is `X`."""
        view = self.view if self.view is not None else shape
        if self.axes is None:
            return X.reshape(shape)
        permuted = tuple(view[a] for a in self.axes)
        return np.ascontiguousarray(X.reshape(permuted).transpose(np.argsort(self.axes)).reshape(shape))


@dataclass(frozen=True, eq=False)
class CompressedTensor:
    """Chain of decoders + codes + shape + dtype.

    The matrix is `decoders[0].decode(decoders[1].decode(... codes))`: decoders stand in the order of the pipeline's
    steps, so the last one reads the codes.

    Attributes
    ----------
    decoders : tuple of Decoder
    codes : ndarray of shape (n_rows, m)
        Integer or floating-point codes of the last step.
    shape : tuple of int
        Shape of the tensor.
    dtype : str
        A name of `skfactor.codec.dtypes.DTYPES`.
    layout : Layout
    coder : str, default="auto"
        Entropy coder of integer codes; "auto" takes the smallest. A matrix of more than 2**19 codes is coded in
        pieces, and a slow coder ("context") then has to save one percent.
    """

    decoders: tuple[Decoder, ...]
    codes: np.ndarray
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: Layout | None = None
    coder: str = "auto"
    kind: str = field(default="compressed", init=False, repr=False)

    def __post_init__(self):
        if not self.decoders:
            raise ValueError("a CompressedTensor needs at least one decoder, got none")
        if not is_float(self.dtype):
            raise ValueError(f"dtype of a CompressedTensor must be a float, got {self.dtype!r}")
        if self.layout is None:
            object.__setattr__(self, "layout", Layout.rows_first(self.shape))

    def to_matrix(self) -> np.ndarray:
        """`X_hat` (n_rows, n_columns) before the cast to the tensor's dtype."""
        X = self.codes
        for decoder in reversed(self.decoders):
            X = decoder.decode(X)
        if self.layout.zero_rows:
            X = X.copy()
            X[list(self.layout.zero_rows)] = 0
        return X

    def to_array(self) -> np.ndarray:
        """The reconstructed tensor, in the numpy dtype that carries `dtype` (bfloat16 as uint16 bits)."""
        return from_float(self.layout.to_tensor(self.to_matrix(), self.shape), self.dtype)

    @cached_property
    def nbytes(self) -> int:
        """Stored size in bytes: streams of codes and decoder arrays and this tensor's entry of the index."""
        from skfactor.codec.streams import encode_tensor

        return encode_tensor(self).nbytes


@dataclass(frozen=True, eq=False)
class RawTensor:
    """A tensor stored losslessly: `array` carries the bits of `dtype`."""

    array: np.ndarray
    dtype: str
    kind: str = field(default="raw", init=False, repr=False)

    def __post_init__(self):
        if self.array.dtype != host_dtype(self.dtype):
            raise ValueError(f"a tensor of dtype {self.dtype} is carried by {host_dtype(self.dtype)}, "
                             f"got {self.array.dtype}")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def to_array(self) -> np.ndarray:
        return self.array
