"""`DeepKMeansTraining`: re-training under the k-means penalty, then hard sharing."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from torch import nn

from skfactor.bridge.apply import deep_copy
from skfactor.bridge.layers import entries_of_module
from skfactor.bridge.result import CompressionResult
from skfactor.bridge.rules import TensorEntry, resolve_rules
from skfactor.bridge.training._finish import compress_as_planned
from skfactor.bridge.training.base import TrainingMethod
from skfactor.codec.tensor import Layout
from skfactor.estimators.base import with_kernel_shape
from skfactor.estimators.deep_kmeans import DeepKMeansRegularizer, cluster_penalty, spectral_penalty
from skfactor.exceptions import LayerError

__all__ = ["DeepKMeansTraining"]

_SCHEDULES = ("constant", "linear", "exponential")


@dataclass
class _Clusters:
    """What one weight is pulled to: tensors on its device, and the numpy centres that the next refresh starts from."""

    centers: np.ndarray  # (K, size), the zero centre included
    zero: bool
    labels: torch.Tensor  # (n_samples,) int64
    subspace: torch.Tensor | None  # (n_samples, rank)


class DeepKMeansTraining(TrainingMethod):
    r"""Deep k-Means: train under :math:`\frac{\lambda}{2}\sum\|w_i - c_{a(i)}\|^2`, then share by hard codes.

    Parameters
    ----------
    model : Module
        Copied, never changed.
    rules : DeepKMeansRegularizer or dict
        As in `skfactor.compress`. Layers of a `DeepKMeansRegularizer` are pulled to its clusters; other compressors
        do nothing until `finish`.
    schedule : {"constant", "linear", "exponential"} or callable, default="constant"
        Factor of every :math:`\lambda` in epoch e, counted from 0: 1, `1 + growth * e`, `growth ** e`, or
        `schedule(e)`.
    growth : float, default=1.0

    Attributes
    ----------
    model : Module
        The copy to train.
    epoch : int
        Epochs that `after_epoch` has ended.
    factor : float
        Present factor of every :math:`\lambda`.

    Notes
    -----
    `finish()` before any training is sharing without re-training, the "WR" rows of the paper.

    Examples
    --------
    >>> import torch
    >>> from skfactor import DeepKMeansRegularizer, DeepKMeansTraining
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.LazyLinear(2))
    >>> x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 2
    >>> _ = net(x)
    >>> method = DeepKMeansTraining(net, {"Conv2d": DeepKMeansRegularizer(8, lam=0.1, random_state=0)})
    >>> optimizer = torch.optim.SGD(method.model.parameters(), lr=0.05)
    >>> for epoch in range(2):
    ...     optimizer.zero_grad()
    ...     loss = torch.nn.functional.cross_entropy(method.model(x), y) + method.penalty()
    ...     loss.backward()
    ...     optimizer.step()
    ...     method.after_step()
    ...     method.after_epoch()
    >>> result = method.finish()
    >>> len(result.model[0].weight.reshape(-1, 3).unique(dim=0))
    8
    """

    def __init__(self, model: nn.Module, rules: Any, *, schedule: str | Callable[[int], float] = "constant",
                 growth: float = 1.0):
        if not callable(schedule) and schedule not in _SCHEDULES:
            raise ValueError(f"schedule must be {', '.join(map(repr, _SCHEDULES))} or callable, got {schedule!r}")
        if not growth > 0:
            raise ValueError(f"growth must be positive, got {growth!r}")
        self.schedule, self.growth, self.epoch = schedule, growth, 0
        self.model = deep_copy(model)
        network = entries_of_module(self.model)
        self._plan = resolve_rules(rules, network.entries)
        self._entries = {e.name: e for e in network.entries
                         if isinstance(self._plan.taken.get(e.name), DeepKMeansRegularizer)}
        if not self._entries:
            raise ValueError("rules must give at least one layer a DeepKMeansRegularizer, got none")
        self._weights = {name: network.tensors[name] for name in self._entries}
        self._regularizers, self._clusters = {}, {}
        for name, entry in self._entries.items():
            self._start(name, entry)
        self._warn_of_spectral()

    @property
    def factor(self) -> float:
        if callable(self.schedule):
            return float(self.schedule(self.epoch))
        return {"constant": 1.0, "linear": 1.0 + self.growth * self.epoch,
                "exponential": self.growth**self.epoch}[self.schedule]

    def penalty(self) -> torch.Tensor:
        """Sum of the penalties of all layers, times the present `factor`."""
        total, factor = None, self.factor
        for name, clusters in self._clusters.items():
            regularizer = self._regularizers[name]
            rows = _matrix(self._weights[name], self._entries[name]).reshape(-1, clusters.centers.shape[1])
            lam = regularizer.lam * factor
            if clusters.subspace is not None:
                part = spectral_penalty(rows, clusters.subspace.to(rows), lam)
            else:
                part = cluster_penalty(rows, clusters.labels.to(rows.device), lam, n_clusters=len(clusters.centers),
                                       zero=clusters.zero)
            total = part if total is None else total + part.to(total.device)
        return total

    def after_epoch(self) -> None:
        """Advance the schedule; refresh the clusters of the layers whose `update_every` epochs are over."""
        self.epoch += 1
        for name, regularizer in self._regularizers.items():
            if self.epoch % regularizer.update_every == 0:
                self._refresh(name)

    def finish(self) -> CompressionResult:
        """Hard codes of the weights as they are, Lloyd's iterations started from the present centres."""
        return compress_as_planned(self.model, self._plan, {name: self._warm(name) for name in self._regularizers})

    def state_dict(self) -> dict[str, Any]:
        clusters = {name: {"centers": torch.from_numpy(c.centers), "zero": c.zero, "labels": c.labels,
                           "subspace": c.subspace} for name, c in self._clusters.items()}
        return {"model": self.model.state_dict(), "epoch": self.epoch, "clusters": clusters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state["clusters"]) != set(self._clusters):
            raise ValueError(f"the state has clusters of {sorted(state['clusters'])}, "
                             f"this method of {sorted(self._clusters)}")
        self.model.load_state_dict(state["model"])
        self.epoch = int(state["epoch"])
        for name, c in state["clusters"].items():
            self._clusters[name] = _Clusters(c["centers"].numpy().copy(), bool(c["zero"]), c["labels"].clone(),
                                             None if c["subspace"] is None else c["subspace"].clone())

    def _start(self, name: str, entry: TensorEntry) -> None:
        rule = self._plan.taken[name]
        self._regularizers[name] = with_kernel_shape(rule, _layout(entry).kernel_shape)
        try:
            self._refresh(name)
        except ValueError as error:
            raise LayerError(f"{entry.label} with {' '.join(repr(rule).split())}: {error}") from error

    def _warm(self, name: str) -> DeepKMeansRegularizer:
        """The layer's estimator, which starts from the present centres if there are any."""
        regularizer = clone(self._regularizers[name])
        if name in self._clusters:
            clusters = self._clusters[name]
            centers = clusters.centers[int(clusters.zero) :]
            if len(centers):
                regularizer.set_params(init=centers)
        return regularizer

    def _refresh(self, name: str) -> None:
        weight = self._weights[name].detach()
        fitted = self._warm(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # said once, at the start
            fitted.fit(_matrix(weight, self._entries[name]))
        labels = torch.from_numpy(fitted.labels_.reshape(-1).astype(np.int64)).to(weight.device)
        subspace = None if fitted.subspace_ is None else torch.from_numpy(fitted.subspace_).to(weight.device)
        self._clusters[name] = _Clusters(fitted.cluster_centers_, fitted.zero_threshold_ is not None, labels, subspace)

    def _warn_of_spectral(self) -> None:
        idle = [name for name, c in self._clusters.items() if c.subspace is not None
                and self._regularizers[name].n_clusters >= min(c.centers.shape[1], len(c.labels))]
        if idle:
            names = ", ".join(idle[:3]) + (", ..." if len(idle) > 3 else "")
            warnings.warn(f"relaxation='spectral' does nothing for {len(idle)} of {len(self._clusters)} layers "
                          f"({names}): the relaxed penalty is identically zero where n_clusters is at least the length "
                          "of a sample; relaxation=None has the penalty that it relaxes", UserWarning, stacklevel=3)


def _layout(entry: TensorEntry) -> Layout:
    return entry.layout or Layout.rows_first(entry.shape)


def _matrix(weight: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    """`Layout.to_matrix` of a live tensor; differentiable, in float32 at least."""
    layout = _layout(entry)
    if layout.view is not None:
        weight = weight.reshape(layout.view)
    if layout.axes is not None:
        weight = weight.permute(layout.axes)
    weight = weight.reshape(layout.n_rows, -1)
    return weight if weight.dtype == torch.float64 else weight.float()
