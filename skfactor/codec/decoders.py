"""Decoders: frozen objects that turn codes back into `X` and hold exactly what is stored beside the codes.

A decoder is a frozen dataclass whose fields are numpy arrays, tuples of arrays, or JSON values (int, float, str, bool,
None, tuple of those). That alone makes it storable: `parts` takes it apart, `decoder_from_parts` puts it together
again, whatever its class. A new estimator writes one such class with a `decode` method, registers it, and names its
module in `skfactor.codec.families`.
"""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np

from skfactor.exceptions import FormatError

__all__ = ["CodebookDecoder", "Decoder", "IdentityDecoder", "decoder_from_parts", "register_decoder"]

_BLOCK_CODES = 1 << 20

_REGISTRY: dict[str, type[Decoder]] = {}


def register_decoder(cls: type[Decoder]) -> type[Decoder]:
    """Class decorator: make a decoder class known to the file format under its `name`."""
    if cls.name in _REGISTRY:
        raise ValueError(f"decoder name {cls.name!r} is taken by {_REGISTRY[cls.name].__name__}")
    _REGISTRY[cls.name] = cls
    return cls


@dataclass(frozen=True, eq=False)
class Decoder:
    """Base of all decoders; see the module's docstring for what a subclass must be."""

    name: ClassVar[str] = ""

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Turn codes (n_rows, m) back into the matrix (n_rows, n_columns) that was encoded."""
        raise TypeError(f"{type(self).__name__} does not define decode(codes)")

    def decoded_shape(self, codes_shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of `decode(codes)`, told without decoding, so that a small file cannot ask for a large tensor."""
        raise TypeError(f"{type(self).__name__} does not define decoded_shape(codes_shape)")

    def workspace(self, codes_shape: tuple[int, int]) -> int:
        """Elements of the largest array that `decode` makes besides codes and result, told without decoding."""
        return 0

    def code_hints(self) -> dict[str, Any]:
        """What the entropy coder may know of integer codes: `n_symbols` and `zero` (code nearest to 0, or None).

        Empty for floating-point codes.
        """
        return {}

    def parts(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """JSON-able parameters and arrays that together restore this decoder; item i of a tuple `t` is "t.i"."""
        params, arrays = {}, {}
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                arrays[name] = value
            elif isinstance(value, tuple) and value and all(isinstance(v, np.ndarray) for v in value):
                arrays |= {f"{name}.{i}": v for i, v in enumerate(value)}
            else:
                params[name] = value
        return params, arrays


def decoder_from_parts(name: str, params: dict[str, Any], arrays: dict[str, np.ndarray]) -> Decoder:
    """Rebuild a decoder from what `Decoder.parts` gave; FormatError when it does not fit together."""
    cls = _REGISTRY.get(name)
    if cls is None:
        raise FormatError(f"unknown decoder {name!r}; this version knows {sorted(_REGISTRY)}")
    params = {k: tuple(v) if isinstance(v, list) else v for k, v in params.items()}
    try:
        return cls(**params, **_with_tuples(arrays))
    except (TypeError, ValueError) as error:
        raise FormatError(f"decoder {name!r} does not fit its stored parts: {error}") from error


def _with_tuples(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Arrays by field, those of a tuple of arrays joined; ValueError when one of them is missing."""
    found: dict[str, Any] = {}
    for key, array in arrays.items():
        name, dot, number = key.partition(".")
        if not dot:
            found[name] = array
            continue
        items = found.setdefault(name, ())
        if not isinstance(items, tuple) or number != str(len(items)):
            raise ValueError(f"array {key!r} is out of order")
        found[name] = (*items, array)
    return found


@register_decoder
@dataclass(frozen=True, eq=False)
class IdentityDecoder(Decoder):
    """Codes are the values themselves: pruners and lossless steps."""

    name: ClassVar[str] = "identity"

    def decoded_shape(self, codes_shape):
        return codes_shape

    def decode(self, codes):
        return codes


@register_decoder
@dataclass(frozen=True, eq=False)
class CodebookDecoder(Decoder):
    """Look codes up in one or several codebooks.

    Parameters
    ----------
    codebooks : ndarray of shape (n_codebooks, n_clusters, vector_size)
        Centroids. Stored in the dtype it has here.
    granularity : {"tensor", "row", "column", "group"}
        Which codebook a code refers to: the only one, the one of its row, of its column, or of its block of
        `group_size` rows.
    group_size : int or None
        Rows that share a codebook when `granularity="group"`.
    dtype : {"float32", "float64"}
        Dtype of the decoded matrix.
    """

    name: ClassVar[str] = "codebook"

    codebooks: np.ndarray
    granularity: str = "tensor"
    group_size: int | None = None
    dtype: str = "float32"

    def __post_init__(self):
        if self.codebooks.ndim != 3 or 0 in self.codebooks.shape or self.codebooks.dtype.kind != "f":
            raise ValueError("codebooks must be a non-empty float array (n_codebooks, n_clusters, vector_size), "
                             f"got {self.codebooks.dtype} {self.codebooks.shape}")
        if self.granularity not in ("tensor", "row", "column", "group"):
            raise ValueError(f"granularity must be tensor, row, column or group, got {self.granularity!r}")
        if self.granularity == "tensor" and len(self.codebooks) != 1:
            raise ValueError(f"granularity 'tensor' has one codebook, got {len(self.codebooks)}")
        if self.granularity == "group" and not (isinstance(self.group_size, int) and self.group_size >= 1):
            raise ValueError(f"group_size must be an integer of at least 1, got {self.group_size!r}")
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64, got {self.dtype!r}")

    def code_hints(self):
        n_books, n_symbols, vector_size = self.codebooks.shape
        zero = int(np.abs(self.codebooks[0, :, 0]).argmin()) if n_books == 1 and vector_size == 1 else None
        if n_books > 1 and vector_size == 1:
            # sorted codebooks: the middle code is nearest to zero in most rows
            nearest = np.abs(self.codebooks[:, :, 0]).argmin(axis=1)
            zero = int(np.bincount(nearest).argmax())
        return {"n_symbols": n_symbols, "zero": zero}

    def decode(self, codes):
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.dtype.kind not in "iu":
            raise ValueError(f"codes must be a 2-D integer array, got {codes.dtype} with {codes.ndim} dimensions")
        n_symbols = self.codebooks.shape[1]
        if codes.size and (codes.min() < 0 or codes.max() >= n_symbols):
            raise ValueError(f"codes must lie in 0..{n_symbols - 1}, got {codes.min()}..{codes.max()}")
        n_rows, n_codes = codes.shape
        out = np.empty(self.decoded_shape(codes.shape), dtype=self.dtype)
        # blocks of rows: numpy makes 8-byte indices of the codes of a block, not of all of them
        step = max(1, _BLOCK_CODES // max(1, n_codes))
        for start in range(0, n_rows, step):
            self.decode_rows(codes, start, min(start + step, n_rows), out=out[start : start + step])
        return out

    def decode_rows(self, codes, start, stop, out=None):
        """Rows start..stop of `decode(codes)`, of codes known to be in range."""
        block = codes[start:stop]
        vector_size = self.codebooks.shape[2]
        if out is None:
            out = np.empty((len(block), block.shape[1] * vector_size), dtype=self.dtype)
        books, view = self.codebooks.astype(self.dtype, copy=False), out.reshape(*block.shape, vector_size)
        if self.granularity == "tensor":
            np.take(books[0], block, axis=0, out=view, mode="clip")  # in range, and "clip" needs no buffer
        else:
            view[:] = books[self._book_of(start, stop, block.shape[1]), block]
        return out

    def _book_of(self, start, stop, n_codes):
        """Codebook of every code of the rows start..stop, to broadcast against them."""
        if self.granularity == "column":
            return np.arange(n_codes)[None, :]
        size = 1 if self.granularity == "row" else self.group_size
        return (np.arange(start, stop) // size)[:, None]

    def decoded_shape(self, codes_shape):
        n_rows, n_codes = codes_shape
        n_books, _, vector_size = self.codebooks.shape
        groups = -(-n_rows // (self.group_size or 1))
        needed = {"tensor": 1, "row": n_rows, "column": n_codes, "group": groups}[self.granularity]
        if n_books != needed and n_rows and n_codes:
            raise ValueError(f"codes of shape {tuple(codes_shape)} need {needed} codebooks with granularity "
                             f"{self.granularity!r}, got {n_books}")
        return n_rows, n_codes * vector_size
