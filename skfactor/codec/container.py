"""The `.skf` file: a valid safetensors file of one entry that holds streams, index and footer.

    length of header (8 bytes) | {"skf1":{"dtype":"U8","shape":[N],"data_offsets":[0,N]}} |
    streams | small streams | padding | index | footer

docs/file_format.md describes every byte. A writer streams: payload goes to disk at once, index and footer follow, the
header is filled in last and the file renamed into place.
"""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import contextlib
import itertools
import json
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from skfactor.codec._files import AtomicFile, OpenFile
from skfactor.codec.index import TAIL_BYTES, Index, Reader, decode_index, encode_region
from skfactor.codec.streams import PackLedger, PackWriter, coder_name, decode_pack, plan, put_together, take_apart
from skfactor.codec.tensor import CompressedTensor, RawTensor
from skfactor.exceptions import FormatError

__all__ = ["FORMAT_VERSION", "SkfFile", "SkfWriter"]

FORMAT_VERSION = 1
_KEY = "skf1"
_FOOTER = struct.Struct("<IBI")  # bytes of the index region; version << 4 | compression; CRC-32 of region and both
_WIDE_HEADER = 80  # holds N of 13 digits; a file of less than 100 kB gets 64
_TIGHT_FILE = 99_999
#: A file decodes to at most _RATIO times its size + _FREE bytes unless the reader raises `max_bytes`; the writer pads
#: a file that would exceed this.
_RATIO, _FREE = 4096, 1 << 25
#: The same for the work of reading the index.
_INDEX_RATIO, _INDEX_FREE = 64, 1 << 18


def _header(n: int) -> bytes:
    text = json.dumps({_KEY: {"dtype": "U8", "shape": [n], "data_offsets": [0, n]}}, separators=(",", ":"))
    width = max(64, -(-len(text) // 8) * 8) if n <= _TIGHT_FILE else _WIDE_HEADER
    return struct.pack("<Q", width) + text.ljust(width).encode()


class _Item(NamedTuple):
    """Where the parts of one tensor lie."""

    streams: range
    small: list[tuple[int, int, int]]  # pack, start, count
    nbytes: int


class _Arrangement:
    """Which stream belongs to what: follows from the entries alone, the same for writer and reader."""

    def __init__(self):
        self.ledger = PackLedger()
        self.items: dict[str, _Item] = {}
        self.pack_stream: dict[int, int] = {}
        self.n_streams = 0

    def add(self, name: str, entry: dict[str, Any]) -> None:
        try:
            planned = plan(entry)
        except FormatError as error:
            raise FormatError(f"tensor {name!r}: {error}") from None
        small = [(*self.ledger.place(dtype, n), n) for dtype, n in planned.small]
        streams = range(self.n_streams, self.n_streams + planned.n_streams)
        self.n_streams += planned.n_streams
        self.items[name] = _Item(streams, small, planned.nbytes)
        self._place(self.ledger.close())

    def end(self) -> None:
        self._place(self.ledger.close(everything=True))

    def _place(self, packs: list[int]) -> None:
        for pack in packs:
            self.pack_stream[pack] = self.n_streams
            self.n_streams += 1


def _split_exactly(total: int, weights: list[int]) -> list[int]:
    """Integers in proportion to `weights` that sum to `total`."""
    whole = max(1, sum(weights))
    edges = [total * w // whole for w in itertools.accumulate(weights, initial=0)]
    return [b - a for a, b in itertools.pairwise(edges)]


def _bytes_of(index: Index, arrangement: _Arrangement, lengths: list[int], index_bytes: int) -> dict[str, int]:
    """Bytes of every tensor: its streams, its part of packs by size, and its part of the index."""
    used = {name: sum(lengths[i] for i in arrangement.items[name].streams) if name in arrangement.items else 0
            for name in index.names}
    owners: dict[int, list[tuple[str, int]]] = {}
    for name, item in arrangement.items.items():
        for pack, _, count in item.small:
            owners.setdefault(pack, []).append((name, count))
    for pack, parts in owners.items():
        shares = _split_exactly(lengths[arrangement.pack_stream[pack]], [count for _, count in parts])
        for (name, _), share in zip(parts, shares):
            used[name] += share
    # a name and about a dozen bytes of numbers make an entry; the rest of the index is user metadata
    weights = [len(name.encode(errors="surrogatepass")) + 12 for name in index.names]
    extra = len(json.dumps(index.metadata)) if index.metadata else 0
    for name, share in zip(index.names, _split_exactly(index_bytes, [*weights, extra])):
        used[name] += share
    return used


class SkfWriter:
    """Write a `.skf` file, one tensor after another.

    Payload goes to disk as it comes; memory is bounded by the largest tensor, the packs being filled (1 MiB per
    dtype), small streams and the index. The file appears at `path` when the writer is closed; until then, and if an
    exception leaves the `with` block, what stood there stays. The same tensors give the same bytes.

    Parameters
    ----------
    path : path-like or binary file object
        A file object must be empty, readable, writable and seekable; it stays open.
    metadata : dict, optional
        JSON values kept beside the tensors.

    Examples
    --------
    >>> import tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "small.skf")
    >>> with SkfWriter(path, metadata={"accuracy": 0.91}) as file:
    ...     file.add("w", RawTensor(np.ones((2, 3), dtype=np.float32), "float32"))
    ...     file.tie("v", "w")
    >>> SkfFile(path).read("v").to_array()
    array([[1., 1., 1.],
           [1., 1., 1.]], dtype=float32)
    """

    def __init__(self, path, *, metadata: dict[str, Any] | None = None):
        self.metadata = _checked_metadata(metadata)
        self._index = Index([], [], {}, [], self.metadata)
        self._known: set[str] = set()
        self._arrangement = _Arrangement()
        self._packs = PackWriter()
        self._lengths: list[int] = []
        self._checksums: list[int] = []
        self._tail: list[bytes] = []
        self._bytes: dict[str, int] | None = None
        self._file = OpenFile(path) if hasattr(path, "write") else AtomicFile(path)
        self._file.write(bytes(8 + _WIDE_HEADER))

    def add(self, name: str, tensor: CompressedTensor | RawTensor) -> None:
        """Encode a tensor and write its large payload."""
        self._check_name(name)
        parts = take_apart(tensor)
        # read by the reader's rules first: what is written can be read
        self._arrangement.add(name, parts.entry)
        self._remember(name, parts.entry)
        for stream in parts.streams:
            self._put(stream)
        self._packs.add(parts.small)
        self._put_packs()

    def tie(self, name: str, other: str) -> None:
        """Let `name` be the same tensor as `other`, which is already in the file."""
        self._check_name(name)
        if other not in self._known:
            raise ValueError(f"tensor {name!r} cannot be tied to {other!r}, which is not in the file")
        self._index.ties[name] = self._index.ties.get(other, other)
        self._remember(name, None)

    def close(self) -> None:
        """Write index and footer and move the file into place."""
        if self._bytes is not None:
            return
        self._check_open()
        try:
            self._arrangement.end()
            self._put_packs(everything=True)
            self._finish()
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Throw away what was written; what stood at `path` stays."""
        if self._file is not None:
            self._file.abort()
            self._file = None

    def nbytes_of(self, name: str) -> int:
        """Bytes of the closed file that `name` takes: its streams and its part of packs and index."""
        if self._bytes is None:
            raise ValueError("nbytes_of needs a closed file: tensors share streams that are written at the end")
        return self._bytes[name]

    def _check_open(self) -> None:
        if self._file is None:
            raise ValueError("the writer is closed")

    def _check_name(self, name: str) -> None:
        self._check_open()
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, got {type(name).__name__}")
        if name in self._known:
            raise ValueError(f"tensor {name!r} is already in the file")

    def _remember(self, name: str, entry: dict[str, Any] | None) -> None:
        self._known.add(name)
        self._index.names.append(name)
        self._index.entries.append(entry)

    def _put(self, stream: bytes) -> None:
        self._lengths.append(len(stream))
        if len(stream) < TAIL_BYTES:
            self._tail.append(stream)
        else:
            self._file.write(stream)
            self._checksums.append(zlib.crc32(stream))

    def _put_packs(self, *, everything: bool = False) -> None:
        for coder, payload in self._packs.close(everything=everything):
            self._index.packs.append(coder)
            self._put(payload)

    def _finish(self) -> None:
        tail = b"".join(self._tail)
        method, region, work = encode_region(self._index, self._lengths, self._checksums, zlib.crc32(tail))
        unpadded = self._file.tell() + len(tail) + len(region) + _FOOTER.size - (_WIDE_HEADER - 64)
        decoded = sum(item.nbytes for item in self._arrangement.items.values())
        wanted = max(-(-(decoded - _FREE) // _RATIO), -(-(work - _INDEX_FREE) // _INDEX_RATIO))
        self._file.write(tail + bytes(max(0, wanted - unpadded)))
        head = struct.pack("<IB", len(region), FORMAT_VERSION << 4 | method)
        self._file.write(region + head + struct.pack("<I", zlib.crc32(region + head)))
        n = self._file.tell() - 8 - _WIDE_HEADER
        self._file.seek(0)
        if n <= _TIGHT_FILE:
            self._file.seek(8 + _WIDE_HEADER)
            blob = self._file.read(n)
            self._file.seek(0)
            self._file.write(_header(n) + blob)
            self._file.truncate()
        else:
            self._file.write(_header(n))
        self._file.commit()
        self._file = None
        self._bytes = _bytes_of(self._index, self._arrangement, self._lengths, len(region))

    def __enter__(self) -> SkfWriter:
        return self

    def __exit__(self, kind, error, traceback):
        if kind is None:
            self.close()
        else:
            self.abort()


def _checked_metadata(metadata: Any) -> dict[str, Any]:
    if metadata is None:
        return {}
    try:
        if isinstance(metadata, dict) and json.loads(json.dumps(metadata)) == metadata:
            return json.loads(json.dumps(metadata))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"metadata must hold JSON values: {error}") from None
    raise ValueError(f"metadata must be a dict of JSON values with str keys and no NaN, got {metadata!r:.120}")


class SkfFile:
    """Read a `.skf` file.

    Opening checks header, footer and index and the consistency of all entries; tensors are read on demand, each
    stream against its check sum. Whatever does not fit gives a FormatError.

    Parameters
    ----------
    source : path-like or binary file object
        A file object must be seekable; it stays open when the SkfFile is closed.
    max_bytes : int, optional
        Largest number of bytes that all tensors together may decode to (codes and decoder arrays counted). By
        default 4096 times the size of the file + 32 MiB; a file of SkfWriter never needs more.

    Attributes
    ----------
    names : list of str
        All tensors in the order of the model, tied ones included.
    ties : dict of str to str
        Tied tensor -> the tensor it is.
    metadata : dict
    nbytes_total : int
        Size of the file. `overhead + sum(nbytes(name) for name in names)` is equal to it.
    overhead : int
        Bytes of header, footer, padding and user metadata.
    """

    def __init__(self, source, *, max_bytes: int | None = None):
        self._owned = not hasattr(source, "seek")
        self._file = open(source, "rb") if self._owned else source  # noqa: SIM115  closed by close()
        self._lock = threading.Lock()
        self._pack_cache: dict[int, np.ndarray] = {}
        self._tail: bytes | None = None
        try:
            self._open(max_bytes)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file, unless it was given open."""
        if self._owned:
            self._file.close()

    def __enter__(self) -> SkfFile:
        return self

    def __exit__(self, kind, error, traceback):
        self.close()

    def _read_at(self, start: int, n: int) -> bytes:
        with self._lock:
            self._file.seek(start)
            data = self._file.read(n)
        if len(data) != n:
            raise FormatError(f"the file ends at byte {start + len(data)}, expected {start + n}")
        return data

    def _open(self, max_bytes: int | None) -> None:
        with self._lock:
            self.nbytes_total = self._file.seek(0, os.SEEK_END)
        start = self._check_header()
        method, region = self._checked_region(start)
        reader = Reader(region)
        packed = reader.take(reader.varint())
        self._index = decode_index(method, packed, _INDEX_FREE + _INDEX_RATIO * self.nbytes_total)
        self.names, self.ties, self.metadata = self._index.names, self._index.ties, self._index.metadata
        self._entries = dict(zip(self.names, self._index.entries))
        self._arrangement = _Arrangement()
        for name, entry in self._entries.items():
            if entry is not None:
                self._arrangement.add(name, entry)
        self._arrangement.end()
        packs = self._arrangement.pack_stream
        if len(self._index.packs) != len(packs):
            raise FormatError(f"the index names the coders of {len(self._index.packs)} packs, the tensors have "
                              f"{len(packs)}")
        self._pack_coder = dict(zip(sorted(packs, key=packs.get), map(coder_name, self._index.packs)))
        self._read_table(reader, start, len(region))
        decoded = sum(item.nbytes for item in self._arrangement.items.values())
        limit = _FREE + _RATIO * self.nbytes_total if max_bytes is None else max_bytes
        if decoded > limit:
            raise FormatError(f"the tensors decode to {decoded} bytes, more than max_bytes={limit} of a file of "
                              f"{self.nbytes_total} bytes")

    def _check_header(self) -> int:
        if self.nbytes_total < 8:
            raise FormatError(f"not a .skf file: it has {self.nbytes_total} bytes")
        (width,) = struct.unpack("<Q", self._read_at(0, 8))
        if width > min(256, self.nbytes_total - 8):
            raise FormatError("not a .skf file, or its first bytes are damaged")
        try:
            header = json.loads(self._read_at(8, width).decode(), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"not a .skf file, or its header is damaged: {error}") from None
        match header:
            case {"skf1": {"dtype": "U8", "shape": [int(n)], "data_offsets": [int(first), int(last)], **rest}, **more}:
                if rest or more or bool in map(type, (n, first, last)):
                    raise FormatError("the header of the .skf file is damaged")
            case _:
                raise FormatError("not a .skf file: its header has no entry 'skf1'")
        start = 8 + width
        if first != 0 or n != last or start + n != self.nbytes_total:
            raise FormatError(f"the file is truncated or damaged: it has {self.nbytes_total} bytes, its header says "
                              f"{start} + {n!r:.40}")
        if n < _FOOTER.size:
            raise FormatError(f"the file is damaged: {n} bytes are too few for a footer")
        return start

    def _checked_region(self, start: int) -> tuple[int, bytes]:
        """Check the footer; return the compression method and the bytes of the index region."""
        footer = self._read_at(self.nbytes_total - _FOOTER.size, _FOOTER.size)
        length, kind, checksum = _FOOTER.unpack(footer)
        if length > self.nbytes_total - start - _FOOTER.size:
            raise FormatError(f"the footer is damaged: an index of {length} bytes does not fit the file")
        region = self._read_at(self.nbytes_total - _FOOTER.size - length, length)
        if zlib.crc32(region + footer[:5]) != checksum:
            raise FormatError("the index is damaged: its check sum does not fit")
        if kind >> 4 != FORMAT_VERSION:
            raise FormatError(f"the file has format version {kind >> 4}, this version of skfactor reads "
                              f"{FORMAT_VERSION}")
        return kind & 15, region

    def _read_table(self, reader: Reader, start: int, region_bytes: int) -> None:
        """Lengths and check sums of all streams, and where they lie."""
        self._lengths = [reader.varint() for _ in range(self._arrangement.n_streams)]
        n_large = sum(n >= TAIL_BYTES for n in self._lengths)
        checksums = iter(struct.unpack(f"<{n_large}I", reader.take(4 * n_large)))
        tail_bytes = sum(n for n in self._lengths if n < TAIL_BYTES)
        self._tail_checksum = struct.unpack("<I", reader.take(4))[0] if tail_bytes else 0
        reader.end()
        self._where: list[tuple[int, int | None]] = []  # offset in the file or, without check sum, in the tail
        body, tail = start, 0
        for n in self._lengths:
            if n < TAIL_BYTES:
                self._where.append((tail, None))
                tail += n
            else:
                self._where.append((body, next(checksums)))
                body += n
        self._tail_start, self._tail_bytes = body, tail_bytes
        self._padding = self.nbytes_total - _FOOTER.size - region_bytes - body - tail
        if self._padding < 0:
            raise FormatError(f"the streams have {-self._padding} bytes more than the file holds")
        self._region_bytes = region_bytes

    # --- reading --------------------------------------------------------------------------------

    def _stream(self, number: int) -> bytes:
        start, checksum = self._where[number]
        n = self._lengths[number]
        if checksum is None:
            if self._tail is None:
                tail = self._read_at(self._tail_start, self._tail_bytes)
                if tail and zlib.crc32(tail) != self._tail_checksum:
                    raise FormatError("its bytes are damaged: the check sum does not fit")
                self._tail = tail
            return self._tail[start : start + n]
        data = self._read_at(start, n)
        if zlib.crc32(data) != checksum:
            raise FormatError("its bytes are damaged: the check sum does not fit")
        return data

    def _pack(self, number: int) -> np.ndarray:
        pack = self._pack_cache.get(number)
        if pack is None:
            ledger = self._arrangement.ledger
            data = self._stream(self._arrangement.pack_stream[number])
            pack = decode_pack(self._pack_coder[number], data, ledger.dtypes[number], ledger.counts[number])
            if len(self._pack_cache) >= 8:
                self._pack_cache.pop(next(iter(self._pack_cache)), None)
            self._pack_cache[number] = pack
        return pack

    def _owner(self, name: str) -> str:
        if name not in self._entries:
            raise KeyError(f"no tensor {name!r} in the file")
        return self.ties.get(name, name)

    def read(self, name: str) -> CompressedTensor | RawTensor:
        """Read one tensor; FormatError naming it if its bytes are damaged."""
        owner = self._owner(name)
        with _naming(name):
            return put_together(self._entries[owner], _FileSource(self, self._arrangement.items[owner]))

    def read_array(self, name: str) -> np.ndarray:
        """`read(name).to_array()`, with FormatError where codes and decoders do not fit together."""
        tensor = self.read(name)
        with _naming(name):
            try:
                array = tensor.to_array()
            except FormatError:
                raise
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                raise FormatError(f"codes and decoders do not fit together: {error}") from error
            if array.shape != tuple(tensor.shape):
                raise FormatError(f"decodes to shape {array.shape}, expected {tuple(tensor.shape)}")
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    # --- what is in the file ----------------------------------------------------------------------

    def entry(self, name: str) -> dict[str, Any]:
        """What the index says of a tensor, without reading it.

        Returns
        -------
        dict
            `kind` ("raw", "compressed" or "tied"), `dtype`, `shape`, `nbytes` (bytes in the file), `nbytes_decoded`,
            `coders` (names, each once) and, of compressed tensors, `decoders` (names in order), `params` (their
            parameters), `arrays` (name -> dtype and shape, per decoder) and `n_clusters` if there is a codebook.
            Tied tensors have `tied_to`.
        """
        owner = self._owner(name)
        entry, item = self._entries[owner], self._arrangement.items[owner]
        chain = entry.get("decoders", [])
        how = entry["data"] if "data" in entry else entry["codes"][2:]
        records = [record[2:] for _, _, arrays in chain for record in arrays.values()] + [how]
        coders = [coder_name(c) for record in records for part in record[1:] if isinstance(part, list) for c in part]
        coders += [self._pack_coder[pack] for pack, _, _ in item.small]
        described = {"kind": "raw" if "data" in entry else "compressed", "dtype": entry["dtype"],
                     "shape": tuple(entry["shape"]), "nbytes": self.nbytes(name), "nbytes_decoded": item.nbytes,
                     "coders": list(dict.fromkeys(coders))}
        if chain:
            described["decoders"] = [name for name, _, _ in chain]
            described["params"] = [params for _, params, _ in chain]
            described["arrays"] = [{k: (record[0], tuple(record[1])) for k, record in arrays.items()}
                                   for _, _, arrays in chain]
            books = described["arrays"][-1].get("codebooks")
            if books is not None and len(books[1]) > 1:
                described["n_clusters"] = books[1][1]
        if owner != name:
            described |= {"kind": "tied", "tied_to": owner}
        return described

    def nbytes(self, name: str) -> int:
        """Bytes of the file that a tensor takes: its streams and its part of packs and index."""
        self._owner(name)
        return self._nbytes[name]

    @property
    def overhead(self) -> int:
        """Bytes of the file that belong to no tensor."""
        return self.nbytes_total - sum(self._nbytes.values())

    @property
    def _nbytes(self) -> dict[str, int]:
        if not hasattr(self, "_nbytes_cache"):
            self._nbytes_cache = _bytes_of(self._index, self._arrangement, self._lengths, self._region_bytes)
        return self._nbytes_cache


class _FileSource:
    """What `put_together` reads one tensor from."""

    def __init__(self, file: SkfFile, item: _Item):
        self._file = file
        self._streams = iter(item.streams)
        self._small = iter(item.small)

    def stream(self) -> bytes:
        return self._file._stream(next(self._streams))

    def small(self, dtype: str, count: int) -> np.ndarray:
        pack, start, n = next(self._small)
        return self._file._pack(pack)[start : start + n].copy()


def _no_duplicates(pairs):
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


@contextlib.contextmanager
def _naming(name: str):
    """Put the tensor's name in front of what went wrong with it."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"tensor {name!r}: {error}") from error
