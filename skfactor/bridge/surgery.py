"""Removing filters for good: through normalisations, residual additions, concatenations, and into the layers behind.

The removal works on a copy, and every time the smaller network is compared with the network in which the removed
channels are zero, wherever they occur.
"""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from skfactor._validation import did_you_mean
from skfactor.bridge.apply import compress, deep_copy
from skfactor.bridge.batchnorm import leaves
from skfactor.bridge.calibrate import evaluation
from skfactor.bridge.channels import Call, ChannelMap, analyse
from skfactor.bridge.cost import count_parameters
from skfactor.bridge.graph import Graph, operation, trace
from skfactor.bridge.latency import example_batch
from skfactor.bridge.layers import unwrap
from skfactor.bridge.removal import make_plan, replay
from skfactor.exceptions import LayerError

__all__ = ["FilterGroup", "FilterGroups", "PrunedNetwork", "TOLERANCE", "filter_groups", "remove_filters"]

#: Largest difference of the pruned from the masked network's output, relative to the largest output.
TOLERANCE = 1e-5

_KINDS = {"pad": ("pad",), "split": ("chunk", "split", "split_with_sizes", "unsafe_chunk", "unsafe_split",
                                     "tensor_split"), "view": ("view", "reshape", "_unsafe_view", "unflatten")}


@dataclass(frozen=True)
class FilterGroup:
    """Layers whose filters are coupled: they are added, or a grouped convolution reads them together.

    Attributes
    ----------
    layers : tuple of str
        In the order in which they run. Most groups are one layer.
    units : tuple of tuple of (str, int)
        What can be removed: the filters (layer, index) that go together.
    """

    layers: tuple[str, ...]
    units: tuple[tuple[tuple[str, int], ...], ...]

    def filters(self, units: Iterable[int]) -> dict[str, list[int]]:
        """Filters of some units, by layer, as `remove_filters` takes them."""
        found: dict[str, list[int]] = {}
        for unit in units:
            for layer, index in self.units[int(unit)]:
                found.setdefault(layer, []).append(index)
        return {layer: sorted(indices) for layer, indices in found.items()}

    def __repr__(self) -> str:
        names = ", ".join(self.layers[:3]) + (f" and {len(self.layers) - 3} more" if len(self.layers) > 3 else "")
        return f"FilterGroup({names}: {len(self.units)} units)"


@dataclass(frozen=True)
class FilterGroups(Sequence):
    """What of a network can be removed; a sequence of `FilterGroup`, by number or by the name of a layer.

    Attributes
    ----------
    groups : tuple of FilterGroup
        In the order in which their first layers run.
    frozen : dict of str to str
        Layers that can lose no filter, with the reason.
    """

    groups: tuple[FilterGroup, ...]
    frozen: dict[str, str]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, key):
        if isinstance(key, str):
            found = next((group for group in self.groups if key in group.layers), None)
            if found is None:
                names = [layer for group in self.groups for layer in group.layers]
                raise KeyError(f"no filter of {key!r} can be removed: "
                               f"{self.frozen.get(key, 'there is no such layer' + did_you_mean(key, names))}")
            return found
        return self.groups[key]


@dataclass
class PrunedNetwork:
    """A network without some of its filters.

    Attributes
    ----------
    model : Module
        The smaller copy. What was removed is noted on it, so that `skfactor.compress` puts it into the file.
    plan : dict
        The removal as JSON: edits of modules. `skfactor.load_into` replays them on a fresh instance of the class.
    removed : dict of str to tuple of int
        Filters that are gone, by layer; those that went with others included.
    difference : float
        Largest difference of the output from that of the network with these channels set to zero, relative to the
        largest output.
    parameters_before, parameters_after : int
    refitted : tuple of str
        Layers whose weights were refit (`skfactor.prune_filters`).
    """

    model: nn.Module
    plan: dict[str, Any]
    removed: dict[str, tuple[int, ...]]
    difference: float
    parameters_before: int
    parameters_after: int
    refitted: tuple[str, ...] = ()

    def save(self, path: str | PathLike, metadata: dict[str, Any] | None = None) -> str | PathLike:
        """Write the network losslessly, with its removals; `skfactor.load_into` restores it."""
        return compress(self.model, {"*": None}, progress=False).save(path, metadata)

    def __repr__(self) -> str:
        n = sum(map(len, self.removed.values()))
        return (f"PrunedNetwork({n} filters of {len(self.removed)} layers removed, {self.parameters_before:,} -> "
                f"{self.parameters_after:,} parameters)")


@dataclass(frozen=True)
class Anatomy:
    """A network with its graph and channels, and the inputs that it was traced with."""

    model: nn.Module
    graph: Graph
    map: ChannelMap
    batch: tuple[tuple, dict]

    def layer_of(self, weight: str) -> str:
        return weight.removesuffix(".weight")

    @property
    def weights(self) -> dict[str, str]:
        """Names of layers with those of their weights, in the order in which they run."""
        return {self.layer_of(weight): weight for weight in self.map.outputs}


def dissect(model: nn.Module, example_inputs: Any) -> Anatomy:
    """Trace a network and join its channels."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = unwrap(model)
    args, kwargs = batch = example_batch(model, example_inputs, None, "the analysis of the channels")
    graph = trace(model, args, kwargs)
    return Anatomy(model, graph, analyse(model, graph), batch)


def filter_groups(model: nn.Module, example_inputs: Any) -> FilterGroups:
    """Which filters of a network can be removed, and which only together.

    Parameters
    ----------
    model : Module
        Not changed.
    example_inputs : tensor, tuple, dict or loader
        A tensor, a tuple of positional or a dict of keyword arguments of one forward pass; of anything else the first
        batch.

    Returns
    -------
    groups : FilterGroups

    Raises
    ------
    LayerError
        The network cannot be traced.

    Examples
    --------
    >>> import torch, skfactor
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    >>> groups = skfactor.filter_groups(net, torch.zeros(1, 1, 4, 4))
    >>> groups["0"]
    FilterGroup(0: 4 units)
    >>> groups.frozen
    {'3': 'they are outputs of the network'}
    """
    return groups_of(dissect(model, example_inputs))


def groups_of(anatomy: Anatomy) -> FilterGroups:
    """Units are sets of filters; groups are what units connect."""
    reasons = anatomy.map.reasons()
    units: dict[int, list[tuple[str, int]]] = {}
    frozen: dict[str, str] = {}
    for layer, weight in anatomy.weights.items():
        sets = anatomy.map.sets_of(weight)
        for index, root in enumerate(sets.tolist()):
            if root not in reasons:
                units.setdefault(root, []).append((layer, index))
        if all(root in reasons for root in sets.tolist()):
            frozen[layer] = reasons[int(sets[0])]
    first: dict[str, str] = {}

    def head(layer: str) -> str:
        while first.setdefault(layer, layer) != layer:
            layer = first[layer]
        return layer

    order = {layer: i for i, layer in enumerate(anatomy.weights)}
    for members in units.values():
        heads = sorted({head(layer) for layer, _ in members}, key=order.get)
        first.update(dict.fromkeys(heads, heads[0]))
    groups: dict[str, list[tuple]] = {}
    for members in units.values():
        groups.setdefault(head(members[0][0]), []).append(tuple(members))
    found = [FilterGroup(tuple(sorted({layer for unit in g for layer, _ in unit}, key=order.get)), tuple(g))
             for g in groups.values()]
    return FilterGroups(tuple(sorted(found, key=lambda g: order[g.layers[0]])), frozen)


def remove_filters(model: nn.Module, filters: Mapping[str, Iterable[int]], example_inputs: Any, *,
                   coupled: str = "error") -> PrunedNetwork:
    """Remove filters of a network for good: the result is a smaller network that needs no mask.

    Everything behind a filter goes with it: its bias and normalisation, the input channels of the layers that read it,
    its place in concatenations and in the columns of a linear layer behind a flatten. The result computes what the
    network would with these channels zero wherever they occur; this is verified on the example inputs, every time.

    Parameters
    ----------
    model : Module
        Not changed.
    filters : dict of str to array-like of int
        By layer, the output channels to remove. `skfactor.filter_groups` lists what can be removed.
    example_inputs : tensor, tuple, dict or loader
        As in `skfactor.filter_groups`. Floating-point inputs that are constant are replaced by random ones in the
        verification.
    coupled : {"error", "remove"}, default="error"
        What to do when filters of other layers would have to go as well, because a sum or a grouped convolution needs
        them: raise, or remove them too. The filters of depthwise and grouped convolutions always go with their inputs.

    Returns
    -------
    pruned : PrunedNetwork

    Raises
    ------
    LayerError
        Filters that cannot be removed, or not alone; no filter would be left; the network cannot be traced; the result
        is not the masked network.
    ValueError
        A layer that does not exist, indices out of range.

    Examples
    --------
    >>> import torch, skfactor
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    >>> pruned = skfactor.remove_filters(net, {"0": [1, 2]}, torch.randn(2, 1, 4, 4))
    >>> pruned.model[0].weight.shape[0], pruned.model[4].weight.shape[1]
    (2, 8)
    """
    if coupled not in ("error", "remove"):
        raise ValueError(f"coupled must be 'error' or 'remove', got {coupled!r}")
    anatomy = dissect(model, example_inputs)
    return remove_sets(anatomy, _requested_sets(anatomy, filters, coupled))


def _requested_sets(anatomy: Anatomy, filters: Mapping[str, Iterable[int]], coupled: str) -> set[int]:
    """Sets of the filters asked for; LayerError where one may not go, or not alone."""
    if not isinstance(filters, Mapping) or not filters:
        raise ValueError("filters must be a dict of layer names and output channels, and not empty, "
                         f"got {type(filters).__name__}")
    weights, reasons = anatomy.weights, anatomy.map.reasons()
    asked: set[tuple[str, int]] = set()
    wanted: set[int] = set()
    for layer, chosen in filters.items():
        if layer not in weights:
            known = dict(anatomy.model.named_modules())
            what = "has no filters that are known" if layer in known else "is no layer of the network"
            raise ValueError(f"{layer!r} {what}{did_you_mean(layer, weights)}")
        sets = anatomy.map.sets_of(weights[layer])
        for index in _indices(chosen, len(sets), layer):
            root = int(sets[index])
            if root in reasons:
                raise LayerError(f"filter {index} of layer {layer!r} cannot be removed: {reasons[root]}")
            wanted.add(root)
            asked.add((layer, index))
    if coupled == "error":
        _check_alone(anatomy, wanted, asked)
    return wanted


def _indices(chosen: Iterable[int], n: int, layer: str) -> list[int]:
    array = np.asarray(list(chosen))
    if array.dtype == bool and array.shape == (n,):
        return np.flatnonzero(array).tolist()
    if array.size and (array.ndim != 1 or array.dtype.kind not in "iu"):
        raise ValueError(f"filters of layer {layer!r} must be integers, got {array.dtype} of shape {array.shape}")
    if array.size and (array.min() < 0 or array.max() >= n):
        raise ValueError(f"filters of layer {layer!r} must be from 0 to {n - 1}, got {int(array.min())} to "
                         f"{int(array.max())}")
    return sorted(set(array.tolist()))


def _check_alone(anatomy: Anatomy, wanted: set[int], asked: set[tuple[str, int]]) -> None:
    missing = []
    for layer, weight in anatomy.weights.items():
        if weight not in anatomy.map.followers:
            sets = anatomy.map.sets_of(weight)
            missing += [(layer, i) for i, root in enumerate(sets.tolist())
                        if root in wanted and (layer, i) not in asked]
    if missing:
        layers = list(dict.fromkeys(layer for layer, _ in missing))
        names = ", ".join(map(repr, layers[:4])) + (f" and {len(layers) - 4} more" if len(layers) > 4 else "")
        layer, index = missing[0]
        raise LayerError(f"these filters are coupled with others, which would have to go as well: filters of {names} "
                         f"(such as filter {index} of {layer!r}). Name them too (skfactor.filter_groups lists what "
                         "belongs together), or give coupled='remove'")


def remove_sets(anatomy: Anatomy, wanted: set[int]) -> PrunedNetwork:
    """Remove sets of channels and verify the result."""
    kept = _kept_axes(anatomy, wanted)
    dtype, masked = _masked_outputs(anatomy, wanted)
    failure = None
    # views with numbers in their code get new ones only where the network does not run without
    for functions in (("pad", "split"), ("pad", "split", "view")):
        plan = make_plan(anatomy.model, kept, _rewritten(anatomy, wanted, functions))
        pruned = deep_copy(anatomy.model)
        replay(pruned, plan)
        try:
            difference = _difference(pruned, anatomy, masked, dtype)
        except Exception as error:
            failure = failure or f"it does not run: {_line(error)}"
            continue
        if difference <= TOLERANCE:
            removed = {layer: tuple(np.flatnonzero(np.isin(anatomy.map.sets_of(weight), list(wanted))).tolist())
                       for layer, weight in anatomy.weights.items()}
            return PrunedNetwork(pruned, plan, {k: v for k, v in removed.items() if v}, difference,
                                 count_parameters(anatomy.model), count_parameters(pruned))
        failure = failure or f"outputs differ by {difference:.3g} of the largest, allowed {TOLERANCE:.3g}"
    raise LayerError(f"the pruned network is not the masked one: {failure}. Something in its code depends on the "
                     "channels in a way that is not understood; the network is unchanged")


def _kept_axes(anatomy: Anatomy, wanted: set[int]) -> dict[tuple[str, int], np.ndarray]:
    """What stays of every axis that loses something."""
    kept = {}
    for (name, axis), atoms in anatomy.map.axes.items():
        mask = ~np.isin(anatomy.map.roots[atoms], list(wanted))
        if not mask.any():
            raise LayerError(f"no channel of {name} (axis {axis}) would be left")
        if not mask.all():
            kept[name, axis] = mask
    return kept


def _rewritten(anatomy: Anatomy, wanted: set[int], functions: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """New arguments of calls, by the module in whose forward pass they are counted."""
    found: list[tuple[list[tuple[str, int]], dict[str, Any]]] = []
    for function in functions:
        places = anatomy.graph.places(_KINDS[function])
        for call in anatomy.map.calls:
            gone = np.isin(anatomy.map.roots[call.after], list(wanted))
            if call.function == function and gone.any() and not _splits_alike(call, gone):
                found.append((places[call.node], {"function": function, "axis": call.axis}
                              | _new_arguments(anatomy, call, wanted, gone)))
    # calls are counted in the outermost module in which any is rewritten: such modules must not be nested
    homes = {steps[-1][0] for steps, _ in found}
    calls: dict[str, list[dict[str, Any]]] = {}
    for steps, spec in found:
        path, number = next((path, number) for path, number in steps if path in homes)
        spec = spec | {"call": number}
        known = calls.setdefault(path, [])
        if other := next((s for s in known if (s["function"], s["call"]) == (spec["function"], number)), None):
            if other != spec:
                raise LayerError(f"module {path!r} runs more than once and would need a different {spec['function']} "
                                 "each time")
        else:
            known.append(spec)
    return calls


def _splits_alike(call: Call, gone: np.ndarray) -> bool:
    """Whether a number of equal parts, which is all that the call says, is what it must still give."""
    parts = {int((~part).sum()) for part in np.split(gone, np.cumsum(call.parts)[:-1])} if call.parts else set()
    return operation(call.node) in ("chunk", "unsafe_chunk") and len(set(call.parts)) == len(parts) == 1


def _new_arguments(anatomy: Anatomy, call: Call, wanted: set[int], gone: np.ndarray) -> dict[str, Any]:
    if call.function == "split":
        return {"sizes": [int((~part).sum()) for part in np.split(gone, np.cumsum(call.parts)[:-1])]}
    if call.function == "view":
        shape = list(call.node.meta["val"].shape)
        shape[call.axis] = int((~gone).sum())
        return {"shape": [-1 if axis == 0 and call.axis != 0 else int(n) for axis, n in enumerate(shape)]}
    left = ~np.isin(anatomy.map.roots[call.before], list(wanted))
    place = {int(atom): i for i, atom in enumerate(call.before[left])}
    return {"channels": [place.get(int(atom), -1) for atom in call.after[~gone]]}


# ------------------------------------------------------------------------------------------------- verification
def _masked_outputs(anatomy: Anatomy, wanted: set[int]) -> tuple[torch.dtype, list[torch.Tensor]]:
    """Outputs of the graph with the removed channels set to zero wherever they occur, and the precision they have."""
    removed = list(wanted)

    def mask(value: torch.Tensor, channels) -> None:
        gone = np.flatnonzero(np.isin(anatomy.map.roots[channels.atoms], removed))
        if len(gone):
            value.index_fill_(channels.axis, torch.from_numpy(gone).to(value.device), 0)

    def after(node: fx.Node, value: Any) -> Any:
        known = anatomy.map.values.get(node)
        for part, channels in zip(value, known, strict=True) if isinstance(known, list) else [(value, known)]:
            if channels is not None and isinstance(part, torch.Tensor):
                mask(part, channels)
        return value

    for dtype in (torch.float64, torch.float32):
        try:
            model, (args, kwargs) = _for_comparison(anatomy.model, anatomy.batch, dtype)
            return dtype, [v for v in anatomy.graph.run(model, args, kwargs, after) if _is_float(v)]
        except Exception as error:  # code that insists on a dtype
            failure = error
    raise LayerError(f"the network cannot be run for the verification: {_line(failure)}") from failure


def _difference(pruned: nn.Module, anatomy: Anatomy, masked: list[torch.Tensor], dtype: torch.dtype) -> float:
    """Largest difference of an output, relative to the largest value of that output."""
    model, (args, kwargs) = _for_comparison(pruned, anatomy.batch, dtype)
    with evaluation(model):
        outputs = [v for v in leaves(model(*args, **kwargs)) if _is_float(v)]
    if [v.shape for v in outputs] != [v.shape for v in masked]:
        raise ValueError(f"its outputs have shapes {[tuple(v.shape) for v in outputs]}, expected "
                         f"{[tuple(v.shape) for v in masked]}")
    worst = 0.0
    for a, b in zip(outputs, masked, strict=True):
        scale = max(float(b.abs().max()), torch.finfo(b.dtype).tiny) if b.numel() else 1.0
        error = float((a - b).abs().max()) / scale if b.numel() else 0.0
        worst = max(worst, error if error == error else np.inf)
    return worst


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _for_comparison(model: nn.Module, batch: tuple[tuple, dict],
                    dtype: torch.dtype) -> tuple[nn.Module, tuple[tuple, dict]]:
    """A copy in a precision in which rounding is no excuse, with inputs that tell something."""
    generator = torch.Generator().manual_seed(0)

    def telling(value: Any) -> Any:
        if not _is_float(value):
            return value
        if value.numel() > 1 and bool((value == value.reshape(-1)[0]).all()):
            value = torch.randn(value.shape, generator=generator).to(value.device)
        return value.to(dtype)

    args, kwargs = batch
    return deep_copy(model).to(dtype), (tuple(map(telling, args)), {k: telling(v) for k, v in kwargs.items()})
