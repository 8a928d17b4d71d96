"""Entropy coding of codes: every coder under one name, and the choice of the smallest.

A stream is a name and a payload; with the shape, the number of symbols, the code that means zero and the
kernel size it decodes to exactly the codes that were encoded.
"""
# SPDX-License-Identifier: BSD-3-Clause

from typing import NamedTuple

import numpy as np

from skfactor.codec import ans, bitpack, context, huffman
from skfactor.codec.lossless import decode_bytes, encode_bytes
from skfactor.exceptions import FormatError

__all__ = [
    "CODERS",
    "coded_sizes",
    "decode_bytes",
    "decode_codes",
    "empirical_entropy_bits",
    "encode_bytes",
    "encode_codes",
]

CODERS = ("constant", "packed", "huffman", "ans", "context", "sparse", "bytes")
MAX_SYMBOLS = 1 << 31
FAST_ABOVE = 1 << 23  # codes; 'auto' leaves the slow coders out above it
SLOW = ("context", "bytes")


def _code_dtype(n_symbols: int) -> np.dtype:
    return np.dtype(np.uint8 if n_symbols <= 1 << 8 else np.uint16 if n_symbols <= 1 << 16 else np.int32)


def empirical_entropy_bits(codes, n_symbols: int) -> float:
    """Return the order-0 entropy of all codes together, ``sum(c * log2(n / c))`` in bits, c the histogram.

    Examples
    --------
    >>> empirical_entropy_bits(np.array([[0, 1, 1, 1]]), 2)
    3.2451124978365313
    """
    counts = np.bincount(np.asarray(codes).reshape(-1), minlength=n_symbols)
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum()) if len(counts) else 0.0


# --- one encoder and one decoder per name: flat non-empty codes in, payload out -------------------


def _encode_constant(flat, problem):
    if flat[0] != flat.max() or flat[0] != flat.min():
        return None
    return int(flat[0]).to_bytes((bitpack.bit_width(problem.n_symbols) + 7) // 8, "little")


def _decode_constant(data, problem):
    if len(data) != (bitpack.bit_width(problem.n_symbols) + 7) // 8:
        raise FormatError(f"constant stream of {problem.n_symbols} symbols cannot have {len(data)} bytes")
    symbol = _checked_symbol(int.from_bytes(data, "little"), problem)
    return np.full(problem.size, symbol, dtype=problem.dtype)


def _encode_packed(flat, problem):
    return bitpack.pack(flat, bitpack.bit_width(problem.n_symbols))


def _decode_packed(data, problem):
    return bitpack.unpack(data, problem.size, bitpack.bit_width(problem.n_symbols))


def _encode_huffman(flat, problem):
    if problem.n_symbols > huffman.MAX_SYMBOLS or flat.min() == flat.max():
        return None
    return huffman.encode(flat, problem.n_symbols)


def _decode_huffman(data, problem):
    return huffman.decode(data, problem.size, problem.n_symbols)


def _encode_ans(flat, problem):
    if not 2 <= problem.n_symbols <= ans.MAX_SYMBOLS:
        return None
    return ans.encode(flat, problem.n_symbols)


def _decode_ans(data, problem):
    return ans.decode(data, problem.size, problem.n_symbols)


def _encode_context(flat, problem):
    if not 2 <= problem.n_symbols <= context.MAX_SYMBOLS:
        return None
    zero, head = problem.zero, b""
    if zero is None:
        zero = int(np.bincount(flat).argmax())
        head = zero.to_bytes(2, "little")
    codes = flat.reshape(problem.shape)
    return head + context.encode(codes, problem.n_symbols, zero, problem.kernel)


def _decode_context(data, problem):
    zero = problem.zero
    if zero is None:
        if len(data) < 2:
            raise FormatError("context-coded stream ends early")
        zero, data = _checked_symbol(int.from_bytes(data[:2], "little"), problem), data[2:]
    return context.decode(data, problem.shape, problem.n_symbols, zero, problem.kernel).reshape(-1)


def _encode_sparse(flat, problem):
    """Store the gaps between the codes that differ from the background, and those codes, each by ANS.

    Fields: background (when no zero is known), number of values, bytes of the gap stream; then gap
    classes (two per octave, ANS), the low bits of the gaps, and the values (ANS) with the background
    left out of the alphabet.
    """
    if not 3 <= problem.n_symbols <= ans.MAX_SYMBOLS:
        return None
    zero = problem.zero
    fields = []
    if zero is None:
        zero = int(np.bincount(flat).argmax())
        fields.append(zero)
    where = np.flatnonzero(flat != zero)
    gaps = np.diff(where, prepend=-1) - 1
    if not len(where):
        return None
    classes, extra, extra_bits = _gap_classes(gaps)
    class_stream = ans.encode(classes, _N_GAP_CLASSES)
    values = flat[where].astype(np.int64)
    extra_stream = bitpack.write_fields(extra, extra_bits)
    fields += [len(where), len(class_stream), len(extra_stream)]
    header = bitpack.write_fields(*bitpack.exp_golomb(np.array(fields), 6))
    return header + class_stream + extra_stream + ans.encode(values - (values > zero), problem.n_symbols - 1)


def _decode_sparse(data, problem):
    if not 3 <= problem.n_symbols <= ans.MAX_SYMBOLS:
        raise FormatError(f"a sparse stream has 3 to {ans.MAX_SYMBOLS} symbols, got {problem.n_symbols}")
    reader = bitpack.BitReader(data)
    zero = problem.zero
    if zero is None:
        zero = _checked_symbol(reader.read_exp_golomb(6), problem)
    n_values, n_class_bytes, n_extra_bytes = (reader.read_exp_golomb(6) for _ in range(3))
    if not 1 <= n_values <= problem.size:
        raise FormatError(f"number of values must be in [1, {problem.size}], got {n_values}")
    body = reader.rest()
    start = n_class_bytes + n_extra_bytes
    if start > len(body):
        raise FormatError("sparse stream ends early")
    classes = ans.decode(body[:n_class_bytes], n_values, _N_GAP_CLASSES).astype(np.int64)
    gaps = _gaps_of_classes(classes, body[n_class_bytes:start])
    where = np.cumsum(gaps + 1) - 1
    if int(gaps.max()) >= problem.size or where[-1] >= problem.size:
        raise FormatError(f"gap leads beyond the last of {problem.size} codes")
    values = ans.decode(body[start:], n_values, problem.n_symbols - 1)
    flat = np.full(problem.size, zero, dtype=problem.dtype)
    flat[where] = values + (values >= zero)
    return flat


_N_GAP_CLASSES = 64  # two per octave: gaps below 2**31


def _gap_classes(gaps):
    """Return class, low bits and their number: ``gap + 2`` is ``1b`` in binary, then the low bits."""
    shifted = gaps + 2
    size = np.frexp(shifted.astype(np.float64))[1].astype(np.int64)
    extra_bits = size - 2
    second = (shifted >> extra_bits) & 1
    return 2 * (size - 2) + second, shifted & ((1 << extra_bits) - 1), extra_bits


def _gaps_of_classes(classes, extra_stream):
    extra_bits = classes >> 1
    ends = np.cumsum(extra_bits)
    n_bits = int(ends[-1])
    if (n_bits + 7) // 8 != len(extra_stream):
        raise FormatError(f"low bits of the gaps fill {(n_bits + 7) // 8} bytes, got {len(extra_stream)}")
    bits = np.unpackbits(np.frombuffer(extra_stream, dtype=np.uint8))
    gaps = (2 + (classes & 1)) << extra_bits
    starts = ends - extra_bits
    for k in range(int(extra_bits.max())):
        some = extra_bits > k
        gaps[some] |= bits[starts[some] + k].astype(np.int64) << (extra_bits[some] - 1 - k)
    return gaps - 2


def _encode_bytes_coder(flat, problem):
    coder, payload = encode_bytes(flat.astype(problem.dtype.newbyteorder("<")), problem.dtype.itemsize)
    return bytes([coder == "planes"]) + payload


def _decode_bytes_coder(data, problem):
    if not data or data[0] > 1:
        raise FormatError("stream of codes as bytes has no valid head byte")
    itemsize = problem.dtype.itemsize
    raw = decode_bytes("planes" if data[0] else "raw", data[1:], problem.size * itemsize, itemsize)
    return raw.view(problem.dtype.newbyteorder("<"))


_CODECS = {
    "constant": (_encode_constant, _decode_constant),
    "packed": (_encode_packed, _decode_packed),
    "huffman": (_encode_huffman, _decode_huffman),
    "ans": (_encode_ans, _decode_ans),
    "context": (_encode_context, _decode_context),
    "sparse": (_encode_sparse, _decode_sparse),
    "bytes": (_encode_bytes_coder, _decode_bytes_coder),
}


# --- the public functions -------------------------------------------------------------------------


class _Problem(NamedTuple):
    """What encoder and decoder know of a stream beside its payload."""

    shape: tuple[int, int]
    n_symbols: int
    zero: int | None
    kernel: int

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def dtype(self) -> np.dtype:
        return _code_dtype(self.n_symbols)


def _checked_symbol(symbol: int, problem: "_Problem") -> int:
    if not 0 <= symbol < problem.n_symbols:
        raise FormatError(f"symbol must be in [0, {problem.n_symbols}), got {symbol}")
    return symbol


def _problem(shape, n_symbols, zero, kernel, error) -> _Problem:
    if len(shape) != 2 or min(shape) < 0:
        raise error(f"codes must have two dimensions, got shape {tuple(shape)}")
    if not 1 <= n_symbols < MAX_SYMBOLS:
        raise error(f"n_symbols must be in [1, {MAX_SYMBOLS}), got {n_symbols}")
    if zero is not None and not 0 <= zero < n_symbols:
        raise error(f"zero must be None or in [0, {n_symbols}), got {zero}")
    if kernel < 1:
        raise error(f"kernel must be at least 1, got {kernel}")
    zero = None if zero is None else int(zero)
    return _Problem((int(shape[0]), int(shape[1])), int(n_symbols), zero, int(kernel))


def encode_codes(codes, n_symbols, *, coder="auto", zero=None, kernel=1) -> tuple[str, bytes]:
    """Entropy-code a matrix of codes.

    Parameters
    ----------
    codes : array of int of shape (n_rows, n_columns)
        Codes in ``[0, n_symbols)``; rows are filters, columns positions.
    n_symbols : int
        Size of the alphabet.
    coder : {'auto'} or one of CODERS, default='auto'
        'auto' takes the smallest; above ``2**23`` codes it leaves out what takes more than a few seconds
        ('context', 'bytes').
    zero : int or None, default=None
        The code that means zero, when codes are sorted by value: ``|code - zero|`` is then a magnitude.
        None for symbols without an order.
    kernel : int, default=1
        Inner period of a row: columns are ``c_in * kernel``.

    Returns
    -------
    coder : str
        Name to give to :func:`decode_codes`.
    payload : bytes

    Raises
    ------
    ValueError
        If a code is outside the alphabet, or the named coder cannot code this stream.

    Examples
    --------
    >>> codes = np.tile([0, 1, 1, 1], (3, 8))
    >>> name, payload = encode_codes(codes, 2, coder="packed")
    >>> len(payload), bool((decode_codes(name, payload, codes.shape, 2) == codes).all())
    (12, True)
    """
    codes = np.asarray(codes)
    if codes.dtype.kind not in "biu":
        raise ValueError(f"codes must be integers, got dtype {codes.dtype}")
    problem = _problem(codes.shape, n_symbols, zero, kernel, ValueError)
    if coder != "auto" and coder not in CODERS:
        raise ValueError(f"coder must be 'auto' or one of {CODERS}, got {coder!r}")
    flat = codes.reshape(-1)
    if not flat.size:
        return "constant", b""
    if flat.min() < 0 or flat.max() >= n_symbols:
        raise ValueError(f"codes must be in [0, {n_symbols}), got {flat.min()} to {flat.max()}")
    if coder == "auto":
        return min(_candidates(flat, problem), key=lambda name_payload: len(name_payload[1]))
    payload = _CODECS[coder][0](flat, problem)
    if payload is None:
        raise ValueError(f"coder {coder!r} cannot code these {flat.size} codes of {n_symbols} symbols")
    return coder, payload


def _candidates(flat, problem, *, everything=False):
    """Yield (name, payload) of the coders worth trying; nothing beats a constant."""
    constant = _encode_constant(flat, problem)
    if constant is not None:
        yield "constant", constant
        return
    for name in CODERS:
        if name == "constant" or (name in SLOW and flat.size > FAST_ABOVE and not everything):
            continue
        payload = _CODECS[name][0](flat, problem)
        if payload is not None:
            yield name, payload


def decode_codes(coder, data, shape, n_symbols, *, zero=None, kernel=1) -> np.ndarray:
    """Invert :func:`encode_codes`.

    Parameters
    ----------
    coder, data
        What :func:`encode_codes` returned.
    shape : tuple of two int
    n_symbols, zero, kernel
        As they were given to :func:`encode_codes`.

    Returns
    -------
    ndarray of shape ``shape``
        ``uint8``, ``uint16`` or ``int32``, the smallest that holds the alphabet.

    Raises
    ------
    FormatError
        If the payload cannot have come from :func:`encode_codes`. Memory is bounded by a multiple of
        ``shape``.
    """
    problem = _problem(shape, n_symbols, zero, kernel, FormatError)
    if coder not in CODERS:
        raise FormatError(f"unknown coder {coder!r}; this version reads {CODERS}")
    data = bytes(data)
    if not problem.size:
        if data:
            raise FormatError(f"stream of an empty matrix must be empty, got {len(data)} bytes")
        return np.zeros(problem.shape, dtype=problem.dtype)
    flat = _CODECS[coder][1](data, problem)
    if int(flat.max()) >= n_symbols or int(flat.min()) < 0:
        raise FormatError(f"codes must be in [0, {n_symbols}), got {flat.min()} to {flat.max()}")
    return flat.astype(problem.dtype, copy=False).reshape(problem.shape)


def coded_sizes(codes, n_symbols, *, zero=None, kernel=1) -> dict[str, int]:
    """Return the bytes of the payload of every coder that can code ``codes``.

    Examples
    --------
    >>> sorted(coded_sizes(np.array([[0, 1, 1, 2]]), 3, zero=1))
    ['ans', 'bytes', 'context', 'huffman', 'packed', 'sparse']
    """
    codes = np.asarray(codes)
    problem = _problem(codes.shape, n_symbols, zero, kernel, ValueError)
    if not codes.size:
        return {"constant": 0}
    return {name: len(payload) for name, payload in _candidates(codes.reshape(-1), problem, everything=True)}
