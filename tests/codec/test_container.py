"""The .skf file: contents, sizes, atomicity, memory."""
# SPDX-License-Identifier: BSD-3-Clause

import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from skfactor.codec import container, streams
from skfactor.codec.container import SkfFile, SkfWriter
from skfactor.codec.safetensors_io import SafetensorsReader
from skfactor.codec.streams import encode_tensor
from skfactor.codec.tensor import RawTensor
from skfactor.exceptions import FormatError
from tests._data import data_dir, needs_data

from ._tensors import assert_same_bits, assert_same_tensor, compressed_cases, raw_cases, shared

_RNG = np.random.default_rng(0)
_CASES = {**raw_cases(_RNG), **compressed_cases(_RNG)}
_UNICODE = ["", ".", "a..b", "x\ny", '"\\', "weight.größe.重み.🏋", "\ud800", "__metadata__", "skf1", "null", "0" * 5000]


def write(path, tensors, ties=(), metadata=None):
    with SkfWriter(path, metadata=metadata) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor)
        for name, other in ties:
            file.tie(name, other)
    return file


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.skf"


def test_everything_in_one_file(path):
    writer = write(path, _CASES, ties=[("t1", "conv"), ("t2", "t1"), ("t3", "count")], metadata={"a": [1, None, "ä"]})
    with SkfFile(path) as file:
        assert file.names == [*_CASES, "t1", "t2", "t3"] == list(file)
        assert file.ties == {"t1": "conv", "t2": "conv", "t3": "count"}
        assert file.metadata == {"a": [1, None, "ä"]}
        for name in np.random.default_rng(0).permutation(list(_CASES)):
            assert_same_tensor(file.read(name), _CASES[name])
            assert_same_bits(file.read_array(name), _CASES[name].to_array())
        for name, other in file.ties.items():
            assert_same_tensor(file.read(name), _CASES[other])
            assert file.entry(name)["tied_to"] == other
        assert file.overhead + sum(map(file.nbytes, file.names)) == os.path.getsize(path) == file.nbytes_total
        assert all(writer.nbytes_of(name) == file.nbytes(name) for name in file.names)


def test_any_safetensors_reader_opens_it(path):
    write(path, _CASES)
    assert list(load_file(path)) == ["skf1"]
    with SafetensorsReader(path) as reader:
        assert reader.dtype("skf1") == "uint8"


@pytest.mark.parametrize("n", [0, 1, 500, 99_000, 99_700, 99_720, 99_750, 99_790, 99_800, 100_000, 300_000])
def test_header_fits_at_every_size(n, path):
    """The header is 64 bytes in small files and 80 in others; noise makes the payload's size known."""
    noise = np.random.default_rng(n).integers(0, 256, n, dtype=np.uint8)
    write(path, {"x": RawTensor(noise, "uint8")})
    width = int.from_bytes(path.read_bytes()[:8], "little")
    blob = load_file(path)["skf1"]
    assert width == (64 if len(blob) <= 99_999 else 80)
    assert_same_bits(SkfFile(path).read("x").array, noise)


def test_empty_file(path):
    write(path, {})
    assert SkfFile(path).names == []
    assert os.path.getsize(path) == SkfFile(path).overhead < 110


def test_overhead_is_small(path):
    """A small network costs less than 100 bytes and 20 bytes per tensor over its streams."""
    rng = np.random.default_rng(0)
    tensors = {"conv1.weight": shared(rng, (20, 1, 5, 5), 9, uniform=True),
               "conv2.weight": shared(rng, (50, 20, 5, 5), 9, uniform=True),
               "ip1.weight": shared(rng, (50, 800), 9, uniform=True),
               "ip1.bias": RawTensor(rng.standard_normal(500).astype(np.float32), "float32"),
               "ip2.weight": shared(rng, (10, 500), 9, uniform=True)}
    write(path, tensors)
    file = SkfFile(path)
    assert file.nbytes_total - sum(file._lengths) < 100 + 20 * len(tensors)


def test_unicode_names(path):
    tensors = {name: RawTensor(np.array([i]), "int64") for i, name in enumerate(_UNICODE)}
    write(path, tensors, ties=[("\ud801", "")])
    file = SkfFile(path)
    assert file.names == [*_UNICODE, "\ud801"]
    assert [int(file.read_array(name)[0]) for name in _UNICODE] == list(range(len(_UNICODE)))


def test_same_input_same_bytes(tmp_path):
    for name in "ab":
        write(tmp_path / name, _CASES, metadata={"b": 1, "a": 2})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_read_and_written_again_is_the_same_file(tmp_path):
    write(tmp_path / "a", _CASES)
    with SkfFile(tmp_path / "a") as file:
        write(tmp_path / "b", {name: file.read(name) for name in file.names})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_small_arrays_share_streams(path):
    rng = np.random.default_rng(0)
    norms = {f"bn{i}.{part}": RawTensor(rng.random(64).astype(np.float32), "float32")
             for i in range(20) for part in ("weight", "bias")}
    write(path, norms)
    assert len(SkfFile(path)._lengths) == 1
    alone = sum(encode_tensor(t).nbytes for t in norms.values())
    assert os.path.getsize(path) < 0.8 * alone


def test_packs_close_when_full(path, monkeypatch):
    monkeypatch.setattr(streams, "PACK_BYTES", 3000)
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": RawTensor(rng.standard_normal(100).astype(np.float32 if i % 3 else np.float64),
                                  "float32" if i % 3 else "float64") for i in range(60)}
    tensors["codes"] = shared(rng, (8, 40), 16)
    write(path, tensors)
    file = SkfFile(path)
    assert len(file._lengths) > 10
    for name in reversed(file.names):
        assert_same_tensor(file.read(name), tensors[name])
    assert file.overhead + sum(map(file.nbytes, file.names)) == os.path.getsize(path)


def test_entry_describes_without_reading(path):
    write(path, _CASES)
    file = SkfFile(path)
    conv = file.entry("conv")
    assert conv["kind"] == "compressed"
    assert conv["shape"] == (16, 8, 3, 3)
    assert conv["decoders"] == ["codebook"]
    assert conv["n_clusters"] == 16
    assert conv["params"][0]["granularity"] == "tensor"
    assert conv["arrays"][0]["codebooks"] == ("<f4", (1, 16, 1))
    assert conv["nbytes"] == file.nbytes("conv")
    assert file.entry("huffman")["coders"][0] == "huffman"
    assert file.entry("bits.bool.5")["kind"] == "raw"
    assert file.entry("chain")["decoders"] == ["identity", "codebook"]
    with pytest.raises(KeyError, match="no tensor 'nonesuch'"):
        file.entry("nonesuch")


def test_wrong_use(path):
    one = RawTensor(np.zeros(3), "float64")
    with SkfWriter(path) as file:
        file.add("a", one)
        with pytest.raises(ValueError, match="'a' is already in the file"):
            file.add("a", one)
        with pytest.raises(ValueError, match="'b' cannot be tied to 'c', which is not in the file"):
            file.tie("b", "c")
        with pytest.raises(TypeError, match="name must be a str, got int"):
            file.add(5, one)
        with pytest.raises(TypeError, match="CompressedTensor or a RawTensor, got ndarray"):
            file.add("d", np.zeros(3))
        with pytest.raises(ValueError, match="needs a closed file"):
            file.nbytes_of("a")
    assert SkfFile(path).names == ["a"]
    file.close()
    with pytest.raises(ValueError, match="the writer is closed"):
        file.add("e", one)
    for metadata in ({1: 2}, {"a": {1}}, [1], {"a": float("nan")}):
        with pytest.raises(ValueError, match="metadata must"):
            SkfWriter(path, metadata=metadata)
    with pytest.raises(IsADirectoryError):
        SkfWriter(path.parent)
    with pytest.raises(FileNotFoundError):
        SkfWriter(path.parent / "none" / "a.skf")


def test_an_exception_leaves_the_old_file(path):
    path.write_bytes(b"old")
    with pytest.raises(TypeError, match="got NoneType"), SkfWriter(path) as file:
        file.add("a", None)
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["a.skf"]


@pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")
def test_permissions_and_links_stay(tmp_path):
    umask = os.umask(0o027)
    try:
        write(tmp_path / "new", {})
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "new").chmod(0o604)
    (tmp_path / "link").symlink_to("new")
    write(tmp_path / "link", {"a": _CASES["count"]})
    assert (tmp_path / "link").is_symlink()
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604
    assert SkfFile(tmp_path / "new").names == ["a"]


def test_limit_of_decoded_bytes(path, monkeypatch):
    """Files that decode to very much are padded so that their own reader takes them; others are refused."""
    zeros = RawTensor(np.zeros(100_000, dtype=np.float32), "float32")
    write(path, {"a": zeros})
    small = os.path.getsize(path)
    with pytest.raises(FormatError, match="more than max_bytes=399999"):
        SkfFile(path, max_bytes=399_999)
    assert SkfFile(path, max_bytes=400_000).names == ["a"]
    monkeypatch.setattr(container, "_FREE", 1000)
    monkeypatch.setattr(container, "_RATIO", 100)
    with pytest.raises(FormatError, match=r"decode to 400000 bytes, more than max_bytes=\d+ of a file of"):
        SkfFile(path)
    assert SkfFile(path, max_bytes=1 << 20).nbytes_total == small
    write(path, {"a": zeros})
    assert 400_000 <= 1000 + 100 * os.path.getsize(path) < 401_000
    assert_same_tensor(SkfFile(path).read("a"), zeros)
    assert SkfFile(path).overhead + SkfFile(path).nbytes("a") == os.path.getsize(path)


def test_damage_is_named(path):
    write(path, {"first": _CASES["normal"], "second": _CASES["linear.double"]})
    good = path.read_bytes()
    place = 100 + SkfFile(path)._where[0][0]
    path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    file = SkfFile(path)
    with pytest.raises(FormatError, match="tensor 'first': its bytes are damaged"):
        file.read("first")
    assert_same_tensor(file.read("second"), _CASES["linear.double"])


@pytest.mark.parametrize(("content", "message"), [
    (b"", "not a .skf file"), (b"PK\x03\x04" + bytes(200), "not a .skf file"), (bytes(100), "not a .skf file")])
def test_foreign_files(content, message, path):
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message):
        SkfFile(path)


def test_foreign_safetensors_and_newer_version(path, monkeypatch):
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(3)}, path)
    with pytest.raises(FormatError, match="no entry 'skf1'"):
        SkfFile(path)
    monkeypatch.setattr(container, "FORMAT_VERSION", 2)
    write(path, {})
    monkeypatch.undo()
    with pytest.raises(FormatError, match="format version 2, this version of skfactor reads 1"):
        SkfFile(path)


def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """12 tensors of 2 MiB, written and read, in the memory of a few (numpy reports to tracemalloc)."""
    rng = np.random.default_rng(0)
    one = rng.standard_normal(1 << 19).astype(np.float32)
    write(tmp_path / "warm", {"a": RawTensor(one, "float32")})
    tracemalloc.start()
    with SkfWriter(tmp_path / "a") as file:
        for i in range(12):
            file.add(f"t{i}", RawTensor(np.roll(one, i), "float32"))
    written = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    with SkfFile(tmp_path / "a") as file:
        for name in file.names:
            file.read_array(name)
    read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert os.path.getsize(tmp_path / "a") > 8 * one.nbytes
    assert written < 4 * one.nbytes
    assert read < 4 * one.nbytes


@needs_data
@pytest.mark.parametrize("name", ["cifar10_resnet20", "mnist_lenet5_original"])
def test_real_network_bit_for_bit(name, path):
    with SafetensorsReader(data_dir() / "weights" / f"{name}.safetensors") as reader:
        write(path, {n: RawTensor(reader.read(n), reader.dtype(n)) for n in reader.names})
        with SkfFile(path) as file:
            for n in reader.names:
                assert_same_bits(file.read_array(n), reader.read(n))
            assert file.nbytes_total < 0.86 * sum(map(reader.nbytes, reader.names))


_WRITER = """
import sys
import numpy as np
from skfactor.codec.container import SkfWriter
from skfactor.codec.tensor import RawTensor
print("ready", flush=True)
for run in range(10_000):
    with SkfWriter(sys.argv[1]) as file:
        for i in range(4):
            data = np.random.default_rng([run, i]).integers(0, 256, 40_000, dtype=np.uint8)
            file.add(f"t{i}", RawTensor(data, "uint8"))
        file.add("run", RawTensor(np.array(run), "int64"))
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("n_kills", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_a_kill_leaves_a_whole_file(n_kills, path):
    """A process rewrites one file without pause and is killed at random: what is there is one complete version."""
    rng = np.random.default_rng(n_kills)
    write(path, {"run": RawTensor(np.array(-1), "int64")})
    root = Path(container.__file__).parents[2]
    for _ in range(n_kills):
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(_WRITER), path], stdout=subprocess.PIPE,
                                   env={**os.environ, "PYTHONPATH": str(root)})
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with SkfFile(path) as file:
            run = int(file.read_array("run"))
            for i in range(4 if run >= 0 else 0):
                expected = np.random.default_rng([run, i]).integers(0, 256, 40_000, dtype=np.uint8)
                assert_same_bits(file.read_array(f"t{i}"), expected)
