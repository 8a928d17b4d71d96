"""A tensor as byte streams and a small JSON entry, and back.

`take_apart` turns a tensor into an entry (JSON), coded streams (large payload) and small arrays (codebooks,
BatchNorm vectors) that share streams with those of other tensors; `put_together` is its inverse. `encode_tensor` and
`decode_tensor` do the same for one tensor alone.
"""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

import skfactor.codec.families  # noqa: F401  every decoder class is known to the file
from skfactor.codec.coders import FAST_ABOVE, SLOW, decode_bytes, decode_codes, encode_bytes, encode_codes
from skfactor.codec.decoders import Decoder, decoder_from_parts
from skfactor.codec.dtypes import DTYPES, host_dtype, is_float
from skfactor.codec.floats import bits_of, find_grid, find_line, grid_values, line_values
from skfactor.codec.index import TAIL_BYTES, Index, encode_region
from skfactor.codec.lossless import encode_short
from skfactor.codec.tensor import CompressedTensor, Layout, RawTensor
from skfactor.exceptions import FormatError

__all__ = [
    "EncodedTensor",
    "PackLedger",
    "PackWriter",
    "decode_pack",
    "decode_tensor",
    "encode_tensor",
    "plan",
    "put_together",
    "take_apart",
]

SMALL_BYTES = 1 << 16  # arrays below share a stream with those of other tensors
PACK_BYTES = 1 << 20  # a shared stream is closed once it holds this much
CHUNK_BYTES = 1 << 20  # larger payload is coded in pieces, which bounds the coder's working memory
CHUNK_CODES = 1 << 19
MAX_RANGE = 1 << 16  # integer codes without hints that span more are stored as plain integers
_DTYPES = {np.dtype(host).str for _, host in DTYPES.values()}
_MAX_SIZE = 1 << 48
#: A step of decoding holds at most _FREE_ELEMENTS + _WORK_RATIO times the elements of what is stored and decoded.
_FREE_ELEMENTS = 1 << 22
_WORK_RATIO = 16
#: Entries hold a coder as its number here, other coders by name. Part of the format: append only.
CODER_NAMES = ("raw", "planes", "constant", "packed", "huffman", "ans", "sparse", "bytes", "context", "short")


def _coder_number(name: str) -> int | str:
    return CODER_NAMES.index(name) if name in CODER_NAMES else name


def coder_name(number: Any) -> str:
    """Inverse of `_coder_number`; FormatError for what is neither a name nor a number."""
    if isinstance(number, str):
        return number
    if type(number) is int and 0 <= number < len(CODER_NAMES):
        return CODER_NAMES[number]
    raise FormatError(f"unknown coder {number!r:.80}")


class EncodedTensor(NamedTuple):
    """One tensor, encoded alone.

    Attributes
    ----------
    entry : dict
        JSON-able description that `decode_tensor` needs.
    streams : list of bytes
    nbytes : int
        Bytes of streams and index of a file that holds this tensor alone, under the name "". Header and footer, the
        same for every tensor, are left out.
    """

    entry: dict[str, Any]
    streams: list[bytes]
    nbytes: int


class Parts(NamedTuple):
    """What `take_apart` makes of a tensor."""

    entry: dict[str, Any]
    streams: list[bytes]
    small: list[np.ndarray]


class Plan(NamedTuple):
    """What an entry needs to be read.

    Attributes
    ----------
    n_streams : int
    small : list of (dtype, count)
    nbytes : int
        Bytes that it decodes to: decoder arrays, codes, and the matrix in float32 or float64; of a raw tensor itself.
    """

    n_streams: int
    small: list[tuple[str, int]]
    nbytes: int


class Source(Protocol):
    """Where `put_together` reads from, in the order in which `take_apart` wrote."""

    def stream(self) -> bytes:
        """Next coded stream."""

    def small(self, dtype: str, count: int) -> np.ndarray:
        """Next small array, flat."""


class PackLedger:
    """Assigns small arrays to shared streams; writer and reader run it and so agree without a stored table.

    One pack per dtype is open at a time. Bool is packed as uint8.
    """

    def __init__(self):
        self.dtypes: list[str] = []
        self.counts: list[int] = []
        self._open: dict[str, int] = {}

    def place(self, dtype: str, count: int) -> tuple[int, int]:
        """Return the number of the pack that takes `count` elements, and where in it they start."""
        dtype = "|u1" if dtype == "|b1" else dtype
        pack = self._open.get(dtype)
        if pack is None:
            pack = self._open[dtype] = len(self.dtypes)
            self.dtypes.append(dtype)
            self.counts.append(0)
        self.counts[pack] += count
        return pack, self.counts[pack] - count

    def nbytes(self, pack: int) -> int:
        """Bytes of a pack before coding."""
        return self.counts[pack] * np.dtype(self.dtypes[pack]).itemsize

    def close(self, *, everything: bool = False) -> list[int]:
        """Close the packs that are full (after each tensor), or all (at the end); return their numbers in order."""
        full = sorted(p for p in self._open.values() if everything or self.nbytes(p) >= PACK_BYTES)
        for pack in full:
            del self._open[self.dtypes[pack]]
        return full


class PackWriter:
    """Collects small arrays and codes the packs that close."""

    def __init__(self):
        self.ledger = PackLedger()
        self._arrays: dict[int, list[np.ndarray]] = {}

    def add(self, arrays: Iterable[np.ndarray]) -> None:
        """Append flat arrays, each to the open pack of its dtype."""
        for array in arrays:
            if array.size:
                pack, _ = self.ledger.place(array.dtype.str, array.size)
                self._arrays.setdefault(pack, []).append(array.copy())

    def close(self, *, everything: bool = False) -> list[tuple[int | str, bytes]]:
        """Coder and payload of every pack that closes now; see `PackLedger.close`."""
        coded = []
        for pack in self.ledger.close(everything=everything):
            flat = np.concatenate([a.reshape(-1).view(np.uint8) for a in self._arrays.pop(pack)])
            itemsize = np.dtype(self.ledger.dtypes[pack]).itemsize
            name, payload = encode_bytes(flat, itemsize)
            short = encode_short(flat, itemsize)
            if len(short) < len(payload):
                name, payload = "short", short
            coded.append((_coder_number(name), payload))
        return coded


def decode_pack(coder: int | str, data: bytes, dtype: str, count: int) -> np.ndarray:
    """The elements of a pack."""
    host = np.dtype(dtype)
    return decode_bytes(coder_name(coder), data, count * host.itemsize, host.itemsize).view(host)


# --- arrays to streams ----------------------------------------------------------------------------


class _Stored(NamedTuple):
    how: list
    streams: list[bytes]
    small: list[np.ndarray]


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def _row_chunks(shape: tuple[int, int]) -> Iterator[slice]:
    """Slices of rows with about CHUNK_CODES codes each."""
    step = max(1, CHUNK_CODES // max(1, shape[1]))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _n_row_chunks(shape: tuple[int, int]) -> int:
    return -(-shape[0] // max(1, CHUNK_CODES // max(1, shape[1])))


def _encode_bytes_chunks(flat: np.ndarray) -> tuple[list[int | str], list[bytes]]:
    data = flat.view(np.uint8)
    coded = [encode_bytes(data[i : i + CHUNK_BYTES], flat.dtype.itemsize) for i in range(0, len(data), CHUNK_BYTES)]
    return [_coder_number(name) for name, _ in coded], [payload for _, payload in coded]


_FAST = ("constant", "packed", "ans", "sparse")
_WORTH = 0.01  # part of the size that a slow coder must save on a matrix of several pieces


def _encode_fast(codes, n_symbols, *, zero, kernel) -> tuple[str, bytes]:
    """The smallest of the coders that decode a large tensor in about a second."""
    coded = []
    for coder in _FAST:
        with contextlib.suppress(ValueError):
            coded.append(encode_codes(codes, n_symbols, coder=coder, zero=zero, kernel=kernel))
    return min(coded, key=lambda name_payload: len(name_payload[1]))


def _coder_of_pieces(codes, n_symbols, *, zero, kernel) -> str:
    """What 'auto' means for a matrix in several pieces: 'fast', or a slow coder that is worth its time.

    Judged by the first quarter of a piece. A slow coder takes far longer, to write and to read.
    """
    rows = slice(0, max(1, CHUNK_CODES // (4 * max(1, codes.shape[1]))))
    if codes.size > FAST_ABOVE:
        return "fast"
    name, payload = encode_codes(codes[rows], n_symbols, zero=zero, kernel=kernel)
    limit = (1 - _WORTH) * len(_encode_fast(codes[rows], n_symbols, zero=zero, kernel=kernel)[1])
    return name if name in SLOW and len(payload) < limit else "fast"


def _encode_codes_chunks(codes, n_symbols, *, coder="auto", zero=None, kernel=1) -> tuple[list[int | str], list[bytes]]:
    """Code a matrix by blocks of rows; 'auto' is decided on the first and kept where it can code the others."""
    how = {"zero": zero, "kernel": kernel}
    if coder == "auto" and _n_row_chunks(codes.shape) > 1:
        coder = _coder_of_pieces(codes, n_symbols, **how)
    names, payloads = [], []
    for rows in _row_chunks(codes.shape):
        wanted = names[0] if names else coder
        try:
            if wanted == "fast":
                coded = _encode_fast(codes[rows], n_symbols, **how)
            else:
                coded = encode_codes(codes[rows], n_symbols, coder=wanted, **how)
        except ValueError:
            if wanted == coder:
                raise
            coded = _encode_fast(codes[rows], n_symbols, **how)
        names.append(coded[0])
        payloads.append(coded[1])
    return [_coder_number(name) for name in names], payloads


def _store_masked(array: np.ndarray, kernel: int) -> _Stored | None:
    """Mask of what is not +0.0 and the values there, if enough is zero that a mask can pay."""
    bits = bits_of(array)
    mask = bits != 0
    n_values = int(np.count_nonzero(mask))
    if 50 * (array.size - n_values) < array.size or array.size < 64:
        return None
    mask_names, streams = _encode_codes_chunks(
        mask.view(np.uint8).reshape(_matrix_shape(array.shape)), 2, zero=0, kernel=kernel)
    value_names, values = _encode_bytes_chunks(bits[mask])
    return _Stored(["mask", n_values, mask_names, value_names], streams + values, [])


def _store_array(array: np.ndarray, kernel: int = 1) -> _Stored:
    """The smallest exact way to store an array: one value, a grid, a share of a pack, mask + values, bytes."""
    array = np.ascontiguousarray(array)
    flat = array.reshape(-1)
    if not flat.size:
        return _Stored(["pack"], [], [])
    bits = bits_of(flat)
    if flat.size > 1 and bits[0] == bits[-1] and (bits == bits[0]).all():
        return _Stored(["const"], [], [flat[:1]])
    if flat.dtype.kind == "f" and flat.size <= SMALL_BYTES:
        if (grid := find_grid(flat)) is not None:
            k0, step = grid
            return _Stored(["grid", k0, step.dtype.str], [], [np.array([step])])
        if (line := find_line(flat)) is not None:
            first, step = line
            return _Stored(["line", step.dtype.str], [], [np.array([first]), np.array([step])])
    masked = _store_masked(array, kernel) if flat.dtype.kind == "f" else None
    small = flat.nbytes < SMALL_BYTES
    if masked is not None:
        size = sum(map(len, masked.streams)) + 4 * len(masked.streams)
        if size < 0.8 * flat.nbytes and (small or flat.nbytes > CHUNK_BYTES):
            return masked
    if small:
        return _Stored(["pack"], [], [flat])
    names, streams = _encode_bytes_chunks(flat)
    if masked is not None and size < sum(map(len, streams)):
        return masked
    return _Stored(["bytes", names], streams, [])


def _store_codes(tensor: CompressedTensor, kernel: int) -> _Stored:
    """Integer codes through the entropy coders, others as an array."""
    codes = np.ascontiguousarray(tensor.codes, dtype=tensor.codes.dtype.newbyteorder("<"))
    if codes.dtype.kind not in "iu" or not codes.size:
        return _store_array(codes, kernel)
    matrix = codes.reshape(_matrix_shape(codes.shape))
    hints = tensor.decoders[-1].code_hints()
    if hints.get("n_symbols"):
        names, streams = _encode_codes_chunks(
            matrix, hints["n_symbols"], coder=tensor.coder, zero=hints.get("zero"), kernel=kernel)
        return _Stored(["codes", names], streams, [])
    low, high = int(codes.min()), int(codes.max())
    if high - low >= MAX_RANGE or abs(low) > _MAX_SIZE:
        return _store_array(codes, kernel)
    unsigned = f"<u{codes.dtype.itemsize}"  # differences modulo 2**bits: int8 codes may span 255
    shifted = matrix.view(unsigned) - np.array(low, dtype=matrix.dtype).view(unsigned)
    zero = -low if low <= 0 <= high else None
    names, streams = _encode_codes_chunks(shifted, high - low + 1, coder=tensor.coder, zero=zero, kernel=kernel)
    return _Stored(["ints", low, high - low + 1, names], streams, [])


# --- streams to arrays ----------------------------------------------------------------------------


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise FormatError(message)


def _is_int(value: Any, low: int = 0, high: int = _MAX_SIZE) -> bool:
    return type(value) is int and low <= value <= high


def _checked_shape(shape: Any, what: str) -> tuple[int, ...]:
    if not (isinstance(shape, list) and len(shape) <= 32 and all(_is_int(n) for n in shape)
            and math.prod(max(n, 1) for n in shape) <= _MAX_SIZE):
        raise FormatError(f"{what} cannot have the shape {shape!r:.80}")
    return tuple(shape)


def _n_chunks(nbytes: int) -> int:
    return -(-nbytes // CHUNK_BYTES)


def _plan_array(how: Any, dtype: Any, shape: tuple[int, ...], what: str, *, codes: bool) -> Plan:
    """Check one array's record completely and say what reading it takes."""
    if not (isinstance(dtype, str) and dtype in _DTYPES):
        raise FormatError(f"{what}: unknown dtype {dtype!r:.80}")
    if not (isinstance(how, list) and how and isinstance(how[0], str)):
        raise FormatError(f"{what}: damaged record {how!r:.80}")
    tag, *args = how
    kind, count, size = dtype[1], math.prod(shape), math.prod(shape) * np.dtype(dtype).itemsize

    def coders(value, n):
        if not (isinstance(value, list) and len(value) == n
                and all(isinstance(v, str) or _is_int(v, 0, len(CODER_NAMES) - 1) for v in value)):
            raise FormatError(f"{what}: needs the coders of {n} streams, got {value!r:.80}")
        return n

    match tag, args:
        case "pack", []:
            return Plan(0, [(dtype, count)], size)
        case "const", [] if count > 1:
            return Plan(0, [(dtype, 1)], size)
        case "line", [("<f4" | "<f8") as step] if dtype in ("<f4", "<f8") and count:
            return Plan(0, [(dtype, 1), (step, 1)], size)
        case "grid", [k0, ("<f4" | "<f8") as step] if (
                dtype in ("<f4", "<f8") and count and _is_int(k0, -(1 << 23), 1 << 23)):
            return Plan(0, [(step, 1)], size)
        case "bytes", [names] if count:
            return Plan(coders(names, _n_chunks(size)), [], size)
        case "mask", [n_values, mask, values] if kind == "f" and _is_int(n_values, 0, count) and count:
            n_streams = coders(mask, _n_row_chunks(_matrix_shape(shape)))
            return Plan(n_streams + coders(values, _n_chunks(n_values * np.dtype(dtype).itemsize)), [], size)
        case "codes", [names] if codes and kind in "iu" and count:
            return Plan(coders(names, _n_row_chunks(_matrix_shape(shape))), [], size)
        case "ints", [low, n_symbols, names] if codes and kind in "iu" and count:
            info = np.iinfo(dtype)
            if not (_is_int(low, max(info.min, -_MAX_SIZE)) and _is_int(n_symbols, 1, MAX_RANGE)
                    and low + n_symbols - 1 <= info.max):
                raise FormatError(f"{what}: {n_symbols!r:.40} integers from {low!r:.40} do not fit {dtype}")
            return Plan(coders(names, _n_row_chunks(_matrix_shape(shape))), [], size)
    raise FormatError(f"{what}: damaged record {how!r:.80} of a {dtype} array of shape {shape!r:.80}")


def _load_bytes(names: list[int | str], dtype: str, count: int, source: Source) -> np.ndarray:
    host = np.dtype("|u1" if dtype == "|b1" else dtype)
    if len(names) == 1:
        return decode_bytes(coder_name(names[0]), source.stream(), count * host.itemsize, host.itemsize).view(host)
    out = np.empty(count, dtype=host)
    raw = out.view(np.uint8)
    for i, name in enumerate(names):
        piece = raw[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES]
        piece[:] = decode_bytes(coder_name(name), source.stream(), len(piece), host.itemsize)
    return out


def _load_matrix(names, shape, n_symbols, source, *, dtype, zero=None, kernel=1, low=0) -> np.ndarray:
    out = np.empty(shape, dtype=dtype)
    for name, rows in zip(names, _row_chunks(shape)):
        piece = out[rows]
        piece[:] = decode_codes(coder_name(name), source.stream(), piece.shape, n_symbols, zero=zero, kernel=kernel)
    if low:
        out += np.array(low, dtype=dtype)
    return out


def _load_array(how, dtype, shape, source: Source, kernel: int, hints: dict[str, Any]) -> np.ndarray:
    """Inverse of `_store_array` and `_store_codes`; the record has passed `_plan_array`."""
    tag, *args = how
    count = math.prod(shape)
    if tag == "pack":
        flat = source.small(dtype, count) if count else np.empty(0, dtype=dtype)
    elif tag == "const":
        flat = np.empty(count, dtype=dtype)
        flat.view(f"<u{flat.itemsize}")[:] = source.small(dtype, 1).view(f"<u{flat.itemsize}")
    elif tag == "grid":
        flat = grid_values(args[0], source.small(args[1], 1)[0], count, dtype)
    elif tag == "line":
        first = source.small(dtype, 1)[0]
        flat = line_values(first, source.small(args[0], 1)[0], count, dtype)
    elif tag == "bytes":
        flat = _load_bytes(args[0], dtype, count, source)
    elif tag == "mask":
        n_values, mask_names, value_names = args
        mask = _load_matrix(mask_names, _matrix_shape(shape), 2, source, dtype=np.uint8, zero=0, kernel=kernel)
        mask = mask.reshape(-1).view(bool)
        _require(np.count_nonzero(mask) == n_values, f"mask has {np.count_nonzero(mask)} values, not {n_values}")
        flat = np.zeros(count, dtype=dtype)
        flat[mask] = _load_bytes(value_names, dtype, n_values, source)
    elif tag == "codes":
        _require(isinstance(hints.get("n_symbols"), int), "the decoder does not say how many codes there are")
        _require(hints["n_symbols"] - 1 <= np.iinfo(dtype).max, f"{hints['n_symbols']} codes do not fit {dtype}")
        flat = _load_matrix(args[0], _matrix_shape(shape), hints["n_symbols"], source, dtype=dtype,
                            zero=hints.get("zero"), kernel=kernel)
    else:
        low, n_symbols, names = args
        zero = -low if low <= 0 < low + n_symbols else None
        flat = _load_matrix(names, _matrix_shape(shape), n_symbols, source, dtype=dtype, zero=zero, kernel=kernel,
                            low=low)
    if dtype == "|b1" and flat.dtype != bool:
        _require(not flat.size or int(flat.max()) <= 1, "a bool array holds a byte that is neither 0 nor 1")
        flat = flat.view(bool)
    return flat.reshape(shape)


# --- tensors --------------------------------------------------------------------------------------


def _plain(value):
    """JSON form of a decoder's parameter."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"parameters of a decoder must be JSON values, got {type(value).__name__}")


def _kernel_of(codes_shape: tuple[int, ...], layout: Layout) -> int:
    same = len(codes_shape) == 2 and codes_shape[1] == math.prod(layout.kernel_shape)
    return max(1, math.prod(layout.kernel_shape[1:])) if same else 1


def take_apart(tensor: CompressedTensor | RawTensor) -> Parts:
    """Split a tensor into its entry, its coded streams and the small arrays that go to shared streams."""
    if isinstance(tensor, RawTensor):
        shape = tensor.array.shape
        stored = _store_array(tensor.array, max(1, math.prod(shape[2:])))
        return Parts({"dtype": tensor.dtype, "shape": list(shape), "data": stored.how}, stored.streams, stored.small)
    if not isinstance(tensor, CompressedTensor):
        raise TypeError(f"tensor must be a CompressedTensor or a RawTensor, got {type(tensor).__name__}")
    chain, streams, small = [], [], []
    for decoder in tensor.decoders:
        params, arrays = decoder.parts()
        records = {}
        for name, array in arrays.items():
            array = np.asarray(array, dtype=array.dtype.newbyteorder("<"))
            if array.dtype.str not in _DTYPES:
                raise TypeError(f"array {name!r} of decoder {decoder.name!r} has dtype {array.dtype}, "
                                f"allowed: {', '.join(sorted(_DTYPES))}")
            stored = _store_array(array)
            records[name] = [array.dtype.str, list(array.shape), *stored.how]
            streams += stored.streams
            small += stored.small
        chain.append([decoder.name, _plain(params), records])
    layout, codes = tensor.layout, tensor.codes
    entry: dict[str, Any] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "decoders": chain}
    if layout != Layout.rows_first(tuple(tensor.shape)):
        entry["layout"] = _plain([layout.n_rows, layout.kernel_shape, layout.view, layout.axes, layout.zero_rows])
    if tensor.coder != "auto":
        entry["coder"] = tensor.coder
    stored = _store_codes(tensor, _kernel_of(codes.shape, layout))
    plain_shape = codes.shape == (layout.n_rows, math.prod(layout.kernel_shape))
    dtype = codes.dtype.newbyteorder("<").str
    if dtype not in _DTYPES:
        raise TypeError(f"codes have dtype {codes.dtype}, allowed: {', '.join(sorted(_DTYPES))}")
    entry["codes"] = [dtype, None if plain_shape else list(codes.shape), *stored.how]
    return Parts(entry, streams + stored.streams, small + stored.small)


def _checked_layout(entry: dict[str, Any], shape: tuple[int, ...]) -> Layout:
    if "layout" not in entry:
        return Layout.rows_first(shape)
    match entry["layout"]:
        case [n_rows, list() as kernel, view, axes, list() as zero_rows] if _is_int(n_rows):
            kernel = _checked_shape(kernel, "kernel_shape")
            view = None if view is None else _checked_shape(view, "view")
            n_axes = len(shape if view is None else view)
            _require(axes is None or (isinstance(axes, list) and all(_is_int(a) for a in axes)
                                      and sorted(axes) == list(range(n_axes))), f"axes {axes!r:.80} are no permutation")
            _require(n_rows * math.prod(kernel) == math.prod(shape) and math.prod(shape if view is None else view)
                     == math.prod(shape), f"layout {entry['layout']!r:.80} does not hold a tensor of shape {shape}")
            _require(all(_is_int(r, 0, n_rows - 1) for r in zero_rows), f"zero_rows exceed the {n_rows} rows")
            return Layout(n_rows, kernel, view, None if axes is None else tuple(axes), tuple(zero_rows))
    raise FormatError(f"damaged layout {entry['layout']!r:.80}")


def _array_records(entry: dict[str, Any], shape: tuple[int, ...], layout: Layout | None):
    """Yield (what, record's `how`, dtype, shape, whether codes) of every array of an entry, in stored order."""
    if layout is None:
        yield "data", entry["data"], host_dtype(entry["dtype"]).str, shape, False
        return
    for link in entry["decoders"]:
        match link:
            case [str(), dict(), dict() as records]:
                pass
            case _:
                raise FormatError(f"damaged decoder {link!r:.80}")
        for name, record in records.items():
            what = f"array {name!r:.40}"
            if not (isinstance(record, list) and len(record) > 2):
                raise FormatError(f"{what}: damaged record {record!r:.80}")
            yield what, record[2:], record[0], _checked_shape(record[1], what), False
    record = entry["codes"]
    if not (isinstance(record, list) and len(record) > 2):
        raise FormatError(f"codes: damaged record {record!r:.80}")
    plain = [layout.n_rows, math.prod(layout.kernel_shape)]
    yield "codes", record[2:], record[0], _checked_shape(plain if record[1] is None else record[1], "codes"), True


def _checked_entry(entry: Any) -> tuple[tuple[int, ...], Layout | None]:
    """Check the outer form of an entry; return the tensor's shape and, unless raw, its layout."""
    if not isinstance(entry, dict):
        raise FormatError(f"damaged entry {entry!r:.80}")
    keys = entry.keys()
    raw = keys == {"dtype", "shape", "data"}
    if not raw and not {"dtype", "shape", "decoders", "codes"} <= keys <= {
            "dtype", "shape", "decoders", "codes", "layout", "coder"}:
        raise FormatError(f"entry has the keys {sorted(keys)!r:.120}")
    dtype = entry["dtype"]
    if not (isinstance(dtype, str) and dtype in DTYPES):
        raise FormatError(f"unknown dtype {dtype!r:.80}")
    shape = _checked_shape(entry["shape"], "tensor")
    if raw:
        return shape, None
    if not is_float(dtype):
        raise FormatError(f"dtype of a compressed tensor must be a float, got {dtype!r}")
    if not (isinstance(entry["decoders"], list) and entry["decoders"]):
        raise FormatError("a compressed tensor has no decoder")
    if not isinstance(entry.get("coder", ""), str):
        raise FormatError(f"coder must be a name, got {entry['coder']!r:.80}")
    return shape, _checked_layout(entry, shape)


def plan(entry: Any) -> Plan:
    """Check an entry completely and return what reading it takes; FormatError if it is damaged."""
    shape, layout = _checked_entry(entry)
    n_streams, small, nbytes = 0, [], 0
    if layout is not None:
        nbytes = math.prod(shape) * max(4, host_dtype(entry["dtype"]).itemsize)
    for what, how, dtype, array_shape, codes in _array_records(entry, shape, layout):
        part = _plan_array(how, dtype, array_shape, what, codes=codes)
        n_streams += part.n_streams
        small += [(d, n) for d, n in part.small if n]
        nbytes += part.nbytes
    return Plan(n_streams, small, nbytes)


def _rebuilt_decoder(name: str, params: dict[str, Any], arrays: dict[str, np.ndarray]) -> Decoder:
    try:
        decoder = decoder_from_parts(name, params, arrays)
        decoder.code_hints()
    except FormatError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise FormatError(f"decoder {name!r} does not fit its stored parts: {error}") from error
    return decoder


def _check_chain(decoders: list[Decoder], codes: np.ndarray, layout: Layout) -> None:
    """Follow the shapes through the chain before anything is decoded: a small codebook must not become a large tensor.
    """
    shape: tuple[int, ...] = codes.shape
    most = (0, "")
    held = sum(a.size for d in decoders for a in d.parts()[1].values())
    allowed = _FREE_ELEMENTS + _WORK_RATIO * (codes.size + layout.n_rows * math.prod(layout.kernel_shape) + held)
    for decoder in reversed(decoders):
        try:
            work = decoder.workspace(shape)
            shape = decoder.decoded_shape(shape)
            work = max(work, math.prod(shape))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise FormatError(f"codes of shape {shape} do not fit decoder {decoder.name!r}: {error}") from error
        most = max(most, (work, decoder.name))
    expected = (layout.n_rows, math.prod(layout.kernel_shape))
    _require(tuple(shape) == expected, f"codes decode to a matrix of shape {tuple(shape)}, expected {expected}")
    _require(most[0] <= allowed, f"decoder {most[1]!r} asks for {most[0]} elements at once, allowed: {allowed}")


def put_together(entry: Any, source: Source) -> CompressedTensor | RawTensor:
    """Inverse of `take_apart` for an entry that has passed `plan`; FormatError if what is read does not fit it."""
    shape, layout = _checked_entry(entry)
    records = list(_array_records(entry, shape, layout))
    if layout is None:
        _, how, dtype, array_shape, _ = records[0]
        return RawTensor(_load_array(how, dtype, array_shape, source, max(1, math.prod(shape[2:])), {}),
                         entry["dtype"])
    rest = iter(records)
    decoders = []
    for name, params, arrays in entry["decoders"]:
        loaded = {}
        for key in arrays:
            _, how, dtype, array_shape, _ = next(rest)
            loaded[key] = _load_array(how, dtype, array_shape, source, 1, {})
        decoders.append(_rebuilt_decoder(name, params, loaded))
    _, how, dtype, codes_shape, _ = next(rest)
    codes = _load_array(how, dtype, codes_shape, source, _kernel_of(codes_shape, layout), decoders[-1].code_hints())
    _check_chain(decoders, codes, layout)
    return CompressedTensor(tuple(decoders), codes, shape, entry["dtype"], layout, entry.get("coder", "auto"))


def encode_tensor(tensor: CompressedTensor | RawTensor) -> EncodedTensor:
    """Encode one tensor alone; see `EncodedTensor`.

    Examples
    --------
    >>> encoded = encode_tensor(RawTensor(np.zeros((1000, 1000), dtype=np.float32), "float32"))
    >>> encoded.entry, [len(s) for s in encoded.streams]
    ({'dtype': 'float32', 'shape': [1000, 1000], 'data': ['const'], 'packs': [9]}, [1])
    >>> decode_tensor(*encoded[:2]).shape
    (1000, 1000)
    """
    entry, streams, small = take_apart(tensor)
    packs = PackWriter()
    packs.add(small)
    coded = packs.close(everything=True)
    names = [name for name, _ in coded]
    streams = streams + [payload for _, payload in coded]
    lengths = list(map(len, streams))
    large = [0 for n in lengths if n >= TAIL_BYTES]
    _, region, _ = encode_region(Index([""], [entry], {}, names, {}), lengths, large, 0)
    if names:
        entry = entry | {"packs": names}
    return EncodedTensor(entry, streams, sum(lengths) + len(region))


class _OneTensor:
    """Source of a tensor that was encoded alone."""

    def __init__(self, entry: dict[str, Any], packs: list[str], streams: list[bytes]):
        planned, ledger = plan(entry), PackLedger()
        places = [ledger.place(*item) for item in planned.small]
        numbers = ledger.close(everything=True)
        _require(isinstance(packs, list) and len(packs) == len(numbers),
                 f"{len(numbers)} packs have the coders {packs!r:.80}")
        _require(len(streams) == planned.n_streams + len(packs),
                 f"the tensor has {planned.n_streams + len(packs)} streams, got {len(streams)}")
        self._streams = iter(streams)
        arrays = {pack: decode_pack(name, data, ledger.dtypes[pack], ledger.counts[pack])
                  for pack, name, data in zip(numbers, packs, streams[planned.n_streams :])}
        self._small = iter([arrays[pack][start : start + n]
                            for (pack, start), (_, n) in zip(places, planned.small)])

    def stream(self) -> bytes:
        return next(self._streams)

    def small(self, dtype: str, count: int) -> np.ndarray:
        return next(self._small)


def decode_tensor(entry: dict[str, Any], streams: Iterable[bytes]) -> CompressedTensor | RawTensor:
    """Inverse of `encode_tensor`; FormatError if entry and streams do not fit together."""
    if not isinstance(entry, dict):
        raise FormatError(f"damaged entry {entry!r:.80}")
    packs = entry.get("packs", [])
    entry = {k: v for k, v in entry.items() if k != "packs"}
    return put_together(entry, _OneTensor(entry, packs, list(streams)))
