"""Which decomposition each convolution gets: all formats at one share of the parameters, by error and latency."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.base import clone
from torch import nn

from skfactor.bridge.apply import compress
from skfactor.codec.tensor import CompressedTensor
from skfactor.estimators import CoupledCPDFactorizer, CPDFilterPruner, SeparableFactorizer, TuckerFactorizer
from skfactor.report.tables import text_table
from skfactor.solvers.knapsack import choose

__all__ = ["FormatChoice", "LayerFormat", "choose_formats"]

#: name -> estimator, which gets the share of the parameters as its `rank`
FORMATS = {
    "CP": CPDFilterPruner(),
    "coupled CP": CoupledCPDFactorizer(),
    "spatially separable": SeparableFactorizer(),
    "Tucker-2": TuckerFactorizer(),
    "depthwise separable": SeparableFactorizer(kind="depthwise"),
}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LayerFormat:
    """One layer in one format.

    Attributes
    ----------
    tensor : str
        Name of the weight.
    format : str
    share : float
        Numbers that are stored, relative to those of the weight.
    error : float
        Relative squared error of the layer's output with calibration, otherwise of the weight.
    seconds, seconds_dense : float
        Of the fastest form of this format, and of the dense layer: of all calls in one forward pass. A chain that is
        slower than the dense layer runs dense.
    form : str
    chosen : bool
    """

    tensor: str
    format: str
    share: float
    error: float
    seconds: float
    seconds_dense: float
    form: str = ""
    chosen: bool = False


@dataclass(frozen=True)
class FormatChoice:
    """Result of `choose_formats`.

    Attributes
    ----------
    rules : dict of str to estimator
        For `skfactor.compress`, best with ``mode="factorized", execute="auto"``: a format for every layer that has one
        within the budget, None for all else.
    rows : list of LayerFormat
        Every layer in every format that keeps to the budget.
    """

    rules: dict[str, Any]
    rows: list[LayerFormat]

    def __str__(self):
        cells = [(r.tensor, r.format, f"{r.share:.2f}", f"{r.error:.4f}", f"{1e3 * r.seconds:.2f}",
                  f"{1e3 * r.seconds_dense:.2f}", "*" if r.chosen else "") for r in self.rows]
        return text_table(["tensor", "format", "share", "error", "ms", "ms dense", "chosen"], cells)


def choose_formats(model: nn.Module, budget: float = 0.5, *, calibration: Any = None, example_inputs: Any = None,
                   max_latency: float | None = None, formats: Mapping[str, Any] | None = None,
                   n_jobs: int | None = None, progress: bool = True) -> FormatChoice:
    """Choose a decomposition for each convolution among several, at a given share of its parameters.

    Every layer is fitted in every format, all exact forms of the format are measured on this machine, and the fastest
    counts. Formats that cannot keep to the budget are left out, and so are layers of one pixel.

    Parameters
    ----------
    model : Module
        Never changed.
    budget : float, default=0.5
        Share of the numbers of every weight that codes and decoder may hold together.
    calibration : default=None
        Unlabelled inputs as for `skfactor.compress`: errors are those of the layers' outputs, and all formats are
        fitted to these.
    example_inputs : default=None
        What is measured with; the first calibration batch when None.
    max_latency : float, default=None
        Share of the dense convolutions' time that all of them may take together: the formats are then those of the
        least sum of errors within it. None: every layer has the format of least error among those that run faster than
        the dense layer, or of all formats where none does.
    formats : dict of str to estimator, default=None
        Estimators with the parameter `rank`, which is set to `budget`. CP, coupled CP, spatially separable, Tucker-2
        and depthwise separable when None.
    n_jobs, progress
        As in `skfactor.compress`.

    Returns
    -------
    choice : FormatChoice

    Raises
    ------
    ValueError
        A network without convolutions of several pixels, or a latency that no formats reach.

    Examples
    --------
    >>> import torch, skfactor
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3))
    >>> choice = skfactor.choose_formats(net, 0.5, example_inputs=torch.randn(1, 16, 12, 12), progress=False)
    >>> sorted(choice.rules)
    ['*', '0', '2']
    >>> result = skfactor.compress(net, choice.rules, progress=False)
    """
    if not isinstance(budget, (int, float)) or not 0 < budget <= 1:
        raise ValueError(f"budget must be a share of the parameters in (0, 1], got {budget!r}")
    names = [name for name, m in model.named_modules() if isinstance(m, _CONVOLUTIONS) and math.prod(m.kernel_size) > 1]
    if not names:
        raise ValueError("choose_formats needs a network with convolutions of more than one pixel, got none")
    estimators = {name: clone(e).set_params(rank=float(budget)) for name, e in (formats or FORMATS).items()}
    rows: dict[str, list[LayerFormat]] = {}
    for name, estimator in estimators.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="rank .* does not pay")  # it is over the budget, then
            result = compress(model, {**dict.fromkeys(names, estimator), "*": None}, calibration=calibration,
                              mode="factorized", execute="auto", example_inputs=example_inputs, n_jobs=n_jobs,
                              progress=progress)
        for row in _rows(result, name):
            if row.share <= budget * (1 + 1e-9):
                rows.setdefault(row.tensor, []).append(row)
    chosen = _least_errors(rows) if max_latency is None else _within(rows, max_latency)
    layers = {f"{name}.weight" if name else "weight": name for name in names}
    rules = {layers[tensor]: estimators[rows[tensor][i].format] for tensor, i in chosen.items() if tensor in layers}
    listed = [LayerFormat(**(vars(row) | {"chosen": i == chosen[tensor]}))
              for tensor, found in rows.items() for i, row in enumerate(found)]
    return FormatChoice({**rules, "*": None}, listed)


def _rows(result, name) -> list[LayerFormat]:
    """All layers of one format; those that were not measured, since nothing calls them, are left out."""
    errors = {r.name: r.relative_error if r.output_error is None else r.output_error for r in result.records}
    rows = []
    for e in result.executions:
        dense = e.seconds_dense
        if dense is not None:
            seconds = min(e.seconds_factorized, dense)
            rows.append(LayerFormat(e.tensor, name, _share(result.tensors[e.tensor]), errors[e.tensor], seconds, dense,
                                    e.form))
    return rows


def _share(tensor: CompressedTensor) -> float:
    """Numbers of codes and decoders relative to those of the weight; the zeros of other clusters are not stored."""
    arrays = sum(array.size for decoder in tensor.decoders for array in decoder.parts()[1].values())
    return (arrays + np.count_nonzero(tensor.codes)) / math.prod(tensor.shape)


def _least_errors(rows: Mapping[str, list[LayerFormat]]) -> dict[str, int]:
    chosen = {}
    for tensor, found in rows.items():
        faster = [i for i, row in enumerate(found) if row.seconds < row.seconds_dense]
        chosen[tensor] = min(faster or range(len(found)), key=lambda i: found[i].error)
    return chosen


def _within(rows: Mapping[str, list[LayerFormat]], max_latency: float) -> dict[str, int]:
    """Least sum of errors within a share of the dense time: a knapsack over the layers."""
    dense = sum(found[0].seconds_dense for found in rows.values())
    least = sum(min(row.seconds for row in found) for found in rows.values())
    costs = [np.array([row.error for row in found]) for found in rows.values()]
    weights = [np.array([row.seconds for row in found]) for found in rows.values()]
    choice = choose(costs, weights, max_latency * dense)
    if choice is None:
        raise ValueError(f"max_latency must be at least {least / dense:.3f} for these formats and this budget, "
                         f"got {max_latency}")
    return dict(zip(rows, map(int, choice.index), strict=True))
