"""`compress`: a network in, a compressed network out; `load` and `load_into`: the way back."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn

from skfactor.bridge.assumed import ASSUMED, assumed_side, check_calibration_word, not_assumed
from skfactor.bridge.balance import balance_layers, importance_of_rows
from skfactor.bridge.batchnorm import fold_batch_norm
from skfactor.bridge.calibrate import Calibration, Moments, collect_moments, kind_of_inputs, model_batches
from skfactor.bridge.cost import measure_cost
from skfactor.bridge.files import file_source
from skfactor.bridge.latency import example_batch
from skfactor.bridge.layers import Network, entries_of_module, entries_of_state_dict, plain_name, unwrap
from skfactor.bridge.modules import dense_copy
from skfactor.bridge.removal import removal_of, replay_missing
from skfactor.bridge.replace import (
    Replacement,
    check_replaceable,
    keep_faster,
    plan_replacements,
    replace_layers,
)
from skfactor.bridge.result import CompressionResult, Source, assemble, compress_source
from skfactor.bridge.rules import resolve_rules
from skfactor.bridge.sequential import fit_in_order
from skfactor.bridge.tensors import dtype_name, from_bits, to_bits
from skfactor.codec.container import SkfFile
from skfactor.codec.safetensors_io import SafetensorsReader
from skfactor.codec.tensor import CompressedTensor, RawTensor
from skfactor.exceptions import FormatError, LayerError
from skfactor.report import FACTORIZED, FORMS, REMOVED

__all__ = ["calibration_moments", "compress", "load", "load_into"]


def compress(model: nn.Module | Mapping[str, torch.Tensor] | str | PathLike, rules: Any, *, calibration: Any = None,
             mode: str = "dense", execute: str = "factorized", example_inputs: Any = None, measure: bool = False,
             n_jobs: int | None = None, progress: bool = True) -> CompressionResult:
    """Compress the weights of a network.

    Parameters
    ----------
    model : Module, state dict, or path of a .safetensors file
        Never changed.
    rules : estimator, Pipeline or dict
        One compressor for every layer, or `{key: compressor or None}`. A key is a name or a name pattern of layers or
        parameters ("layer1.0.conv1", "layer1.*"), a module type (`torch.nn.Conv2d` or "Conv2d"), "parameters" (those of
        two or more dimensions that belong to no known layer), or the default "*". The most specific one decides: exact
        name, patterns in the order given, type, default. None leaves a layer as it is. Compressors are cloned, never
        fitted. Parameters of one dimension and buffers are taken only where a rule names them.
    calibration : tensor, tuple, dict, list, loader, Calibration, Moments or "assumed", default=None
        Unlabelled inputs; each layer's estimator then gets the second moment of the layer's inputs (`input_gram`), an
        embedding's how often each row is used (`importance`). A tensor is a batch of inputs, a tuple the positional
        and a dict the keyword arguments of one forward pass; anything else is iterated as batches, and of a batch
        (x, y) only what `forward` requires is used. `skfactor.Calibration` holds inputs and how to use them, and
        `skfactor.bridge.Moments` what inputs have given once (`skfactor.bridge.calibration_moments`), for many settings
        of one network. Inputs need a module. "assumed" needs no data: inputs are taken to have a common positive mean,
        to be uncorrelated between channels and correlated between neighbouring pixels, as they are behind a rectifier.
    mode : {"dense", "factorized"}, default="dense"
        "dense": every layer keeps its class and gets the reconstructed weight. "factorized": a layer whose weight is
        linear in its codes (low rank, dictionary, Tucker, separable) is replaced by a chain of smaller stock modules,
        where these have fewer weights; `result.executions` has the reason of every layer that stays dense. Needs a
        module.
    execute : {"factorized", "auto"}, default="factorized"
        "auto": all forms of every layer, the dense one among them, are measured on this machine with inputs as the
        layer gets them, and the fastest one stays; then the whole network is measured with them, and without, and it
        stays dense unless it gains 5 %.
    example_inputs : tensor, tuple, dict or loader, default=None
        What is measured with: a tensor, a tuple of positional or a dict of keyword arguments of one forward pass; of
        anything else the first batch. The first calibration batch when None.
    measure : bool, default=False
        Also measure the whole network, as `result.measure(example_inputs)` does.
    n_jobs : int, default=None
        Layers fitted at a time, through joblib, so that `joblib.parallel_config` applies. The result does not depend
        on it.
    progress : bool, default=True
        Show a progress bar when the output is a terminal.

    Returns
    -------
    result : CompressionResult

    Raises
    ------
    LayerError
        A layer cannot be compressed; nothing has changed.
    ValueError, TypeError
        A rule that matches nothing or is no compressor, or calibration that cannot be used.

    Examples
    --------
    >>> import torch, skfactor
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> result = skfactor.compress(net, {"0": skfactor.KMeansWeightSharer(n_clusters=4), "*": None})
    >>> len(result.model[0].weight.unique()) <= 4
    True
    >>> result.skipped["2.weight"]
    "rule '*' is None"
    """
    check_calibration_word(calibration)
    _check_choice("mode", mode, ("dense", "factorized"))
    _check_choice("execute", execute, ("factorized", "auto"))
    if execute == "auto" and mode == "dense":
        raise ValueError("execute='auto' chooses between factorised and dense layers: it needs mode='factorized'")
    if isinstance(model, nn.Module):
        run = _Running(mode == "factorized", execute == "auto", measure, example_inputs)
        return _compress_module(model, rules, calibration, run, n_jobs, progress)
    if mode == "factorized" or measure or example_inputs is not None:
        raise ValueError("mode='factorized', measure and example_inputs need the module, not its state dict or file")
    if calibration is not None and not isinstance(calibration, str):
        raise ValueError("calibration runs the network: give the module, not its state dict or file")
    if isinstance(model, (str, PathLike)):
        with SafetensorsReader(model) as reader:
            return _compress_tensors(file_source(reader), rules, calibration, n_jobs, progress)
    if isinstance(model, Mapping):
        return _compress_tensors(source_of(entries_of_state_dict(model)), rules, calibration, n_jobs, progress)
    raise TypeError("model must be a torch.nn.Module, a state dict or the path of a .safetensors file, "
                    f"got {type(model).__name__}")


def _compress_tensors(source, rules, calibration, n_jobs, progress) -> CompressionResult:
    """Without a network to run: nothing is known of the inputs, or it is assumed."""
    plan = resolve_rules(rules, source.entries)
    side = assumed_side if calibration == ASSUMED else None
    result = compress_source(source, plan, side=side, n_jobs=n_jobs, progress=progress)
    result.uncalibrated = not_assumed(plan, source.entries) if side else {}
    return result


@dataclass(frozen=True)
class _Running:
    """How the compressed network is to run."""

    factorized: bool
    auto: bool
    measure: bool
    example_inputs: Any

    def batch(self, model, calibration):
        """Arguments of the forward pass that is measured; None where none is."""
        if not (self.auto or self.measure):
            return None
        inputs = calibration.inputs if isinstance(calibration, Calibration) else calibration
        inputs = None if isinstance(inputs, Moments) else inputs
        what = "execute='auto'" if self.auto else "measure=True"
        return example_batch(model, self.example_inputs, inputs, what)


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")


def _compress_module(model, rules, calibration, run, n_jobs, progress) -> CompressionResult:
    if run.factorized:
        check_replaceable(model)
    plan = resolve_rules(rules, entries_of_module(model).entries)
    batch = run.batch(model, calibration)  # before the fits: a mistake here must not cost them
    copied = deep_copy(model)
    network = entries_of_module(copied)
    if calibration is None or isinstance(calibration, str):
        result = _compress_tensors(source_of(network), rules, calibration, n_jobs, progress)
    elif isinstance(calibration, Moments):
        result = compress_source(source_of(network), plan, side=lambda e: calibration.side(e.name), n_jobs=n_jobs,
                                 progress=progress)
        result.uncalibrated = {n: r for n, r in calibration.missing.items() if n in plan.taken}
    else:
        if not isinstance(calibration, Calibration):
            calibration = Calibration(calibration)
        result, missing = _compress_calibrated(copied, network, plan, calibration, n_jobs, progress)
        result.uncalibrated = missing
    compressed = write_tensors(network, result.tensors)
    if run.factorized:
        replacements = plan_replacements(copied, network, compressed, all_forms=run.auto)
        if run.auto:
            replacements = keep_faster(copied, replacements, batch)
        replace_layers(copied, replacements)
        result.executions = [replacement.record for replacement in replacements]
    result.model = copied
    result.removals = removal_of(copied)
    if run.measure:
        result.cost = measure_cost(dense_copy(copied), copied, batch)
    return result


def _compress_calibrated(model, network, plan, calibration, n_jobs, progress) -> tuple[CompressionResult, dict]:
    """`model` is the copy: it runs the inputs, and it may change before its weights are fitted."""
    owners = {name: network.owners[name] for name in plan.taken if network.tensors[name].dim() > 1}
    batches = model_batches(model, calibration.inputs)
    if calibration.sequential or calibration.fold_batch_norm:
        batches = list(batches)
    if calibration.fold_batch_norm:
        fold_into_layers(model, owners, batches[0])
    if calibration.balance_rows:
        balance_layers(model, owners, importance_of_rows(model, owners, batches), batches[0])
    if not calibration.sequential:
        moments = collect_moments(model, owners, batches, calibration.max_vectors)
        result = compress_source(source_of(network), plan, side=lambda e: moments.side(e.name), n_jobs=n_jobs,
                                 progress=progress)
        return result, moments.missing
    no_vectors = {name: layers for name, layers in owners.items() if not kind_of_inputs(layers).is_vectors}
    moments = collect_moments(model, no_vectors, batches)
    fitted = fit_in_order(model, network, plan, batches, moments, max_vectors=calibration.max_vectors,
                          progress=progress)
    return assemble(source_of(network), plan, fitted), moments.missing


def calibration_moments(model: nn.Module, calibration: Any, max_vectors: int | None = None) -> Moments:
    """What `calibration` tells of the inputs of all layers, to be given to `compress` any number of times.

    Parameters
    ----------
    model : Module
        Not changed.
    calibration : tensor, tuple, dict, list or loader
        As in `skfactor.compress`.
    max_vectors : int, default=None
        As in `Calibration`.

    Returns
    -------
    moments : Moments

    Examples
    --------
    >>> import torch, skfactor
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> moments = calibration_moments(net, torch.randn(32, 8))
    >>> results = [skfactor.compress(net, skfactor.LowRankFactorizer(r), calibration=moments) for r in (1, 2)]
    """
    network = entries_of_module(model)
    owners = {name: network.owners[name] for name, tensor in network.tensors.items()
              if network.owners.get(name) and tensor.dim() > 1}
    return collect_moments(model, owners, model_batches(model, calibration), max_vectors)


def fold_into_layers(model: nn.Module, owners: Mapping[str, list], batch: tuple[tuple, dict]) -> None:
    """Fold batch normalisations into those layers whose weight is theirs alone."""
    single = [layers[0] for layers in owners.values() if len(layers) == 1 and layers[0][1].parameter == "weight"]
    fold_batch_norm(model, single, *batch)


def source_of(network: Network) -> Source:
    """What of a network is stored."""
    return Source(network.entries, network.names, lambda name: to_bits(network.tensors[name]), network.not_stored)


def deep_copy(model: nn.Module) -> nn.Module:
    """Copy of a network; ValueError with the remedy where it has none."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ValueError(f"the network cannot be copied: {error}; compress its state_dict() instead") from error


def write_tensors(network: Network, tensors: Mapping[str, CompressedTensor | RawTensor]) -> dict[str, CompressedTensor]:
    """Copy compressed values into live tensors, in place: ties, optimizers, devices and memory formats stay.

    Returns
    -------
    compressed : dict of str to CompressedTensor
        What was written.
    """
    compressed = {n: t for n, t in tensors.items() if isinstance(t, CompressedTensor)}
    with torch.no_grad():
        for name, tensor in compressed.items():
            network.tensors[name].copy_(from_bits(tensor.to_array(), tensor.dtype))
    return compressed


def load(path: str | PathLike) -> dict[str, torch.Tensor]:
    """Read a compressed file: the state dict with the reconstructed weights; tied names share one tensor.

    Weights of layers that run factorised are dense here; `load_into` restores the factorised network.

    Parameters
    ----------
    path : str or PathLike
        A .skf file.

    Returns
    -------
    state : dict of str to Tensor
        On the CPU; the bits that `CompressionResult.state_dict` had.

    Raises
    ------
    FormatError
        The file is damaged, or is not a .skf file.
    """
    with SkfFile(path) as file:
        return _state_dict(file)


def _state_dict(file: SkfFile) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for name in file.names:
        first = file.ties.get(name)
        state[name] = state[first] if first else from_bits(file.read_array(name), file.entry(name)["dtype"])
    return state


def load_into(model: nn.Module, path: str | PathLike, strict: bool = True, *, mode: str | None = None) -> nn.Module:
    """Write the weights of a compressed file into a network, in place, and return the network.

    Everything is read, built and checked before the first weight changes. Values are copied into the existing
    parameters, so ties, optimizers, devices and memory formats stay. Layers that the file says run factorised are
    replaced by their chains, with the parameters, to the bit, of the network that was saved. Filters that the file says
    were removed are removed; the parameters of these layers are then new ones, so make the optimizer afterwards.

    Parameters
    ----------
    model : Module
        Of the class and size that was compressed.
    path : str or PathLike
        A .skf file.
    strict : bool, default=True
        Whether names that only one side has are an error.
    mode : {"dense"} or None, default=None
        "dense" replaces no layer, whatever the file says.

    Returns
    -------
    model : Module

    Raises
    ------
    ValueError
        Names, shapes or dtypes differ; the network is unchanged.
    LayerError
        A layer that the file has factorised cannot be replaced here, or filters cannot be removed as the file says; the
        network is unchanged.
    FormatError
        The file is damaged; the network is unchanged.
    """
    if mode is not None:
        _check_choice("mode", mode, ("dense",))
    _targets(model)
    with SkfFile(path) as file:
        factorized = {} if mode == "dense" else _factorized_tensors(file)
        forms = _forms(file)
        removals = file.metadata.get(REMOVED)
        state = _state_dict(file)
    undo = replay_missing(model, removals or [])
    try:
        _write_state(model, state, factorized, forms, strict)
    except BaseException:
        undo()
        raise
    return model


def _write_state(model: nn.Module, state: dict[str, torch.Tensor], factorized: Mapping[str, CompressedTensor],
                 forms: Mapping[str, str], strict: bool) -> None:
    """Check everything, then replace layers and copy the values."""
    targets = _targets(model)
    if strict:
        _check_names(targets, state)
    common = [name for name in targets if name in state]
    wrong = [f"{n}: file {dtype_name(state[n])} {tuple(state[n].shape)}, network {dtype_name(targets[n])} "
             f"{tuple(targets[n].shape)}" for n in common
             if state[n].shape != targets[n].shape or state[n].dtype != targets[n].dtype]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors differ in shape or dtype: {_some(wrong, '; ')}")
    _check_ties(targets, state, common)
    replacements = _replacements_of_file(model, factorized, forms)
    replaced = {id(layer.weight) for replacement in replacements for layer in replacement.layers}
    replace_layers(model, replacements)
    with torch.no_grad():
        for name in common:
            if id(targets[name]) not in replaced:
                targets[name].copy_(state[name])


def _factorized_tensors(file: SkfFile) -> dict[str, CompressedTensor]:
    """Tensors whose layers run factorised, by name; FormatError where the file's list of them is damaged."""
    names = file.metadata.get(FACTORIZED, [])
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise FormatError(f"metadata {FACTORIZED!r} must be a list of names, got {names!r:.120}")
    for name in names:
        if name not in file.names or file.entry(name)["kind"] != "compressed":
            raise FormatError(f"metadata {FACTORIZED!r} names {name!r:.120}, which is no compressed tensor of the file")
    return {name: file.read(name) for name in names}


def _forms(file: SkfFile) -> dict[str, str]:
    """Forms in which layers run, by tensor; FormatError where the file's list of them is damaged."""
    forms = file.metadata.get(FORMS, {})
    if not (isinstance(forms, dict) and all(isinstance(form, str) for form in forms.values())):
        raise FormatError(f"metadata {FORMS!r} must be a dict of names, got {forms!r:.120}")
    return forms


def _replacements_of_file(model: nn.Module, tensors: Mapping[str, CompressedTensor],
                          forms: Mapping[str, str]) -> list[Replacement]:
    """Chains for the layers of a fresh network; names that it does not have are left out."""
    if not tensors:
        return []
    network = entries_of_module(model)
    known = {network.names[name]: tensor for name, tensor in tensors.items() if name in network.names}
    forms = {network.names[name]: form for name, form in forms.items() if name in network.names}
    replacements = plan_replacements(model, network, known, forms=forms)
    for replacement in replacements:
        if not replacement.layers:
            record = replacement.record
            raise LayerError(f"layer {record.layer!r} cannot run factorised, as the file has it: {record.reason}; "
                             "mode='dense' loads the dense weight")
    return replacements


def _targets(model: nn.Module) -> dict[str, torch.Tensor]:
    """Live tensors of a network by name; LayerError for those that cannot be written to."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    state = unwrap(model).state_dict(keep_vars=True)
    targets = {plain_name(k): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    for name, value in targets.items():
        if nn.parameter.is_lazy(value):
            raise LayerError(f"{name} is not initialised yet; run one forward pass before loading")
        if value.is_meta:
            raise LayerError(f"{name} is on the meta device; call model.to_empty(device=...) before loading")
        if value.is_inference() and not torch.is_inference_mode_enabled():
            raise LayerError(f"{name} was made in inference mode and cannot be written to outside of it")
    return targets


def _check_names(targets: Mapping, state: Mapping) -> None:
    missing = [n for n in targets if n not in state]
    unexpected = [n for n in state if n not in targets]
    if missing or unexpected:
        parts = [f"{len(names)} {what} ({_some(names)})" for what, names in
                 (("are not in the file", missing), ("are not in the network", unexpected)) if names]
        raise ValueError(f"the file does not fit the network: names that {' and '.join(parts)}; "
                         "strict=False takes those in common")


def _check_ties(targets, state, common) -> None:
    """Names that the network ties must have one value in the file."""
    first: dict[int, str] = {}
    for name in common:
        other = first.setdefault(id(targets[name]), name)
        if state[name] is not state[other] and not _same_bits(state[name], state[other]):
            raise ValueError(f"the network ties {other} and {name}, but the file holds two different tensors")


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return to_bits(a).tobytes() == to_bits(b).tobytes()


def _some(items: list[str], separator: str = ", ", n: int = 3) -> str:
    """The first items, and how many more."""
    more = f"{separator}and {len(items) - n} more" if len(items) > n else ""
    return separator.join(items[:n]) + more
