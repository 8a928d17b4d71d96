# SPDX-License-Identifier: BSD-3-Clause
"""Lossless coding of the codes of the real networks: K-means sharing of every layer, then the entropy coder alone."""

import lzma
import time

import numpy as np
from datasets import NETWORKS, network_layers
from harness import Benchmark

SIZES = (16, 32)
SPARSE = ("mnist_lenet300100_sparse", "mnist_lenet5_sparse")
bench = Benchmark(
    "codec",
    __doc__,
    cases=[{"dataset": f"{n}, K={k}"} for n in NETWORKS + SPARSE for k in SIZES],
    tiny_cases=[{"dataset": "planted"}],
)


def layer_codes(layers, n_clusters, kernel):
    """Codes of each layer, keyed "name|K|code of zero|kernel": what every coder may know."""
    from skfactor import KMeansWeightSharer

    codes = {}
    for name, w in layers.items():
        sharer = KMeansWeightSharer(n_clusters, preserve_zeros=bool((w == 0).any())).fit(w)
        centers = sharer.cluster_centers_.ravel()
        inner = kernel if w.shape[1] % kernel == 0 else 1
        codes[f"{name}|{len(centers)}|{np.abs(centers).argmin()}|{inner}"] = sharer.labels_
    return codes


def _register_network(name, n_clusters):
    def dataset(tiny):
        layers = network_layers(name)
        return None if layers is None else layer_codes(layers, n_clusters, 25 if "lenet5" in name else 9)

    bench.datasets[f"{name}, K={n_clusters}"] = dataset


for _network in NETWORKS + SPARSE:
    for _size in SIZES:
        _register_network(_network, _size)


@bench.dataset
def planted(tiny):
    """Normal weights whose scale changes from filter to filter."""
    rng = np.random.default_rng(0)
    scale = rng.lognormal(0, 0.5, (64, 1))
    return layer_codes({"layer": (scale * rng.normal(size=(64, 144))).astype(np.float32)}, 16, 9)


@bench.objective
def size(data, decoded, **params):
    """Order-0 entropy of each layer's own codes in bytes, and whether the codes came back."""
    from skfactor.codec.coders import empirical_entropy_bits

    bits = sum(empirical_entropy_bits(codes, 1 + int(codes.max())) for codes in data.values())
    exact = decoded is None or all(np.array_equal(decoded[name], codes) for name, codes in data.items())
    return {"n_codes": sum(c.size for c in data.values()), "n_tensors": len(data), "entropy_bytes": bits / 8,
            "exact": bool(exact)}


def coder(encode, decode):
    """A run from `encode(data) -> list of bytes` and its inverse, with the size and both times as figures."""

    def run(data):
        start = time.perf_counter()
        streams = encode(data)
        middle = time.perf_counter()
        decoded = decode(streams, data)
        times = {"encode_s": middle - start, "decode_s": time.perf_counter() - middle}
        return decoded, {"bytes": sum(len(s) for s in streams), **times}

    return run


def _skfactor(name):
    from skfactor.codec.coders import decode_codes, encode_codes

    def known(key):
        n_symbols, zero, kernel = (int(v) for v in key.split("|")[1:])
        return n_symbols, {"zero": zero, "kernel": kernel}

    def encode(data):
        chosen = []
        for key, codes in data.items():
            n_symbols, hints = known(key)
            wanted = "constant" if codes.min() == codes.max() else name
            chosen.append(encode_codes(codes, n_symbols, coder=wanted, **hints))
        names.append([c[0] for c in chosen])
        return [payload for _, payload in chosen]

    def decode(streams, data):
        decoded = {}
        for coder_name, stream, (key, codes) in zip(names.pop(), streams, data.items()):
            n_symbols, hints = known(key)
            decoded[key] = decode_codes(coder_name, stream, codes.shape, n_symbols, **hints)
        return decoded

    names = []
    return coder(encode, decode)


def _register_skfactor(name):
    def solver():
        from skfactor.codec.coders import CODERS

        if name not in ("auto", *CODERS):
            raise ImportError(name=name)
        return _skfactor(name)

    bench.solvers[f"skfactor {name}"] = (solver, None)


for _coder in ("auto", "context", "ans", "huffman", "packed"):
    _register_skfactor(_coder)


def _joined(compress, decompress):
    """A byte compressor on the codes of all layers, one byte each, in one piece (which favours it)."""

    def encode(data):
        return [compress(b"".join(codes.astype(np.uint8).tobytes() for codes in data.values()))]

    def decode(streams, data):
        flat = np.frombuffer(decompress(streams[0]), dtype=np.uint8)
        ends = np.cumsum([codes.size for codes in data.values()])[:-1]
        return {key: part.reshape(data[key].shape) for key, part in zip(data, np.split(flat, ends))}

    return coder(encode, decode)


@bench.solver("zstd, level 19")
def zstd():
    import zstandard

    return _joined(zstandard.ZstdCompressor(level=19).compress, zstandard.ZstdDecompressor().decompress)


@bench.solver("xz, preset 9e")
def xz():
    return _joined(lambda b: lzma.compress(b, preset=9 | lzma.PRESET_EXTREME), lzma.decompress)


@bench.solver("NNCodec, integer codes")
def nncodec():
    """Its DeepCABAC on the signed numbers of the centroids, about the one nearest zero; its headers included."""
    from nncodec_peer import load_nncodec

    compress, decompress = load_nncodec()

    def encode(data):
        return [compress({key: codes.astype(np.int32) - int(key.split("|")[2]) for key, codes in data.items()})]

    def decode(streams, data):
        found = decompress(streams[0])
        return {key: found[key] + int(key.split("|")[2]) for key in data}

    return coder(encode, decode)


if __name__ == "__main__":
    bench.main()
