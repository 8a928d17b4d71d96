"""Calls in a network's own code whose arguments count channels: they get new arguments when channels are removed.

`F.pad(x, (0, 0, 0, 0, 8, 8))` in a `forward` pads by 8 channels whatever is left of the network. The module whose
`forward` does so gets a subclass that answers this call otherwise; names, parameters and code stay.
"""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["FUNCTIONS", "gather_channels", "original_class", "rewrite_calls", "rewritten_calls"]

#: Functions of torch by the kind under which their calls are counted.
FUNCTIONS = {
    F.pad: "pad", torch.constant_pad_nd: "pad",
    torch.split: "split", torch.Tensor.split: "split", torch.chunk: "split", torch.Tensor.chunk: "split",
    torch.Tensor.split_with_sizes: "split", torch.split_with_sizes: "split", torch.tensor_split: "split",
    torch.Tensor.tensor_split: "split", torch.Tensor.unsafe_chunk: "split", torch.unsafe_chunk: "split",
    torch.Tensor.view: "view", torch.Tensor.reshape: "view", torch.reshape: "view", torch.Tensor.unflatten: "view",
    torch.unflatten: "view",
}
_ATTRIBUTE = "_skfactor_calls"
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # older versions of torch


def gather_channels(x: torch.Tensor, index: torch.Tensor, axis: int, value: float = 0.0) -> torch.Tensor:
    """Channels of x by number; -1 is a channel of constant `value`.

    >>> gather_channels(torch.tensor([[1.0, 2.0]]), torch.tensor([-1, 1, 0]), 1)
    tensor([[0., 2., 1.]])
    """
    padding = [0, 0] * (x.dim() - 1 - axis) + [0, 1]
    constant = F.pad(x, padding, value=value)
    return constant.index_select(axis, torch.where(index < 0, x.shape[axis], index))


def _pad(spec: Mapping[str, Any], args: tuple, kwargs: dict) -> torch.Tensor:
    """The channels by number, the other axes as the call says."""
    x, amounts, *rest = args if len(args) > 1 else (*args, kwargs["pad"])
    value = (rest[-1] if rest and not isinstance(rest[-1], str) else kwargs.get("value")) or 0.0
    place = 2 * (x.dim() - 1 - spec["axis"])
    others = list(amounts) + [0] * (place + 2 - len(amounts))
    channels, n = list(spec["channels"]), x.shape[spec["axis"]]
    before = channels.index(0) if 0 in channels else 0
    in_order = channels == [-1] * before + list(range(n)) + [-1] * (len(channels) - n - before)
    if in_order and type(x) is torch.Tensor and not _is_exporting():  # a graph must show channels by number
        others[place : place + 2] = [before, len(channels) - n - before]
        return F.pad(x, others, value=value)
    others[place : place + 2] = [0, 0]
    x = F.pad(x, others, value=value) if any(others) else x
    index = torch.tensor(channels, device=x.device)
    return gather_channels(x, index, spec["axis"], value)


def _split(spec: Mapping[str, Any], args: tuple, kwargs: dict) -> tuple[torch.Tensor, ...]:
    x = args[0] if args else next(iter(kwargs.values()))
    return torch.split_with_sizes(x, list(spec["sizes"]), spec["axis"])


def _view(spec: Mapping[str, Any], args: tuple, kwargs: dict) -> torch.Tensor:
    x = args[0] if args else next(iter(kwargs.values()))
    return x.reshape(spec["shape"])


_ANSWERS = {"pad": _pad, "split": _split, "view": _view}


class _OtherArguments(TorchFunctionMode):
    """Counts the calls of each kind during one forward pass, and answers those that are listed."""

    def __init__(self, specs: Sequence[Mapping[str, Any]]):
        super().__init__()
        self.specs = {(spec["function"], spec["call"]): spec for spec in specs}
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kind = FUNCTIONS.get(function)
        if kind is None:
            return function(*args, **(kwargs or {}))
        spec = self.specs.get((kind, self.counts[kind]))
        self.counts[kind] += 1
        if spec is None:
            return function(*args, **(kwargs or {}))
        return _ANSWERS[kind](spec, args, kwargs or {})


@cache
def _let_compiled_padding_ask() -> None:
    """Have `torch.compile` trace F.pad so that it asks the mode, as it does elsewhere; its results are the same."""

    def traced(input, pad, mode="constant", value=None):
        if mode == "constant":
            return torch.constant_pad_nd(input, pad, 0.0 if value is None else value)
        return torch._C._nn.pad(input, pad, mode, value)

    if hasattr(torch.compiler, "substitute_in_graph"):  # not in older versions of torch
        torch.compiler.substitute_in_graph(F.pad, skip_signature_check=True)(traced)


@cache
def _rewritten_class(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self, *args, **kwargs):
        with _OtherArguments(self.__dict__[_ATTRIBUTE]):
            return cls.forward(self, *args, **kwargs)

    def reduce(self, protocol):  # a class that is made here cannot be found by its name
        return _restore, (cls, self.__dict__)

    return type(cls.__name__, (cls,), {"forward": forward, "__reduce_ex__": reduce, "__module__": cls.__module__,
                                       "_skfactor_original": cls})


def _restore(cls: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    module = _rewritten_class(cls).__new__(_rewritten_class(cls))
    module.__dict__.update(state)
    _prepare(rewritten_calls(module))
    return module


def _prepare(specs: Sequence[Mapping[str, Any]]) -> None:
    if any(spec["function"] == "pad" for spec in specs):
        _let_compiled_padding_ask()


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that the user wrote."""
    return getattr(type(module), "_skfactor_original", type(module))


def rewritten_calls(module: nn.Module) -> list[dict[str, Any]]:
    """What `rewrite_calls` did to a module."""
    return list(module.__dict__.get(_ATTRIBUTE, ()))


def rewrite_calls(module: nn.Module, specs: Sequence[Mapping[str, Any]]) -> None:
    """Give calls in a module's forward pass other arguments, in place; none restores the module.

    Parameters
    ----------
    module : Module
    specs : sequence of dict
        `function` ("pad", "split" or "view"), `call` (its number among the calls of this kind in the forward pass of
        the module, those of its children included), `axis`, and `channels` (pad: numbers of channels of the argument,
        -1 for the constant), `sizes` (split) or `shape` (view).
    """
    cls = original_class(module)
    _prepare(specs)
    if specs:
        module.__dict__[_ATTRIBUTE] = [dict(spec) for spec in specs]
        module.__class__ = _rewritten_class(cls)
    else:
        module.__dict__.pop(_ATTRIBUTE, None)
        module.__class__ = cls
