"""Which layers of a network run factorised: all are built and checked before the first one is replaced."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from skfactor.bridge.calibrate import evaluation
from skfactor.bridge.factors import Branches, Factor, LayerShape, NoSmallerModule, factors_of, forms_of
from skfactor.bridge.latency import (
    LayerInputs,
    describe,
    inputs_of_layers,
    latencies,
    layer_latencies,
    quiet_clock,
)
from skfactor.bridge.layers import Network, unwrap
from skfactor.bridge.modules import (
    FactorizedLayer,
    composed_weight,
    factorized_layer,
    layer_shape,
    replacement_class,
    stock_modules,
)
from skfactor.bridge.rules import TensorEntry
from skfactor.codec.tensor import CompressedTensor
from skfactor.exceptions import LayerError
from skfactor.report import LayerExecution

__all__ = ["Replacement", "check_replaceable", "keep_faster", "plan_replacements", "replace_layers"]

#: Largest difference of a chain from the decoded weight before its factors are rounded, relative to the largest weight.
CHAIN_TOLERANCE = 1e-5
#: A chain gains much when it takes this share of the dense layer's time, or less.
MUCH_FASTER = 0.9
#: Layers stay dense unless the whole network takes less than this share of its time with dense layers.
NETWORK_FASTER = 0.95


@dataclass(frozen=True)
class Replacement:
    """What one stored weight becomes.

    Attributes
    ----------
    record : LayerExecution
    layers : list of Module
        The layers that have this weight; empty where they stay dense.
    chains : list of FactorizedLayer
        One for each layer; where there are several, their factors are the same parameters.
    others : tuple of Replacement
        Other ways to run the same weight.
    """

    record: LayerExecution
    layers: list[nn.Module]
    chains: list[FactorizedLayer]
    others: tuple[Replacement, ...] = ()

    def dense_because(self, reason: str) -> Replacement:
        """The same with the layers as they are."""
        return Replacement(replace(self.record, execution="dense", reason=reason), [], [])


def check_replaceable(model: nn.Module) -> None:
    """LayerError for a network whose layers cannot be replaced."""
    if isinstance(unwrap(model), torch.jit.ScriptModule):
        raise LayerError("the layers of a TorchScript network cannot be replaced: compress the network before "
                         "torch.jit.script")


def plan_replacements(model: nn.Module, network: Network, tensors: Mapping[str, CompressedTensor], *,
                      forms: Mapping[str, str] | None = None, all_forms: bool = False) -> list[Replacement]:
    """Chains of smaller layers where there are any, and for the other layers the reason why they stay dense.

    Parameters
    ----------
    model : Module
        Not changed.
    network : Network
        Of `model`.
    tensors : dict of str to CompressedTensor
        What is stored, by name of the entry.
    forms : dict of str to str, optional
        The form in which a weight is to run, of those that are not to run in the first; see `factors_of`.
    all_forms : bool, default=False
        Also plan the other forms of every weight.

    Raises
    ------
    LayerError
        A chain that does not compose to the decoded weight, or a network whose layers cannot be replaced.
    """
    check_replaceable(model)
    places = _places(model)
    entries = {entry.name: entry for entry in network.entries}
    planned = []
    for name, tensor in tensors.items():
        plan = _planned(entries[name], network, tensor, places, (forms or {}).get(name, ""))
        others = [form for form in forms_of(tensor) if form != plan.record.form] if all_forms else []
        found = [_planned(entries[name], network, tensor, places, form) for form in others]
        planned.append(replace(plan, others=tuple(other for other in found if other.layers)))
    return planned


def _planned(entry: TensorEntry, network: Network, tensor: CompressedTensor, places: _Places, form: str) -> Replacement:
    names = ", ".join(alias.owner or alias.name for alias in entry.aliases)
    record = LayerExecution(names, entry.name, "dense", parameters_dense=math.prod(entry.shape), form=form)
    try:
        layers = _replaceable_layers(entry, network, places)
        factors = factors_of(tensor, _common_shape(layers, tensor), form)
        _check_chain(factors, tensor, entry)
        chains = _chains(layers, factors)
    except NoSmallerModule as reason:
        return Replacement(replace(record, reason=str(reason)), [], [])
    n_weights = sum(module.weight.numel() for module in stock_modules(chains[0]))
    record = replace(record, execution="factorized", modules=_text(chains[0]), parameters_factorized=n_weights)
    plan = Replacement(record, layers, chains)
    if n_weights >= record.parameters_dense:
        return plan.dense_because(f"the chain would have {n_weights:,} weights, no fewer than the dense layer")
    return plan


_Places = dict[nn.Module, list[tuple[str, nn.Module]]]


def _places(model: nn.Module) -> _Places:
    """Every module with the paths under which it is found, and the parent there."""
    root = unwrap(model)
    places: _Places = {}
    for path, module in root.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append((path, root.get_submodule(path.rpartition(".")[0])))
    return places


def _replaceable_layers(entry: TensorEntry, network: Network, places: _Places) -> list[nn.Module]:
    """The layers that have a weight; NoSmallerModule where one of them cannot be another module."""
    owners = network.owners[entry.name]
    if not owners or any(alias.role != "weight" for alias in entry.aliases):
        raise NoSmallerModule("not the weight of a layer alone")
    for layer, spec in owners:
        if spec.parameter != "weight":
            raise NoSmallerModule(f"{spec.parameter} belongs to a layer that does more")
        for path, parent in places[layer]:
            if not path:
                raise NoSmallerModule("the network is this one layer")
            if parent is not layer and isinstance(getattr(parent, "_orig_mod", None), nn.Module):
                raise NoSmallerModule("torch.compile wraps the layer itself")
    return [layer for layer, _ in owners]


def _common_shape(layers: list[nn.Module], tensor: CompressedTensor) -> LayerShape:
    """Shape of the weight as all of its layers see it; NoSmallerModule where they differ."""
    kinds = {replacement_class(layer) for layer in layers}
    shapes = {layer_shape(layer) for layer in layers}
    if len(kinds) > 1 or len(shapes) > 1:
        names = " and ".join(sorted({type(layer).__name__ for layer in layers}))
        raise NoSmallerModule(f"tied between layers ({names}) that cannot share factors")
    (shape,) = shapes
    if (tensor.layout.n_rows, tensor.layout.kernel_shape) != (shape.n_rows, shape.kernel_shape):
        raise NoSmallerModule("its weight is stored as other rows")
    return shape


def _chains(layers: list[nn.Module], factors: list[Factor] | Branches) -> list[FactorizedLayer]:
    """One chain for each layer of a weight; tied layers stay tied, factor by factor."""
    first, *others = (factorized_layer(layer, factors) for layer in layers)
    for other in others:
        for module, tied_to in zip(stock_modules(other), stock_modules(first), strict=True):
            module.weight = tied_to.weight
    return [first, *others]


def _check_chain(factors: list[Factor] | Branches, tensor: CompressedTensor, entry: TensorEntry) -> None:
    """LayerError unless the chain composes to the decoded weight: a mistake in a builder must not go unnoticed."""
    W = tensor.to_matrix()
    chain = composed_weight(factors)
    who = f"{entry.label}: the chain of {' | '.join(type(decoder).__name__ for decoder in tensor.decoders)}"
    if chain.shape != (len(W), *tensor.layout.kernel_shape):
        raise LayerError(f"{who} composes to a weight of shape {chain.shape}, "
                         f"expected {(len(W), *tensor.layout.kernel_shape)}")
    allowed = CHAIN_TOLERANCE * np.abs(W).max()
    error = np.abs(chain.reshape(W.shape) - W).max()
    if not error <= allowed:
        raise LayerError(f"{who} differs from the decoded weight by {error:.3g}, allowed {allowed:.3g}")


def _text(chain: FactorizedLayer) -> str:
    """The modules on one line: "Conv2d 64>16 3x3, Conv2d 16>64 1x1"."""
    if isinstance(chain[0], FactorizedLayer):
        return f"sum of {len(chain)} ({_text(chain[0])})"
    return ", ".join(map(_module_text, chain))


def _module_text(module: nn.Module) -> str:
    name = type(module).__name__
    if isinstance(module, nn.Embedding):
        return f"{name} {module.num_embeddings}x{module.embedding_dim}"
    if isinstance(module, nn.Linear):
        return f"{name} {module.in_features}>{module.out_features}"
    groups = f" groups={module.groups}" if module.groups > 1 else ""
    return f"{name} {module.in_channels}>{module.out_channels} {'x'.join(map(str, module.kernel_size))}{groups}"


def keep_faster(model: nn.Module, plans: list[Replacement], batch: tuple[tuple, dict]) -> list[Replacement]:
    """The fastest form of every plan for the inputs that its layers get; dense layers where none is faster.

    A layer is measured by itself, with nothing else in the caches, and what the network gains by it can be less.
    So the whole network is measured then: with all these forms, with those alone that gain much, and dense.

    Parameters
    ----------
    model : Module
        With its dense layers; runs once, in eval mode.
    plans : list of Replacement
        From `plan_replacements`.
    batch : (args, kwargs)
        One forward pass.
    """
    layers = (layer for plan in plans for one in (plan, *plan.others) for layer in one.layers)
    seen = inputs_of_layers(model, layers, batch)
    return _fastest_together(model, [_fastest(plan, seen) for plan in plans], batch)


def _fastest(plan: Replacement, seen: Mapping[nn.Module, Mapping[LayerInputs, int]]) -> Replacement:
    forms = [one for one in (plan, *plan.others) if one.layers]
    if not forms:
        return plan
    layers = forms[0].layers
    totals = np.zeros(1 + len(forms))
    for i, layer in enumerate(layers):
        totals += layer_latencies([layer, *(form.chains[i] for form in forms)], seen.get(layer, {}))
    kinds = list(dict.fromkeys(kind for layer in layers for kind in seen.get(layer, ())))
    if not kinds:
        return plan.dense_because("the example inputs do not call it (something else may read its weight)")
    best = int(totals[1:].argmin())
    texts = [text for kind in kinds for text in describe(kind.tensor())]
    record = replace(forms[best].record, seconds_dense=float(totals[0]), seconds_factorized=float(totals[1 + best]),
                     inputs=" and ".join(texts), threads=torch.get_num_threads(), device=str(kinds[0].device))
    fastest = replace(forms[best], record=record)
    return fastest if totals[1 + best] < totals[0] else fastest.dense_because("the dense layer is faster")


def _fastest_together(model, plans, batch) -> list[Replacement]:
    planned = [plan for plan in plans if plan.layers]
    much = [plan for plan in planned if plan.record.seconds_factorized <= MUCH_FASTER * plan.record.seconds_dense]
    choices = [planned] if len(much) in (0, len(planned)) else [planned, much]
    if not planned:
        return plans
    dense, *times = network_latencies(model, [[], *choices], batch)
    best = int(np.argmin(times))
    kept = {id(plan) for plan in choices[best]} if times[best] < NETWORK_FASTER * dense else set()
    reason = "the whole network is no slower with this layer dense"
    return [plan if not plan.layers or id(plan) in kept else plan.dense_because(reason) for plan in plans]


def network_latencies(model: nn.Module, choices: list[list[Replacement]], batch: tuple[tuple, dict]) -> list[float]:
    """Seconds of a forward pass of the network with each choice of chains in place, by turns and the quiet clock."""
    args, kwargs = batch
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    places = _places(model)

    def swaps(plans):
        """(modules of the parent, name in it, dense layer, chain) of every place."""
        return [(parent._modules, path.rpartition(".")[2], layer, chain) for plan in plans
                for layer, chain in zip(plan.layers, plan.chains, strict=True) for path, parent in places[layer]]

    def runner(plans):
        there = swaps(plans)

        def run():
            for modules, name, _, chain in there:
                modules[name] = chain
            model(*args, **kwargs)
            for modules, name, layer, _ in there:
                modules[name] = layer

        return run

    try:
        with evaluation(model):
            return latencies(map(runner, choices), repeats=5, device=device, clock=quiet_clock(device))
    finally:  # an error in between must not leave a chain in the network
        for modules, name, layer, _ in swaps([plan for plans in choices for plan in plans]):
            modules[name] = layer


def replace_layers(model: nn.Module, plans: Iterable[Replacement]) -> None:
    """Put the chains in place of the layers, everywhere they are; all of them or, after an error, none."""
    root, places = unwrap(model), _places(model)
    done: list[tuple[str, nn.Module]] = []
    try:
        for plan in plans:
            for layer, chain in zip(plan.layers, plan.chains, strict=True):
                for path, _ in places[layer]:
                    done.append((path, layer))
                    root.set_submodule(path, chain)
    except BaseException:
        for path, layer in reversed(done):
            root.set_submodule(path, layer)
        raise
