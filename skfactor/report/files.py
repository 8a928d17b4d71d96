"""Open files of tensors, of either kind, and differences between tensors."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import contextlib
import math
import os
from typing import NamedTuple

import numpy as np

from skfactor.codec.container import SkfFile
from skfactor.codec.dtypes import is_float, to_float
from skfactor.codec.safetensors_io import SafetensorsReader
from skfactor.exceptions import FormatError

__all__ = ["Difference", "TensorFile", "difference_of", "is_skf", "naming_file", "squared_norm_of", "values_of"]


@contextlib.contextmanager
def naming_file(path: str | os.PathLike):
    """Put the path in front of a FormatError that does not say which file is meant."""
    try:
        yield
    except FormatError as error:
        if os.fspath(path) in str(error):
            raise
        raise FormatError(f"{os.fspath(path)}: {error}") from error


def is_skf(path: str | os.PathLike) -> bool:
    """Whether a file starts as a `.skf` file does."""
    with open(path, "rb") as file:
        return file.read(13)[8:] == b'{"skf'


class TensorFile:
    """An open `.skf` or `.safetensors` file; what goes wrong with its bytes names the path."""

    def __init__(self, path):
        self.path = os.fspath(path)
        # a damaged start must not make a .skf file something else
        self.is_skf = is_skf(path) or self.path.endswith(".skf")
        with naming_file(path):
            self._file = SkfFile(path) if self.is_skf else SafetensorsReader(path)
        self.names = list(self._file.names)
        self.ties = dict(self._file.ties) if self.is_skf else {}
        self.metadata = self._file.metadata

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def entry(self, name):
        """Facts of a tensor as `SkfFile.entry` gives them."""
        if self.is_skf:
            return self._file.entry(name)
        shape = tuple(self._file.shape(name))
        return {"kind": "raw", "dtype": self._file.dtype(name), "shape": shape, "coders": ["raw"]}

    def nbytes(self, name):
        return self._file.nbytes(name)

    def read(self, name):
        with naming_file(self.path):
            return self._file.read(name)

    def read_array(self, name):
        """The array that carries the bits of a tensor."""
        with naming_file(self.path):
            return self._file.read_array(name) if self.is_skf else self._file.read(name)


class Difference(NamedTuple):
    """max |a − b|, ‖a − b‖ / ‖a‖, and ‖a‖²."""

    largest: float
    relative: float
    squared_norm: float


def values_of(file, name):
    """Values of a tensor: floats as float32 or float64, everything else as it is carried."""
    dtype = file.entry(name)["dtype"]
    array = file.read_array(name)
    return to_float(array, dtype) if is_float(dtype) else array


def _blocks(*arrays):
    """Flat pieces of equally long arrays, small enough that a float64 copy of them does not matter."""
    flat = [array.reshape(-1) for array in arrays]
    step = 1 << 20
    for start in range(0, flat[0].size, step):
        yield tuple(
            array[start : start + step].astype(np.complex128 if array.dtype.kind == "c" else np.float64)
            for array in flat
        )


def squared_norm_of(W):
    return sum(float((np.abs(w) ** 2).sum()) for (w,) in _blocks(W))


def difference_of(a, b):
    """Non-finite values that are the same on both sides count nothing; others make the difference infinite."""
    largest = error = norm = 0.0
    for x, y in _blocks(a, b):
        same = (x == y) | ((x != x) & (y != y))
        with np.errstate(invalid="ignore", over="ignore"):
            e = np.where(same, 0.0, np.nan_to_num(np.abs(x - y), nan=np.inf, posinf=np.inf))
            size = np.abs(x)
            error, norm = error + float(e @ e), norm + float((size[np.isfinite(size)] ** 2).sum())
        largest = max(largest, float(e.max(initial=0.0)))
    relative = math.sqrt(error / norm) if norm else (0.0 if error == 0 else math.inf)
    return Difference(largest, relative, norm)
