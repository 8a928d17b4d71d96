"""File to file: the same tensors as in memory, streaming, atomic, and without torch."""
# SPDX-License-Identifier: BSD-3-Clause

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import skfactor
from skfactor import FormatError, KMeansWeightSharer, LayerError
from skfactor.bridge.files import compress_file, decompress_file
from skfactor.codec.container import SkfFile
from tests._data import data_dir, needs_data
from tests._nets import SmallCNN

SHARE = KMeansWeightSharer(n_clusters=4)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    state = SmallCNN().state_dict() | {
        "half": torch.randn(5, 6).half(), "bf16": torch.randn(5, 6).bfloat16(), "double": torch.randn(5, 6).double(),
        "empty": torch.empty(0, 4), "ints": torch.arange(12).reshape(3, 4), "scalar": torch.tensor(1.5),
    }
    save_file(state, tmp_path / "in.safetensors", metadata={"format": "pt"})
    return tmp_path / "in.safetensors"


def test_there_and_back_is_what_compress_gives(source, tmp_path):
    rules = {"conv2": None, "bn1.weight": KMeansWeightSharer(n_clusters=1), "*": SHARE}
    done = skfactor.compress_file(source, tmp_path / "out.skf", rules, progress=False)
    in_memory = skfactor.compress(load_file(source), rules, progress=False)
    assert same(skfactor.load(tmp_path / "out.skf"), in_memory.state_dict())
    from_path = skfactor.compress(source, rules, progress=False)
    assert same(from_path.state_dict(), in_memory.state_dict())
    assert from_path.skipped == in_memory.skipped == done.skipped
    assert done.path == tmp_path / "out.skf"
    before = {r.name: r for r in in_memory.records}
    assert [r.name for r in done.records] == SkfFile(tmp_path / "out.skf").names
    for record in done.records:
        assert {**record.to_dict(), "seconds": 0} == {**before[record.name].to_dict(), "seconds": 0}
    skfactor.decompress_file(tmp_path / "out.skf", tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), in_memory.state_dict())
    with skfactor.bridge.files.SafetensorsReader(tmp_path / "back.safetensors") as reader:
        assert reader.metadata == {"format": "pt"}


def test_workers_do_not_change_a_byte(source, tmp_path):
    for n_jobs in (None, 2):
        compress_file(source, tmp_path / f"{n_jobs}.skf", SHARE, n_jobs=n_jobs, progress=False)
    assert (tmp_path / "None.skf").read_bytes() == (tmp_path / "2.skf").read_bytes()


def test_ties_are_written_out(tmp_path):
    w = torch.randn(4, 4)
    skfactor.compress({"a": w, "b": w}, SHARE, progress=False).save(tmp_path / "tied.skf")
    decompress_file(tmp_path / "tied.skf", tmp_path / "out.safetensors")
    state = load_file(tmp_path / "out.safetensors")
    assert torch.equal(state["a"], state["b"])
    assert len(state["a"].unique()) <= 4


def test_no_torch_needed(source, tmp_path):
    code = (
        "import sys\nimport skfactor\n"
        "skfactor.compress_file(sys.argv[1], sys.argv[2], skfactor.KMeansWeightSharer(4))\n"
        "skfactor.decompress_file(sys.argv[2], sys.argv[3])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, source, tmp_path / "a.skf", tmp_path / "b.safetensors"],
                          capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[2])
    assert done.stdout.strip() == "False"
    assert done.stderr == ""  # and no progress bar, since this is no terminal


def test_failure_leaves_the_old_file(source, tmp_path):
    state = load_file(source)
    state["linear.weight"][1, 2] = float("nan")
    save_file(state, tmp_path / "bad.safetensors")
    out = tmp_path / "out.skf"
    out.write_bytes(b"old")
    with pytest.raises(LayerError, match=r"tensor 'linear.weight' \(tensor 5x12\) with KMeans.*at index \(1, 2\)"):
        compress_file(tmp_path / "bad.safetensors", out, SHARE, progress=False)
    with pytest.raises(ValueError, match="did you mean 'conv"):
        compress_file(source, out, {"convv": SHARE}, progress=False)
    with pytest.raises(ValueError, match="by module type need the model itself"):
        compress_file(source, out, {"Conv2d": SHARE}, progress=False)
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.safetensors", "in.safetensors", "out.skf"]


def test_foreign_and_missing_files(source, tmp_path):
    (tmp_path / "text").write_text("this is no safetensors file, however long it may be")
    for call in (lambda p: compress_file(p, tmp_path / "o", SHARE), lambda p: skfactor.compress(p, SHARE),
                 skfactor.load, lambda p: decompress_file(p, tmp_path / "o")):
        with pytest.raises(FormatError):
            call(tmp_path / "text")
        with pytest.raises(FileNotFoundError):
            call(tmp_path / "nowhere")
    with pytest.raises(FormatError):
        skfactor.load(source)
    assert not (tmp_path / "o").exists()


@needs_data
def test_real_network_file_to_file(tmp_path):
    source = data_dir() / "weights" / "cifar10_resnet20.safetensors"
    compress_file(source, tmp_path / "small.skf", KMeansWeightSharer(n_clusters=16), progress=False)
    before, after = load_file(source), skfactor.load(tmp_path / "small.skf")
    assert before.keys() == after.keys()
    for name, value in before.items():
        if value.dim() >= 2:
            distinct = np.unique(after[name].numpy())
            assert len(distinct) <= 16
            # nearest centroid: no other value of the codebook lies closer
            gap = np.abs(value.numpy().ravel()[:, None] - distinct).min(axis=1)
            np.testing.assert_allclose((value - after[name]).abs().numpy().ravel(), gap, atol=1e-6)
        else:
            assert torch.equal(value, after[name])
    assert (tmp_path / "small.skf").stat().st_size < source.stat().st_size / 5
