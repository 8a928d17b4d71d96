"""Reader and writer of safetensors files, against the safetensors package in both directions."""
# SPDX-License-Identifier: BSD-3-Clause

import io
import json
import os
import struct
import tracemalloc

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from skfactor.codec.dtypes import DTYPES, host_dtype
from skfactor.codec.safetensors_io import SafetensorsReader, write_safetensors
from skfactor.exceptions import FormatError
from tests._data import data_dir, needs_data

from ._tensors import assert_same_bits, random_bits

_NUMPY = [d for d in DTYPES if d not in ("bfloat16", "float8_e4m3fn", "float8_e5m2")]


def _tensors(dtypes):
    rng = np.random.default_rng(0)
    return {f"{d}.ä{i}": random_bits(rng, d, shape)
            for i, shape in enumerate([(3, 5), (), (0, 4), (7,)]) for d in dtypes}


@pytest.mark.parametrize("kind", ["list", "functions", "generator"])
def test_package_reads_what_is_written(kind, tmp_path):
    tensors = _tensors(_NUMPY)
    items = [(name, t.dtype, t.shape, t.array) for name, t in tensors.items()]
    if kind == "functions":
        items = [(name, dtype, shape, lambda a=array: a) for name, dtype, shape, array in items]
    write_safetensors(tmp_path / "a.safetensors", iter(items) if kind == "generator" else items, metadata={"k": "v"})
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same_bits(loaded[name], tensor.array)
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert file.metadata() == {"k": "v"}
    with SafetensorsReader(tmp_path / "a.safetensors") as reader:
        assert reader.names == list(tensors)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_reads_what_the_package_writes(tmp_path):
    tensors = _tensors(_NUMPY)
    save_file({k: t.array for k, t in tensors.items()}, tmp_path / "a.safetensors", metadata={"a": "b"})
    with SafetensorsReader(tmp_path / "a.safetensors") as reader:
        assert reader.metadata == {"a": "b"}
        assert set(reader.names) == set(tensors)
        for name, tensor in tensors.items():
            assert reader.dtype(name) == tensor.dtype
            assert reader.shape(name) == tensor.shape
            assert reader.nbytes(name) == tensor.array.nbytes
            assert_same_bits(reader.read(name), tensor.array)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_through_torch(dtype, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    tensor = random_bits(np.random.default_rng(1), dtype, (4, 6))
    write_safetensors(tmp_path / "a.safetensors", [("w", dtype, (4, 6), tensor.array)])
    loaded = load_file(tmp_path / "a.safetensors")["w"]
    assert loaded.dtype == getattr(torch, dtype)
    assert loaded.contiguous().view(torch.uint8).numpy().tobytes() == tensor.array.tobytes()
    save_file({"w": loaded}, tmp_path / "b.safetensors")
    with SafetensorsReader(tmp_path / "b.safetensors") as reader:
        assert reader.dtype("w") == dtype
        assert_same_bits(reader.read("w"), tensor.array)


@needs_data
def test_real_networks():
    for path in sorted((data_dir() / "weights").glob("*.safetensors")):
        with SafetensorsReader(path) as reader:
            for name, expected in load_file(path).items():
                assert_same_bits(reader.read(name), expected)


def test_bounded_memory(tmp_path):
    """64 tensors of 1 MiB pass from file to file in the memory of a few."""
    one = np.arange(1 << 18, dtype=np.float32)
    tracemalloc.start()
    items = [(f"t{i}", "float32", one.shape, lambda i=i: one + i) for i in range(64)]
    write_safetensors(tmp_path / "a.safetensors", items)
    with SafetensorsReader(tmp_path / "a.safetensors") as reader:
        write_safetensors(tmp_path / "b.safetensors",
                          ((n, reader.dtype(n), reader.shape(n), reader.read(n)) for n in reader.names))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * one.nbytes
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def _file(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


_GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(("content", "message"), [
    (b"", "has 0 bytes"),
    (b"PK\x03\x04 some zip archive of torch", "not a safetensors file"),
    (struct.pack("<Q", 1 << 62) + b"{}", "header of"),
    (_file(b"{"), "header is damaged"),
    (_file(b"\xff\xfe"), "header is damaged"),
    (_file(b"[" * 100_000), "header is damaged"),
    (_file([1]), "no JSON object"),
    (_file({"__metadata__": {"a": 1}}), "must map str to str"),
    (_file({"w": 5}), "'w': damaged description"),
    (_file({"w": {**_GOOD, "extra": 1}}, bytes(8)), "'w': damaged description"),
    (_file({"w": {**_GOOD, "dtype": "F31"}}, bytes(8)), "'w': dtype 'F31' is not one of"),
    (_file({"w": {**_GOOD, "shape": [-2]}}, bytes(8)), "'w': impossible shape"),
    (_file({"w": {**_GOOD, "shape": [2.0]}}, bytes(8)), "'w': impossible shape"),
    (_file({"w": {**_GOOD, "shape": [True, 2]}}, bytes(8)), "'w': impossible shape"),
    (_file({"w": {**_GOOD, "shape": [1 << 40, 1 << 40]}}, bytes(8)), "'w': impossible shape"),
    (_file({"w": {**_GOOD, "shape": [3]}}, bytes(8)), "'w': float32 of shape \\[3\\] has 12 bytes"),
    (_file({"w": {**_GOOD, "data_offsets": [8, 0]}}, bytes(8)), "'w': impossible data_offsets"),
    (_file({"w": _GOOD}, bytes(7)), "truncated or damaged"),
    (_file({"w": _GOOD}, bytes(9)), "truncated or damaged"),
    (_file({"w": _GOOD, "v": _GOOD}, bytes(8)), "'v': its data starts at byte"),
    (_file({"w": _GOOD, "v": {**_GOOD, "data_offsets": [12, 20]}}, bytes(20)), "'v': its data starts at byte"),
    (_file(b'{"w":' + json.dumps(_GOOD).encode() + b',"w":' + json.dumps(_GOOD).encode() + b"}", bytes(8)),
     "'w' stands twice"),
])
def test_damaged_files(content, message, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=message):
        SafetensorsReader(tmp_path / "a.safetensors")


def test_bool_bytes_and_shrunk_file(tmp_path):
    header = {"w": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}
    path = tmp_path / "a.safetensors"
    path.write_bytes(_file(header, b"\x01\x02"))
    with SafetensorsReader(path) as reader, pytest.raises(FormatError, match="'w': a bool tensor"):
        reader.read("w")
    header["w"] |= {"shape": [50_000], "data_offsets": [0, 50_000]}
    path.write_bytes(_file(header, bytes(50_000)))
    with SafetensorsReader(path) as reader:
        os.truncate(path, len(_file(header)) + 49_000)
        with pytest.raises(FormatError, match="'w': the file ends 1000 bytes early"):
            reader.read("w")
        with pytest.raises(KeyError, match="no tensor 'v'"):
            reader.read("v")


def test_random_damage_gives_a_format_error_or_the_original(tmp_path):
    tensors = _tensors(["float32", "bool", "int64"])
    write_safetensors(tmp_path / "a", [(n, t.dtype, t.shape, t.array) for n, t in tensors.items()])
    good = (tmp_path / "a").read_bytes()
    n_header = 8 + int.from_bytes(good[:8], "little")
    rng = np.random.default_rng(0)
    for _ in range(2000):
        bad = bytearray(good)
        bad[rng.integers(n_header)] ^= 1 << rng.integers(8)
        try:
            reader = SafetensorsReader(io.BytesIO(bad))
            for name in reader.names:
                assert reader.read(name).dtype == host_dtype(reader.dtype(name))
        except FormatError:
            pass


@pytest.mark.parametrize("lazy", [False, True])
def test_failed_writing_leaves_the_old_file(lazy, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    good = ("w", "float32", (2,), np.zeros(2, dtype=np.float32))
    for bad, message in [
        (("v", "float32", (3,), np.zeros(2, dtype=np.float32)), "expected float32 of shape"),
        (("v", "float64", (2,), np.zeros(2, dtype=np.float32)), "expected float64"),
        (("v", "float9", (2,), np.zeros(2, dtype=np.float32)), "dtype must be one of"),
        (good, "'w' is given twice"),
        (("__metadata__", *good[1:]), "name of a tensor"),
    ]:
        items = [good, bad]
        with pytest.raises(ValueError, match=message):
            write_safetensors(path, iter(items) if lazy else items)
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["a.safetensors"]
    with pytest.raises(ValueError, match="must map str to str"):
        write_safetensors(path, [good], metadata={"a": 1})
