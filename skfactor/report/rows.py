"""One tensor of a file: what the report says of it."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import math
from dataclasses import dataclass

from skfactor.codec.coders import CODERS, empirical_entropy_bits, encode_codes
from skfactor.codec.dtypes import itemsize
from skfactor.codec.streams import CHUNK_CODES
from skfactor.report.files import difference_of, squared_norm_of, values_of

__all__ = ["TensorReport", "tensor_report"]


@dataclass(frozen=True)
class TensorReport:
    """One row of a `Report`.

    Attributes
    ----------
    name, shape, dtype
        The tensor's.
    parameters : int
        Number of elements.
    bytes_before, bytes_after : int
        Size of the elements in their own dtype, and stored with codebooks and index entry.
    method : str
        Decoders that restore it, in the order of the pipeline, or "lossless".
    coder : str
        Entropy coder of the codes or of the bytes.
    relative_error : float or None
        ‖W − Ŵ‖ / ‖W‖; None where the original is not known.
    output_error : float or None
        The same of the layer's output on the calibration data; None without calibration. Codes chosen for the output
        may have a large error of the weights.
    kappa : float or None
        The course's compression factor 1 − K/N of weight sharing; None for other methods.
    note : str
        Why no rule took the tensor.
    squared_norm : float or None
        ‖W‖², which weighs the tensor in the total of the relative error.
    coded_bytes : dict or None
        Bytes that the codes alone take with "fixed" length, by "Huffman", by their "entropy" (of order 0, the bound
        of both) and as "stored"; only with `detail=True`, for integer codes. None where a coder cannot code them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    bytes_before: int
    bytes_after: int
    method: str
    coder: str
    relative_error: float | None = None
    output_error: float | None = None
    kappa: float | None = None
    note: str = ""
    squared_norm: float | None = None
    coded_bytes: dict[str, float | None] | None = None

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits per element, everything of this tensor counted."""
        return 8 * self.bytes_after / self.parameters if self.parameters else None

    @property
    def ratio(self) -> float | None:
        """`bytes_before / bytes_after`."""
        return self.bytes_before / self.bytes_after if self.bytes_after else None


def tensor_report(file, name, reference, record, detail):
    """`TensorReport` of one tensor of an open file; `reference` and `record` may be None."""
    entry = file.entry(name)
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    lossless = entry["kind"] == "raw"
    error, norm = (0.0, None) if lossless else _error_of(file, name, reference, record)
    n_parameters = math.prod(shape)
    return TensorReport(
        name=name, shape=shape, dtype=dtype, parameters=n_parameters, bytes_before=n_parameters * itemsize(dtype),
        bytes_after=file.nbytes(name), method="lossless" if lossless else _method_text(entry),
        coder=_coder_text(entry), relative_error=error, squared_norm=norm,
        output_error=None if record is None else _root(record.output_error),
        kappa=_kappa(entry, lambda: file.read(name)), note=(record and record.skipped) or "",
        coded_bytes=_coded_bytes(file.read(name), entry) if detail and not lossless else None,
    )


def _root(squared):
    return None if squared is None else math.sqrt(squared)


def _error_of(file, name, reference, record):
    """(‖W − Ŵ‖ / ‖W‖, ‖W‖²) as far as the uncompressed file and the record of the compression tell."""
    known = None if record is None else _root(record.relative_error)
    if reference is None or name not in reference.names:
        return known, None if record is None else record.squared_norm
    W = values_of(reference, name)
    if known is not None:
        return known, squared_norm_of(W)
    W_hat = values_of(file, name)
    if W.shape != W_hat.shape:
        raise ValueError(f"tensor {name!r} has shape {W_hat.shape}, in the original {W.shape}")
    difference = difference_of(W, W_hat)
    return difference.relative, difference.squared_norm


def _method_text(entry):
    """Decoders in the order of the pipeline: "codebook K=16 row"."""
    parts = zip(entry["decoders"], entry["params"], entry["arrays"])
    return " | ".join(_decoder_text(name, params, arrays) for name, params, arrays in parts)


def _decoder_text(name, params, arrays):
    if name != "codebook":
        return name
    _, n_clusters, vector_size = arrays["codebooks"][1]
    by = "" if params["granularity"] == "tensor" else f" per {params['granularity']}"
    return f"codebook K={n_clusters}{by}" + (f" d={vector_size}" if vector_size > 1 else "")


def _coder_text(entry):
    """Entropy coders of the codes; of a lossless tensor, those of its bytes."""
    of_codes = [name for name in entry["coders"] if name in CODERS]
    return ", ".join(of_codes or entry["coders"])


def _kappa(entry, read):
    """κ = 1 − K/N: K shared values for N codes, where the last decoder is a codebook."""
    if entry["kind"] == "raw" or entry["decoders"][-1] != "codebook":
        return None
    n_books, n_clusters, vector_size = entry["arrays"][-1]["codebooks"][1]
    alone = len(entry["decoders"]) == 1
    n_codes = math.prod(entry["shape"]) // vector_size if alone else read().codes.size
    return 1 - n_books * n_clusters / n_codes if n_codes else None


def _coded_bytes(tensor, entry):
    """Bytes of the codes of a `CompressedTensor` in fixed length, by Huffman, by entropy, and as they are stored."""
    hints, codes = tensor.decoders[-1].code_hints(), tensor.codes
    if "n_symbols" not in hints or codes.ndim != 2 or not codes.size:
        return None
    kernel_shape = tensor.layout.kernel_shape
    aligned = codes.shape[1] == math.prod(kernel_shape)
    options = hints | {"kernel": max(1, math.prod(kernel_shape[1:])) if aligned else 1}
    stored = [name for name in entry["coders"] if name in CODERS]
    wanted = {"fixed": "packed", "Huffman": "huffman", "stored": stored[0] if len(stored) == 1 else "auto"}
    sizes = {title: _coded_size(codes, coder, options) for title, coder in wanted.items()}
    return sizes | {"entropy": empirical_entropy_bits(codes, hints["n_symbols"]) / 8}


def _coded_size(codes, coder, options):
    """Bytes of all codes by one coder, in the blocks of rows of a file; None where it cannot code them."""
    step = max(1, CHUNK_CODES // max(1, codes.shape[1]))
    try:
        return sum(len(encode_codes(codes[i : i + step], coder=coder, **options)[1])
                   for i in range(0, len(codes), step))
    except ValueError:
        return None
