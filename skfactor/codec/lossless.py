"""Lossless coding of raw numbers: byte planes, each in the coder that makes it smallest."""
# SPDX-License-Identifier: BSD-3-Clause

import lzma
import zlib

import numpy as np

from skfactor.codec import ans
from skfactor.exceptions import FormatError

__all__ = ["decode_bytes", "encode_bytes", "encode_short"]

_RAW, _CONSTANT, _ZLIB, _LZMA, _ANS = range(5)
_ITEMSIZES = (1, 2, 4, 8)
_LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 3, "lp": 0, "pb": 0, "dict_size": 1 << 22}]
_MAX_LZMA = 1 << 22  # bytes of a plane above which "auto" leaves LZMA out: it takes about a second per 3 MB
_SAMPLE = 1 << 16


def _as_bytes(data) -> np.ndarray:
    if isinstance(data, (bytes, bytearray, memoryview)):
        return np.frombuffer(data, dtype=np.uint8)
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def _rotate(words: np.ndarray, itemsize: int, left: bool) -> np.ndarray:
    """Rotate every little-endian word by one bit, so that a float's sign leaves the byte of its exponent."""
    typed = words.view(f"<u{itemsize}")
    one, rest = typed.dtype.type(1), typed.dtype.type(8 * itemsize - 1)
    rotated = (typed << one) | (typed >> rest) if left else (typed >> one) | (typed << rest)
    return rotated.astype(typed.dtype).view(np.uint8)


def _code_plane(plane: np.ndarray, effort: str) -> tuple[int, bytes]:
    counts = np.bincount(plane, minlength=256)
    if np.count_nonzero(counts) == 1:
        return _CONSTANT, plane[:1].tobytes()
    candidates = [(_RAW, plane.tobytes())]
    if ans.estimated_size(counts) < 0.998 * len(plane):
        candidates.append((_ANS, ans.encode(plane, 256)))
    # Mantissas are noise and exponents nearly independent: a slow general compressor is asked only where a
    # sample from the middle of the plane shows repetitions that a histogram does not see.
    first = max(0, (len(plane) - _SAMPLE) // 2)
    sample = plane[first : first + _SAMPLE]
    order_0 = ans.estimated_size(np.bincount(sample, minlength=256))
    if effort == "best" or len(zlib.compress(sample.tobytes(), 6)) < min(order_0, len(sample)):
        candidates.append((_ZLIB, zlib.compress(plane.tobytes(), 6)))
        if effort == "best" or (effort == "auto" and len(plane) <= _MAX_LZMA):
            stream = lzma.compress(plane.tobytes(), format=lzma.FORMAT_RAW, filters=_LZMA_FILTERS)
            candidates.append((_LZMA, stream))
    return min(candidates, key=lambda kind_data: len(kind_data[1]))


def _split(raw: np.ndarray, itemsize: int, rotate: bool, effort: str) -> bytes:
    """Return head byte, one record (kind, length, data) per byte plane, and the odd bytes at the end."""
    n_items = len(raw) // itemsize
    words = raw[: n_items * itemsize]
    if rotate:
        words = _rotate(np.ascontiguousarray(words), itemsize, left=True)
    planes = words.reshape(n_items, itemsize)
    parts = [bytes([int(rotate)])]
    for k in range(itemsize):
        kind, data = _code_plane(np.ascontiguousarray(planes[:, k]), effort)
        parts += [bytes([kind]), len(data).to_bytes(5, "little"), data]
    parts.append(raw[n_items * itemsize :].tobytes())
    return b"".join(parts)


def encode_bytes(data, itemsize: int, *, effort: str = "auto") -> tuple[str, bytes]:
    """Code the bytes of an array of numbers without loss.

    The bytes of every number are split into planes (all lowest bytes, ..., all highest bytes); each
    plane is stored raw, as one constant, by zlib, by LZMA or by ANS, whichever is smallest. Words are
    also tried rotated by one bit, which joins the exponent bits of a float in one plane: about 83 % of
    the bytes of trained float32 weights.

    Parameters
    ----------
    data : ndarray or bytes
        Numbers in little-endian order.
    itemsize : {1, 2, 4, 8}
        Bytes of one number.
    effort : {'fast', 'auto', 'best'}, default='auto'
        'fast' leaves LZMA out, 'best' always tries it, 'auto' tries it on planes up to 4 MiB.

    Returns
    -------
    coder : {'raw', 'planes'}
    payload : bytes
        Never longer than the input.

    Examples
    --------
    >>> coder, payload = encode_bytes(np.ones(1000, dtype=np.float32), 4)
    >>> coder, len(payload)
    ('planes', 29)
    """
    if itemsize not in _ITEMSIZES:
        raise ValueError(f"itemsize must be one of {_ITEMSIZES}, got {itemsize}")
    if effort not in ("fast", "auto", "best"):
        raise ValueError(f"effort must be 'fast', 'auto' or 'best', got {effort!r}")
    raw = _as_bytes(data)
    best = "raw", raw.tobytes()
    if len(raw) >= itemsize:
        for rotate in (False, True) if itemsize > 1 else (False,):
            payload = _split(raw, itemsize, rotate, effort)
            if len(payload) < len(best[1]):
                best = "planes", payload
    return best


def encode_short(data, itemsize: int) -> bytes:
    """Code a few numbers whose lower or higher bytes are mostly zero: one head byte, then the byte planes that are not.

    Bit ``k`` of the head says that plane ``k`` follows. `decode_bytes` reads it as coder "short".

    Examples
    --------
    >>> len(encode_short(np.array([0.5, -3.0, 0.25], dtype=np.float32), 4))
    7
    """
    planes = _as_bytes(data).reshape(-1, itemsize).T
    kept = [k for k in range(itemsize) if planes[k].any()]
    return bytes([sum(1 << k for k in kept)]) + b"".join(planes[k].tobytes() for k in kept)


def _decode_short(data: bytes, nbytes: int, itemsize: int) -> np.ndarray:
    kept = [k for k in range(itemsize) if data and data[0] >> k & 1]
    n_items = nbytes // itemsize
    if not data or data[0] >> itemsize or nbytes % itemsize or len(data) != 1 + len(kept) * n_items:
        raise FormatError(f"stream of short numbers does not hold exactly {nbytes} bytes")
    out = np.zeros((n_items, itemsize), dtype=np.uint8)
    out[:, kept] = np.frombuffer(data, dtype=np.uint8, offset=1).reshape(len(kept), n_items).T
    return out.reshape(-1)


def _decode_plane(kind: int, data: bytes, n: int) -> np.ndarray:
    if kind == _CONSTANT and len(data) == 1:
        return np.full(n, data[0], dtype=np.uint8)
    if kind == _ANS:
        return ans.decode(data, n, 256).astype(np.uint8)
    if kind == _ZLIB:
        unzip = zlib.decompressobj()
        try:
            plane = unzip.decompress(data, n) if n else b""
        except zlib.error as error:
            raise FormatError(f"zlib stream is damaged: {error}") from None
        # The check sum comes after the last byte of data: an empty read must bring the stream to its end.
        try:
            rest = unzip.decompress(unzip.unconsumed_tail, 1)
        except zlib.error as error:
            raise FormatError(f"zlib stream is damaged: {error}") from None
        if rest or not unzip.eof or unzip.unused_data:
            raise FormatError(f"zlib stream does not hold exactly {n} bytes")
    elif kind == _LZMA:
        unzip = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=_LZMA_FILTERS)
        try:
            plane = unzip.decompress(data, max_length=n)
            rest = b"" if unzip.eof else unzip.decompress(b"", max_length=1)
        except (lzma.LZMAError, EOFError) as error:
            raise FormatError(f"LZMA stream is damaged: {error}") from None
        if rest or not unzip.eof or unzip.unused_data:
            raise FormatError(f"LZMA stream does not hold exactly {n} bytes")
    elif kind == _RAW:
        plane = data
    else:
        raise FormatError(f"kind of a byte plane must be in [0, {_ANS}], got {kind}")
    if len(plane) != n:
        raise FormatError(f"byte plane must have {n} bytes, got {len(plane)}")
    return np.frombuffer(plane, dtype=np.uint8)


def decode_bytes(coder: str, data: bytes, nbytes: int, itemsize: int) -> np.ndarray:
    """Invert :func:`encode_bytes`; return ``nbytes`` bytes as a ``uint8`` array.

    Raises
    ------
    FormatError
        If the payload is damaged or does not hold exactly ``nbytes`` bytes.
    """
    data = bytes(data)
    if itemsize not in _ITEMSIZES:
        raise FormatError(f"itemsize must be one of {_ITEMSIZES}, got {itemsize}")
    if coder == "raw":
        if len(data) != nbytes:
            raise FormatError(f"raw stream must have {nbytes} bytes, got {len(data)}")
        return np.frombuffer(data, dtype=np.uint8).copy()
    if coder == "short":
        return _decode_short(data, nbytes, itemsize)
    if coder != "planes":
        raise FormatError(f"coder of raw numbers must be 'raw', 'planes' or 'short', got {coder!r}")
    if not data or data[0] > 1:
        raise FormatError("stream of byte planes has no valid head byte")
    n_items = nbytes // itemsize
    records, pos = [], 1
    for _ in range(itemsize):
        end = pos + 6 + int.from_bytes(data[pos + 1 : pos + 6], "little")
        if pos + 6 > len(data) or end > len(data):
            raise FormatError("stream of byte planes ends early")
        records.append((data[pos], data[pos + 6 : end]))
        pos = end
    if len(data) - pos != nbytes - n_items * itemsize:
        raise FormatError(f"stream of byte planes has {len(data) - pos} bytes after its last plane")
    out = np.empty(nbytes, dtype=np.uint8)
    for k, (kind, plane) in enumerate(records):
        out[k : n_items * itemsize : itemsize] = _decode_plane(kind, plane, n_items)
    if data[0]:
        out[: n_items * itemsize] = _rotate(out[: n_items * itemsize], itemsize, left=False)
    out[n_items * itemsize :] = np.frombuffer(data[pos:], dtype=np.uint8)
    return out
