"""`CompressionResult`: what came out of a compression, in memory, how it is made and how it is saved."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from skfactor.bridge.fitting import Fitted, Job, TensorRecord, fit_jobs, raw_record
from skfactor.bridge.rules import Plan, TensorEntry
from skfactor.codec.container import SkfWriter
from skfactor.codec.tensor import CompressedTensor, RawTensor
from skfactor.report import FACTORIZED, REMOVED, LayerExecution, NetworkCost, Report

if TYPE_CHECKING:
    import torch

__all__ = ["CompressionResult", "Source", "assemble", "compress_source"]


@dataclass(frozen=True)
class Source:
    """Tensors to compress, wherever they come from.

    Attributes
    ----------
    entries : list of TensorEntry
        Some may stand for weights that are not stored (those with a `refusal`).
    names : dict of str to str
        Every name, in order, with the name of its entry.
    read : callable
        `read(name)` gives the array that carries the bits of an entry.
    not_stored : dict of str to str
        Items that are no tensors, with the reason.
    """

    entries: list[TensorEntry]
    names: dict[str, str]
    read: Callable[[str], np.ndarray]
    not_stored: dict[str, str] = field(default_factory=dict)


@dataclass
class CompressionResult:
    """A compressed network.

    Attributes
    ----------
    model : Module or None
        Deep copy of the network with the reconstructed weights, or with factorised layers in the place of those that
        `executions` names; None when a state dict or a file was given.
    tensors : dict of str to CompressedTensor or RawTensor
        What is stored, once for each tied tensor.
    names : dict of str to str
        Every name of the state dict, in order, with the name under which its tensor is in `tensors`: the first of its
        names.
    skipped : dict of str to str
        Tensors that are stored losslessly, with the reason.
    estimators_ : dict of str to estimator
        Fitted clones, by name.
    records : list of TensorRecord
        Facts of every tensor, in the order of `tensors`.
    uncalibrated : dict of str to str
        Compressed tensors for which the calibration gave nothing, with the reason; empty without calibration.
    executions : list of LayerExecution
        How every compressed tensor's layer runs and why; empty with `mode="dense"`.
    cost : NetworkCost or None
        What one forward pass costs, before and after; None until it is measured.
    removals : list of dict
        What `skfactor.remove_filters` and `skfactor.prune_filters` had removed from the network; it goes into the file.
    """

    tensors: dict[str, CompressedTensor | RawTensor]
    names: dict[str, str]
    skipped: dict[str, str]
    estimators_: dict[str, Any]
    records: list[TensorRecord]
    model: torch.nn.Module | None = None
    uncalibrated: dict[str, str] = field(default_factory=dict)
    executions: list[LayerExecution] = field(default_factory=list)
    cost: NetworkCost | None = None
    removals: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ties(self) -> dict[str, str]:
        """Other name of a tied tensor -> name under which it is stored."""
        return {name: first for name, first in self.names.items() if name != first}

    @property
    def report(self) -> Report:
        """Sizes and errors, per tensor and in total; the sizes by really encoding the file."""
        return Report.from_result(self)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Reconstructed tensors by name, on the CPU, the bits that a saved file gives; tied names share one tensor.

        They are those of the original network, dense, whatever `mode` was; the factors of a factorised network are in
        `result.model.state_dict()`.
        """
        from skfactor.bridge.tensors import from_bits

        first = {name: from_bits(t.to_array(), t.dtype) for name, t in self.tensors.items()}
        return {name: first[stored] for name, stored in self.names.items()}

    def measure(self, example_inputs: Any) -> NetworkCost:
        """Measure one forward pass on this machine, dense and as `model` is, and keep it for the report.

        Parameters
        ----------
        example_inputs : tensor, tuple, dict or loader
            A tensor, a tuple of positional or a dict of keyword arguments of one forward pass; of anything else the
            first batch.

        Returns
        -------
        cost : NetworkCost
        """
        if self.model is None:
            raise ValueError("measure runs the network: compress the module, not its state dict or file")
        from skfactor.bridge.cost import measure_cost
        from skfactor.bridge.latency import example_batch
        from skfactor.bridge.modules import dense_copy

        batch = example_batch(self.model, example_inputs, None, "measure")
        self.cost = measure_cost(dense_copy(self.model), self.model, batch)
        return self.cost

    def save(self, path: str | PathLike, metadata: dict[str, Any] | None = None) -> str | PathLike:
        """Write the file and return its path; a file already there is replaced only once the new one is complete.

        Parameters
        ----------
        path : str or PathLike
        metadata : dict, default=None
            JSON values, stored beside the tensors.

        Notes
        -----
        A file holds codes and decoders once, for dense and for factorised layers; which layers run factorised is a
        list of names in its metadata. Removed filters are there too, as edits of a fresh network.
        """
        for key in (FACTORIZED, REMOVED):
            if metadata is not None and key in metadata:
                raise ValueError(f"metadata must not have the key {key!r}, which skfactor uses")
        if self.removals:
            metadata = (metadata or {}) | {REMOVED: self.removals}
        if names := [e.tensor for e in self.executions if e.execution == "factorized"]:
            metadata = (metadata or {}) | {FACTORIZED: names}
        with SkfWriter(path, metadata=metadata) as writer:
            for name, stored in self.names.items():
                if name == stored:
                    writer.add(name, self.tensors[name])
                else:
                    writer.tie(name, stored)
        return path

    def __repr__(self) -> str:
        n_params = sum(r.n_params for r in self.records)
        return (f"CompressionResult({len(self.estimators_)} of {len(self.tensors)} tensors compressed, "
                f"{n_params:,} parameters)")


def compress_source(source: Source, plan: Plan, *, side: Callable[[TensorEntry], dict[str, np.ndarray]] | None = None,
                    n_jobs: int | None = None, progress: bool = True) -> CompressionResult:
    """Fit what the plan takes, keep the bits of the rest.

    Parameters
    ----------
    source : Source
    plan : Plan
        From `resolve_rules(rules, source.entries)`.
    side : callable, default=None
        `side(entry)`: fit parameters of a tensor (sample_weight, importance, input_gram), asked for when its fit is
        dispatched.
    n_jobs, progress
        As in `skfactor.compress`.
    """
    def job(entry):
        return Job(entry, plan.taken[entry.name], lambda: source.read(entry.name), side(entry) if side else {})

    # the largest first, so that no worker is left with a long one at the end
    taken = sorted((e for e in source.entries if e.name in plan.taken), key=lambda e: -np.prod(e.shape, dtype=np.int64))
    fitted = dict(zip((e.name for e in taken),
                      fit_jobs(map(job, taken), n_jobs=n_jobs, progress=progress, total=len(taken)), strict=True))
    return assemble(source, plan, fitted)


def assemble(source: Source, plan: Plan, fitted: Mapping[str, Fitted]) -> CompressionResult:
    """Result of what was fitted and the bits of the rest, in the order of the source."""
    stored = [e for e in source.entries if e.name in source.names]
    tensors, records = {}, []
    for entry in stored:
        done = fitted.get(entry.name)
        tensors[entry.name] = done.tensor if done else RawTensor(np.array(source.read(entry.name)), entry.dtype)
        records.append(done.record if done else raw_record(entry, plan.skipped[entry.name]))
    skipped = {e.name: plan.skipped[e.name] for e in stored if e.name in plan.skipped} | source.not_stored
    estimators = {e.name: fitted[e.name].estimator for e in stored if e.name in fitted}
    return CompressionResult(tensors, source.names, skipped, estimators, records)
