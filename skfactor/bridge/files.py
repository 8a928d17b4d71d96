"""File to file: .safetensors to .skf and back, one tensor at a time, without torch and without the model's class."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from os import PathLike
from typing import Any

from joblib import Parallel, effective_n_jobs
from tqdm.auto import tqdm

from skfactor.bridge.assumed import ASSUMED, assumed_side
from skfactor.bridge.fitting import Job, TensorRecord, fit_jobs, raw_record
from skfactor.bridge.result import Source
from skfactor.bridge.rules import Alias, Plan, TensorEntry, resolve_rules
from skfactor.codec.container import SkfFile, SkfWriter
from skfactor.codec.dtypes import is_float
from skfactor.codec.safetensors_io import SafetensorsReader, write_safetensors
from skfactor.codec.tensor import RawTensor

__all__ = ["FileResult", "compress_file", "decompress_file", "file_source"]


@dataclass(frozen=True)
class FileResult:
    """What `compress_file` did.

    Attributes
    ----------
    path : str or PathLike
        The file written.
    records : list of TensorRecord
        Facts of every tensor, in the order of the file.
    skipped : dict of str to str
        Tensors that are stored losslessly, with the reason.
    """

    path: str | PathLike
    records: list[TensorRecord]
    skipped: dict[str, str]


def file_source(reader: SafetensorsReader) -> Source:
    """Tensors of an open file: floats of at least two dimensions are weights, rows on the first axis."""
    entries = [_entry(name, tuple(reader.shape(name)), reader.dtype(name)) for name in reader.names]
    return Source(entries, {e.name: e.name for e in entries}, reader.read)


def _entry(name: str, shape: tuple[int, ...], dtype: str) -> TensorEntry:
    unfit = "" if is_float(dtype) else f"{dtype} tensor: no floating-point values to compress"
    if not unfit and 0 in shape:
        unfit = "empty tensor"
    return TensorEntry((Alias(name, (), "weight" if len(shape) >= 2 else "vector"),), shape, dtype, unfit=unfit)


def compress_file(src: str | PathLike, dst: str | PathLike, rules: Any, *, calibration: str | None = None,
                  n_jobs: int | None = None, progress: bool = True,
                  metadata: dict[str, Any] | None = None) -> FileResult:
    """Compress a .safetensors file into a .skf file.

    At most `n_jobs` tensors are in memory at a time.

    Parameters
    ----------
    src : str or PathLike
        A .safetensors file.
    dst : str or PathLike
        The .skf file to write; one already there is replaced only once the new one is complete.
    rules : estimator, Pipeline or dict
        As in `skfactor.compress`; a file has names only, so there are no rules by module type.
    calibration : "assumed" or None, default=None
        "assumed": codes are chosen for the outputs of layers with inputs as `skfactor.compress` assumes them.
    n_jobs : int, default=None
        Tensors fitted at a time, through joblib.
    progress : bool, default=True
        Show a progress bar when the output is a terminal.
    metadata : dict, default=None
        JSON values, stored in the file beside the metadata of `src`.

    Returns
    -------
    result : FileResult

    Raises
    ------
    FormatError
        `src` is damaged or is not a .safetensors file.
    LayerError
        A tensor cannot be compressed; `dst` is as it was.
    """
    if calibration not in (None, ASSUMED):
        raise ValueError(f"calibration of a file must be {ASSUMED!r} or None, got {calibration!r}")
    side = assumed_side if calibration else None
    with SafetensorsReader(src) as reader:
        source = file_source(reader)
        plan = resolve_rules(rules, source.entries)
        with SkfWriter(dst, metadata=reader.metadata | (metadata or {})) as writer:
            records = list(_write_all(writer, source, plan, side, n_jobs, progress))
    return FileResult(dst, records, plan.skipped)


def _write_all(writer: SkfWriter, source: Source, plan: Plan, side: Callable | None, n_jobs: int | None,
               progress: bool) -> Iterator[TensorRecord]:
    """Store tensor after tensor in the order of the source; fits run in batches of as many as there are workers."""
    size = effective_n_jobs(n_jobs)
    waiting = iter(source.entries)
    bar = tqdm(total=len(source.entries), disable=None if progress else True, unit="tensor", desc="compress")
    with Parallel(n_jobs=n_jobs) as parallel, bar:
        while batch := list(islice(waiting, size)):
            jobs = [Job(e, plan.taken[e.name], lambda name=e.name: source.read(name), side(e) if side else {},
                        keep_estimator=False)
                    for e in batch if e.name in plan.taken]
            fitted = {f.record.name: f for f in fit_jobs(jobs, progress=False, parallel=parallel)}
            for entry in batch:
                if entry.name in plan.taken:
                    done = fitted.pop(entry.name)
                    writer.add(entry.name, done.tensor)
                    yield done.record
                    del done
                else:
                    writer.add(entry.name, RawTensor(source.read(entry.name), entry.dtype))
                    yield raw_record(entry, plan.skipped[entry.name])
                bar.update()


def decompress_file(src: str | PathLike, dst: str | PathLike) -> None:
    """Restore a .skf file to a .safetensors file, one tensor at a time; every tied name is written with its values.

    Parameters
    ----------
    src : str or PathLike
        A .skf file.
    dst : str or PathLike
        The .safetensors file to write; one already there is replaced only once the new one is complete.

    Raises
    ------
    FormatError
        `src` is damaged or is not a .skf file.
    """
    with SkfFile(src) as file:
        entries = {name: file.entry(name) for name in file.names}
        tensors = [(n, e["dtype"], tuple(e["shape"]), partial(file.read_array, n)) for n, e in entries.items()]
        texts = {k: v for k, v in file.metadata.items() if isinstance(v, str)}
        write_safetensors(dst, tensors, metadata=texts)
