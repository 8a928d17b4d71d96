"""`allocate`: settings of all tensors from one target, the size of the file.

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
from numbers import Integral
from os import PathLike
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from skfactor.bridge.apply import compress, deep_copy, fold_into_layers, source_of
from skfactor.bridge.assumed import ASSUMED, assumed_side, check_calibration_word
from skfactor.bridge.balance import balance_layers, importance_of_rows
from skfactor.bridge.batchnorm import normalisation_after
from skfactor.bridge.calibrate import Calibration, Moments, collect_moments, model_batches
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
        Every file encoded on the way: `base`, its `bytes`, and whether it is `final` (fitted as the result is; without
        it layers were fitted each for itself, which takes less time and gives about the same size).
    n_bytes : int
        Size of the file that `result.save` writes.
    """

    rules: dict[str, Any]
    result: CompressionResult
    history: list[dict[str, Any]] = field(repr=False)
    n_bytes: int


def allocate(model: nn.Module | Mapping[str, torch.Tensor] | str | PathLike, *, budget: int | str,
             calibration: Any = None, n_jobs: int | None = None, progress: bool = True,
             random_state: int = 0) -> Allocation:
    """Compress a network to a file of a given size, the bytes spread so that its output suffers least.

    Every weight of a layer gets a `UniformQuantizer` whose step follows from how much its errors change the network's
    output; biases and other vectors are rounded to 8 significant bits. The only number searched for is the common slope
    of all tensors.

    Parameters
    ----------
    model : Module, state dict, or path of a .safetensors file
        Never changed.
    budget : int or str
        Bytes of the file, or a ratio such as "18x": so many times smaller than the tensors in their own dtypes.
        The file is at most this large and, where the settings allow, at most 1 % smaller.
    calibration : tensor, tuple, dict, list, loader or Calibration, default=None
        Unlabelled inputs, best as the network saw them in training (augmented). Layers are then fitted one after the
        other for the inputs they really get, with batch normalisation folded into them; a `Calibration` decides both
        itself. Its output, or the first element or value of it, must be logits. Without, or for a state dict or file,
        the inputs are assumed as by `calibration="assumed"` of `skfactor.compress`, and all layers count the same.
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
        A budget that cannot be met.

    Examples
    --------
    >>> import torch, skfactor
    >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    >>> allocation = skfactor.allocate(net, budget="8x", calibration=torch.randn(100, 64), progress=False)
    >>> allocation.n_bytes <= 4 * sum(p.numel() for p in net.parameters()) / 8
    True
    >>> sorted(allocation.rules)
    ['0.bias', '0.weight', '2.bias', '2.weight']
    """
    check_calibration_word(calibration)
    if calibration is None or isinstance(calibration, str):
        if isinstance(model, (str, PathLike)):
            with SafetensorsReader(model) as reader:
                problem = _assumed_problem(model, file_source(reader), n_jobs, progress)
        else:
            problem = _assumed_problem(model, _source_in_memory(model), n_jobs, progress)
        return _search(problem, budget)
    if not isinstance(model, nn.Module):
        raise ValueError("calibration runs the network: give the module, not its state dict or file")
    if not isinstance(calibration, Calibration):
        calibration = Calibration(calibration, sequential=True, fold_batch_norm=True, balance_rows=True,
                                  max_vectors=MAX_VECTORS)
    return _search(_calibrated_problem(model, calibration, n_jobs, progress, random_state), budget)


@dataclass(frozen=True)
class _Problem:
    """A network with what is known of it, and how it is compressed once there are rules."""

    facts: list[TensorFacts]
    method: Method
    vectors: dict[str, int]  # those that are rounded, with their bytes
    n_bytes: int
    compress: Callable[[dict[str, Any]], CompressionResult]
    compress_quickly: Callable[[dict[str, Any]], CompressionResult] | None = None

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


def _calibrated_problem(model: nn.Module, calibration: Calibration, n_jobs: int | None, progress: bool,
                        random_state: int) -> _Problem:
    """What does not depend on the slope is computed once: folding, importance, moments of the original network."""
    model = deep_copy(model)
    network = entries_of_module(model)
    source = source_of(network)
    weights = _weights(source)
    owners = {e.name: network.owners[e.name] for e in weights}
    inputs = _reusable(calibration.inputs)
    batches = list(model_batches(model, inputs))
    if calibration.fold_batch_norm:
        fold_into_layers(model, owners, batches[0])
    by_row = importance_of_rows(model, owners, batches, random_state)
    if not any(r.any() for r in by_row.values()):
        raise ValueError("the network's output does not depend on any layer that can be compressed")
    if calibration.balance_rows:
        by_row = balance_layers(model, owners, by_row, batches[0])
    importance = {name: float(r.mean()) for name, r in by_row.items()}
    moments = _moments(model, owners, batches, calibration)
    side = {e.name: moments.side(e.name) for e in weights}

    def sensitivity(entry):
        gram = moments.grams.get(entry.name)
        return importance[entry.name] * (1.0 if gram is None else conditional_power(gram))

    def compress_quickly(rules):
        plan = resolve_rules(rules, source.entries)
        return compress_source(source, plan, side=lambda e: side.get(e.name, {}), n_jobs=n_jobs, progress=progress)

    final = replace(calibration, inputs=inputs, fold_batch_norm=False, balance_rows=False)
    return _Problem(
        [_facts(entry, source, sensitivity(entry)) for entry in weights], UniformSteps(entropy_weight=0.1),
        _vectors(source), _n_bytes(source),
        lambda rules: compress(model, rules, calibration=final, n_jobs=n_jobs, progress=progress),
        compress_quickly if calibration.sequential else None,
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


def _target_bytes(budget: int | str, n_bytes: int) -> int:
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*x\s*", budget)
        if match and float(match[1]) > 0:
            return int(n_bytes / float(match[1]))
    elif isinstance(budget, Integral) and not isinstance(budget, bool) and budget > 0:
        return int(budget)
    raise ValueError(f"budget must be a positive number of bytes or a ratio such as '18x', got {budget!r}")


def _search(problem: _Problem, budget: int | str) -> Allocation:
    """Turn the slope until the file has the size wanted; first with quick fits, where there are any."""
    if not problem.facts:
        raise ValueError("nothing to compress: no tensor is the weight of a known layer")
    target = _target_bytes(budget, problem.n_bytes)
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
