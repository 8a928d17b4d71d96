"""Weights that are computed from something else while a network is trained, and plain parameters again afterwards."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from skfactor.bridge.apply import source_of, write_tensors
from skfactor.bridge.fitting import Fitted
from skfactor.bridge.layers import entries_of_module
from skfactor.bridge.result import CompressionResult, assemble, compress_source
from skfactor.bridge.rules import Plan

__all__ = ["attach", "masks_of_zeros", "multiply", "restored", "slots_by_tensor"]

#: A parameter's place: the module and the name of its attribute.
Slot = tuple[nn.Module, str]


def slots_by_tensor(model: nn.Module, names: Mapping[str, str]) -> dict[str, list[Slot]]:
    """Every place where a parameter stands, by the name of its tensor.

    Parameters
    ----------
    model : Module
    names : dict of str to str
        Every name of the state dict with the name of its tensor: `CompressionResult.names`.
    """
    found: dict[str, dict[tuple[int, str], Slot]] = {}
    for name, tensor in names.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if attribute in module._parameters:
            found.setdefault(tensor, {})[id(module), attribute] = (module, attribute)
    return {tensor: list(slots.values()) for tensor, slots in found.items()}


def attach(slots: Iterable[Slot], source: nn.Module, originals: Mapping[str, nn.Parameter]) -> None:
    """Compute a weight by `source`, in all its places, from parameters that these places share.

    Parameters
    ----------
    slots : iterable of (Module, str)
    source : Module
        A parametrization as `torch.nn.utils.parametrize` has them.
    originals : dict of str to Parameter
        What `source` is called with: "original", or "original0", "original1" and so on.

    Notes
    -----
    A parameter that stands in several places is given a clone of its own in each first: registering would otherwise
    resize the one that they share.
    """
    for module, attribute in slots:
        weight = getattr(module, attribute)
        setattr(module, attribute, nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
        parametrize.register_parametrization(module, attribute, source, unsafe=True)
        for name, parameter in originals.items():
            setattr(module.parametrizations[attribute], name, parameter)


def masks_of_zeros(tensors: Iterable[torch.Tensor]) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """The parameters that have zeros, each with 1 where it has none."""
    return [(w, (w.detach() != 0).to(w.dtype)) for w in tensors if isinstance(w, nn.Parameter) and not w.all()]


def multiply(masks: Iterable[tuple[nn.Parameter, torch.Tensor]]) -> None:
    """Set to zero what is masked, in place."""
    with torch.no_grad():
        for weight, mask in masks:
            weight.mul_(mask)


def restored(model: nn.Module, made: Mapping[str, Fitted], rules: Mapping[str, object],
             reasons: Mapping[str, str]) -> CompressionResult:
    """Result of a trained network: some tensors made by a method, others fitted by their rules, the rest as they are.

    Parameters
    ----------
    model : Module
        With plain parameters; becomes `result.model`, with what is stored written into it.
    made : dict of str to Fitted
        Tensors that a method has compressed.
    rules : dict of str to estimator
        Compressors of other tensors; cloned.
    reasons : dict of str to str
        Why the rest is stored losslessly.
    """
    network = entries_of_module(model)
    source = source_of(network)
    stored = [e.name for e in network.entries if e.name in network.names]
    plan = Plan({n: rules[n] for n in stored if n in rules and n not in made},
                {n: reasons.get(n, "no rule matches it") for n in stored if n not in rules and n not in made})
    rest = compress_source(source, Plan(plan.taken, plan.skipped | dict.fromkeys(made, "made")), progress=False)
    records = {record.name: record for record in rest.records}
    fitted = {n: Fitted(rest.tensors[n], rest.estimators_[n], records[n]) for n in plan.taken} | dict(made)
    result = assemble(source, plan, fitted)
    write_tensors(network, result.tensors)
    result.model = model
    return result
