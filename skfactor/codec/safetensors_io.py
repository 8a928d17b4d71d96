"""Read and write `.safetensors` files without torch, one tensor at a time."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from skfactor.codec._files import AtomicFile
from skfactor.codec.dtypes import DTYPES, host_dtype
from skfactor.exceptions import FormatError

__all__ = ["SafetensorsReader", "write_safetensors"]

_NAME_OF = {short: name for name, (short, _) in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit of the safetensors library


class SafetensorsReader:
    """Lazy reader of a `.safetensors` file.

    Opening checks the whole header: dtypes, shapes, and that the tensors cover the data without gap or overlap, as
    the safetensors library demands. `read` fetches one tensor, so memory is bounded by the largest.

    Parameters
    ----------
    source : path-like or binary file object

    Attributes
    ----------
    names : list of str
        In the order of the header.
    metadata : dict of str to str

    Raises
    ------
    FormatError
        If the file is damaged, truncated, or holds a dtype that skfactor does not know.
    """

    def __init__(self, source):
        self._owned = not hasattr(source, "seek")
        self._file = open(source, "rb") if self._owned else source  # noqa: SIM115  closed by close()
        self._lock = threading.Lock()
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file, unless it was given open."""
        if self._owned:
            self._file.close()

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, kind, error, traceback):
        self.close()

    def __len__(self) -> int:
        return len(self.names)

    def dtype(self, name: str) -> str:
        """Name of the dtype, as in `skfactor.codec.dtypes.DTYPES`."""
        return self._tensor(name)[0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._tensor(name)[1]

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor's data."""
        return self._tensor(name)[3]

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the numpy dtype that carries its bits."""
        dtype, shape, start, nbytes = self._tensor(name)
        array = np.empty(nbytes, dtype=np.uint8)
        with self._lock:
            self._file.seek(start)
            got = self._file.readinto(memoryview(array)) if nbytes else 0
        if got != nbytes:
            raise FormatError(f"tensor {name!r}: the file ends {nbytes - got} bytes early")
        if dtype == "bool" and nbytes and array.max() > 1:
            raise FormatError(f"tensor {name!r}: a bool tensor holds a byte that is neither 0 nor 1")
        return array.view(host_dtype(dtype)).reshape(shape)

    def _tensor(self, name: str) -> tuple[str, tuple[int, ...], int, int]:
        if name not in self._tensors:
            raise KeyError(f"no tensor {name!r} in the file")
        return self._tensors[name]

    def _open(self) -> None:
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        if size < 8:
            raise FormatError(f"not a safetensors file: it has {size} bytes")
        (width,) = struct.unpack("<Q", self._file.read(8))
        if width > min(_MAX_HEADER, size - 8):
            raise FormatError(f"not a safetensors file, or truncated: header of {width} bytes in a file of {size}")
        header = _parsed_header(self._file.read(width))
        self.metadata = header.pop("__metadata__", {})
        if not isinstance(self.metadata, dict) or not all(isinstance(v, str) for v in self.metadata.values()):
            raise FormatError("__metadata__ of a safetensors file must map str to str")
        self.names = list(header)
        self._tensors = {}
        for name, info in header.items():
            dtype, shape, first, last = _checked_info(name, info)
            self._tensors[name] = (dtype, shape, 8 + width + first, last - first)
        end = 8 + width
        for name in sorted(self._tensors, key=lambda n: self._tensors[n][2:]):
            _, _, start, nbytes = self._tensors[name]
            if start != end:
                raise FormatError(f"tensor {name!r}: its data starts at byte {start}, expected {end}")
            end += nbytes
        if end != size:
            raise FormatError(f"the file is truncated or damaged: it has {size} bytes, its header says {end}")


def _no_duplicates(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise ValueError(f"{twice!r} stands twice")
    return found


def _parsed_header(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not a safetensors file, or its header is damaged: {error}") from None
    if not isinstance(header, dict):
        raise FormatError("not a safetensors file: its header is no JSON object")
    return header


def _is_length(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _checked_info(name: str, info: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, first and last byte of one tensor of the header."""
    match info:
        case {"dtype": str(short), "shape": list(shape), "data_offsets": [first, last]} if len(info) == 3:
            pass
        case _:
            raise FormatError(f"tensor {name!r}: damaged description {info!r:.120}")
    if short not in _NAME_OF:
        raise FormatError(f"tensor {name!r}: dtype {short!r:.40} is not one of {', '.join(_NAME_OF)}")
    if not all(map(_is_length, shape)) or len(shape) > 32 or math.prod(max(n, 1) for n in shape) >= 1 << 60:
        raise FormatError(f"tensor {name!r}: impossible shape {shape!r:.120}")
    if not (_is_length(first) and _is_length(last) and first <= last):
        raise FormatError(f"tensor {name!r}: impossible data_offsets [{first!r:.40}, {last!r:.40}]")
    nbytes = math.prod(shape) * host_dtype(_NAME_OF[short]).itemsize
    if last - first != nbytes:
        raise FormatError(f"tensor {name!r}: {_NAME_OF[short]} of shape {shape!r:.120} has {nbytes} bytes, "
                          f"data_offsets give {last - first}")
    return _NAME_OF[short], tuple(shape), first, last


def _checked_array(name: str, dtype: str, shape, array: np.ndarray | Callable[[], np.ndarray]) -> np.ndarray:
    array = np.asarray(array() if callable(array) else array)
    if array.dtype != host_dtype(dtype) or array.shape != tuple(shape):
        raise ValueError(f"tensor {name!r}: expected {host_dtype(dtype)} of shape {tuple(shape)}, got {array.dtype} "
                         f"of shape {array.shape}")
    return np.ascontiguousarray(array)


def _header(items: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str] | None) -> bytes:
    """Header with the tensors in the order given; data of wider dtypes first, so that every tensor is aligned."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    header |= {name: None for name, _, _ in items}
    offset = 0
    for name, dtype, shape in sorted(items, key=lambda item: -host_dtype(item[1]).itemsize):
        nbytes = math.prod(shape) * host_dtype(dtype).itemsize
        header[name] = {"dtype": DTYPES[dtype][0], "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_safetensors(path, tensors: Iterable[tuple], *, metadata: dict[str, str] | None = None) -> None:
    """Write a `.safetensors` file, one tensor at a time, and rename it into place when it is whole.

    Parameters
    ----------
    path : path-like
    tensors : iterable of (name, dtype, shape, array)
        `dtype` is a name of `skfactor.codec.dtypes.DTYPES`, `array` carries its bits, or is a function without
        arguments that returns it. A list is written in one pass (use functions, so that the arrays need not exist
        together); from any other iterable data are first spooled to temporary files in the folder of `path`.
    metadata : dict of str to str, optional

    Raises
    ------
    ValueError
        If a name occurs twice, or an array is not of the dtype and shape announced.

    Examples
    --------
    >>> folder = tempfile.TemporaryDirectory()
    >>> file = os.path.join(folder.name, "a.safetensors")
    >>> write_safetensors(file, [("w", "float32", (2,), np.array([1, 2], dtype=np.float32))])
    >>> with SafetensorsReader(file) as reader:
    ...     reader.read("w")
    array([1., 2.], dtype=float32)
    >>> folder.cleanup()
    """
    if metadata and not all(isinstance(x, str) for pair in metadata.items() for x in pair):
        raise ValueError("metadata of a safetensors file must map str to str")
    if isinstance(tensors, (list, tuple)):
        items = _checked_items([item[:3] for item in tensors])
        with AtomicFile(path) as file:
            file.write(_header(items, metadata))
            for name, dtype, shape, array in sorted(tensors, key=lambda item: -host_dtype(item[1]).itemsize):
                file.write(_checked_array(name, dtype, shape, array).data)
        return
    items = []
    spools: dict[int, Any] = {}
    with AtomicFile(path) as file:
        try:
            for name, dtype, shape, array in tensors:
                items.append((name, dtype, tuple(shape)))
                size = host_dtype(dtype).itemsize
                if size not in spools:
                    spools[size] = tempfile.TemporaryFile(dir=file.path.parent)  # noqa: SIM115  closed below
                spools[size].write(_checked_array(name, dtype, shape, array).data)
            file.write(_header(_checked_items(items), metadata))
            for size in sorted(spools, reverse=True):
                spools[size].seek(0)
                shutil.copyfileobj(spools[size], file, 1 << 20)
        finally:
            for spool in spools.values():
                spool.close()


def _checked_items(items: list[tuple]) -> list[tuple[str, str, tuple[int, ...]]]:
    names = [name for name, _, _ in items]
    if len(set(names)) != len(names):
        raise ValueError(f"tensor {next(n for n in names if names.count(n) > 1)!r} is given twice")
    for name, dtype, _ in items:
        if not isinstance(name, str) or name == "__metadata__":
            raise ValueError(f"name of a tensor must be a str other than '__metadata__', got {name!r}")
        host_dtype(dtype)
    return [(name, dtype, tuple(int(n) for n in shape)) for name, dtype, shape in items]
