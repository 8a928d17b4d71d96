"""What a compression stored: a table of the tensors of a result or of a file, and the difference of two files.

Every size is a number of bytes that a file really has, or would have: the bytes of the tensors and of the overhead
(header, index, metadata) sum to the size of the file exactly. Nothing here changes what it reports on.
"""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import contextlib
import html
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from skfactor.codec.coders import CODERS, empirical_entropy_bits, encode_codes
from skfactor.codec.container import SkfFile
from skfactor.codec.dtypes import is_float, itemsize, to_float
from skfactor.codec.safetensors_io import SafetensorsReader
from skfactor.codec.streams import CHUNK_CODES
from skfactor.exceptions import FormatError

__all__ = ["Comparison", "Report", "TensorComparison", "TensorReport", "compare", "is_skf", "naming_file"]


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


class Report:
    """Table of what is stored, tensor by tensor and in total.

    `print(report)` shows an aligned table (many lossless tensors as one line), a notebook an HTML one; `to_frame`,
    `to_dict` and `to_json` give the figures. Made by `Report.from_file` or by `Report.from_result`.

    Attributes
    ----------
    rows : tuple of TensorReport
    overhead : int
        Bytes of the file that belong to no tensor: header, footer, metadata, names of tied tensors.
    ties : dict
        Name -> name of the tensor that it shares; stored once, counted once.
    source : {"file", "encoded"}
        Whether sizes are those of a file on disk or come from really encoding what has no file yet.
    path : str or None
    """

    def __init__(
        self,
        rows: Iterable[TensorReport],
        *,
        overhead: int = 0,
        ties: Mapping[str, str] | None = None,
        source: str = "encoded",
        path: str | None = None,
    ):
        self.rows = tuple(rows)
        self.overhead = int(overhead)
        self.ties = dict(ties or {})
        self.source = source
        self.path = path

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike,
        *,
        original: str | os.PathLike | None = None,
        records: Iterable[Any] = (),
        detail: bool = False,
    ) -> Report:
        """Report on a `.skf` or `.safetensors` file.

        Parameters
        ----------
        path : path
        original : path or None, default=None
            A `.safetensors` or `.skf` file of the uncompressed tensors, for the relative errors.
        records : iterable of TensorRecord, default=()
            What `skfactor.compress_file` recorded: errors that need not be measured again, reasons why a tensor is
            lossless.
        detail : bool, default=False
            Also code the codes in the other ways (fixed length, Huffman) to show their sizes; takes time.

        Returns
        -------
        Report

        Raises
        ------
        FormatError
            When a file is damaged or is neither of the two.
        """
        records = {record.name: record for record in records}
        no_file = contextlib.nullcontext()
        with _File(path) as file, no_file if original is None else _File(original) as reference:
            names = [name for name in file.names if name not in file.ties]
            rows = [_row(file, name, reference, records.get(name), detail) for name in names]
            ties = dict(file.ties)
        overhead = os.path.getsize(path) - sum(row.bytes_after for row in rows)
        return cls(rows, overhead=overhead, ties=ties, source="file", path=os.fspath(path))

    @classmethod
    def from_result(cls, result: Any, *, detail: bool = False) -> Report:
        """Report on a `CompressionResult`; sizes are those of the file that `result.save` writes.

        Parameters
        ----------
        result : CompressionResult
        detail : bool, default=False
            As in `from_file`.

        Returns
        -------
        Report
        """
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "result.skf")
            result.save(path)
            written = cls.from_file(path, records=result.records, detail=detail)
        return cls(written.rows, overhead=written.overhead, ties=written.ties)

    @property
    def total(self) -> dict[str, Any]:
        """Figures of the whole: parameters, bytes, ratio, bits per weight, relative error of what is not lossless."""
        before = sum(row.bytes_before for row in self.rows)
        after = sum(row.bytes_after for row in self.rows) + self.overhead
        parameters = sum(row.parameters for row in self.rows)
        return {
            "parameters": parameters,
            "bytes_before": before,
            "bytes_after": after,
            "ratio": before / after if after else None,
            "bits_per_weight": 8 * after / parameters if parameters else None,
            "relative_error": self._total_error(),
        }

    def _total_error(self):
        """sqrt(Σ ‖W − Ŵ‖² / Σ ‖W‖²) over the tensors that are not lossless; None where one of them is unknown."""
        lossy = [row for row in self.rows if row.method != "lossless"]
        if any(row.relative_error is None or row.squared_norm is None for row in lossy):
            return None
        if any(math.isinf(row.relative_error) for row in lossy):
            return math.inf
        norm = sum(row.squared_norm for row in lossy)
        return math.sqrt(sum(row.relative_error**2 * row.squared_norm for row in lossy) / norm) if norm else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values, the tensors, the overhead and the total; what is unknown or infinite is None."""
        total = self.total
        return {
            "source": self.source,
            "path": self.path,
            "tensors": [self._row_dict(row, total["bytes_after"]) for row in self.rows],
            "overhead_bytes": self.overhead,
            "ties": self.ties,
            "total": total | {"relative_error": _finite_or_none(total["relative_error"])},
        }

    @staticmethod
    def _row_dict(row, total_bytes):
        return {
            "name": row.name,
            "shape": list(row.shape),
            "dtype": row.dtype,
            "parameters": row.parameters,
            "bits_per_weight": row.bits_per_weight,
            "bytes_before": row.bytes_before,
            "bytes_after": row.bytes_after,
            "ratio": row.ratio,
            "share": row.bytes_after / total_bytes if total_bytes else None,
            "relative_error": _finite_or_none(row.relative_error),
            "output_error": _finite_or_none(row.output_error),
            "kappa": row.kappa,
            "method": row.method,
            "coder": row.coder,
            "note": row.note,
            "coded_bytes": row.coded_bytes,
        }

    def to_json(self, path: str | os.PathLike | None = None) -> str:
        """`to_dict` as JSON text, also written to `path` where one is given."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        return _written(text, path)

    def to_frame(self):
        """One row per tensor and one for the overhead as a `pandas.DataFrame` indexed by name.

        The column `bytes_after` sums to the size of the file.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_frame needs pandas, which is not installed; pip install pandas") from error
        figures = self.to_dict()
        total_bytes = figures["total"]["bytes_after"]
        rows = [tensor | _flat_coded_bytes(tensor.pop("coded_bytes")) for tensor in figures["tensors"]]
        overhead = {
            "name": "(overhead)", "parameters": 0, "bytes_before": 0, "bytes_after": self.overhead,
            "share": self.overhead / total_bytes if total_bytes else None,
        }
        return pd.DataFrame([*rows, overhead]).set_index("name")

    def to_html(self, path: str | os.PathLike | None = None) -> str:
        """A whole HTML page with the table, also written to `path` where one is given."""
        title = "skfactor report" + (f": {os.path.basename(self.path)}" if self.path else "")
        page = (
            '<!doctype html>\n<html lang="en">\n'
            f'<head><meta charset="utf-8"><title>{html.escape(title)}</title></head>\n'
            f'<body style="font-family: sans-serif; margin: 2em">\n<h1 style="font-size: 1.3em">{html.escape(title)}'
            f"</h1>\n{self._repr_html_()}\n</body>\n</html>\n"
        )
        return _written(page, path)

    def _repr_html_(self) -> str:
        header, lines = self._cells()
        return _html_table(header, lines, self._footnotes())

    def to_text(self, columns: Iterable[str] | None = None) -> str:
        """The aligned table that `print` shows, without its footnotes; `columns` selects by title."""
        header, lines = self._cells()
        if columns is not None:
            columns = list(columns)
            unknown = sorted(set(columns) - set(header))
            if unknown:
                raise ValueError(f"columns must be among {header}, got {unknown}")
            keep = [header.index(title) for title in columns]
            header, lines = columns, [[line[i] for i in keep] for line in lines]
        return _text_table(header, lines)

    def __str__(self) -> str:
        return "\n".join([self.to_text(), *self._footnotes()])

    def __repr__(self) -> str:
        total = self.total
        return f"<Report of {len(self.rows)} tensors: {total['bytes_before']:,} -> {total['bytes_after']:,} bytes>"

    def _shown_rows(self):
        """The rows; beside compressed tensors more than `_MOST_LOSSLESS` lossless ones become one line."""
        lossless = [row for row in self.rows if row.method == "lossless"]
        if len(lossless) <= _MOST_LOSSLESS or len(lossless) == len(self.rows):
            return self.rows
        merged = replace(
            lossless[0], name=f"({len(lossless)} lossless tensors)", shape=None, coder="", note="",
            parameters=sum(row.parameters for row in lossless),
            bytes_before=sum(row.bytes_before for row in lossless),
            bytes_after=sum(row.bytes_after for row in lossless),
        )
        return (*(row for row in self.rows if row.method != "lossless"), merged)

    def _cells(self):
        """Header, and lines of cells: the tensors, the overhead, the total (last)."""
        total = self.total
        all_bytes = total["bytes_after"]
        columns = _COLUMNS + (_DETAIL_COLUMNS if any(row.coded_bytes for row in self.rows) else ())
        if all(row.output_error is None for row in self.rows):
            columns = tuple(column for column in columns if column[0] != "output error")
        lines = [[cell(row, all_bytes) for _, cell in columns] for row in self._shown_rows()]
        filler = [""] * (len(columns) - _N_COMMON)
        if self.overhead:
            share = _percent(self.overhead / all_bytes)
            lines.append(["(overhead)", "", "", "", "", f"{self.overhead:,}", "", share, *filler])
        rest = [_error_text(total["relative_error"]), *filler[1:]]
        lines.append([
            "total", "", f"{total['parameters']:,}", _number(total["bits_per_weight"]), f"{total['bytes_before']:,}",
            f"{all_bytes:,}", _ratio_text(total["ratio"]), "100 %" if all_bytes else "", *rest,
        ])
        return [title for title, _ in columns], lines

    def _footnotes(self):
        notes = [f"{name} is tied to {other} and stored once" for name, other in self.ties.items()]
        by_reason = {}
        for row in self.rows:
            if row.note:
                by_reason.setdefault(row.note, []).append(row.name)
        for reason, names in by_reason.items():
            others = f" and {len(names) - 3} more" if len(names) > 3 else ""
            notes.append(f"lossless: {', '.join(names[:3])}{others} ({reason})")
        if any(row.output_error is not None for row in self.rows):
            notes.append("error: of the weights; output error: of the layer's output on the calibration data")
        if any(row.coded_bytes for row in self.rows):
            notes.append("fixed, Huffman, entropy and stored: bytes of the codes alone; entropy is of order 0")
        where = f"the file {self.path}" if self.source == "file" else "encoding the tensors; there is no file yet"
        return [*notes, f"bytes: from {where}"]


def _flat_coded_bytes(coded_bytes):
    """Columns of a data frame: codes_fixed, codes_huffman, codes_stored, codes_entropy."""
    return {f"codes_{key.lower()}": size for key, size in (coded_bytes or {}).items()}


def _percent(fraction):
    return "" if fraction is None else f"{100 * fraction:.1f} %"


def _number(value):
    return "" if value is None else f"{value:.2f}"


def _ratio_text(ratio):
    return "" if ratio is None else f"{ratio:.2f}x"


def _error_text(error):
    return "" if error is None else "0" if error == 0 else f"{100 * error:.2f} %"


def _kappa_text(kappa):
    """Cut off, not rounded: κ is never 100 %."""
    return "" if kappa is None else f"{math.floor(1e4 * kappa) / 100:.2f} %"


def _shape_text(shape):
    return "x".join(map(str, shape)) or "scalar"


def _coded_text(key):
    def text(row, _):
        size = (row.coded_bytes or {}).get(key)
        return "" if size is None else f"{math.ceil(size):,}"

    return text


#: title and text of every column; the first eight are also filled for the overhead and the total
_COLUMNS = (
    ("tensor", lambda row, _: row.name),
    ("shape", lambda row, _: "" if row.shape is None else _shape_text(row.shape)),
    ("weights", lambda row, _: f"{row.parameters:,}"),
    ("bits/weight", lambda row, _: _number(row.bits_per_weight)),
    ("before", lambda row, _: f"{row.bytes_before:,}"),
    ("after", lambda row, _: f"{row.bytes_after:,}"),
    ("ratio", lambda row, _: _ratio_text(row.ratio)),
    ("share", lambda row, all_bytes: _percent(row.bytes_after / all_bytes if all_bytes else None)),
    ("error", lambda row, _: _error_text(row.relative_error)),
    ("output error", lambda row, _: _error_text(row.output_error)),
    ("κ", lambda row, _: _kappa_text(row.kappa)),
    ("method", lambda row, _: row.method),
    ("coder", lambda row, _: row.coder),
)
_DETAIL_COLUMNS = tuple((title, _coded_text(title)) for title in ("fixed", "Huffman", "entropy", "stored"))
_N_COMMON = 8
_MOST_LOSSLESS = 8
_LEFT = ("tensor", "shape", "method", "coder", "result")


def _text_table(header, lines):
    """Columns aligned and parted by two blanks; a rule under the header and above the last line."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]

    def aligned(line):
        cells = (c.ljust(w) if t in _LEFT else c.rjust(w) for c, w, t in zip(line, widths, header))
        return "  ".join(cells).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([aligned(header), rule, *map(aligned, lines[:-1]), rule, aligned(lines[-1])])


def _html_table(header, lines, footnotes):
    def row(cells, tag, style=""):
        inner = "".join(
            f'<{tag} style="text-align: {"left" if title in _LEFT else "right"}; padding: 2px 10px">'
            f"{html.escape(cell)}</{tag}>"
            for cell, title in zip(cells, header)
        )
        return f"<tr{style}>{inner}</tr>"

    body = [row(line, "td") for line in lines[:-1]]
    last = row(lines[-1], "td", ' style="font-weight: bold; border-top: 1px solid #888"')
    notes = "".join(f"<div>{html.escape(note)}</div>" for note in footnotes)
    return "\n".join([
        '<table style="border-collapse: collapse; font-variant-numeric: tabular-nums">',
        f'<thead style="border-bottom: 1px solid #888">{row(header, "th")}</thead>',
        "<tbody>", *body, last, "</tbody></table>",
        f'<div style="color: #666; font-size: small">{notes}</div>',
    ])


def _written(text, path):
    if path is not None:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text if text.endswith("\n") else text + "\n")
    return text


def _finite_or_none(value):
    return value if value is not None and math.isfinite(value) else None


# ---------------------------------------------------------------------------------------------------------------------
# one tensor of a file
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def naming_file(path: str | os.PathLike):
    """Put the path in front of a FormatError that does not say which file is meant."""
    try:
        yield
    except FormatError as error:
        if os.fspath(path) in str(error):
            raise
        raise FormatError(f"{os.fspath(path)}: {error}") from error


def is_skf(path: str | os.PathLike) -> bool:
    """Whether a file starts as a `.skf` file does."""
    with open(path, "rb") as file:
        return file.read(13)[8:] == b'{"skf'


class _File:
    """An open `.skf` or `.safetensors` file; what goes wrong with its bytes names the path."""

    def __init__(self, path):
        self.path = os.fspath(path)
        # a damaged start must not make a .skf file something else
        self.is_skf = is_skf(path) or self.path.endswith(".skf")
        with naming_file(path):
            self._file = SkfFile(path) if self.is_skf else SafetensorsReader(path)
        self.names = list(self._file.names)
        self.ties = dict(self._file.ties) if self.is_skf else {}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def entry(self, name):
        """Facts of a tensor as `SkfFile.entry` gives them."""
        if self.is_skf:
            return self._file.entry(name)
        shape = tuple(self._file.shape(name))
        return {"kind": "raw", "dtype": self._file.dtype(name), "shape": shape, "coders": ["raw"]}

    def nbytes(self, name):
        return self._file.nbytes(name)

    def read(self, name):
        with naming_file(self.path):
            return self._file.read(name)

    def read_array(self, name):
        """The array that carries the bits of a tensor."""
        with naming_file(self.path):
            return self._file.read_array(name) if self.is_skf else self._file.read(name)


def _row(file, name, reference, record, detail):
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
    W = _values(reference, name)
    if known is not None:
        return known, _squared_norm(W)
    W_hat = _values(file, name)
    if W.shape != W_hat.shape:
        raise ValueError(f"tensor {name!r} has shape {W_hat.shape}, in the original {W.shape}")
    difference = _difference(W, W_hat)
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


# ---------------------------------------------------------------------------------------------------------------------
# two files
# ---------------------------------------------------------------------------------------------------------------------


class _Difference(NamedTuple):
    """max |a − b|, ‖a − b‖ / ‖a‖, and ‖a‖²."""

    largest: float
    relative: float
    squared_norm: float


def _values(file, name):
    """Values of a tensor: floats as float32 or float64, everything else as it is carried."""
    dtype = file.entry(name)["dtype"]
    array = file.read_array(name)
    return to_float(array, dtype) if is_float(dtype) else array


def _blocks(*arrays):
    """Flat pieces of equally long arrays, small enough that a float64 copy of them does not matter."""
    flat = [array.reshape(-1) for array in arrays]
    step = 1 << 20
    for start in range(0, flat[0].size, step):
        yield tuple(
            array[start : start + step].astype(np.complex128 if array.dtype.kind == "c" else np.float64)
            for array in flat
        )


def _squared_norm(W):
    return sum(float((np.abs(w) ** 2).sum()) for (w,) in _blocks(W))


def _difference(a, b):
    """Non-finite values that are the same on both sides count nothing; others make the difference infinite."""
    largest = error = norm = 0.0
    for x, y in _blocks(a, b):
        same = (x == y) | ((x != x) & (y != y))
        with np.errstate(invalid="ignore", over="ignore"):
            e = np.where(same, 0.0, np.nan_to_num(np.abs(x - y), nan=np.inf, posinf=np.inf))
            size = np.abs(x)
            error, norm = error + float(e @ e), norm + float((size[np.isfinite(size)] ** 2).sum())
        largest = max(largest, float(e.max(initial=0.0)))
    relative = math.sqrt(error / norm) if norm else (0.0 if error == 0 else math.inf)
    return _Difference(largest, relative, norm)


@dataclass(frozen=True)
class TensorComparison:
    """One row of a `Comparison`; what needs both tensors in one shape is None where that is not so.

    Attributes
    ----------
    name : str
    shape_a, shape_b : tuple of int or None
    dtype_a, dtype_b : str or None
        None where the file has no such tensor.
    bytes_a, bytes_b : int
    identical : bool
        Same dtype, shape and bits.
    max_abs_difference, relative_error : float or None
        max |a − b| and ‖a − b‖ / ‖a‖.
    """

    name: str
    shape_a: tuple[int, ...] | None
    shape_b: tuple[int, ...] | None
    dtype_a: str | None
    dtype_b: str | None
    bytes_a: int
    bytes_b: int
    identical: bool
    max_abs_difference: float | None = None
    relative_error: float | None = None

    @property
    def verdict(self) -> str:
        """One or two words on what was found."""
        if self.dtype_b is None:
            return "only in A"
        if self.dtype_a is None:
            return "only in B"
        if self.identical:
            return "identical"
        if self.shape_a != self.shape_b:
            return f"shapes {_shape_text(self.shape_a)}, {_shape_text(self.shape_b)}"
        return "differs" if self.dtype_a == self.dtype_b else f"{self.dtype_a}, {self.dtype_b}"


class Comparison:
    """Difference of the tensors of two files, as `compare` found it.

    Attributes
    ----------
    rows : tuple of TensorComparison
        In the order of A, then what only B has.
    path_a, path_b : str
    file_bytes_a, file_bytes_b : int
    """

    def __init__(self, rows, *, path_a, path_b, file_bytes_a, file_bytes_b):
        self.rows = tuple(rows)
        self.path_a, self.path_b = path_a, path_b
        self.file_bytes_a, self.file_bytes_b = file_bytes_a, file_bytes_b

    @property
    def identical(self) -> bool:
        """Whether both files have the same names and all tensors are the same bit for bit."""
        return all(row.identical for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values; infinite ones as None."""
        rows = []
        for row in self.rows:
            figures = asdict(row)
            for key in ("max_abs_difference", "relative_error"):
                figures[key] = _finite_or_none(figures[key])
            rows.append(figures | {"verdict": row.verdict})
        return {
            "a": self.path_a,
            "b": self.path_b,
            "file_bytes_a": self.file_bytes_a,
            "file_bytes_b": self.file_bytes_b,
            "identical": self.identical,
            "tensors": rows,
        }

    def to_json(self, path: str | os.PathLike | None = None) -> str:
        """`to_dict` as JSON text, also written to `path` where one is given."""
        return _written(json.dumps(self.to_dict(), indent=2, allow_nan=False), path)

    def _cells(self):
        header = ["tensor", "shape", "A", "B", "max |A − B|", "error", "result"]
        lines = [
            [
                row.name, _shape_text(row.shape_a if row.shape_a is not None else row.shape_b),
                f"{row.bytes_a:,}" if row.dtype_a else "", f"{row.bytes_b:,}" if row.dtype_b else "",
                "" if row.max_abs_difference is None else f"{row.max_abs_difference:.3g}",
                _error_text(row.relative_error), row.verdict,
            ]
            for row in self.rows
        ]
        same = sum(row.identical for row in self.rows)
        lines.append(["files", "", f"{self.file_bytes_a:,}", f"{self.file_bytes_b:,}", "", "",
                      f"{same} of {len(self.rows)} identical"])
        return header, lines

    def _footnotes(self):
        return [f"A: {self.path_a}", f"B: {self.path_b}", "A and B: bytes in the file; error: ‖A − B‖ / ‖A‖"]

    def __str__(self) -> str:
        return "\n".join([_text_table(*self._cells()), *self._footnotes()])

    def _repr_html_(self) -> str:
        return _html_table(*self._cells(), self._footnotes())

    def __repr__(self) -> str:
        same = sum(row.identical for row in self.rows)
        return f"<Comparison of {self.path_a} and {self.path_b}: {same} of {len(self.rows)} tensors identical>"


def compare(a: str | os.PathLike, b: str | os.PathLike) -> Comparison:
    """Compare two files tensor by tensor; each may be a `.skf` or a `.safetensors` file.

    Parameters
    ----------
    a, b : path
        A is the reference of relative errors.

    Returns
    -------
    Comparison

    Raises
    ------
    FormatError
        When a file is damaged or is neither of the two.
    """
    with _File(a) as file_a, _File(b) as file_b:
        rows = [_compared(name, file_a, file_b) for name in dict.fromkeys([*file_a.names, *file_b.names])]
    return Comparison(rows, path_a=os.fspath(a), path_b=os.fspath(b), file_bytes_a=os.path.getsize(a),
                      file_bytes_b=os.path.getsize(b))


def _compared(name, *files):
    """One row of the comparison of two open files."""
    entries = [file.entry(name) if name in file.names else None for file in files]
    shapes = [entry and tuple(entry["shape"]) for entry in entries]
    dtypes = [entry and entry["dtype"] for entry in entries]
    nbytes = [file.nbytes(name) if entry else 0 for entry, file in zip(entries, files)]
    if None in entries or shapes[0] != shapes[1]:
        return TensorComparison(name, *shapes, *dtypes, *nbytes, identical=False)
    arrays = [file.read_array(name) for file in files]
    identical = dtypes[0] == dtypes[1] and _same_bits(*arrays)
    values = [to_float(array, dtype) if is_float(dtype) else array for array, dtype in zip(arrays, dtypes)]
    difference = _difference(*values)
    return TensorComparison(name, *shapes, *dtypes, *nbytes, identical, difference.largest, difference.relative)


def _same_bits(a, b):
    return bool((np.ascontiguousarray(a).reshape(-1).view(np.uint8)
                 == np.ascontiguousarray(b).reshape(-1).view(np.uint8)).all())
