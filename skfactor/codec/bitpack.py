"""Fixed-length and variable-length bit fields in vectorised numpy.

Two layouts live here: ``pack``/``unpack`` store every value in the same number of bits, and
``write_fields``/``BitReader`` store short lists of fields of different lengths (headers, Huffman codes).
"""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np

from skfactor.exceptions import FormatError

_GROUP = 8  # eight values of w bits fill exactly w bytes


def bit_width(n_symbols: int) -> int:
    """Return ``ceil(log2(n_symbols))``, the bits of one fixed-length code."""
    return max(int(n_symbols) - 1, 0).bit_length()


def packed_size(n_values: int, width: int) -> int:
    """Return the bytes that ``pack`` writes for ``n_values`` values of ``width`` bits."""
    planes, rest = divmod(width, 8)
    return planes * n_values + (n_values * rest + 7) // 8


def pack(values: np.ndarray, width: int) -> bytes:
    """Store non-negative integers in ``width`` bits each.

    The whole low bytes come first as planes; the remaining ``width % 8`` bits of eight values then share
    ``width % 8`` bytes, first value in the lowest bits.

    Parameters
    ----------
    values : ndarray of shape (n,)
        Integers in ``[0, 2**width)``.
    width : int
        Bits per value, at most 32.

    Returns
    -------
    bytes
        ``packed_size(n, width)`` bytes.

    Examples
    --------
    >>> pack(np.array([1, 0, 3]), 2)
    b'1'
    """
    values = np.ascontiguousarray(values).astype(np.uint32, copy=False)
    parts = []
    while width >= 8:
        parts.append((values & np.uint32(255)).astype(np.uint8).tobytes())
        values = values >> np.uint32(8)
        width -= 8
    if width:
        n = len(values)
        groups = -(-n // _GROUP)
        padded = np.zeros(groups * _GROUP, dtype=np.uint64)
        padded[:n] = values
        lanes = padded.reshape(groups, _GROUP)
        word = np.zeros(groups, dtype=np.uint64)
        for k in range(_GROUP):
            word |= lanes[:, k] << np.uint64(k * width)
        little = word.astype("<u8").view(np.uint8).reshape(groups, 8)[:, :width]
        parts.append(little.tobytes()[: (n * width + 7) // 8])
    return b"".join(parts)


def unpack(data: bytes, n_values: int, width: int) -> np.ndarray:
    """Invert :func:`pack`; return ``uint32`` values.

    Raises
    ------
    FormatError
        If ``data`` does not have exactly the length that ``pack`` writes.
    """
    expected = packed_size(n_values, width)
    if len(data) != expected:
        raise FormatError(
            f"packed stream of {n_values} values of {width} bits must have {expected} bytes, got {len(data)}"
        )
    raw = np.frombuffer(data, dtype=np.uint8)
    out = np.zeros(n_values, dtype=np.uint32)
    planes, rest = divmod(width, 8)
    for k in range(planes):
        out |= raw[k * n_values : (k + 1) * n_values].astype(np.uint32) << np.uint32(8 * k)
    if rest:
        groups = -(-n_values // _GROUP)
        tail = np.zeros(groups * rest, dtype=np.uint8)
        tail[: len(raw) - planes * n_values] = raw[planes * n_values :]
        word_bytes = np.zeros((groups, 8), dtype=np.uint8)
        word_bytes[:, :rest] = tail.reshape(groups, rest)
        word = word_bytes.reshape(-1).view("<u8").astype(np.uint64)
        lanes = np.empty((groups, _GROUP), dtype=np.uint32)
        mask = np.uint64((1 << rest) - 1)
        for k in range(_GROUP):
            lanes[:, k] = (word >> np.uint64(k * rest)) & mask
        out |= lanes.reshape(-1)[:n_values] << np.uint32(8 * planes)
    return out


def write_fields(values: np.ndarray, lengths: np.ndarray) -> bytes:
    """Concatenate bit fields, most significant bit first, padded with zeros to whole bytes.

    Parameters
    ----------
    values : ndarray of shape (n,)
        Field ``i`` is the ``lengths[i]`` low bits of ``values[i]``.
    lengths : ndarray of shape (n,)
        Lengths in bits, 0 to 32.

    Examples
    --------
    >>> write_fields(np.array([1, 5]), np.array([2, 3])).hex()
    '68'
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    values = np.asarray(values).astype(np.uint64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    starts = ends - lengths
    # Every field lies in two neighbouring 32-bit words. Fields do not overlap, so a sum of weights is an
    # exact "or".
    field = values << (64 - lengths - (starts & 31)).astype(np.uint64)
    field[lengths == 0] = 0
    word = starts >> 5
    n_words = (total + 31) // 32 + 2
    high = np.bincount(word, weights=(field >> np.uint64(32)).astype(np.float64), minlength=n_words)
    low = np.bincount(word + 1, weights=(field & np.uint64(0xFFFFFFFF)).astype(np.float64), minlength=n_words)
    words = (high[:n_words] + low[:n_words]).astype(np.uint64).astype(">u4")
    return words.tobytes()[: (total + 7) // 8]


def exp_golomb(values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return fields and lengths of the Exp-Golomb code of order ``k`` of non-negative integers."""
    shifted = np.asarray(values, dtype=np.int64) + (1 << k)
    size = np.frexp(shifted.astype(np.float64))[1].astype(np.int64)  # bit length, exact below 2**53
    return shifted, 2 * size - 1 - k


class BitReader:
    """Sequential reader of the short field lists that :func:`write_fields` makes."""

    def __init__(self, data: bytes):
        self._data = data
        self._pos = 0

    def read(self, n_bits: int) -> int:
        """Return the next ``n_bits`` bits as an integer."""
        end = self._pos + n_bits
        if end > 8 * len(self._data):
            raise FormatError(f"bit stream ends early: {n_bits} bits wanted at bit {self._pos}")
        first = self._pos >> 3
        chunk = int.from_bytes(self._data[first : (end + 7) >> 3], "big")
        self._pos = end
        return (chunk >> (-end % 8)) & ((1 << n_bits) - 1)

    def read_exp_golomb(self, k: int) -> int:
        """Return the next Exp-Golomb value of order ``k``, below 2**32."""
        zeros = 0
        while not self.read(1):
            zeros += 1
            if zeros > 32:
                raise FormatError("Exp-Golomb code is longer than 32 bits")
        return ((1 << (zeros + k)) | self.read(zeros + k)) - (1 << k)

    def rest(self) -> bytes:
        """Return what follows the last whole byte read; the padding bits must be zero."""
        if self.read(-self._pos % 8):
            raise FormatError("padding bits are not zero")
        return self._data[self._pos >> 3 :]


def write_profile(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return fields and lengths of a slowly varying list of non-negative integers.

    The numbers of zeros at both ends come first; then the differences of neighbours, folded to non-negative
    numbers, in the Exp-Golomb code of the order 0 to 3 that is shortest; two bits name the order. Sorted codebooks
    have smooth histograms, so this costs 2 to 4 bits an entry.
    """
    values = np.asarray(values, dtype=np.int64)
    used = np.flatnonzero(values)
    ends = (int(used[0]), len(values) - 1 - int(used[-1])) if len(used) else (len(values), 0)
    end_fields, end_lengths = exp_golomb(np.array(ends), 0)
    delta = np.diff(values[ends[0] : len(values) - ends[1]], prepend=0)
    folded = np.where(delta > 0, 2 * delta - 1, -2 * delta)
    fields = [exp_golomb(folded, k) for k in range(4)]
    best = min(range(4), key=lambda k: int(fields[k][1].sum()))
    return (
        np.concatenate([end_fields, [best], fields[best][0]]),
        np.concatenate([end_lengths, [2], fields[best][1]]),
    )


def read_profile(reader: BitReader, n_values: int, maximum: int) -> np.ndarray:
    """Invert :func:`write_profile`; refuse values outside ``[0, maximum]``."""
    first = reader.read_exp_golomb(0)
    last = n_values - reader.read_exp_golomb(0)
    if not 0 <= first <= last <= n_values:
        raise FormatError(f"profile of {n_values} entries cannot begin at {first} and end at {last}")
    order = reader.read(2)
    out = np.zeros(n_values, dtype=np.int64)
    value = 0
    for i in range(first, last):
        folded = reader.read_exp_golomb(order)
        value += (folded + 1) >> 1 if folded & 1 else -(folded >> 1)
        if not 0 <= value <= maximum:
            raise FormatError(f"profile entry must lie in [0, {maximum}], got {value}")
        out[i] = value
    return out
