"""Fit one estimator per tensor, many tensors at once: the part of the bridge that joblib spreads over workers."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import pickle
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from skfactor.bridge.rules import TensorEntry
from skfactor.codec.dtypes import from_float, itemsize, to_float
from skfactor.codec.tensor import CompressedTensor, Layout
from skfactor.estimators.base import compressed_tensor, fit_chain, steps_of, with_kernel_shape
from skfactor.exceptions import LayerError

__all__ = ["Fitted", "Job", "TensorRecord", "fit_jobs", "raw_record", "relative_error", "squared_norm"]


@dataclass(frozen=True)
class TensorRecord:
    """What is known of one tensor after compression, in plain JSON values.

    Attributes
    ----------
    name : str
    tied_to : tuple of str
        Its other names.
    type : str
        Class of the module, "buffer", or "tensor" where there are no modules.
    shape : tuple of int
    dtype : str
    n_params, bytes_before : int
        Elements, and bytes as they are in a plain state dict.
    estimator : str or None
        Estimator with its parameters; None when stored losslessly.
    relative_error : float
        ‖W − Ŵ‖² / ‖W‖² of what is stored, after the cast to the tensor's dtype (0 when lossless).
    squared_norm : float or None
        ‖W‖², which weighs the relative error in a total; None when lossless.
    output_error : float or None
        tr((W−Ŵ) G (W−Ŵ)ᵀ) / tr(W G Wᵀ) with the second moment G of the layer's inputs, when there was one.
    kappa : float or None
        The estimator's compression factor `1 - K/N`, where it has one.
    n_clusters : int or None
        Values of one code, where codes are integers.
    seconds : float
        Wall time of fit and transform.
    info : dict
        Of the fitted steps: `n_iter`, `inertia`, `lower_bound`, as far as they have them.
    skipped : str or None
        Why it is stored losslessly.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    dtype: str
    n_params: int
    bytes_before: int
    tied_to: tuple[str, ...] = ()
    estimator: str | None = None
    relative_error: float = 0.0
    squared_norm: float | None = None
    output_error: float | None = None
    kappa: float | None = None
    n_clusters: int | None = None
    seconds: float = 0.0
    info: dict[str, Any] = field(default_factory=dict)
    skipped: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of all fields."""
        return asdict(self)


def raw_record(entry: TensorEntry, reason: str | None) -> TensorRecord:
    """Record of a tensor that is stored losslessly."""
    n_params = int(np.prod(entry.shape, dtype=np.int64))
    return TensorRecord(entry.name, entry.type_name, entry.shape, entry.dtype, n_params,
                        n_params * itemsize(entry.dtype), tuple(a.name for a in entry.aliases[1:]), skipped=reason)


@dataclass(frozen=True)
class Job:
    """One tensor to fit: numpy and an estimator only, so that any worker can take it.

    `read` gives the array of bits; it is called where the job is dispatched, so that only the tensors in flight are
    in memory. `side` holds the optional fit parameters sample_weight, importance and input_gram.
    """

    entry: TensorEntry
    estimator: Any
    read: Callable[[], np.ndarray]
    side: dict[str, np.ndarray] = field(default_factory=dict)
    keep_estimator: bool = True


@dataclass(frozen=True)
class Fitted:
    """Result of one job; the fitted estimator, which may be as large as the tensor, where the job asked for it."""

    tensor: CompressedTensor
    estimator: Any
    record: TensorRecord


@dataclass(frozen=True)
class _Item:
    """What a worker needs of a job; no classes of the user's modules, so that workers need not import them."""

    label: str
    layout: Layout
    record: TensorRecord
    keep_estimator: bool

    @classmethod
    def of(cls, job: Job) -> _Item:
        entry = job.entry
        layout = entry.layout or Layout.rows_first(entry.shape)
        return cls(entry.label, layout, raw_record(entry, None), job.keep_estimator)


@dataclass(frozen=True)
class _Outcome:
    """What comes back from a worker: the result or the error, and the warnings."""

    result: Fitted | None
    error: Exception | None
    warnings: list[tuple[str, type[Warning]]]


def fit_jobs(jobs: Iterable[Job], n_jobs: int | None = None, progress: bool = True, total: int | None = None,
             parallel: Parallel | None = None) -> Iterator[Fitted]:
    """Fit all jobs through joblib and give the results in the order of the jobs.

    Every fit runs with one BLAS thread, in the calling process as in a worker, so that the result does not depend
    on `n_jobs` or the backend.

    Raises
    ------
    LayerError
        The first job that failed, with its layer, estimator and the original error as cause.
    """
    parallel = parallel or _parallel(n_jobs)
    bar = tqdm(total=total, disable=None if progress else True, unit="tensor", desc="compress")
    with threadpool_limits(1), bar:
        calls = (delayed(_fit_one)(_Item.of(job), job.estimator, job.read(), job.side) for job in jobs)
        outcomes = _run(parallel, calls, bar)
        for outcome in outcomes:
            for message, category in outcome.warnings:
                warnings.warn(message, category, stacklevel=3)
            if outcome.error is not None:
                _cancel(outcomes)
                raise LayerError(str(outcome.error)) from outcome.error.__cause__
            yield outcome.result


def _parallel(n_jobs: int | None) -> Parallel:
    """Results one by one, for the progress bar, where the backend can; all at the end where it cannot."""
    try:
        return Parallel(n_jobs=n_jobs, return_as="generator")
    except ValueError:
        return Parallel(n_jobs=n_jobs)


def _run(parallel, calls, bar):
    """Outcomes in order, the bar moving as they arrive where the backend can tell."""
    if parallel.return_generator:
        for outcome in parallel(calls):
            bar.update()
            yield outcome
    else:
        outcomes = parallel(calls)
        bar.update(len(outcomes))
        yield from outcomes


def _cancel(outcomes: Iterator[_Outcome]) -> None:
    """Stop the other fits; that joblib cancels them is no news beside the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        outcomes.close()


def _fit_one(item: _Item, estimator: Any, bits: np.ndarray, side: dict[str, np.ndarray]) -> _Outcome:
    """Worker: clone, fit, encode, measure. Takes and returns numpy and estimators only."""
    with threadpool_limits(1), _captured_warnings() as caught:
        try:
            result, error = _fit(item, estimator, bits, side), None
        except Exception as cause:
            result, error = None, _layer_error(item, estimator, cause)
    return _Outcome(result, error, [(f"{item.label}: {w.message}", w.category) for w in caught])


def _layer_error(item: _Item, estimator: Any, cause: Exception) -> Exception:
    """The error of one layer, with a cause that any worker can send back."""
    message = f"{item.label} with {_one_line(estimator)}: {str(cause) or type(cause).__name__}"
    try:
        pickle.loads(pickle.dumps(cause))
    except Exception:
        cause = RuntimeError(f"{type(cause).__name__}: {cause}")
    return _PortableError(message, cause)


class _PortableError(Exception):
    """Carries the cause of an error through pickling, which drops `__cause__`."""

    def __init__(self, message: str, cause: Exception):
        super().__init__(message, cause)
        self.__cause__ = cause

    def __str__(self) -> str:
        return self.args[0]


def _one_line(estimator: Any) -> str:
    """Estimator with the parameters that are not the default, on one line."""
    return " ".join(repr(estimator).split())


def _fit(item: _Item, estimator: Any, bits: np.ndarray, side: dict[str, np.ndarray]) -> Fitted:
    layout, shape, dtype = item.layout, item.record.shape, item.record.dtype
    X = layout.to_matrix(_floats(bits, dtype))
    _check_finite(X, layout, shape)
    start = time.perf_counter()
    fitted = fit_chain(with_kernel_shape(estimator, layout.kernel_shape), X, **side)
    tensor = compressed_tensor(fitted, X, shape=shape, dtype=dtype, layout=layout)
    kappa = getattr(steps_of(fitted)[-1][1], "kappa_", None)
    record = replace(
        item.record, estimator=_one_line(estimator), kappa=None if kappa is None else float(kappa),
        n_clusters=tensor.decoders[-1].code_hints().get("n_symbols"), seconds=time.perf_counter() - start,
        info=_fit_info(fitted),
    )
    kept = fitted if item.keep_estimator else None
    del fitted  # before the reconstruction: its labels may be as large as the tensor
    error, output_error = _errors(tensor, X, dtype, side.get("input_gram"))
    record = replace(record, relative_error=error, squared_norm=squared_norm(X), output_error=output_error)
    return Fitted(tensor, kept, record)


def _floats(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Values of an array of bits without a copy where the bits are the values."""
    return bits if dtype in ("float32", "float64") else to_float(bits, dtype)


def _check_finite(X: np.ndarray, layout: Layout, shape: tuple[int, ...]) -> None:
    if np.isfinite(X.sum(dtype=np.float64)):
        return
    bad = ~np.isfinite(X)
    if bad.any():
        first = np.unravel_index(int(layout.to_tensor(bad, shape).argmax()), shape)
        raise ValueError(f"weights must be finite, got {int(bad.sum())} NaN or infinite values, "
                         f"the first at index {tuple(map(int, first))}")


def _errors(tensor: CompressedTensor, X: np.ndarray, dtype: str, gram: np.ndarray | None) -> tuple:
    """Relative error and output error of what is stored; without a second matrix where rows can be decoded alone."""
    decode_rows = getattr(tensor.decoders[0], "decode_rows", None)
    if gram is not None or decode_rows is None or len(tensor.decoders) > 1 or tensor.layout.zero_rows:
        X_hat = _as_stored(tensor.to_matrix(), dtype)
        return relative_error(X, X_hat), _output_error(X, X_hat, gram)
    error = 0.0
    for rows in _row_blocks(X):
        x = X[rows].astype(np.float64)
        error += _square_sum(x - _as_stored(decode_rows(tensor.codes, rows.start, rows.start + len(x)), dtype))
    total = squared_norm(X)
    return error / total if total > 0 else error, None


def _as_stored(X_hat: np.ndarray, dtype: str) -> np.ndarray:
    """The reconstruction after the cast to the tensor's dtype."""
    if X_hat.dtype.name != dtype:
        X_hat = to_float(from_float(X_hat, dtype), dtype)
    _check_reconstruction(X_hat)
    return X_hat


def _check_reconstruction(X_hat: np.ndarray) -> None:
    if not np.isfinite(X_hat.sum(dtype=np.float64)) and not np.isfinite(X_hat).all():
        raise ValueError("the reconstruction overflows the tensor's dtype")


def _row_blocks(X: np.ndarray) -> Iterator[slice]:
    """Slices of rows of at most 2^20 elements, so that a measure in float64 stays small."""
    step = max(1, (1 << 20) // max(1, X.shape[1]))
    return (slice(i, i + step) for i in range(0, len(X), step))


def relative_error(X: np.ndarray, X_hat: np.ndarray) -> float:
    """‖X − X̂‖² / ‖X‖², summed in float64 without a float64 copy of either; ‖X̂‖² when X is zero."""
    error = sum(_square_sum(X[rows].astype(np.float64) - X_hat[rows]) for rows in _row_blocks(X))
    total = squared_norm(X)
    return error / total if total > 0 else error


def squared_norm(X: np.ndarray) -> float:
    """‖X‖², summed in float64 without a float64 copy."""
    return sum(_square_sum(X[rows].astype(np.float64)) for rows in _row_blocks(X))


def _square_sum(block: np.ndarray) -> float:
    return float(np.einsum("ij,ij->", block, block))  # no BLAS: its threads cost more than they give here


def _output_error(X: np.ndarray, X_hat: np.ndarray, gram: np.ndarray | None) -> float | None:
    """tr(E G Eᵀ) / tr(X G Xᵀ); `gram` is (d, d), or (g, d, d) with one for each of g blocks of rows."""
    if gram is None:
        return None
    grams = gram[None] if gram.ndim == 2 else gram
    error = total = 0.0
    for G, x, x_hat in zip(grams, np.split(X, len(grams)), np.split(X_hat, len(grams)), strict=True):
        for rows in _row_blocks(x):
            w = x[rows].astype(np.float64)
            e = w - x_hat[rows]
            error, total = error + float(((e @ G) * e).sum()), total + float(((w @ G) * w).sum())
    return error / total if total > 0 else error


def _fit_info(fitted: Any) -> dict[str, Any]:
    """Scalars that tell how the fit went, by step when there is more than one."""
    steps = steps_of(fitted)
    info = {}
    for name, step in steps:
        for key in ("n_iter_", "inertia_", "lower_bound_"):
            value = getattr(step, key, None)
            if np.isscalar(value) and np.isreal(value):
                info[(f"{name}." if len(steps) > 1 else "") + key.rstrip("_")] = np.asarray(value).item()
    return info


class _WarningRouter:
    """Lists of the warnings raised in each thread.

    The filters and `showwarning` belong to the process, so `warnings.catch_warnings` in several threads at once
    restores them in the wrong order. Here they are replaced by the first thread that enters, put back by the last
    that leaves, and each thread's warnings go to its own list; threads that did not enter keep the old display.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._users = 0
        self._own = threading.local()
        self._saved: Any = None
        self._show: Any = None

    def __getstate__(self):
        return {}

    @contextmanager
    def capture(self):
        caught, outer = [], getattr(self._own, "caught", None)
        with self._lock:
            if self._users == 0:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                self._show = warnings.showwarning
                warnings.showwarning = self._route
                warnings.simplefilter("always")
            self._users += 1
        self._own.caught = caught
        try:
            yield caught
        finally:
            self._own.caught = outer
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._saved.__exit__(None, None, None)

    def _route(self, message, category, filename, lineno, file=None, line=None):
        caught = getattr(self._own, "caught", None)
        if caught is None:
            self._show(message, category, filename, lineno, file, line)
        else:
            caught.append(warnings.WarningMessage(message, category, filename, lineno, file, line))


_ROUTER = _WarningRouter()


def _captured_warnings():
    return _ROUTER.capture()
