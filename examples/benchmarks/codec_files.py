# SPDX-License-Identifier: BSD-3-Clause
"""Whole networks to one file without calibration: bytes, error of the weights and accuracy, against NNCodec."""

import os
import tempfile

import numpy as np
from accuracy import accuracy
from datasets import NETWORKS, networks_folder
from harness import Benchmark

bench = Benchmark("codec_files", __doc__, cases=[{"dataset": n} for n in NETWORKS], tiny_cases=[{"dataset": "planted"}])


def _register_network(name):
    def dataset(tiny):
        folder = networks_folder()
        if folder is None:
            return None
        from safetensors.numpy import load_file

        return load_file(folder / "weights" / f"{name}.safetensors") | {"name": np.array(name)}

    bench.datasets[name] = dataset


for _network in NETWORKS:
    _register_network(_network)


@bench.dataset
def planted(tiny):
    rng = np.random.default_rng(0)
    tensors = {f"layer{i}.weight": rng.normal(0, 0.05, (32, 144)).astype(np.float32) for i in range(2)}
    return tensors | {"name": np.array("")}


@bench.objective
def error(data, result):
    """Relative squared error of tensors of at least two dimensions, and accuracy where there are test images."""
    weights = [key for key, w in data.items() if w.ndim >= 2]
    wrong = sum(np.square(data[key].astype(np.float64) - result[key]).sum() for key in weights)
    total = sum(np.square(data[key].astype(np.float64)).sum() for key in weights)
    figures = {"float32_bytes": sum(w.nbytes for key, w in data.items() if key != "name"),
               "relative_error": float(wrong / total)}
    if str(data["name"]):
        figures["accuracy"] = accuracy(str(data["name"]), result)
    return figures


def _tensors(data):
    return {key: w for key, w in data.items() if key != "name"}


@bench.solver("float32")
def uncompressed():
    def run(data):
        return _tensors(data), {"bytes": sum(w.nbytes for w in _tensors(data).values())}

    return run


def _skfactor(**options):
    from safetensors.numpy import save_file

    from skfactor import KMeansWeightSharer, compress_file, load

    def run(data):
        with tempfile.TemporaryDirectory() as folder:
            source, target = os.path.join(folder, "in.safetensors"), os.path.join(folder, "out.skf")
            save_file(_tensors(data), source)
            rules = {"*": KMeansWeightSharer(**options)}
            compress_file(source, target, rules, progress=False)
            found = {key: value.numpy() for key, value in load(target).items()}
            return found, {"bytes": os.path.getsize(target), **_accounts(target)}

    return run


def _accounts(path):
    """What a file has to hold by order-0 counting: entropy of the codes of each tensor, codebooks, lossless tensors."""
    from skfactor.codec.coders import empirical_entropy_bits
    from skfactor.codec.container import SkfFile

    figures = {"n_tensors": 0, "entropy_bytes": 0.0, "codebook_bytes": 0, "lossless_bytes": 0}
    with SkfFile(path) as file:
        for name in file.names:
            tensor = file.read(name)
            if file.entry(name)["kind"] == "raw":
                figures["lossless_bytes"] += file.nbytes(name)
                continue
            codebooks = tensor.decoders[-1].codebooks
            figures["n_tensors"] += 1
            figures["entropy_bytes"] += empirical_entropy_bits(tensor.codes, codebooks.shape[1]) / 8
            figures["codebook_bytes"] += codebooks.size * np.dtype(tensor.dtype).itemsize
    figures["order0_limit"] = 1.015 * sum(figures[k] for k in ("entropy_bytes", "codebook_bytes", "lossless_bytes"))
    figures["order0_limit"] += 64 * figures["n_tensors"]
    return figures


def _register_skfactor(label, **options):
    bench.solvers[f"skfactor {label}"] = (lambda: _skfactor(**options), None)


for _size in (16, 32):
    _register_skfactor(f"K={_size}, order 0", n_clusters=_size, coder="ans")
    _register_skfactor(f"K={_size}, Huffman", n_clusters=_size, coder="huffman")
    _register_skfactor(f"K={_size}", n_clusters=_size)
for _price in (0.0005, 0.001, 0.002, 0.004, 0.008):
    _register_skfactor(f"K=64, entropy_weight={_price}", n_clusters=64, entropy_weight=_price)


def _nncodec(**options):
    from nncodec_peer import load_nncodec

    compress, decompress = load_nncodec()

    def run(data):
        stream = compress(_tensors(data), **options)
        return decompress(stream), {"bytes": len(stream)}

    return run


def _register_nncodec(label, **options):
    bench.solvers[f"NNCodec {label}"] = (lambda: _nncodec(**options), None)


for _qp in (-28, -24, -20, -18):
    _register_nncodec(f"qp {_qp}", qp=_qp, use_dq=False)
    _register_nncodec(f"qp {_qp}, dependent", qp=_qp, use_dq=True)

if __name__ == "__main__":
    bench.main()
