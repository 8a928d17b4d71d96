"""Reports and comparisons: figures that sum to the file, errors recomputed from the tensors."""
# SPDX-License-Identifier: BSD-3-Clause

import builtins
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import skfactor
from skfactor import FormatError, KMeansWeightSharer
from skfactor.codec.container import SkfWriter
from skfactor.codec.decoders import CodebookDecoder, IdentityDecoder
from skfactor.codec.dtypes import from_float
from skfactor.codec.tensor import CompressedTensor, RawTensor
from skfactor.estimators import compressed_tensor
from skfactor.report import Report, compare


@pytest.fixture
def originals():
    rng = np.random.default_rng(0)
    return {
        "conv": rng.laplace(size=(8, 4, 3, 3)).astype(np.float32),
        "fc": rng.normal(size=(16, 40)).astype(np.float32),
        "rows": rng.normal(size=(5, 24)).astype(np.float16),
        "bias": rng.normal(size=16).astype(np.float32),
        "steps": np.array(3, dtype=np.int64),
        "empty": np.zeros((0, 4), dtype=np.float32),
    }


@pytest.fixture
def sharers():
    return {
        "conv": KMeansWeightSharer(n_clusters=6),
        "fc": KMeansWeightSharer(n_clusters=5, vector_size=4, random_state=0),
        "rows": KMeansWeightSharer(n_clusters=3, granularity="row"),
    }


@pytest.fixture
def stored(originals, sharers):
    tensors = {}
    for name, array in originals.items():
        dtype = array.dtype.name
        if name in sharers:
            X = array.reshape(len(array), -1)
            tensors[name] = compressed_tensor(sharers[name].fit(X), X, shape=array.shape, dtype=dtype)
        else:
            tensors[name] = RawTensor(array, dtype)
    return tensors


@pytest.fixture
def dense(tmp_path, originals):
    path = tmp_path / "dense.safetensors"
    save_file(originals, path)
    return path


@pytest.fixture
def small(tmp_path, stored):
    path = tmp_path / "small.skf"
    with SkfWriter(path, metadata={"note": "x" * 50}) as file:
        for name, tensor in stored.items():
            file.add(name, tensor)
        file.tie("head", "fc")
    return path


def flat64(array):
    return np.asarray(array, dtype=np.float64).ravel()


@pytest.mark.parametrize("which", ["dense", "small"])
def test_bytes_sum_to_the_file(which, request):
    path = request.getfixturevalue(which)
    report = Report.from_file(path)
    assert sum(row.bytes_after for row in report.rows) + report.overhead == path.stat().st_size
    assert report.total["bytes_after"] == path.stat().st_size
    assert report.overhead > 0
    assert report.source == "file"
    frame = report.to_frame()
    assert frame["bytes_after"].sum() == path.stat().st_size
    assert frame["share"].sum() == pytest.approx(1)


def test_rows_hold_the_facts_of_the_tensors(small, dense, originals, stored, sharers):
    report = Report.from_file(small, original=dense)
    assert [row.name for row in report.rows] == list(originals)
    for row in report.rows:
        W = originals[row.name]
        assert (row.shape, row.dtype, row.parameters, row.bytes_before) == (W.shape, W.dtype.name, W.size, W.nbytes)
        assert row.bits_per_weight == (8 * row.bytes_after / W.size if W.size else None)
        assert row.ratio == (W.nbytes / row.bytes_after if row.bytes_after else None)
        expected = np.linalg.norm(flat64(W) - flat64(stored[row.name].to_array())) / (np.linalg.norm(flat64(W)) or 1)
        assert row.relative_error == pytest.approx(expected, rel=1e-6)
        assert row.kappa == (sharers[row.name].kappa_ if row.name in sharers else None)
        assert (row.method == "lossless") == (row.name not in sharers)
    assert report.ties == {"head": "fc"}
    assert report.rows[2].method == "codebook K=3 per row"
    assert report.rows[1].method == "codebook K=5 d=4"


def test_total_error_is_that_of_all_compressed_tensors_together(small, dense, originals, stored, sharers):
    total = Report.from_file(small, original=dense).total
    W = np.concatenate([flat64(originals[name]) for name in sharers])
    W_hat = np.concatenate([flat64(stored[name].to_array()) for name in sharers])
    assert total["relative_error"] == pytest.approx(np.linalg.norm(W - W_hat) / np.linalg.norm(W), rel=1e-6)
    assert total["parameters"] == sum(array.size for array in originals.values())
    assert Report.from_file(small).total["relative_error"] is None


def test_detail_gives_sizes_of_the_codes(small, stored):
    rows = {row.name: row for row in Report.from_file(small, detail=True).rows}
    assert rows["bias"].coded_bytes is None
    for name, n_clusters in (("conv", 6), ("fc", 5), ("rows", 3)):
        coded, codes = rows[name].coded_bytes, stored[name].codes
        share = np.bincount(codes.ravel()) / codes.size
        entropy = codes.size * -sum(p * math.log2(p) for p in share if p) / 8
        assert coded["entropy"] == pytest.approx(entropy)
        fixed = math.ceil(codes.size * math.ceil(math.log2(n_clusters)) / 8)
        assert fixed <= coded["fixed"] <= fixed + 2
        assert entropy <= coded["Huffman"]
        assert coded["stored"] <= min(coded["fixed"], coded["Huffman"])
        assert coded["stored"] <= rows[name].bytes_after
    assert Report.from_file(small).rows[0].coded_bytes is None
    frame = Report.from_file(small, detail=True).to_frame()
    assert frame.loc["conv", "codes_huffman"] == rows["conv"].coded_bytes["Huffman"]


def test_report_of_a_result_has_the_sizes_of_its_file(tmp_path):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.ReLU(), torch.nn.Linear(20, 4))
    rules = {"*": KMeansWeightSharer(n_clusters=4), "2": None}
    result = skfactor.compress(network, rules, progress=False)
    report = Report.from_result(result)
    path = tmp_path / "network.skf"
    result.save(path)
    assert report.source == "encoded"
    assert "there is no file yet" in str(report)
    from_file = Report.from_file(path)
    assert [row.bytes_after for row in report.rows] == [row.bytes_after for row in from_file.rows]
    assert report.total["bytes_after"] == path.stat().st_size
    W, W_hat = network[0].weight.detach().numpy(), result.model[0].weight.detach().numpy()
    by_name = {row.name: row for row in report.rows}
    assert by_name["0.weight"].relative_error == pytest.approx(np.linalg.norm(W - W_hat) / np.linalg.norm(W), rel=1e-5)
    assert "None" in by_name["2.weight"].note
    assert by_name["2.weight"].note in str(report)


def test_records_of_a_compression_agree_with_the_measured_error(tmp_path, dense):
    out = tmp_path / "out.skf"
    result = skfactor.compress_file(dense, out, KMeansWeightSharer(n_clusters=3), progress=False)
    recorded = Report.from_file(out, original=dense, records=result.records)
    measured = Report.from_file(out, original=dense)
    for a, b in zip(recorded.rows, measured.rows):
        assert a.relative_error == pytest.approx(b.relative_error, rel=1e-5)
        assert a.squared_norm == pytest.approx(b.squared_norm) if a.method != "lossless" else a.note
    assert recorded.total["relative_error"] == pytest.approx(measured.total["relative_error"], rel=1e-5)


def test_kappa_of_a_pipeline_counts_the_codes(tmp_path):
    codes = np.arange(24, dtype=np.uint8).reshape(4, 6) % 3
    chain = (IdentityDecoder(), CodebookDecoder(np.linspace(-1, 1, 3, dtype=np.float32).reshape(1, 3, 1)))
    with SkfWriter(tmp_path / "p.skf") as file:
        file.add("w", CompressedTensor(chain, codes, (4, 6)))
    (row,) = Report.from_file(tmp_path / "p.skf").rows
    assert row.kappa == 1 - 3 / 24
    assert row.method == "identity | codebook K=3"


def test_json_and_dict(small, dense, tmp_path):
    report = Report.from_file(small, original=dense)
    text = report.to_json(tmp_path / "r.json")
    assert json.loads(text) == json.loads((tmp_path / "r.json").read_text())
    figures = json.loads(text)
    assert figures["total"] == report.total
    assert [tensor["name"] for tensor in figures["tensors"]] == [row.name for row in report.rows]
    assert sum(tensor["share"] for tensor in figures["tensors"]) + report.overhead / figures["total"]["bytes_after"] \
        == pytest.approx(1)


def test_infinite_error_is_none_in_json(tmp_path):
    decoder = CodebookDecoder(np.ones((1, 1, 1), np.float32))
    with SkfWriter(tmp_path / "one.skf") as file:
        file.add("w", CompressedTensor((decoder,), np.zeros((2, 3), np.uint8), (2, 3)))
    save_file({"w": np.zeros((2, 3), np.float32)}, tmp_path / "zero.safetensors")
    report = Report.from_file(tmp_path / "one.skf", original=tmp_path / "zero.safetensors")
    assert report.total["relative_error"] == math.inf
    assert json.loads(report.to_json())["total"]["relative_error"] is None


def test_text_is_aligned(small, dense):
    report = Report.from_file(small, original=dense)
    lines = str(report).splitlines()
    table = lines[: len(report.rows) + 5]
    rule = table[1]
    assert set(rule) == {"-"}
    assert table[-2] == rule
    assert table[-1].startswith("total")
    assert all(len(line) <= len(rule) for line in table)
    right = table[0].index("after") + len("after")
    for line, row in zip(table[2:], report.rows):
        assert line[:right].endswith(f" {row.bytes_after:,}")
        assert line.startswith(row.name)
    assert table[-1][:right].endswith(f" {small.stat().st_size:,}")
    assert "head is tied to fc" in "\n".join(lines)


def test_columns_can_be_chosen(small):
    report = Report.from_file(small)
    assert report.to_text(["tensor", "after"]).splitlines()[0].split() == ["tensor", "after"]
    with pytest.raises(ValueError, match=r"columns must be among .* got \['bytes'\]"):
        report.to_text(["bytes"])


class Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.rows, self.open = [], False

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.open = True

    def handle_endtag(self, tag):
        self.open &= tag not in ("td", "th")

    def handle_data(self, data):
        if self.open:
            self.rows[-1][-1] += data


def test_html_holds_the_cells_of_the_table(tmp_path):
    with SkfWriter(tmp_path / "t.skf") as file:
        file.add("<b>&x", RawTensor(np.ones((2, 3), np.float32), "float32"))
    report = Report.from_file(tmp_path / "t.skf")
    page = report.to_html(tmp_path / "t.html")
    parser = Cells()
    parser.feed(page)
    assert [row[0] for row in parser.rows] == ["tensor", "<b>&x", "(overhead)", "total"]
    assert len({len(row) for row in parser.rows}) == 1
    assert f"{(tmp_path / 't.skf').stat().st_size:,}" in parser.rows[-1]
    assert (tmp_path / "t.html").read_text(encoding="utf-8").strip() == page.strip()
    assert report._repr_html_() in page


def test_frame_without_pandas_names_the_remedy(small, monkeypatch):
    real_import = builtins.__import__

    def no_pandas(name, *args, **kwargs):
        if name == "pandas":
            raise ImportError("No module named 'pandas'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_pandas)
    with pytest.raises(ImportError, match="pip install pandas"):
        Report.from_file(small).to_frame()


def test_damaged_file_is_named(small, tmp_path, dense):
    data = bytearray(small.read_bytes())
    data[len(data) // 2] ^= 1
    broken = tmp_path / "broken.skf"
    broken.write_bytes(data)
    for call in (lambda: compare(dense, broken), lambda: Report.from_file(broken, original=dense)):
        with pytest.raises(FormatError) as caught:
            call()
        assert str(broken) in str(caught.value)
        assert str(dense) not in str(caught.value)
    (tmp_path / "text").write_text("nothing of the kind")
    with pytest.raises(FormatError, match="text"):
        Report.from_file(tmp_path / "text")


def test_original_of_another_shape_is_refused(small, tmp_path):
    save_file({"conv": np.zeros((2, 2), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="'conv' has shape"):
        Report.from_file(small, original=tmp_path / "other.safetensors")


def test_compare_measures_every_tensor(small, dense, originals, stored):
    comparison = compare(dense, small)
    rows = {row.name: row for row in comparison.rows}
    assert set(rows) == {*originals, "head"}
    for name, W in originals.items():
        difference = flat64(W) - flat64(stored[name].to_array())
        assert rows[name].max_abs_difference == pytest.approx(np.abs(difference).max(initial=0), rel=1e-6)
        assert rows[name].relative_error == pytest.approx(
            np.linalg.norm(difference) / (np.linalg.norm(flat64(W)) or 1), rel=1e-6)
        assert rows[name].identical == (not difference.any())
        assert rows[name].bytes_a == W.nbytes
    assert rows["head"].verdict == "only in B"
    assert not comparison.identical
    assert json.loads(comparison.to_json())["file_bytes_b"] == small.stat().st_size
    assert "only in B" in str(comparison)
    assert "only in B" in comparison._repr_html_()


def test_compare_with_itself_is_identical(small, dense):
    assert compare(small, small).identical
    assert compare(dense, dense).identical


def write(path, **arrays):
    save_file(arrays, path)
    return path


@pytest.mark.parametrize(("a", "b", "verdict", "largest", "relative"), [
    (np.float32([1, np.nan]), np.float32([1, np.nan]), "identical", 0, 0),
    (np.float32([np.inf, 2]), np.float32([np.inf, 3]), "differs", 1, 0.5),
    (np.float32([np.nan, 1]), np.float32([2, 1]), "differs", None, None),
    (np.float32([np.inf, 1]), np.float32([-np.inf, 1]), "differs", None, None),
    (np.float32([0.0]), np.float32([-0.0]), "differs", 0, 0),
    (np.float32([0, 0]), np.float32([0, 3]), "differs", 3, None),
    (np.float32([3, 4]), np.float32([3, 4.5]), "differs", 0.5, 0.1),
    (np.float32([3, 4]), np.float64([3, 4]), "float32, float64", 0, 0),
    (np.float32([1, 2]), np.float32([[1, 2]]), "shapes 2, 1x2", None, None),
    (np.uint8([1, 5]), np.uint8([4, 5]), "differs", 3, 3 / math.sqrt(26)),
    (np.complex64([3 + 4j]), np.complex64([3 + 3j]), "differs", 1, 0.2),
])
def test_compare_of_special_values(tmp_path, a, b, verdict, largest, relative):
    comparison = compare(write(tmp_path / "a.safetensors", w=a), write(tmp_path / "b.safetensors", w=b))
    (row,) = comparison.rows
    assert row.verdict == verdict
    (figures,) = json.loads(comparison.to_json())["tensors"]
    assert figures["max_abs_difference"] == largest
    assert figures["relative_error"] == (relative if relative is None else pytest.approx(relative))


def test_bfloat16_is_compared_by_value(tmp_path):
    W = np.linspace(-1, 1, 12).reshape(3, 4)
    bits = from_float(W, "bfloat16")
    for name, tensor in (("a", RawTensor(bits, "bfloat16")), ("b", RawTensor(W.astype(np.float32), "float32"))):
        with SkfWriter(tmp_path / f"{name}.skf") as file:
            file.add("w", tensor)
    (row,) = compare(tmp_path / "a.skf", tmp_path / "b.skf").rows
    assert 0 < row.max_abs_difference < 2**-8
    assert row.verdict == "bfloat16, float32"


def test_output_error_of_a_calibrated_result():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.ReLU(), torch.nn.Linear(20, 4))
    x = torch.randn(200, 30)
    result = skfactor.compress(network, KMeansWeightSharer(n_clusters=4), calibration=x, progress=False)
    report = Report.from_result(result)
    with torch.no_grad():
        y = x @ network[0].weight.T
        y_hat = x @ result.model[0].weight.T
    by_name = {row.name: row for row in report.rows}
    assert by_name["0.weight"].output_error == pytest.approx(float((y - y_hat).norm() / y.norm()), rel=1e-3)
    assert by_name["0.bias"].output_error is None
    assert "output error" in str(report).splitlines()[0]
    assert report.to_dict()["tensors"][0]["output_error"] == by_name["0.weight"].output_error
    plain = skfactor.compress(network, KMeansWeightSharer(n_clusters=4), progress=False)
    assert "output error" not in str(Report.from_result(plain))
