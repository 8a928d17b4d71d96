"""The index of a file: names and entries of all tensors in few bytes, and a bounded, strict way back.

Entries of one network differ in their integers (shapes, offsets) and hardly in anything else. So an entry is taken
apart into its form, the JSON text with every integer replaced by 0, and its integers. Each form is stored once; the
integers are stored as one byte column per integer of a form, and everything is compressed together.
"""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import json
import lzma
import struct
import zlib
from itertools import pairwise
from typing import Any, NamedTuple

from skfactor.exceptions import FormatError

__all__ = ["TAIL_BYTES", "Index", "Reader", "decode_index", "encode_index", "encode_region", "varint"]

TAIL_BYTES = 1 << 10  # streams below are gathered behind the others under one check sum
MAX_DEPTH = 12
MAX_INT = (1 << 62) - 1
STORED, DEFLATE, LZMA = range(3)
_LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0,
                  "dict_size": 1 << 20}]
#: Text that deflate may refer back to; part of format version 1 and never to be changed. Likely text stands last.
DICTIONARY = (
    b'"float8_e4m3fn""float8_e5m2""complex64""uint64""uint32""uint16""int16""int8""uint8""int32""bool""bfloat16"'
    b'"float64""<u8""<u4""<u2""<i2""|i1""|b1""<f2""<i8""<i4","line","<f8"],"grid",0,"<f8"],"ints",0,0,[0,0,0,0]'
    b'"granularity":"row""column""group","group_size":0,"dtype":"float64"},"coder":"huffman","constant","packed",'
    b'"context","sparse","layout":[0,[0,0,0],[0,0,0,0,0],[0,0,0,0,0],[]],["identity",{},{}],"metadata":{"format":"pt"},'
    b'".embed_tokens.weight","transformer.h.0.attn.c_attn.weight","model.layers.0.self_attn.q_proj.weight",'
    b'.k_proj.v_proj.o_proj.out_proj.mlp.gate_proj.up_proj.down_proj.fc1.fc2.input_layernorm.post_attention_layernorm'
    b'encoder.decoder.embeddings.classifier.features.0.downsample.0.head.norm1.norm2.ln_1.ln_2.wte.wpe.lm_head.'
    b'"layer1.0.bn1.running_mean","layer1.0.bn1.running_var","layer1.0.bn1.num_batches_tracked","layer1.0.bn2.weight",'
    b'"layer2.1.conv2.weight","linear.weight","linear.bias","fc1.weight","fc1.bias","fc2.weight","fc2.bias","bn1.bias",'
    b'{"dtype":"int64","shape":[],"data":["pack"]},{"dtype":"float16","shape":[0],"data":["const"]},'
    b'{"dtype":"float32","shape":[0],"data":["const"]},{"dtype":"float32","shape":[0,0,0],"data":["bytes",[0]]},'
    b'{"dtype":"float32","shape":[0],"data":["mask",0,[0],[0]]},'
    b'{"dtype":"float32","shape":[0,0,0,0],"decoders":[["codebook",{"granularity":"tensor","group_size":null,'
    b'"dtype":"float32"},{"codebooks":["<f4",[0,0,0],"grid",0,"<f4"]}]],"codes":["<i4",null,"codes",[0,0]]},'
    b'{"names":["ip1.bias","ip1.weight","conv1.weight","conv1.bias","conv1.weight","conv2.bias","conv2.weight",'
    b'"ip1.bias","ip1.weight","ip2.bias","ip2.weight","ip3.bias","ip3.weight"],"forms":['
    b'{"dtype":"float32","shape":[0],"data":["pack"]},'
    b'{"dtype":"float32","shape":[0,0,0,0],"decoders":[["codebook",{"granularity":"tensor","group_size":null,'
    b'"dtype":"float32"},{"codebooks":["<f4",[0,0,0],"grid",0,"<f4"]}]],"codes":["|u1",null,"codes",[0]]},'
    b'{"dtype":"float32","shape":[0,0],"decoders":[["codebook",{"granularity":"tensor","group_size":null,'
    b'"dtype":"float32"},{"codebooks":["<f4",[0,0,0],"pack"]}]],"codes":["|u1",null,"codes",[0]]}],"packs":[0,1]}'
    b'"packs":[1]}'
)


class Index(NamedTuple):
    """Names and entries of all tensors in the order of the model; a tied name has the entry None."""

    names: list[str]
    entries: list[dict[str, Any] | None]
    ties: dict[str, str]
    packs: list[int | str]
    metadata: dict[str, Any]


def varint(value: int) -> bytes:
    """Non-negative integer in base 128, lowest digit first, high bit set on all digits but the last.

    >>> varint(300)
    b'\\xac\\x02'
    """
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


class Reader:
    """Reads bytes and varints off a buffer; FormatError at its end."""

    def __init__(self, data: bytes):
        self.data, self.pos = data, 0

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.pos:
            raise FormatError(f"the index ends {n - len(self.data) + self.pos} bytes early")
        self.pos += n
        return self.data[self.pos - n : self.pos]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise FormatError("the index holds an integer of more than 63 bits")

    def end(self) -> None:
        if self.pos != len(self.data):
            raise FormatError(f"the index has {len(self.data) - self.pos} bytes too many")


def _zigzag(value: int) -> int:
    return 2 * value if value >= 0 else -2 * value - 1


def _split(value, ints: list[int], depth: int = 0):
    """Replace every integer of a JSON value by 0 and append it to `ints`."""
    if depth > MAX_DEPTH:
        raise ValueError(f"parameters of a decoder may be nested {MAX_DEPTH} deep, got more")
    if type(value) is int:
        if abs(value) > MAX_INT >> 1:
            raise ValueError(f"integers in a file must be below 2**61, got {value}")
        ints.append(value)
        return 0
    if isinstance(value, dict):
        return {k: _split(v, ints, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_split(v, ints, depth + 1) for v in value]
    return value


def _join(form, ints):
    """Inverse of `_split`; `ints` is an iterator."""
    if type(form) is int:
        return next(ints)
    if isinstance(form, dict):
        return {k: _join(v, ints) for k, v in form.items()}
    if isinstance(form, list):
        return [_join(v, ints) for v in form]
    return form


def _count(form, depth: int = 0) -> int:
    """Number of integers of a form; FormatError when it nests too deep."""
    if depth > MAX_DEPTH:
        raise FormatError(f"the index is nested more than {MAX_DEPTH} deep")
    if type(form) is int:
        return 1
    if isinstance(form, dict):
        return sum(_count(v, depth + 1) for v in form.values())
    return sum(_count(v, depth + 1) for v in form) if isinstance(form, list) else 0


def _json_bytes(value) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8 form
        return json.dumps(value, separators=(",", ":")).encode()


def _compress(data: bytes) -> tuple[int, bytes]:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=DICTIONARY)
    candidates = [(STORED, data), (DEFLATE, deflate.compress(data) + deflate.flush())]
    if len(data) > 2000:
        candidates.append((LZMA, lzma.compress(data, format=lzma.FORMAT_RAW, filters=_LZMA_FILTERS)))
    return min(candidates, key=lambda kind_data: len(kind_data[1]))


def _decompress(method: int, data: bytes, limit: int) -> bytes:
    if method == STORED:
        return data
    if method == DEFLATE:
        unzip = zlib.decompressobj(-15, zdict=DICTIONARY)
    elif method == LZMA:
        unzip = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=_LZMA_FILTERS)
    else:
        raise FormatError(f"the index is compressed by unknown method {method}")
    try:
        out = unzip.decompress(data, limit)
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        raise FormatError(f"the index is damaged: {error}") from None
    if not unzip.eof or unzip.unused_data:
        raise FormatError(f"the index is damaged, or holds more than {limit} bytes")
    return out


def _name_columns(names: list[str]) -> tuple[dict[str, Any], bytes]:
    """Names as a table of their dotted components: a list of distinct ones and, column by column from the right, ids.

    Names of deep networks repeat in periods, which shows in columns. Id 0 stands left of a shorter name.
    """
    parts = [name.split(".")[::-1] for name in names]
    depth = max(map(len, parts), default=0)
    ids: dict[str, int] = {}
    for row in parts:
        for part in reversed(row):
            ids.setdefault(part, len(ids) + 1)
    columns = b"".join(varint(ids[row[c]] if c < len(row) else 0) for c in range(depth) for row in parts)
    return {"parts": list(ids), "names": [len(names), depth]}, columns


def _read_names(document: dict[str, Any], reader: Reader, limit: int) -> list[str]:
    """The names of either form; FormatError if they are no distinct strings or take more than `limit` bytes."""
    names = document["names"]
    if "parts" in document:
        parts = document["parts"]
        if not (isinstance(names, list) and len(names) == 2 and all(type(n) is int and n >= 0 for n in names)
                and isinstance(parts, list) and all(isinstance(part, str) for part in parts)):
            raise FormatError("the table of names is damaged")
        n, depth = names
        if max(n, 1) * max(depth, 1) > len(reader.data):
            raise FormatError(f"the index is too short for {n} names of {depth} components")
        columns = [[reader.varint() for _ in range(n)] for _ in range(depth)]
        if max((i for column in columns for i in column), default=0) > len(parts):
            raise FormatError("the table of names refers to a component that is not there")
        sizes = [0] + [4 * len(part) + 1 for part in parts]
        if sum(sizes[i] for column in columns for i in column) > limit:
            raise FormatError(f"names of the index take more than {limit} bytes")
        names = [".".join(parts[c[row] - 1] for c in reversed(columns) if c[row]) for row in range(n)]
    elif not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise FormatError("names of the index must be strings")
    if len(set(names)) != len(names):
        raise FormatError(f"the index names {next(a for a, b in pairwise(sorted(names)) if a == b)!r} twice")
    return names


def encode_index(index: Index) -> tuple[int, bytes, int]:
    """Return the method of compression, the compressed bytes, and the work of reading them (see `decode_index`)."""
    forms: dict[str, int] = {}
    columns: list[list[list[int]]] = []
    which, targets = [], []
    position = {name: i for i, name in enumerate(index.names)}
    for name, entry in zip(index.names, index.entries):
        if entry is None:
            which.append(-1)
            targets.append(position[index.ties[name]])
            continue
        ints: list[int] = []
        text = _json_bytes(_split(entry, ints)).decode()
        number = forms.setdefault(text, len(forms))
        if number == len(columns):
            columns.append([])
        columns[number].append(ints)
        which.append(number)
    numbers = b"".join(varint(number + 1) for number in which) + b"".join(varint(target) for target in targets)
    for rows in columns:
        numbers += b"".join(varint(_zigzag(value)) for column in zip(*rows) for value in column)
    rest: dict[str, Any] = {"forms": [json.loads(text) for text in forms]}
    rest |= {"metadata": index.metadata} if index.metadata else {}
    rest |= {"packs": index.packs} if index.packs else {}
    candidates, work = [], 0
    for names, table in (({"names": index.names}, b""), _name_columns(index.names)):
        text = _json_bytes(names | rest)
        data = varint(len(text)) + text + table + numbers
        candidates.append(_compress(data))
        work = max(work, len(data))
    work += sum(4 * len(name) + 1 + name.count(".") for name in index.names)
    sizes = [len(form.encode()) for form in forms]
    return *min(candidates, key=lambda c: len(c[1])), work + sum(sizes[number] for number in which if number >= 0)


def encode_region(index: Index, lengths: list[int], checksums: list[int], tail_checksum: int) -> tuple[int, bytes, int]:
    """The index region of a file: compressed index, lengths of all streams, check sums of the large ones.

    Returns the method of compression, the region, and the work of reading it.
    """
    method, packed, work = encode_index(index)
    table = b"".join(map(varint, lengths)) + struct.pack(f"<{len(checksums)}I", *checksums)
    if any(0 < n < TAIL_BYTES for n in lengths):
        table += struct.pack("<I", tail_checksum)
    return method, varint(len(packed)) + packed + table, work


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        document = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the index is not valid JSON: {error}") from None
    expected = {"names": list, "forms": list, "metadata": dict, "packs": list}
    if not isinstance(document, dict) or not document.keys() <= {*expected, "parts"} or "names" not in document:
        raise FormatError("the index must be a JSON object with names, parts, forms, metadata and packs")
    document = {key: kind() for key, kind in expected.items()} | document
    for key, kind in expected.items():
        if not isinstance(document[key], kind):
            raise FormatError(f"{key!r} of the index must be a {kind.__name__}, got {type(document[key]).__name__}")
    if not all(isinstance(form, dict) for form in document["forms"]):
        raise FormatError("forms of the index must be objects")
    return document


def decode_index(method: int, data: bytes, limit: int) -> Index:
    """Inverse of `encode_index`.

    `limit` bounds the work: bytes of the decompressed index plus bytes of names and forms that its entries repeat.
    """
    data = _decompress(method, data, limit)
    reader = Reader(data)
    document = _parsed(reader.take(reader.varint()))
    forms = document["forms"]
    names = _read_names(document, reader, limit - len(data))
    which = [reader.varint() - 1 for _ in names]
    if max(which, default=-1) >= len(forms):
        raise FormatError(f"the index refers to form {max(which)} of {len(forms)}")
    sizes = [len(_json_bytes(form)) for form in forms]
    if len(data) + sum(sizes[number] for number in which if number >= 0) > limit:
        raise FormatError(f"entries of the index take more than {limit} bytes")
    ties = {}
    for name, number in zip(names, which):
        if number < 0:
            target = reader.varint()
            if target >= len(names) or which[target] < 0:
                raise FormatError(f"tensor {name!r}: tied to a tensor that is not in the file")
            ties[name] = names[target]
    entries: list[dict[str, Any] | None] = [None] * len(names)
    members_of: list[list[int]] = [[] for _ in forms]
    for i, number in enumerate(which):
        if number >= 0:
            members_of[number].append(i)
    for form, members in zip(forms, members_of):
        columns = [[reader.varint() for _ in members] for _ in range(_count(form))]
        for row, i in enumerate(members):
            entries[i] = _join(form, ((c[row] >> 1) ^ -(c[row] & 1) for c in columns))
    reader.end()
    return Index(names, entries, ties, document["packs"], document["metadata"])
