"""Damaged and malicious files give a FormatError or the exact original; no other exception, hang, or large allocation.

Two kinds of mutation: of the bytes of a file, which check sums and strict headers must catch, and of its parsed
content (header, index, stream lengths, streams) with all check sums recomputed, which the checks behind them must
catch or turn into another well-formed file.
"""
# SPDX-License-Identifier: BSD-3-Clause

import copy
import io
import json
import math
import struct
import tracemalloc
import zlib

import numpy as np
import pytest

from skfactor.codec import index
from skfactor.codec.container import SkfFile, SkfWriter
from skfactor.codec.decoders import IdentityDecoder
from skfactor.codec.dtypes import host_dtype
from skfactor.codec.index import Reader, varint
from skfactor.codec.tensor import CompressedTensor, Layout, RawTensor
from skfactor.exceptions import FormatError

from ._tensors import shared

_HEADER = 72
_MAX_BYTES = 1 << 18  # for speed: malicious files of these tests may decode to 256 KiB
_SLACK = 1 << 21  # working memory that does not depend on a file: packs, index limits, interpreter objects
_PER_CODE = 128  # working bytes of the entropy coders for each code of a block


def _tensors():
    """Three small sets, so that every kind of record, coder and layout is met."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(150).astype(np.float32)
    sparse = np.where(rng.random((16, 20)) < 0.8, np.float32(0), rng.standard_normal((16, 20)).astype(np.float32))
    first = {
        "conv.weight": shared(rng, (4, 3, 3, 3), 8, uniform=True, coder="context"),
        "conv.bias": RawTensor(noise[:4], "float32"),
        "bn.zero": RawTensor(np.zeros(40, dtype=np.float32), "float32"),
        "bn.count": RawTensor(np.array(7), "int64"),
        "flags": RawTensor(np.array([True, False, True]), "bool"),
    }
    second = {
        "noise": RawTensor(noise, "float32"),
        "half": shared(rng, (6, 10), 4, dtype="bfloat16", coder="huffman", code_dtype=np.int64),
        "rows": shared(rng, (4, 12), 3, books=4, granularity="row", dtype="float64", coder="ans"),
        "groups": shared(rng, (4, 12), 3, books=2, granularity="group", group_size=2, coder="packed"),
    }
    third = {
        "sparse": CompressedTensor((IdentityDecoder(),), sparse, (16, 20)),
        "product": shared(rng, (4, 12), 5, vector=3, coder="ans"),
        "transposed": shared(rng, (4, 4, 2), 4, coder="ans",
                             layout=Layout(4, (4, 2), (2, 2, 4, 2), (0, 2, 1, 3), (1,))),
        "signed": CompressedTensor((IdentityDecoder(),), rng.integers(-5, 6, (5, 7)), (5, 7), "float64"),
        "line": RawTensor(np.linspace(-1, 1, 50), "float64"),
    }
    return first, second, third


def _written(tensors, path):
    with SkfWriter(path, metadata={"k": [1.5, None]}) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor)
        file.tie("tied", next(iter(tensors)))
    return path.read_bytes()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(bytes of a file, name -> exact bits) of every set."""
    path = tmp_path_factory.mktemp("hostile") / "a.skf"
    found = []
    for tensors in _tensors():
        data = _written(tensors, path)
        exact = {name: tensor.to_array().tobytes() for name, tensor in tensors.items()}
        found.append((data, exact | {"tied": next(iter(exact.values()))}))
    return found


def _read_all(data, max_bytes=None):
    """name -> array or FormatError; the FormatError of opening if it does not open. Nothing else may be raised."""
    try:
        file = SkfFile(io.BytesIO(data), max_bytes=max_bytes)
    except FormatError as error:
        return None, error
    found = {}
    for name in file.names:
        try:
            array = file.read_array(name)
            assert array.shape == file.entry(name)["shape"]
            assert array.dtype == host_dtype(file.entry(name)["dtype"])
            found[name] = array
        except FormatError as error:
            found[name] = error
    assert all(repr(name) in str(error) for name, error in found.items() if isinstance(error, FormatError))
    assert file.overhead + sum(map(file.nbytes, file.names)) == len(data)
    return file, found


def _exact_or_refused(data, exact):
    file, found = _read_all(data)
    if file is None:
        return
    assert list(found) == list(exact)
    for name, array in found.items():
        assert isinstance(array, FormatError) or array.tobytes() == exact[name]


# --- damage: any bytes -----------------------------------------------------------------------------


def _damaged(data, rng):
    bad = bytearray(data)
    n = len(bad)
    kind = rng.integers(9)
    place, other = (int(i) for i in rng.integers(n, size=2))
    if kind <= 2:
        for _ in range(1 + kind):
            bad[rng.integers(n)] ^= 1 << rng.integers(8)
    elif kind == 3:
        bad[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, 0x20, 0x39])
    elif kind == 4:
        del bad[place:]
    elif kind == 5:
        bad += rng.bytes(int(rng.integers(1, 40)))
    elif kind == 6:
        size = int(rng.integers(1, 20))
        bad[place : place + size] = rng.bytes(size)
    elif kind == 7:
        first, last = sorted((place, other))
        bad[first:last] = bad[first:last][::-1]
    else:
        size = int(rng.integers(1, 30))
        bad[place:place], bad[other : other + size] = bad[other : other + size], b""
    return bytes(bad)


@pytest.mark.parametrize(("seed", "n"), [(0, 14_000), pytest.param(1, 300_000, marks=pytest.mark.slow)])
def test_damaged_bytes(files, seed, n):
    rng = np.random.default_rng(seed)
    for i in range(n):
        data, exact = files[i % len(files)]
        _exact_or_refused(_damaged(data, rng), exact)


@pytest.mark.parametrize("which", range(3))
def test_every_truncation(files, which):
    data, _ = files[which]
    for n in range(len(data)):
        with pytest.raises(FormatError):
            SkfFile(io.BytesIO(data[:n]))


@pytest.mark.parametrize("which", range(3))
def test_every_bit(files, which):
    """Each single bit flip is noticed, but for the spaces that pad the header."""
    data, _ = files[which]
    for place in range(len(data)):
        bad = data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :]
        file, found = _read_all(bad)
        assert file is None or any(isinstance(v, FormatError) for v in found.values())


# --- malice: any content under valid check sums ------------------------------------------------------


class _Content:
    """A file taken apart; `build` puts it together with correct lengths and check sums."""

    def __init__(self, data):
        length, kind, _ = struct.unpack("<IBI", data[-9:])
        region = Reader(data[len(data) - 9 - length : -9])
        text = Reader(index._decompress(kind & 15, region.take(region.varint()), 1 << 20))
        self.document = json.loads(text.take(text.varint()))
        self.numbers = []
        while text.pos < len(text.data):
            self.numbers.append(text.varint())
        self.lengths = []
        body = len(data) - _HEADER - 9 - length
        while sum(self.lengths) < body:
            self.lengths.append(region.varint())
        assert max(self.lengths) < 1 << 10  # one check sum, that of the small streams
        self.payload = data[_HEADER : _HEADER + body]
        self.method, self.version = index.STORED, kind >> 4
        self.header_n = self.raw_text = None

    def build(self):
        text = self.raw_text if self.raw_text is not None else json.dumps(self.document).encode()
        packed = varint(len(text)) + text + b"".join(varint(n) for n in self.numbers)
        if self.method == index.DEFLATE:
            deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=index.DICTIONARY)
            packed = deflate.compress(packed) + deflate.flush()
        table = b"".join(map(varint, self.lengths))
        table += struct.pack("<I", zlib.crc32(self.payload)) if self.payload else b""
        region = varint(len(packed)) + packed + table
        head = struct.pack("<IB", len(region), (self.version << 4 | self.method) & 255)
        blob = self.payload + region + head + struct.pack("<I", zlib.crc32(region + head))
        n = len(blob) if self.header_n is None else self.header_n
        header = json.dumps({"skf1": {"dtype": "U8", "shape": [n], "data_offsets": [0, n]}}).encode()
        return struct.pack("<Q", len(header)) + header + blob


_VALUES = [-1, 0, 1, 2, 3, 127, 1 << 16, 1 << 31, (1 << 63) - 1, 1 << 64, -(1 << 70), 10**30, 1.5, float("nan"),
           float("inf"), -0.0, None, True, False, "", "x", "float32", "<f4", "|u1", "<c8", "|b1", "ans", "raw", "pack",
           "const", "grid", "bytes", "mask", "codes", "ints", "codebook", "identity", "row", [], {}, [[]], [0],
           ["pack"], ["const"], [1] * 40, {"a": 1}, [[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]
_NUMBERS = [0, 1, 2, 3, 5, 8, 16, 100, 127, 128, 255, 1 << 12, 1 << 16, 1 << 20, 1 << 31, 1 << 32, 1 << 40, 1 << 48,
            (1 << 61) - 1, 1 << 62, (1 << 63) - 1]


def _nodes(value, found):
    """All (container, key) of a JSON tree."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            _nodes(value[key], found)
    return found


def _malicious(content, rng):
    bad = copy.copy(content)
    bad.document = copy.deepcopy(content.document)
    bad.numbers, bad.lengths = list(content.numbers), list(content.lengths)

    def pick(values):
        return values[int(rng.integers(len(values)))]

    for _ in range(1 + int(rng.integers(2))):
        kind = int(rng.integers(10))
        if kind <= 2:
            container, key = pick(_nodes(bad.document, []))
            container[key] = copy.deepcopy(pick(_VALUES))
        elif kind == 3:
            container, key = pick(_nodes(bad.document, []))
            other, source = pick(_nodes(bad.document, []))
            if rng.random() < 0.7:
                container[key] = copy.deepcopy(other[source])
            else:
                del container[key]
        elif kind <= 6:
            place = int(rng.integers(len(bad.numbers)))
            near = max(0, bad.numbers[place] + pick([-2, -1, 1, 2, 4]))
            bad.numbers[place] = near if rng.random() < 0.5 else pick(_NUMBERS)
        elif kind == 7:
            bad.lengths[int(rng.integers(len(bad.lengths)))] = pick(_NUMBERS)
        elif kind == 8:
            payload = bytearray(bad.payload)
            payload[rng.integers(len(payload))] = pick([0, 1, 2, 5, 127, 128, 255])
            bad.payload = bytes(payload)
        else:
            a, b = (int(i) for i in rng.integers(len(bad.numbers), size=2))
            bad.numbers[a], bad.numbers[b] = bad.numbers[b], bad.numbers[a]
            a, b = (int(i) for i in rng.integers(len(bad.lengths), size=2))
            bad.lengths[a], bad.lengths[b] = bad.lengths[b], bad.lengths[a]
    return bad.build()


def _within_memory(data, max_bytes=_MAX_BYTES):
    """Read everything; the peak stays below twice what the file declares and the coders' working memory."""
    tracemalloc.start()
    try:
        file, found = _read_all(data, max_bytes)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    declared = n_codes = 0
    for name in file or ():
        entry = file.entry(name)
        declared += entry["nbytes_decoded"] if entry["kind"] != "tied" else 0
        n_codes = max(n_codes, math.prod(entry["shape"]) if "decoders" in entry else 0)
    assert peak < 2 * declared + 2 * len(data) + _SLACK + _PER_CODE * n_codes
    return file, found


def test_content_is_put_together_as_it_was(files):
    for data, exact in files:
        file, found = _read_all(_Content(data).build())
        assert file.metadata == {"k": [1.5, None]}
        assert {name: array.tobytes() for name, array in found.items()} == exact


@pytest.mark.parametrize(("seed", "n"), [(0, 6_100), pytest.param(1, 100_000, marks=pytest.mark.slow)])
def test_malicious_content(files, seed, n):
    """Some mutants are other well-formed files; all others are refused, none takes memory or raises anything else."""
    rng = np.random.default_rng(seed)
    contents = [_Content(data) for data, _ in files]
    opened = 0
    for i in range(n):
        read = _within_memory if i % 10 == 0 else _read_all  # tracing is slow
        which = rng.choice(3, p=[0.1, 0.6, 0.3])  # the context coder of the first set is slow
        file, _ = read(_malicious(contents[which], rng), _MAX_BYTES)
        opened += file is not None
    assert 0.02 * n < opened < 0.9 * n  # the mutants reach the checks behind the check sums


def _changed(files, which, change):
    content = _Content(files[which][0])
    change(content)
    return content.build()


def _set(**values):
    def change(content):
        for key, value in values.items():
            setattr(content, key, value)
    return change


def _document(**values):
    def change(content):
        content.document |= values
    return change


def _raw(text, numbers=()):
    def change(content):
        content.raw_text, content.numbers = text, list(numbers)
    return change


@pytest.mark.parametrize(("change", "message"), [
    (_set(header_n=0), "truncated or damaged"),
    (_set(header_n=10**18), "truncated or damaged"),
    (_set(header_n=-1), "truncated or damaged"),
    (_set(header_n=1e3), "no entry"),
    (_set(version=2), "format version 2"),
    (_set(version=0), "format version 0"),
    (_set(method=7), "unknown method 7"),
    (_set(method=index.LZMA), "index is damaged"),
    (_raw(b"[" * 50_000), "not valid JSON"),
    (_raw(b"\xff\xfe{"), "not valid JSON"),
    (_raw(b"[]"), "must be a JSON object"),
    (_raw(b'{"names":["a","a"],"forms":[]}'), "'a' twice"),
    (_raw(b'{"names":[5],"forms":[]}'), "names of the index must be strings"),
    (_raw(b'{"names":["a"],"forms":[]}', [1]), "refers to form 0 of 0"),
    (_raw(b'{"names":["a","b"],"forms":[]}', [0, 0, 1, 0]), "'a': tied to a tensor that is not in the file"),
    (_raw(b'{"names":["a"],"forms":[]}', [0, 0]), "'a': tied to a tensor that is not in the file"),
    (_raw(b'{"names":["a"],"forms":[]}', [0, 9]), "'a': tied to a tensor that is not in the file"),
    (_raw(b'{"names":[1000000000,0],"parts":[],"forms":[]}'), "too short for 1000000000 names"),
    (_raw(b'{"names":[0,1000000000],"parts":[],"forms":[]}'), "too short for 0 names"),
    (_raw(b'{"names":[2,1],"parts":["x"],"forms":[]}' + b" " * 99, [1, 1]), "'x' twice"),
    (_raw(b'{"names":[1,1],"parts":["x"],"forms":[]}' + b" " * 99, [2]), "component that is not there"),
    (_raw(b'{"names":["a"],"forms":[{"dtype":"float32","shape":[0],"data":["const"]}]}', [1]), "ends 1 bytes early"),
    (_raw(b'{"names":["a"],"forms":[' + b'{"a":' * 20 + b"0" + b"}" * 20 + b"]}", [1]), "nested more than"),
    (_document(packs=[]), "coders of 0 packs"),
    (_document(metadata=[]), "'metadata' of the index must be a dict"),
    (_set(lengths=[5]), "index"),
])
def test_index_attacks(files, change, message):
    data = _changed(files, 0, change)
    file, found = _within_memory(data)
    assert file is None
    with pytest.raises(FormatError, match=message):
        raise found


def _one_entry(entry, payload=b"", lengths=(), packs=()):
    """A file with one tensor "w", entry and payload as given."""
    def change(content):
        ints = []
        content.document = {"names": ["w"], "forms": [index._split(entry, ints)], "packs": list(packs)}
        content.numbers = [1, *(index._zigzag(i) for i in ints)]
        content.payload, content.lengths = payload, list(lengths)
    return change


def _codebook(array, codes, shape, **more):
    params = {"granularity": "tensor", "group_size": None, "dtype": "float32"} | more
    chain = [["codebook", params, {"codebooks": array}]]
    return {"dtype": "float32", "shape": shape, "decoders": chain, "codes": codes}


_ONE = np.float32(1).tobytes()
_TWO_BY_FIVE = _codebook(["<f4", [1, 2, 1], "const"], ["|u1", None, "codes", [2]], [2, 5])


@pytest.mark.parametrize(("entry", "payload", "lengths", "packs", "message"), [
    ({"dtype": "float32", "shape": [1 << 40], "data": ["const"]}, _ONE, [4], [0], "more than max_bytes"),
    ({"dtype": "float32", "shape": [1 << 24, 1 << 30], "data": ["const"]}, _ONE, [4], [0], "cannot have the shape"),
    ({"dtype": "float32", "shape": [-4], "data": ["const"]}, _ONE, [4], [0], "cannot have the shape"),
    ({"dtype": "float32", "shape": [2] * 33, "data": ["const"]}, _ONE, [4], [0], "cannot have the shape"),
    ({"dtype": "float32", "shape": [0, 1 << 47], "data": ["pack"]}, b"", [], [], None),
    ({"dtype": "float32", "shape": [10**5], "data": ["bytes", [1]]}, b"\0" * 9, [9], [], "'w': .*ends early"),
    ({"dtype": "bool", "shape": [3], "data": ["pack"]}, b"\0\1\2", [3], [0], "'w': a bool array holds"),
    ({"dtype": "float32", "shape": [3], "data": ["codes", [0]]}, b"", [0], [], "'w': data: damaged record"),
    ({"dtype": "int8", "shape": [300], "data": ["mask", 3, [0], [0]]}, b"", [0, 0], [], "'w': data: damaged record"),
    ({"dtype": "float32", "shape": [300], "data": ["mask", 301, [0], [0]]}, b"", [0, 0], [], "'w': data: damaged"),
    ({"dtype": "float32", "shape": [300], "data": ["bytes", [0, 0]]}, b"", [0, 0], [], "'w': data: needs"),
    ({"dtype": "float32", "shape": [300], "data": ["bytes", [99]]}, b"", [0], [], "'w': data: needs the coders of 1"),
    ({"dtype": "float32", "shape": [300], "data": ["bytes", ["zip"]]}, b"abc", [3], [], "'w': coder of raw numbers"),
    (_codebook(["<f4", [1, 2, 50_000], "const"], ["|u1", [20, 50], "codes", [2]], [20, 50]), _ONE + b"\0", [1, 4], [0],
     r"'w': codes decode to a matrix of shape \(20, 2500000\)"),
    (_codebook(["<f4", [3, 2, 1], "const"], ["|u1", None, "codes", [2]], [2, 5], granularity="row"), b"\0" + _ONE,
     [1, 4], [0], "'w': codes of shape .* do not fit decoder 'codebook'"),
    (_codebook(["<f4", [1, 2, 1], "const"], ["|u1", None, "codes", [2]], [2, 5], dtype="int8"), b"\0" + _ONE,
     [1, 4], [0], "'w': decoder 'codebook' does not fit"),
    (_codebook(["<f4", [1, 300, 1], "const"], ["|i1", None, "codes", [2]], [2, 5]), b"\0\0" + _ONE,
     [2, 4], [0], "'w': 300 codes do not fit"),
    (_TWO_BY_FIVE | {"layout": [2, [6], None, None, []]},
     b"\0" + _ONE, [1, 4], [0], "'w': layout .* does not hold"),
    (_TWO_BY_FIVE | {"layout": [2, [5], None, [1, 1], []]},
     b"\0" + _ONE, [1, 4], [0], "'w': axes .* are no permutation"),
    (_TWO_BY_FIVE | {"layout": [2, [5], None, None, [2]]},
     b"\0" + _ONE, [1, 4], [0], "'w': zero_rows exceed"),
])
def test_entry_attacks(files, entry, payload, lengths, packs, message):
    file, found = _within_memory(_changed(files, 0, _one_entry(entry, payload, lengths, packs)), None)
    if message is None:
        assert found["w"].shape == tuple(entry["shape"])
        return
    error = found if file is None else found["w"]
    with pytest.raises(FormatError, match=message):
        raise error


def test_decompression_bombs(files):
    """An index of a few bytes may not become megabytes, nor may names and forms that it repeats."""
    long = json.dumps({"names": ["a"], "forms": [], "metadata": {"x": "0" * 10_000_000}}).encode()
    wide = json.dumps({"names": [f"{i:x}" for i in range(5_000)],
                       "forms": [{"dtype": "x" * 50_000, "shape": [], "data": ["pack"]}]}).encode()
    parts = json.dumps({"names": [20_000, 2], "parts": ["y" * 50_000], "forms": []}).encode()
    for text, numbers in ((long, []), (wide, [1] * 5_000), (parts, [1] * 60_000)):
        def change(content, text=text, numbers=numbers):
            content.raw_text, content.numbers, content.method = text, numbers, index.DEFLATE
        data = _changed(files, 0, change)
        assert len(data) < 200_000
        tracemalloc.start()
        with pytest.raises(FormatError, match="bytes"):
            SkfFile(io.BytesIO(data))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100 * len(data) + (1 << 25)


def test_constants_of_any_size_are_bounded(files):
    """By default a tiny file decodes to 32 MiB at most; what it may be is the caller's choice."""
    entry = {"dtype": "float32", "shape": [1 << 23], "data": ["const"]}
    data = _changed(files, 0, _one_entry(entry, _ONE, [4], [0]))
    assert SkfFile(io.BytesIO(data)).read_array("w").max() == 1
    entry["shape"] = [1 << 25]
    data = _changed(files, 0, _one_entry(entry, _ONE, [4], [0]))
    with pytest.raises(FormatError, match="max_bytes"):
        SkfFile(io.BytesIO(data))
    assert SkfFile(io.BytesIO(data), max_bytes=1 << 27).entry("w")["shape"] == (1 << 25,)
