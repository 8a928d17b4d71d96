"""`allocate`: settings of all tensors from one target, the size of the file or an error.

At the least damage for a size every tensor has the same slope: the last byte taken from it costs the network's output
as much as the last byte of any other. A method says which settings of its estimator have a given slope; the search
turns the slope until the file, really encoded, has the size wanted. For a uniform step Δ the slope is known: a layer
whose errors cost s_l per unit of variance loses s_l Δ²/12 per weight, and halving the step costs one bit whatever the
layer, so that equal slopes mean

    Δ_l = base / √s_l,   s_l = B_l h_l,

with B_l what an error of the layer's output costs at the network's output (`output_importance`) and h_l the
conditional power of the layer's inputs, what is left for a weight's error once later weights have absorbed their part.
(Entropy-coded quantisation at equal slope: Shoham, Gersho 1988, doi:10.1109/29.90373.)
"""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from os import PathLike
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from skfactor.bridge.apply import compress, deep_copy, fold_into_layers, source_of
from skfactor.bridge.assumed import ASSUMED, assumed_side, check_calibration_word
from skfactor.bridge.balance import balance_layers, importance_of_rows
from skfactor.bridge.batchnorm import leaves, normalisation_after
from skfactor.bridge.calibrate import Calibration, Moments, collect_moments, evaluation, model_batches
from skfactor.bridge.candidates import CandidateTable, candidate_lists, measure_candidates
from skfactor.bridge.files import file_source
from skfactor.bridge.layers import entries_of_module, entries_of_state_dict
from skfactor.bridge.result import CompressionResult, Source, compress_source
from skfactor.bridge.rules import TensorEntry, resolve_rules
from skfactor.bridge.sequential import bias_carrier, covariance
from skfactor.codec.dtypes import itemsize, to_float
from skfactor.codec.safetensors_io import SafetensorsReader
from skfactor.codec.tensor import Layout
from skfactor.estimators.mantissa_rounder import MantissaRounder
from skfactor.estimators.uniform_quantizer import UniformQuantizer
from skfactor.solvers.feedback import conditional_power

__all__ = ["Allocation", "Method", "TensorFacts", "UniformSteps", "allocate"]

TOLERANCE = 0.01
MAX_EVALUATIONS = 8
MAX_VECTORS = 8192
#: Weights of a tensor that the estimate of its size looks at.
SAMPLE = 1 << 16
VECTOR_BITS = 8


@dataclass(frozen=True)
class TensorFacts:
    """What a method knows of a tensor before anything is fitted.

    Attributes
    ----------
    name : str
    n_weights : int
    sample : ndarray
        Weights of the tensor, all or a random part.
    largest : float
        Largest absolute weight.
    sensitivity : float
        Cost at the network's output per unit of error variance of each weight, s_l = B_l h_l.
    """

    name: str
    n_weights: int
    sample: np.ndarray
    largest: float
    sensitivity: float


class Method(Protocol):
    """One family of settings of an estimator, ordered by the slope they stand for; a larger `base` is a smaller file.

    `base²` is the cost at the network's output that a weight may have.
    """

    def estimator(self, facts: TensorFacts, base: float) -> Any:
        """The estimator for one tensor, not fitted."""

    def estimated_bytes(self, facts: TensorFacts, base: float) -> float:
        """About how large the tensor will be; falls with `base`."""


@dataclass(frozen=True)
class UniformSteps:
    """`UniformQuantizer` with Δ = base / √s: the equal-slope rule is closed.

    Attributes
    ----------
    entropy_weight : float
        Price of a bit in units of Δ² h, the same for all tensors because their slopes are.
    """

    entropy_weight: float

    def estimator(self, facts: TensorFacts, base: float) -> UniformQuantizer:
        return UniformQuantizer(self._step(facts, base), unit="absolute", entropy_weight=self.entropy_weight)

    def estimated_bytes(self, facts: TensorFacts, base: float) -> float:
        """Entropy of the nearest codes."""
        codes = np.rint(facts.sample / self._step(facts, base)).astype(np.int64)
        counts = np.bincount(codes - codes.min())
        p = counts[counts > 0] / len(codes)
        return facts.n_weights * float(-(p * np.log2(p)).sum()) / 8 + 16

    @staticmethod
    def _step(facts: TensorFacts, base: float) -> float:
        """Between a step that leaves nothing and 11 bits; a tensor without influence gets the largest."""
        if facts.largest == 0:
            return 1.0
        step = base / math.sqrt(facts.sensitivity) if facts.sensitivity > 0 else math.inf
        return float(min(max(step, facts.largest / 1000), 4 * facts.largest))


@dataclass
class Allocation:
    """What `allocate` found.

    Attributes
    ----------
    rules : dict of str to estimator
        Settings by tensor name, as `skfactor.compress` takes them.
    result : CompressionResult
        The network compressed with them.
    history : list of dict
        Every network compressed on the way: the `bytes` of its file, whether it is `final` (fitted as the result is;
        without it layers were fitted each for itself, which takes less time and gives about the same size), its
        `error` where that was the target, and the `base` of the steps where there were no candidates.
    n_bytes : int
        Size of the file that `result.save` writes.
    table : CandidateTable or None
        Bytes and damage of every candidate, where there were any.
    """

    rules: dict[str, Any]
    result: CompressionResult
    history: list[dict[str, Any]] = field(repr=False)
    n_bytes: int
    table: CandidateTable | None = field(default=None, repr=False)


def allocate(model: nn.Module | Mapping[str, torch.Tensor] | str | PathLike, candidates: Any = None, *,
             budget: int | str | None = None, max_error: float | None = None, calibration: Any = None,
             n_jobs: int | None = None, progress: bool = True, random_state: int = 0) -> Allocation:
    """Compress a network to a file of a given size, or within a given error, so that its output suffers least.

    Without `candidates` every weight of a layer gets a `UniformQuantizer` whose step follows from how much its errors
    change the network's output; biases and other vectors are rounded to 8 significant bits; the only number searched
    for is the common slope of all tensors. With `candidates` every layer is fitted with each of them, and the choice
    is made over all layers at once: equal slopes, never worse than the same candidate for all layers.

    Parameters
    ----------
    model : Module, state dict, or path of a .safetensors file
        Never changed.
    candidates : estimator, list, tuple or dict, default=None
        A list holds compressors, or tuples (compressor, grid) with a grid as `sklearn.model_selection.ParameterGrid`
        takes it; one such tuple may stand alone. A dict has them by rule, with the keys of `skfactor.compress`.
        Families may be mixed.
    budget : int or str, default=None
        Bytes of the file, or a ratio such as "18x": so many times smaller than the tensors in their own dtypes.
        The file is at most this large and, where the settings allow, at most 1 % smaller.
    max_error : float, default=None
        Instead of `budget`: the smallest file found whose error is at most this. With inputs it is the relative error
        of the network's output on them, ‖f(u) − f̂(u)‖ / ‖f(u)‖, measured; without, that of all compressed weights,
        ‖W − Ŵ‖ / ‖W‖, as the report has it.
    calibration : tensor, tuple, dict, list, loader, Calibration or "assumed", default=None
        Unlabelled inputs, best as the network saw them in training (augmented). Without candidates, layers are then
        fitted one after the other for the inputs they really get, with batch normalisation folded into them and their
        rows balanced; a `Calibration` decides all this itself. The network's output, or the first element or value of
        it, must be logits. With None or "assumed", and for a state dict or file, all layers count the same; the inputs
        are assumed as by `calibration="assumed"` of `skfactor.compress`, except that candidates with None are compared
        by the plain error of the weights.
    n_jobs : int, default=None
        Layers fitted at a time, where they do not depend on each other.
    progress : bool, default=True
        Show progress bars when the output is a terminal.
    random_state : int, default=0
        Seed of the estimate of what a layer's errors cost.

    Returns
    -------
    allocation : Allocation

    Raises
    ------
    ValueError
        A budget or error that cannot be met.

    Examples
    --------
    >>> import torch, skfactor
    >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    >>> allocation = skfactor.allocate(net, budget="8x", calibration=torch.randn(100, 64), progress=False)
    >>> allocation.n_bytes <= 4 * sum(p.numel() for p in net.parameters()) / 8
    True
    >>> sorted(allocation.rules)
    ['0.bias', '0.weight', '2.bias', '2.weight']

    The number of clusters of each layer:

    >>> sharing = (skfactor.KMeansWeightSharer(), {"n_clusters": [2, 4, 8, 16, 32]})
    >>> allocation = skfactor.allocate(net, sharing, max_error=0.1, progress=False)
    >>> allocation.result.report.total["relative_error"] <= 0.1
    True
    """
    target = _Target(budget, max_error)
    check_calibration_word(calibration)
    assumed = calibration is None or isinstance(calibration, str)
    if not assumed and not isinstance(model, nn.Module):
        raise ValueError("calibration runs the network: give the module, not its state dict or file")
    if not assumed and not isinstance(calibration, Calibration):
        steps = candidates is None
        calibration = Calibration(calibration, sequential=steps, fold_batch_norm=steps, balance_rows=steps,
                                  max_vectors=MAX_VECTORS)
    if candidates is None:
        return _allocate_steps(model, target, calibration, n_jobs, progress, random_state)
    return _allocate_candidates(model, candidate_lists(candidates), target, calibration, n_jobs, progress,
                                random_state)


@dataclass(frozen=True)
class _Target:
    """What was asked for: a size or an error."""

    budget: int | str | None
    max_error: float | None

    def __post_init__(self):
        if (self.budget is None) == (self.max_error is None):
            raise ValueError("give either budget or max_error, got " + ("neither" if self.budget is None else "both"))
        if self.max_error is not None and not (isinstance(self.max_error, Real) and self.max_error > 0):
            raise ValueError(f"max_error must be a positive number, got {self.max_error!r}")
        if self.budget is not None:
            self.n_bytes(1)

    def n_bytes(self, n_bytes_before: int) -> int:
        """Bytes of the budget, for tensors of `n_bytes_before`."""
        budget = self.budget
        if isinstance(budget, str):
            match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*x\s*", budget)
            if match and float(match[1]) > 0:
                return int(n_bytes_before / float(match[1]))
        elif isinstance(budget, Integral) and not isinstance(budget, bool) and budget > 0:
            return int(budget)
        raise ValueError(f"budget must be a positive number of bytes or a ratio such as '18x', got {budget!r}")


def _allocate_steps(model, target, calibration, n_jobs, progress, random_state) -> Allocation:
    if isinstance(calibration, Calibration):
        problem = _calibrated_problem(model, calibration, n_jobs, progress, random_state)
    elif isinstance(model, (str, PathLike)):
        with SafetensorsReader(model) as reader:
            problem = _assumed_problem(model, file_source(reader), n_jobs, progress)
    else:
        problem = _assumed_problem(model, _source_in_memory(model), n_jobs, progress)
    if not problem.facts:
        raise ValueError("nothing to compress: no tensor is the weight of a known layer")
    return _search(problem, target.n_bytes(problem.n_bytes)) if target.budget else _search_error(problem, target)


def _allocate_candidates(model, candidates, target, calibration, n_jobs, progress, random_state) -> Allocation:
    """Measure all candidates once, then choose until the real file or the real error meets the target."""
    if isinstance(model, (str, PathLike)):
        with SafetensorsReader(model) as reader:
            source = file_source(reader)
            table = measure_candidates(source, candidates, side=assumed_side if calibration else lambda e: {},
                                       importance={}, n_jobs=n_jobs, progress=progress)
        error = None
    elif isinstance(calibration, Calibration):
        calibration = replace(calibration, inputs=_reusable(calibration.inputs))
        _, source, facts = _prepared(model, calibration, random_state)
        table = measure_candidates(source, candidates, side=lambda e: facts.side.get(e.name, {}),
                                   importance=facts.importance, n_jobs=n_jobs, progress=progress)
        error = _OutputError(model, list(model_batches(model, calibration.inputs)))
    else:
        source = _source_in_memory(model)
        table = measure_candidates(source, candidates, side=assumed_side if calibration else lambda e: {},
                                   importance={}, n_jobs=n_jobs, progress=progress)
        error = None
    if not table.names:
        raise ValueError("nothing to compress: the candidates take no tensor")

    def fit(choice):
        return compress(model, table.rules(choice), calibration=calibration, n_jobs=n_jobs, progress=progress)

    if target.budget is not None:
        return _meet_bytes(table, fit, target.n_bytes(_n_bytes(source)))
    return _meet_error(table, fit, target.max_error, error)


def _meet_bytes(table: CandidateTable, fit: Callable, target: int) -> Allocation:
    """The choice of least damage whose file, really encoded, is within the target."""
    history: list[dict[str, Any]] = []
    seen: dict[tuple, tuple[int, CompressionResult]] = {}
    rest, best = 0, None
    for _ in range(MAX_EVALUATIONS):
        choice = table.smallest_damage(target - rest)
        if choice is None or tuple(choice.values()) in seen:
            break
        result = fit(choice)
        n_bytes = _encoded_bytes(result)
        seen[tuple(choice.values())] = n_bytes, result
        history.append({"bytes": n_bytes, "final": True})
        if n_bytes <= target and (best is None or table.damage_of(choice) < table.damage_of(best)):
            best = choice
        rest = n_bytes - table.bytes_of(choice)
    if best is None:
        smallest = min((h["bytes"] for h in history), default=None)
        raise ValueError(f"a file of {target} bytes cannot be met with these candidates; "
                         f"the smallest reached has {smallest or 'more'}")
    n_bytes, result = seen[tuple(best.values())]
    return Allocation(table.rules(best), result, history, n_bytes, table)


def _meet_error(table: CandidateTable, fit: Callable, max_error: float, output_error: Callable | None) -> Allocation:
    """The choice of fewest bytes whose error is within the target; that of an output has to be measured."""
    history: list[dict[str, Any]] = []
    measure = output_error or _error_of_weights
    low, high, best, damage = 0.0, math.inf, None, max_error**2 * table.total
    for _ in range(MAX_EVALUATIONS):
        choice = table.fewest_bytes(damage)
        if choice is None:  # less damage than the candidates can give
            low, damage = damage, (damage * 2 if high == math.inf else math.sqrt(damage * high))
            if high < low * 1.02:
                break
            continue
        result = fit(choice)
        found = measure(result)
        history.append({"bytes": _encoded_bytes(result), "error": found, "final": True})
        if found <= max_error:
            if best is None or history[-1]["bytes"] < best[0]:
                best = history[-1]["bytes"], choice, result
            low = damage
        else:
            high = damage
        if output_error is None and best is not None:
            break  # the error of weights is the sum of the table's
        guess = damage * (max_error / found) ** 2 if found > 0 else damage * 4
        inside = guess if low < guess < high else math.sqrt(max(low, guess / 16) * min(high, guess * 16))
        if high < low * 1.02:
            break
        damage = inside
    if best is None:
        smallest = min((h["error"] for h in history), default=None)
        raise ValueError(f"an error of {max_error:g} cannot be met with these candidates"
                         + ("" if smallest is None else f"; the smallest reached is {smallest:.3g}"))
    n_bytes, choice, result = best
    return Allocation(table.rules(choice), result, history, n_bytes, table)


def _error_of_weights(result: CompressionResult) -> float:
    return result.report.total["relative_error"]


@dataclass(frozen=True)
class _OutputError:
    """‖f(u) − f̂(u)‖ / ‖f(u)‖ of a compressed network on some batches."""

    model: nn.Module
    batches: list[tuple[tuple, dict]]

    def __call__(self, result: CompressionResult) -> float:
        error = total = 0.0
        for args, kwargs in self.batches:
            with torch.no_grad(), evaluation(self.model), evaluation(result.model):
                pairs = zip(leaves(self.model(*args, **kwargs)), leaves(result.model(*args, **kwargs)), strict=True)
                for y, y_hat in pairs:
                    if y.is_floating_point():
                        error += float((y.double() - y_hat.double()).square().sum())
                        total += float(y.double().square().sum())
        return math.sqrt(error / total if total > 0 else error)


@dataclass(frozen=True)
class _Problem:
    """A network with what is known of it, and how it is compressed once there are rules."""

    facts: list[TensorFacts]
    method: Method
    vectors: dict[str, int]  # those that are rounded, with their bytes
    n_bytes: int
    compress: Callable[[dict[str, Any]], CompressionResult]
    compress_quickly: Callable[[dict[str, Any]], CompressionResult] | None = None
    output_error: Callable[[CompressionResult], float] | None = None

    def rules(self, base: float) -> dict[str, Any]:
        rounder = MantissaRounder(n_bits=VECTOR_BITS)
        return {f.name: self.method.estimator(f, base) for f in self.facts} | dict.fromkeys(self.vectors, rounder)

    def estimated_bytes(self, base: float) -> float:
        # of a vector's float32 value the sign, the exponent and 8 bits are left, about two fifths
        return sum(self.method.estimated_bytes(f, base) for f in self.facts) + 0.4 * sum(self.vectors.values())


def _source_in_memory(model: Any) -> Source:
    if isinstance(model, nn.Module):
        return source_of(entries_of_module(model))
    if isinstance(model, Mapping):
        return source_of(entries_of_state_dict(model))
    raise TypeError("model must be a torch.nn.Module, a state dict or the path of a .safetensors file, "
                    f"got {type(model).__name__}")


def _assumed_problem(model: Any, source: Source, n_jobs: int | None, progress: bool) -> _Problem:
    """All layers count the same, and their inputs are what their shapes suggest."""

    def sensitivity(entry):
        gram = assumed_side(entry).get("input_gram")
        return 1.0 if gram is None else conditional_power(gram)

    return _Problem(
        [_facts(entry, source, sensitivity(entry)) for entry in _weights(source)], UniformSteps(entropy_weight=0.05),
        _vectors(source), _n_bytes(source),
        lambda rules: compress(model, rules, calibration=ASSUMED, n_jobs=n_jobs, progress=progress),
    )


class _Prepared(NamedTuple):
    """What does not depend on the settings is computed once."""

    side: dict[str, dict[str, np.ndarray]]
    importance: dict[str, float]
    grams: dict[str, np.ndarray]


def _prepared(model: nn.Module, calibration: Calibration,
              random_state: int) -> tuple[nn.Module, Source, _Prepared]:
    """A copy of the network with normalisation folded as asked for, its tensors, importance and moments."""
    model = deep_copy(model)
    network = entries_of_module(model)
    source = source_of(network)
    owners = {e.name: network.owners[e.name] for e in _weights(source)}
    batches = list(model_batches(model, calibration.inputs))
    if calibration.fold_batch_norm:
        fold_into_layers(model, owners, batches[0])
    by_row = importance_of_rows(model, owners, batches, random_state)
    if not any(r.any() for r in by_row.values()):
        raise ValueError("the network's output does not depend on any layer that can be compressed")
    if calibration.balance_rows:
        by_row = balance_layers(model, owners, by_row, batches[0])
    moments = _moments(model, owners, batches, calibration)
    return model, source, _Prepared({name: moments.side(name) for name in owners},
                                    {name: float(r.mean()) for name, r in by_row.items()}, moments.grams)


def _calibrated_problem(model: nn.Module, calibration: Calibration, n_jobs: int | None, progress: bool,
                        random_state: int) -> _Problem:
    calibration = replace(calibration, inputs=_reusable(calibration.inputs))
    original = model
    model, source, facts = _prepared(model, calibration, random_state)

    def sensitivity(entry):
        gram = facts.grams.get(entry.name)
        return facts.importance[entry.name] * (1.0 if gram is None else conditional_power(gram))

    def compress_quickly(rules):
        plan = resolve_rules(rules, source.entries)
        return compress_source(source, plan, side=lambda e: facts.side.get(e.name, {}), n_jobs=n_jobs,
                               progress=progress)

    final = replace(calibration, fold_batch_norm=False, balance_rows=False)
    return _Problem(
        [_facts(entry, source, sensitivity(entry)) for entry in _weights(source)], UniformSteps(entropy_weight=0.1),
        _vectors(source), _n_bytes(source),
        lambda rules: compress(model, rules, calibration=final, n_jobs=n_jobs, progress=progress),
        compress_quickly if calibration.sequential else None,
        _OutputError(original, list(model_batches(original, calibration.inputs))),
    )


def _reusable(inputs: Any) -> Any:
    """Calibration inputs that can be iterated more than once and are the same each time."""
    whole = (torch.Tensor, np.ndarray, tuple, Mapping, str, bytes)
    return list(inputs) if isinstance(inputs, Iterable) and not isinstance(inputs, whole) else inputs


def _moments(model, owners, batches, calibration: Calibration) -> Moments:
    """Of the original network; centred where the layer's bias will take up the shift of the mean."""
    moments = collect_moments(model, owners, batches, calibration.max_vectors)
    if calibration.sequential:
        norms = normalisation_after(model, [m for layers in owners.values() for m, _ in layers], *batches[0])
        for name, mean in moments.means.items():
            if bias_carrier(owners[name], norms) is not None:
                moments.grams[name] = covariance(moments.grams[name], mean)
    return moments


def _weights(source: Source) -> list[TensorEntry]:
    return [e for e in source.entries if e.name in source.names and e.lead.role == "weight" and not e.unfit
            and not e.refusal]


def _vectors(source: Source) -> dict[str, int]:
    """Biases, scales and running statistics, except those that are one number, which a file holds for nothing."""
    def is_vector(entry):
        statistics = entry.name.endswith((".running_mean", ".running_var"))
        return not entry.unfit and len(entry.shape) == 1 and (entry.lead.role == "vector" or statistics)

    found = [e for e in source.entries if e.name in source.names and is_vector(e)]
    return {e.name: math.prod(e.shape) * itemsize(e.dtype) for e in found if len(np.unique(source.read(e.name))) > 1}


def _n_bytes(source: Source) -> int:
    return sum(math.prod(e.shape) * itemsize(e.dtype) for e in source.entries if source.names.get(e.name) == e.name)


def _facts(entry: TensorEntry, source: Source, sensitivity: float) -> TensorFacts:
    layout = entry.layout or Layout.rows_first(entry.shape)
    w = layout.to_matrix(to_float(source.read(entry.name), entry.dtype)).ravel()
    sample = w if w.size <= SAMPLE else np.random.default_rng(0).choice(w, SAMPLE, replace=False)
    return TensorFacts(entry.name, w.size, sample.astype(np.float64), float(np.abs(w).max()), sensitivity)


def _search(problem: _Problem, target: int) -> Allocation:
    """Turn the slope until the file has the size wanted; first with quick fits, where there are any."""
    history: list[dict[str, Any]] = []
    correction = 0.85  # a price on bits leaves less than the entropy of the nearest codes
    if problem.compress_quickly:
        _, correction = _meet(problem, problem.compress_quickly, target, correction, 2 * TOLERANCE, history, False)
    best, _ = _meet(problem, problem.compress, target, correction, TOLERANCE, history, True)
    if best is None:
        smallest = min(h["bytes"] for h in history)
        raise ValueError(f"a file of {target} bytes cannot be met; the smallest reached has {smallest}")
    base, n_bytes, result = best
    return Allocation(problem.rules(base), result, history, n_bytes)


def _search_error(problem: _Problem, target: _Target) -> Allocation:
    """Turn the slope until the error is the one wanted: bisection of the base, which the error grows with."""
    measure = problem.output_error or _error_of_weights
    history: list[dict[str, Any]] = []
    low, high, best = -math.inf, math.inf, None
    base = _base_of(problem, problem.n_bytes / 8)
    for _ in range(2 * MAX_EVALUATIONS):
        result = problem.compress(problem.rules(base))
        found = measure(result)
        history.append({"base": base, "bytes": _encoded_bytes(result), "error": found, "final": True})
        if found <= target.max_error:
            low = math.log(base)
            if best is None or history[-1]["bytes"] < best[1]:
                best = base, history[-1]["bytes"], result
            if found >= 0.9 * target.max_error:
                break
        else:
            high = math.log(base)
        if high - low < 0.005:
            break
        # the error grows about as the base does
        guess = math.log(base) + math.log(0.95 * target.max_error / max(found, 1e-30))
        if not low < guess < high:
            guess = (low + high) / 2
        base = math.exp(guess)
    if best is None:
        smallest = min(h["error"] for h in history)
        raise ValueError(f"an error of {target.max_error:g} cannot be met; the smallest reached is {smallest:.3g}")
    base, n_bytes, result = best
    return Allocation(problem.rules(base), result, history, n_bytes)


def _meet(problem: _Problem, compress_with: Callable, target: int, correction: float, tolerance: float,
          history: list, final: bool) -> tuple[tuple | None, float]:
    """Largest file at most as large as `target` found, as (base, bytes, result), and bytes per estimated byte.

    The estimate says how size depends on the slope, each encoded file by which factor it is wrong there.
    """
    best, low, high = None, 0.0, math.inf  # bases known to give too much and little enough
    aim = target * (1 - tolerance / 2)
    for _ in range(MAX_EVALUATIONS):
        base = _base_of(problem, aim / correction)
        if not low < base < high:
            if low == 0 or high == math.inf:
                break  # the settings have an end before the target
            base = math.sqrt(low * high)
        result = compress_with(problem.rules(base))
        n_bytes = _encoded_bytes(result)
        history.append({"base": base, "bytes": n_bytes, "final": final})
        correction = n_bytes / problem.estimated_bytes(base)
        if n_bytes > target:
            low = max(low, base)
        else:
            high = min(high, base)
            if best is None or n_bytes > best[1]:
                best = base, n_bytes, result
            if n_bytes >= target * (1 - tolerance):
                break
    return best, correction


def _base_of(problem: _Problem, n_bytes: float) -> float:
    """Base for an estimated size, by bisection of its logarithm."""
    scale = max(f.largest * math.sqrt(f.sensitivity) for f in problem.facts) or 1.0
    low, high = math.log(scale) - 30, math.log(scale) + 5
    while high - low > 1e-4:
        middle = (low + high) / 2
        if problem.estimated_bytes(math.exp(middle)) > n_bytes:
            low = middle
        else:
            high = middle
    return math.exp(high)


def _encoded_bytes(result: CompressionResult) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return os.path.getsize(result.save(os.path.join(folder, "result.skf")))
