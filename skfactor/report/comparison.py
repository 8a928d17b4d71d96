"""`compare`: the difference of the tensors of two files."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from skfactor.codec.dtypes import is_float, to_float
from skfactor.report.files import TensorFile, difference_of
from skfactor.report.tables import error_text, finite_or_none, html_table, shape_text, text_table, written

__all__ = ["Comparison", "TensorComparison", "compare"]


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
            return f"shapes {shape_text(self.shape_a)}, {shape_text(self.shape_b)}"
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
                figures[key] = finite_or_none(figures[key])
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
        return written(json.dumps(self.to_dict(), indent=2, allow_nan=False), path)

    def _cells(self):
        header = ["tensor", "shape", "A", "B", "max |A − B|", "error", "result"]
        lines = [
            [
                row.name, shape_text(row.shape_a if row.shape_a is not None else row.shape_b),
                f"{row.bytes_a:,}" if row.dtype_a else "", f"{row.bytes_b:,}" if row.dtype_b else "",
                "" if row.max_abs_difference is None else f"{row.max_abs_difference:.3g}",
                error_text(row.relative_error), row.verdict,
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
        return "\n".join([text_table(*self._cells()), *self._footnotes()])

    def _repr_html_(self) -> str:
        return html_table(*self._cells(), self._footnotes())

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
    with TensorFile(a) as file_a, TensorFile(b) as file_b:
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
    difference = difference_of(*values)
    return TensorComparison(name, *shapes, *dtypes, *nbytes, identical, difference.largest, difference.relative)


def _same_bits(a, b):
    return bool((np.ascontiguousarray(a).reshape(-1).view(np.uint8)
                 == np.ascontiguousarray(b).reshape(-1).view(np.uint8)).all())
