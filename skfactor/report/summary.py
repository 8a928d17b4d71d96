"""`Report`: the table of the tensors of a result or of a file."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import contextlib
import html
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from skfactor.report.execution import FACTORIZED, LayerExecution, NetworkCost, execution_cells, execution_footnotes
from skfactor.report.files import TensorFile
from skfactor.report.rows import TensorReport, tensor_report
from skfactor.report.tables import (
    error_text,
    finite_or_none,
    html_table,
    kappa_text,
    number,
    percent,
    ratio_text,
    shape_text,
    text_table,
    written,
)

__all__ = ["Report"]


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
    layers : tuple of LayerExecution
        How the compressed layers run; empty where all run as they did.
    cost : NetworkCost or None
        Parameters, multiplications and latency of one forward pass, where they were measured.
    factorized : tuple of str
        Tensors of a file whose layers `load_into` makes run factorised.
    """

    def __init__(
        self,
        rows: Iterable[TensorReport],
        *,
        overhead: int = 0,
        ties: Mapping[str, str] | None = None,
        source: str = "encoded",
        path: str | None = None,
        layers: Iterable[LayerExecution] = (),
        cost: NetworkCost | None = None,
        factorized: Iterable[str] = (),
    ):
        self.rows = tuple(rows)
        self.overhead = int(overhead)
        self.ties = dict(ties or {})
        self.source = source
        self.path = path
        self.layers = tuple(layers)
        self.cost = cost
        self.factorized = tuple(factorized)

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
        with TensorFile(path) as file, no_file if original is None else TensorFile(original) as reference:
            names = [name for name in file.names if name not in file.ties]
            rows = [tensor_report(file, name, reference, records.get(name), detail) for name in names]
            ties, metadata = dict(file.ties), file.metadata
        overhead = os.path.getsize(path) - sum(row.bytes_after for row in rows)
        listed = metadata.get(FACTORIZED, []) if isinstance(metadata.get(FACTORIZED, []), list) else []
        return cls(rows, overhead=overhead, ties=ties, source="file", path=os.fspath(path),
                   factorized=[name for name in names if name in listed])

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
        return cls(written.rows, overhead=written.overhead, ties=written.ties, layers=result.executions,
                   cost=result.cost)

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
            "total": total | {"relative_error": finite_or_none(total["relative_error"])},
            "layers": [layer.to_dict() for layer in self.layers],
            "factorized": list(self.factorized),
            "cost": None if self.cost is None else self.cost.to_dict(),
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
            "relative_error": finite_or_none(row.relative_error),
            "output_error": finite_or_none(row.output_error),
            "kappa": row.kappa,
            "method": row.method,
            "coder": row.coder,
            "note": row.note,
            "coded_bytes": row.coded_bytes,
        }

    def to_json(self, path: str | os.PathLike | None = None) -> str:
        """`to_dict` as JSON text, also written to `path` where one is given."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        return written(text, path)

    def to_frame(self):
        """One row per tensor and one for the overhead as a `pandas.DataFrame` indexed by name.

        The column `bytes_after` sums to the size of the file. Where layers run factorised, columns tell how; the cost
        of the whole network, where it was measured, is in `frame.attrs["cost"]`.
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
        if self.layers:
            runs = {layer.tensor: layer.to_dict() for layer in self.layers}
            rows = [row | {key: value for key, value in runs.get(row["name"], {}).items() if key != "tensor"}
                    for row in rows]
        frame = pd.DataFrame([*rows, overhead]).set_index("name")
        if self.cost is not None:
            frame.attrs["cost"] = self.cost.to_dict()
        return frame

    def to_html(self, path: str | os.PathLike | None = None) -> str:
        """A whole HTML page with the table, also written to `path` where one is given."""
        title = "skfactor report" + (f": {os.path.basename(self.path)}" if self.path else "")
        page = (
            '<!doctype html>\n<html lang="en">\n'
            f'<head><meta charset="utf-8"><title>{html.escape(title)}</title></head>\n'
            f'<body style="font-family: sans-serif; margin: 2em">\n<h1 style="font-size: 1.3em">{html.escape(title)}'
            f"</h1>\n{self._repr_html_()}\n</body>\n</html>\n"
        )
        return written(page, path)

    def _repr_html_(self) -> str:
        return "\n".join(html_table(*table) for table in self._tables())

    def _tables(self):
        """(header, lines, footnotes) of the table of sizes and, where there are any, of layers and of the cost."""
        yield *self._cells(), self._footnotes()
        if self.layers:
            yield *execution_cells(self.layers), execution_footnotes(self.layers)
        if self.cost is not None:
            yield *self.cost.cells(), self.cost.footnotes()

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
        return text_table(header, lines)

    def __str__(self) -> str:
        return "\n\n".join("\n".join([text_table(header, lines), *notes]) for header, lines, notes in self._tables())

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
            share = percent(self.overhead / all_bytes)
            lines.append(["(overhead)", "", "", "", "", f"{self.overhead:,}", "", share, *filler])
        rest = [error_text(total["relative_error"]), *filler[1:]]
        lines.append([
            "total", "", f"{total['parameters']:,}", number(total["bits_per_weight"]), f"{total['bytes_before']:,}",
            f"{all_bytes:,}", ratio_text(total["ratio"]), "100 %" if all_bytes else "", *rest,
        ])
        return [title for title, _ in columns], lines

    def _footnotes(self):
        notes = [f"{name} is tied to {other} and stored once" for name, other in self.ties.items()]
        if self.factorized:
            notes.append(f"load_into runs {len(self.factorized)} layers factorised: {_some(self.factorized)}")
        by_reason = {}
        for row in self.rows:
            if row.note:
                by_reason.setdefault(row.note, []).append(row.name)
        for reason, names in by_reason.items():
            notes.append(f"lossless: {_some(names)} ({reason})")
        if any(row.output_error is not None for row in self.rows):
            notes.append("error: of the weights; output error: of the layer's output on the calibration data")
        if any(row.coded_bytes for row in self.rows):
            notes.append("fixed, Huffman, entropy and stored: bytes of the codes alone; entropy is of order 0")
        where = f"the file {self.path}" if self.source == "file" else "encoding the tensors; there is no file yet"
        return [*notes, f"bytes: from {where}"]


def _some(names):
    """The first names, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _flat_coded_bytes(coded_bytes):
    """Columns of a data frame: codes_fixed, codes_huffman, codes_stored, codes_entropy."""
    return {f"codes_{key.lower()}": size for key, size in (coded_bytes or {}).items()}


def _coded_text(key):
    def text(row, _):
        size = (row.coded_bytes or {}).get(key)
        return "" if size is None else f"{math.ceil(size):,}"

    return text


#: title and text of every column; the first eight are also filled for the overhead and the total
_COLUMNS = (
    ("tensor", lambda row, _: row.name),
    ("shape", lambda row, _: "" if row.shape is None else shape_text(row.shape)),
    ("weights", lambda row, _: f"{row.parameters:,}"),
    ("bits/weight", lambda row, _: number(row.bits_per_weight)),
    ("before", lambda row, _: f"{row.bytes_before:,}"),
    ("after", lambda row, _: f"{row.bytes_after:,}"),
    ("ratio", lambda row, _: ratio_text(row.ratio)),
    ("share", lambda row, all_bytes: percent(row.bytes_after / all_bytes if all_bytes else None)),
    ("error", lambda row, _: error_text(row.relative_error)),
    ("output error", lambda row, _: error_text(row.output_error)),
    ("κ", lambda row, _: kappa_text(row.kappa)),
    ("method", lambda row, _: row.method),
    ("coder", lambda row, _: row.coder),
)
_DETAIL_COLUMNS = tuple((title, _coded_text(title)) for title in ("fixed", "Huffman", "entropy", "stored"))
_N_COMMON = 8
_MOST_LOSSLESS = 8
