"""`allocate` among given candidates: every layer is fitted with each, then one is taken for each layer.

At the least damage for a size every layer has the same slope: the last byte costs the same everywhere. With
candidates that is a multiple-choice knapsack (`skfactor.solvers.knapsack`) over measured bytes and measured errors.
"""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.base import clone
from sklearn.model_selection import ParameterGrid

from skfactor.bridge.fitting import Job, TensorRecord, fit_jobs
from skfactor.bridge.result import Source
from skfactor.bridge.rules import TensorEntry, resolve_rules
from skfactor.codec.dtypes import to_float
from skfactor.codec.tensor import Layout
from skfactor.solvers.knapsack import choose

__all__ = ["CandidateTable", "candidate_lists", "measure_candidates"]


def candidate_lists(candidates: Any) -> dict[Any, list[Any] | None]:
    """Candidates by rule key, whatever form they were given in; see `skfactor.allocate`."""
    if not isinstance(candidates, Mapping):
        candidates = {"*": candidates}
    return {key: None if value is None else _listed(value) for key, value in candidates.items()}


def _listed(value: Any) -> list[Any]:
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], (Mapping, list)):
        estimator, grid = value
        return [clone(estimator).set_params(**params) for params in ParameterGrid(grid)]
    if isinstance(value, list):
        if not value:
            raise ValueError("candidates must hold at least one estimator, got an empty list")
        return [item for part in value for item in _listed(part)]
    return [value]


@dataclass(frozen=True)
class CandidateTable:
    """Bytes and damage of every candidate of every tensor.

    Attributes
    ----------
    names : list of str
    candidates : dict of str to list of estimator
    n_bytes, damage : dict of str to ndarray of shape (n_candidates,)
        Bytes of the tensor alone, and its squared error: plain, or of the layer's output and weighed by what that
        costs at the network's output.
    total : float
        The damage of leaving all tensors out.
    """

    names: list[str]
    candidates: dict[str, list[Any]]
    n_bytes: dict[str, np.ndarray]
    damage: dict[str, np.ndarray]
    total: float

    def smallest_damage(self, n_bytes: float) -> dict[str, int] | None:
        """Candidate of each tensor, of the least damage within so many bytes; None where there is none."""
        return self._choose(self.damage, self.n_bytes, n_bytes)

    def fewest_bytes(self, damage: float) -> dict[str, int] | None:
        """Candidate of each tensor, of the fewest bytes within so much damage; None where there is none."""
        return self._choose(self.n_bytes, self.damage, damage)

    def _choose(self, costs, weights, capacity):
        choice = choose([costs[n] for n in self.names], [weights[n] for n in self.names], capacity,
                        starts=self._uniform())
        return None if choice is None else dict(zip(self.names, map(int, choice.index)))

    def _uniform(self) -> list[np.ndarray]:
        """The same candidate for all tensors, where all have as many."""
        counts = {len(self.candidates[n]) for n in self.names}
        return [np.full(len(self.names), i) for i in range(counts.pop())] if len(counts) == 1 else []

    def bytes_of(self, choice: dict[str, int]) -> int:
        """Bytes of the tensors of a choice."""
        return int(sum(self.n_bytes[n][i] for n, i in choice.items()))

    def damage_of(self, choice: dict[str, int]) -> float:
        """Damage of a choice."""
        return float(sum(self.damage[n][i] for n, i in choice.items()))

    def rules(self, choice: dict[str, int]) -> dict[str, Any]:
        """Estimator by tensor name."""
        return {n: self.candidates[n][i] for n, i in choice.items()}


def measure_candidates(source: Source, candidates: dict[Any, list[Any] | None], *,
                       side: Callable[[TensorEntry], dict[str, np.ndarray]], importance: Mapping[str, float],
                       n_jobs: int | None, progress: bool) -> CandidateTable:
    """Fit every tensor with every candidate that a rule gives it.

    Parameters
    ----------
    source : Source
    candidates : dict of key to list of estimator, or None
        As from `candidate_lists`; keys as in `skfactor.compress`.
    side : callable
        `side(entry)`: fit parameters of a tensor.
    importance : dict of str to float
        Weight of a tensor's squared error; 1 where it is not named.
    n_jobs, progress
        As in `skfactor.compress`.
    """
    lead = {key: None if listed is None else listed[0] for key, listed in candidates.items()}
    listed_of = {id(listed[0]): listed for listed in candidates.values() if listed}
    plan = resolve_rules(lead, source.entries)
    entries = [e for e in source.entries if e.name in plan.taken]
    chosen = {e.name: listed_of[id(plan.taken[e.name])] for e in entries}
    sides = {e.name: side(e) for e in entries}

    def job(entry, estimator):
        return Job(entry, estimator, lambda: source.read(entry.name), sides[entry.name], keep_estimator=False)

    jobs = [job(entry, estimator) for entry in entries for estimator in chosen[entry.name]]
    power = {e.name: _power(e, source, sides[e.name].get("input_gram")) for e in entries}
    n_bytes: dict[str, list[int]] = {e.name: [] for e in entries}
    damage: dict[str, list[float]] = {e.name: [] for e in entries}
    for fitted in fit_jobs(iter(jobs), n_jobs=n_jobs, progress=progress, total=len(jobs)):
        name = fitted.record.name
        n_bytes[name].append(fitted.tensor.nbytes)
        damage[name].append(importance.get(name, 1.0) * _relative(fitted.record) * power[name])
    return CandidateTable([e.name for e in entries], chosen, {n: np.array(b, float) for n, b in n_bytes.items()},
                          {n: np.array(d) for n, d in damage.items()},
                          sum(importance.get(n, 1.0) * p for n, p in power.items()))


def _relative(record: TensorRecord) -> float:
    return record.relative_error if record.output_error is None else record.output_error


def _power(entry: TensorEntry, source: Source, gram: np.ndarray | None) -> float:
    """tr(X G Xᵀ), or ‖X‖² without a gram: what the relative errors of the records are relative to."""
    layout = entry.layout or Layout.rows_first(entry.shape)
    X = layout.to_matrix(to_float(source.read(entry.name), entry.dtype)).astype(np.float64)
    if gram is None:
        power = np.square(X).sum()
    else:
        grams = gram[None] if gram.ndim == 2 else gram
        power = sum(((x @ G) * x).sum() for x, G in zip(np.split(X, len(grams)), grams, strict=True))
    return float(power) if power > 0 else 1.0  # without power the records hold absolute errors
