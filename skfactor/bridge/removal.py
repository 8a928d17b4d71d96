"""What was removed from a network, as plain JSON: a list of edits that any fresh instance of its class can take.

An edit names a module and what it keeps: output channels, input channels, or indices of an axis of one of its
parameters; or a call in its forward pass that gets other arguments. Nothing is traced to replay it.
"""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from skfactor.bridge.calls import rewrite_calls, rewritten_calls
from skfactor.bridge.layers import unwrap
from skfactor.exceptions import FormatError, LayerError
from skfactor.report import REMOVED

__all__ = ["attach", "axes_of", "make_plan", "removal_of", "replay", "replay_missing"]

#: Attribute of a network.
_ATTRIBUTE = REMOVED.replace(".", "_")
_VERSION = 1
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)

#: Role -> the (parameter or buffer, axis) pairs that have it.
Axes = dict[str, list[tuple[str, int]]]


def axes_of(module: nn.Module) -> Axes:
    """Which axes of a module's tensors count its output and its input channels; empty for unknown modules."""
    if isinstance(module, _CONVOLUTIONS):
        outputs = [("weight", 0), ("bias", 0)]
        return {"out": outputs} if module.groups > 1 else {"out": outputs, "in": [("weight", 1)]}
    if isinstance(module, _TRANSPOSED):
        # of a grouped one the weight has only the outputs of one group, and these stay
        outputs = [("bias", 0)] if module.groups > 1 else [("weight", 1), ("bias", 0)]
        return {"out": outputs, "in": [("weight", 0)]}
    if isinstance(module, nn.Linear):
        return {"out": [("weight", 0), ("bias", 0)], "in": [("weight", 1)]}
    if _is_conv1d(module):
        return {"out": [("weight", 1), ("bias", 0)], "in": [("weight", 0)]}
    if isinstance(module, nn.Embedding):
        return {"out": [("weight", 1)]}
    if isinstance(module, _NORMS):
        return {"out": [(name, 0) for name in ("weight", "bias", "running_mean", "running_var")]}
    return {"out": [("weight", 0)]} if isinstance(module, nn.PReLU) else {}


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _set_sizes(module: nn.Module, ratio: float) -> None:
    """Channel counts as attributes, from the shapes of the new tensors; `ratio` of the groups of a grouped layer."""
    shape = getattr(getattr(module, "weight", None), "shape", None)
    if isinstance(module, _CONVOLUTIONS):
        module.groups = round(module.groups * ratio) if module.groups > 1 else 1
        module.out_channels, module.in_channels = shape[0], shape[1] * module.groups
    elif isinstance(module, _TRANSPOSED):
        module.groups = round(module.groups * ratio) if module.groups > 1 else 1
        module.in_channels, module.out_channels = shape[0], shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif _is_conv1d(module):
        module.nf = shape[1]
        if hasattr(module, "nx"):
            module.nx = shape[0]
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = shape[0]
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_channels = round(module.num_channels * ratio)
    elif isinstance(module, _NORMS):
        module.num_features = round(module.num_features * ratio)


# -------------------------------------------------------------------------------------------------------- the plan
def make_plan(model: nn.Module, kept: Mapping[tuple[str, int], np.ndarray],
              calls: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """JSON of a removal.

    Parameters
    ----------
    model : Module
    kept : dict of (str, int) to ndarray of bool
        For axes of parameters and buffers, by first name, what stays. A name that ends in ":outputs" is of a grouped
        transposed convolution, whose weight has no such axis.
    calls : dict of str to list of dict
        By module, as `skfactor.bridge.calls.rewrite_calls` takes them.

    Returns
    -------
    plan : dict
        `sets`: what stays, as "size:mask" with the mask in hexadecimal digits, lowest index first; `modules`: for each
        module by path its roles ("out", "in", or "name.axis") with the number of a set; `calls`.
    """
    owners = _owners(model)
    sets: dict[str, int] = {}
    modules: dict[str, dict[str, int]] = {}
    for (name, axis), mask in kept.items():
        number = sets.setdefault(_mask_text(mask), len(sets))
        if name.endswith(":outputs"):
            path, _, own = name.removesuffix(":outputs").rpartition(".")
            modules.setdefault(path, {})["out"] = number
            continue
        for path, own in owners[name]:
            role = next((r for r, axes in axes_of(model.get_submodule(path)).items() if (own, axis) in axes),
                        f"{own}.{axis}")
            roles = modules.setdefault(path, {})
            roles[role if roles.get(role, number) == number else f"{own}.{axis}"] = number
    return {"version": _VERSION, "sets": list(sets), "modules": modules, "calls": dict(calls)}


def _owners(model: nn.Module) -> dict[str, list[tuple[str, str]]]:
    """For each tensor by its first name the (module, own name) pairs that hold it."""
    first: dict[int, str] = {}
    found: dict[str, list[tuple[str, str]]] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, value in named:
        path, _, own = name.rpartition(".")
        found.setdefault(first.setdefault(id(value), name), []).append((path, own))
    return found


def _mask_text(mask: np.ndarray) -> str:
    return f"{len(mask)}:{np.packbits(mask, bitorder='little').tobytes().hex()}"


def _indices(text: str) -> tuple[int, torch.Tensor]:
    """Size of an axis and what is kept of it."""
    size, _, digits = text.partition(":")
    mask = np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8), bitorder="little")
    if len(mask) != -(-int(size) // 8) * 8 or mask[int(size):].any():
        raise ValueError("mask and size differ")
    return int(size), torch.from_numpy(np.flatnonzero(mask))


# ---------------------------------------------------------------------------------------------------------- replay
@dataclass(frozen=True)
class _Tensor:
    """A parameter or buffer in its place."""

    module: nn.Module
    name: str

    @property
    def value(self) -> torch.Tensor | None:
        return getattr(self.module, self.name, None)

    def put(self, value: torch.Tensor) -> None:
        home = self.module._parameters if self.name in self.module._parameters else self.module._buffers
        home[self.name] = value


def replay(model: nn.Module, plan: Mapping[str, Any]) -> Callable[[], None]:
    """Remove from a network what a plan says, in place, and return a function that undoes it.

    Parameters are new objects afterwards; ties stay. Everything is checked before the first change.

    Raises
    ------
    LayerError
        The network is not as the plan expects it; it is unchanged.
    FormatError
        The plan is damaged; the network is unchanged.
    """
    root = unwrap(model)
    sets, roles_of, calls = _read(plan)
    new: dict[tuple[nn.Module, str], torch.Tensor] = {}
    made: dict[tuple, torch.Tensor] = {}
    ratios = {}
    for path, roles in roles_of.items():
        module = _module(root, path)
        cuts: dict[str, list[tuple[int, int]]] = {}
        for role, number in roles.items():
            for name, axis in _tensors_of(module, path, role):
                cuts.setdefault(name, []).append((axis, number))
        for name, cut in cuts.items():
            old = _Tensor(module, name).value
            key = (id(old), tuple(sorted(cut)))
            if key not in made:
                made[key] = _cut(old, [(axis, *sets[number]) for axis, number in cut], f"{path}.{name}".strip("."))
            new[module, name] = made[key]
        size, index = sets[roles.get("out", next(iter(roles.values())))]
        ratios[module] = len(index) / size
    called = {_module(root, path): specs for path, specs in calls.items()}
    return _apply(root, plan, new, ratios, called)


def _apply(root, plan, new, ratios, called) -> Callable[[], None]:
    before = {module: dict(module.__dict__) | {"_parameters": dict(module._parameters),
                                               "_buffers": dict(module._buffers)}
              for module in {root, *ratios, *called}}
    calls_before = {module: rewritten_calls(module) for module in called}

    def undo() -> None:
        for module in called:
            rewrite_calls(module, calls_before[module])
        for module, state in before.items():
            module.__dict__.clear()
            module.__dict__.update(state)

    try:
        for (module, name), value in new.items():
            _Tensor(module, name).put(value)
        for module, ratio in ratios.items():
            _set_sizes(module, ratio)
        for module, specs in called.items():
            rewrite_calls(module, [*rewritten_calls(module), *specs])
        attach(root, [*removal_of(root), dict(plan)])
    except BaseException:
        undo()
        raise
    return undo


def _read(plan: Mapping[str, Any]) -> tuple[list[tuple[int, torch.Tensor]], dict, dict]:
    """Sets, modules and calls of a plan; FormatError for anything that is none."""
    if isinstance(plan, Mapping) and plan.get("version", 0) != _VERSION:
        raise FormatError(f"removals of version {plan.get('version')!r:.40} are not known, expected {_VERSION}")
    try:
        sets = [_indices(text) for text in plan["sets"]]
        modules = {str(path): {str(r): sets[n] and int(n) for r, n in roles.items()}
                   for path, roles in plan["modules"].items()}
        calls = {str(path): [_checked_call(spec) for spec in specs] for path, specs in plan["calls"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise FormatError(f"metadata {REMOVED!r} is damaged: {error!r:.120}") from None
    return sets, modules, calls


def _checked_call(spec: Mapping[str, Any]) -> dict[str, Any]:
    kind = {"pad": "channels", "split": "sizes", "view": "shape"}[spec["function"]]
    numbers = [int(n) for n in spec[kind]]
    return {"function": spec["function"], "call": int(spec["call"]), "axis": int(spec["axis"]), kind: numbers}


def _module(root: nn.Module, path: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError:
        raise LayerError(f"channels were removed from {path!r}, which this network does not have") from None


def _tensors_of(module: nn.Module, path: str, role: str) -> list[tuple[str, int]]:
    known = axes_of(module).get(role)
    if known is None:
        name, _, axis = role.rpartition(".")
        if not (name and axis.isdigit()):
            raise LayerError(f"layer {path!r} ({type(module).__name__}) has no {role!r} channels to remove")
        known = [(name, int(axis))]
    return [(name, axis) for name, axis in known if isinstance(_Tensor(module, name).value, torch.Tensor)]


def _cut(old: torch.Tensor, cuts: list[tuple[int, int, torch.Tensor]], name: str) -> torch.Tensor:
    """A new parameter or buffer with what is kept of each axis."""
    value = old.detach()
    for axis, size, index in cuts:
        if axis >= value.dim() or value.shape[axis] != size:
            raise LayerError(f"channels were removed from {size} along axis {axis} of {name}, "
                             f"which has the shape {tuple(old.shape)} here")
        value = value.index_select(axis, index.to(value.device))
    for form in (torch.channels_last, torch.channels_last_3d):
        if old.dim() == (4 if form is torch.channels_last else 5) and old.is_contiguous(memory_format=form) \
                and not old.is_contiguous():
            value = value.contiguous(memory_format=form)
    return nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value


def removal_of(model: nn.Module) -> list[dict[str, Any]]:
    """The plans of everything that was removed from a network, in order; they are copied with it."""
    return list(getattr(unwrap(model), _ATTRIBUTE, ()))


def attach(model: nn.Module, plans: list[dict[str, Any]]) -> None:
    """Note the removals on the network itself."""
    unwrap(model).__dict__[_ATTRIBUTE] = plans


def replay_missing(model: nn.Module, plans: Any) -> Callable[[], None]:
    """Replay those removals of a file that the network does not have yet; returns a function that undoes them.

    Raises
    ------
    LayerError
        The network has lost other filters than the plans say, or is not as they expect it; it is unchanged.
    FormatError
        The plans are damaged; the network is unchanged.
    """
    if not isinstance(plans, list):
        raise FormatError(f"metadata {REMOVED!r} must be a list, got {plans!r:.120}")
    done = removal_of(model)
    if plans[: len(done)] != done:
        raise LayerError("filters were removed from this network that are in the file, or others than the file says: "
                         "load into a fresh instance of its class")
    undos: list[Callable[[], None]] = []

    def undo() -> None:
        for step in reversed(undos):
            step()

    try:
        for plan in plans[len(done):]:
            undos.append(replay(model, plan))
    except BaseException:
        undo()
        raise
    return undo
